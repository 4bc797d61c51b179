"""OLMoE-1B-7B (source: transformers' configuration_olmoe.py)."""

from formats.config.decoder import WHOLE_NORM, DecoderConfig, read_decoder
from formats.fields import Fields


def read_olmoe(config: Fields) -> DecoderConfig:
    """Queries and keys normalised over all heads at once. Raises FormatError or UnsupportedError naming the key."""
    bias = config.boolean("attention_bias", default=False)
    return read_decoder(
        config,
        model_type="olmoe",
        num_experts=config.integer("num_experts", 1, 2**20),
        moe_intermediate_size=config.integer("intermediate_size", 1, 2**24),
        norm_topk_prob=config.boolean("norm_topk_prob", default=False),
        attention_bias=bias,
        attention_output_bias=bias,
        qk_norm=WHOLE_NORM,
        clip_qkv=config.number("clip_qkv") if "clip_qkv" in config else None,
    )
