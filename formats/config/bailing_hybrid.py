"""Ling and Ring 3 (source: transformers' configuration_bailing_hybrid.py and the published config.json)."""

from dataclasses import dataclass

from formats.config.base import DENSE, FULL_ATTENTION, LINEAR_ATTENTION, SPARSE, Where, key_of, only
from formats.config.kimi_linear import KimiLinearConfig
from formats.config.rope import read_yarn_rope, source_of
from formats.errors import UnsupportedError
from formats.fields import Fields, shown

ARCHITECTURES = ("BailingMoeV3ForCausalLM", "BailingHybridForCausalLM")  # as published, as transformers saves it
CLAMPS = ("expert_swiglu_limit_list", "share_expert_swiglu_limit_list")


@dataclass(frozen=True, kw_only=True)
class BailingHybridConfig(KimiLinearConfig):
    """Kimi Linear whose latent attention knows positions and is gated by head, with projections of full rank."""

    gate_lower_bound: float | None  # of the logarithm of decays; None: decays are Kimi Linear's

    def mixer_values(self, tokens: int) -> int:
        return super().mixer_values(tokens) + tokens * self.num_attention_heads * (self.v_head_dim + 1)  # gated

    def check(self, where: Where) -> None:
        super().check(where)
        bound = self.gate_lower_bound
        self.require(where, bound is None or bound < 0, "gate_lower_bound", "a number below 0")

    @classmethod
    def read(cls, config: Fields) -> "BailingHybridConfig":
        """From config.json. Raises FormatError or UnsupportedError naming the key."""
        _refuse_others(config)
        num_layers = config.integer("num_hidden_layers", 1, 10_000)
        heads = config.integer("num_attention_heads", 1, 2**16)
        nope, rope = config.integer("qk_nope_head_dim", 1, 2**16), config.integer("qk_rope_head_dim", 1, 2**16)
        inner = config.integer("moe_intermediate_size", 1, 2**24)
        only(config, "moe_shared_expert_intermediate_size", inner)
        rope_theta, rope_scaling = read_yarn_rope(config)
        if rope_scaling is not None:  # without one, nothing reads it
            only(source_of(config, "partial_rotary_factor"), "partial_rotary_factor", 1.0)
        dense = config.integer("first_k_dense_replace", 0, num_layers)
        by_position = [DENSE] * dense + [SPARSE] * (num_layers - dense)
        bounded = config.boolean("kda_safe_gate", default=True)
        return cls(
            model_type="bailing_hybrid",
            vocab_size=config.integer("vocab_size", 1, 2**31),
            hidden_size=config.integer("hidden_size", 1, 2**24),
            num_hidden_layers=num_layers,
            max_position_embeddings=config.integer(
                key_of(config, "max_position_embeddings", "model_max_length"), 1, 2**31
            ),
            rms_norm_eps=config.number("rms_norm_eps"),
            tie_word_embeddings=config.boolean("tie_word_embeddings", default=False),
            layer_types=_read_layer_types(config, num_layers),
            num_attention_heads=heads,
            num_key_value_heads=heads,
            head_dim=nope + rope,
            rotary_dim=rope,
            rope_theta=rope_theta,
            rope_scaling=rope_scaling,
            num_experts=config.integer(key_of(config, "num_experts", "num_local_experts"), 1, 2**20),
            top_k=config.integer(key_of(config, "num_experts_per_tok", "num_experts_per_token"), 1, 2**20),
            moe_intermediate_size=inner,
            mlp_layer_types=tuple(config.strings("mlp_layer_types", by_position)),
            intermediate_size=config.integer("intermediate_size", 1, 2**24),
            shared_expert_intermediate_size=inner
            * config.integer(key_of(config, "num_shared_experts", "n_shared_experts"), 1, 2**10),
            q_lora_rank=config.integer("q_lora_rank", 1, 2**24) if "q_lora_rank" in config else None,
            kv_lora_rank=config.integer("kv_lora_rank", 1, 2**24),
            qk_nope_head_dim=nope,
            qk_rope_head_dim=rope,
            v_head_dim=config.integer("v_head_dim", 1, 2**16),
            n_group=config.integer(key_of(config, "n_group", "num_expert_group"), 1, 2**20),
            topk_group=config.integer("topk_group", 1, 2**20),
            norm_topk_prob=config.boolean(key_of(config, "norm_topk_prob", "moe_renormalize"), default=True),
            routed_scaling_factor=config.number("routed_scaling_factor"),
            indexer=None,
            linear_num_heads=heads,
            # transformers saves the width of what turns as head_dim, and that of KDA beside it
            linear_head_dim=config.integer(key_of(config, "linear_head_dim", "head_dim"), 1, 2**16),
            linear_conv_kernel_dim=config.integer("short_conv_kernel_size", 2, 64, default=4),
            gate_lower_bound=config.number("kda_lower_bound", -5.0) if bounded else None,
        )


def _refuse_others(config: Fields) -> None:
    """Models of the same model_type (Ling 2.5), and values that no code implements. Raises UnsupportedError."""
    for name in config.strings("architectures", []):
        if name not in ARCHITECTURES:
            raise UnsupportedError(
                f"{config.name('architectures')} is {shown(name)}, only '{ARCHITECTURES[0]}' is implemented"
            )
    for key, implemented in {
        "hidden_act": "silu",
        "attention_bias": False,
        "use_bias": False,
        "use_qkv_bias": False,
        "rope_interleave": True,
        "no_kda_lora": True,
        "gated_attention_proj_granularity_type": "head_wise",
        "score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
    }.items():
        only(config, key, implemented)
    for key in CLAMPS:
        if any(config.items(key, [])):
            raise UnsupportedError(f"{config.name(key)} holds limits, only null and 0 are implemented")


def _read_layer_types(config: Fields, num_layers: int) -> tuple[str, ...]:
    """As listed, or latent attention in the last layer of each group."""
    if "layer_types" in config:
        return tuple(config.strings("layer_types"))
    size = config.integer("layer_group_size", 1, num_layers)
    if num_layers % size:  # of the layers after the last group transformers says one thing, llama.cpp another
        raise config.wrong("layer_group_size", f"a divisor of num_hidden_layers {num_layers}")
    return tuple(LINEAR_ATTENTION if layer % size else FULL_ATTENTION for layer in range(1, num_layers + 1))
