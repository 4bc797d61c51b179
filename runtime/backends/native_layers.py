"""A layer for one token as one native call: its experts, and the next one up to the choice of its own.

What stands between two calls is Python with empty caches, 40 to 60 us however short it is (docs/LEARNED.md 72).
composed.py is the definition, and does all else.
"""

import array
import ctypes
from abc import abstractmethod
from collections.abc import Callable, Sequence
from functools import cache
from itertools import chain, pairwise
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from formats.config import SIGMOID, SILU
from formats.dtypes import AnyArray, Float32
from runtime.backends import abi, native
from runtime.backends.facts import Attention, Block, DeltaNet, Part, Routed, Shared, State, Wanted
from runtime.backends.native_compressed import NativeCompressedOps
from runtime.backends.native_pairs import ByExpert, pairs_of_one
from runtime.backends.native_rows import MAPS, NativeRowOps, placed_tables
from runtime.backends.native_run import Run
from runtime.backends.native_states import DeltaState, NativeCache
from runtime.backends.native_weights import Told, require_size
from runtime.backends.numpy_ops import NumpyOps, Weight
from runtime.cache import Held

Words: TypeAlias = "array.array[int]"


class Tools(NamedTuple):
    """What runs are written with."""

    told: Told
    base: int  # address of resident memory
    precision: int
    between: Callable[[str, int], Float32]  # room for what one call of a run leaves for another, for all runs

    def linear(self, run: Run, x: Any, y: Any, weights: tuple[Weight, ...], biases: tuple[Weight, ...] | None) -> int:
        """Write down products of one token."""
        matrices = self.told.factors(weights, biases).matrices
        return run.add("se_linear", self.precision, matrices, len(weights), self.base, x, 1, y)


class AttentionCalls:
    """`self_attention` of one layer, from x to y, in a run."""

    def __init__(self, tools: Tools, run: Run, own: Attention, cache: NativeCache, x: Float32, y: Float32) -> None:
        told, memory = tools.told, cache.memory
        heads, key_heads, d, e = own.heads, own.key_heads, memory.width, memory.value_width
        of_query = 2 * d if own.gated else d
        for weight, rows in zip(own.projections, (heads * of_query, key_heads * d, key_heads * e), strict=True):
            require_size(weight, "rows", weight.rows, rows)
        require_size(own.output, "columns", own.output.columns, heads * (d if own.gated else e))
        projected = tools.between("projected", heads * of_query + key_heads * (d + e))
        q, k, v = np.split(projected, (heads * of_query, heads * of_query + key_heads * d))
        o = tools.between("output", heads * e)
        tools.linear(run, x, projected, own.projections, own.biases)
        if own.gated:  # per head: query, then gate
            queries, gate = tools.between("queries", heads * d), tools.between("gate", heads * d)
            run.add("copy", q, heads, d, of_query, queries)
            run.add("copy", q[d:], heads, d, of_query, gate)
            q = queries
        self._turn, self._rope, window = turn_of(told, own, d), own.rope, own.window or 0
        sinks = told.place(own.sinks, heads) if own.sinks is not None else None
        self._memory = run.add(
            "se_attention", None, 0, q, k, v, 1, heads, own.scale, window, sinks, None, self._turn, None, o
        )
        if own.gated:
            run.add("se_gate", MAPS[SIGMOID], o, gate, heads * d, o)
        tools.linear(run, o, y, (own.output,), (own.output_bias,) if own.output_bias is not None else None)

    def tell(self, words: Words, position: int, cache: NativeCache) -> NativeCache:
        """Of a token at that position; returns the cache with it."""
        if self._turn is not None:
            assert self._rope is not None
            self._turn.cosine, self._turn.sine, _ = placed_tables(self._rope, position, 1)
        memory, arrays, length, first, window = cache.with_room(1)
        words[self._memory], words[self._memory + 1] = ctypes.addressof(memory), length - first
        return NativeCache(memory, arrays, length + 1, first, window)


class DeltaCalls:
    """`delta_net` of one layer, from x to y, in a run."""

    def __init__(
        self, tools: Tools, run: Run, own: DeltaNet, state: tuple[Float32, DeltaState], x: Float32, y: Float32
    ) -> None:
        told, keys, values, heads = tools.told, own.key_heads * own.key_dim, own.heads * own.value_dim, own.heads
        channels = 2 * keys + values
        for weight, rows in zip(own.projections, (channels, values, heads, heads), strict=True):
            require_size(weight, "rows", weight.rows, rows)
        require_size(own.output, "columns", own.output.columns, values)
        projected = tools.between("projected", channels + values + 2 * heads)
        qkv, z, b, a = np.split(projected, (channels, channels + values, channels + values + heads))
        mixed, o = tools.between("mixed", channels), tools.between("output", values)
        q, k, v = np.split(mixed, (keys, 2 * keys))
        beta, decay = tools.between("beta", heads), tools.between("decay", heads)
        taps = told.taps(own.conv, 1, channels)
        require_size(own.conv, "places", len(taps), 1 + len(state[0]))
        tools.linear(run, x, projected, own.projections, None)
        run.add("se_map", MAPS[SIGMOID], b, heads, beta)
        run.add("se_decay", a, told.place(own.dt_bias, heads), told.repeated(own.a_log, heads), 1, heads, decay)
        self._convolution = run.add("se_causal_conv1d", qkv, taps, None, 1, channels, len(taps), mixed, None) + 2
        run.add("se_map", MAPS[SILU], mixed, channels, mixed)
        run.add("se_l2_norm", q, own.key_heads, own.key_dim, own.qk_eps, own.key_dim**-0.5, q)
        run.add("se_l2_norm", k, own.key_heads, own.key_dim, own.qk_eps, 1.0, k)
        shape = abi.DeltaShape(heads, own.key_heads, own.key_dim, own.value_dim, False)
        self._recurrent = run.add("se_delta_rule", shape, q, k, v, decay, beta, 1, None, None, o) + 7
        run.add("se_rms_norm", o, heads, own.value_dim, told.place(own.norm, own.value_dim), own.eps, o)
        run.add("se_gate", MAPS[own.gate], o, z, values, o)
        tools.linear(run, o, y, (own.output,), None)

    def tell(self, words: Words, position: int, state: tuple[Float32, DeltaState]) -> tuple[Float32, DeltaState]:
        """Of a token; returns the states after it."""
        before, (now, after) = state
        inputs = np.empty(before.shape, np.float32)
        words[self._convolution], words[self._convolution + 5] = place_of(before), place_of(inputs)
        words[self._recurrent], words[self._recurrent + 1] = place_of(now), place_of(after)
        return inputs, DeltaState(after, now)


class ExpertsRun:
    """`routed_experts` of one layer."""

    def __init__(
        self, tools: Tools, layout: abi.ExpertLayout, reader: int, routed: Routed, shared: Shared | None
    ) -> None:
        run, columns, k = Run(), routed.x.shape[1], routed.expert_ids.shape[1]
        for rows in (layout.gate.columns, layout.down.rows):
            assert rows == columns
        self._shared = self._gate = None
        self.y = tools.between("experts", columns).reshape(1, -1)
        z, weight = tools.between("shared", columns), tools.between("weight", 1)
        if shared is not None:
            everyone = abi.Expert(tools.base, pairs_of_one(1)[1], 1)
            dense = tools.told.feed_forward(*shared)
            self._shared = run.add("se_experts", tools.precision, dense, everyone, 1, None, None, 1, 1, z) + 4
            if routed.further:
                self._gate = run.add("se_map", MAPS[SIGMOID], None, 1, weight) + 1
        outputs = tools.between("outputs", k * columns)
        self._arriving = 3 + run.add(
            "se_experts_streamed", reader, tools.precision, layout, None, None, k, None, None, 1, k, outputs, self.y
        )
        if shared is not None:
            run.add("add_scaled", z, weight if routed.further else np.ones(1, np.float32), columns, self.y)
        self._run, self.calls = run, run.calls

    def tell(self, routed: Routed, arriving: Words, pairs: AnyArray) -> None:
        """Of a token; all of this must live until the calls are made."""
        words, at, x = self._run.words, self._arriving, place_of(routed.x)
        if self._shared is not None:
            words[self._shared] = x
        if self._gate is not None:
            words[self._gate] = place_of(routed.further[0])
        words[at], words[at + 1] = arriving.buffer_info()[0], place_of(pairs)
        words[at + 3], words[at + 4] = x, place_of(routed.routing_weights)


class Promise(NamedTuple):
    """What the experts of a layer give one token, when it is asked for: with what follows it, in one call."""

    run: ExpertsRun
    wave: list[Held]
    told: tuple[Any, ...]  # what the run points to


class BlockRun:
    """`mix_and_route` of one layer."""

    def __init__(self, tools: Tools, own: Block, state: Any) -> None:
        told, run, router = tools.told, Run(), own.router
        columns = own.input_norm.rows * own.input_norm.columns
        norms = [told.place(norm, columns, own.offset) for norm in (own.input_norm, own.post_norm)]
        factors = told.factors(router.matrices, router.biases)
        for weight in (own.mixer.projections[0], router.matrices[0]):
            require_size(weight, "columns", weight.columns, columns)
        require_size(own.mixer.output, "rows", own.mixer.output.rows, columns)
        total, x, y = (tools.between(name, columns) for name in ("total", "x", "y"))
        self._in = run.add("se_add_norm", None, None, own.multiplier, 1, columns, norms[0], own.eps, total, x)
        self._mixer: AttentionCalls | DeltaCalls
        if isinstance(own.mixer, Attention):
            self._mixer = AttentionCalls(tools, run, own.mixer, state, x, y)
        else:
            self._mixer = DeltaCalls(tools, run, own.mixer, state, x, y)
        self._out = run.add("se_add_norm", total, y, own.multiplier, 1, columns, norms[1], own.eps, None, None) + 7
        products = tools.between("products", factors.ends[-1])
        self._router = tools.linear(run, None, products, router.matrices, router.biases) + 4
        correction = told.place(router.correction, factors.ends[0]) if router.correction is not None else None
        how = told.routing(factors.ends[0], router.routing, False)
        self._chosen = run.add("se_route", how, products, correction, 1, None, None) + 4
        self._columns, self._top_k = columns, router.routing.top_k
        self._further = [products[None, a:b] for a, b in pairwise(factors.ends)]  # until the next layer routes
        self._run, self.calls = run, run.calls

    def tell(self, h: Float32, y: Float32, part: Part) -> tuple[Float32, Routed, State]:
        """Of a token: what there will be when the calls were made."""
        words, at = self._run.words, self._out
        total, x = np.empty((1, self._columns), np.float32), np.empty((1, self._columns), np.float32)
        ids, weights = np.empty((1, self._top_k), np.int64), np.empty((1, self._top_k), np.float32)
        words[self._in], words[self._in + 1] = place_of(h), place_of(y)
        words[at], words[at + 1] = place_of(total), place_of(x)
        words[self._router] = words[at + 1]
        words[self._chosen], words[self._chosen + 1] = place_of(ids), place_of(weights)
        state = self._mixer.tell(words, part.position, part.state)
        return total, Routed(x, ids, weights, self._further), state


class NativeLayerOps(NativeRowOps, NativeCompressedOps, NumpyOps):
    """A part of NativeOps."""

    _context: native.Context
    _tools: Tools
    _blocks: dict[Weight, BlockRun]  # by the norm that each begins with
    _layers: dict[int, ExpertsRun]
    _record_layouts: dict[int, abi.ExpertLayout]

    @abstractmethod
    def _chosen(self, layer: int, expert_ids: AnyArray) -> ByExpert: ...

    def routed_experts(self, layer: int, routed: Routed, shared: Shared | None = None) -> Any:
        if len(routed.x) == 1:
            places, pairs = self._chosen(layer, routed.expert_ids)
            wave = self._experts.whole(layer, list(places))
            if wave is not None:
                return self._promise(layer, routed, shared, wave, ByExpert(places, pairs))
        return super().routed_experts(layer, routed, shared)

    def _promise(
        self, layer: int, routed: Routed, shared: Shared | None, wave: list[Held], chosen: ByExpert
    ) -> Promise:
        run = self._layers.get(layer)
        if run is None:
            reader = self._experts.native
            assert reader is not None
            layout = self._record_layouts[layer]
            run = self._layers[layer] = ExpertsRun(self._tools, layout, reader.handle, routed, shared)
        arriving = array.array("q", chain.from_iterable((slot, *chosen.places[key.expert]) for key, slot in wave))
        run.tell(routed, arriving, chosen.pairs)
        return Promise(run, wave, (routed, arriving, chosen.pairs))

    def _keep(self, promise: Promise, *following: tuple[int, int]) -> None:
        """Compute what was promised, and what follows it."""
        try:
            self._context.run(promise.run.calls, *following)
        except native.ReadFailedError:
            assert self._experts.native is not None
            for key, slot in promise.wave:
                self._experts.native.check(key, slot)
            raise
        self._experts.finish()

    def _settled(self, y: Float32 | Promise) -> Float32:
        if not isinstance(y, Promise):
            return y
        self._keep(y)
        return y.run.y

    def add_norm(
        self,
        h: Float32,
        y: Float32 | Promise,
        weight: Weight,
        eps: float,
        *,
        offset: float = 0.0,
        multiplier: float = 1.0,
    ) -> tuple[Float32, Float32]:
        return super().add_norm(h, self._settled(y), weight, eps, offset=offset, multiplier=multiplier)

    def mix_and_route(
        self, h: Float32, y: Float32 | Promise, own: Block, parts: Sequence[Part], wanted: Wanted = None
    ) -> tuple[Float32, Routed, list[State]]:
        if len(h) != 1 or not is_usual(own):
            return super().mix_and_route(h, self._settled(y), own, parts, wanted)
        (part,) = parts
        run = self._blocks.get(own.input_norm)
        if run is None:
            run = self._blocks[own.input_norm] = BlockRun(self._tools, own, part.state)
        if isinstance(y, Promise):
            total, routed, state = run.tell(h, y.run.y, part)
            self._keep(y, run.calls)
        else:
            total, routed, state = run.tell(h, y, part)
            self._context.run(run.calls)
        return total, routed, [state]


def is_usual(own: Block) -> bool:
    """Whether its projections give what kernels take, in that order."""
    mixer = own.mixer
    return isinstance(mixer, Attention) or not (mixer.grouped_qkvz or mixer.grouped_ba or mixer.tiled)


def turn_of(told: Told, own: Attention, width: int) -> abi.Turn | None:
    """Without the tables of a position, which come with each token."""
    if own.rope is None:
        return None
    norms = (own.q_norm, own.k_norm)
    q_norm, k_norm = (told.place(norm, width, own.offset) if norm is not None else None for norm in norms)
    return abi.Turn(q_norm, k_norm, None, None, own.rope.dim // 2, own.rope.interleaved, own.eps)


def place_of(values: AnyArray) -> int:
    """The address of a contiguous array."""
    return ctypes.addressof(native.address(values))


def shared_memory() -> Callable[[str, int], Float32]:
    """Arrays by what they are for and their length, each made once."""
    return cache(lambda _, length: np.empty(length, np.float32))
