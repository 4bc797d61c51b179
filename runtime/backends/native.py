"""Calls of the native kernels: a context of threads, and arrays as it takes them."""

import array
import ctypes
from collections.abc import Sequence
from concurrent.futures import CancelledError
from ctypes import byref, c_int64, c_void_p
from itertools import accumulate, chain
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np

from formats.dtypes import AnyArray, Float32
from formats.errors import UnsupportedError
from formats.kernels import PRECISIONS, Matrix, matrix
from formats.record import Part, RecordLayout
from runtime.backends.abi import (
    MISSED,
    READ_FAILED,
    STOPPED,
    Activation,
    Expert,
    ExpertLayout,
    ExpertNorm,
    load_library,
)

SPIN_US = 50  # an idle thread stays awake this long: the next call of a step often follows sooner

_STATUS = {1: "out of memory for scratch", 2: "a matrix that no kernel implements", 3: "two calls at once"}
_ADDRESS = ctypes.c_char * 0


def address(array: Any) -> ctypes.Array[ctypes.c_char]:
    """What a c_void_p argument takes: four times as fast as array.ctypes, and only for a contiguous array."""
    return _ADDRESS.from_buffer(array)


def expert_layout(layout: RecordLayout, activation: Activation) -> ExpertLayout:
    """The records of a layer. Raises UnsupportedError for an encoding without a kernel."""

    def part_matrix(part: Part) -> Matrix:
        offsets = {array.name: array.offset for array in part.arrays}
        return matrix(part.encoding, part.rows, part.columns, offsets, part.linear_bias)

    *gate, up, down = (part_matrix(part) for part in layout.parts)
    return ExpertLayout(gate[0] if gate else Matrix(), up, down, activation)


class Chosen(NamedTuple):
    """An expert of a call: its record, uint8 [record_bytes], and the pairs that chose it, int64 [n]."""

    record: AnyArray
    pairs: AnyArray


class Factors(NamedTuple):
    """Matrices of the same columns in one memory that are multiplied by one input: se_linear's, told once."""

    matrices: ctypes.Array[Matrix]
    columns: int
    ends: tuple[int, ...]  # where each one's rows end among those of all

    @classmethod
    def of(cls, matrices: Sequence[Matrix]) -> "Factors":
        (columns,) = {matrix.columns for matrix in matrices}
        return cls((Matrix * len(matrices))(*matrices), columns, tuple(accumulate(matrix.rows for matrix in matrices)))


class ReadFailedError(Exception):
    """A slot holds no record: its reader knows why."""


def levels() -> tuple[str, ...]:
    """Instruction sets that the library can use on this machine, best first; none without a library."""
    library = load_library()
    return tuple(library.se_levels().decode().split()) if library is not None else ()


class Context:
    """Threads and scratch memory for the kernels of one instruction set. One call at a time; close it."""

    def __init__(self, threads: int, precision: str, level: str | None = None, spin_us: int = SPIN_US) -> None:
        """Raises UnsupportedError without a library, or for a level that this machine cannot run."""
        library = load_library()
        if library is None:
            raise UnsupportedError("the native kernels were not built, expected libse_native beside runtime/native")
        if level is not None and level not in levels():
            raise UnsupportedError(f"instruction set is {level}, expected one of {', '.join(levels())}")
        self._library = library
        self.precision = PRECISIONS[precision]
        self._handle = library.se_open(level.encode() if level else None, threads, spin_us)
        if not self._handle:
            raise UnsupportedError(f"{threads} threads cannot be started")
        self.level: str = library.se_level(self._handle).decode()

    @property
    def scratch_bytes(self) -> int:
        """Scratch memory held between calls."""
        return int(self._library.se_scratch_bytes(self._handle))

    @property
    def kernel_s(self) -> float:
        """Seconds spent inside calls so far."""
        return int(self._library.se_kernel_ns(self._handle)) / 1e9 if self._handle else 0.0

    def dispatch(self) -> None:
        """Wake all threads and wait for them: the price of a call."""
        _check(self._library.se_dispatch(self._handle))

    def call(self, name: str, *arguments: object) -> None:
        """A function of se_native.h that is no product; arrays as `address`."""
        _check(getattr(self._library, name)(self._handle, *arguments))

    def run(self, calls: int, count: int) -> int:
        """Calls that were written down (native_run.py), from that address on; how many were made.

        Fewer than asked where an expert has no slot. Raises ReadFailedError when a slot holds no record,
        CancelledError when the reader was stopped.
        """
        done = c_int64()
        status = self._library.se_run(self._handle, calls, count, byref(done))
        if status != MISSED:
            _check(status)
        return done.value

    def linear(self, matrix: Matrix, base: int, x: Float32) -> Float32:
        """As `linears` with one matrix."""
        return self.linears(Factors.of([matrix]), base, x)[0]

    def linears(self, factors: Factors, base: int, x: Float32) -> list[Float32]:
        """x [T, columns] by each of the matrices in the memory that begins at address base: [T, rows] each."""
        x = np.ascontiguousarray(x, np.float32)
        tokens, columns = x.shape
        assert columns == factors.columns
        matrices, _, ends = factors
        every = np.empty(tokens * ends[-1], np.float32)
        status = self._library.se_linear(
            self._handle, self.precision, matrices, len(ends), base, address(x), tokens, address(every)
        )
        _check(status)
        if len(ends) == 1:
            return [every.reshape(tokens, -1)]
        results, start = [], 0
        for end in ends:
            results.append(every[tokens * start : tokens * end].reshape(tokens, end - start))
            start = end
        return results

    def experts(
        self,
        layout: ExpertLayout,
        chosen: Sequence[Chosen],
        x: Float32,
        weights: Float32,
        outputs: Float32,
        norm: ExpertNorm | None = None,
    ) -> None:
        """For every pair of the chosen experts: outputs[pair] = norm(expert(x[pair // k])).

        x [T, D], weights [T, k] and outputs [T * k, D] are contiguous float32.
        """
        tokens, k = weights.shape
        assert all(array.flags.c_contiguous for array in (x, weights, outputs))
        assert x.shape == (tokens, layout.up.columns)
        assert outputs.shape == (tokens * k, layout.down.rows)
        experts = (Expert * len(chosen))(
            *(Expert(record.ctypes.data, pairs.ctypes.data, len(pairs)) for record, pairs in chosen)
        )
        self.call(
            "se_experts", self.precision, layout, experts, len(chosen),
            address(x), address(weights), tokens, k, norm, address(outputs),
        )  # fmt: skip

    def feed_forward(self, layout: ExpertLayout, everyone: Expert, x: Float32, y: Float32) -> None:
        """As `experts`, of one that every token chose and whose inputs nothing scales: y = expert(x), both [T, D]."""
        assert x.shape == (everyone.num_pairs, layout.up.columns)
        assert y.shape == (everyone.num_pairs, layout.down.rows)
        self.call("se_experts", self.precision, layout, everyone, 1, address(x), None, len(x), 1, None, address(y))

    def experts_streamed(
        self,
        layout: ExpertLayout,
        reader: int,
        arriving: Sequence[tuple[int, int, int]],
        pairs: AnyArray,
        x: Float32,
        weights: Float32,
        outputs: Float32,
        y: Float32 | None,
        norm: ExpertNorm | None = None,
    ) -> None:
        """As `experts`, on slots of a reader (native_reader.py) whose reads may be under way, each as it arrives.

        arriving: the slot of each expert, and where in pairs, int64 [T * k], those that chose it begin and how
        many they are. y [T, D], given with the last experts: the sum over k of weights times outputs, or of outputs
        alone where weights scale the inputs.
        Raises ReadFailedError when a slot holds no record, CancelledError when the reader was stopped.
        """
        tokens, k = weights.shape
        assert x.shape == (tokens, layout.up.columns)
        assert outputs.shape == (tokens * k, layout.down.rows)
        told = array.array("q", chain.from_iterable(arriving))
        status = self._library.se_experts_streamed(
            self._handle, reader, self.precision, layout, address(told), address(pairs), len(arriving),
            address(x), address(weights), tokens, k, norm, address(outputs),
            address(y) if y is not None else None,
        )  # fmt: skip
        _check(status)

    def weighted_sum(self, outputs: Float32, weights: Float32) -> Float32:
        """Sum over k, in that order, of weights [T, k] times outputs [T * k, D]: [T, D]."""
        tokens, k = weights.shape
        y = np.empty((tokens, outputs.shape[1]), np.float32)
        status = self._library.se_weighted_sum(
            self._handle, address(outputs), address(weights), tokens, k, outputs.shape[1], address(y)
        )
        _check(status)
        return y

    def read(self, loop: int, pieces: Sequence[AnyArray]) -> None:
        """Read all bytes of pieces of equal size and drop them; loop is one of range(READ_LOOPS)."""
        addresses = (c_void_p * len(pieces))(*(piece.ctypes.data for piece in pieces))
        _check(self._library.se_read(self._handle, loop, addresses, len(pieces), pieces[0].nbytes))

    def close(self) -> None:
        """End the threads; a second time does nothing."""
        handle, self._handle = self._handle, None
        self._library.se_close(handle)

    def __enter__(self) -> "Context":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _check(status: int) -> None:
    if status == READ_FAILED:
        raise ReadFailedError
    if status == STOPPED:
        raise CancelledError
    if status == 1:
        raise MemoryError(_STATUS[status])
    if status != 0:
        raise UnsupportedError(f"native kernel: {_STATUS[status]}")
