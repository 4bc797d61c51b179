"""One expert's record: the parts gate, up and down, each of arrays at fixed offsets (FORMAT.md, Record)."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from formats.dtypes import AnyArray, Float32, storage_dtype, to_float32
from formats.encodings import ArraySpec, Encoding

PAGE_BYTES = 16_384  # Apple Silicon's page; 4,096 divides it
ARRAY_ALIGNMENT = 64
PART_NAMES = ("gate", "up", "down")
LINEAR_BIAS = "linear_bias"


class PlacedArray(NamedTuple):
    """An array of an encoding, or a projection bias, at a byte offset in its record, tensor or row."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        return ArraySpec(self.name, self.dtype, self.shape).nbytes

    def view(self, buffer: AnyArray, first: int = 0) -> AnyArray:
        """The array inside a uint8 buffer whose byte `first` is byte 0 of the record; no copy."""
        start = first + self.offset
        return buffer[start : start + self.nbytes].view(storage_dtype(self.dtype)).reshape(self.shape)


@dataclass(frozen=True)
class PartSpec:
    """What a part holds, before it has a place: a matrix [rows, columns] and perhaps a bias [rows]."""

    name: str
    rows: int
    columns: int
    encoding: Encoding
    linear_bias: str | None = None  # the dtype of the bias


@dataclass(frozen=True)
class Part(PartSpec):
    """A matrix of an expert and where its arrays lie in the record."""

    arrays: tuple[PlacedArray, ...] = ()

    def views(self, buffer: AnyArray, first: int = 0) -> dict[str, AnyArray]:
        """The arrays of the part by name, as views into a uint8 buffer with the record at byte `first`."""
        return {array.name: array.view(buffer, first) for array in self.arrays}


@dataclass(frozen=True)
class RecordLayout:
    """The places of all arrays of one expert; the same for every expert of a layer."""

    record_bytes: int
    parts: tuple[Part, ...]

    @property
    def payload_bytes(self) -> int:
        """Bytes that mean something; the rest is padding, zero."""
        return sum(array.nbytes for part in self.parts for array in part.arrays)

    @property
    def num_weights(self) -> int:
        return sum(part.rows * part.columns for part in self.parts)


def align(offset: int, alignment: int) -> int:
    """The next multiple of alignment that is not below offset."""
    return -(-offset // alignment) * alignment


def place(specs: Iterable[ArraySpec], start: int = 0, alignment: int = ARRAY_ALIGNMENT) -> tuple[PlacedArray, ...]:
    """Put arrays one after another, each on a multiple of alignment at or after start."""
    placed = []
    for spec in specs:
        start = align(start, alignment)
        placed.append(PlacedArray(*spec, start))
        start += spec.nbytes
    return tuple(placed)


def lay_out_record(specs: Iterable[PartSpec]) -> RecordLayout:
    """Place the parts in the order given. Raises FormatError when an encoding does not fit a matrix."""
    parts: list[Part] = []
    end = 0
    for spec in specs:
        arrays = list(spec.encoding.arrays(spec.rows, spec.columns))
        if spec.linear_bias is not None:
            arrays.append(ArraySpec(LINEAR_BIAS, spec.linear_bias, (spec.rows,)))
        placed = place(arrays, end)
        end = placed[-1].offset + placed[-1].nbytes
        parts.append(Part(spec.name, spec.rows, spec.columns, spec.encoding, spec.linear_bias, placed))
    return RecordLayout(align(end, PAGE_BYTES), tuple(parts))


def decode_part(part: Part, record: AnyArray) -> tuple[Float32, Float32 | None]:
    """uint8 record -> float32 matrix [rows, columns] and bias [rows] or None: the readable definition."""
    arrays: Mapping[str, AnyArray] = part.views(record)
    bias = None
    if part.linear_bias is not None:
        bias = to_float32(arrays[LINEAR_BIAS], part.linear_bias)
    return part.encoding.decode(arrays), bias


def padding_ranges(arrays: Iterable[PlacedArray], total: int) -> list[tuple[int, int]]:
    """The (start, stop) byte ranges of a record or tensor that no array covers and that must be zero."""
    ranges, end = [], 0
    for array in sorted(arrays, key=lambda placed: placed.offset):
        if array.offset > end:
            ranges.append((end, array.offset))
        end = array.offset + array.nbytes
    if total > end:
        ranges.append((end, total))
    return ranges


def is_zero(buffer: AnyArray) -> bool:
    """Whether every byte is zero."""
    return not np.any(buffer)
