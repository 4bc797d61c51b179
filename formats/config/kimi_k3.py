"""Kimi K3, text part (sources: its config.json and mlx-lm's kimi_k3.py; transformers has no such model)."""

from dataclasses import dataclass

from formats.config.base import SITU, Activation, Where, language_model, only
from formats.config.kimi_linear import KimiLinearConfig, read_delta_and_latent
from formats.fields import Fields


@dataclass(frozen=True, kw_only=True)
class KimiK3Config(KimiLinearConfig):
    """Kimi Linear with gates, experts behind a narrower projection, and attention over what layers began with."""

    gate_lower_bound: float  # of the logarithm of decays
    attn_res_block_size: int  # layers of a block, whose beginning later halves of layers may read
    routed_expert_hidden_size: int  # of what experts read and give
    activation_situ_beta: float
    activation_situ_linear_beta: float
    attn_res_fused: bool = False  # norm and projection of attention residuals stand as their product, as in GGUF files

    @property
    def expert_hidden_size(self) -> int:
        return self.routed_expert_hidden_size

    @property
    def expert_activation(self) -> Activation:
        return Activation(SITU, self.activation_situ_beta, self.activation_situ_linear_beta)

    def mixer_values(self, tokens: int) -> int:
        begun = -(-self.num_hidden_layers // self.attn_res_block_size) * self.hidden_size
        mixture = 3 * (begun + self.hidden_size)  # with the sum since the last: as they are, normalised, operands
        gates = self.num_attention_heads * self.v_head_dim
        return tokens * begun + max(super().mixer_values(tokens) + tokens * gates, tokens * mixture)

    def check(self, where: Where) -> None:
        super().check(where)
        self.require(where, self.gate_lower_bound < 0, "gate_lower_bound", "a number below 0")
        for key in ("activation_situ_beta", "activation_situ_linear_beta"):
            self.require(where, getattr(self, key) > 0, key, "a number above 0")

    @classmethod
    def read(cls, outer: Fields) -> "KimiK3Config":
        """From config.json, nested in text_config or flat. Raises FormatError or UnsupportedError naming the key."""
        config = language_model(outer)
        linear = config.object("linear_attn_config")
        needed = (
            (config, "hidden_act", SITU),
            (config, "mla_use_output_gate", True),
            (config, "latent_moe_use_norm", True),
            (linear, "use_full_rank_gate", True),
        )
        for source, key, implemented in needed:
            source.raw(key)  # which would mean another model if it were missing
            only(source, key, implemented)
        return cls(
            model_type="kimi_k3",
            max_position_embeddings=config.integer("max_position_embeddings", 1, 2**31),
            **read_delta_and_latent(config),
            gate_lower_bound=linear.number("gate_lower_bound"),
            attn_res_block_size=config.integer("attn_res_block_size", 1, 10_000),
            routed_expert_hidden_size=config.integer("routed_expert_hidden_size", 1, 2**24),
            activation_situ_beta=config.number("activation_situ_beta"),
            activation_situ_linear_beta=config.number("activation_situ_linear_beta"),
        )
