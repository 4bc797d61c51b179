"""Qwen3.5 MoE, text part, and Qwen3-Next (source: transformers' configuration_qwen3_5_moe.py, .._qwen3_next.py)."""

from dataclasses import dataclass
from typing import Any

from formats.config.base import FULL_ATTENTION, LINEAR_ATTENTION, ModelConfig, Where, language_model, only
from formats.config.rope import read_rope, read_rotary_dim
from formats.fields import Fields
from formats.window import in_lanes

GROUPED, TILED = "grouped", "tiled"


@dataclass(frozen=True)
class Qwen3_5MoeConfig(ModelConfig):  # noqa: N801 - the family's name
    """Gated DeltaNet and gated attention, routed experts and a shared one."""

    shared_expert_intermediate_size: int
    linear_num_key_heads: int
    linear_num_value_heads: int
    linear_key_head_dim: int
    linear_value_head_dim: int
    linear_conv_kernel_dim: int
    linear_in_proj_grouped: bool  # in_proj_qkvz by key head (Qwen3-Next), else in_proj_qkv and in_proj_z
    linear_in_proj_ba_grouped: bool  # in_proj_ba by key head (Qwen3-Next), else in_proj_b and in_proj_a
    linear_value_heads_tiled: bool  # value head h has key head h % linear_num_key_heads, as GGUF files order them

    @property
    def linear_conv_channels(self) -> int:
        """Channels of the convolution: q, k and v side by side."""
        key_dim = self.linear_num_key_heads * self.linear_key_head_dim
        return 2 * key_dim + self.linear_num_value_heads * self.linear_value_head_dim

    @property
    def known_layer_types(self) -> tuple[str, ...]:
        return LINEAR_ATTENTION, FULL_ATTENTION

    def cache_values(self, ctx_size: int, chunk_size: int) -> int:
        layers = sum(kind != LINEAR_ATTENTION for kind in self.layer_types)
        return layers * in_lanes(ctx_size) * self.num_key_value_heads * (self.head_dim + in_lanes(self.head_dim))

    @property
    def state_values(self) -> int:
        recurrent = self.linear_num_value_heads * self.linear_key_head_dim * in_lanes(self.linear_value_head_dim)
        convolution = self.linear_conv_channels * (self.linear_conv_kernel_dim - 1)
        return self.layer_types.count(LINEAR_ATTENTION) * (recurrent + convolution)

    @property
    def feed_forward_width(self) -> int:
        return max(self.moe_intermediate_size, self.shared_expert_intermediate_size)

    def mixer_values(self, tokens: int) -> int:
        attention = (8 * self.num_attention_heads + 3 * self.num_key_value_heads) * self.head_dim
        values = self.linear_num_value_heads * self.linear_value_head_dim
        keys = self.linear_num_key_heads * self.linear_key_head_dim
        return tokens * max(attention, 2 * self.linear_conv_channels + 2 * keys + 7 * values)

    def check(self, where: Where) -> None:
        super().check(where)
        self.require_known(where, "layer_types", self.known_layer_types)
        self.require_divides(where, "linear_num_key_heads", "linear_num_value_heads")
        self.require(where, self.linear_conv_kernel_dim > 1, "linear_conv_kernel_dim", "2 or more")

    @classmethod
    def read(cls, outer: Fields) -> "Qwen3_5MoeConfig":
        """From config.json, nested in text_config or flat. Raises FormatError or UnsupportedError naming the key."""
        text = language_model(outer)
        model_type = "qwen3_next" if outer.string("model_type") == "qwen3_next" else "qwen3_5_moe"
        return cls(**read_hybrid(outer, text, model_type))


def read_hybrid(outer: Fields, text: Fields, model_type: str) -> dict[str, Any]:
    """The facts of Qwen3_5MoeConfig, in text. Raises FormatError or UnsupportedError naming the key."""
    only(text, "hidden_act", "silu")
    only(text, "attention_bias", False)
    only(text, "attn_output_gate", True)
    only(text, "norm_topk_prob", True)
    only(text, "mlp_only_layers", [])
    only(text, "decoder_sparse_step", 1)
    only(text, "mamba_ssm_dtype", "float32")
    for key in ("sliding_window", "final_logit_softcapping"):
        only(text, key, None)
    rope_theta, rope_scaling = read_rope(text)
    head_dim = text.integer("head_dim", 1, 2**16)
    num_layers = text.integer("num_hidden_layers", 1, 10_000)
    interval = text.integer("full_attention_interval", 1, 10_000, default=4)
    by_interval = [LINEAR_ATTENTION if (i + 1) % interval else FULL_ATTENTION for i in range(num_layers)]
    # transformers reads this key from the outer config; published files hold it in either place.
    tied = outer.boolean("tie_word_embeddings", default=text.boolean("tie_word_embeddings", default=False))
    return {
        "model_type": model_type,
        "vocab_size": text.integer("vocab_size", 1, 2**31),
        "hidden_size": text.integer("hidden_size", 1, 2**24),
        "num_hidden_layers": num_layers,
        "max_position_embeddings": text.integer("max_position_embeddings", 1, 2**31),
        "rms_norm_eps": text.number("rms_norm_eps"),
        "tie_word_embeddings": tied,
        "layer_types": tuple(text.strings("layer_types", by_interval)),
        "num_attention_heads": text.integer("num_attention_heads", 1, 2**16),
        "num_key_value_heads": text.integer("num_key_value_heads", 1, 2**16),
        "head_dim": head_dim,
        "rotary_dim": read_rotary_dim(text, head_dim, head_dim // 4),
        "rope_theta": rope_theta,
        "rope_scaling": rope_scaling,
        "num_experts": text.integer("num_experts", 1, 2**20),
        "top_k": text.integer("num_experts_per_tok", 1, 2**20),
        "moe_intermediate_size": text.integer("moe_intermediate_size", 1, 2**24),
        "shared_expert_intermediate_size": text.integer("shared_expert_intermediate_size", 1, 2**24),
        "linear_num_key_heads": text.integer("linear_num_key_heads", 1, 2**16),
        "linear_num_value_heads": text.integer("linear_num_value_heads", 1, 2**16),
        "linear_key_head_dim": text.integer("linear_key_head_dim", 1, 2**16),
        "linear_value_head_dim": text.integer("linear_value_head_dim", 1, 2**16),
        "linear_value_heads_tiled": _read_head_order(text) == TILED,
        "linear_conv_kernel_dim": text.integer("linear_conv_kernel_dim", 2, 64),
        # Our own key: GGUF files of Qwen3-Next have the one apart and the other not.
        "linear_in_proj_grouped": text.boolean("linear_in_proj_grouped", default=model_type == "qwen3_next"),
        "linear_in_proj_ba_grouped": model_type == "qwen3_next",
    }


def _read_head_order(text: Fields) -> str:
    """Which key head a value head has: those of one key head follow each other, or take turns (our own key)."""
    order = text.string("linear_value_head_order", GROUPED)
    if order not in (GROUPED, TILED):
        raise text.wrong("linear_value_head_order", f"{GROUPED} or {TILED}")
    return order
