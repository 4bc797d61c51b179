"""StepFun's Step-3.5-Flash and the text part of Step-3.7-Flash (sources: transformers' configuration_step3p7.py,
mlx-lm's step3p5.py, llama.cpp's conversion/step3.py).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from formats.config.base import (
    CLAMPED_SILU,
    DENSE,
    FULL_ATTENTION,
    SLIDING_ATTENTION,
    SPARSE,
    Activation,
    Where,
    key_of,
    language_model,
    only,
)
from formats.config.decoder import HEAD_NORM, SIGMOID, SIGMOID_BY_HEAD, DecoderConfig, decoder_facts
from formats.config.rope import facts_of_layer_ropes, read_layer_ropes, read_scaling, rotary_share
from formats.config.scaling import Rope
from formats.errors import UnsupportedError
from formats.fields import Fields, shown

EXPERTS = ("moe_num_experts", "n_routed_experts")  # published, and as transformers saves it; and so on
TOP_K = ("moe_top_k", "num_experts_per_tok")
KEY_HEADS = ("num_attention_groups", "num_key_value_heads")
SHARED_WIDTH = ("share_expert_dims", "share_expert_dim")


@dataclass(frozen=True, kw_only=True)
class Step3p5Config(DecoderConfig):
    """A decoder whose layers may cut what stands between the projections of an expert, each at a limit of its own."""

    swiglu_limits: tuple[float, ...]  # [num_hidden_layers], of routed experts; 0 for none
    swiglu_limits_shared: tuple[float, ...]  # of shared experts, and of dense layers

    @property
    def norm_offset(self) -> float:
        return 1.0

    def routed_activation(self, layer: int) -> Activation:
        return _clamped(self.swiglu_limits[layer])

    def dense_activation(self, layer: int) -> Activation | None:
        return _clamped(self.swiglu_limits_shared[layer])

    def check(self, where: Where) -> None:
        super().check(where)
        for key in ("swiglu_limits", "swiglu_limits_shared"):
            limits = getattr(self, key)
            self.require(where, len(limits) == self.num_hidden_layers, key, self._entries)
            self.require(where, min(limits) >= 0, key, "numbers of at least 0")
        self.require(where, self.swiglu_limit is None, "swiglu_limit", "null where layers have limits of their own")
        self.require(where, not self.scale_expert_input, "scale_expert_input", "false")


def _clamped(limit: float) -> Activation:
    return Activation(CLAMPED_SILU, limit=limit) if limit else Activation()


def read_step3p5(outer: Fields) -> Step3p5Config:
    """From config.json, nested in text_config or flat, as published or as transformers saves it.

    Raises FormatError or UnsupportedError naming the key.
    """
    text = language_model(outer)
    for key, value in {
        "gating": True,
        "mlp_bias": False,
        "moe_router_activation": "sigmoid",
        "norm_expert_weight": True,
        "use_bidirectional_attention": False,
        "use_head_wise_attn_gate": True,
        "use_moe_router_bias": True,
        "use_qk_norm": True,
        "yarn_only_types": [FULL_ATTENTION],
        "zero_centered": True,
    }.items():
        only(text, key, value)
    num_layers, head_dim = text.integer("num_hidden_layers", 1, 10_000), text.integer("head_dim", 1, 2**16)
    layer_types = tuple(_of_layers(text, "layer_types", num_layers, text.strings("layer_types")))
    mlp_layer_types = _read_mlp_layer_types(text, num_layers)
    full_heads, sliding_heads = _read_heads(text, layer_types)
    bias = text.boolean("attention_bias", default=False)
    facts = decoder_facts(
        text,
        model_type="step3p5",
        rms_norm_eps=text.number("rms_norm_eps", 1e-5),
        tie_word_embeddings=_read_tied(outer, text),
        **_read_ropes(text, layer_types, head_dim),
        layer_types=layer_types,
        sliding_window=text.integer("sliding_window", 1, 2**31) if SLIDING_ATTENTION in layer_types else None,
        num_attention_heads=full_heads,
        swa_num_attention_heads=None if sliding_heads == full_heads else sliding_heads,
        num_key_value_heads=_one_of(text, KEY_HEADS),
        attention_multiplier=_read_scale(text, head_dim),
        attention_bias=bias,
        attention_output_bias=bias,
        attention_gate=SIGMOID_BY_HEAD,
        qk_norm=HEAD_NORM,
        mlp_layer_types=mlp_layer_types,
        intermediate_size=text.integer("intermediate_size", 1, 2**24) if DENSE in mlp_layer_types else None,
        num_experts=_one_of(text, EXPERTS),
        top_k=_one_of(text, TOP_K),
        moe_intermediate_size=text.integer("moe_intermediate_size", 1, 2**24),
        shared_expert_intermediate_size=_one_of(text, SHARED_WIDTH),
        scoring_func=SIGMOID,
        routed_scaling_factor=text.number("moe_router_scaling_factor"),  # missing, 1 to transformers and 3 to mlx-lm
        e_score_correction_bias=True,
        swiglu_limits=_read_limits(text, "swiglu_limits", num_layers),
        swiglu_limits_shared=_read_limits(text, "swiglu_limits_shared", num_layers),
    )
    return Step3p5Config(**facts)


def _read_tied(outer: Fields, text: Fields) -> bool:
    """Said at the top of a config that nests another, by transformers; in the text that it nests it must agree."""
    tied = outer.boolean("tie_word_embeddings", default=False)
    only(text, "tie_word_embeddings", tied)
    return tied


def _read_scale(text: Fields, head_dim: int) -> float:
    scalar = text.number("query_pre_attn_scalar", head_dim)
    if scalar <= 0:
        raise text.wrong("query_pre_attn_scalar", "a number above 0")
    return float(scalar**-0.5)


def _one_of(text: Fields, keys: tuple[str, ...]) -> int:
    """What one of several keys says; all that are there must agree."""
    key = key_of(text, *keys)
    value = text.integer(key, 1, 2**24)
    for other in keys:
        only(text, other, value)
    return value


def _of_layers(text: Fields, key: str, num_layers: int, values: Sequence[Any]) -> Sequence[Any]:
    """A list with an entry for each layer; published ones have more for those of multi-token prediction."""
    more = text.integer("num_nextn_predict_layers", 0, 10_000, default=0)
    if len(values) not in (num_layers, num_layers + more):
        raise text.wrong(key, f"{num_layers} entries, or {num_layers + more}")
    return values[:num_layers]


def _read_mlp_layer_types(text: Fields, num_layers: int) -> tuple[str, ...]:
    """Which layers have experts: a list of kinds, or their numbers in a list or in a string with commas."""
    if "mlp_layer_types" in text:
        return tuple(_of_layers(text, "mlp_layer_types", num_layers, text.strings("mlp_layer_types")))
    key = "moe_layers_enum"
    words = text.raw(key)
    words = words.split(",") if isinstance(words, str) else text.integers(key)
    try:
        sparse = {int(word) for word in words if str(word).strip()}
    except ValueError:
        raise text.wrong(key, "numbers of layers") from None
    return tuple(SPARSE if layer in sparse else DENSE for layer in range(num_layers))


def _read_heads(text: Fields, layer_types: Sequence[str]) -> tuple[int, int]:
    """Heads of queries of layers without and with a window. Raises FormatError or UnsupportedError."""
    full = text.integer("num_attention_heads", 1, 2**16)
    sliding = full
    if "attention_other_setting" in text:
        other = text.object("attention_other_setting")
        only(other, "attention_type", SLIDING_ATTENTION)
        only(other, "num_attention_groups", _one_of(text, KEY_HEADS))
        only(other, "head_dim", text.integer("head_dim", 1, 2**16))
        sliding = other.integer("num_attention_heads", 1, 2**16, default=full)
    if "num_sliding_attention_heads" in text:
        found = text.integer("num_sliding_attention_heads", 1, 2**16)
        if "attention_other_setting" in text:
            only(text, "num_sliding_attention_heads", sliding)
        sliding = found
    if "per_layer_config" in text:  # as transformers saves what follows from it
        by_layer = {name.lstrip("0") or "0": value for name, value in text.mapping("per_layer_config").items()}
        changed = [str(layer) for layer, kind in enumerate(layer_types) if kind == SLIDING_ATTENTION]
        if by_layer != {layer: {"num_attention_heads": sliding} for layer in changed}:
            raise UnsupportedError(
                f"{text.name('per_layer_config')} is {shown(by_layer)}, only num_attention_heads {sliding} of every "
                f"layer of {SLIDING_ATTENTION} is implemented"
            )
    return full, sliding


def _read_limits(text: Fields, key: str, num_layers: int) -> tuple[float, ...]:
    """One for each layer, of which nulls and zeros are none; no list at all is none."""
    limits = text.items(key, [0] * num_layers) or [0] * num_layers
    limits = [0 if limit is None else limit for limit in _of_layers(text, key, num_layers, limits)]
    return tuple(Fields({key: limits}, text.where).numbers(key))


def _read_ropes(text: Fields, layer_types: Sequence[str], head_dim: int) -> dict[str, Any]:
    """Rotations of the two kinds of layers: by kind as transformers saves them, or in lists by layer as published."""
    if "rope_parameters" in text and any(isinstance(value, dict) for value in text.mapping("rope_parameters").values()):
        for key in ("rope_theta", "rope_scaling", "partial_rotary_factors"):
            only(text, key, None)
        return read_layer_ropes(text, layer_types, head_dim, read_scaling)
    only(text, "rope_parameters", None)
    every = text.raw("rope_theta", 10000.0)
    thetas = _by_kind(text, "rope_theta", every if isinstance(every, list) else [every] * len(layer_types), layer_types)
    listed = text.items("partial_rotary_factors", []) or [1.0] * len(layer_types)
    shares = _by_kind(text, "partial_rotary_factors", listed, layer_types)
    ropes = {}
    for kind in dict.fromkeys(layer_types):
        scaling = None
        if kind == FULL_ATTENTION and text.raw("rope_scaling", None):
            parameters = text.object("rope_scaling")
            for key in ("rope_theta", "partial_rotary_factor"):
                only(parameters, key, None)
            scaling = read_scaling(parameters, text)
        ropes[kind] = Rope(
            thetas[kind], rotary_share(text, "partial_rotary_factors", shares[kind], head_dim), scaling=scaling
        )
    return facts_of_layer_ropes(ropes, text.name("rope_scaling"))


def _by_kind(text: Fields, key: str, values: Sequence[Any], layer_types: Sequence[str]) -> Mapping[str, float]:
    """The number that all layers of a kind have."""
    values = _of_layers(text, key, len(layer_types), values)
    values = Fields({key: list(values)}, text.where).numbers(key)
    found = {kind: {values[i] for i, one in enumerate(layer_types) if one == kind} for kind in layer_types}
    if any(len(several) > 1 for several in found.values()):
        raise UnsupportedError(
            f"{text.name(key)} is {shown(values)}, only one number for each of layer_types is implemented"
        )
    return {kind: several.pop() for kind, several in found.items()}
