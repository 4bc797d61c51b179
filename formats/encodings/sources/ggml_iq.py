"""ggml's IQ types with a grid: an index chooses the magnitudes of 8 or 4 weights, which have signs or a shift.

Sources: ggml-quants.c and gguf.quants. Of every number that is computed here at most 24 bits are needed, so none is
rounded, and the order of products does not matter.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from formats.dtypes import Float32
from formats.encodings.sources.base import Bits
from formats.encodings.sources.grids import GRIDS

Fields = Mapping[str, Bits]
_THREES = np.array([0, 3, 6, 9], np.uint16)
_SEVENS = np.array([0, 7, 14, 21], np.uint32)
_IQ2 = np.array([8, 25, 43], np.float32)
_MAGNITUDES: Mapping[str, Float32] = {
    "IQ3_S": np.arange(1, 16, 2, dtype=np.float32),
    "IQ3_XXS": np.array([4, 12, 20, 28, 36, 44, 52, 62], np.float32),
    **dict.fromkeys(("IQ2_S", "IQ2_XS", "IQ2_XXS"), _IQ2),
    **dict.fromkeys(("IQ1_S", "IQ1_M"), np.array([-1, 0, 1], np.float32)),
}


class Blocks(NamedTuple):
    """What blocks hold, taken apart."""

    places: Bits  # uint8 [rows, blocks, 256], in the list of magnitudes
    signs: Bits  # uint8 [rows, blocks, 256]: 1 where a weight is negative, of IQ1 where it is shifted down
    scales: Bits  # uint8 [rows, blocks, groups], odd: one more than twice what is stored


def arrays_of(kind: str, fields: Fields) -> tuple[Bits, Bits]:
    """Codes, uint8 [rows, blocks, 256], and scales, int8 [rows, blocks, groups], of the container's encoding."""
    places, signs, odd = _READ[kind](fields)
    scales = odd.view(np.int8)
    if kind == "IQ3_S":
        return places ^ 8 ^ 15 * signs, scales
    if kind == "IQ3_XXS":
        return places | signs << 3, scales
    if kind == "IQ1_S":  # shifted down: minus the weights, shifted up, times a negative scale
        return np.where(signs, 2 - places, places), np.where(signs[..., ::32], -scales, scales)
    return places | signs << 2, scales


def decode_blocks(kind: str, fields: Fields) -> Float32:
    """float32 [rows, blocks, 256]."""
    places, signs, odd = _READ[kind](fields)
    d = fields["d"].astype(np.float32)  # [rows, blocks, 1]
    stored = (odd >> 1).astype(np.float32)
    values = _MAGNITUDES[kind][places]
    if kind in ("IQ3_S", "IQ1_S", "IQ1_M"):
        scales = d * (1 + 2 * stored)
    else:
        scales = d * (np.float32(0.5) + stored) * np.float32(0.5 if kind == "IQ3_XXS" else 0.25)
    if kind in ("IQ1_S", "IQ1_M"):
        values += np.where(signs, np.float32(-0.125), np.float32(0.125))
    else:
        values *= np.where(signs, np.float32(-1), np.float32(1))
    return (scales[..., None] * values.reshape(*scales.shape, -1)).reshape(values.shape)


def iq1_m_d(scales: Bits) -> Bits:
    """Its d stands in the upper 4 bits of each of four words: uint8 [rows, blocks, 8] -> float16 [rows, blocks, 1]."""
    words = scales.view("<u2") >> 12 << np.array([0, 4, 8, 12], np.uint16)
    return np.bitwise_or.reduce(words, axis=2, keepdims=True).astype("<u2").view("<f2")


def _chosen(kind: str, indices: Bits) -> Bits:
    """Places of the weights of indices [rows, blocks, n]."""
    return GRIDS[kind][indices].reshape(*indices.shape[:2], 256)


def _even(seven: Bits) -> Bits:
    """Signs of 7 bits [rows, blocks, 32], and an eighth that makes their number even: [rows, blocks, 256]."""
    signs = seven[..., None].astype(np.uint8) >> np.arange(8, dtype=np.uint8) & 1  # the eighth is 0 so far
    signs[..., 7] = signs.sum(axis=-1, dtype=np.uint8) & 1
    return signs.reshape(*seven.shape[:2], 256)


def _bits(packed: Bits) -> Bits:
    """Bytes [rows, blocks, n] -> their bits [rows, blocks, 8 * n]."""
    return np.unpackbits(packed, axis=2, bitorder="little")


def _shifted(packed: Bits, shifts: Bits, mask: int) -> Bits:
    """Words [rows, blocks, n] at each of the shifts, of which the mask stays: [rows, blocks, n * shifts]."""
    return (packed[..., None] >> shifts & packed.dtype.type(mask)).reshape(*packed.shape[:2], -1)


def _odd(packed: Bits) -> Bits:
    """Scales of 4 bits [rows, blocks, n] -> [rows, blocks, 2 * n]."""
    return 2 * _shifted(packed, np.array([0, 4], np.uint8), 15) + 1


def _iq2_xxs(fields: Fields) -> Blocks:
    words = fields["qs"].view("<u4").reshape(*fields["qs"].shape[:2], 8, 2)  # four indices, then signs and scale
    signs = np.ascontiguousarray(words[..., 1])
    indices = np.ascontiguousarray(words[..., 0]).view(np.uint8)
    scales = (2 * (signs >> 28) + 1).astype(np.uint8)
    return Blocks(_chosen("IQ2_XXS", indices), _even(_shifted(signs, _SEVENS, 127)), scales)


def _iq2_xs(fields: Fields) -> Blocks:
    both = fields["qs"].view("<u2")
    return Blocks(_chosen("IQ2_XS", both & 511), _even(both >> 9), _odd(fields["scales"]))


def _iq2_s(fields: Fields) -> Blocks:
    high = _shifted(fields["qh"], np.arange(0, 8, 2, dtype=np.uint8), 3).astype(np.uint16)
    return Blocks(_chosen("IQ2_S", fields["qs"] | high << 8), _bits(fields["signs"]), _odd(fields["scales"]))


def _iq3_xxs(fields: Fields) -> Blocks:
    signs = fields["signs"].view("<u4")
    scales = (2 * (signs >> 28) + 1).astype(np.uint8)
    return Blocks(_chosen("IQ3_XXS", fields["qs"]), _even(_shifted(signs, _SEVENS, 127)), scales)


def _iq3_s(fields: Fields) -> Blocks:
    high = _bits(fields["qh"]).astype(np.uint16)
    return Blocks(_chosen("IQ3_S", fields["qs"] | high << 8), _bits(fields["signs"]), _odd(fields["scales"]))


def _iq1_s(fields: Fields) -> Blocks:
    qh = fields["qh"].view("<u2")  # [rows, blocks, 8]
    places = _chosen("IQ1_S", fields["qs"] | _shifted(qh, _THREES, 7) << 8)
    return Blocks(places, (qh >> 15).astype(np.uint8).repeat(32, axis=2), (2 * (qh >> 12 & 7) + 1).astype(np.uint8))


def _iq1_m(fields: Fields) -> Blocks:
    qh = _shifted(fields["qh"], np.array([0, 4], np.uint8), 15).astype(np.uint16)  # [rows, blocks, 32]
    scales = (2 * _shifted(fields["scales"].view("<u2"), _THREES, 7) + 1).astype(np.uint8)
    places = _chosen("IQ1_M", fields["qs"] | (qh & 7) << 8)
    return Blocks(places, (qh >> 3).astype(np.uint8).repeat(8, axis=2), scales)


_READ: Mapping[str, Callable[[Fields], Blocks]] = {
    "IQ3_S": _iq3_s,
    "IQ3_XXS": _iq3_xxs,
    "IQ2_S": _iq2_s,
    "IQ2_XS": _iq2_xs,
    "IQ2_XXS": _iq2_xxs,
    "IQ1_S": _iq1_s,
    "IQ1_M": _iq1_m,
}
