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
from formats.encodings.base import ArraySpec
from formats.errors import FormatError
from formats.fields import Fields

BITS = (4, 8)
GROUP_SIZES = (32, 64, 128)
SCALE_DTYPES = ("bf16", "f16")


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
        bits, group_size = fields.integer("bits"), fields.integer("group_size")
        scale_dtype = fields.string("scale_dtype")
        for key, value, known in (
            ("bits", bits, BITS),
            ("group_size", group_size, GROUP_SIZES),
            ("scale_dtype", scale_dtype, SCALE_DTYPES),
        ):
            if value not in known:
                raise fields.wrong(key, f"one of {', '.join(map(str, known))}")
        return cls(bits, group_size, scale_dtype)

    def parameters(self) -> dict[str, Any]:
        return {"bits": self.bits, "group_size": self.group_size, "scale_dtype": self.scale_dtype}

    def arrays(self, rows: int, columns: int) -> tuple[ArraySpec, ...]:
        if columns % self.group_size:
            fitting = [str(size) for size in GROUP_SIZES if columns % size == 0]
            raise FormatError(
                f"input width {columns} is not a multiple of group_size {self.group_size}, "
                f"expected a group_size of {' or '.join(fitting) or 'none: no supported size fits'}"
            )
        groups = (rows, columns // self.group_size)
        return (
            ArraySpec("codes", "u32", (rows, columns * self.bits // 32)),
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
            "codes": self._pack(codes.astype(np.uint8).reshape(rows, columns)),
            "scales": from_float32(scale, self.scale_dtype),
            "biases": from_float32(bias, self.scale_dtype),
        }

    def decode(self, arrays: Mapping[str, AnyArray]) -> Float32:
        codes = self.unpack(arrays["codes"])  # [rows, columns]
        rows, columns = codes.shape
        values = codes.astype(np.float32).reshape(rows, columns // self.group_size, self.group_size)
        values *= to_float32(arrays["scales"], self.scale_dtype)[..., None]
        values += to_float32(arrays["biases"], self.scale_dtype)[..., None]
        return values.reshape(rows, columns)

    def _pack(self, codes: AnyArray) -> AnyArray:
        """uint8 codes [rows, columns] -> uint32 words [rows, columns * bits / 32]."""
        if self.bits == 4:
            pairs = codes.view("<u2")  # low byte: even column; high byte: odd column
            codes = (pairs | (pairs >> 4)).astype(np.uint8)
        return codes.view("<u4")

    def unpack(self, words: AnyArray) -> AnyArray:
        """uint32 words [rows, columns * bits / 32] -> uint8 codes [rows, columns]."""
        packed = np.ascontiguousarray(words).view(np.uint8)
        if self.bits == 8:
            return packed
        codes = np.empty((packed.shape[0], packed.shape[1] * 2), np.uint8)
        np.bitwise_and(packed, 15, out=codes[:, 0::2])
        np.right_shift(packed, 4, out=codes[:, 1::2])
        return codes
