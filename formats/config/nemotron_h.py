"""Nemotron 3: Nano, Super (sources: transformers' configuration_nemotron_h.py, the published config.json)."""

from dataclasses import dataclass

from formats.config.base import FULL_ATTENTION, LINEAR_ATTENTION, RELU2, Activation, ModelConfig, Where, key_of, only
from formats.config.mamba2 import Mamba2
from formats.fields import Fields
from formats.window import in_lanes

MOE, MLP = "moe", "mlp"
BY_LETTER = {"M": LINEAR_ATTENTION, "*": FULL_ATTENTION, "E": MOE, "-": MLP}
OLDER_NAMES = {"mamba": LINEAR_ATTENTION, "attention": FULL_ATTENTION}


@dataclass(frozen=True)
class NemotronHConfig(ModelConfig):
    """Layers of one part each: Mamba2, attention without positions, experts, or an MLP; experts have no gate."""

    mamba: Mamba2
    intermediate_size: int  # of mlp layers
    shared_expert_intermediate_size: int
    moe_latent_size: int | None  # of what experts read and give, where that is not hidden_size
    n_group: int
    topk_group: int
    norm_topk_prob: bool
    routed_scaling_factor: float

    def has_experts(self, layer: int) -> bool:
        return self.layer_types[layer] == MOE

    @property
    def expert_hidden_size(self) -> int:
        return self.moe_latent_size or self.hidden_size

    @property
    def expert_activation(self) -> Activation:
        return Activation(RELU2)

    @property
    def feed_forward_width(self) -> int:
        mlp = self.intermediate_size if MLP in self.layer_types else 0
        return max(mlp, self.moe_intermediate_size, self.shared_expert_intermediate_size)

    def cache_values(self, ctx_size: int, chunk_size: int) -> int:
        of_token = self.num_key_value_heads * (self.head_dim + in_lanes(self.head_dim))
        return self.layer_types.count(FULL_ATTENTION) * in_lanes(ctx_size) * of_token

    @property
    def state_values(self) -> int:
        return self.layer_types.count(LINEAR_ATTENTION) * self.mamba.state_values

    def mixer_values(self, tokens: int) -> int:
        attention = (4 * self.num_attention_heads + 3 * self.num_key_value_heads) * self.head_dim
        return tokens * max(attention, self.mamba.values_per_token)

    def check(self, where: Where) -> None:
        super().check(where)
        self.require_known(where, "layer_types", tuple(BY_LETTER.values()))
        self.require(where, MOE in self.layer_types, "layer_types", "at least one layer with experts")
        self.check_groups(where, self.n_group, self.topk_group)
        self.mamba.check(self, where)

    @classmethod
    def read(cls, config: Fields) -> "NemotronHConfig":
        """From config.json. Raises FormatError or UnsupportedError naming the key."""
        for key, implemented in {
            "mlp_hidden_act": "relu2",
            "n_shared_experts": 1,
            "attention_bias": False,
            "mlp_bias": False,
            "use_bias": False,
            "mamba_proj_bias": False,
            "sliding_window": None,
        }.items():
            only(config, key, implemented)
        layer_types = _read_layer_types(config)
        heads = config.integer("num_attention_heads", 1, 2**16)
        head_dim = config.integer("head_dim", 1, 2**16)
        return cls(
            model_type="nemotron_h",
            vocab_size=config.integer("vocab_size", 1, 2**31),
            hidden_size=config.integer("hidden_size", 1, 2**24),
            num_hidden_layers=len(layer_types),
            max_position_embeddings=config.integer("max_position_embeddings", 1, 2**31),
            rms_norm_eps=config.number("layer_norm_epsilon"),
            tie_word_embeddings=config.boolean("tie_word_embeddings", default=False),
            layer_types=layer_types,
            num_attention_heads=heads,
            num_key_value_heads=config.integer("num_key_value_heads", 1, 2**16, default=heads),
            head_dim=head_dim,
            rotary_dim=head_dim,
            rope_theta=config.number("rope_theta", 10000.0),
            rope_scaling=None,
            num_experts=config.integer("n_routed_experts", 1, 2**20),
            top_k=config.integer("num_experts_per_tok", 1, 2**20),
            moe_intermediate_size=config.integer("moe_intermediate_size", 1, 2**24),
            mamba=Mamba2.read(config),
            intermediate_size=config.integer("intermediate_size", 1, 2**24),
            shared_expert_intermediate_size=config.integer("moe_shared_expert_intermediate_size", 1, 2**24),
            moe_latent_size=config.integer("moe_latent_size", 1, 2**24) if "moe_latent_size" in config else None,
            n_group=config.integer("n_group", 1, 2**20, default=1),
            topk_group=config.integer("topk_group", 1, 2**20, default=1),
            norm_topk_prob=config.boolean("norm_topk_prob", default=True),
            routed_scaling_factor=config.number("routed_scaling_factor", 1.0),
        )


def _read_layer_types(config: Fields) -> tuple[str, ...]:
    """As listed, or a letter each; num_hidden_layers counts for nothing beside them."""
    if (key := key_of(config, "layer_types", "layers_block_type")) in config:
        return tuple(OLDER_NAMES.get(name, name) for name in config.strings(key))
    pattern = config.string("hybrid_override_pattern")
    if not set(pattern) <= BY_LETTER.keys():
        raise config.wrong("hybrid_override_pattern", f"only the letters {' '.join(BY_LETTER)}")
    return tuple(BY_LETTER[letter] for letter in pattern)
