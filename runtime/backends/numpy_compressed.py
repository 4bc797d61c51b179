"""Compressed keys and several residual streams in NumPy: DeepSeek-V4's own operations (base.py defines them)."""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from formats.dtypes import AnyArray, Float32
from runtime.backends.facts import Beside, Rounding, Routing, State, Weight
from runtime.backends.numpy_latent import Bool, IndexCache, softmax
from runtime.backends.numpy_route import Integers, expert_ids_of, routing_weights, scores_of


@dataclass(frozen=True)
class OpenWindow:
    """Projections of the tokens that no entry stands for yet: [2, capacity, width], keys and gates.

    Where windows overlap the window before stands first, at the start one of gates that take no part. A longer one
    may share the same memory.
    """

    rows: Float32
    length: int  # of the rows that are there

    @classmethod
    def empty(cls, rate: int, width: int, overlap: bool) -> "OpenWindow":
        """Before the first token; width is that of a projection, of two entries where windows overlap."""
        before = rate if overlap else 0
        rows = np.zeros((2, before + rate, width), np.float32)
        rows[1] = -np.inf
        return cls(rows, before)

    @property
    def capacity(self) -> int:
        return self.rows.shape[1]


Pool = Callable[[Float32, Float32], Float32]


def compress(
    kv: Float32, gate: Float32, position_bias: Weight | None, window: OpenWindow, pool: Pool
) -> tuple[Float32, OpenWindow]:
    """As Ops.compress; pool makes the means of values and gates [W, slots, d]."""
    rate, width = position_bias.rows if position_bias else window.capacity, kv.shape[1]
    before = window.capacity - rate  # rows of the window before
    if position_bias:
        places = (window.length - before + np.arange(len(kv))) % rate
        lowest = int(places.min())
        gate = gate + position_bias.decode(lowest, int(places.max()) + 1)[places - lowest]
    new = np.stack([kv, gate])  # [2, T, width]
    stop = window.length + len(kv)
    if stop < window.capacity:
        window.rows[:, window.length : stop] = new
        return np.empty((0, width // 2 if before else width), np.float32), OpenWindow(window.rows, stop)
    rows = np.concatenate([window.rows[:, : window.length], new], axis=1)
    windows = (stop - before) // rate
    own = rows[:, before : before + windows * rate].reshape(2, windows, rate, width)
    if before:
        earlier = rows[:, : windows * rate].reshape(2, windows, rate, width)
        own = np.concatenate([earlier[..., : width // 2], own[..., width // 2 :]], axis=2)
    kept = rows[:, windows * rate :]
    after = np.empty_like(window.rows)
    after[:, : kept.shape[1]] = kept
    return pool(own[0], own[1]), OpenWindow(after, kept.shape[1])


def visible(beside: Beside) -> Bool:
    """Which entries each query sees: [T, entries]."""
    first: Bool = np.arange(beside.entries.length) < np.asarray(beside.seen)[:, None]
    return first if beside.selection is None else first & beside.selection


def doubly_stochastic(comb: Float32, iterations: int, eps: np.float32) -> Float32:
    """Matrices [T, N, N] whose columns and rows are divided by their sums in turns (Sinkhorn and Knopp)."""
    comb = comb / (comb.sum(axis=1, keepdims=True) + eps)
    for _ in range(iterations - 1):
        comb = comb / (comb.sum(axis=2, keepdims=True) + eps)
        comb = comb / (comb.sum(axis=1, keepdims=True) + eps)
    return comb


E4M3_BITS, E4M3_LEAST, E4M3_MOST = 3, -6, 448  # digits behind the point, smallest normal exponent, largest value
E2M1_BITS, E2M1_LEAST, E2M1_MOST = 1, 0, 6


def rounded(x: Float32, rounding: Rounding) -> Float32:
    """As Ops.rounded (source: mlx-lm's _fake_quant_fp8 and _fake_quant_fp4)."""
    blocks = x.reshape(*x.shape[:-1], -1, rounding.block)
    largest = np.abs(blocks).max(axis=-1, keepdims=True)
    if rounding.bits == 8:
        scales = _power_above(np.maximum(largest, np.float32(1e-4)) / np.float32(E4M3_MOST))
        values = _nearest(blocks / scales, E4M3_BITS, E4M3_LEAST, E4M3_MOST)
    else:
        least = 2.0**-9 if rounding.e4m3_scales else 2.0**-126
        scales = np.maximum(largest, np.float32(E2M1_MOST * least)) / np.float32(E2M1_MOST)
        of_e4m3 = rounding.e4m3_scales
        scales = _nearest(scales, E4M3_BITS, E4M3_LEAST, E4M3_MOST) if of_e4m3 else _power_above(scales)
        values = _nearest(blocks / scales, E2M1_BITS, E2M1_LEAST, E2M1_MOST)
    return (values * scales).reshape(x.shape)


def _power_above(x: Float32) -> Float32:
    """The power of two that is x or the next above it, of positive numbers."""
    fraction, exponent = np.frexp(x)  # of 0.5 up to 1
    return np.ldexp(np.float32(1), exponent - (fraction == 0.5)).astype(np.float32)


def _nearest(x: Float32, bits: int, least: int, most: float) -> Float32:
    """Of numbers with so many binary digits behind the first; of two the even one, up to the largest in size."""
    _, exponent = np.frexp(x)
    spacing = np.ldexp(np.float32(1), np.maximum(exponent - 1, least) - bits)
    nearest: Float32 = np.clip(np.rint(x / spacing) * spacing, -most, most).astype(np.float32)
    return nearest


class CompressedOps:
    """The part of NumpyOps that only DeepSeek-V4 and V4.1 use and that needs nothing of a container."""

    @abstractmethod
    def sigmoid(self, x: Float32) -> Float32: ...

    @abstractmethod
    def new_index_cache(self, head_dim: int, rate: int = 1) -> IndexCache: ...

    def new_entries(self, width: int, rate: int) -> State:
        return self.new_index_cache(width, rate)

    def add_entries(self, entries: State, keys: Float32) -> State:
        return entries.extended(keys)

    def new_open_window(self, rate: int, width: int, overlap: bool) -> State:
        return OpenWindow.empty(rate, width, overlap)

    def compress(
        self, kv: Float32, gate: Float32, position_bias: Weight | None, window: OpenWindow
    ) -> tuple[Float32, OpenWindow]:
        return compress(kv, gate, position_bias, window, self.pool)

    def pool(self, values: Float32, gates: Float32) -> Float32:
        """The mean of each channel's values [W, slots, d], weighed by the softmax of its gates: [W, d]."""
        weights = np.exp(gates - gates.max(axis=1, keepdims=True))
        weights /= weights.sum(axis=1, keepdims=True)
        pooled: Float32 = (values * weights).sum(axis=1)
        return pooled

    def rounded(self, x: Float32, rounding: Rounding) -> Float32:
        return rounded(x, rounding)

    def stream_gates(self, mixes: Float32, scale: Weight, base: Weight, eps: float) -> Float32:
        scales = scale.vector()
        scaled = mixes * np.repeat(scales, mixes.shape[1] // len(scales)) + base.vector()
        return self.sigmoid(scaled) + np.float32(eps)

    def stream_weights(
        self, mixes: Float32, scale: Weight, base: Weight, streams: int, iterations: int, eps: float
    ) -> tuple[Float32, Float32, Float32]:
        scaled = mixes * np.repeat(scale.vector(), (streams, streams, streams**2)) + base.vector()
        pre = self.sigmoid(scaled[:, :streams]) + np.float32(eps)
        post = np.float32(2) * self.sigmoid(scaled[:, streams : 2 * streams])
        comb = softmax(scaled[:, 2 * streams :].reshape(-1, streams, streams)) + np.float32(eps)
        return pre, post, doubly_stochastic(comb, iterations, np.float32(eps))

    def collapse_streams(self, h: Float32, pre: Float32) -> Float32:
        y = h[:, 0] * pre[:, 0, None]
        for i in range(1, h.shape[1]):
            y += h[:, i] * pre[:, i, None]
        return y

    def expand_streams(self, h: Float32, y: Float32, post: Float32, comb: Float32 | None) -> Float32:
        new = post[:, :, None] * y[:, None]
        if comb is None:
            new += h
            return new
        for i in range(h.shape[1]):
            new += comb[:, i, :, None] * h[:, i, None]
        return new

    def grouped_linear(self, x: Float32, weight: Weight) -> Float32:
        groups = x.shape[1]
        rows = weight.rows // groups
        parts = [x[:, g] @ weight.decode(g * rows, (g + 1) * rows).T for g in range(groups)]
        return np.concatenate(parts, axis=1)

    def route_by_token(
        self, logits: Float32, token_ids: Sequence[int], table: Weight, routing: Routing
    ) -> tuple[AnyArray, Float32]:
        expert_ids = self.experts_of_tokens(token_ids, table, routing.top_k, logits.shape[1])
        return expert_ids, routing_weights(scores_of(logits, routing), expert_ids, routing)

    def experts_of_tokens(self, token_ids: Sequence[int], table: Weight, top_k: int, num_experts: int) -> Integers:
        """Rows of a table of experts: [T, top_k]. Raises FormatError for what are not so many distinct experts."""
        rows = {name: array[np.asarray(token_ids)] for name, array in table.arrays.items()}
        return expert_ids_of(table.encoding.decode(rows), token_ids, top_k, num_experts)
