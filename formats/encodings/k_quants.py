"""ggml's K-quants as planar arrays: the same numbers, and products in the same order, in another place."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from formats.dtypes import AnyArray, Float32
from formats.encodings.base import ArraySpec, Parameterless, codes_spec, num_groups
from formats.encodings.packing import unpack_codes

SUPERBLOCK = 256
_LOW_48 = np.uint64((1 << 48) - 1)


@dataclass(frozen=True)
class Q2K(Parameterless):
    """Encoding id `q2_k` (FORMAT.md, Encodings): value = (d * (s mod 16)) * code - dmin * (s div 16), groups of 16."""

    id: str = "q2_k"

    @property
    def bits(self) -> int:
        return 2

    def arrays(self, rows: int, columns: int) -> tuple[ArraySpec, ...]:
        blocks = num_groups(columns, SUPERBLOCK)
        return (
            codes_spec(rows, columns, 2),
            ArraySpec("scales", "u8", (rows, 16 * blocks)),
            ArraySpec("d", "f16", (rows, blocks)),
            ArraySpec("dmin", "f16", (rows, blocks)),
        )

    def decode(self, arrays: Mapping[str, AnyArray]) -> Float32:
        d, dmin = (arrays[name].astype(np.float32)[..., None] for name in ("d", "dmin"))  # [rows, blocks, 1]
        both = arrays["scales"].astype(np.uint8).reshape(*d.shape[:2], 16)
        scales, mins = d * (both & 15).astype(np.float32), dmin * (both >> 4).astype(np.float32)
        values = unpack_codes(arrays["codes"], 2).astype(np.float32).reshape(*both.shape, 16)
        values *= scales[..., None]
        values -= mins[..., None]
        return values.reshape(len(values), -1)


@dataclass(frozen=True)
class Q4K(Parameterless):
    """Encoding id `q4_k` (FORMAT.md, Encodings): value = (d * scale) * code - dmin * min, groups of 32."""

    id: str = "q4_k"

    @property
    def bits(self) -> int:
        return 4

    def arrays(self, rows: int, columns: int) -> tuple[ArraySpec, ...]:
        blocks = num_groups(columns, SUPERBLOCK)
        return (
            codes_spec(rows, columns, self.bits),
            ArraySpec("scales", "u32", (rows, 3 * blocks)),
            ArraySpec("d", "f16", (rows, blocks)),
            ArraySpec("dmin", "f16", (rows, blocks)),
        )

    def decode(self, arrays: Mapping[str, AnyArray]) -> Float32:
        scales, mins = unpack_scales(arrays["scales"])  # [rows, blocks, 8] each
        scales = arrays["d"].astype(np.float32)[..., None] * scales
        mins = arrays["dmin"].astype(np.float32)[..., None] * mins
        values = unpack_codes(arrays["codes"], self.bits).astype(np.float32).reshape(*scales.shape, 32)
        values *= scales[..., None]
        values -= mins[..., None]
        return values.reshape(len(values), -1)


@dataclass(frozen=True)
class Q5K(Q4K):
    """Encoding id `q5_k`: as Q4_K, with codes of 5 bits."""

    id: str = "q5_k"

    @property
    def bits(self) -> int:
        return 5


@dataclass(frozen=True)
class Q6K(Parameterless):
    """Encoding id `q6_k` (FORMAT.md, Encodings): value = (d * scale) * (code - 32), groups of 16."""

    id: str = "q6_k"

    @property
    def bits(self) -> int:
        return 6

    def arrays(self, rows: int, columns: int) -> tuple[ArraySpec, ...]:
        blocks = num_groups(columns, SUPERBLOCK)
        return (
            codes_spec(rows, columns, self.bits),
            ArraySpec("scales", "i8", (rows, 16 * blocks)),
            ArraySpec("d", "f16", (rows, blocks)),
        )

    def decode(self, arrays: Mapping[str, AnyArray]) -> Float32:
        d = arrays["d"].astype(np.float32)  # [rows, blocks]
        scales = d[..., None] * arrays["scales"].astype(np.float32).reshape(*d.shape, 16)
        values = unpack_codes(arrays["codes"], self.bits).astype(np.float32).reshape(*scales.shape, 16)
        values -= np.float32(1 << (self.bits - 1))
        values *= scales[..., None]
        return values.reshape(len(values), -1)


@dataclass(frozen=True)
class Q3K(Q6K):
    """Encoding id `q3_k`: as Q6_K, with codes of 3 bits, of which 4 is zero."""

    id: str = "q3_k"

    @property
    def bits(self) -> int:
        return 3


def unpack_scales(words: AnyArray) -> tuple[Float32, Float32]:
    """The 6-bit scales and mins of Q4_K and Q5_K: uint32 [rows, 3 * blocks] -> float32 [rows, blocks, 8] each.

    The three words of a superblock are a stream of 8 scales, then 8 mins.
    """
    first, middle, last = np.moveaxis(words.reshape(len(words), -1, 3).astype(np.uint64), 2, 0)
    shifts = np.arange(8, dtype=np.uint64) * np.uint64(6)
    scales = ((first | middle << np.uint64(32)) & _LOW_48)[..., None] >> shifts & np.uint64(63)
    mins = (middle >> np.uint64(16) | last << np.uint64(16))[..., None] >> shifts & np.uint64(63)
    return scales.astype(np.float32), mins.astype(np.float32)


def pack_scales(scales: AnyArray, mins: AnyArray) -> AnyArray:
    """The inverse of unpack_scales: uint8 [rows, blocks, 8] each, below 64 -> uint32 [rows, 3 * blocks]."""
    shifts = np.arange(8, dtype=np.uint64) * np.uint64(6)
    low, high = (np.bitwise_or.reduce(six.astype(np.uint64) << shifts, axis=2) for six in (scales, mins))
    words = np.stack([low, low >> np.uint64(32) | high << np.uint64(16), high >> np.uint64(16)], axis=2)
    return words.astype("<u4").reshape(len(scales), -1)
