"""What every weight encoding offers.

An encoding says how a matrix [rows, columns] (columns is the input axis) is stored as named arrays. Every
array's first axis is rows, so any block of rows is the same slice of each array, and a matrix can be encoded
row block by row block.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeVar

from formats.dtypes import AnyArray, Float32, storage_dtype
from formats.errors import FormatError
from formats.fields import Fields

GROUP_SIZES = (32, 64, 128)
SCALE_DTYPES = ("bf16", "f16", "f32")


class ArraySpec(NamedTuple):
    """A named array that an encoding stores: its dtype (a name of formats.dtypes) and shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * storage_dtype(self.dtype).itemsize


class Encoding(Protocol):
    """How a matrix is stored. Implementations are frozen dataclasses, equal when id and parameters are."""

    @property
    def id(self) -> str:
        """The id in the index."""

    @property
    def bits(self) -> int:
        """Bits of a code; of the float itself where there are no codes."""

    def parameters(self) -> dict[str, Any]:
        """The parameters in the index, all of them explicit."""

    def arrays(self, rows: int, columns: int) -> tuple[ArraySpec, ...]:
        """The arrays of a matrix [rows, columns]. Raises FormatError when the columns do not fit."""

    def decode(self, arrays: Mapping[str, AnyArray]) -> Float32:
        """The named arrays -> float32 [rows, columns]."""


class Encoder(Encoding, Protocol):
    """An encoding that weights can be rounded to; the others only ever hold what arrived in them."""

    def encode(self, values: Float32) -> dict[str, AnyArray]:
        """float32 [rows, columns] -> the named arrays; values must be finite."""


# ---- what several encodings share


def one_of(fields: Fields, key: str, known: tuple[Any, ...]) -> Any:
    """An integer or string that must be one of those known. Raises FormatError."""
    value = fields.string(key) if isinstance(known[0], str) else fields.integer(key)
    if value not in known:
        raise fields.wrong(key, f"one of {', '.join(map(str, known))}")
    return value


_Kind = TypeVar("_Kind", bound="Parameterless")


@dataclass(frozen=True)
class Parameterless:
    """An encoding of which the id says everything."""

    id: str

    @classmethod
    def read(cls: type[_Kind], fields: Fields) -> _Kind:
        return cls(fields.string("id"))

    def parameters(self) -> dict[str, Any]:
        return {}


def read_group_size(fields: Fields) -> int:
    """A group size of an encoding that also allows one group per row, so whether it fits is seen with the matrix."""
    return fields.integer("group_size", 1, 1 << 31)


def num_groups(columns: int, group_size: int) -> int:
    """Groups of a row. Raises FormatError unless group_size divides the columns."""
    if columns % group_size:
        fitting = [str(size) for size in GROUP_SIZES if columns % size == 0]
        raise FormatError(
            f"input width {columns} is not a multiple of group_size {group_size}, "
            f"expected a group_size of {' or '.join(fitting) or 'none: no supported size fits'}"
        )
    return columns // group_size


def num_groups_or_one(columns: int, group_size: int, sizes: tuple[int, ...] = GROUP_SIZES) -> int:
    """Groups of a row where group_size is one of the sizes or the whole row. Raises FormatError for another."""
    if group_size == columns:
        return 1
    if group_size not in sizes:
        known = ", ".join(map(str, sizes))
        raise FormatError(f"group_size is {group_size}, expected {known} or the input width {columns}")
    return num_groups(columns, group_size)


def codes_spec(rows: int, columns: int, bits: int) -> ArraySpec:
    """The array of packed codes. Raises FormatError when a row does not fill its words."""
    if columns * bits % 32:
        multiple = 32 // math.gcd(32, bits)
        raise FormatError(f"input width {columns} is not a multiple of {multiple}, so {bits}-bit codes fill no words")
    return ArraySpec("codes", "u32", (rows, columns * bits // 32))
