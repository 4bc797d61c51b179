"""DeepSeek-V4's operations: near their definitions, and the same bits for levels, threads and cuts into steps."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from formats.config import SQRT_SOFTPLUS
from formats.dtypes import Float32
from formats.encodings import FP8, MXFP4, Affine, Encoding, Plain, Symmetric
from formats.errors import FormatError, UnsupportedError
from runtime.backends import native
from runtime.backends.facts import Beside, Routing
from runtime.backends.native_weights import NativeWeight
from runtime.backends.numpy_ops import NumpyOps
from tests.matrices import Matrix, columns_of
from tests.native.ops import REFERENCE, RESIDENT, Float64, cuts, every_ops, near, normal, seeds, the_same, weight

pytestmark = pytest.mark.skipif(not native.levels(), reason="the native kernels are not built")


def softmax(x: Float64) -> Float64:
    p = np.exp(x - x.max(axis=-1, keepdims=True))
    result: Float64 = p / p.sum(axis=-1, keepdims=True)
    return result


@settings(max_examples=40)
@given(
    tokens=st.sampled_from((1, 5, 17, 130, 300)),
    heads=st.sampled_from((1, 3, 64, 70)),
    rate=st.sampled_from((1, 4, 128)),  # of 300 entries, or of none
    window=st.sampled_from((1, 9, 128)),
    selects=st.booleans(),
    sparse=st.sampled_from((-3, 0, 2)),  # most of the entries, half of them, a few
    seed=seeds,
)
def test_attention_to_entries_beside_a_window_is_its_definition_however_it_is_cut(
    tokens: int, heads: int, rate: int, window: int, selects: bool, sparse: int, seed: int
) -> None:
    width, number = 16, tokens // rate
    q, kv = normal(seed, tokens, heads, width, scale=2), normal(seed + 1, tokens, 1, width)
    entries, sinks = normal(seed + 2, number, width), normal(seed + 3, heads)
    selection = normal(seed + 4, tokens, number) > sparse  # of the entries of a token sometimes none
    seen = (np.arange(tokens) + 1) // rate

    def compute(ops: NumpyOps, seed: int) -> Sequence[Float32]:
        cache, kept, outputs = ops.new_kv_cache(1, width), ops.new_entries(width, rate), []
        for at in cuts(seed, tokens):
            kept = ops.add_entries(kept, entries[at.start // rate : at.stop // rate])
            chosen = selection[at, : at.stop // rate] if selects else None
            beside = Beside(kept, seen[at].tolist(), chosen)
            given_sinks = weight(sinks)
            output, cache = ops.attention(
                q[at], kv[at], kv[at], cache, 0.3, window=window, sinks=given_sinks, beside=beside
            )
            outputs.append(output)
        return (np.concatenate(outputs),)

    (found,) = the_same(lambda ops: compute(ops, seed + ops.threads))
    behind = np.arange(tokens)[:, None] - np.arange(tokens)
    hidden = np.arange(number) >= seen[:, None]
    hidden = np.concatenate([(behind < 0) | (behind >= window), hidden | (~selection & selects)], axis=1)
    keys = np.concatenate([kv[:, 0], entries]).astype(np.float64)
    scores = np.einsum("thd,kd->htk", q.astype(np.float64), keys) * 0.3
    scores[:, hidden] = -np.inf
    sink = np.broadcast_to(sinks[:, None, None], (heads, tokens, 1))
    p = softmax(np.concatenate([scores, sink], axis=2))[..., :-1]
    expected = np.einsum("htk,kd->thd", p, keys)
    assert near(found, expected)
    assert near(compute(REFERENCE, seed)[0], expected)


def test_entries_of_a_width_that_no_kernel_has_are_refused() -> None:
    for ops in every_ops((1,)):
        with pytest.raises(UnsupportedError, match="head_dim is 24, expected a multiple of 16"):
            ops.new_entries(24, 4)


@given(
    tokens=st.integers(1, 40),
    rate=st.sampled_from((1, 4, 7)),
    width=st.sampled_from((2, 48)),
    overlap=st.booleans(),
    seed=seeds,
)
def test_an_entry_is_the_gated_mean_of_its_windows_however_they_are_cut(
    tokens: int, rate: int, width: int, overlap: bool, seed: int
) -> None:
    kv, gate, bias = (
        normal(seed, tokens, width),
        normal(seed + 1, tokens, width, scale=3),
        normal(seed + 2, rate, width),
    )

    def compute(ops: NumpyOps, seed: int) -> Sequence[Float32]:
        window, entries = ops.new_open_window(rate, width, overlap), []
        for at in cuts(seed, tokens):
            for _ in range(2):  # an older window is still there for a step that failed
                made, longer = ops.compress(kv[at], gate[at], weight(bias), window)
            entries.append(made)
            window = longer
        return (np.concatenate(entries),)

    (found,) = the_same(lambda ops: compute(ops, seed + ops.threads))
    d = width // 2 if overlap else width
    assert found.shape == (tokens // rate, d)
    for w in range(tokens // rate):
        own, before = slice(w * rate, (w + 1) * rate), slice((w - 1) * rate, w * rate)
        values, gates = kv[own], gate[own] + bias
        if overlap:
            values, gates = values[:, d:], gates[:, d:]
        if overlap and w > 0:
            values = np.concatenate([kv[before, :d], values])
            gates = np.concatenate([gate[before, :d] + bias[:, :d], gates])
        shares = softmax(gates.T.astype(np.float64))
        assert near(found[w], (shares * values.T).sum(axis=1))
    reference = compute(REFERENCE, seed)[0]
    assert reference.shape == found.shape
    assert len(found) == 0 or near(reference, found)


@given(
    tokens=st.integers(1, 9),
    streams=st.integers(1, 5),
    columns=st.sampled_from((1, 40, 2500)),
    iterations=st.sampled_from((1, 20)),
    seed=seeds,
)
def test_streams_are_weighed_collapsed_and_expanded_as_their_definition_says(
    tokens: int, streams: int, columns: int, iterations: int, seed: int
) -> None:
    number = (2 + streams) * streams
    mixes, scale, base = normal(seed, tokens, number), normal(seed + 1, 3), normal(seed + 2, number)
    h, y = normal(seed + 3, tokens, streams, columns), normal(seed + 4, tokens, columns)

    def compute(ops: NumpyOps) -> Sequence[Any]:
        weights = ops.stream_weights(mixes, weight(scale), weight(base), streams, iterations, 1e-6)
        return *weights, ops.collapse_streams(h, weights[0]), ops.expand_streams(h, y, *weights[1:])

    pre, post, comb, x, new = the_same(compute)
    scaled = [part * s + b for part, s, b in zip(_parts(mixes), scale, _parts(base[None]), strict=True)]
    assert near(pre, 1 / (1 + np.exp(-scaled[0].astype(np.float64))) + 1e-6)
    assert near(post, 2 / (1 + np.exp(-scaled[1].astype(np.float64))))
    expected = softmax(scaled[2].astype(np.float64).reshape(tokens, streams, streams)) + 1e-6
    for division in range(2 * iterations - 1):  # of columns, then of rows and columns in turns
        expected /= expected.sum(axis=1 + division % 2, keepdims=True) + 1e-6
    assert near(comb, expected)
    assert near(x, np.einsum("tn,tnc->tc", pre.astype(np.float64), h))
    assert near(new, post[:, :, None] * y[:, None] + np.einsum("tij,tic->tjc", comb.astype(np.float64), h))
    for found, reference in zip((pre, post, comb, x, new), compute(REFERENCE), strict=True):
        assert near(found, reference)


@given(tokens=st.integers(1, 9), streams=st.integers(1, 5), columns=st.sampled_from((1, 40, 2500)), seed=seeds)
def test_streams_that_stay_apart_have_gates_of_two_kinds_and_keep_what_they_hold(
    tokens: int, streams: int, columns: int, seed: int
) -> None:
    mixes, scale, base = normal(seed, tokens, 2 * streams), normal(seed + 1, 2), normal(seed + 2, 2 * streams)
    h, y = normal(seed + 3, tokens, streams, columns), normal(seed + 4, tokens, columns)

    def compute(ops: NumpyOps) -> Sequence[Any]:
        gates = ops.stream_gates(mixes, weight(scale), weight(base), 0.0)
        return gates, ops.expand_streams(h, y, gates[:, streams:], None)

    gates, new = the_same(compute)
    assert near(gates, 1 / (1 + np.exp(-(mixes.astype(np.float64) * scale.repeat(streams) + base))))
    assert near(new, gates[:, streams:, None].astype(np.float64) * y[:, None] + h)
    for found, reference in zip((gates, new), compute(REFERENCE), strict=True):
        assert near(found, reference)


def _parts(mixes: Float32) -> list[Float32]:
    """pre, post and comb of mixes [T, (2 + N) N]."""
    streams = int(np.sqrt(1 + mixes.shape[1])) - 1
    return [mixes[:, :streams], mixes[:, streams : 2 * streams], mixes[:, 2 * streams :]]


ENCODINGS = (
    *(Plain(dtype) for dtype in ("bf16", "f32")), *(Affine(bits, 64, "bf16") for bits in (4, 8)),
    Symmetric(4, 32, "f16"), MXFP4(), FP8(128, "bf16"),
)  # fmt: skip


@pytest.mark.parametrize("encoding", ENCODINGS, ids=str)
def test_groups_of_rows_in_any_encoding_meet_their_own_inputs(encoding: Encoding) -> None:
    rows, columns = 3 * 8, columns_of(encoding, 9)
    columns += columns % 2  # rows begin on whole words
    matrix = Matrix(encoding, rows, columns, None, 0)
    views = matrix.part.views(matrix.record)
    values = encoding.decode(views).reshape(3, 8, columns)
    x = normal(1, 5, 3, columns)
    at = matrix.native.moved(matrix.record.ctypes.data - RESIDENT.ctypes.data)
    w = NativeWeight(encoding, views, rows, columns, "a weight", at)
    (found,) = the_same(lambda ops: (ops.grouped_linear(x, w),))
    expected = np.einsum("tgc,grc->tgr", x.astype(np.float64), values).reshape(5, rows)
    assert near(found, expected)
    assert near(REFERENCE.grouped_linear(x, w), expected)


TABLE = np.array([[3, 0, 5], [1, 2, 4], [5, 4, 0], [2, 2, 1], [6, 0, 1], [-1, 0, 1], [0.5, 1, 2]], np.float32)


def test_a_table_of_experts_chooses_and_scores_weigh() -> None:
    logits, routing = normal(3, 4, 6, scale=3), Routing(3, SQRT_SOFTPLUS, routed_scaling_factor=1.5)
    tokens = [2, 0, 1, 2]
    ids, weights = the_same(lambda ops: ops.route_by_token(logits, tokens, weight(TABLE), routing))
    assert ids.tolist() == TABLE[tokens].tolist()
    scores = np.sqrt(np.log1p(np.exp(np.take_along_axis(logits.astype(np.float64), ids, axis=1))))
    assert near(weights, 1.5 * scores / scores.sum(axis=1, keepdims=True))
    assert near(REFERENCE.route_by_token(logits, tokens, weight(TABLE), routing)[1], weights)


@pytest.mark.parametrize("token", [3, 4, 5, 6])
def test_a_row_of_a_table_that_is_no_choice_of_experts_is_refused(token: int) -> None:
    for ops in (REFERENCE, *every_ops((1,))):
        with pytest.raises(FormatError, match=rf"for token {token}, expected distinct whole numbers from 0 to 5"):
            ops.route_by_token(normal(3, 2, 6), [0, token], weight(TABLE), Routing(3, SQRT_SOFTPLUS))


@pytest.mark.parametrize("top_k", [2, 4])
def test_a_table_of_more_or_fewer_experts_than_a_token_has_is_refused(top_k: int) -> None:
    for ops in (REFERENCE, *every_ops((1,))):
        with pytest.raises(FormatError, match=f"has 3 columns, expected top_k {top_k}"):
            ops.route_by_token(normal(3, 2, 6), [0, 1], weight(TABLE), Routing(top_k, SQRT_SOFTPLUS))
