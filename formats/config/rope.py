"""Rotary position embeddings as config.json states them."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from formats.config.scaling import (
    LOWEST_THETA,
    SCALES,
    Angles,
    Factors,
    Linear,
    Llama3,
    LongRope,
    Rope,
    Scaling,
    Yarn,
    flaw_of,
    is_scale,
    mscale,
)
from formats.errors import FormatError, UnsupportedError
from formats.fields import Fields, shown

FACTORS = "factors"  # a rope_type
DYNAMIC, LONGROPE = "dynamic", "longrope"  # others
PLAIN_KINDS = ("default", "yarn", "linear", DYNAMIC, LONGROPE)  # of plain decoders


T = TypeVar("T", Yarn, Llama3)


def read_rope(config: Fields, kinds: tuple[str, ...] = PLAIN_KINDS) -> tuple[float, Scaling | None]:
    """(rope_theta, rope_scaling) of a config.json, in either of its forms.

    kinds: of scaling that a family has. Raises FormatError, or UnsupportedError for another.
    """
    parameters = rope_parameters(config)
    if _kind(parameters, config, kinds) == LONGROPE:
        scaling: Scaling | None = _read_longrope(parameters, config)
    else:
        scaling = read_scaling(parameters, config, kinds)
    return read_theta(_beside(parameters, config, "rope_theta")), scaling


def read_yarn_rope(config: Fields, yarn: tuple[str, ...] = ("yarn",)) -> tuple[float, Yarn | None]:
    """As `read_rope`, scaled by YaRN or not at all; yarn: what a family calls it."""
    parameters = rope_parameters(config)
    scaling = read_yarn(parameters, config, yarn)
    return read_theta(_beside(parameters, config, "rope_theta")), scaling


def read_layer_ropes(
    config: Fields,
    layer_types: Sequence[str],
    head_dim: int,
    read: Callable[[Fields, Fields], Angles | None] | None = None,
) -> dict[str, Any]:
    """Facts of a decoder whose kinds of layers have rotations of their own, in rope_parameters by layer type.

    Layers with windows are scaled as the others are, or not at all. read: of scalings, read_yarn if none is given.

    Raises FormatError, or UnsupportedError for scalings that are not implemented.
    """
    if not layer_types:
        raise config.wrong("layer_types", "an entry for each layer")
    by_kind = config.object("rope_parameters")
    ropes = {}
    for kind in dict.fromkeys(layer_types):
        parameters = by_kind.object(kind)
        key = "partial_rotary_factor"
        rotary_dim = rotary_share(parameters, key, parameters.number(key, 1.0), head_dim)
        ropes[kind] = Rope(read_theta(parameters), rotary_dim, scaling=(read or read_yarn)(parameters, config))
    return facts_of_layer_ropes(ropes, by_kind.name("sliding_attention"))


def facts_of_layer_ropes(ropes: Mapping[str, Rope], name: str) -> dict[str, Any]:
    """As `read_layer_ropes`, of rotations by layer type; name: where those of layers with windows stand."""
    full = ropes.get("full_attention") or next(iter(ropes.values()))
    sliding = ropes.get("sliding_attention", full)
    if sliding.scaling not in (None, full.scaling):
        raise UnsupportedError(f"{name} is scaled otherwise than full_attention, only as it or not is implemented")
    return {
        "rope_theta": full.theta,
        "rotary_dim": full.dim,
        "rope_scaling": full.scaling,
        "swa_rope_theta": None if sliding.theta == full.theta else sliding.theta,
        "swa_rotary_dim": None if sliding.dim == full.dim else sliding.dim,
        "swa_rope_scaled": sliding.scaling == full.scaling,
    }


def rotary_share(source: Fields, key: str, share: float, head_dim: int) -> int:
    """How many of a head's values turn, of a share that stands under a key. Raises FormatError."""
    rotary_dim = int(head_dim * share) if 0 < share <= 1 else 0
    if rotary_dim < 2 or rotary_dim % 2:
        raise source.wrong(key, f"a share of head_dim {head_dim} that is an even whole number")
    return rotary_dim


def read_theta(source: Fields, key: str = "rope_theta") -> float:
    """The base of the angles, named where it stands. Raises FormatError."""
    theta = source.number(key)
    if theta < LOWEST_THETA:
        raise FormatError(f"{source.name(key)} is {theta}, expected a number of at least {LOWEST_THETA}")
    return theta


def read_scale(source: Fields, key: str, default: float | None = None) -> float:
    """A number that angles, or cos and sin, are multiplied or divided by. Raises FormatError."""
    value = source.number(key) if default is None else source.number(key, default)
    if not is_scale(value):
        raise source.wrong(key, SCALES)
    return value


def read_yarn(parameters: Fields, config: Fields, yarn: tuple[str, ...] = ("yarn",)) -> Yarn | None:
    """The scaling that parameters of a config.json state: YaRN or none. Raises FormatError or UnsupportedError."""
    return _read_yarn(parameters, config) if _kind(parameters, config, ("default", *yarn)) in yarn else None


def read_scaling(
    parameters: Fields, config: Fields, kinds: tuple[str, ...] = ("default", "yarn", "llama3", FACTORS)
) -> Angles | None:
    """As `read_yarn`, and other kinds, too; `factors` is our own, of GGUF files."""
    kind = _kind(parameters, config, kinds)
    if kind == FACTORS:
        return Factors(tuple(parameters.numbers("factors")))
    if kind == DYNAMIC:
        _read_linear(parameters)  # no context is longer than max_position_embeddings: until there nothing is scaled
    readers: Mapping[str, Callable[[Fields, Fields], Angles]] = {
        "linear": lambda parameters, _: _read_linear(parameters),
        "llama3": _read_llama3,
        "yarn": _read_yarn,
    }
    return readers[kind](parameters, config) if kind in readers else None


def read_llama3_rope(config: Fields) -> tuple[float, Scaling | None]:
    """As `read_rope`, for models that are scaled as Llama 3, by `factors`, or not at all."""
    return read_rope(config, ("default", "llama3", FACTORS))


def read_alpha_theta(config: Fields, head_dim: int) -> float:
    """rope_theta of a config.json, which Hunyuan stretches by a fixed `alpha` and calls it dynamic.

    Raises FormatError, or UnsupportedError for another kind of scaling.
    """
    parameters = rope_parameters(config)
    kind = _kind(parameters, config, ("default", "dynamic"))
    theta = read_theta(_beside(parameters, config, "rope_theta"))
    if kind == "default":
        return theta
    alpha = read_scale(parameters, "alpha")
    if head_dim <= 2:
        raise config.wrong("head_dim", "more than 2, which alpha is raised by")
    return float(theta * alpha ** (head_dim / (head_dim - 2)))


def rope_parameters(config: Fields) -> Fields:
    """Where the kind of scaling and its parameters stand; of two such objects transformers takes rope_scaling.

    Published files hold rope_theta at the top and rope_scaling beside it; transformers 5 writes both into
    rope_parameters.
    """
    for key in ("rope_scaling", "rope_parameters"):
        if key in config and config.mapping(key):
            return config.object(key)
    return config


def _beside(parameters: Fields, config: Fields, key: str) -> Fields:
    """Where a key stands: among the parameters, else at the top, as transformers looks for it."""
    return parameters if key in parameters else config


def _kind(parameters: Fields, config: Fields, known: tuple[str, ...]) -> str:
    key = "rope_type" if "rope_type" in parameters or parameters is config else "type"
    kind = parameters.string(key, "default")
    if kind not in known:
        implemented = f"{', '.join(known[:-1])} and {known[-1]} are" if known[1:] else f"{known[0]} is"
        raise UnsupportedError(f"{parameters.name(key)} is {shown(kind)}, only {implemented} implemented")
    return kind


def source_of(config: Fields, key: str) -> Fields:
    """Where a key of a config.json's rotary embeddings stands."""
    return _beside(rope_parameters(config), config, key)


def read_rotary_dim(config: Fields, head_dim: int, default: int) -> int:
    """How much of a head is turned: head_dim * partial_rotary_factor, if that is said. Raises FormatError."""
    source = source_of(config, "partial_rotary_factor")
    if "partial_rotary_factor" not in source:
        return default
    rotary_dim = head_dim * source.number("partial_rotary_factor")
    if rotary_dim % 2 or not 0 < rotary_dim <= head_dim:
        raise source.wrong("partial_rotary_factor", f"a share of head_dim {head_dim} that is an even whole number")
    return int(rotary_dim)


def _read_original(scaling: Fields, config: Fields) -> int:
    """The context before it was stretched, looked for as transformers does; none said is the stretched one."""
    source = config if "original_max_position_embeddings" in config else scaling
    longest = config.integer("max_position_embeddings", 1, 2**31)
    return source.integer("original_max_position_embeddings", 1, 2**31, default=longest)


def _read_yarn(scaling: Fields, config: Fields) -> Yarn:
    original = _read_original(scaling, config)
    factor = scaling.nullable("factor", scaling.number)  # null: as the two lengths say
    if factor is None:
        factor = config.integer("max_position_embeddings", 1, 2**31) / original
    weight, all_dim = scaling.number("mscale", 0.0), scaling.number("mscale_all_dim", 0.0)
    for key, value in (("mscale", weight), ("mscale_all_dim", all_dim)):
        if value < 0:
            raise scaling.wrong(key, "a number of at least 0")
    implied = mscale(factor, weight) / mscale(factor, all_dim) if weight and all_dim else mscale(factor)
    yarn = Yarn(
        factor=factor,
        original_max_position_embeddings=original,
        beta_fast=scaling.number("beta_fast", 32.0),
        beta_slow=scaling.number("beta_slow", 1.0),
        truncate=scaling.boolean("truncate", default=True),
        attention_factor=scaling.number("attention_factor", implied),
        mscale_all_dim=all_dim,
    )
    return _without_flaw(yarn, scaling)


def _read_llama3(scaling: Fields, config: Fields) -> Llama3:
    llama3 = Llama3(
        factor=scaling.number("factor"),
        original_max_position_embeddings=_read_original(scaling, config),
        low_freq_factor=scaling.number("low_freq_factor"),
        high_freq_factor=scaling.number("high_freq_factor"),
    )
    if llama3.high_freq_factor < llama3.low_freq_factor:
        raise scaling.wrong("high_freq_factor", f"low_freq_factor {llama3.low_freq_factor} or more")
    return _without_flaw(llama3, scaling)


def _read_linear(scaling: Fields) -> Linear:
    return Linear(read_scale(scaling, "factor"))


def _read_longrope(scaling: Fields, config: Fields) -> LongRope:
    original = _read_original(scaling, config)
    factor = scaling.number("factor", config.integer("max_position_embeddings", 1, 2**31) / original)
    if factor > 1 and original == 1:
        raise FormatError(f"{scaling.name('original_max_position_embeddings')} is 1, expected 2 or more")
    implied = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    attention_factor = read_scale(scaling, "attention_factor", implied)
    return LongRope(
        short_factor=tuple(scaling.numbers("short_factor")),
        long_factor=tuple(scaling.numbers("long_factor")),
        short_mscale=attention_factor,
        long_mscale=attention_factor,
        original_max_position_embeddings=original,
    )


def _without_flaw(scaling: T, source: Fields) -> T:
    """The scaling that was read from source. Raises FormatError naming the key there."""
    if (flaw := flaw_of(scaling)) is not None:
        raise FormatError(f"{source.name(flaw.key)} is {getattr(scaling, flaw.key)}, expected {flaw.expected}")
    return scaling
