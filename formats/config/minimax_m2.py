"""MiniMax-M2, 2.1, 2.5 and 2.7 (source: transformers' configuration_minimax_m2.py)."""

from formats.config.base import only
from formats.config.decoder import SIGMOID, WHOLE_NORM, DecoderConfig, read_decoder
from formats.config.rope import read_rotary_dim
from formats.fields import Fields


def read_minimax_m2(config: Fields) -> DecoderConfig:
    """Sigmoid router, queries and keys normalised whole. Raises FormatError or UnsupportedError naming the key."""
    for key, value in {
        "use_qk_norm": True,
        "qk_norm_type": "per_layer",
        "use_routing_bias": True,
        "scoring_func": SIGMOID,
        "shared_intermediate_size": 0,
    }.items():
        only(config, key, value)
    head_dim = config.integer("head_dim", 1, 2**16)
    num_layers = config.integer("num_hidden_layers", 1, 10_000)
    only(config, "attn_type_list", [1] * num_layers)
    return read_decoder(
        config,
        model_type="minimax_m2",
        num_experts=config.integer("num_local_experts", 1, 2**20),
        moe_intermediate_size=config.integer("intermediate_size", 1, 2**24),
        rotary_dim=read_rotary_dim(config, head_dim, config.integer("rotary_dim", 2, 2**16, default=head_dim)),
        qk_norm=WHOLE_NORM,
        scoring_func=SIGMOID,
        e_score_correction_bias=True,
    )
