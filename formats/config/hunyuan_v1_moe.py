"""Hunyuan-A13B (source: transformers' files of hunyuan_v1_moe)."""

from formats.config.base import key_of, only
from formats.config.decoder import TURNED_NORM, DecoderConfig, read_decoder
from formats.config.rope import read_alpha_theta
from formats.errors import UnsupportedError
from formats.fields import Fields, shown


def read_hunyuan_v1_moe(config: Fields) -> DecoderConfig:
    """Queries and keys normalised after they are turned. Raises FormatError or UnsupportedError naming the key."""
    width, heads = config.integer("hidden_size", 1, 2**24), config.integer("num_attention_heads", 1, 2**16)
    head_dim = config.integer("head_dim", 1, 2**16, default=width // heads)
    inner = config.integer("intermediate_size", 1, 2**24)
    for key, value in {
        "attention_head_dim": head_dim,
        "group_limited_greedy": False,
        "mlp_bias": False,
        "moe_layer_num_skipped": 0,
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.0,
        "use_cla": False,
        "use_mixed_mlp_moe": True,
        "use_qk_norm": True,
    }.items():
        only(config, key, value)
    for key, value in {"moe_intermediate_size": inner, "num_shared_expert": 1}.items():
        if (found := _of_all_layers(config, key, value)) != value:
            raise UnsupportedError(f"{config.name(key)} is {found}, only {value} is implemented")
    bias = config.boolean("attention_bias", default=False)
    return read_decoder(
        config,
        model_type="hunyuan_v1_moe",
        rope_theta=read_alpha_theta(config, head_dim),
        rope_scaling=None,
        attention_bias=bias,
        attention_output_bias=bias,
        qk_norm=TURNED_NORM,
        num_experts=config.integer("num_experts", 1, 2**20),
        top_k=_of_all_layers(config, key_of(config, "moe_topk", "num_experts_per_tok"), None),
        moe_intermediate_size=inner,
        shared_expert_intermediate_size=inner,
    )


def _of_all_layers(config: Fields, key: str, default: int | None) -> int:
    """A number, or a list with the same one for every layer. Raises FormatError or UnsupportedError."""
    if not isinstance(config.raw(key, default), list):
        return config.integer(key, 1, 2**24) if default is None else config.integer(key, 1, 2**24, default=default)
    values = config.integers(key, 1, 2**24)
    if len(values) != config.integer("num_hidden_layers", 1, 10_000) or len(set(values)) != 1:
        raise UnsupportedError(f"{config.name(key)} is {shown(values)}, only one number for all layers is implemented")
    return values[0]
