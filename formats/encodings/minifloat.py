"""Floats of 4 and 8 bits as tables of their values, index = bits (OCP Microscaling Formats 1.0 and FP8 1.0)."""

import numpy as np

from formats.dtypes import Float32


def _e4m3fn() -> Float32:
    """Sign, 4 bits of exponent with bias 7, 3 of mantissa; no infinity, and 0x7F and 0xFF are NaN."""
    bits = np.arange(128)
    exponent, mantissa = bits >> 3, bits & 7
    positive = np.where(exponent == 0, np.ldexp(mantissa / 8, -6), np.ldexp(1 + mantissa / 8, exponent - 7))
    positive[127] = np.nan
    return np.concatenate([positive, -positive]).astype(np.float32)


E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)  # FP4
E4M3FN = _e4m3fn()  # FP8
E8M0 = np.append(np.ldexp(np.float32(1), np.arange(-127, 128)), np.nan).astype(np.float32)  # powers of two
E4M3FN_NAN = 0x7F  # in the lower seven bits
E8M0_MAX = 252  # the largest scale with which every FP4 value is finite in float32: 6 * 2 ** 125
