"""Mixtral 8x7B and 8x22B (source: transformers' configuration_mixtral.py)."""

from formats.config.base import FULL_ATTENTION, SLIDING_ATTENTION
from formats.config.decoder import DecoderConfig, read_decoder
from formats.fields import Fields


def read_mixtral(config: Fields) -> DecoderConfig:
    """Raises FormatError or UnsupportedError naming the key."""
    window = config.integer("sliding_window", 1, 2**31) if "sliding_window" in config else None
    layer_type = FULL_ATTENTION if window is None else SLIDING_ATTENTION
    return read_decoder(
        config,
        model_type="mixtral",
        num_experts=config.integer("num_local_experts", 1, 2**20),
        moe_intermediate_size=config.integer("intermediate_size", 1, 2**24),
        layer_types=(layer_type,) * config.integer("num_hidden_layers", 1, 10_000),
        sliding_window=window,
    )
