"""Layers for one token as one native call, up to a layer whose experts are not all held; it ends with the last layer.

What stands between two calls is Python with empty caches, 40 to 60 us however short it is (docs/LEARNED.md 72, 80).
composed.py is the definition, and does all else.
"""

import array
import ctypes
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from functools import cache
from itertools import pairwise
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from formats.config import SIGMOID, SILU
from formats.dtypes import AnyArray, Float32
from runtime.backends import abi, native
from runtime.backends.facts import Attention, Block, DeltaNet, Routed, Shared, Stack, State, Wanted
from runtime.backends.native_compressed import NativeCompressedOps
from runtime.backends.native_rows import MAPS, NativeRowOps, placed_tables
from runtime.backends.native_run import Run
from runtime.backends.native_states import DeltaState, NativeCache
from runtime.backends.native_weights import Told, require_size
from runtime.backends.numpy_ops import NumpyOps, Weight
from runtime.cache import Held
from runtime.session import Sequence as StepSequence

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
        for values, norm in zip((q, k), own.whole_norms or (), strict=False):
            run.add("se_rms_norm", values, 1, len(values), told.place(norm, len(values)), own.eps, values)
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
        channels, in_group = 2 * keys + values, heads // own.key_heads
        every = [channels + values] if own.grouped_qkvz else [channels, values]
        every += [2 * heads] if own.grouped_ba else [heads, heads]
        for weight, rows in zip(own.projections, every, strict=True):
            require_size(weight, "rows", weight.rows, rows)
        require_size(own.output, "columns", own.output.columns, values)
        projected = tools.between("projected", channels + values + 2 * heads)
        tools.linear(run, x, projected, own.projections, None)
        ends = (channels, channels + values, channels + values + heads)
        qkv, z, b, a = np.split(projected, ends)
        if own.grouped_qkvz:
            widths = (own.key_dim, own.key_dim, in_group * own.value_dim, in_group * own.value_dim)
            together, (qkv, z) = projected, np.split(tools.between("qkvz", channels + values), [channels])
            ungroup(run, together, own.key_heads, widths, (*np.split(qkv, (keys, 2 * keys)), z))
        if own.grouped_ba:
            together, (b, a) = projected[channels + values :], np.split(tools.between("ba", 2 * heads), 2)
            ungroup(run, together, own.key_heads, (in_group, in_group), (b, a))
        mixed, o = tools.between("mixed", channels), tools.between("output", values)
        q, k, v = np.split(mixed, (keys, 2 * keys))
        beta, decay = tools.between("beta", heads), tools.between("decay", heads)
        taps = told.taps(own.conv, 1, channels)
        require_size(own.conv, "places", len(taps), 1 + len(state[0]))
        run.add("se_map", MAPS[SIGMOID], b, heads, beta)
        run.add("se_decay", a, told.place(own.dt_bias, heads), told.repeated(own.a_log, heads), 1, heads, decay)
        self._convolution = run.add("se_causal_conv1d", qkv, taps, None, 1, channels, len(taps), mixed, None) + 2
        run.add("se_map", MAPS[SILU], mixed, channels, mixed)
        run.add("se_l2_norm", q, own.key_heads, own.key_dim, own.qk_eps, own.key_dim**-0.5, q)
        run.add("se_l2_norm", k, own.key_heads, own.key_dim, own.qk_eps, 1.0, k)
        key_heads = own.key_heads
        if own.tiled:  # all key heads again and again, until each value head has its own
            key_heads, tiles = heads, np.split(tools.between("tiles", 2 * in_group * keys), 2)
            for heads_once, tiled in zip((q, k), tiles, strict=True):
                run.add("copy", heads_once, in_group, keys, 0, tiled)
            q, k = tiles
        shape = abi.DeltaShape(heads, key_heads, own.key_dim, own.value_dim, False)
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


def ungroup(run: Run, grouped: Float32, heads: int, widths: Sequence[int], kinds: Sequence[Float32]) -> None:
    """What lies head by head, each with some values of every kind, becomes arrays of one kind."""
    start = 0
    for width, kind in zip(widths, kinds, strict=True):
        run.add("copy", grouped[start:], heads, width, sum(widths), kind)
        start += width


class Records(NamedTuple):
    """Where the experts of a layer are."""

    layout: abi.ExpertLayout
    reader: int
    slots: AnyArray  # int64 [num_experts], -1 for those that are not held


def add_block(
    tools: Tools, run: Run, own: Block, state: Any, h: Float32, y: Float32, routed: Routed
) -> AttentionCalls | DeltaCalls:
    """Write down `mix_and_route`, from h and y to h and routed; returns what is to be told of each token."""
    told, router, columns = tools.told, own.router, own.input_norm.rows * own.input_norm.columns
    norms = [told.place(norm, columns, own.offset) for norm in (own.input_norm, own.post_norm)]
    for weight in (own.mixer.projections[0], router.matrices[0]):
        require_size(weight, "columns", weight.columns, columns)
    require_size(own.mixer.output, "rows", own.mixer.output.rows, columns)
    total, x, mixed = (tools.between(name, columns) for name in ("total", "x", "y"))
    run.add("se_add_norm", h, y, own.multiplier, 1, columns, norms[0], own.eps, total, x)
    mixer: AttentionCalls | DeltaCalls
    if isinstance(own.mixer, Attention):
        mixer = AttentionCalls(tools, run, own.mixer, state, x, mixed)
    else:
        mixer = DeltaCalls(tools, run, own.mixer, state, x, mixed)
    run.add("se_add_norm", total, mixed, own.multiplier, 1, columns, norms[1], own.eps, h, routed.x)
    ends = told.factors(router.matrices, router.biases).ends
    products = tools.between("products", ends[-1])
    tools.linear(run, routed.x, products, router.matrices, router.biases)
    correction = told.place(router.correction, ends[0]) if router.correction is not None else None
    how = told.routing(ends[0], router.routing, False)
    run.add("se_route", how, products, correction, 1, routed.expert_ids, routed.routing_weights)
    return mixer


def add_experts(tools: Tools, run: Run, records: Records, routed: Routed, shared: Shared | None, y: Float32) -> int:
    """Write down `routed_experts` of one token; returns the first call, which may find that one has no slot."""
    layout, reader, slots = records
    columns, k = routed.x.shape[1], routed.expert_ids.shape[1]
    for rows in (layout.up.columns, layout.down.rows):
        assert rows == columns
    arriving, pairs = np.zeros((k, 3), np.int64), np.arange(k)
    first = len(run)
    run.add("find", slots, len(slots), routed.expert_ids, k, arriving)
    z, share = tools.between("shared", columns), np.ones(1, np.float32)
    if shared is not None:
        everyone = abi.Expert(tools.base, place_of(run.keep(np.zeros(1, np.int64))), 1)
        dense = tools.told.feed_forward(*shared)
        run.add("se_experts", tools.precision, dense, everyone, 1, routed.x, None, 1, 1, None, z)
        if routed.further:
            run.add("se_map", MAPS[SIGMOID], routed.further[0], 1, share)
    outputs = tools.between("outputs", k * columns)
    run.add(
        "se_experts_streamed", reader, tools.precision, layout, arriving, pairs, k, routed.x, routed.routing_weights,
        1, k, None, outputs, y,
    )  # fmt: skip
    if shared is not None:
        run.add("add_scaled", z, share, columns, y)
    return first


class StackRun:
    """Layers of one token: h and y before, then after them."""

    def __init__(
        self,
        context: native.Context,
        tools: Tools,
        stack: Stack,
        states: Sequence[State],
        records: Sequence[Records],
    ) -> None:
        """states and records: of its layers."""
        self._context, self._run, self._first = context, Run(), stack.first
        self._mixers, self.begins, self.finds = [], [], []
        self.routed: list[Routed] = []
        for own, state, place in zip(stack.layers, states, records, strict=True):
            block = own.block
            ends = tools.told.factors(block.router.matrices, block.router.biases).ends
            require_size(block.router.matrices[0], "rows", ends[0], len(place.slots))
            columns, k = block.input_norm.rows * block.input_norm.columns, block.router.routing.top_k
            products = tools.between("products", ends[-1])[None]
            self.h, self.y, x = (tools.between(name, columns)[None] for name in ("h", "experts", "asked"))
            routed = Routed(
                x, np.empty((1, k), np.int64), tools.between("weights", k)[None],
                [products[:, a:b] for a, b in pairwise(ends)],
            )  # fmt: skip
            self.begins.append(len(self._run))  # calls, of which each layer's block, and its experts, is the first
            self._mixers.append(add_block(tools, self._run, block, state, self.h, self.y, routed))
            self.finds.append(add_experts(tools, self._run, place, routed, own.shared, self.y))
            self.routed.append(routed)
        for calls in (self.begins, self.finds):
            calls.append(len(self._run))

    def tell(self, h: Float32, y: Float32, sequence: StepSequence) -> None:
        """Of a token; replaces the states."""
        self.h[:], self.y[:] = h, y
        words, position, states = self._run.words, sequence.position, sequence.states
        for layer, mixer in enumerate(self._mixers, self._first):
            states[layer] = mixer.tell(words, position, states[layer])

    def make(self, begin: int, end: int) -> int:
        """Calls from one up to another, or until an expert has no slot; returns the layer whose experts are next."""
        return bisect_left(self.finds, begin + self._context.run(self._run.call(begin), end - begin))


class NativeLayerOps(NativeRowOps, NativeCompressedOps, NumpyOps):
    """A part of NativeOps."""

    _context: native.Context
    _tools: Tools
    _stacks: dict[Weight, StackRun]  # by the norm that each begins with
    _record_layouts: dict[int, abi.ExpertLayout]

    def layers(
        self, h: Float32, y: Float32, stack: Stack, sequences: Sequence[StepSequence], wanted: Wanted = None
    ) -> tuple[Float32, Float32]:
        if len(h) != 1:
            return super().layers(h, y, stack, sequences, wanted)
        (sequence,) = sequences
        run = self.written(stack, sequence.states)
        run.tell(h, y, sequence)
        layer = self._go_on(run, stack.first, run.begins[0], None)
        while layer < len(stack.layers):
            own, routed = stack.layers[layer], run.routed[layer]
            self.fetch_routed(stack.first + layer, routed, own.following)
            wave = self._experts.whole(stack.first + layer, routed.expert_ids[0])
            if wave is None:  # they do not fit into the cache together
                run.y[:] = super().routed_experts(stack.first + layer, routed, own.shared)
            at = run.begins[layer + 1] if wave is None else run.finds[layer]
            layer = self._go_on(run, stack.first, at, wave)
        return run.h, run.y

    def written(self, stack: Stack, states: Sequence[State]) -> StackRun:
        """The calls of a stack; states of any sequence tell of their shapes."""
        key = stack.layers[0].block.input_norm
        run = self._stacks.get(key)
        if run is None:
            numbers = range(stack.first, stack.first + len(stack.layers))
            own_states = states[stack.first :][: len(numbers)]
            records = [self._records(layer) for layer in numbers]
            run = self._stacks[key] = StackRun(self._context, self._tools, stack, own_states, records)
        return run

    def _records(self, layer: int) -> Records:
        reader, slots_of, layout = self._experts.native, self._experts.slots_of, self._layout.layers[layer]
        assert reader is not None
        assert slots_of is not None
        assert layout is not None
        return Records(self._record_layouts[layer], reader.handle, slots_of[layer, : layout.num_experts])

    def _go_on(self, run: StackRun, first: int, begin: int, wave: list[Held] | None) -> int:
        """Compute, the experts of `wave` first, up to a layer that must ask for its own; returns which that is."""
        following = bisect_right(run.finds, begin)  # the layer that asks next
        end = run.finds[-1]
        if self._experts.guessed or self._experts.lookahead.asks(1):  # each must, whether its experts are held or not
            end = run.finds[min(following, len(run.routed))]
        try:
            layer = run.make(begin, end)
        except native.ReadFailedError:
            assert self._experts.native is not None
            for key, slot in wave or ():
                self._experts.native.check(key, slot)
            raise
        if wave is not None:
            assert layer >= following, "experts that are leased have no slot"
            self._experts.finish()
        passed = [sorted(routed.expert_ids[0].tolist()) for routed in run.routed[following:layer]]
        self._experts.passed(first + following, passed)
        return layer


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
