"""MLX's affine: what the container's own affine encoding is, so that its planes are its arrays."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from formats.dtypes import Float32, to_float32
from formats.encodings.affine import Affine
from formats.encodings.base import Encoding
from formats.encodings.sources.base import FLOATS, Bits, Flaw, Plane


@dataclass(frozen=True)
class MLXAffineSource:
    """`weight` U32 [rows, columns * bits / 32], `scales` and `biases` [rows, columns / group_size]."""

    bits: int
    group_size: int
    scale_dtype: str
    quantized: bool = True
    rounded_by_default: bool = False

    @property
    def label(self) -> str:
        return f"MLX affine {self.bits}-bit, {self.scale_dtype} scales per {self.group_size}"

    def planes(self, rows: int, columns: int) -> tuple[Plane, ...]:
        dtypes = tuple(name for name, dtype in FLOATS.items() if dtype == self.scale_dtype)
        groups = (rows, columns // self.group_size)
        return (
            Plane("codes", ("U32",), (rows, columns * self.bits // 32)),
            Plane("scales", dtypes, groups),
            Plane("biases", dtypes, groups),
        )

    def exact(self, columns: int) -> Encoding:
        return Affine(self.bits, self.group_size, self.scale_dtype)

    def transcode(self, planes: Mapping[str, Bits]) -> dict[str, Bits]:
        return dict(planes)

    def decode(self, planes: Mapping[str, Bits]) -> Float32:
        words = planes["codes"].astype(np.uint64)
        starts = np.arange(words.shape[1] * 32 // self.bits) * self.bits  # first bit of each element
        two = words | np.concatenate([words[:, 1:], words[:, :1]], axis=1) << np.uint64(32)  # a word and its next
        shifts = (starts % 32).astype(np.uint64)
        codes = two[:, starts // 32] >> shifts & np.uint64((1 << self.bits) - 1)
        scales, biases = (
            to_float32(planes[name], self.scale_dtype).repeat(self.group_size, axis=1) for name in ("scales", "biases")
        )
        return codes.astype(np.float32) * scales + biases

    def flaw(self, planes: Mapping[str, Bits]) -> Flaw | None:
        return None
