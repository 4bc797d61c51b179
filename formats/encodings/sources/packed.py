"""Integers of compressed-tensors: `pack-quantized`, of 4 or 8 bits in int32 words, low element first, and
`int-quantized`, bytes with a sign. Either may have zero points, which are then stored alike.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from formats.dtypes import Float32, to_float32
from formats.encodings.base import Encoding
from formats.encodings.integer import Symmetric, ZeroPoint
from formats.encodings.packing import unpack_codes
from formats.encodings.sources.base import ALL_ROWS, EACH_ROW, FLOATS, Bits, Flaw, Plane

SIGN = np.uint8(0x80)  # turns int8 into the code that is 128 more


@dataclass(frozen=True)
class PackedSource:
    """`packed` [rows, columns * bits / 32] of integers stored as unsigned, `scale` [rows, groups], `shape` [2].

    `zero_point` [rows * bits / 32, groups], if not symmetric, is packed along the rows, the last word maybe in part.
    `matrix` is the whole matrix that a tensor holds, which `shape` states.
    """

    bits: int
    group_size: int
    scale_dtype: str
    matrix: tuple[int, int]
    symmetric: bool = True
    quantized: bool = True
    rounded_by_default: bool = False

    @property
    def label(self) -> str:
        kind = "" if self.symmetric else " with zero points"
        return f"int{self.bits}{kind}, {self.scale_dtype} scales per {self.group_size}"

    def planes(self, rows: int, columns: int) -> tuple[Plane, ...]:
        dtypes = tuple(name for name, dtype in FLOATS.items() if dtype == self.scale_dtype)
        groups = columns // self.group_size
        planes = (
            Plane("packed", ("I32",), (rows, columns * self.bits // 32)),
            Plane("scale", dtypes, (rows, groups)),
            Plane("shape", ("I32", "I64"), (2,), ALL_ROWS),
        )
        zero_point = Plane("zero_point", ("I32",), (-(-rows * self.bits // 32), groups), EACH_ROW, words=self.bits)
        return planes if self.symmetric else (*planes, zero_point)

    def exact(self, columns: int) -> Encoding:
        kind = Symmetric if self.symmetric else ZeroPoint
        return kind(self.bits, self.group_size, self.scale_dtype)

    def transcode(self, planes: Mapping[str, Bits]) -> dict[str, Bits]:
        arrays = {"codes": planes["packed"], "scales": planes["scale"]}
        if self.symmetric:
            return arrays
        words = np.ascontiguousarray(planes["zero_point"].T)  # [groups, rows * bits / 32]
        return {**arrays, "zeros": unpack_codes(words, self.bits)[:, : len(planes["packed"])].T}

    def decode(self, planes: Mapping[str, Bits]) -> Float32:
        scale = to_float32(planes["scale"], self.scale_dtype)
        integers = _integers(planes["packed"], self.bits)
        if not self.symmetric:
            zero_points = _integers(planes["zero_point"].T, self.bits)[:, : len(integers)].T
            integers = integers - zero_points.repeat(self.group_size, axis=1)
        return integers.astype(np.float32) * scale.repeat(self.group_size, axis=1)

    def flaw(self, planes: Mapping[str, Bits]) -> Flaw | None:
        found = planes["shape"].ravel().tolist()
        return None if found == list(self.matrix) else Flaw("shape", 0, 0, str(found), str(list(self.matrix)))


def _integers(words: Bits, bits: int) -> Bits:
    """Words [n, m] of integers stored as unsigned -> int32 [n, m * 32 / bits]."""
    shifts = np.arange(0, 32, bits, dtype=np.uint32)
    integers = (words[..., None] >> shifts & np.uint32((1 << bits) - 1)).astype(np.int32)
    return integers.reshape(len(words), -1) - (1 << bits - 1)


@dataclass(frozen=True)
class Int8Source:
    """`weight` int8 [rows, columns], `scale` [rows, groups], or [rows], or one number, and `zero_point` as `scale`."""

    group_size: int
    scale_dtype: str
    scale_shape: tuple[int, ...]  # as the file has it; of one number: [] or [1]
    symmetric: bool = True
    bits: int = 8
    quantized: bool = True
    rounded_by_default: bool = False

    @property
    def label(self) -> str:
        kind = "" if self.symmetric else " with zero points"
        per = "tensor" if self._per_tensor else self.group_size
        return f"int8{kind}, {self.scale_dtype} scales per {per}"

    @property
    def _per_tensor(self) -> bool:
        return self.scale_shape in ((), (1,), (1, 1))

    def planes(self, rows: int, columns: int) -> tuple[Plane, ...]:
        dtypes = tuple(name for name, dtype in FLOATS.items() if dtype == self.scale_dtype)
        shape = self.scale_shape if self._per_tensor else (rows, *self.scale_shape[1:])
        axis = ALL_ROWS if self._per_tensor else EACH_ROW
        planes = Plane("weight", ("I8",), (rows, columns)), Plane("scale", dtypes, shape, axis)
        return planes if self.symmetric else (*planes, Plane("zero_point", ("I8",), shape, axis))

    def exact(self, columns: int) -> Encoding:
        kind = Symmetric if self.symmetric else ZeroPoint
        return kind(8, self.group_size, self.scale_dtype)

    def transcode(self, planes: Mapping[str, Bits]) -> dict[str, Bits]:
        weight = np.ascontiguousarray(planes["weight"])
        arrays = {"codes": (weight ^ SIGN).view("<u4"), "scales": self._of_each_row(planes["scale"], len(weight))}
        if self.symmetric:
            return arrays
        return {**arrays, "zeros": self._of_each_row(planes["zero_point"] ^ SIGN, len(weight))}

    def decode(self, planes: Mapping[str, Bits]) -> Float32:
        integers = planes["weight"].view(np.int8).astype(np.int32)
        scale = to_float32(self._of_each_row(planes["scale"], len(integers)), self.scale_dtype)
        if not self.symmetric:
            zero_points = self._of_each_row(planes["zero_point"].view(np.int8).astype(np.int32), len(integers))
            integers = integers - zero_points.repeat(self.group_size, axis=1)
        return integers.astype(np.float32) * scale.repeat(self.group_size, axis=1)

    def flaw(self, planes: Mapping[str, Bits]) -> Flaw | None:
        return None

    def _of_each_row(self, numbers: Bits, rows: int) -> Bits:
        """[rows, groups] of what is stored for each row, or for all."""
        given = numbers.reshape(1 if self._per_tensor else rows, -1)
        return np.broadcast_to(given, (rows, given.shape[1]))
