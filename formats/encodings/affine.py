"""Affine group quantization in MLX's packing: value = code * scale + bias for a group along the input axis.

Bit for bit what `mlx.core.quantize` gives (tests/fixtures/affine.npz): codes are packed little-endian into
uint32, element j of a word in bits j*bits and up; scales and biases are rounded to scale_dtype after the
codes are chosen.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from formats.dtypes import AnyArray, Float32, from_float32, to_float32
from formats.encodings.base import GROUP_SIZES, SCALE_DTYPES, ArraySpec, codes_spec, num_groups, one_of
from formats.encodings.packing import pack_codes, unpack_codes
from formats.fields import Fields

BITS = (2, 3, 4, 5, 6, 8)


@dataclass(frozen=True)
class Affine:
    """Encoding id `affine` (FORMAT.md, Encodings)."""

    bits: int
    group_size: int
    scale_dtype: str
    id: str = "affine"

    @classmethod
    def read(cls, fields: Fields) -> "Affine":
        """Raises FormatError for a parameter that is not in the tables above."""
        return cls(
            one_of(fields, "bits", BITS),
            one_of(fields, "group_size", GROUP_SIZES),
            one_of(fields, "scale_dtype", SCALE_DTYPES),
        )

    def parameters(self) -> dict[str, Any]:
        return {"bits": self.bits, "group_size": self.group_size, "scale_dtype": self.scale_dtype}

    def arrays(self, rows: int, columns: int) -> tuple[ArraySpec, ...]:
        groups = (rows, num_groups(columns, self.group_size))
        return (
            codes_spec(rows, columns, self.bits),
            ArraySpec("scales", self.scale_dtype, groups),
            ArraySpec("biases", self.scale_dtype, groups),
        )

    def encode(self, values: Float32) -> dict[str, AnyArray]:
        rows, columns = values.shape
        self.arrays(rows, columns)
        x = values.reshape(rows, columns // self.group_size, self.group_size)  # [rows, groups, group_size]
        levels = np.float32(2**self.bits - 1)
        starts = np.arange(0, values.size, self.group_size)
        flat = values.reshape(-1)  # reduceat over it is twice as fast as min over an axis of x
        low = np.minimum.reduceat(flat, starts).reshape(rows, -1)  # [rows, groups]
        high = np.maximum.reduceat(flat, starts).reshape(rows, -1)
        # The edge that is larger in magnitude is met exactly, and zero lies on the grid.
        low_edge = np.abs(low) > np.abs(high)
        scale = np.maximum((high - low) / levels, np.float32(1e-7))
        scale = np.where(low_edge, scale, -scale)
        edge = np.where(low_edge, low, high)
        code_of_edge = np.rint(edge / scale)
        on_grid = code_of_edge != 0
        scale = np.divide(edge, code_of_edge, out=scale, where=on_grid)
        bias = np.where(on_grid, edge, np.float32(0))
        codes = x - bias[..., None]
        codes /= scale[..., None]
        np.rint(codes, out=codes)
        np.clip(codes, 0, levels, out=codes)
        return {
            "codes": pack_codes(codes.astype(np.uint8).reshape(rows, columns), self.bits),
            "scales": from_float32(scale, self.scale_dtype),
            "biases": from_float32(bias, self.scale_dtype),
        }

    def decode(self, arrays: Mapping[str, AnyArray]) -> Float32:
        codes = unpack_codes(arrays["codes"], self.bits)  # [rows, columns]
        rows, columns = codes.shape
        values = codes.astype(np.float32).reshape(rows, columns // self.group_size, self.group_size)
        values *= to_float32(arrays["scales"], self.scale_dtype)[..., None]
        values += to_float32(arrays["biases"], self.scale_dtype)[..., None]
        return values.reshape(rows, columns)
