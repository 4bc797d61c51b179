"""Attention: near its definition, and the same bits for levels, threads and cuts into steps."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from formats.dtypes import Float32
from formats.encodings import FP8, MXFP4, NVFP4, Affine, Encoding, Plain, Symmetric, ZeroPoint
from formats.errors import UnsupportedError
from formats.window import held_tokens
from runtime.backends import native
from runtime.backends.native_ops import NativeOps
from runtime.backends.native_weights import NativeWeight
from runtime.backends.numpy_ops import NumpyOps
from tests.encodings import GGML_ENCODINGS
from tests.matrices import Matrix, columns_of
from tests.native.ops import (
    CTX_SIZE,
    LAYOUT,
    NOTHING,
    REFERENCE,
    RESIDENT,
    Float64,
    cuts,
    every_ops,
    near,
    normal,
    seeds,
    the_same,
    weight,
)

pytestmark = pytest.mark.skipif(not native.levels(), reason="the native kernels are not built")

ENCODINGS = (
    *(Plain(dtype) for dtype in ("bf16", "f16", "f32")), *(Affine(bits, 64, "bf16") for bits in (2, 3, 4, 5, 6, 8)),
    Symmetric(4, 32, "f16"), ZeroPoint(4, 128, "f16"), MXFP4(), NVFP4("multiply"), FP8(128, "bf16"),
    *GGML_ENCODINGS,
)  # fmt: skip


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
    value_width=st.sampled_from((None, 1, 12, 48)),
    window=st.sampled_from((None, 1, 3, 128, 200)),
    with_sinks=st.booleans(),
    seed=seeds,
)
def test_attention_is_its_definition_whatever_computes_it_and_however_it_is_cut(
    tokens: int,
    key_heads: int,
    group: int,
    width: int,
    value_width: int | None,
    window: int | None,
    with_sinks: bool,
    seed: int,
) -> None:
    heads = key_heads * group
    q, k = normal(seed, tokens, heads, width, scale=3), normal(seed + 1, tokens, key_heads, width)
    v, sinks = normal(seed + 2, tokens, key_heads, value_width or width), normal(seed + 3, heads, scale=3)
    given_sinks = weight(sinks) if with_sinks else None

    def compute(ops: NativeOps) -> Sequence[Float32]:
        cache, outputs = ops.new_kv_cache(key_heads, width, value_dim=value_width), []
        for at in cuts(seed + ops.threads, tokens):
            output, cache = ops.attention(q[at], k[at], v[at], cache, 0.3, window=window, sinks=given_sinks)
            outputs.append(output)
        return (np.concatenate(outputs),)

    (found,) = the_same(compute)
    assert near(found, attended(q, k, v, 0.3, window or tokens, sinks if with_sinks else None))


@pytest.mark.parametrize(("window", "seed"), [(1, 0), (11, 1), (128, 2), (200, 3)])
def test_a_cache_that_forgets_what_its_window_hides_changes_no_bit(window: int, seed: int) -> None:
    tokens, width, sizes = 3000, 16, (700, 1, 129, 64)
    arguments = LAYOUT, RESIDENT, NOTHING, NOTHING, NOTHING, 4 * tokens, max(sizes)
    shapes = (2, width), (1, width), (1, 12)  # values narrower than keys
    q, k, v = (normal(seed + i, tokens, *shape) for i, shape in enumerate(shapes))
    ops = NativeOps(*arguments, threads=2, precision="exact")
    for backend in (ops, NumpyOps(*arguments)):
        whole, cache = (backend.new_kv_cache(1, width, forgets, value_dim=12) for forgets in (None, window))
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
        ops = NativeOps(LAYOUT, RESIDENT, NOTHING, NOTHING, NOTHING, tokens, 512, threads=threads, precision="exact")
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
    drains=st.booleans(),
    seed=seeds,
)
def test_latent_attention_is_that_of_the_reference_however_it_is_cut(
    tokens: int, heads: int, rank: int, selects: bool, splits: bool, drains: bool, seed: int
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
    sinks = weight(normal(seed + 6, heads, scale=3)) if drains else None

    def compute(ops: NumpyOps, seed: int) -> Sequence[Float32]:
        cache, outputs = ops.new_latent_cache(rank, rope), []
        for at in cuts(seed, tokens):
            chosen = selection[at, : at.stop] if selects else None
            new = q[at], q_rope[at], latent[at], k_rope[at]
            output, cache = ops.latent_attention(*new, kv_b, cache, 0.3, chosen, sinks)
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
    w = NativeWeight(encoding, {}, rows, columns, "a weight", at)
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
