"""16- and 32-bit floats, rows first or, as some checkpoints fuse their experts, columns first."""

from collections.abc import Mapping
from dataclasses import dataclass

from formats.dtypes import Float32, to_float32
from formats.encodings.base import Encoding
from formats.encodings.plain import Plain
from formats.encodings.sources.base import FLOATS, Bits, Flaw, Plane


@dataclass(frozen=True)
class PlainSource:
    """One tensor `weight` [rows, columns], or [columns, rows] when transposed."""

    dtype: str  # of the container: bf16, f16, f32
    transposed: bool = False
    quantized: bool = False
    rounded_by_default: bool = True

    @property
    def label(self) -> str:
        return self.dtype

    @property
    def bits(self) -> int:
        return Plain(self.dtype).bits

    def planes(self, rows: int, columns: int) -> tuple[Plane, ...]:
        dtypes = tuple(name for name, dtype in FLOATS.items() if dtype == self.dtype)
        if self.transposed:
            return (Plane("weight", dtypes, (columns, rows), axis=1),)
        return (Plane("weight", dtypes, (rows, columns)),)

    def exact(self, columns: int) -> Encoding:
        return Plain(self.dtype)

    def transcode(self, planes: Mapping[str, Bits]) -> dict[str, Bits]:
        return {"weight": planes["weight"]}

    def decode(self, planes: Mapping[str, Bits]) -> Float32:
        return to_float32(planes["weight"], self.dtype)

    def flaw(self, planes: Mapping[str, Bits]) -> Flaw | None:
        return None
