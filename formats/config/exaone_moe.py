"""K-EXAONE-236B-A23B (sources: its config.json, and transformers' configuration_exaone_moe.py)."""

from formats.config.base import DENSE, FULL_ATTENTION, SLIDING_ATTENTION, SPARSE, only
from formats.config.decoder import HEAD_NORM, DecoderConfig
from formats.config.glm4_moe import read_grouped_sigmoid
from formats.fields import Fields


def read_exaone_moe(config: Fields) -> DecoderConfig:
    """Positions where there are windows, and none in the other layers.

    Raises FormatError or UnsupportedError naming the key.
    """
    for key, value in {
        "attention_bias": False,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "sliding_windows": None,  # K-EXAONE 2.0
        "swiglu_limits": None,
    }.items():
        only(config, key, value)
    num_layers = config.integer("num_hidden_layers", 1, 10_000)
    num_dense = config.integer("first_k_dense_replace", 0, num_layers, default=1)
    by_place = [DENSE if i < num_dense else SPARSE for i in range(num_layers)]
    mlp_layer_types = config.strings("mlp_layer_types", by_place)
    only(config, "is_moe_layer", [kind == SPARSE for kind in mlp_layer_types])
    window = config.nullable("sliding_window", lambda key: config.integer(key, 1, 2**31))
    return read_grouped_sigmoid(
        config,
        "num_experts",
        "num_shared_experts",
        model_type="exaone_moe",
        layer_types=_read_layer_types(config, num_layers, window),
        sliding_window=window,
        full_attention_rope=window is None,
        mlp_layer_types=tuple(mlp_layer_types),
        qk_norm=HEAD_NORM,
        routed_scaling_factor=config.number("routed_scaling_factor", 2.5),
    )


def _read_layer_types(config: Fields, num_layers: int, window: int | None) -> tuple[str, ...]:
    """As listed, or all but every sliding_window_pattern-th with a window."""
    if "layer_types" in config or window is None:
        return tuple(config.strings("layer_types", [FULL_ATTENTION] * num_layers))
    every = config.integer("sliding_window_pattern", 1, 10_000, default=4)
    return tuple(SLIDING_ATTENTION if (i + 1) % every else FULL_ATTENTION for i in range(num_layers))
