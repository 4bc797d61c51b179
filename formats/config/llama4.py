"""Llama 4 Scout and Maverick, their text (source: transformers' configuration_llama4.py and modeling_llama4.py)."""

from formats.config.base import CHUNKED_ATTENTION, DENSE, FULL_ATTENTION, SPARSE, language_model
from formats.config.decoder import CHOSEN_SIGMOID, NO_NORM, UNIT_NORM, DecoderConfig, Temperature, read_decoder
from formats.config.rope import read_llama3_rope
from formats.errors import UnsupportedError
from formats.fields import Fields, shown


def read_llama4(outer: Fields) -> DecoderConfig:
    """Chunks, and layers without positions; from text_config or flat. Raises FormatError or UnsupportedError."""
    config = language_model(outer)
    num_layers = config.integer("num_hidden_layers", 1, 10_000)
    every = config.integer("interleave_moe_layer_step", 1, 10_000, default=1)
    sparse = config.integers("moe_layers", 0, num_layers - 1, default=list(range(every - 1, num_layers, every)))
    bias = config.boolean("attention_bias", default=False)
    rope_theta, rope_scaling = read_llama3_rope(config)
    inner = config.integer("intermediate_size", 1, 2**24)
    return read_decoder(
        config,
        model_type="llama4",
        rope_theta=rope_theta,
        rope_scaling=rope_scaling,
        rope_interleave=True,
        layer_types=_read_layer_types(config, num_layers),
        attention_chunk_size=config.integer("attention_chunk_size", 1, 2**31),
        full_attention_rope=False,
        attention_temperature=_read_temperature(config),
        attention_bias=bias,
        attention_output_bias=bias,
        qk_norm=UNIT_NORM if config.boolean("use_qk_norm", True) else NO_NORM,
        num_experts=config.integer("num_local_experts", 1, 2**20),
        moe_intermediate_size=inner,
        shared_expert_intermediate_size=inner,
        mlp_layer_types=tuple(SPARSE if i in sparse else DENSE for i in range(num_layers)),
        intermediate_size=config.integer("intermediate_size_mlp", 1, 2**24),
        scoring_func=CHOSEN_SIGMOID,
        norm_topk_prob=False,
        scale_expert_input=True,
    )


def _read_layer_types(config: Fields, num_layers: int) -> tuple[str, ...]:
    """Chunks where there are positions, and everything where there are none, which no_rope_layers says by 0."""
    every = config.integer("no_rope_layer_interval", 1, 10_000, default=4)
    by_interval = [int((i + 1) % every != 0) for i in range(num_layers)]
    turned = config.integers("no_rope_layers", 0, 1, default=by_interval) or by_interval
    if len(turned) != num_layers:
        raise config.wrong("no_rope_layers", f"{num_layers} entries")
    layer_types = [CHUNKED_ATTENTION if turns else FULL_ATTENTION for turns in turned]
    if (found := config.strings("layer_types", layer_types)) != layer_types:
        raise UnsupportedError(
            f"{config.name('layer_types')} is {shown(found)}, only {CHUNKED_ATTENTION} in layers with positions and "
            f"{FULL_ATTENTION} in those without is implemented"
        )
    return tuple(layer_types)


def _read_temperature(config: Fields) -> Temperature | None:
    """Of layers without positions; attn_temperature_tuning is a number in the first published files."""
    tuned = config.raw("attn_temperature_tuning", True)
    if not isinstance(tuned, (bool, int)):
        raise config.wrong("attn_temperature_tuning", "true, false or an integer")
    floor_scale = config.integer("floor_scale", 1, 2**31, default=8192)
    return Temperature(floor_scale, config.number("attn_scale", 0.1)) if tuned else None
