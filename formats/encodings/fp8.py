"""FP8 (E4M3FN) with a scale per row, or per 128 or 32 of it; scales of 128 x 128 blocks are repeated for each row."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from formats.dtypes import AnyArray, Float32, to_float32
from formats.encodings.base import SCALE_DTYPES, ArraySpec, one_of, read_group_size
from formats.encodings.minifloat import E4M3FN
from formats.errors import FormatError
from formats.fields import Fields

BLOCK = 128
MX_BLOCK = 32  # of MXFP8


@dataclass(frozen=True)
class FP8:
    """Encoding id `fp8` (FORMAT.md, Encodings): value = E4M3[code] * scale."""

    group_size: int  # BLOCK, MX_BLOCK, or the columns: one scale per row
    scale_dtype: str
    id: str = "fp8"

    @classmethod
    def read(cls, fields: Fields) -> "FP8":
        return cls(read_group_size(fields), one_of(fields, "scale_dtype", SCALE_DTYPES))

    @property
    def bits(self) -> int:
        return 8

    def parameters(self) -> dict[str, Any]:
        return {"group_size": self.group_size, "scale_dtype": self.scale_dtype}

    def arrays(self, rows: int, columns: int) -> tuple[ArraySpec, ...]:
        if self.group_size not in (MX_BLOCK, BLOCK, columns):
            expected = f"{MX_BLOCK}, {BLOCK} or the input width {columns}"
            raise FormatError(f"group_size is {self.group_size}, expected {expected}")
        groups = -(-columns // self.group_size)  # the last may be shorter
        return ArraySpec("codes", "u8", (rows, columns)), ArraySpec("scales", self.scale_dtype, (rows, groups))

    def decode(self, arrays: Mapping[str, AnyArray]) -> Float32:
        values = E4M3FN[arrays["codes"]]  # [rows, columns]
        scales = to_float32(arrays["scales"], self.scale_dtype)  # [rows, groups]
        values *= scales.repeat(self.group_size, axis=1)[:, : values.shape[1]]
        return values
