"""poolside's Laguna-XS.2 and its like (sources: transformers' configuration_laguna.py, mlx-lm's laguna.py)."""

from formats.config.base import DENSE, FULL_ATTENTION, SLIDING_ATTENTION, SPARSE, only
from formats.config.decoder import HEAD_NORM, SIGMOID, SOFTPLUS, SOFTPLUS_BY_HEAD, DecoderConfig, read_decoder
from formats.config.rope import read_layer_ropes
from formats.errors import UnsupportedError
from formats.fields import Fields, shown


def read_laguna(config: Fields) -> DecoderConfig:
    """Layers with windows may have other heads and another rotation than the others have.

    Raises FormatError or UnsupportedError naming the key.
    """
    bias = config.boolean("attention_bias", default=False)
    for key, value in {
        "gating_types": None,
        "moe_apply_router_weight_on_input": False,
        "moe_router_logit_softcapping": 0.0,
        "moe_router_score_func": "sigmoid",
        "norm_topk_prob": True,
        "qkv_bias": bias,
    }.items():
        only(config, key, value)
    head_dim = config.integer("head_dim", 1, 2**16)
    num_layers = config.integer("num_hidden_layers", 1, 10_000)
    layer_types = tuple(config.strings("layer_types", [FULL_ATTENTION] * num_layers))
    mlp_layer_types = tuple(config.strings("mlp_layer_types", [DENSE] + [SPARSE] * (num_layers - 1)))
    full_heads, sliding_heads = _read_heads(config, layer_types)
    return read_decoder(
        config,
        model_type="laguna",
        **read_layer_ropes(config, layer_types, head_dim),
        layer_types=layer_types,
        sliding_window=config.integer("sliding_window", 1, 2**31) if SLIDING_ATTENTION in layer_types else None,
        num_attention_heads=full_heads,
        swa_num_attention_heads=sliding_heads,
        attention_bias=bias,
        attention_output_bias=bias,
        attention_gate=_read_gate(config),
        qk_norm=HEAD_NORM,
        mlp_layer_types=mlp_layer_types,
        intermediate_size=config.integer("intermediate_size", 1, 2**24) if DENSE in mlp_layer_types else None,
        num_experts=config.integer("num_experts", 1, 2**20),
        moe_intermediate_size=config.integer("moe_intermediate_size", 1, 2**24),
        shared_expert_intermediate_size=config.integer("shared_expert_intermediate_size", 1, 2**24),
        scoring_func=SIGMOID,
        routed_scaling_factor=config.number("moe_routed_scaling_factor", 1.0),
        e_score_correction_bias=True,
    )


def _read_gate(config: Fields) -> str:
    """How finely what heads give is gated. Raises UnsupportedError."""
    kinds = {True: SOFTPLUS_BY_HEAD, "per-head": SOFTPLUS_BY_HEAD, "per-element": SOFTPLUS}
    gating = config.raw("gating", True)
    if not isinstance(gating, (bool, str)) or gating not in kinds:
        raise UnsupportedError(
            f"{config.name('gating')} is {shown(gating)}, only True, per-head and per-element are implemented"
        )
    return kinds[gating]


def _read_heads(config: Fields, layer_types: tuple[str, ...]) -> tuple[int, int | None]:
    """(heads, heads of layers with a window where those are others); each kind of layers has one number of them."""
    key, every = "num_attention_heads_per_layer", config.integer("num_attention_heads", 1, 2**16)
    heads = config.integers(key, 1, 2**16, default=[every] * len(layer_types))
    if len(heads) != len(layer_types):
        raise config.wrong(key, f"{len(layer_types)} entries")
    by_kind = {kind: {heads[i] for i, one in enumerate(layer_types) if one == kind} for kind in layer_types}
    if any(len(found) > 1 for found in by_kind.values()):
        raise UnsupportedError(
            f"{config.name(key)} is {shown(heads)}, only one number for each of layer_types is implemented"
        )
    full, sliding = ((by_kind.get(kind) or {every}).pop() for kind in (FULL_ATTENTION, SLIDING_ATTENTION))
    return full, None if sliding == full else sliding
