"""Rotary position embeddings: the angles that a base and a scaling mean."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from formats.dtypes import Float64

LOWEST_THETA = 1
MAX_SCALE = 2**20  # of a scaling's numbers; published ones are below 100
SCALES = f"a number from 1/{MAX_SCALE} to {MAX_SCALE}"


@dataclass(frozen=True)
class Yarn:
    """A context stretched by `factor` (Peng et al., YaRN, 2309.00071; transformers' _compute_yarn_parameters)."""

    factor: float
    original_max_position_embeddings: int
    beta_fast: float
    beta_slow: float
    truncate: bool  # of the range of dimensions that are stretched in part, to whole numbers
    attention_factor: float  # multiplies cos and sin
    mscale_all_dim: float  # DeepSeek multiplies the scale of attention by mscale(factor, this)^2; 0 is none

    def inv_freq(self, theta: float, rotary_dim: int) -> Float64:
        """Angle per position of each pair: [rotary_dim / 2]."""

        def dimension(rotations: float) -> float:
            wavelength = self.original_max_position_embeddings / (rotations * 2 * math.pi)
            return rotary_dim * math.log(wavelength) / (2 * math.log(theta))

        low, high = dimension(self.beta_fast), dimension(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, rotary_dim - 1)
        stretched = (np.arange(rotary_dim // 2) - low) / ((high - low) or 0.001)
        stretched = np.clip(stretched, 0, 1)
        return _inv_freq(theta, rotary_dim) * (1 - stretched + stretched / self.factor)


@dataclass(frozen=True)
class Llama3:
    """Slow turns made slower by `factor`, fast ones kept, those between in part (transformers' rope type llama3)."""

    factor: float
    original_max_position_embeddings: int
    low_freq_factor: float
    high_freq_factor: float

    @property
    def attention_factor(self) -> float:
        return 1.0

    def inv_freq(self, theta: float, rotary_dim: int) -> Float64:
        """Angle per position of each pair: [rotary_dim / 2]."""
        kept = _inv_freq(theta, rotary_dim)
        turns = self.original_max_position_embeddings * kept / (2 * math.pi)  # within the original context
        between = (turns - self.low_freq_factor) / ((self.high_freq_factor - self.low_freq_factor) or 1)
        blended = (1 - between) * kept / self.factor + between * kept
        slow, fast = turns < self.low_freq_factor, turns > self.high_freq_factor
        return np.where(slow, kept / self.factor, np.where(fast, kept, blended))


@dataclass(frozen=True)
class Factors:
    """Each pair made slower by a factor of its own: what GGUF files hold of Llama 3's scaling."""

    factors: tuple[float, ...]  # [rotary_dim / 2]

    @property
    def attention_factor(self) -> float:
        return 1.0

    def inv_freq(self, theta: float, rotary_dim: int) -> Float64:
        """Angle per position of each pair: [rotary_dim / 2]."""
        return _inv_freq(theta, rotary_dim) / np.array(self.factors)


@dataclass(frozen=True)
class Linear:
    """Every pair made slower by `factor`, as if positions were divided by it (transformers' rope type linear)."""

    factor: float

    @property
    def attention_factor(self) -> float:
        return 1.0

    def inv_freq(self, theta: float, rotary_dim: int) -> Float64:
        """Angle per position of each pair: [rotary_dim / 2]."""
        return _inv_freq(theta, rotary_dim) / self.factor


@dataclass(frozen=True)
class ChosenFactors(Factors):
    """What the context of a run makes of `LongRope`: no fact of a model."""

    mscale: float

    @property
    def attention_factor(self) -> float:
        return self.mscale


@dataclass(frozen=True)
class LongRope:
    """Pairs made slower by one list of factors within the original context, by another beyond it.

    transformers takes the list by the length of what it is given, again at every step; with a cache, whose keys are
    turned already, that would mix both. Here a run takes it once, by the length that its context has room for.
    Source: Ding et al., LongRoPE (2402.13753); transformers' _compute_longrope_parameters.
    """

    short_factor: tuple[float, ...]  # [rotary_dim / 2]
    long_factor: tuple[float, ...]  # [rotary_dim / 2]
    short_mscale: float  # multiplies cos and sin within the original context
    long_mscale: float  # and beyond it
    original_max_position_embeddings: int

    def is_long(self, ctx_size: int) -> bool:
        """Whether a context has room for more tokens than the original one."""
        return ctx_size > self.original_max_position_embeddings

    def within(self, ctx_size: int) -> ChosenFactors:
        """Of a run whose context has room for so many tokens."""
        if self.is_long(ctx_size):
            return ChosenFactors(self.long_factor, self.long_mscale)
        return ChosenFactors(self.short_factor, self.short_mscale)


Angles = Yarn | Llama3 | Factors | Linear
Scaling = Angles | LongRope
_SCALES_OF: Mapping[type, tuple[str, ...]] = {
    Yarn: ("factor", "beta_fast", "beta_slow", "attention_factor"),
    Llama3: ("factor", "low_freq_factor", "high_freq_factor"),
    Linear: ("factor",),
    LongRope: ("short_mscale", "long_mscale"),
}


class Flaw(NamedTuple):
    """A number of which no angles can be made, by its field, and what was expected."""

    key: str
    expected: str


def is_scale(value: float) -> bool:
    """Whether angles can be made slower or faster by it."""
    return 1 / MAX_SCALE <= value <= MAX_SCALE


def flaw_of(scaling: Scaling | None) -> Flaw | None:
    """What is wrong with a scaling, if anything is; whether lists fit a head is for `misfit_of`."""
    for key in _SCALES_OF.get(type(scaling), ()):
        if not is_scale(getattr(scaling, key)):
            return Flaw(key, SCALES)
    if isinstance(scaling, Yarn) and not 0 <= scaling.mscale_all_dim <= MAX_SCALE:
        return Flaw("mscale_all_dim", f"a number from 0 to {MAX_SCALE}")
    return None


def misfit_of(scaling: Scaling | None, rotary_dim: int) -> Flaw | None:
    """A list of factors that is not one for each pair of a head."""
    keys = {Factors: ("factors",), LongRope: ("short_factor", "long_factor")}.get(type(scaling), ())
    for key in keys:
        factors = getattr(scaling, key)
        if len(factors) != rotary_dim // 2 or not all(map(is_scale, factors)):
            return Flaw(key, f"{rotary_dim // 2} factors, each {SCALES}")
    return None


@dataclass(frozen=True)
class Rope:
    """What turns queries and keys: pairs (i, i + dim/2) of the first `dim` values, or interleaved (2i, 2i + 1)."""

    theta: float
    dim: int
    interleaved: bool = False
    scaling: Angles | None = None
    turned: int | None = None  # only the first so many pairs turn (Gemma 4's proportional RoPE); None for all
    stride: int = 1  # a row at p turns as position p * stride; with -1 back what 1 has turned
    learned: tuple[float, ...] | None = None  # logarithms of what each pair turns faster by (Mistral Large 4's LeRoPE)

    @cached_property
    def inv_freq(self) -> Float64:
        """Angle per row of each pair: [dim / 2]."""
        angles = self.scaling.inv_freq(self.theta, self.dim) if self.scaling else _inv_freq(self.theta, self.dim)
        angles = angles if self.turned is None else np.where(np.arange(len(angles)) < self.turned, angles, 0)
        angles = angles if self.learned is None else angles * np.exp(np.array(self.learned))
        return angles * self.stride

    @property
    def attention_factor(self) -> float:
        """Multiplies cos and sin."""
        return self.scaling.attention_factor if self.scaling else 1.0


def mscale(factor: float, weight: float = 1.0) -> float:
    """YaRN's correction of attention for a context stretched by factor."""
    return 0.1 * weight * math.log(factor) + 1 if factor > 1 else 1.0


def _inv_freq(theta: float, dim: int) -> Float64:
    half = dim // 2
    return theta ** -(np.arange(half, dtype=np.float64) / half)
