"""Codes in words: one little-endian stream of bits per row, element j in bits j * bits and up (FORMAT.md, Codes)."""

import numpy as np

from formats.dtypes import AnyArray

_CODES = 8  # this many codes always take whole bytes: as many as a code has bits


def unpack_codes(words: AnyArray, bits: int) -> AnyArray:
    """uint32 words [rows, columns * bits / 32] -> uint8 codes [rows, columns]; bits from 1 to 8."""
    packed = np.ascontiguousarray(words).view(np.uint8)  # [rows, columns * bits / 8]
    if bits == 8:
        return packed
    if bits == 4:
        codes = np.empty((len(packed), packed.shape[1] * 2), np.uint8)
        np.bitwise_and(packed, 15, out=codes[:, 0::2])
        np.right_shift(packed, 4, out=codes[:, 1::2])
        return codes
    eights = packed.reshape(len(packed), -1, bits)
    wide = np.zeros((*eights.shape[:2], 8), np.uint8)
    wide[..., :bits] = eights
    shifts = np.arange(_CODES, dtype="<u8") * np.uint64(bits)
    codes = (wide.view("<u8") >> shifts) & np.uint64((1 << bits) - 1)  # [rows, columns / 8, 8]
    return codes.astype(np.uint8).reshape(len(packed), -1)


def pack_codes(codes: AnyArray, bits: int) -> AnyArray:
    """uint8 codes [rows, columns], each below 2 ** bits -> uint32 words [rows, columns * bits / 32]."""
    codes = np.ascontiguousarray(codes)
    if bits == 8:
        return codes.view("<u4")
    if bits == 4:
        pairs = codes.view("<u2")  # low byte: even column; high byte: odd column
        return (pairs | (pairs >> 4)).astype(np.uint8).view("<u4")
    shifts = np.arange(_CODES, dtype="<u8") * np.uint64(bits)
    eights = codes.reshape(len(codes), -1, _CODES).astype("<u8") << shifts
    wide = np.bitwise_or.reduce(eights, axis=2)[..., None].view(np.uint8)  # [rows, columns / 8, 8]
    return np.ascontiguousarray(wide[..., :bits]).reshape(len(codes), -1).view("<u4")
