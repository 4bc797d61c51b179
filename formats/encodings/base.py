"""What every weight encoding offers.

An encoding says how a matrix [rows, columns] (columns is the input axis) is stored as named arrays. Every
array's first axis is rows, so any block of rows is the same slice of each array, and a matrix can be encoded
row block by row block.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

from formats.dtypes import AnyArray, Float32, storage_dtype


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

    def parameters(self) -> dict[str, Any]:
        """The parameters in the index, all of them explicit."""

    def arrays(self, rows: int, columns: int) -> tuple[ArraySpec, ...]:
        """The arrays of a matrix [rows, columns]. Raises FormatError when the columns do not fit."""

    def encode(self, values: Float32) -> dict[str, AnyArray]:
        """float32 [rows, columns] -> the named arrays; values must be finite."""

    def decode(self, arrays: Mapping[str, AnyArray]) -> Float32:
        """The named arrays -> float32 [rows, columns]."""
