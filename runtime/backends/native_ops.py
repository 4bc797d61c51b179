"""The native backend: the reference with its hot operations done by the kernels of runtime/native."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import numpy as np

from formats.config import Activation
from formats.dtypes import AnyArray, Float32
from formats.errors import FormatError
from formats.kernels import matrix as matrix_of
from formats.layout import Layout
from formats.window import LANES, forgets, in_lanes, room
from runtime.backends import abi, native
from runtime.backends.facts import Beside, ScaledNorm, State, Turn
from runtime.backends.native import address
from runtime.backends.native_layers import NativeLayerOps, Tools, shared_memory
from runtime.backends.native_pairs import ByExpert, by_expert, pairs_of_one
from runtime.backends.native_rows import placed_tables
from runtime.backends.native_states import DeltaState, NativeCache, new_cache
from runtime.backends.native_weights import (
    NativeWeight,
    Told,
    native_activation,
    require_shapes,
    require_size,
    with_result,
)
from runtime.backends.numpy_compressed import visible
from runtime.backends.numpy_latent import Bool
from runtime.backends.numpy_ops import Weight
from runtime.experts import Experts
from runtime.store import EmbeddingRows


class NativeOps(NativeLayerOps):
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
        chunk_size: int,
        *,
        threads: int,
        precision: str,
        level: str | None = None,
        ngrams: EmbeddingRows | None = None,
    ) -> None:
        """Raises UnsupportedError without the library, or for an encoding or level that it does not have."""
        super().__init__(layout, resident, embedding, experts, pool, ctx_size, chunk_size, ngrams)
        self._resident, self._base = resident, resident.ctypes.data
        for tensor in layout.resident:
            weight = self._weights[tensor.name]
            offsets = {array.name: tensor.offset + array.offset for array in tensor.arrays}
            matrix = matrix_of(weight.encoding, weight.rows, weight.columns, offsets)
            self._weights[tensor.name] = NativeWeight(
                weight.encoding, weight.arrays, weight.rows, weight.columns, tensor.name, matrix
            )
        self._record_layouts = {
            i: native.expert_layout(layer.record, native_activation(layout.model.routed_activation(i)))
            for i, layer in layout.moe_layers()
        }
        self._told = Told(layout.model.expert_activation)
        self._fetched: tuple[AnyArray, ByExpert] | None = None
        self._outputs = np.empty(0, np.float32)
        self._context = native.Context(threads, precision, level)
        self._call = self._context.call
        self._tools = Tools(self._told, self._base, self._context.precision, shared_memory())
        self._stacks = {}
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
        return self.linears(x, (weight,), None if bias is None else (bias,))[0]

    def linears(self, x: Float32, weights: Sequence[Weight], biases: Sequence[Weight] | None = None) -> list[Float32]:
        factors = self._told.factors(tuple(weights), tuple(biases) if biases is not None else None)
        return self._context.linears(factors, self._base, x)

    def feed_forward(
        self, x: Float32, gate: Weight | None, up: Weight, down: Weight, activation: Activation | None = None
    ) -> Float32:
        """As an expert whose record is the resident memory and which all tokens chose."""
        layout = self._told.feed_forward(gate, up, down, activation)
        x, y = with_result(x)
        pairs, first = pairs_of_one(len(x))
        self._context.feed_forward(layout, abi.Expert(self._base, first, len(pairs)), x, y)
        return y

    def fetch(self, layer: int, expert_ids: AnyArray) -> None:
        chosen = by_expert(expert_ids, self._num_experts(layer))
        self._fetched = expert_ids, chosen
        self._experts.begin(layer, list(chosen.places))

    def _num_experts(self, layer: int) -> int:
        layout = self._layout.layers[layer]
        assert layout is not None
        return layout.num_experts

    def _chosen(self, layer: int, expert_ids: AnyArray) -> ByExpert:
        """Of what was fetched, or is now."""
        if self._fetched is None or self._fetched[0] is not expert_ids:
            self.fetch(layer, expert_ids)
        assert self._fetched is not None
        return self._fetched[1]

    def look_ahead(self, layer: int, route: Callable[[], AnyArray]) -> None:
        lookahead = self._experts.lookahead
        layout = self._layout.layers[layer] if layer < len(self._layout.layers) else None
        assert self._fetched is not None
        if layer == len(self._layout.layers) - 1 and len(self._fetched[0]) > 1:
            return  # of several tokens few may be wanted there
        if layout is None or not lookahead.asks(len(self._fetched[0])):
            return
        expert_ids = route()
        tokens, k = expert_ids.shape
        distinct = [expert for expert in np.unique(expert_ids).tolist() if expert < layout.num_experts]
        if lookahead.guesses(tokens, len(distinct) / layout.num_experts):
            self._experts.look_ahead(layer, distinct, most=k if tokens == 1 else layout.num_experts)

    def experts(
        self, layer: int, x: Float32, expert_ids: AnyArray, routing_weights: Float32, norm: ScaledNorm | None = None
    ) -> Float32:
        layout, reader = self._record_layouts[layer], self._experts.native
        assert reader is not None
        x = np.ascontiguousarray(x, np.float32)
        weights = np.ascontiguousarray(routing_weights, np.float32)
        outputs = self._outputs_of(expert_ids.size, x.shape[1])
        y = np.empty_like(x)
        told = None if norm is None else self._told.expert_norm(norm, x.shape[1])
        places, pairs, idle = self._chosen(layer, expert_ids)
        if idle:
            unread = np.greater_equal(expert_ids, self._num_experts(layer))
            np.copyto(outputs.reshape(*expert_ids.shape, -1), x[:, None], where=unread[..., None])
        left = len(places)
        with closing(self._experts.waves(layer, list(places))) as waves:
            for wave in waves:
                left -= len(wave)
                arriving = [(slot, *places[key.expert]) for key, slot in wave]
                last = y if left == 0 else None
                try:
                    self._context.experts_streamed(
                        layout, reader.handle, arriving, pairs, x, weights, outputs, last, told
                    )
                except native.ReadFailedError:
                    for key, slot in wave:
                        reader.check(key, slot)
                    raise
        return y if places else self._context.weighted_sum(outputs, weights)

    def _outputs_of(self, pairs: int, columns: int) -> Float32:
        """Room for what experts give each pair: [T * k, D], the same for all layers.

        New memory in each would be cleared by the kernel, 32 MiB at a time (docs/LEARNED.md 76).
        """
        if self._outputs.size < pairs * columns:
            self._outputs = np.empty(pairs * columns, np.float32)
        return self._outputs[: pairs * columns].reshape(pairs, columns)

    # ---- attention

    def new_kv_cache(
        self,
        num_heads: int,
        head_dim: int,
        window: int | None = None,
        max_tokens: int | None = None,
        value_dim: int | None = None,
    ) -> State:
        if window is not None and forgets(window, self._ctx_size, self._chunk_size):
            return new_cache(num_heads, head_dim, value_dim or head_dim, room(window, 0))._replace(window=window)
        tokens = min(max_tokens or self._ctx_size, self._ctx_size)
        return new_cache(num_heads, head_dim, value_dim or head_dim, in_lanes(tokens))

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
        q, k, v = np.ascontiguousarray(q), np.ascontiguousarray(k), np.ascontiguousarray(v)
        tokens, heads, width = q.shape
        cache = cache.with_room(tokens)
        memory = cache.memory
        require_shapes(
            "attention",
            (q, (tokens, heads, memory.width)),
            (k, (tokens, memory.heads, width)),
            (v, (tokens, memory.heads, memory.value_width)),
        )
        y = np.empty((tokens, heads, v.shape[2]), np.float32)
        further = None
        if beside is not None and beside.entries.length > 0:
            seen = visible(beside)  # kept until the call ends
            further = beside.entries.seen_by(seen, beside.selection is not None)
        self._call(
            "se_attention", cache.memory, cache.length - cache.first, address(q), address(k), address(v), tokens, heads,
            scale, window or 0, self._told.place(sinks, heads) if sinks is not None else None,
            address(np.ascontiguousarray(selection)) if selection is not None else None,
            self._turn(turn, tokens, q.shape[2]) if turn is not None else None,
            further, address(y),
        )  # fmt: skip
        return y, NativeCache(cache.memory, cache.arrays, cache.length + tokens, cache.first, cache.window)

    def _turn(self, turn: Turn, tokens: int, width: int) -> abi.Turn:
        """As kernels take it; all that it points to is kept by a cache."""
        cos, sin, _ = placed_tables(turn.rope, turn.position, tokens)
        q_norm, k_norm = (
            self._told.place(norm, width, turn.offset) if norm is not None else None
            for norm in (turn.q_norm, turn.k_norm)
        )
        return abi.Turn(q_norm, k_norm, cos, sin, turn.rope.dim // 2, turn.rope.interleaved, turn.eps)

    # ---- gated DeltaNet

    def causal_conv1d(
        self, x: Float32, weight: Weight, state: Float32, dilation: int = 1, bias: Weight | None = None
    ) -> tuple[Float32, Float32]:
        x, y = with_result(x)
        taps, after = self._told.taps(weight, dilation, x.shape[1]), np.empty_like(state)
        require_size(weight, "places", len(taps), 1 + len(state))
        require_shapes("convolution", (state, (len(state), x.shape[1])))
        sizes = (*x.shape, len(taps))
        self._call("se_causal_conv1d", address(x), address(taps), address(state), *sizes, address(y), address(after))
        if bias is not None:
            y += self._told.vector(bias)
        return y, after

    def new_delta_state(self, num_heads: int, key_dim: int, value_dim: int) -> State:
        shape = (num_heads, in_lanes(value_dim) // LANES, key_dim, LANES)
        return DeltaState(np.zeros(shape, np.float32), np.zeros(shape, np.float32))

    def gated_delta_rule(
        self, q: Float32, k: Float32, v: Float32, log_decay: Float32, beta: Float32 | None, state: State
    ) -> tuple[Float32, State]:
        v, y = with_result(v)
        (tokens, heads, value_dim), (key_heads, key_dim) = v.shape, k.shape[1:]
        if heads % key_heads:
            raise FormatError(f"delta rule: has {heads} heads, config.json asks for a multiple of {key_heads}")
        by_channel = log_decay.ndim == 3
        require_shapes(
            "delta rule",
            (q, (tokens, key_heads, key_dim)),
            (k, (tokens, key_heads, key_dim)),
            (log_decay, (tokens, heads, key_dim) if by_channel else (tokens, heads)),
            *(((beta, (tokens, heads)),) if beta is not None else ()),
            (state.now, (heads, in_lanes(value_dim) // LANES, key_dim, LANES)),
        )
        shape = abi.DeltaShape(heads, key_heads, key_dim, value_dim, by_channel)
        arrays = [None if array is None else np.ascontiguousarray(array) for array in (q, k, v, log_decay, beta)]
        inputs = [None if array is None else address(array) for array in arrays]
        self._call("se_delta_rule", shape, *inputs, tokens, address(state.now), address(state.next), address(y))
        return y, DeltaState(state.next, state.now)

    def close(self) -> None:
        """End the kernels' threads."""
        self._context.close()
