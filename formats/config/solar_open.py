"""Solar-Open-100B (source: transformers' configuration_solar_open.py)."""

from formats.config.base import SPARSE, only
from formats.config.decoder import DecoderConfig
from formats.config.glm4_moe import read_grouped_sigmoid
from formats.config.rope import source_of
from formats.fields import Fields


def read_solar_open(config: Fields) -> DecoderConfig:
    """Experts in every layer, heads turned whole. Raises FormatError or UnsupportedError naming the key."""
    only(config, "use_qk_norm", False)
    only(config, "first_k_dense_replace", 0)
    only(source_of(config, "partial_rotary_factor"), "partial_rotary_factor", 1.0)
    return read_grouped_sigmoid(
        config,
        model_type="solar_open",
        head_dim=config.integer("head_dim", 1, 2**16),  # transformers would take 128
        mlp_layer_types=(SPARSE,) * config.integer("num_hidden_layers", 1, 10_000),
        intermediate_size=None,
        attention_bias=config.boolean("attention_bias", default=False),
    )
