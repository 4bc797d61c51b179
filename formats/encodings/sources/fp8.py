"""FP8 E4M3FN with float scales: a scale per block of 128 x 128 or 32 x 32, output channel, or tensor; and MXFP8.

Blocks may stand columns first, as Qwen3-VL fuses its experts: the scales as the weights.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from formats.dtypes import Float32, to_float32
from formats.encodings.base import Encoding
from formats.encodings.fp8 import BLOCK, FP8, MX_BLOCK
from formats.encodings.sources.base import ALL_ROWS, E8M0_DTYPES, EACH_ROW, FLOATS, Bits, Flaw, Plane
from formats.encodings.sources.fp4 import WORDS

PER_BLOCK, PER_CHANNEL, PER_TENSOR = "block", "channel", "tensor"
NO_NUMBER = 0x7F  # of E4M3, but for the sign


@dataclass(frozen=True)
class FP8Source:
    """`weight` [rows, columns] times `scale`, whose name in checkpoints may end in _inv: it is a multiplier."""

    per: str
    scale_dtype: str  # bf16, f16, f32, or e8m0: powers of two
    scale_shape: tuple[int, ...] = ()  # of PER_CHANNEL and PER_TENSOR, as the file has it
    transposed: bool = False  # of PER_BLOCK alone: columns first
    block: int = BLOCK  # of PER_BLOCK: rows, and columns, of one
    quantized: bool = True
    rounded_by_default: bool = True

    @property
    def label(self) -> str:
        per = f"{self.block} × {self.block}" if self.per == PER_BLOCK else self.per
        return f"fp8, {self.scale_dtype} scales per {per}"

    @property
    def bits(self) -> int:
        return 8

    def planes(self, rows: int, columns: int) -> tuple[Plane, ...]:
        axis = 1 if self.transposed else EACH_ROW
        shape = (columns, rows) if self.transposed else (rows, columns)
        weight = Plane("weight", ("F8_E4M3",), shape, axis, kind="e4m3")
        kind = "e8m0" if self.scale_dtype == "e8m0" else ""
        dtypes = E8M0_DTYPES if kind else tuple(name for name, dtype in FLOATS.items() if dtype == self.scale_dtype)
        if self.per == PER_BLOCK:
            blocks = tuple(-(-length // self.block) for length in shape)  # the last ones may be partial
            return weight, Plane("scale", dtypes, blocks, axis, each=self.block, kind=kind)
        if self.per == PER_CHANNEL:
            return weight, Plane("scale", dtypes, (rows, *self.scale_shape[1:]), EACH_ROW, kind=kind)
        return weight, Plane("scale", dtypes, self.scale_shape, ALL_ROWS, kind=kind)

    def exact(self, columns: int) -> Encoding:
        dtype = "bf16" if self.scale_dtype == "e8m0" else self.scale_dtype
        return FP8(self.block if self.per == PER_BLOCK else columns, dtype)

    def transcode(self, planes: Mapping[str, Bits]) -> dict[str, Bits]:
        weight, scale = planes["weight"], planes["scale"]
        if self.scale_dtype == "e8m0":
            scale = _as_bf16(scale)
        return {"codes": weight, "scales": np.broadcast_to(scale.reshape(len(scale), -1), (len(weight), _width(scale)))}

    def decode(self, planes: Mapping[str, Bits]) -> Float32:
        values, scale = _values(planes["weight"]), planes["scale"]
        scales = _powers_of_two(scale) if self.scale_dtype == "e8m0" else to_float32(scale, self.scale_dtype)
        if self.per == PER_BLOCK:
            return values * scales[:, np.arange(values.shape[1]) // self.block]
        return values * scales.reshape(len(scales), 1)

    def flaw(self, planes: Mapping[str, Bits]) -> Flaw | None:
        return None


def _width(scale: Bits) -> int:
    return scale.size // len(scale)


@dataclass(frozen=True)
class MXFP8Source:
    """`weight` [rows, columns] times 2 ** (`scale` - 127) of groups of 32; in bytes, or four to a word in MLX."""

    packing: str  # BYTES or WORDS
    group_size: int = MX_BLOCK
    quantized: bool = True
    rounded_by_default: bool = True

    @property
    def label(self) -> str:
        return "mxfp8"

    @property
    def bits(self) -> int:
        return 8

    def planes(self, rows: int, columns: int) -> tuple[Plane, ...]:
        weight = Plane("weight", ("F8_E4M3",), (rows, columns))
        if self.packing == WORDS:
            weight = Plane("weight", ("U32",), (rows, columns // 4))
        return weight, Plane("scale", E8M0_DTYPES, (rows, columns // MX_BLOCK), kind="e8m0")

    def exact(self, columns: int) -> Encoding:
        return FP8(MX_BLOCK, "bf16")

    def transcode(self, planes: Mapping[str, Bits]) -> dict[str, Bits]:
        return {"codes": _bytes(planes["weight"]), "scales": _as_bf16(planes["scale"])}

    def decode(self, planes: Mapping[str, Bits]) -> Float32:
        scales = _powers_of_two(planes["scale"]).repeat(MX_BLOCK, axis=1)
        return _values(_bytes(planes["weight"])) * scales

    def flaw(self, planes: Mapping[str, Bits]) -> Flaw | None:
        codes = _bytes(planes["weight"])
        bad = np.argwhere(codes & NO_NUMBER == NO_NUMBER)
        if len(bad) == 0:
            return None
        row, column = map(int, bad[0])
        return Flaw("weight", row, column, f"E4M3 0x{codes[row, column]:02x}", "finite weights")


def _bytes(weight: Bits) -> Bits:
    return np.ascontiguousarray(weight).view(np.uint8)


def _values(codes: Bits) -> Float32:
    """E4M3: an f16 with a larger exponent bias and fewer digits."""
    wide = codes.astype(np.uint16)
    halves = ((wide & 0x80) << 8 | (wide & 0x7F) << 7).view(np.float16)
    return halves.astype(np.float32) * np.float32(2.0**8)


def _powers_of_two(e8m0: Bits) -> Float32:
    return np.exp2(e8m0.astype(np.float32) - 127)


def _as_bf16(e8m0: Bits) -> Bits:
    """Powers of two from 2^-127 on, exact in bf16, the smallest of them as a subnormal."""
    return np.where(e8m0 == 0, np.uint16(0x0040), e8m0.astype(np.uint16) << 7)
