"""What the reference's operations mean, each against its definition written out as a loop."""

import math
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from formats.config import CHOSEN_SIGMOID, SIGMOID, SOFTMAX, Rope, Yarn
from formats.dtypes import Float32
from formats.encodings import Plain
from runtime.backends.facts import Routing
from runtime.backends.numpy_latent import choose_tokens
from runtime.backends.numpy_ops import NumpyOps, Weight
from tests.containers import make_layout

TOKENS, HEADS, KV_HEADS, WIDTH = 7, 4, 2, 8


@pytest.fixture
def ops() -> NumpyOps:
    layout = make_layout()
    nothing: Any = None
    return NumpyOps(layout, np.zeros(layout.resident_bytes, np.uint8), nothing, nothing, ThreadPoolExecutor(1), 64, 64)


def normal(*shape: int, seed: int = 0) -> Float32:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def vector(values: Float32) -> Weight:
    return Weight(Plain("f32"), {"weight": values[None]}, 1, len(values))


# ---- routing


def chosen_by_definition(logits: list[float], routing: Routing, bias: list[float]) -> dict[int, float]:
    """Expert and weight, one token at a time, in Python's floats."""
    if routing.scoring_func != SOFTMAX:
        scores = [1 / (1 + math.exp(-x)) for x in logits]
    else:
        scores = [math.exp(x) / sum(math.exp(y) for y in logits) for x in logits]
    ranked = logits if routing.scoring_func == CHOSEN_SIGMOID else scores
    compared = [rank + b for rank, b in zip(ranked, bias, strict=True)]
    size = len(logits) // routing.n_group
    groups = [range(g * size, (g + 1) * size) for g in range(routing.n_group)]
    best = 1 if routing.scoring_func == SOFTMAX else 2  # DeepSeek-V2, DeepSeek-V3
    groups.sort(key=lambda group: -sum(sorted((compared[e] for e in group), reverse=True)[:best]))
    allowed = [e for group in groups[: routing.topk_group] for e in group]
    ids = sorted(allowed, key=lambda e: -compared[e])[: routing.top_k]
    total = sum(scores[e] for e in ids) if routing.norm_topk_prob else 1.0
    return {e: scores[e] / total * routing.routed_scaling_factor for e in ids}


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(
    "routing",
    [
        Routing(3),
        Routing(3, norm_topk_prob=False),
        Routing(3, SIGMOID, routed_scaling_factor=2.5),
        Routing(3, SIGMOID, n_group=4, topk_group=2),
        Routing(4, SOFTMAX, False, 1.5, 3, 2),
        Routing(2, CHOSEN_SIGMOID, False),
    ],
)
def test_a_router_chooses_as_its_definition_does(ops: NumpyOps, routing: Routing, with_bias: bool) -> None:
    logits, bias = 2 * normal(40, 12), 0.3 * normal(12, seed=1)
    ids, weights = ops.route(logits, routing, vector(bias) if with_bias else None)
    for row, of_token in enumerate(logits.tolist()):
        expected = chosen_by_definition(of_token, routing, bias.tolist() if with_bias else [0.0] * 12)
        assert ids[row].tolist() == list(expected)
        assert weights[row] == pytest.approx(list(expected.values()), rel=1e-5)


def test_the_normalised_softmax_of_all_is_the_softmax_of_the_chosen(ops: NumpyOps) -> None:
    logits = 5 * normal(40, 12)
    ids, weights = ops.route(logits, Routing(4))
    top = np.exp(np.take_along_axis(logits.astype(np.float64), ids.astype(np.intp), axis=1))
    assert weights == pytest.approx(top / top.sum(axis=1, keepdims=True), rel=1e-5)


def test_a_scale_of_experts_multiplies_the_weights_of_those_that_were_chosen(ops: NumpyOps) -> None:
    logits, scale = 2 * normal(40, 12), normal(12, seed=1)
    ids, weights = ops.route(logits, Routing(3))
    same, scaled = ops.route(logits, Routing(3), None, vector(scale))
    assert np.array_equal(same, ids)
    assert scaled == pytest.approx(weights * [[scale[e] for e in row] for row in ids], rel=1e-6)


# ---- the indexer's choice


@given(
    scores=st.lists(st.lists(st.integers(0, 3), min_size=9, max_size=9), min_size=1, max_size=5),
    top_k=st.integers(1, 12),
    seed=st.integers(0, 2**32 - 1),
)
def test_the_best_of_what_is_seen_is_chosen_and_of_equals_the_first(
    scores: list[list[int]], top_k: int, seed: int
) -> None:
    seen = np.random.default_rng(seed).integers(0, 10, len(scores))
    selection = np.zeros((len(scores), 11), np.bool_)  # wider than what there are scores of
    choose_tokens(np.array(scores, np.float32), seen, top_k, selection)
    for row, number, found in zip(scores, seen, selection, strict=True):
        best = sorted(range(number), key=lambda j: -row[j])[:top_k]  # a stable sort
        assert set(np.flatnonzero(found).tolist()) == set(best)


# ---- element by element


def test_softplus_is_a_logarithm_also_of_large_values(ops: NumpyOps) -> None:
    x = 30 * normal(5, 6)
    assert ops.softplus(x) == pytest.approx(np.logaddexp(0, x.astype(np.float64)), rel=1e-5, abs=1e-7)


def test_a_soft_cap_is_a_hyperbolic_tangent_and_a_scale_a_product(ops: NumpyOps) -> None:
    x = 20 * normal(5, 6)
    assert ops.softcap(x, 6.0) == pytest.approx(np.array([[6 * math.tanh(v / 6) for v in row] for row in x]), rel=1e-6)
    assert np.array_equal(ops.scale(x, vector(x[0])), x * x[0])
    assert np.array_equal(ops.scale(x, vector(x[0, :1])), x * x[0, 0])


# ---- attention


def attended_by_definition(q: Float32, k: Float32, v: Float32, window: int, sinks: Float32) -> Float32:
    output = np.empty_like(q)
    for t in range(len(q)):
        for h in range(HEADS):
            seen = range(max(0, t - window + 1), t + 1)
            scores = np.array([q[t, h] @ k[i, h // 2] * 0.5 for i in seen] + [sinks[h]], np.float64)
            p = np.exp(scores) / np.exp(scores).sum()
            output[t, h] = sum(p[n] * v[i, h // 2] for n, i in enumerate(seen))
    return output


@pytest.mark.parametrize("steps", [[7], [1] * 7, [3, 1, 3]])
@pytest.mark.parametrize(("window", "with_sinks"), [(3, False), (3, True), (None, True), (1, False), (None, False)])
def test_windows_and_sinks_are_as_defined(
    ops: NumpyOps, steps: list[int], window: int | None, with_sinks: bool
) -> None:
    q = normal(TOKENS, HEADS, WIDTH)
    k, v = normal(TOKENS, KV_HEADS, WIDTH, seed=1), normal(TOKENS, KV_HEADS, WIDTH, seed=2)
    sinks = normal(HEADS, seed=3) if with_sinks else np.full(HEADS, -1e9, np.float32)
    cache, outputs, start = ops.new_kv_cache(KV_HEADS, WIDTH), [], 0
    for tokens in steps:
        at = slice(start, start + tokens)
        given = vector(sinks) if with_sinks else None
        output, cache = ops.attention(q[at], k[at], v[at], cache, 0.5, window=window, sinks=given)
        outputs.append(output)
        start += tokens
    expected = attended_by_definition(q, k, v, window or TOKENS, sinks)
    assert np.concatenate(outputs) == pytest.approx(expected, abs=1e-5)


# ---- rotary embeddings


@pytest.mark.parametrize("interleaved", [False, True])
def test_a_rotation_turns_pairs_as_complex_numbers(ops: NumpyOps, interleaved: bool) -> None:
    yarn = Yarn(4.0, 64, 8.0, 1.0, True, 1.25, 0.0)
    rope = Rope(100.0, 6, interleaved, yarn)
    x = normal(TOKENS, HEADS, WIDTH)
    y = ops.rope(x, 5, rope)
    for i, frequency in enumerate(rope.inv_freq):
        one, other = (2 * i, 2 * i + 1) if interleaved else (i, i + 3)
        turn = 1.25 * np.exp(1j * frequency * np.arange(5, 5 + TOKENS))[:, None]
        expected = (x[..., one] + 1j * x[..., other]) * turn
        assert y[..., one] + 1j * y[..., other] == pytest.approx(expected, abs=1e-6)
    assert np.array_equal(y[..., 6:], x[..., 6:])


def test_proportional_rope_turns_the_first_pairs_of_a_whole_head() -> None:
    found = Rope(1e6, 512, turned=64).inv_freq  # of Gemma 4's full attention: a quarter of 256 pairs
    assert found[:64].tolist() == pytest.approx([1e6 ** (-2 * i / 512) for i in range(64)])
    assert found.shape == (256,)
    assert not found[64:].any()


# Of gpt-oss: theta 150000, 64 dimensions, factor 32, betas 32 and 1; by transformers 5.23's _compute_yarn_parameters.
YARN_PAIRS = (0, 8, 9, 12, 17, 18, 31)
YARN_FREQUENCIES = {
    True: (1.0, 0.05081327, 0.03162075, 0.007015714, 0.0002279478, 3.830881e-05, 3.023511e-07),
    False: (1.0, 0.05081327, 0.0317057, 0.006794959, 0.0001293187, 3.830881e-05, 3.023511e-07),
}


def test_yarn_is_that_of_transformers() -> None:
    for truncate, expected in YARN_FREQUENCIES.items():
        found = Rope(150000.0, 64, scaling=Yarn(32.0, 4096, 32.0, 1.0, truncate, 1.0, 0.0)).inv_freq
        assert [found[i] for i in YARN_PAIRS] == pytest.approx(list(expected), rel=1e-6)
