"""What lies between the products: near its definition, and the same bits for levels, threads and cuts into steps."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from formats.config import CHOSEN_SIGMOID, SIGMOID, SOFTMAX, Rope
from formats.dtypes import Float32
from formats.encodings import FP8, MXFP4, NVFP4, Q4K, Q6K, Affine, Encoding, Plain, Symmetric, ZeroPoint
from formats.errors import UnsupportedError
from formats.kernels import matrix as matrix_of
from formats.window import held_tokens
from runtime.backends import native
from runtime.backends.base import Routing, Turn
from runtime.backends.native_ops import NativeOps, NativeWeight
from runtime.backends.numpy_ops import NumpyOps
from tests.containers import make_layout
from tests.matrices import Matrix, columns_of

pytestmark = pytest.mark.skipif(not native.levels(), reason="the native kernels are not built")

Float64 = npt.NDArray[np.float64]
CTX_SIZE = 500
NOTHING: Any = None
LAYOUT = replace(make_layout(), layers=(None,) * 4, resident=())  # the tests bring their own weights
RESIDENT = np.zeros(LAYOUT.resident_bytes, np.uint8)
REFERENCE = NumpyOps(LAYOUT, RESIDENT, NOTHING, NOTHING, NOTHING, CTX_SIZE)
ENCODINGS = (
    *(Plain(dtype) for dtype in ("bf16", "f16", "f32")), *(Affine(bits, 64, "bf16") for bits in (2, 3, 4, 5, 6, 8)),
    Symmetric(4, 32, "f16"), ZeroPoint(4, 128, "f16"), MXFP4(), NVFP4("multiply"), FP8(128, "bf16"), Q4K(), Q6K(),
)  # fmt: skip
seeds = st.integers(0, 2**32 - 1)


def every_ops(threads: Sequence[int] = (1, 2, 3)) -> Iterator[NativeOps]:
    """Every level with every number of threads, one after another."""
    with ThreadPoolExecutor(1) as pool:
        for level in native.levels():
            for n in threads:
                arguments = (LAYOUT, RESIDENT, NOTHING, NOTHING, pool, CTX_SIZE)
                ops = NativeOps(*arguments, threads=n, precision="exact", level=level)
                yield ops
                ops.close()


def the_same(compute: Callable[[NativeOps], Sequence[Any]]) -> Sequence[Any]:
    """What compute makes of all ops, which is the same to the bit."""
    expected, *others = [compute(ops) for ops in every_ops()]
    for other in others:
        for a, b in zip(expected, other, strict=True):
            assert np.array_equal(a, b, equal_nan=True)
    return expected


def normal(seed: int, *shape: int, scale: float = 1.0) -> Float32:
    return np.random.default_rng([seed, *shape]).standard_normal(shape, np.float32) * np.float32(scale)


def weight(values: Float32) -> NativeWeight:
    """A resident tensor of these values, which must outlive it."""
    matrix = np.atleast_2d(values)
    rows, columns = matrix.shape
    place = matrix_of(Plain("f32"), rows, columns, {"weight": values.ctypes.data - RESIDENT.ctypes.data})
    return NativeWeight(Plain("f32"), {"weight": matrix}, rows, columns, place)


def near(found: Float32, expected: npt.NDArray[Any], tolerance: float = 1e-5) -> bool:
    """Error relative to the largest value."""
    return bool(np.abs(found - expected).max() <= tolerance * max(1.0, np.abs(expected).max()))


def cuts(seed: int, tokens: int) -> list[slice]:
    """Steps that together are all the tokens."""
    rng = np.random.default_rng(seed)
    places = {int(rng.integers(0, tokens)) for _ in range(rng.integers(0, 6))}
    return [slice(a, b) for a, b in pairwise(sorted({0, tokens, *places}))]


# ---- row by row


@given(tokens=st.integers(1, 40), columns=st.integers(1, 300), scale=st.sampled_from((1e-3, 1.0, 1e3)), seed=seeds)
def test_norms_are_those_of_the_reference(tokens: int, columns: int, scale: float, seed: int) -> None:
    x, w = normal(seed, tokens, columns, scale=scale), weight(normal(seed, columns))
    rms, l2 = the_same(lambda ops: (ops.rms_norm(x, w, 1e-6, 1.0), ops.l2_norm(x, 1e-6)))
    assert near(rms, REFERENCE.rms_norm(x, w, 1e-6, 1.0))
    assert near(l2, REFERENCE.l2_norm(x, 1e-6))


def test_what_stands_between_the_halves_of_a_layer_is_a_sum_and_its_norm() -> None:
    h, y, w = normal(0, 50, 96), normal(1, 50, 96), weight(normal(2, 96))
    total, x = the_same(lambda ops: ops.add_norm(h, y, w, 1e-6, offset=1.0, multiplier=0.22))
    expected_total, expected_x = REFERENCE.add_norm(h, y, w, 1e-6, offset=1.0, multiplier=0.22)
    assert np.array_equal(total, expected_total)
    assert near(x, expected_x)


@pytest.mark.parametrize("normed", [True, False])
@pytest.mark.parametrize("interleaved", [True, False])
def test_queries_and_keys_may_come_as_they_were_projected(normed: bool, interleaved: bool) -> None:
    q, k, v = normal(0, 70, 6, 48), normal(1, 70, 2, 48), normal(2, 70, 2, 48)
    w_q, w_k = (weight(normal(seed, 48)) if normed else None for seed in (3, 4))
    turn = Turn(Rope(1e4, 32, interleaved), 0, w_q, w_k, 1e-6, 1.0)

    def in_two_steps(ops: NumpyOps) -> Float32:
        first, cache = ops.attention(q[:40], k[:40], v[:40], ops.new_kv_cache(2, 48), 0.15, turn=turn)
        rest, _ = ops.attention(q[40:], k[40:], v[40:], cache, 0.15, turn=turn._replace(position=40))
        return np.concatenate([first, rest])

    (found,) = the_same(lambda ops: (in_two_steps(ops),))
    assert near(found, in_two_steps(REFERENCE))


def test_a_norm_takes_slices_and_gives_a_row_what_it_gives_it_alone() -> None:
    x, w = normal(0, 50, 4, 96), weight(normal(1, 48))
    for ops in every_ops((2,)):
        whole = ops.rms_norm(x[..., :48], w, 1e-6)
        assert all(np.array_equal(ops.rms_norm(x[t : t + 1, :, :48], w, 1e-6), whole[t : t + 1]) for t in range(50))


@pytest.mark.parametrize("name", ["sigmoid", "silu"])
def test_elementwise_functions_are_those_of_the_reference_everywhere(name: str) -> None:
    x = np.concatenate([np.linspace(-120, 120, 9999), [0, -0.0, np.inf, -np.inf, np.nan]]).astype(np.float32)
    (found,) = the_same(lambda ops: (getattr(ops, name)(x),))
    with np.errstate(all="ignore"):
        expected = getattr(REFERENCE, name)(x)
        exact = x.astype(np.float64) / (1 + np.exp(-x.astype(np.float64))) if name == "silu" else expected
    assert np.array_equal(np.isnan(found), np.isnan(expected))
    finite = np.isfinite(expected)
    assert near(found[finite], expected[finite], 2e-7)
    normal_numbers = finite & (np.abs(exact) > 1e-35)
    assert found[normal_numbers] == pytest.approx(exact[normal_numbers], rel=4e-7)  # exp within 2 ulp, and a division


@given(tokens=st.integers(1, 9), columns=st.integers(1, 300), cap=st.sampled_from((5.0, 30.0)), seed=seeds)
def test_a_soft_cap_and_a_scale_are_those_of_the_reference(tokens: int, columns: int, cap: float, seed: int) -> None:
    x, scale = normal(seed, tokens, columns, scale=20), normal(seed, columns)
    (capped,) = the_same(lambda ops: [ops.softcap(x, cap)])
    assert np.abs(capped - REFERENCE.softcap(x, cap)).max() < 5e-7 * cap  # by way of a sigmoid near 1/2
    (scaled,) = the_same(lambda ops: [ops.scale(x, weight(scale))])
    assert np.array_equal(scaled, x * scale)


def test_a_scale_of_experts_is_that_of_the_reference() -> None:
    logits, scale = normal(1, 40, 12, scale=2), normal(2, 12)
    ids, weights = the_same(lambda ops: ops.route(logits, Routing(3), None, weight(scale)))
    expected = REFERENCE.route(logits, Routing(3), None, weight(scale))
    assert np.array_equal(ids, expected[0])
    assert near(weights, expected[1])


@given(tokens=st.integers(1, 9), heads=st.integers(1, 20), channels=st.sampled_from((1, 3, 64)), seed=seeds)
def test_the_decay_is_that_of_the_reference(tokens: int, heads: int, channels: int, seed: int) -> None:
    width = heads * channels  # of a head each, or of its channels
    a, bias, log = normal(seed, tokens, width, scale=30), normal(seed + 1, width), normal(seed + 2, heads)
    (found,) = the_same(lambda ops: (ops.decay(a, weight(bias), weight(log)),))
    assert near(found, REFERENCE.decay(a, weight(bias), weight(log)), 1e-6)


@given(
    tokens=st.integers(1, 9),
    heads=st.integers(1, 5),
    half=st.integers(0, 16),
    rest=st.integers(0, 9),
    interleaved=st.booleans(),
    position=st.integers(0, 10**6),
    seed=seeds,
)
def test_a_rotation_is_that_of_the_reference_to_the_bit(
    tokens: int, heads: int, half: int, rest: int, interleaved: bool, position: int, seed: int
) -> None:
    rope = Rope(10000.0, 2 * half, interleaved)
    x = normal(seed, tokens, heads, 2 * half + rest + 1)
    (found,) = the_same(lambda ops: (ops.rope(x, position, rope),))
    assert np.array_equal(found, REFERENCE.rope(x, position, rope))


@given(tokens=st.integers(1, 20), groups=st.sampled_from((1, 2, 4)), seed=seeds, data=st.data())
def test_a_router_chooses_as_the_reference_does(tokens: int, groups: int, seed: int, data: st.DataObject) -> None:
    experts = groups * data.draw(st.integers(2, 140 // groups))
    routing = Routing(
        data.draw(st.integers(1, min(experts // groups, 10))),
        data.draw(st.sampled_from((SOFTMAX, SIGMOID, CHOSEN_SIGMOID))),
        data.draw(st.booleans()),
        2.5,
        groups,
        data.draw(st.integers(1, groups)),
    )
    logits, bias = normal(seed, tokens, experts, scale=3), normal(seed, experts)
    logits[0, experts // 2 :] = logits[0, 0]  # equals
    given_bias = weight(bias) if data.draw(st.booleans()) else None
    ids, weights = the_same(lambda ops: ops.route(logits, routing, given_bias))
    expected_ids, expected_weights = REFERENCE.route(logits, routing, given_bias)
    assert near(weights, expected_weights, 1e-6)
    assert np.mean(ids != expected_ids) < 0.1  # where two scores are the same to rounding


def test_large_logits_are_told_apart_though_their_sigmoids_are_not() -> None:
    logits = np.array([[20.0, 30.0, 25.0, -3.0]], np.float32)
    routing = Routing(2, CHOSEN_SIGMOID, norm_topk_prob=False)
    ids, weights = the_same(lambda ops: ops.route(logits, routing))
    assert (ids.tolist(), weights.tolist()) == ([[1, 2]], [[1.0, 1.0]])
    assert REFERENCE.route(logits, routing)[0].tolist() == [[1, 2]]


def test_a_router_that_knows_no_numbers_still_names_experts() -> None:
    logits = np.full((2, 8), np.nan, np.float32)
    ids, weights = the_same(lambda ops: ops.route(logits, Routing(3)))
    assert sorted(ids[0].tolist()) == [0, 1, 2]
    assert np.isnan(weights).all()


# ---- attention


def attended(q: Float32, k: Float32, v: Float32, scale: float, window: int, sinks: Float32 | None) -> Float64:
    """In float64, head by head."""
    tokens, heads, _ = q.shape
    group = heads // k.shape[1]
    behind = np.arange(tokens)[:, None] - np.arange(tokens)
    output = np.empty((tokens, heads, v.shape[2]))
    for h in range(heads):
        scores = q[:, h].astype(np.float64) @ k[:, h // group].astype(np.float64).T * scale
        scores[(behind < 0) | (behind >= window)] = -np.inf
        if sinks is not None:
            scores = np.concatenate([scores, np.full((tokens, 1), sinks[h])], axis=1)
        p = np.exp(scores - scores.max(axis=1, keepdims=True))
        p /= p.sum(axis=1, keepdims=True)
        output[:, h] = p[:, :tokens] @ v[:, h // group]
    return output


@settings(max_examples=20)
@given(
    tokens=st.sampled_from((1, 5, 16, 17, 127, 128, 129, 300)),
    key_heads=st.integers(1, 2),
    group=st.sampled_from((1, 2, 3, 8)),
    width=st.sampled_from((1, 8, 20, 64)),
    window=st.sampled_from((None, 1, 3, 128, 200)),
    with_sinks=st.booleans(),
    seed=seeds,
)
def test_attention_is_its_definition_whatever_computes_it_and_however_it_is_cut(
    tokens: int, key_heads: int, group: int, width: int, window: int | None, with_sinks: bool, seed: int
) -> None:
    heads = key_heads * group
    q, k = normal(seed, tokens, heads, width, scale=3), normal(seed + 1, tokens, key_heads, width)
    v, sinks = normal(seed + 2, tokens, key_heads, width), normal(seed + 3, heads, scale=3)
    given_sinks = weight(sinks) if with_sinks else None

    def compute(ops: NativeOps) -> Sequence[Float32]:
        cache, outputs = ops.new_kv_cache(key_heads, width), []
        for at in cuts(seed + ops.threads, tokens):
            output, cache = ops.attention(q[at], k[at], v[at], cache, 0.3, window=window, sinks=given_sinks)
            outputs.append(output)
        return (np.concatenate(outputs),)

    (found,) = the_same(compute)
    assert near(found, attended(q, k, v, 0.3, window or tokens, sinks if with_sinks else None))


@pytest.mark.parametrize(("window", "seed"), [(1, 0), (11, 1), (128, 2), (200, 3)])
def test_a_cache_that_forgets_what_its_window_hides_changes_no_bit(window: int, seed: int) -> None:
    tokens, width, sizes = 3000, 16, (700, 1, 129, 64)
    q, k, v = (normal(seed + i, tokens, heads, width) for i, heads in enumerate((2, 1, 1)))
    ops = NativeOps(LAYOUT, RESIDENT, NOTHING, NOTHING, NOTHING, 4 * tokens, threads=2, precision="exact")
    for backend in (ops, NumpyOps(LAYOUT, RESIDENT, NOTHING, NOTHING, NOTHING, 4 * tokens)):
        whole, cache = backend.new_kv_cache(1, width), backend.new_kv_cache(1, width, window)
        start, turn = 0, 0
        while start < tokens:
            at = slice(start, min(start + sizes[turn % 4], tokens))
            expected, whole = backend.attention(q[at], k[at], v[at], whole, 0.3, window=window)
            for _ in range(2):  # an older cache is still there for a step that failed
                found, longer = backend.attention(q[at], k[at], v[at], cache, 0.3, window=window)
                assert np.array_equal(found, expected) if backend is ops else near(found, expected)
            cache, start, turn = longer, at.stop, turn + 1
        held = cache.arrays[0].shape[1] if backend is ops else len(cache.keys)
        assert cache.first > 0
        assert 2 * held <= held_tokens(window, 4 * tokens, 700) < 4 * tokens
    ops.close()


@pytest.mark.parametrize("group", [1, 70])  # 70 query heads are more than a tile
def test_a_step_behind_a_long_cache_is_its_definition_for_any_threads(group: int) -> None:
    tokens, width = 64 * 128 + 200, 16  # more blocks than are shared out at a time
    q, k, v = normal(0, 1, group, width), normal(1, tokens, 1, width), normal(2, tokens, 1, width)
    earlier = np.zeros((tokens - 1, group, width), np.float32)
    scores = np.float64(0.25) * q[0] @ k[:, 0].T
    p = np.exp(scores - scores.max(axis=1, keepdims=True))
    expected = p / p.sum(axis=1, keepdims=True) @ v[:, 0]
    results = []
    for threads in (1, 2, 3):
        ops = NativeOps(LAYOUT, RESIDENT, NOTHING, NOTHING, NOTHING, tokens, threads=threads, precision="exact")
        cache = ops.new_kv_cache(1, width)
        _, cache = ops.attention(earlier, k[:-1], v[:-1], cache, 0.25, window=1)
        results.append(ops.attention(q, k[-1:], v[-1:], cache, 0.25)[0])
        ops.close()
    assert all(np.array_equal(result, results[0]) for result in results)
    assert near(results[0][0], expected)


@settings(max_examples=20)
@given(
    tokens=st.sampled_from((1, 5, 130)),
    heads=st.sampled_from((1, 5, 16, 70)),
    rank=st.sampled_from((16, 48)),
    selects=st.booleans(),
    splits=st.booleans(),
    seed=seeds,
)
def test_latent_attention_is_that_of_the_reference_however_it_is_cut(
    tokens: int, heads: int, rank: int, selects: bool, splits: bool, seed: int
) -> None:
    n, rope, v = 8, 4, 6
    q, q_rope = normal(seed, tokens, heads, n), normal(seed + 1, tokens, heads, rope)
    latent, k_rope = normal(seed + 2, tokens, rank), normal(seed + 3, tokens, rope)
    whole = normal(seed + 4, heads * (n + v), rank, scale=0.3)
    per_head = whole.reshape(heads, n + v, rank)
    halves = [per_head[:, :n].swapaxes(1, 2).reshape(-1, n), per_head[:, n:].reshape(-1, rank)]
    kv_b = [weight(np.ascontiguousarray(half)) for half in halves] if splits else [weight(whole)]
    selection = normal(seed + 5, tokens, tokens) > 1  # of a whole block sometimes none
    np.fill_diagonal(selection, True)

    def compute(ops: NumpyOps, seed: int) -> Sequence[Float32]:
        cache, outputs = ops.new_latent_cache(rank, rope), []
        for at in cuts(seed, tokens):
            chosen = selection[at, : at.stop] if selects else None
            output, cache = ops.latent_attention(q[at], q_rope[at], latent[at], k_rope[at], kv_b, cache, 0.3, chosen)
            outputs.append(output)
        return (np.concatenate(outputs),)

    (found,) = the_same(lambda ops: compute(ops, seed + ops.threads))
    assert near(found, compute(REFERENCE, seed)[0])


@pytest.mark.parametrize("encoding", ENCODINGS, ids=str)
@pytest.mark.parametrize("transposed", [False, True])
def test_heads_of_a_matrix_in_any_encoding_meet_their_own_inputs(encoding: Encoding, transposed: bool) -> None:
    rows, columns, number = 3 * 70, columns_of(encoding, 9), 66
    matrix = Matrix(encoding, rows, columns, None, 0)
    values = matrix.part.encoding.decode(matrix.part.views(matrix.record)).reshape(3, 70, columns)[:, 4:]
    x = normal(1, 5, 3, number if transposed else columns)
    at = matrix.native.moved(matrix.record.ctypes.data - RESIDENT.ctypes.data)
    w = NativeWeight(encoding, {}, rows, columns, at)
    (found,) = the_same(lambda ops: (ops.heads_product(x, w, 3, slice(4, 70), transposed=transposed),))
    subscripts = "thr,hrc->thc" if transposed else "thc,hrc->thr"
    assert near(found, np.einsum(subscripts, x.astype(np.float64), values))


@given(tokens=st.integers(1, 40), top_k=st.integers(1, 30), seed=seeds)
def test_an_indexer_chooses_as_the_reference_does_however_it_is_cut(tokens: int, top_k: int, seed: int) -> None:
    q, k = normal(seed, tokens, 5, 16), normal(seed + 1, tokens, 16)
    weights = normal(seed + 2, tokens, 5)

    def compute(ops: NumpyOps, seed: int) -> Sequence[Any]:
        cache, selection = ops.new_index_cache(16), np.zeros((tokens, tokens), np.bool_)
        for at in cuts(seed, tokens):
            selection[at, : at.stop], cache = ops.select_tokens(q[at], k[at], weights[at], cache, top_k)
        return (np.tril(selection),)  # what comes later is hidden anyway

    (found,) = the_same(lambda ops: compute(ops, seed + ops.threads))
    differ = found != compute(REFERENCE, seed)[0]
    assert differ.sum() <= 2  # of scores that are equal but for rounding either may be chosen


def test_attention_to_what_is_no_number_gives_none() -> None:
    q, k, v = np.full((200, 1, 16), np.nan, np.float32), normal(0, 200, 1, 16), normal(1, 200, 1, 16)
    (found,) = the_same(lambda ops: (ops.attention(q, k, v, ops.new_kv_cache(1, 16), 1.0)[0],))
    assert np.isnan(found).all()


def test_a_cache_holds_no_more_than_its_context() -> None:
    q = normal(0, CTX_SIZE + 20, 1, 8)
    for ops in every_ops((1,)):
        with pytest.raises(UnsupportedError):
            ops.attention(q, q, q, ops.new_kv_cache(1, 8), 1.0)


# ---- gated DeltaNet


@given(tokens=st.integers(1, 30), channels=st.integers(1, 70), kernel=st.integers(1, 5), seed=seeds)
def test_a_convolution_is_that_of_the_reference_to_the_bit(tokens: int, channels: int, kernel: int, seed: int) -> None:
    x, taps, start = normal(seed, tokens, channels), normal(seed, channels, kernel), normal(seed, kernel - 1, channels)

    def compute(ops: NativeOps) -> Sequence[Float32]:
        state, outputs = start, []
        for at in cuts(seed + ops.threads, tokens):
            output, state = ops.causal_conv1d(x[at], weight(taps), state)
            outputs.append(output)
        return np.concatenate(outputs), state

    found, state = the_same(compute)
    expected, expected_state = REFERENCE.causal_conv1d(x, weight(taps), start)
    assert np.array_equal(found, expected)
    assert np.array_equal(state, expected_state)


@settings(max_examples=30)
@given(
    tokens=st.sampled_from((1, 2, 30)),
    key_heads=st.integers(1, 3),
    group=st.integers(1, 3),
    key_width=st.sampled_from((2, 16, 128)),
    value_width=st.sampled_from((1, 16, 40)),
    by_channel=st.booleans(),
    seed=seeds,
)
def test_the_delta_rule_is_that_of_the_reference_however_it_is_cut(
    tokens: int, key_heads: int, group: int, key_width: int, value_width: int, by_channel: bool, seed: int
) -> None:
    heads = key_heads * group
    q, k = normal(seed, tokens, key_heads, key_width), normal(seed + 1, tokens, key_heads, key_width)
    k = REFERENCE.l2_norm(k, 1e-6)
    v, beta = normal(seed + 2, tokens, heads, value_width), REFERENCE.sigmoid(normal(seed + 3, tokens, heads))
    log_decay = -np.abs(normal(seed + 4, tokens, heads, *((key_width,) if by_channel else ())))

    def compute(ops: NativeOps) -> Sequence[Float32]:
        state, outputs = ops.new_delta_state(heads, key_width, value_width), []
        for at in cuts(seed + ops.threads, tokens):
            output, state = ops.gated_delta_rule(q[at], k[at], v[at], log_decay[at], beta[at], state)
            outputs.append(output)
        return np.concatenate(outputs), state.now

    found, state = the_same(compute)
    start = REFERENCE.new_delta_state(heads, key_width, value_width)
    expected, expected_state = REFERENCE.gated_delta_rule(q, k, v, log_decay, beta, start)
    assert near(found, expected)
    columns = np.moveaxis(state, 2, 1).reshape(heads, key_width, -1)[..., :value_width]  # panels side by side
    assert near(columns, expected_state)


def test_a_step_of_the_delta_rule_leaves_the_state_before_it() -> None:
    x, gate = normal(0, 1, 2, 16), np.full((1, 2), 0.5, np.float32)
    for ops in every_ops((1,)):
        state = ops.new_delta_state(2, 16, 16)
        first, after = ops.gated_delta_rule(x, x, x, -gate, gate, state)
        again, _ = ops.gated_delta_rule(x, x, x, -gate, gate, state)
        assert np.array_equal(first, again)
        assert not state.now.any()
        assert after.now.any()
