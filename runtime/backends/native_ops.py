"""The native backend: the reference with its hot operations done by the kernels of runtime/native."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass

import numpy as np

from formats.budget import SCORES_BYTES
from formats.config import CHOSEN_SIGMOID, GELU_TANH, SIGMOID, SILU, SOFTMAX, SWIGLU_CLAMPED, Rope
from formats.dtypes import AnyArray, Float32
from formats.encodings import Plain
from formats.errors import UnsupportedError
from formats.kernels import Matrix
from formats.kernels import matrix as matrix_of
from formats.layout import Layout
from formats.window import forgets, room
from runtime.backends import native
from runtime.backends.base import Routing, State, Turn
from runtime.backends.native import address
from runtime.backends.native_states import DeltaState, NativeCache, new_cache
from runtime.backends.numpy_latent import Bool, IndexCache, choose_tokens
from runtime.backends.numpy_ops import NumpyOps, Weight, rope_tables
from runtime.experts import Experts
from runtime.store import EmbeddingRows

SCORING = {
    SOFTMAX: native.SCORE_SOFTMAX,
    SIGMOID: native.SCORE_SIGMOID,
    CHOSEN_SIGMOID: native.SCORE_CHOSEN_SIGMOID,
}
ACTIVATION_KINDS = {SILU: native.SILU, SWIGLU_CLAMPED: native.SWIGLU_CLAMPED, GELU_TANH: native.GELU_TANH}


@dataclass(frozen=True)
class NativeWeight(Weight):
    """A resident matrix that kernels can read where it lies: offsets count from the start of resident memory."""

    matrix: Matrix


class NativeOps(NumpyOps):
    """Ops on native kernels. Results do not depend on threads, chunks, cache or on sequences that share a step."""

    name = "native"

    def __init__(
        self,
        layout: Layout,
        resident: AnyArray,
        embedding: EmbeddingRows,
        experts: Experts,
        pool: ThreadPoolExecutor,
        ctx_size: int,
        *,
        threads: int,
        precision: str,
        level: str | None = None,
    ) -> None:
        """Raises UnsupportedError without the library, or for an encoding or level that it does not have."""
        super().__init__(layout, resident, embedding, experts, pool, ctx_size)
        self._resident, self._base = resident, resident.ctypes.data
        for tensor in layout.resident:
            weight = self._weights[tensor.name]
            offsets = {array.name: tensor.offset + array.offset for array in tensor.arrays}
            matrix = matrix_of(weight.encoding, weight.rows, weight.columns, offsets)
            self._weights[tensor.name] = NativeWeight(
                weight.encoding, weight.arrays, weight.rows, weight.columns, matrix
            )
        kind, alpha, limit, scale_input = layout.model.expert_activation
        activation = native.Activation(ACTIVATION_KINDS[kind], alpha, limit, scale_input)
        self._dense_activation = native.Activation(ACTIVATION_KINDS[kind], alpha, limit, False)
        self._record_layouts = {i: native.expert_layout(layer.record, activation) for i, layer in layout.moe_layers()}
        self._prepared: dict[tuple[int, float], Float32] = {}  # small weights as floats, by place and offset
        self._context = native.Context(threads, precision, level)
        self._call = self._context.call
        self.level = self._context.level
        self.threads = threads
        self.precision = precision

    @property
    def description(self) -> str:
        return f"{self.name} ({self.level}, {self.precision})"

    @property
    def kernel_s(self) -> float:
        """Seconds spent in native calls so far; waiting for reads is no part of them."""
        return self._context.kernel_s

    def linear(self, x: Float32, weight: Weight, bias: Weight | None = None) -> Float32:
        return self.linears(x, [weight], None if bias is None else [bias])[0]

    def linears(self, x: Float32, weights: Sequence[Weight], biases: Sequence[Weight] | None = None) -> list[Float32]:
        results = self._context.linears([_native(weight).matrix for weight in weights], self._base, x)
        if biases is None:
            return results
        return [y + self._vector(bias) for y, bias in zip(results, biases, strict=True)]

    def feed_forward(self, x: Float32, gate: Weight, up: Weight, down: Weight) -> Float32:
        """As an expert whose record is the resident memory and which all tokens chose."""
        layout = native.ExpertLayout(*(_native(weight).matrix for weight in (gate, up, down)), self._dense_activation)
        x, y = _with_result(x)
        everyone = native.Chosen(self._resident, np.arange(len(x)))
        self._context.experts(layout, [everyone], x, np.empty((len(x), 1), np.float32), y)
        return y

    def fetch(self, layer: int, expert_ids: AnyArray) -> None:
        self._experts.begin(layer, by_expert(expert_ids)[0])

    def look_ahead(self, layer: int, route: Callable[[], AnyArray]) -> None:
        lookahead = self._experts.lookahead
        layout = self._layout.layers[layer] if layer < len(self._layout.layers) else None
        if layout is None or lookahead.decided is False:
            return
        expert_ids = route()
        tokens, k = expert_ids.shape
        distinct = np.unique(expert_ids).tolist()
        if lookahead.guesses(tokens, len(distinct) / layout.num_experts):
            self._experts.look_ahead(layer, distinct, most=k if tokens == 1 else layout.num_experts)

    def experts(self, layer: int, x: Float32, expert_ids: AnyArray, routing_weights: Float32) -> Float32:
        layout, reader = self._record_layouts[layer], self._experts.native
        assert reader is not None
        x = np.ascontiguousarray(x, np.float32)
        weights = np.ascontiguousarray(routing_weights, np.float32)
        outputs = np.empty((expert_ids.size, x.shape[1]), np.float32)  # [T * k, D]
        y = np.empty_like(x)
        distinct, starts, counts, pairs = by_expert(expert_ids)
        chosen_by = dict(zip(distinct, zip(starts.tolist(), counts.tolist(), strict=True), strict=True))
        left = len(distinct)
        with closing(self._experts.waves(layer, distinct)) as waves:
            for wave in waves:
                left -= len(wave)
                arriving = np.array([(slot, *chosen_by[key.expert]) for key, slot in wave])
                last = y if left == 0 else None
                try:
                    self._context.experts_streamed(layout, reader.handle, arriving, pairs, x, weights, outputs, last)
                except native.ReadFailedError:
                    for key, slot in wave:
                        reader.check(key, slot)
                    raise
        return y

    def _vector(self, weight: Weight, offset: float = 0.0) -> Float32:
        """offset + weight as float32, decoded once."""
        key = (_native(weight).matrix.weight_offset, offset)
        if key not in self._prepared:
            self._prepared[key] = np.float32(offset) + weight.vector()
        return self._prepared[key]

    def _repeated(self, weight: Weight, channels: int) -> Float32:
        """A vector's values, each for as many channels as it has."""
        key = (_native(weight).matrix.weight_offset, float(channels))
        if key not in self._prepared:
            values = weight.vector()
            self._prepared[key] = np.repeat(values, channels // len(values))
        return self._prepared[key]

    def _taps(self, weight: Weight) -> Float32:
        """A convolution's weights [C, K] as [K, C]."""
        key = (_native(weight).matrix.weight_offset, 0.0)
        if key not in self._prepared:
            self._prepared[key] = np.ascontiguousarray(weight.decode().T)
        return self._prepared[key]

    # ---- row by row

    def rms_norm(self, x: Float32, weight: Weight, eps: float, offset: float = 0.0) -> Float32:
        x, y = _with_result(x)
        columns = x.shape[-1]
        scale = address(self._vector(weight, offset))
        self._call("se_rms_norm", address(x), x.size // columns, columns, scale, eps, address(y))
        return y

    def add_norm(
        self, h: Float32, y: Float32, weight: Weight, eps: float, *, offset: float = 0.0, multiplier: float = 1.0
    ) -> tuple[Float32, Float32]:
        h, x = _with_result(h)
        y, total = _with_result(y)
        scale = address(self._vector(weight, offset))
        self._call("se_add_norm", address(h), address(y), multiplier, *h.shape, scale, eps, address(total), address(x))
        return total, x

    def l2_norm(self, x: Float32, eps: float) -> Float32:
        x, y = _with_result(x)
        columns = x.shape[-1]
        self._call("se_l2_norm", address(x), x.size // columns, columns, eps, address(y))
        return y

    def silu(self, x: Float32) -> Float32:
        x, y = _with_result(x)
        self._call("se_map", native.MAP_SILU, address(x), x.size, address(y))
        return y

    def sigmoid(self, x: Float32) -> Float32:
        x, y = _with_result(x)
        self._call("se_map", native.MAP_SIGMOID, address(x), x.size, address(y))
        return y

    def decay(self, a: Float32, dt_bias: Weight, a_log: Weight) -> Float32:
        a, y = _with_result(a)
        bias, log = address(self._vector(dt_bias)), address(self._repeated(a_log, a.shape[1]))
        self._call("se_decay", address(a), bias, log, *a.shape, address(y))
        return y

    def rope(self, x: Float32, position: int, rope: Rope) -> Float32:
        x, y = _with_result(x)
        cos, sin = rope_tables(rope, position, len(x))
        half, interleaved = rope.dim // 2, rope.interleaved
        self._call("se_rope", address(x), *x.shape, half, interleaved, address(cos), address(sin), address(y))
        return y

    def softcap(self, x: Float32, cap: float) -> Float32:
        y = self.sigmoid(x * np.float32(2 / cap))  # tanh(x) is 2 sigmoid(2x) - 1; NumPy's tanh depends on the machine
        y *= np.float32(2)
        y -= np.float32(1)
        y *= np.float32(cap)
        return y

    def route(
        self,
        logits: Float32,
        routing: Routing,
        correction_bias: Weight | None = None,
        expert_scale: Weight | None = None,
    ) -> tuple[AnyArray, Float32]:
        tokens, num_experts = logits.shape
        ids, weights = np.empty((tokens, routing.top_k), np.int64), np.empty((tokens, routing.top_k), np.float32)
        bias = address(self._vector(correction_bias)) if correction_bias is not None else None
        how = native.Routing(
            num_experts, routing.top_k, routing.n_group, routing.topk_group, SCORING[routing.scoring_func],
            routing.norm_topk_prob, routing.routed_scaling_factor, 0,
        )  # fmt: skip
        self._call("se_route", how, address(np.ascontiguousarray(logits)), bias, tokens, address(ids), address(weights))
        return ids, weights if expert_scale is None else weights * self._vector(expert_scale)[ids]

    # ---- attention

    def new_kv_cache(
        self,
        num_heads: int,
        head_dim: int,
        window: int | None = None,
        max_tokens: int | None = None,
        value_dim: int | None = None,
    ) -> State:
        if window is not None and forgets(window, self._ctx_size):
            return new_cache(num_heads, head_dim, value_dim or head_dim, room(window, 0))._replace(window=window)
        tokens = min(max_tokens or self._ctx_size, self._ctx_size)
        return new_cache(num_heads, head_dim, value_dim or head_dim, -(-tokens // native.LANES) * native.LANES)

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
    ) -> tuple[Float32, State]:
        q, k, v = (np.ascontiguousarray(x) for x in (q, k, v))
        tokens, heads, _ = q.shape
        y = np.empty((tokens, heads, v.shape[2]), np.float32)
        cache = cache.with_room(tokens)
        self._call(
            "se_attention", cache.memory, cache.length - cache.first, address(q), address(k), address(v), tokens, heads,
            scale, window or 0, address(self._vector(sinks)) if sinks is not None else None, None,
            self._turn(turn, tokens) if turn is not None else None, address(y),
        )  # fmt: skip
        return y, cache._replace(length=cache.length + tokens)

    def _turn(self, turn: Turn, tokens: int) -> native.Turn:
        """As kernels take it; all that it points to is kept by a cache."""
        norms = (
            self._vector(norm, turn.offset).ctypes.data if norm is not None else None
            for norm in (turn.q_norm, turn.k_norm)
        )
        cos, sin = rope_tables(turn.rope, turn.position, tokens)
        rope = turn.rope
        return native.Turn(*norms, cos.ctypes.data, sin.ctypes.data, rope.dim // 2, rope.interleaved, turn.eps)

    def new_latent_cache(self, kv_lora_rank: int, rope_dim: int) -> State:
        """Latents, then the key with position, as keys of one head whose first kv_lora_rank are the values."""
        if kv_lora_rank % native.LANES != 0:
            raise UnsupportedError(f"kv_lora_rank is {kv_lora_rank}, expected a multiple of {native.LANES}")
        capacity = -(-self._ctx_size // native.LANES) * native.LANES
        keys = np.empty((capacity, kv_lora_rank + rope_dim), np.float32)
        memory = native.KVCache(keys.ctypes.data, None, capacity, 1, kv_lora_rank + rope_dim, kv_lora_rank)
        return NativeCache(memory, (keys,), 0)

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
    ) -> tuple[Float32, State]:
        heads, n = q.shape[1:]
        if len(kv_b) == 1:
            absorbed = self.heads_product(q, kv_b[0], heads, slice(0, n), transposed=True)
            values = slice(n, kv_b[0].rows // heads)
        else:  # W_k transposed and W_v, each a matrix of its own
            absorbed = self.heads_product(q, kv_b[0], heads, slice(0, kv_b[0].rows // heads))
            values = slice(0, kv_b[1].rows // heads)
        queries = np.concatenate([absorbed, q_rope], axis=2)
        keys, mixed = np.concatenate([latent, k_rope], axis=1), np.empty_like(absorbed)
        self._call(
            "se_attention", cache.memory, cache.length, address(queries), address(keys), None, len(q), heads,
            scale, 0, None, address(np.ascontiguousarray(selection)) if selection is not None else None,
            None, address(mixed),
        )  # fmt: skip
        return self.heads_product(mixed, kv_b[-1], heads, values), cache._replace(length=cache.length + len(q))

    def heads_product(
        self, x: Float32, weight: Weight, heads: int, rows: slice, *, transposed: bool = False
    ) -> Float32:
        """Rows of each head of a matrix [heads * (rows per head), columns] times its own input [T, heads, ...]."""
        x = np.ascontiguousarray(x, np.float32)
        number = rows.stop - rows.start
        y = np.empty((len(x), heads, weight.columns if transposed else number), np.float32)
        which = native.Heads(heads, weight.rows // heads, rows.start, number)
        matrix = _native(weight).matrix
        self._call("se_heads_product", matrix, self._base, which, transposed, address(x), len(x), address(y))
        return y

    def select_tokens(
        self, q: Float32, k: Float32, weights: Float32, cache: IndexCache, top_k: int
    ) -> tuple[Bool, IndexCache]:
        """The keys are a matrix of float32, its rows the tokens so far."""
        cache = cache.extended(k)
        tokens, heads, d = q.shape
        seen = cache.length
        keys = matrix_of(Plain("f32"), seen, d, {"weight": 0})
        selection = np.zeros((tokens, seen), np.bool_)
        block = max(1, SCORES_BYTES // (4 * heads * seen))
        for first in range(0, tokens, block):
            part = np.ascontiguousarray(q[first : first + block])
            dots = np.empty((len(part), heads, seen), np.float32)
            self._call(
                "se_heads_product", keys, cache.keys.ctypes.data, native.Heads(1, seen, 0, seen), 0,
                address(part), len(part) * heads, address(dots),
            )  # fmt: skip
            np.maximum(dots, 0, out=dots)
            rows = slice(first, first + len(part))
            scores = np.add.reduce(dots * weights[rows, :, None], axis=1)  # [n, seen], head after head
            choose_tokens(scores, rows, seen - tokens, top_k, selection)
        return selection, cache

    # ---- gated DeltaNet

    def causal_conv1d(self, x: Float32, weight: Weight, state: Float32) -> tuple[Float32, Float32]:
        x, y = _with_result(x)
        taps, after = self._taps(weight), np.empty_like(state)
        sizes = (*x.shape, len(taps))
        self._call("se_causal_conv1d", address(x), address(taps), address(state), *sizes, address(y), address(after))
        return y, after

    def new_delta_state(self, num_heads: int, key_dim: int, value_dim: int) -> State:
        shape = (num_heads, -(-value_dim // native.LANES), key_dim, native.LANES)
        return DeltaState(np.zeros(shape, np.float32), np.zeros(shape, np.float32))

    def gated_delta_rule(
        self, q: Float32, k: Float32, v: Float32, log_decay: Float32, beta: Float32, state: State
    ) -> tuple[Float32, State]:
        v, y = _with_result(v)
        shape = native.DeltaShape(v.shape[1], k.shape[1], k.shape[2], v.shape[2], log_decay.ndim == 3)
        inputs = [address(np.ascontiguousarray(array)) for array in (q, k, v, log_decay, beta)]
        self._call("se_delta_rule", shape, *inputs, len(v), address(state.now), address(state.next), address(y))
        return y, DeltaState(state.next, state.now)

    def close(self) -> None:
        """End the kernels' threads."""
        self._context.close()


def _native(weight: Weight) -> NativeWeight:
    assert isinstance(weight, NativeWeight)
    return weight


def by_expert(expert_ids: AnyArray) -> tuple[list[int], AnyArray, AnyArray, AnyArray]:
    """Pairs (token * k + place) sorted by expert: distinct ids, ascending, their first places, their numbers, pairs."""
    flat = expert_ids.reshape(-1)
    pairs = np.argsort(flat, kind="stable")
    if len(expert_ids) == 1:  # a token's experts are distinct: no need to look for equals, at every layer of every step
        return flat[pairs].tolist(), np.arange(len(flat)), np.ones(len(flat), np.int64), pairs
    distinct, starts, counts = np.unique(flat[pairs], return_index=True, return_counts=True)
    return distinct.tolist(), starts, counts, pairs


def _with_result(x: Float32) -> tuple[Float32, Float32]:
    """x as kernels take it, and an array of its shape for what they make of it."""
    x = np.ascontiguousarray(x, np.float32)
    return x, np.empty(x.shape, np.float32)
