"""dots.llm1 (source: transformers' configuration_dots1.py)."""

from formats.config.base import FULL_ATTENTION, SLIDING_ATTENTION, only
from formats.config.decoder import HEAD_NORM, DecoderConfig
from formats.config.glm4_moe import read_grouped_sigmoid
from formats.fields import Fields


def read_dots1(config: Fields) -> DecoderConfig:
    """Queries and keys normalised, and windows, if any, in the last layers.

    Raises FormatError or UnsupportedError naming the key.
    """
    only(config, "moe_layer_freq", 1)
    num_layers = config.integer("num_hidden_layers", 1, 10_000)
    window: int | None = 4096  # as in transformers, where nothing is said
    if config.states("sliding_window"):
        window = config.nullable("sliding_window", lambda key: config.integer(key, 1, 2**31))
    first = num_layers if window is None else config.integer("max_window_layers", 0, 10_000, default=62)
    by_place = [SLIDING_ATTENTION if i >= first else FULL_ATTENTION for i in range(num_layers)]
    bias = config.boolean("attention_bias", default=False)
    return read_grouped_sigmoid(
        config,
        model_type="dots1",
        layer_types=tuple(config.strings("layer_types", by_place)),
        sliding_window=window,
        attention_bias=bias,
        attention_output_bias=bias,
        qk_norm=HEAD_NORM,
        norm_topk_prob=config.boolean("norm_topk_prob", default=False),
    )
