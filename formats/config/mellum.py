"""JetBrains' Mellum 2 (source: transformers' configuration_mellum.py)."""

from formats.config.base import DENSE, FULL_ATTENTION, SLIDING_ATTENTION, SPARSE, key_of, only
from formats.config.decoder import HEAD_NORM, DecoderConfig, read_decoder
from formats.config.rope import read_layer_ropes
from formats.fields import Fields


def read_mellum(config: Fields) -> DecoderConfig:
    """Qwen3 whose layers with windows may have a rotation of their own.

    Raises FormatError or UnsupportedError naming the key.
    """
    only(config, "use_sliding_window", True)
    head_dim = config.integer("head_dim", 1, 2**16)
    num_layers = config.integer("num_hidden_layers", 1, 10_000)
    layer_types = tuple(config.strings("layer_types", [FULL_ATTENTION] * num_layers))
    mlp_layer_types = tuple(config.strings("mlp_layer_types", [SPARSE] * num_layers))
    bias = config.boolean("attention_bias", default=False)
    return read_decoder(
        config,
        model_type="mellum",
        **read_layer_ropes(config, layer_types, head_dim),
        layer_types=layer_types,
        sliding_window=config.integer("sliding_window", 1, 2**31) if SLIDING_ATTENTION in layer_types else None,
        attention_bias=bias,
        attention_output_bias=bias,
        qk_norm=HEAD_NORM,
        mlp_layer_types=mlp_layer_types,
        intermediate_size=config.integer("intermediate_size", 1, 2**24) if DENSE in mlp_layer_types else None,
        num_experts=config.integer(key_of(config, "num_local_experts", "num_experts"), 1, 2**20),
        moe_intermediate_size=config.integer("moe_intermediate_size", 1, 2**24),
        norm_topk_prob=config.boolean("norm_topk_prob", default=True),
    )
