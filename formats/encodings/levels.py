"""ggml's IQ types as planar arrays: a code chooses one of a few levels, which need not lie evenly, times a scale."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from formats.dtypes import AnyArray, Float32
from formats.encodings.base import ArraySpec, Parameterless, codes_spec, num_groups
from formats.encodings.k_quants import SUPERBLOCK
from formats.encodings.packing import unpack_codes

IQ4 = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.float32)
_IQ3 = np.array([1, 3, 5, 7, 9, 11, 13, 15.5], np.float32)
_IQ2 = np.array([1, 3.125, 5.375, 0, -1, -3.125, -5.375, 0], np.float32)  # no weight has a 0
_TERNARY = np.array([-1, 0, 1], np.float32)


class Kind(NamedTuple):
    """What an encoding of Levels is."""

    bits: int
    group_size: int
    levels: Float32  # [2 ** bits], by code


KINDS: Mapping[str, Kind] = {
    "iq1_m": Kind(3, 16, np.concatenate([_TERNARY + 0.125, [0], _TERNARY - 0.125, [0]]).astype(np.float32)),
    "iq1_s": Kind(2, 32, np.arange(4, dtype=np.float32) - np.float32(0.875)),
    "iq2_xs": Kind(3, 16, _IQ2),
    "iq2_xxs": Kind(3, 32, _IQ2),
    "iq3_s": Kind(4, 32, np.arange(-15, 16, 2, dtype=np.float32)),
    "iq3_xxs": Kind(4, 32, np.concatenate([_IQ3, -_IQ3])),
    "iq4_xs": Kind(4, 32, IQ4),
}


@dataclass(frozen=True)
class Levels(Parameterless):
    """Encodings whose ids KINDS has (FORMAT.md, Encodings): value = (d * scale) * level[code]."""

    @property
    def bits(self) -> int:
        return KINDS[self.id].bits

    @property
    def group_size(self) -> int:
        return KINDS[self.id].group_size

    def arrays(self, rows: int, columns: int) -> tuple[ArraySpec, ...]:
        blocks = num_groups(columns, SUPERBLOCK)
        return (
            codes_spec(rows, columns, self.bits),
            ArraySpec("scales", "i8", (rows, columns // self.group_size)),
            ArraySpec("d", "f16", (rows, blocks)),
        )

    def decode(self, arrays: Mapping[str, AnyArray]) -> Float32:
        d = arrays["d"].astype(np.float32)[..., None]  # [rows, blocks, 1]
        scales = d * arrays["scales"].astype(np.float32).reshape(*d.shape[:2], -1)
        return _scaled(KINDS[self.id].levels[unpack_codes(arrays["codes"], self.bits)], scales)


@dataclass(frozen=True)
class IQ4NL(Parameterless):
    """Encoding id `iq4_nl` (FORMAT.md, Encodings): value = scale * level[code], groups of 32."""

    id: str = "iq4_nl"

    @property
    def bits(self) -> int:
        return 4

    def arrays(self, rows: int, columns: int) -> tuple[ArraySpec, ...]:
        return codes_spec(rows, columns, 4), ArraySpec("scales", "f16", (rows, num_groups(columns, 32)))

    def decode(self, arrays: Mapping[str, AnyArray]) -> Float32:
        return _scaled(IQ4[unpack_codes(arrays["codes"], 4)], arrays["scales"].astype(np.float32))


def _scaled(values: Float32, scales: Float32) -> Float32:
    """values [rows, columns], in place, times the scales of their groups, [rows, ...]."""
    groups = values.reshape(scales.size, -1)
    groups *= scales.reshape(-1, 1)
    return values
