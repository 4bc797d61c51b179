"""The reference backend: every operation in fp32 NumPy, short and readable; the definition of the other backends.

Weights stay in their encoding and are decoded in row blocks of a fixed size, which threads share: the number of
threads never changes a bit of the result (NumPy's own BLAS threads are switched off by the engine).
"""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from formats.budget import ROPE_TABLES, ROW_BLOCK_BYTES, SCORES_BYTES
from formats.config import Activation, Rope
from formats.dtypes import AnyArray, Float32, to_float32
from formats.encodings import Encoding
from formats.errors import FormatError
from formats.layout import Layout, matrix_shape
from formats.record import LINEAR_BIAS, Part
from formats.window import first_kept, forgets, in_lanes, room
from runtime.backends.composed import ComposedOps
from runtime.backends.facts import Beside, Routing, ScaledNorm, State, Turn
from runtime.backends.numpy_compressed import CompressedOps, visible
from runtime.backends.numpy_elementwise import ElementwiseOps
from runtime.backends.numpy_latent import (
    Bool,
    IndexCache,
    Integers,
    LatentCache,
    Scored,
    index_scores,
    keys_matrix,
    latent_attention,
    seen_tokens,
    select_among,
    select_blocks,
    select_candidates,
    select_tokens,
    softmax,
    values_matrix,
)
from runtime.backends.numpy_route import route
from runtime.experts import Experts
from runtime.store import EmbeddingRows


@dataclass(frozen=True, eq=False)
class Weight:
    """A matrix [rows, columns], or a vector as one row, in its encoding; the arrays are views, never copies."""

    encoding: Encoding
    arrays: Mapping[str, AnyArray]
    rows: int
    columns: int

    def decode(self, start: int = 0, stop: int | None = None) -> Float32:
        """Rows start to stop: [stop - start, columns]."""
        return self.encoding.decode({name: array[start:stop] for name, array in self.arrays.items()})

    def vector(self) -> Float32:
        """A vector's values, whichever axis they lie along."""
        assert 1 in (self.rows, self.columns)
        return self.decode().reshape(-1)


@dataclass(frozen=True)
class KVCache:
    """Keys [capacity, H, d] and values [capacity, H, e] of tokens `first` to `length`.

    A longer cache may share the same memory.
    """

    keys: Float32
    values: Float32
    length: int
    first: int = 0
    window: int | None = None  # of a cache that forgets

    def with_room(self, tokens: int) -> "KVCache":
        """Itself, or a cache of its own memory that has forgotten what the next tokens do not see."""
        if self.window is None or self.length - self.first + tokens <= len(self.keys):
            return self
        first = first_kept(self.window, self.length)
        kept = slice(first - self.first, self.length - self.first)
        arrays = []
        for old in (self.keys, self.values):
            new = np.empty((room(self.window, tokens), *old.shape[1:]), np.float32)
            new[: self.length - first] = old[kept]
            arrays.append(new)
        return KVCache(arrays[0], arrays[1], self.length, first, self.window)


class NumpyOps(ElementwiseOps, CompressedOps, ComposedOps):
    """Ops (backends/base.py) over a container's resident memory, embedding file and experts."""

    name = "numpy"

    @property
    def description(self) -> str:
        """The backend as statistics name it."""
        return self.name

    def __init__(
        self,
        layout: Layout,
        resident: AnyArray,
        embedding: EmbeddingRows,
        experts: Experts,
        pool: ThreadPoolExecutor,
        ctx_size: int,
        chunk_size: int,
        ngrams: EmbeddingRows | None = None,
    ) -> None:
        self._layout = layout
        self._embedding, self._ngrams = embedding, ngrams
        self._experts = experts
        self._pool = pool
        self._ctx_size, self._chunk_size = ctx_size, chunk_size
        self._weights: dict[str, Weight] = {}
        for tensor in layout.resident:
            arrays = {array.name: array.view(resident, tensor.offset) for array in tensor.arrays}
            rows, columns = matrix_shape(tensor.shape)
            self._weights[tensor.name] = Weight(tensor.encoding, arrays, rows, columns)

    @property
    def rows_read_s(self) -> float:
        """Seconds spent reading rows of embeddings so far."""
        tables = (table for table in (self._embedding, self._ngrams) if table is not None)
        return sum(table.counters.seconds for table in tables)

    def weight(self, name: str) -> Weight:
        if name not in self._weights:
            raise FormatError(f"index.json: has no resident tensor {name}, which the model asks for")
        return self._weights[name]

    def values(self, name: str) -> tuple[float, ...]:
        return tuple(map(float, self.weight(name).vector()))

    def embed(self, token_ids: Sequence[int]) -> Float32:
        return _rows(self._embedding, np.asarray(token_ids))

    def embed_ngrams(self, rows: Sequence[Sequence[int]]) -> Float32:
        assert self._ngrams is not None
        numbers = np.asarray(rows)
        return _rows(self._ngrams, numbers.reshape(-1)).reshape(len(numbers), -1)

    # ---- matrices

    def linear(self, x: Float32, weight: Weight, bias: Weight | None = None) -> Float32:
        y = np.empty((len(x), weight.rows), np.float32)
        block = max(1, ROW_BLOCK_BYTES // (4 * weight.columns))

        def multiply(start: int) -> None:
            np.matmul(x, weight.decode(start, start + block).T, out=y[:, start : start + block])

        if weight.rows <= block:
            multiply(0)
        else:
            list(self._pool.map(multiply, range(0, weight.rows, block)))
        if bias is not None:
            y += bias.vector()
        return y

    def fetch(self, layer: int, expert_ids: AnyArray) -> None:
        """Nothing: here the first record is waited for anyway."""

    def look_ahead(self, layer: int, route: Callable[[], AnyArray]) -> None:
        """Nothing: the reference guesses not."""

    def linears(self, x: Float32, weights: Sequence[Weight], biases: Sequence[Weight] | None = None) -> list[Float32]:
        if biases is None:
            return [self.linear(x, weight) for weight in weights]
        return [self.linear(x, weight, bias) for weight, bias in zip(weights, biases, strict=True)]

    def feed_forward(
        self, x: Float32, gate: Weight | None, up: Weight, down: Weight, activation: Activation | None = None
    ) -> Float32:
        activation = activation or self._layout.model.expert_activation
        gates = None if gate is None else self.linear(x, gate)
        return self.linear(self._activate(activation, gates, self.linear(x, up)), down)

    def experts(
        self, layer: int, x: Float32, expert_ids: AnyArray, routing_weights: Float32, norm: ScaledNorm | None = None
    ) -> Float32:
        layout = self._layout.layers[layer]
        assert layout is not None
        activation = self._layout.model.routed_activation(layer)
        outputs = np.empty((*expert_ids.shape, x.shape[1]), np.float32)  # [T, k, D]
        real = np.less(expert_ids, layout.num_experts)
        np.copyto(outputs, x[:, None], where=~real[..., None])
        with closing(self._experts.get(layer, np.unique(expert_ids[real]).tolist())) as records:
            for expert, record in records:
                token, place = np.nonzero(expert_ids == expert)
                *gate, up, down = (self._project(part, record) for part in layout.record.parts)
                x_e = x[token]  # [n, D]
                if activation.scale_input:
                    x_e = x_e * routing_weights[token, place, None]
                gates = gate[0](x_e) if gate else None
                given = down(self._activate(activation, gates, up(x_e)))
                outputs[token, place] = given if norm is None else self.scaled_norm(given, norm)
        y = np.zeros_like(x)
        for i in range(expert_ids.shape[1]):  # in the router's order, whatever order they arrived in
            y += outputs[:, i] if activation.scale_input else routing_weights[:, i, None] * outputs[:, i]
        return y

    def _project(self, part: Part, record: AnyArray) -> Callable[[Float32], Float32]:
        """The linear map of one part of an expert's record."""
        arrays = part.views(record)
        bias = arrays.pop(LINEAR_BIAS, None)
        weight = Weight(part.encoding, arrays, part.rows, part.columns)

        def project(x: Float32) -> Float32:
            y = self.linear(x, weight)
            if bias is not None:
                assert part.linear_bias is not None
                y += to_float32(bias, part.linear_bias)
            return y

        return project

    def route(
        self,
        logits: Float32,
        routing: Routing,
        correction_bias: Weight | None = None,
        expert_scale: Weight | None = None,
    ) -> tuple[AnyArray, Float32]:
        bias = None if correction_bias is None else correction_bias.vector()
        expert_ids, weights = route(logits, routing, bias)
        return expert_ids, weights if expert_scale is None else weights * expert_scale.vector()[expert_ids]

    # ---- attention

    def rope(self, x: Float32, position: int, rope: Rope) -> Float32:
        cos, sin = (table[:, None] for table in rope_tables(rope, position, len(x)))
        half = rope.dim // 2
        first, second = slice(0, half), slice(half, rope.dim)
        if rope.interleaved:
            first, second = slice(0, rope.dim, 2), slice(1, rope.dim, 2)
        y = x.copy()
        y[..., first] = x[..., first] * cos - x[..., second] * sin
        y[..., second] = x[..., second] * cos + x[..., first] * sin
        return y

    def new_kv_cache(
        self,
        num_heads: int,
        head_dim: int,
        window: int | None = None,
        max_tokens: int | None = None,
        value_dim: int | None = None,
    ) -> State:
        if window is not None and not forgets(window, self._ctx_size, self._chunk_size):
            window = None
        capacity = min(max_tokens or self._ctx_size, self._ctx_size) if window is None else room(window, 0)
        keys, values = (
            np.empty((capacity, num_heads, width), np.float32) for width in (head_dim, value_dim or head_dim)
        )
        return KVCache(keys, values, 0, window=window)  # memory becomes resident only as tokens come

    def attention(
        self,
        q: Float32,
        k: Float32,
        v: Float32,
        cache: State,
        scale: float,
        *,
        window: int | None = None,
        sinks: Weight | None = None,
        turn: Turn | None = None,
        beside: Beside | None = None,
        selection: Bool | None = None,
    ) -> tuple[Float32, State]:
        if turn is not None:
            q, k = (self._turned(x, norm, turn) for x, norm in ((q, turn.q_norm), (k, turn.k_norm)))
        tokens, heads, d = q.shape
        cache = cache.with_room(tokens)
        start, stop = cache.length - cache.first, cache.length - cache.first + tokens
        cache.keys[start:stop], cache.values[start:stop] = k, v
        kv_heads = k.shape[1]
        group = heads // kv_heads  # query heads that share a key head
        output = np.empty((tokens, heads, v.shape[2]), np.float32)
        keys = stop + (beside.entries.length if beside is not None else 0)
        block = max(1, SCORES_BYTES // (4 * group * keys))
        for first in range(0, tokens, block):
            queries = q[first : first + block]  # [n, heads, d]
            seen = start + first + len(queries)
            behind = start + first + np.arange(len(queries))[:, None] - np.arange(seen)  # [n, seen]
            hidden = behind < 0 if window is None else (behind < 0) | (behind >= window)
            if selection is not None:
                hidden = hidden | ~selection[first : first + block, :seen]
            hidden = np.repeat(hidden, group, axis=0)  # [n * group, seen]
            unseen = None if beside is None else np.repeat(~visible(beside)[first : first + block], group, axis=0)
            for h in range(kv_heads):
                q_h = queries[:, h * group : (h + 1) * group].reshape(-1, d)  # [n * group, d]
                scores = q_h @ cache.keys[:seen, h].T * np.float32(scale)
                scores[hidden] = -np.inf
                sink = None if sinks is None else np.tile(sinks.vector()[h * group : (h + 1) * group], len(queries))
                values = cache.values[:seen, h]
                if beside is not None:
                    entries = beside.entries.keys[: beside.entries.length]
                    further = q_h @ entries.T * np.float32(scale)
                    further[unseen] = -np.inf
                    scores, values = np.concatenate([scores, further], axis=1), np.concatenate([values, entries])
                mixed = softmax(scores, sink) @ values
                output[first : first + block, h * group : (h + 1) * group] = mixed.reshape(-1, group, v.shape[2])
        return output, replace(cache, length=cache.length + tokens)

    def _turned(self, x: Float32, norm: Weight | None, turn: Turn) -> Float32:
        x = x if norm is None else self.rms_norm(x, norm, turn.eps, turn.offset)
        return self.rope(x, turn.position, turn.rope)

    def new_latent_cache(self, kv_lora_rank: int, rope_dim: int) -> State:
        capacity = self._ctx_size
        return LatentCache(
            np.empty((capacity, kv_lora_rank), np.float32), np.empty((capacity, rope_dim), np.float32), 0
        )

    def latent_attention(
        self,
        q: Float32,
        q_rope: Float32,
        latent: Float32,
        k_rope: Float32,
        kv_b: Sequence[Weight],
        cache: State,
        scale: float,
        selection: Bool | None = None,
        sinks: Weight | None = None,
    ) -> tuple[Float32, State]:
        extended = cache.extended(latent, k_rope)
        _, heads, n = q.shape
        matrices = ((keys_matrix(kv_b, h, heads, n), values_matrix(kv_b, h, heads, n)) for h in range(heads))
        drains = None if sinks is None else sinks.vector()
        return latent_attention(q, q_rope, matrices, extended, scale, selection, drains), extended

    def new_index_cache(self, head_dim: int, rate: int = 1) -> IndexCache:
        return IndexCache(np.empty((in_lanes(-(-self._ctx_size // rate)), head_dim), np.float32), 0)

    def select_tokens(
        self,
        q: Float32,
        k: Float32,
        weights: Float32,
        cache: IndexCache,
        top_k: int,
        seen: Sequence[int] | None = None,
    ) -> tuple[Bool, IndexCache]:
        extended = cache.extended(k)
        each = seen_tokens(extended, len(q)) if seen is None else np.asarray(seen)
        return select_tokens(q, weights, extended, top_k, each), extended

    def select_among(
        self,
        q: Float32,
        weights: Float32,
        cache: IndexCache,
        top_k: int,
        seen: Sequence[int],
        candidates: Bool | None = None,
    ) -> Bool:
        each, shape = np.asarray(seen), (len(q), cache.length)
        return select_among(self.index_scores(q, weights, cache, each), shape, each, top_k, candidates)

    def select_candidates(
        self,
        q: Float32,
        weights: Float32,
        cache: IndexCache,
        top_k: int,
        seen: Sequence[int],
        block: int,
        blocks: int,
    ) -> tuple[Bool, Bool]:
        each, shape = np.asarray(seen), (len(q), cache.length)
        return select_candidates(self.index_scores(q, weights, cache, each), shape, each, top_k, block, blocks)

    def index_scores(self, q: Float32, weights: Float32, cache: IndexCache, seen: Integers) -> Scored:
        """Of all queries, some at a time: see numpy_latent."""
        return index_scores(q, weights, cache, seen)

    def select_blocks(
        self, q: Float32, k: Float32, cache: IndexCache, block: int, top_k: int, local: int
    ) -> tuple[Bool, IndexCache]:
        extended = cache.extended(k)
        return select_blocks(q, extended, lambda q: self.index_dots(q, extended), block, top_k, local), extended

    def index_dots(self, q: Float32, cache: IndexCache) -> Float32:
        """q [n, H, d] . every key: [n, H, length]."""
        dots: Float32 = q @ cache.keys[: cache.length].T
        return dots

    def block_tokens(self, chosen: Bool, position: int, block: int) -> Bool:
        tokens = len(chosen)
        after = (position + 1 + np.arange(tokens)) // block * block  # where the first block begins that is not whole
        selection = np.arange(position + tokens) >= after[:, None]
        selection[:, : block * chosen.shape[1]] |= np.repeat(chosen, block, axis=1)
        return selection

    # ---- gated DeltaNet

    def zeros(self, shape: tuple[int, ...]) -> Float32:
        return np.zeros(shape, np.float32)

    def new_delta_state(self, num_heads: int, key_dim: int, value_dim: int) -> State:
        return np.zeros((num_heads, key_dim, value_dim), np.float32)

    def causal_conv1d(
        self, x: Float32, weight: Weight, state: Float32, dilation: int = 1, bias: Weight | None = None
    ) -> tuple[Float32, Float32]:
        taps = weight.decode()  # [C, K]
        padded = np.concatenate([state, x])  # [(K - 1) * dilation + T, C]
        y = np.zeros_like(x)
        for j in range(taps.shape[1]):
            y += taps[:, j] * padded[j * dilation : j * dilation + len(x)]
        if bias is not None:
            y += bias.vector()
        return y, padded[len(x) :].copy()

    def gated_delta_rule(
        self, q: Float32, k: Float32, v: Float32, log_decay: Float32, beta: Float32 | None, state: State
    ) -> tuple[Float32, State]:
        state = state.copy()  # [H, dk, dv]
        group = v.shape[1] // k.shape[1]  # value heads that share a key head
        q, k = np.repeat(q, group, axis=1), np.repeat(k, group, axis=1)
        output = np.empty_like(v)
        decay = np.exp(log_decay)
        for t in range(len(q)):
            state *= decay[t].reshape(decay.shape[1], -1, 1)
            update = v[t]
            if beta is not None:
                known = (k[t, :, None, :] @ state)[:, 0]  # what the state holds for this key: [H, dv]
                update = (update - known) * beta[t, :, None]
            state += k[t, :, :, None] * update[:, None, :]
            output[t] = (q[t, :, None, :] @ state)[:, 0]
        return output, state


def _rows(table: EmbeddingRows, numbers: AnyArray) -> Float32:
    """Rows [n, columns] of an embedding; each is read once."""
    layout = table.layout
    if len(numbers) == 1:  # of every step of one sequence
        return layout.encoding.decode(layout.views(table.read(numbers.tolist())))
    distinct, places = np.unique(numbers, return_inverse=True)
    return layout.encoding.decode(layout.views(table.read(distinct.tolist())))[places]


@lru_cache(maxsize=ROPE_TABLES)  # all layers of a step ask for the same
def rope_tables(rope: Rope, position: int, tokens: int) -> tuple[Float32, Float32]:
    """cos and sin of the angles of tokens from position on, made in float64: [T, dim / 2] each."""
    angles = np.arange(position, position + tokens)[:, None] * rope.inv_freq
    cos, sin = np.cos(angles) * rope.attention_factor, np.sin(angles) * rope.attention_factor
    return cos.astype(np.float32), sin.astype(np.float32)
