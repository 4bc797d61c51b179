"""16- and 32-bit floats, rows first or, as some checkpoints fuse their experts, columns first."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from formats.dtypes import Float32, to_float32
from formats.encodings.base import Encoding
from formats.encodings.plain import Plain
from formats.encodings.sources.base import FLOATS, Bits, Flaw, Plane

# What another converter did to values, undone in float32: llama.cpp and MLX store norms around one, llama.cpp
# -exp(A_log), or exp(A_log).
MINUS_ONE, LOG_OF_MINUS, LOG = "minus one", "log of minus", "log"
ADJUSTMENTS: Mapping[str, Callable[[Float32], Float32]] = {
    MINUS_ONE: lambda x: x - np.float32(1),
    LOG_OF_MINUS: lambda x: np.log(-x),
    LOG: np.log,
}


@dataclass(frozen=True)
class PlainSource:
    """One tensor `weight` [rows, columns], or [columns, rows] when transposed."""

    dtype: str  # of the container: bf16, f16, f32
    transposed: bool = False
    adjustment: str = ""  # of ADJUSTMENTS: values become float32
    quantized: bool = False
    rounded_by_default: bool = True

    @property
    def label(self) -> str:
        return f"{self.dtype}, {self.adjustment}" if self.adjustment else self.dtype

    @property
    def bits(self) -> int:
        return Plain(self.dtype).bits

    def planes(self, rows: int, columns: int) -> tuple[Plane, ...]:
        dtypes = tuple(name for name, dtype in FLOATS.items() if dtype == self.dtype)
        if self.transposed:
            return (Plane("weight", dtypes, (columns, rows), axis=1),)
        return (Plane("weight", dtypes, (rows, columns)),)

    def exact(self, columns: int) -> Encoding:
        return Plain("f32" if self.adjustment else self.dtype)

    def transcode(self, planes: Mapping[str, Bits]) -> dict[str, Bits]:
        return {"weight": self.decode(planes) if self.adjustment else planes["weight"]}

    def decode(self, planes: Mapping[str, Bits]) -> Float32:
        values = to_float32(planes["weight"], self.dtype)
        return ADJUSTMENTS[self.adjustment](values) if self.adjustment else values

    def flaw(self, planes: Mapping[str, Bits]) -> Flaw | None:
        if self.adjustment not in (LOG, LOG_OF_MINUS):
            return None
        sign, expected = (1, "numbers above 0") if self.adjustment == LOG else (-1, "numbers below 0")
        bad = np.argwhere(sign * to_float32(planes["weight"], self.dtype) <= 0)
        if not len(bad):
            return None
        row, column = map(int, bad[0])
        found = to_float32(planes["weight"][row, column : column + 1], self.dtype)[0]
        return Flaw("weight", row, column, str(found), expected)
