"""FP8 E4M3FN with float scales: DeepSeek's 128 x 128 blocks, a scale per output channel, or one per tensor."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from formats.dtypes import Float32, to_float32
from formats.encodings.base import Encoding
from formats.encodings.fp8 import BLOCK, FP8
from formats.encodings.sources.base import ALL_ROWS, E8M0_DTYPES, EACH_ROW, FLOATS, Bits, Flaw, Plane

PER_BLOCK, PER_CHANNEL, PER_TENSOR = "128 × 128", "channel", "tensor"


@dataclass(frozen=True)
class FP8Source:
    """`weight` [rows, columns] times `scale`, whose name in checkpoints may end in _inv: it is a multiplier."""

    per: str
    scale_dtype: str  # bf16, f16, f32, or e8m0: powers of two
    scale_shape: tuple[int, ...] = ()  # of PER_CHANNEL and PER_TENSOR, as the file has it
    quantized: bool = True
    rounded_by_default: bool = True

    @property
    def label(self) -> str:
        return f"fp8, {self.scale_dtype} scales per {self.per}"

    @property
    def bits(self) -> int:
        return 8

    def planes(self, rows: int, columns: int) -> tuple[Plane, ...]:
        weight = Plane("weight", ("F8_E4M3",), (rows, columns), kind="e4m3")
        kind = "e8m0" if self.scale_dtype == "e8m0" else ""
        dtypes = E8M0_DTYPES if kind else tuple(name for name, dtype in FLOATS.items() if dtype == self.scale_dtype)
        if self.per == PER_BLOCK:
            blocks = (-(-rows // BLOCK), -(-columns // BLOCK))  # the last ones may be partial
            return weight, Plane("scale", dtypes, blocks, each=BLOCK, kind=kind)
        shape = (rows, *self.scale_shape[1:]) if self.per == PER_CHANNEL else self.scale_shape
        axis = EACH_ROW if self.per == PER_CHANNEL else ALL_ROWS
        return weight, Plane("scale", dtypes, shape, axis, kind=kind)

    def exact(self, columns: int) -> Encoding:
        # Powers of two from 2^-127 on are exact in bf16, the smallest of them as a subnormal.
        dtype = "bf16" if self.scale_dtype == "e8m0" else self.scale_dtype
        return FP8(BLOCK if self.per == PER_BLOCK else columns, dtype)

    def transcode(self, planes: Mapping[str, Bits]) -> dict[str, Bits]:
        weight, scale = planes["weight"], planes["scale"]
        if self.scale_dtype == "e8m0":
            scale = np.where(scale == 0, np.uint16(0x0040), scale.astype(np.uint16) << 7)  # the exponent of a bf16
        return {"codes": weight, "scales": np.broadcast_to(scale.reshape(len(scale), -1), (len(weight), _width(scale)))}

    def decode(self, planes: Mapping[str, Bits]) -> Float32:
        codes = planes["weight"].astype(np.uint16)  # an E4M3 is an f16 with a larger exponent bias and fewer digits
        halves = ((codes & 0x80) << 8 | (codes & 0x7F) << 7).view(np.float16)
        values = halves.astype(np.float32) * np.float32(2.0**8)
        scale = planes["scale"]
        scales = (
            np.exp2(scale.astype(np.float32) - 127)
            if self.scale_dtype == "e8m0"
            else to_float32(scale, self.scale_dtype)
        )
        if self.per == PER_BLOCK:
            return values * scales[:, np.arange(values.shape[1]) // BLOCK]
        return values * scales.reshape(len(scales), 1)

    def flaw(self, planes: Mapping[str, Bits]) -> Flaw | None:
        return None


def _width(scale: Bits) -> int:
    return scale.size // len(scale)
