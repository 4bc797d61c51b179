"""Granite 3.0 and 3.1 with experts: 1B-A400M, 3B-A800M (source: transformers' configuration_granitemoe.py)."""

from formats.config.decoder import DecoderConfig, read_decoder
from formats.fields import Fields


def read_granitemoe(config: Fields) -> DecoderConfig:
    """Scales of embedding, scores, residuals and logits. Raises FormatError or UnsupportedError naming the key."""
    bias = config.boolean("attention_bias", default=False)
    return read_decoder(
        config,
        model_type="granitemoe",
        num_experts=config.integer("num_local_experts", 1, 2**20),
        moe_intermediate_size=config.integer("intermediate_size", 1, 2**24),
        attention_bias=bias,
        attention_output_bias=bias,
        attention_multiplier=config.number("attention_multiplier", 1.0),
        embedding_multiplier=config.number("embedding_multiplier", 1.0),
        residual_multiplier=config.number("residual_multiplier", 1.0),
        logits_scaling=config.number("logits_scaling", 1.0),
    )
