"""FP4 (E2M1) checkpoints: MXFP4 as OpenAI, compressed-tensors, DeepSeek and MLX carry it, NVFP4 as ModelOpt,
compressed-tensors and MLX do. All keep the element of a pair that comes first in the lower half of a byte.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from formats.dtypes import Float32
from formats.encodings.base import Encoding
from formats.encodings.fp4 import MX_GROUP_SIZE, MXFP4, NV_GROUP_SIZE, NVFP4
from formats.encodings.sources.base import ALL_ROWS, E8M0_DTYPES, Bits, Flaw, Plane

LARGEST = np.float32(6 * 448)  # of FP4 times that of E4M3
BLOCKS, BYTES, WORDS = "blocks", "bytes", "words"  # of codes: [rows, columns / 32, 16], [rows, columns / 2], words


def _codes(packing: str, rows: int, columns: int) -> Plane:
    if packing == BLOCKS:
        return Plane("codes", ("U8",), (rows, columns // MX_GROUP_SIZE, MX_GROUP_SIZE // 2))
    if packing == WORDS:
        return Plane("codes", ("U32",), (rows, columns // 8))
    return Plane("codes", ("U8", "I8"), (rows, columns // 2))


def _words(codes: Bits) -> Bits:
    return np.ascontiguousarray(codes).reshape(len(codes), -1).view("<u4")


def _fp4(codes: Bits) -> Float32:
    """Codes of any packing -> float32 [rows, columns], from sign, exponent and mantissa."""
    pairs = np.ascontiguousarray(codes).reshape(len(codes), -1).view(np.uint8)
    nibbles = np.stack([pairs & 15, pairs >> 4], axis=2).reshape(len(pairs), -1).astype(np.int32)
    exponent, mantissa = nibbles >> 1 & 3, (nibbles & 1).astype(np.float32)
    magnitudes = np.where(exponent == 0, mantissa / 2, np.ldexp(1 + mantissa / 2, exponent - 1))
    return np.copysign(magnitudes, np.where(nibbles & 8, np.float32(-1), np.float32(1))).astype(np.float32)


@dataclass(frozen=True)
class MXFP4Source:
    """`codes` times 2 ** (`scales` - 127), groups of 32."""

    packing: str
    bits: int = 4
    quantized: bool = True
    rounded_by_default: bool = False

    @property
    def label(self) -> str:
        return "mxfp4"

    def planes(self, rows: int, columns: int) -> tuple[Plane, ...]:
        scales = Plane("scales", E8M0_DTYPES, (rows, columns // MX_GROUP_SIZE), kind="e8m0")
        return _codes(self.packing, rows, columns), scales

    def exact(self, columns: int) -> Encoding:
        return MXFP4()

    def transcode(self, planes: Mapping[str, Bits]) -> dict[str, Bits]:
        return {"codes": _words(planes["codes"]), "scales": planes["scales"]}

    def decode(self, planes: Mapping[str, Bits]) -> Float32:
        values = _fp4(planes["codes"])
        return np.ldexp(values, planes["scales"].astype(np.int32).repeat(MX_GROUP_SIZE, axis=1) - 127)

    def flaw(self, planes: Mapping[str, Bits]) -> Flaw | None:
        return None


@dataclass(frozen=True)
class NVFP4Source:
    """`codes` times `scales`, FP8 per 16, times `global` (ModelOpt) or divided by it (compressed-tensors).

    `global_shape` is that of its tensor, [] or [1]; None where there is none, as MLX may leave it out: 1.
    """

    global_scale: str  # `multiply` or `divide`
    packing: str
    global_shape: tuple[int, ...] | None
    largest: bool = False  # `global` is the largest value that can be, as MLX has it, and so 2688 times what multiplies
    bits: int = 4
    quantized: bool = True
    rounded_by_default: bool = False

    @property
    def label(self) -> str:
        return "nvfp4"

    def planes(self, rows: int, columns: int) -> tuple[Plane, ...]:
        codes = _codes(self.packing, rows, columns)
        scales = Plane("scales", ("F8_E4M3", "U8"), (rows, columns // NV_GROUP_SIZE), kind="e4m3")
        if self.global_shape is None:
            return codes, scales
        return codes, scales, Plane("global", ("F32",), self.global_shape, ALL_ROWS)

    def exact(self, columns: int) -> Encoding:
        return NVFP4(self.global_scale)

    def transcode(self, planes: Mapping[str, Bits]) -> dict[str, Bits]:
        codes = _words(planes["codes"])
        return {
            "codes": codes,
            "scales": planes["scales"],
            "global": np.broadcast_to(self._global(planes), (len(codes), 1)),
        }

    def decode(self, planes: Mapping[str, Bits]) -> Float32:
        e4m3 = planes["scales"].astype(np.uint16)
        scales = ((e4m3 & 0x80) << 8 | (e4m3 & 0x7F) << 7).view(np.float16).astype(np.float32) * np.float32(256)
        factor = self._global(planes)
        scales = np.multiply(scales, factor) if self.global_scale == "multiply" else np.divide(scales, factor)
        return _fp4(planes["codes"]) * scales.repeat(NV_GROUP_SIZE, axis=1)

    def flaw(self, planes: Mapping[str, Bits]) -> Flaw | None:
        if self.global_scale == "divide" and not self._global(planes).all():
            return Flaw("global", 0, 0, "0", "a number to divide by")
        return None

    def _global(self, planes: Mapping[str, Bits]) -> Float32:
        """[1, 1]."""
        given = planes.get("global")
        if given is None:
            return np.ones((1, 1), np.float32)
        factor = given.reshape(1, 1).astype(np.float32)
        return factor / LARGEST if self.largest else factor
