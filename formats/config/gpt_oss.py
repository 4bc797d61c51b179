"""gpt-oss-20b and 120b (source: transformers' configuration_gpt_oss.py)."""

from formats.config.base import FULL_ATTENTION, SLIDING_ATTENTION, only
from formats.config.decoder import SWIGLU_ALPHA, DecoderConfig, read_decoder
from formats.fields import Fields


def read_gpt_oss(config: Fields) -> DecoderConfig:
    """Sinks, windows, biases and a clamped activation. Raises FormatError or UnsupportedError naming the key."""
    only(config, "attention_bias", True)
    only(config, "swiglu_alpha", SWIGLU_ALPHA)
    if "rope_parameters" not in config and not config.mapping("rope_scaling"):
        raise config.wrong("rope_scaling", "a rope_type: transformers would take numbers of its own")
    num_layers = config.integer("num_hidden_layers", 1, 10_000)
    in_turn = [FULL_ATTENTION if i % 2 else SLIDING_ATTENTION for i in range(num_layers)]
    return read_decoder(
        config,
        model_type="gpt_oss",
        num_experts=config.integer("num_local_experts", 1, 2**20),
        moe_intermediate_size=config.integer("intermediate_size", 1, 2**24),
        layer_types=tuple(config.strings("layer_types", in_turn)),
        sliding_window=config.integer("sliding_window", 1, 2**31),
        attention_sinks=True,
        attention_bias=True,
        attention_output_bias=True,
        router_bias=True,
        swiglu_limit=config.number("swiglu_limit", 7.0),
    )
