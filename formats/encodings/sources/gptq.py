"""GPTQ and AWQ: unsigned integers with a zero point per group, stored columns first in int32 words.

GPTQ packs along the columns, so that a transposed word is a word of the container; AWQ packs along the rows, in an
order of its own. Version 1 of GPTQ's files stores each zero point less 1.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from formats.dtypes import Float32, to_float32
from formats.encodings.base import Encoding
from formats.encodings.integer import Symmetric, ZeroPoint
from formats.encodings.packing import pack_codes, unpack_codes
from formats.encodings.sources.base import ALL_ROWS, FLOATS, PACKED_ROWS, Bits, Flaw, Plane

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # nibble k of a word is the row of this number


@dataclass(frozen=True)
class GPTQSource:
    """`qweight` [columns * bits / 32, rows], `qzeros` [groups, rows * bits / 32], `scales` [groups, rows], `g_idx`."""

    bits: int
    group_size: int
    scale_dtype: str
    symmetric: bool  # every zero point is 2 ** (bits - 1)
    version: int
    g_idx: bool  # whether there is one; it must name the groups in order
    quantized: bool = True
    rounded_by_default: bool = False

    @property
    def label(self) -> str:
        kind = "symmetric" if self.symmetric else "with zero points"
        return f"GPTQ {self.bits}-bit {kind}, {self.scale_dtype} scales per {self.group_size}"

    def planes(self, rows: int, columns: int) -> tuple[Plane, ...]:
        groups = columns // self.group_size
        dtypes = tuple(name for name, dtype in FLOATS.items() if dtype == self.scale_dtype)
        qzeros = (groups, rows * self.bits // 32)
        planes = (
            Plane("qweight", ("I32",), (columns * self.bits // 32, rows), axis=1),
            Plane("qzeros", ("I32",), qzeros, axis=1, words=self.bits),
            Plane("scales", dtypes, (groups, rows), axis=1),
        )
        return (*planes, Plane("g_idx", ("I32",), (columns,), ALL_ROWS)) if self.g_idx else planes

    def exact(self, columns: int) -> Encoding:
        if self.symmetric and self.bits in (4, 8):
            return Symmetric(self.bits, self.group_size, self.scale_dtype)
        return ZeroPoint(self.bits, self.group_size, self.scale_dtype)

    def transcode(self, planes: Mapping[str, Bits]) -> dict[str, Bits]:
        arrays = {"codes": np.ascontiguousarray(planes["qweight"]), "scales": planes["scales"]}
        return arrays if self.symmetric and self.bits in (4, 8) else {**arrays, "zeros": self._zeros(planes)}

    def decode(self, planes: Mapping[str, Bits]) -> Float32:
        scales, zeros = to_float32(planes["scales"], self.scale_dtype), self._zeros(planes).astype(np.int32)
        # Bits of a row, as in FORMAT.md: least significant first.
        raw = np.ascontiguousarray(planes["qweight"]).view(np.uint8)
        each = np.unpackbits(raw, axis=1, bitorder="little").reshape(len(raw), -1, self.bits)
        codes = (each.astype(np.int32) << np.arange(self.bits)).sum(axis=2)
        group = planes["g_idx"].ravel() if self.g_idx else np.arange(codes.shape[1]) // self.group_size
        return (codes - zeros[:, group]).astype(np.float32) * scales[:, group]

    def flaw(self, planes: Mapping[str, Bits]) -> Flaw | None:
        if self.g_idx and (flaw := self.order_flaw(planes["g_idx"])) is not None:
            return flaw
        return _not_in_the_middle(self._zeros(planes), 1 << self.bits - 1) if self.symmetric else None

    def order_flaw(self, g_idx: Bits) -> Flaw | None:
        """What is wrong with the group of each column: act-order shuffles them, whatever the config says."""
        found = g_idx.ravel()
        bad = np.flatnonzero(found != np.arange(len(found)) // self.group_size)
        if not len(bad):
            return None
        at = int(bad[0])
        expected = f"{at // self.group_size}: act-order (desc_act) is not supported"
        return Flaw("g_idx", 0, at, f"group {found[at]}", expected)

    def _zeros(self, planes: Mapping[str, Bits]) -> Bits:
        """uint8 [rows, groups]."""
        words = np.ascontiguousarray(planes["qzeros"].T)  # [groups, rows * bits / 32]
        zeros: Bits = unpack_codes(words, self.bits).T
        return (zeros + np.uint8(self.version == 1)) & np.uint8((1 << self.bits) - 1)


@dataclass(frozen=True)
class AWQSource:
    """`qweight` [columns, rows / 8], `qzeros` [groups, rows / 8], `scales` [groups, rows]; 4 bits."""

    group_size: int
    scale_dtype: str
    symmetric: bool = False  # every zero point is 8
    bits: int = 4
    quantized: bool = True
    rounded_by_default: bool = False

    @property
    def label(self) -> str:
        kind = " symmetric" if self.symmetric else ""
        return f"AWQ 4-bit{kind}, {self.scale_dtype} scales per {self.group_size}"

    def planes(self, rows: int, columns: int) -> tuple[Plane, ...]:
        groups = columns // self.group_size
        dtypes = tuple(name for name, dtype in FLOATS.items() if dtype == self.scale_dtype)
        return (
            Plane("qweight", ("I32",), (columns, rows // 8), axis=1, words=4),
            Plane("qzeros", ("I32",), (groups, rows // 8), axis=1, words=4),
            Plane("scales", dtypes, (groups, rows), axis=1),
        )

    def exact(self, columns: int) -> Encoding:
        kind = Symmetric if self.symmetric else ZeroPoint
        return kind(4, self.group_size, self.scale_dtype)

    def transcode(self, planes: Mapping[str, Bits]) -> dict[str, Bits]:
        return {"codes": pack_codes(_awq_rows(planes["qweight"]), 4), **self.scales_and_zeros(planes)}

    def scales_and_zeros(self, planes: Mapping[str, Bits]) -> dict[str, Bits]:
        """What is beside the codes."""
        scales = {"scales": planes["scales"]}
        return scales if self.symmetric else {**scales, "zeros": _awq_rows(planes["qzeros"])}

    def decode(self, planes: Mapping[str, Bits]) -> Float32:
        codes, zeros = (
            np.stack([planes[name] >> np.uint32(4 * AWQ_ORDER.index(row)) & 15 for row in range(8)], axis=1)
            .reshape(-1, planes[name].shape[1])
            .astype(np.int32)
            for name in ("qweight", "qzeros")
        )
        scales = to_float32(planes["scales"], self.scale_dtype)
        group = np.arange(codes.shape[1]) // self.group_size
        return (codes - zeros[:, group]).astype(np.float32) * scales[:, group]

    def flaw(self, planes: Mapping[str, Bits]) -> Flaw | None:
        return _not_in_the_middle(_awq_rows(planes["qzeros"]), 8) if self.symmetric else None


def _not_in_the_middle(zeros: Bits, middle: int) -> Flaw | None:
    """The first zero point [rows, groups] of a symmetric matrix that is another."""
    wrong = np.argwhere(zeros != middle)
    if not len(wrong):
        return None
    row, group = map(int, wrong[0])
    return Flaw("qzeros", row, group, f"zero point {zeros[row, group]}", f"{middle}, as the config says symmetric")


def _awq_rows(words: Bits) -> Bits:
    """Words [rows / 8, n] -> uint8 [rows, n]."""
    rows = np.empty((len(words), 8, words.shape[1]), np.uint8)
    for byte in range(4):  # of each word: two nibbles
        pairs = (words >> np.uint32(8 * byte)).astype(np.uint8)
        rows[:, AWQ_ORDER[2 * byte]] = pairs & 15
        rows[:, AWQ_ORDER[2 * byte + 1]] = pairs >> 4
    return rows.reshape(-1, words.shape[1])


assert PACKED_ROWS % len(AWQ_ORDER) == 0
