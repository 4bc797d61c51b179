"""Sampling against transformers' logits processors and an independent, naive statement of the filters."""

import json
import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from formats.errors import FormatError, RequestError
from runtime.sampling import (
    GenerationConfig,
    Sampler,
    SamplingOptions,
    candidates,
    penalized,
    read_generation_config,
)

LOGITS = [1.5, -0.25, 3.0, 3.0, -2.0, 0.5, 2.75, -7.0, 0.0, 1.0, 2.0, -1.0]
HISTORY = [2, 6, 4, 2]

# (temperature, top_k, top_p, min_p, repeat_penalty) -> probabilities above 0 for LOGITS and HISTORY, made
# with RepetitionPenaltyLogitsProcessor, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper and
# MinPLogitsWarper of transformers 5.23.0, in this order, then torch.softmax (torch 2.13.0, float32).
# fmt: off
TRANSFORMERS: list[tuple[tuple[float, int, float, float, float], dict[int, float]]] = [
    ((1.0, 0, 1.0, 0.0, 1.0), {0: 0.060291, 1: 0.010477, 2: 0.270205, 3: 0.270205, 4: 0.001821, 5: 0.02218,
                               6: 0.210436, 7: 1.2e-05, 8: 0.013453, 9: 0.036568, 10: 0.099403,
                               11: 0.004949}),
    ((0.7, 4, 1.0, 0.0, 1.0), {2: 0.340214, 3: 0.340214, 6: 0.238039, 10: 0.081533}),
    ((0.7, 1, 1.0, 0.0, 1.0), {2: 0.5, 3: 0.5}),
    ((1.3, 0, 0.8, 0.0, 1.0), {0: 0.087524, 2: 0.277482, 3: 0.277482, 6: 0.228937, 10: 0.128576}),
    ((1.0, 0, 1.0, 0.3, 1.0), {2: 0.317795, 3: 0.317795, 6: 0.247499, 10: 0.11691}),
    ((1.0, 0, 1.0, 1.0, 1.0), {2: 0.5, 3: 0.5}),
    ((0.8, 6, 0.9, 0.1, 1.3), {0: 0.069971, 2: 0.192038, 3: 0.456266, 6: 0.151004, 10: 0.130722}),
    ((2.0, 40, 0.95, 0.05, 0.5), {0: 0.044124, 2: 0.418642, 3: 0.093412, 5: 0.026763, 6: 0.326038,
                                  9: 0.034364, 10: 0.056657}),
]
# fmt: on

FINITE = st.floats(-30, 30, width=32)
LOGIT_LISTS = st.lists(FINITE | st.just(-math.inf), min_size=1, max_size=40).filter(lambda x: max(x) > -math.inf)


def array(values: list[float]) -> npt.NDArray[np.float32]:
    return np.array(values, dtype=np.float32)


def distribution(logits: list[float], options: SamplingOptions) -> dict[int, float]:
    ids, probabilities = candidates(array(logits), options)
    return dict(zip(ids.tolist(), probabilities.tolist(), strict=True))


def softmax(scores: dict[int, float], temperature: float) -> dict[int, float]:
    top = max(scores.values())
    weights = {i: math.exp((score - top) / temperature) for i, score in scores.items()}
    total = math.fsum(weights.values())
    return {i: weight / total for i, weight in weights.items() if weight > 0}


def naive(logits: list[float], options: SamplingOptions) -> dict[int, float]:
    """The filters said plainly over a dict of id -> score."""
    scores = {i: float(x) for i, x in enumerate(array(logits)) if x > -math.inf}
    if options.top_k:
        border = sorted(scores.values(), reverse=True)[: options.top_k][-1]
        scores = {i: x for i, x in scores.items() if x >= border}
    shares = softmax(scores, options.temperature)
    if options.top_p < 1:
        kept: list[int] = []
        mass = 0.0
        for i in sorted(shares, key=lambda i: (-shares[i], i)):
            if kept and mass >= options.top_p:
                break
            kept.append(i)
            mass += shares[i]
        shares = {i: shares[i] for i in kept}
    top = max(shares.values())
    shares = {i: p for i, p in shares.items() if p >= options.min_p * top}
    total = math.fsum(shares.values())
    return {i: p / total for i, p in shares.items()}


@pytest.mark.parametrize(("settings", "expected"), TRANSFORMERS)
def test_probabilities_equal_those_of_transformers(
    settings: tuple[float, int, float, float, float], expected: dict[int, float]
) -> None:
    temperature, top_k, top_p, min_p, penalty = settings
    scores = penalized(array(LOGITS), HISTORY, penalty)
    found = distribution(scores.tolist(), SamplingOptions(temperature, top_k, top_p, min_p))
    assert found.keys() == expected.keys()
    # The reference is rounded to 6 digits and computed in float32.
    assert found == pytest.approx(expected, abs=2e-6)


@given(
    logits=LOGIT_LISTS,
    temperature=st.floats(0.05, 5),
    top_k=st.integers(0, 50),
    top_p=st.floats(0, 1),
    min_p=st.floats(0, 1),
)
def test_filters_equal_their_naive_statement(
    logits: list[float], temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    options = SamplingOptions(temperature, top_k, top_p, min_p)
    found, expected = distribution(logits, options), naive(logits, options)
    # Two orders of summation may disagree by rounding on the one token at the border of top_p or min_p.
    only_one = found.keys() ^ expected.keys()
    assert len(only_one) <= 1
    if not only_one:
        assert found == pytest.approx(expected, rel=1e-9, abs=1e-300)


def test_filters_equal_their_naive_statement_on_a_large_vocabulary() -> None:
    # More tokens than the first sort looks at, with mass both above and below what it holds.
    logits = np.random.default_rng(0).normal(size=20_000).round(2).tolist()
    for top_p in (0.05, 0.5, 0.99):
        options = SamplingOptions(temperature=1.0, top_p=top_p)
        found, expected = distribution(logits, options), naive(logits, options)
        assert found.keys() == expected.keys()
        assert found == pytest.approx(expected, rel=1e-9)


@given(LOGIT_LISTS, st.data())
def test_greedy_takes_the_lowest_id_of_the_highest_logit(logits: list[float], data: st.DataObject) -> None:
    options = SamplingOptions(temperature=0, top_k=data.draw(st.integers(0, 50)), top_p=data.draw(st.floats(0, 1)))
    rounded = array(logits).tolist()
    assert Sampler(options).sample(array(logits), []) == rounded.index(max(rounded))


@given(LOGIT_LISTS, st.floats(1e-320, 100), st.integers(0, 2**64))
def test_a_forbidden_token_is_never_drawn(logits: list[float], temperature: float, seed: int) -> None:
    sampler = Sampler(SamplingOptions(temperature=temperature, seed=seed))
    for _ in range(5):
        assert logits[sampler.sample(array(logits), [])] > -math.inf


class Draws(np.random.Generator):
    """A random stream that always says the same."""

    def __init__(self, value: float) -> None:
        super().__init__(np.random.PCG64(0))
        self.value = value

    def random(self, *_: Any, **__: Any) -> Any:
        return self.value


@given(LOGIT_LISTS, st.sampled_from([0.0, 1.0, 0.5, math.nextafter(1, 0)]))
def test_the_ends_of_the_random_range_draw_a_possible_token(logits: list[float], draw: float) -> None:
    options = SamplingOptions(temperature=1.0)
    token = Sampler(options, Draws(draw)).sample(array(logits), [])
    assert token in distribution(logits, options)


def test_draws_follow_the_probabilities() -> None:
    options = SamplingOptions(temperature=0.7, top_k=4, seed=1)
    sampler = Sampler(options)
    counts = np.bincount([sampler.sample(array(LOGITS), []) for _ in range(20_000)], minlength=len(LOGITS))
    for token, probability in distribution(LOGITS, options).items():
        # Five standard deviations, and the seed is fixed.
        deviation = math.sqrt(20_000 * probability * (1 - probability))
        assert abs(counts[token] - 20_000 * probability) < 5 * deviation
    assert counts[[2, 3, 6, 10]].sum() == 20_000


def test_the_same_seed_gives_the_same_tokens() -> None:
    def draw(seed: int | None) -> list[int]:
        sampler = Sampler(SamplingOptions(temperature=1.5, seed=seed))
        return [sampler.sample(array(LOGITS), []) for _ in range(50)]

    assert draw(7) == draw(7)
    assert draw(7) != draw(8)
    assert draw(None) != draw(None)


def test_a_repeat_penalty_counts_a_token_once_and_leaves_the_logits_alone() -> None:
    logits = array([2.0, -2.0, 1.0])
    assert penalized(logits, [0, 0, 1], 2.0).tolist() == [1.0, -4.0, 1.0]
    assert logits.tolist() == [2.0, -2.0, 1.0]
    assert Sampler(SamplingOptions(repeat_penalty=3.0)).sample(logits, [0, 0]) == 2


def test_an_extreme_repeat_penalty_still_leaves_a_token() -> None:
    sampler = Sampler(SamplingOptions(temperature=0.1, repeat_penalty=100))
    assert sampler.sample(array([-5.0, -3.0, 0.0, -math.inf]), [0, 1, 2, 3]) == 2


def test_extreme_logits_are_no_obstacle() -> None:
    sampler = Sampler(SamplingOptions(temperature=1e-300, top_k=10**9, top_p=0.999, min_p=0.01))
    assert sampler.sample(array([3.4e38, -3.4e38, 1.0]), []) == 0


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("bad", [[1.0, math.nan], [math.nan, math.inf], [math.inf, 1.0], [-math.inf, -math.inf]])
def test_logits_that_are_no_numbers_are_an_error_and_never_a_token(temperature: float, bad: list[float]) -> None:
    with pytest.raises(FormatError, match="logits: "):
        Sampler(SamplingOptions(temperature=temperature)).sample(array(bad), [])


@pytest.mark.parametrize("name", ["temperature", "top_p", "min_p", "repeat_penalty", "top_k", "seed"])
@pytest.mark.parametrize("value", [-1, math.nan, math.inf, "1", True])
def test_an_option_out_of_its_range_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(RequestError, match=f"^{name} is {value}, expected "):
        SamplingOptions(**{name: value})


@pytest.mark.parametrize(("name", "value"), [("top_p", 1.01), ("min_p", 2), ("repeat_penalty", 0), ("top_k", 1.5)])
def test_an_option_above_its_range_is_refused(name: str, value: Any) -> None:
    with pytest.raises(RequestError, match=f"^{name} is {value}, expected "):
        SamplingOptions(**{name: value})


def config(**values: Any) -> GenerationConfig:
    return read_generation_config(json.dumps(values).encode())


def test_without_a_generation_config_the_choice_is_greedy() -> None:
    assert read_generation_config(None) == GenerationConfig(SamplingOptions(), (), ())
    assert config().sampling.temperature == 0


def test_defaults_are_those_of_transformers() -> None:
    assert config(do_sample=True).sampling == SamplingOptions(temperature=1.0, top_k=50)
    assert config(do_sample=True, temperature=0.6, top_k=20, top_p=0.95, min_p=0.1).sampling == SamplingOptions(
        0.6, 20, 0.95, 0.1
    )
    assert config(do_sample=False, temperature=0.6, repetition_penalty=1.1).sampling == SamplingOptions(
        0.0, 50, repeat_penalty=1.1
    )


def test_stop_ids_may_be_one_or_a_list() -> None:
    assert config(eos_token_id=2).stop_ids == (2,)
    assert config(eos_token_id=[0, 2, 0]).stop_ids == (0, 2)
    assert config(eos_token_id=None).stop_ids == ()


def test_keys_that_would_change_decoding_are_reported() -> None:
    given = config(num_beams=4, typical_p=0.5, no_repeat_ngram_size=0, penalty_alpha=0.6, transformers_version="5")
    assert given.ignored == ("num_beams", "penalty_alpha", "typical_p")
    assert config(num_beams=1, typical_p=1, min_length=0, token_healing=False, guidance_scale=None).ignored == ()


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"[]", "generation_config.json: is"),
        (b"{", "generation_config.json: is not valid JSON"),
        (b'{"temperature": NaN}', "generation_config.json: holds NaN"),
        (b'{"temperature": "hot"}', "generation_config.json: temperature is hot, expected a finite number"),
        (b'{"top_p": 1.5}', "generation_config.json: top_p is 1.5, expected a number from 0 to 1"),
        (b'{"top_k": 1.5}', "generation_config.json: top_k is 1.5, expected an integer"),
        (b'{"repetition_penalty": 0}', "generation_config.json: repetition_penalty is 0.0, expected"),
        (b'{"do_sample": 1}', "generation_config.json: do_sample is 1, expected true or false"),
        (b'{"eos_token_id": -1}', "generation_config.json: eos_token_id is -1, expected a token id"),
        (b'{"eos_token_id": [true]}', "generation_config.json: eos_token_id is"),
        (b'{"eos_token_id": "</s>"}', "generation_config.json: eos_token_id is </s>, expected"),
    ],
)
def test_a_bad_generation_config_is_refused_with_the_key(raw: bytes, message: str) -> None:
    with pytest.raises(FormatError) as error:
        read_generation_config(raw)
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)
