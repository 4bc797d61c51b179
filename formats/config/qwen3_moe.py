"""Qwen3 MoE: Qwen3-30B-A3B, 235B-A22B, Coder (source: transformers' configuration_qwen3_moe.py)."""

from dataclasses import dataclass

from formats.config.base import FULL_ATTENTION, ModelConfig, only
from formats.config.rope import read_rope
from formats.fields import Fields


@dataclass(frozen=True)
class Qwen3MoeConfig(ModelConfig):
    """Full attention in every layer, routed experts alone."""

    norm_topk_prob: bool

    @property
    def state_values(self) -> int:
        return 0

    @property
    def mixer_values_per_token(self) -> int:
        return 6 * self.num_attention_heads * self.head_dim

    def check(self, where: str) -> None:
        super().check(where)
        self.require(where, set(self.layer_types) == {FULL_ATTENTION}, "layer_types", f"only {FULL_ATTENTION}")

    @classmethod
    def read(cls, config: Fields) -> "Qwen3MoeConfig":
        """From config.json. Raises FormatError or UnsupportedError naming the key."""
        only(config, "hidden_act", "silu")
        only(config, "attention_bias", False)
        only(config, "mlp_only_layers", [])
        only(config, "decoder_sparse_step", 1)
        only(config, "use_sliding_window", False)
        rope_theta, rope_scaling = read_rope(config)
        num_layers = config.integer("num_hidden_layers", 1, 10_000)
        hidden_size = config.integer("hidden_size", 1, 2**24)
        num_attention_heads = config.integer("num_attention_heads", 1, 2**16)
        head_dim = config.integer("head_dim", 1, 2**16, default=hidden_size // num_attention_heads)
        return cls(
            model_type="qwen3_moe",
            vocab_size=config.integer("vocab_size", 1, 2**31),
            hidden_size=hidden_size,
            num_hidden_layers=num_layers,
            max_position_embeddings=config.integer("max_position_embeddings", 1, 2**31),
            rms_norm_eps=config.number("rms_norm_eps"),
            tie_word_embeddings=config.boolean("tie_word_embeddings", default=False),
            layer_types=(FULL_ATTENTION,) * num_layers,
            num_attention_heads=num_attention_heads,
            num_key_value_heads=config.integer("num_key_value_heads", 1, 2**16),
            head_dim=head_dim,
            rotary_dim=head_dim,
            rope_theta=rope_theta,
            rope_scaling=rope_scaling,
            num_experts=config.integer("num_experts", 1, 2**20),
            top_k=config.integer("num_experts_per_tok", 1, 2**20),
            moe_intermediate_size=config.integer("moe_intermediate_size", 1, 2**24),
            norm_topk_prob=config.boolean("norm_topk_prob", default=False),
        )
