"""Integers times a scale, without a stored bias: symmetric, and with a zero point per group.

symmetric carries compressed-tensors INT4, symmetric GPTQ and ggml's Q4_0 and Q8_0; zero_point GPTQ and AWQ.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from formats.dtypes import AnyArray, Float32, to_float32
from formats.encodings.base import (
    GROUP_SIZES,
    SCALE_DTYPES,
    ArraySpec,
    codes_spec,
    num_groups_or_one,
    one_of,
    read_group_size,
)
from formats.encodings.packing import unpack_codes
from formats.errors import FormatError
from formats.fields import Fields


@dataclass(frozen=True)
class Symmetric:
    """Encoding id `symmetric` (FORMAT.md, Encodings): value = (code - 2 ** (bits - 1)) * scale."""

    bits: int
    group_size: int
    scale_dtype: str
    id: str = "symmetric"

    @classmethod
    def read(cls, fields: Fields) -> "Symmetric":
        return cls(
            one_of(fields, "bits", (4, 5, 8)), read_group_size(fields), one_of(fields, "scale_dtype", SCALE_DTYPES)
        )

    def parameters(self) -> dict[str, Any]:
        return {"bits": self.bits, "group_size": self.group_size, "scale_dtype": self.scale_dtype}

    def arrays(self, rows: int, columns: int) -> tuple[ArraySpec, ...]:
        groups = _num_groups(columns, self.group_size)
        return codes_spec(rows, columns, self.bits), ArraySpec("scales", self.scale_dtype, (rows, groups))

    def decode(self, arrays: Mapping[str, AnyArray]) -> Float32:
        codes = unpack_codes(arrays["codes"], self.bits)  # [rows, columns]
        scales = to_float32(arrays["scales"], self.scale_dtype)  # [rows, groups]
        values = codes.astype(np.float32)
        values -= np.float32(1 << (self.bits - 1))
        return _scaled(values, scales)


@dataclass(frozen=True)
class ZeroPoint:
    """Encoding id `zero_point` (FORMAT.md, Encodings): value = (code - zero) * scale."""

    bits: int
    group_size: int
    scale_dtype: str
    id: str = "zero_point"

    @classmethod
    def read(cls, fields: Fields) -> "ZeroPoint":
        return cls(
            one_of(fields, "bits", (2, 3, 4, 8)), read_group_size(fields), one_of(fields, "scale_dtype", SCALE_DTYPES)
        )

    def parameters(self) -> dict[str, Any]:
        return {"bits": self.bits, "group_size": self.group_size, "scale_dtype": self.scale_dtype}

    def arrays(self, rows: int, columns: int) -> tuple[ArraySpec, ...]:
        groups = (rows, _num_groups(columns, self.group_size))
        return (
            codes_spec(rows, columns, self.bits),
            ArraySpec("scales", self.scale_dtype, groups),
            ArraySpec("zeros", "u8", groups),
        )

    def decode(self, arrays: Mapping[str, AnyArray]) -> Float32:
        codes = unpack_codes(arrays["codes"], self.bits).astype(np.float32)  # [rows, columns]
        zeros = arrays["zeros"].astype(np.float32)  # [rows, groups]
        rows, columns = codes.shape
        values = codes.reshape(rows, zeros.shape[1], -1) - zeros[..., None]
        return _scaled(values.reshape(rows, columns), to_float32(arrays["scales"], self.scale_dtype))


def _num_groups(columns: int, group_size: int) -> int:
    """Groups of a row. Raises FormatError for widths that no kernel reads."""
    groups = num_groups_or_one(columns, group_size)
    if columns % GROUP_SIZES[0]:
        raise FormatError(f"input width {columns} is not a multiple of {GROUP_SIZES[0]}")
    return groups


def _scaled(values: Float32, scales: Float32) -> Float32:
    """values [rows, columns], in place, times the scale [rows, groups] of their group."""
    groups = values.reshape(*scales.shape, -1)
    groups *= scales[..., None]
    return groups.reshape(values.shape)
