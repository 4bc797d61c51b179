"""Arcee's Trinity: Nano, Mini and Large (sources: transformers' configuration_afmoe.py, mlx-lm's afmoe.py)."""

from formats.config.base import DENSE, FULL_ATTENTION, SLIDING_ATTENTION, SPARSE, only
from formats.config.decoder import HEAD_NORM, SIGMOID, DecoderConfig
from formats.config.glm4_moe import read_grouped_sigmoid
from formats.fields import Fields


def read_afmoe(config: Fields) -> DecoderConfig:
    """Gated attention between two norms; positions where there are windows, and none in the other layers.

    Raises FormatError or UnsupportedError naming the key.
    """
    for key, value in {
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": True,
        "route_norm": True,
        "score_func": "sigmoid",
    }.items():
        only(config, key, value)
    config.integer("head_dim", 1, 2**16)
    config.integer("num_shared_experts", 1, 2**10)
    num_layers = config.integer("num_hidden_layers", 1, 10_000)
    num_dense = config.integer("num_dense_layers", 0, num_layers)
    every = config.integer("global_attn_every_n_layers", 1, 10_000, default=4)
    by_place = [SLIDING_ATTENTION if (i + 1) % every else FULL_ATTENTION for i in range(num_layers)]
    layer_types = tuple(config.strings("layer_types", by_place))
    scaled = config.boolean("mup_enabled", default=False)
    bias = config.boolean("attention_bias", default=False)
    return read_grouped_sigmoid(
        config,
        "num_experts",
        "num_shared_experts",
        model_type="afmoe",
        layer_types=layer_types,
        sliding_window=config.integer("sliding_window", 1, 2**31) if SLIDING_ATTENTION in layer_types else None,
        full_attention_rope=False,
        attention_bias=bias,
        attention_output_bias=bias,
        attention_gate=SIGMOID,
        qk_norm=HEAD_NORM,
        output_norms=True,
        mlp_layer_types=(DENSE,) * num_dense + (SPARSE,) * (num_layers - num_dense),
        routed_scaling_factor=config.number("route_scale", 1.0),
        embedding_multiplier=config.integer("hidden_size", 1, 2**24) ** 0.5 if scaled else 1.0,
    )
