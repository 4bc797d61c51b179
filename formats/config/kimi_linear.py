"""Kimi-Linear-48B-A3B (source: transformers' configuration_kimi_linear.py and the published config.json)."""

from dataclasses import dataclass
from typing import Any

from formats.config.base import DENSE, FULL_ATTENTION, LINEAR_ATTENTION, SPARSE, Where, only
from formats.config.deepseek_v3 import DeepseekV3Config
from formats.fields import Fields
from formats.window import in_lanes


@dataclass(frozen=True, kw_only=True)
class KimiLinearConfig(DeepseekV3Config):
    """Kimi Delta Attention in most layers, in the others DeepSeek-V3's latent attention without positions.

    What is qk_rope_head_dim there is one more part of queries, whose key all heads share. Experts are DeepSeek-V3's.
    """

    linear_num_heads: int
    linear_head_dim: int  # of keys and of values
    linear_conv_kernel_dim: int

    @property
    def linear_width(self) -> int:
        """Of the queries, keys, values, decays or gates of one token."""
        return self.linear_num_heads * self.linear_head_dim

    @property
    def known_layer_types(self) -> tuple[str, ...]:
        return FULL_ATTENTION, LINEAR_ATTENTION

    @property
    def state_values(self) -> int:
        recurrent = self.linear_width * in_lanes(self.linear_head_dim)
        convolution = (self.linear_conv_kernel_dim - 1) * 3 * self.linear_width
        return self.layer_types.count(LINEAR_ATTENTION) * (recurrent + convolution)

    def mixer_values(self, tokens: int) -> int:
        return max(super().mixer_values(tokens), tokens * 14 * self.linear_width)

    def check(self, where: Where) -> None:
        super().check(where)
        self.require(where, self.linear_conv_kernel_dim > 1, "linear_conv_kernel_dim", "2 or more")

    @classmethod
    def read(cls, config: Fields) -> "KimiLinearConfig":
        """From config.json. Raises FormatError or UnsupportedError naming the key."""
        only(config, "hidden_act", "silu")
        return cls(
            model_type="kimi_linear",
            max_position_embeddings=config.integer("model_max_length", 1, 2**31),
            **read_delta_and_latent(config),
        )


def read_delta_and_latent(config: Fields) -> dict[str, Any]:
    """The facts of KimiLinearConfig but two. Raises FormatError or UnsupportedError naming the key."""
    for key, implemented in {
        "attention_bias": False,
        "moe_layer_freq": 1,
        "moe_router_activation_func": "sigmoid",
        "mla_use_nope": True,
        "rope_scaling": None,
    }.items():
        only(config, key, implemented)
    linear = config.object("linear_attn_config")
    num_layers = config.integer("num_hidden_layers", 1, 10_000)
    heads = config.integer("num_attention_heads", 1, 2**16)
    nope, shared = config.integer("qk_nope_head_dim", 1, 2**16), config.integer("qk_rope_head_dim", 1, 2**16)
    inner = config.integer("moe_intermediate_size", 1, 2**24)
    dense = config.integer("first_k_dense_replace", 0, num_layers, default=1)
    return {
        "vocab_size": config.integer("vocab_size", 1, 2**31),
        "hidden_size": config.integer("hidden_size", 1, 2**24),
        "num_hidden_layers": num_layers,
        "rms_norm_eps": config.number("rms_norm_eps"),
        "tie_word_embeddings": config.boolean("tie_word_embeddings", default=False),
        "layer_types": _read_layer_types(linear, num_layers),
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "head_dim": nope + shared,
        "rotary_dim": shared,
        "rope_theta": config.number("rope_theta", 10000.0),
        "rope_scaling": None,
        "num_experts": config.integer("num_experts", 1, 2**20),
        "top_k": config.integer("num_experts_per_token", 1, 2**20),
        "moe_intermediate_size": inner,
        "mlp_layer_types": (DENSE,) * dense + (SPARSE,) * (num_layers - dense),
        "intermediate_size": config.integer("intermediate_size", 1, 2**24),
        "shared_expert_intermediate_size": inner * config.integer("num_shared_experts", 1, 2**10),
        "q_lora_rank": config.integer("q_lora_rank", 1, 2**24) if "q_lora_rank" in config else None,
        "kv_lora_rank": config.integer("kv_lora_rank", 1, 2**24),
        "qk_nope_head_dim": nope,
        "qk_rope_head_dim": shared,
        "v_head_dim": config.integer("v_head_dim", 1, 2**16),
        "n_group": config.integer("num_expert_group", 1, 2**20, default=1),
        "topk_group": config.integer("topk_group", 1, 2**20, default=1),
        "norm_topk_prob": config.boolean("moe_renormalize", default=True),
        "routed_scaling_factor": config.number("routed_scaling_factor"),  # defaults differ
        "indexer": None,
        "linear_num_heads": linear.integer("num_heads", 1, 2**16),
        "linear_head_dim": linear.integer("head_dim", 1, 2**16),
        "linear_conv_kernel_dim": linear.integer("short_conv_kernel_size", 2, 64, default=4),
    }


def _read_layer_types(linear: Fields, num_layers: int) -> tuple[str, ...]:
    """Two lists of layers, which are counted from 1 there."""
    delta, full = (linear.integers(key, 1, num_layers) for key in ("kda_layers", "full_attn_layers"))
    if sorted(delta + full) != list(range(1, num_layers + 1)):
        raise linear.wrong("kda_layers", f"with full_attn_layers each layer from 1 to {num_layers} once")
    return tuple(LINEAR_ATTENTION if layer in delta else FULL_ATTENTION for layer in range(1, num_layers + 1))
