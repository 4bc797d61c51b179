"""Logits -> token, seeded: the penalties and filters of Hugging Face's `generate`, in its order."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from formats.config.base import language_model
from formats.errors import FormatError, RequestError
from formats.fields import Fields, parse_config, parse_json

GENERATION_CONFIG = "generation_config.json"
TOP_TOKENS = 1024  # so many candidates nearly always hold the mass that top_p asks for

# Keys that change decoding in ways not implemented here, with the value that changes nothing.
# Source: GenerationConfig and _get_logits_processor of transformers 5.23.
NEUTRAL_VALUES: dict[str, Any] = {
    "num_beams": 1,
    "num_beam_groups": 1,
    "diversity_penalty": 0.0,
    "penalty_alpha": None,
    "dola_layers": None,
    "top_h": None,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "guidance_scale": 1.0,
    "encoder_repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "min_length": 0,
    "min_new_tokens": None,
    "bad_words_ids": None,
    "force_words_ids": None,
    "constraints": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "exponential_decay_length_penalty": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "sequence_bias": None,
    "token_healing": False,
    "watermarking_config": None,
    "stop_strings": None,
}

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class SamplingOptions:
    """How the next token is chosen; temperature 0 is greedy, the other defaults filter nothing."""

    temperature: float = 0.0
    top_k: int = 0  # 0 keeps all
    top_p: float = 1.0
    min_p: float = 0.0
    repeat_penalty: float = 1.0
    seed: int | None = None  # None: different text each time

    def __post_init__(self) -> None:
        """Raises RequestError naming the option, its value and the range."""
        _check("temperature", self.temperature, 0, math.inf, "a finite number of at least 0")
        _check("top_p", self.top_p, 0, 1, "a number from 0 to 1")
        _check("min_p", self.min_p, 0, 1, "a number from 0 to 1")
        _check("repeat_penalty", self.repeat_penalty, 0.01, 100, "a number from 0.01 to 100")
        if type(self.top_k) is not int or self.top_k < 0:
            raise RequestError(f"top_k is {self.top_k}, expected an integer of at least 0 (0 keeps all tokens)")
        if self.seed is not None and (type(self.seed) is not int or self.seed < 0):
            raise RequestError(f"seed is {self.seed}, expected an integer of at least 0")


def _check(name: str, value: Any, low: float, high: float, expected: str) -> None:
    if type(value) not in (int, float) or not math.isfinite(value) or not low <= value <= high:
        raise RequestError(f"{name} is {value}, expected {expected}")


@dataclass(frozen=True)
class GenerationConfig:
    """What generation_config.json asks for."""

    sampling: SamplingOptions
    stop_ids: tuple[int, ...]
    ignored: tuple[str, ...] = ()  # keys that would change decoding but are not implemented: worth one warning


def read_generation_config(raw: bytes | None, config: bytes | None = None) -> GenerationConfig:
    """Read generation_config.json; None means that the checkpoint has none.

    Defaults are those of transformers: greedy unless do_sample is true, then temperature 1 and top_k 50.
    Stop tokens that it does not name are those of config.json. Raises FormatError naming the key whose value cannot
    be.
    """
    if raw is None:
        return GenerationConfig(SamplingOptions(), _stop_ids_of_config(config))
    fields = Fields(parse_json(raw, GENERATION_CONFIG), GENERATION_CONFIG)
    values: dict[str, Any] = {
        "temperature": fields.number("temperature", 1.0),
        "top_k": fields.integer("top_k", default=50),
        "top_p": fields.number("top_p", 1.0),
        "min_p": fields.number("min_p", 0.0),
        "repeat_penalty": fields.number("repetition_penalty", 1.0),
    }
    try:
        sampling = SamplingOptions(**values)
    except RequestError as error:
        message = str(error).replace("repeat_penalty", "repetition_penalty")
        raise FormatError(f"{GENERATION_CONFIG}: {message}") from None
    if not fields.boolean("do_sample", False):
        sampling = replace(sampling, temperature=0.0)
    ignored = [key for key, neutral in NEUTRAL_VALUES.items() if fields.raw(key, neutral) != neutral]
    return GenerationConfig(sampling, _stop_ids(fields) or _stop_ids_of_config(config), tuple(ignored))


def _stop_ids(fields: Fields) -> tuple[int, ...]:
    eos = fields.raw("eos_token_id", [])
    stop_ids = [eos] if type(eos) is int else eos
    if not isinstance(stop_ids, list) or not all(type(stop) is int and stop >= 0 for stop in stop_ids):
        raise fields.wrong("eos_token_id", "a token id or a list of them")
    return tuple(dict.fromkeys(stop_ids))


def _stop_ids_of_config(config: bytes | None) -> tuple[int, ...]:
    if config is None:
        return ()
    outer = Fields(parse_config(config, "config.json"), "config.json")
    return _stop_ids(language_model(outer)) or _stop_ids(outer)


class Sampler:
    """Chooses tokens with one random stream: the same options, logits and seed give the same tokens."""

    def __init__(self, options: SamplingOptions, rng: np.random.Generator | None = None) -> None:
        self.options = options
        self._rng = rng if rng is not None else np.random.Generator(np.random.PCG64(options.seed))

    def sample(self, logits: Floats, history: Sequence[int]) -> int:
        """The next token id.

        logits: [vocab_size] float32, -inf forbids a token; history: ids of prompt and output so far, which
        repeat_penalty punishes. Raises FormatError for logits that are NaN, +inf, or forbid every token.
        """
        scores = check(penalized(logits, history, self.options.repeat_penalty))
        if self.options.temperature == 0:
            return int(scores.argmax())  # the lowest id on ties
        ids, probabilities = candidates(scores, self.options)
        cumulative = np.cumsum(probabilities)
        # The first id whose cumulative probability exceeds the draw: one of probability 0 can never be it.
        position = int(np.searchsorted(cumulative, self._rng.random() * cumulative[-1], side="right"))
        # Rounding may put the draw at the very end.
        return int(ids[min(position, int(np.flatnonzero(probabilities)[-1]))])


def check(logits: Floats) -> Floats:
    """The logits [vocab_size] if a token can be drawn from them. Raises FormatError otherwise."""
    top = logits.max()  # NaN if any is
    if np.isfinite(top):
        return logits
    if np.isnan(top):
        raise FormatError(
            f"logits: token {int(np.isnan(logits).argmax())} is NaN, expected a number; are weights damaged?"
        )
    raise FormatError(f"logits: the highest is {top}, expected a finite number; are weights damaged?")


def penalized(logits: Floats, history: Sequence[int], penalty: float) -> Floats:
    """Logits [vocab_size] with every id of history made less likely (RepetitionPenaltyLogitsProcessor)."""
    if penalty == 1 or len(history) == 0:
        return logits
    ids = np.unique(np.asarray(history, dtype=np.int64))
    result = logits.copy()
    seen = logits[ids]
    with np.errstate(over="ignore"):  # of logits beyond 1e36: found by `check`
        result[ids] = np.where(seen < 0, seen * np.float32(penalty), seen / np.float32(penalty))
    return result


def candidates(scores: Floats, options: SamplingOptions) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """Ids, ascending, that the filters leave of scores [vocab_size], and their probabilities (sum 1).

    Temperature, then TopKLogitsWarper, TopPLogitsWarper and MinPLogitsWarper of transformers: ties at the
    border of top_k all stay; the mass of top_p is of what top_k left; at least one token stays.
    """
    if 0 < options.top_k < scores.size:
        border = np.partition(scores, scores.size - options.top_k)[scores.size - options.top_k]
        ids = np.flatnonzero(scores >= border)
    else:
        ids = np.arange(scores.size)
    probabilities = softmax(scores[ids], options.temperature)
    if options.top_p < 1:
        kept = nucleus(probabilities, options.top_p)
        ids, probabilities = ids[kept], probabilities[kept]
    kept = np.flatnonzero((probabilities >= options.min_p * probabilities.max()) & (probabilities > 0))
    ids, probabilities = ids[kept], probabilities[kept]
    return ids, probabilities / probabilities.sum()


def softmax(scores: Floats, temperature: float) -> npt.NDArray[np.float64]:
    """Probabilities [n] of scores [n] at a temperature above 0."""
    shifted = scores.astype(np.float64) - scores.max()  # first, so that a tiny temperature overflows to -inf only
    with np.errstate(over="ignore"):
        weights = np.exp(shifted / temperature)
    return np.asarray(weights / weights.sum())


def nucleus(probabilities: npt.NDArray[np.float64], top_p: float) -> npt.NDArray[np.int64]:
    """Positions, ascending, of the most probable tokens, up to the one that brings their mass to top_p."""
    rank = max(0, probabilities.size - TOP_TOKENS)
    order = np.flatnonzero(probabilities >= np.partition(probabilities, rank)[rank])  # few, and all of equals
    if probabilities[order].sum() < top_p:
        order = np.arange(probabilities.size)
    order = order[np.argsort(-probabilities[order], kind="stable")]  # among equals the lower id first
    before = np.cumsum(probabilities[order]) - probabilities[order]
    count = max(1, int(np.count_nonzero(before < top_p)))
    return np.sort(order[:count])
