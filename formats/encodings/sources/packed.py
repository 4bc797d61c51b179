"""compressed-tensors `pack-quantized`: symmetric integers of 4 or 8 bits in int32 words, low element first."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from formats.dtypes import Float32, to_float32
from formats.encodings.base import Encoding
from formats.encodings.integer import Symmetric
from formats.encodings.sources.base import ALL_ROWS, FLOATS, Bits, Flaw, Plane


@dataclass(frozen=True)
class PackedSource:
    """`packed` [rows, columns * bits / 32] of integers stored as unsigned, `scale` [rows, groups], `shape` [2].

    `matrix` is the whole matrix that a tensor holds, which `shape` states.
    """

    bits: int
    group_size: int
    scale_dtype: str
    matrix: tuple[int, int]
    quantized: bool = True
    rounded_by_default: bool = False

    @property
    def label(self) -> str:
        return f"int{self.bits}, {self.scale_dtype} scales per {self.group_size}"

    def planes(self, rows: int, columns: int) -> tuple[Plane, ...]:
        dtypes = tuple(name for name, dtype in FLOATS.items() if dtype == self.scale_dtype)
        return (
            Plane("packed", ("I32",), (rows, columns * self.bits // 32)),
            Plane("scale", dtypes, (rows, columns // self.group_size)),
            Plane("shape", ("I32", "I64"), (2,), ALL_ROWS),
        )

    def exact(self, columns: int) -> Encoding:
        return Symmetric(self.bits, self.group_size, self.scale_dtype)

    def transcode(self, planes: Mapping[str, Bits]) -> dict[str, Bits]:
        return {"codes": planes["packed"], "scales": planes["scale"]}

    def decode(self, planes: Mapping[str, Bits]) -> Float32:
        packed, scale = planes["packed"], to_float32(planes["scale"], self.scale_dtype)
        shifts = np.arange(0, 32, self.bits, dtype=np.uint32)
        integers = (packed[..., None] >> shifts & np.uint32((1 << self.bits) - 1)).astype(np.int32)
        integers = integers.reshape(len(packed), -1) - (1 << self.bits - 1)
        return integers.astype(np.float32) * scale.repeat(self.group_size, axis=1)

    def flaw(self, planes: Mapping[str, Bits]) -> Flaw | None:
        found = planes["shape"].ravel().tolist()
        return None if found == list(self.matrix) else Flaw("shape", 0, 0, str(found), str(list(self.matrix)))
