"""Random matrices in their encodings, as kernels see them and as they are meant."""

import math

import numpy as np
import numpy.typing as npt

from formats.dtypes import AnyArray, Float32
from formats.encodings import (
    FP8,
    IQ4NL,
    MXFP4,
    NVFP4,
    Q2K,
    Q3K,
    Q4K,
    Q5K,
    Q6K,
    Affine,
    Encoding,
    Levels,
    Plain,
    ZeroPoint,
)
from formats.encodings.levels import KINDS
from formats.kernels import matrix as matrix_of
from formats.record import Part, PartSpec, decode_part, lay_out_record

Float64 = npt.NDArray[np.float64]
SUPERBLOCKS = (Q2K, Q4K, Q6K, Levels)  # and what is derived from them


def columns_of(encoding: Encoding, groups: int) -> int:
    """A width of so many groups; any width for plain weights."""
    if isinstance(encoding, (Plain, FP8)):
        return 11 * groups + 1
    if isinstance(encoding, SUPERBLOCKS):
        return 256 * (1 + groups // 8)
    return groups * group_size_of(encoding)


def group_size_of(encoding: Encoding) -> int:
    """Columns that share a scale in the kernels."""
    sizes = {MXFP4: 32, NVFP4: 16, Q2K: 16, Q3K: 16, Q4K: 32, Q5K: 32, Q6K: 16, IQ4NL: 32}
    return sizes.get(type(encoding)) or int(getattr(encoding, "group_size", 0))


class Matrix:
    """A random matrix in its encoding, as a record of one part, and what it means."""

    def __init__(self, encoding: Encoding, rows: int, columns: int, bias: str | None, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.part: Part
        (self.part,) = lay_out_record([PartSpec("gate", rows, columns, encoding, bias)]).parts
        self.record = np.zeros(max(a.offset + a.nbytes for a in self.part.arrays), np.uint8)
        fill(self.part, self.record, rng)
        offsets = {array.name: array.offset for array in self.part.arrays}
        self.native = matrix_of(encoding, rows, columns, offsets, bias)

    def product(self, x: Float32) -> Float64:
        """In float64: [T, rows]."""
        values, bias = decode_part(self.part, self.record)
        return x.astype(np.float64) @ values.T + (0 if bias is None else bias)


def fill(part: Part, record: AnyArray, rng: np.random.Generator) -> None:
    """Random weights, of variance 1 / columns where they can be rounded to the encoding, into a record."""
    views = part.views(record)
    if isinstance(part.encoding, Plain) or (isinstance(part.encoding, Affine) and part.encoding.bits in {4, 8}):
        values = rng.standard_normal((part.rows, part.columns), np.float32) / np.float32(np.sqrt(part.columns))
        arrays = part.encoding.encode(values)
    else:
        size = part.columns**-0.5
        arrays = {
            name: random_array(part.encoding, name, view, size, rng)
            for name, view in views.items()
            if name != "linear_bias"
        }
    if part.linear_bias is not None:
        (arrays["linear_bias"],) = Plain(part.linear_bias).encode(rng.standard_normal((1, part.rows), np.float32))[
            "weight"
        ]
    for name, array in arrays.items():
        views[name][...] = array


def random_array(encoding: Encoding, name: str, view: AnyArray, size: float, rng: np.random.Generator) -> AnyArray:
    """Any bits that mean weights of about that size, or near enough for an activation to follow."""
    if name == "codes" and isinstance(encoding, FP8):
        return rng.integers(0, 0x7F, view.shape, np.uint8) | rng.choice(np.array([0, 0x80], np.uint8), view.shape)
    if isinstance(encoding, MXFP4) and name == "scales":
        return rng.integers(124, 127, view.shape, np.uint8) - np.uint8(round(-math.log2(size)))
    if isinstance(encoding, NVFP4) and name == "scales":
        return rng.integers(0x20, 0x40, view.shape, np.uint8)
    if isinstance(encoding, Q2K) and name == "scales":
        return rng.integers(0, 256, view.shape, np.uint8)
    if isinstance(encoding, ZeroPoint) and name == "zeros":
        return rng.integers(0, 1 << encoding.bits, view.shape, np.uint8)
    if view.dtype in (np.uint32, np.int8):  # == of dtypes, whose hashes differ from those of types
        return rng.integers(0, 256, (*view.shape, view.dtype.itemsize), np.uint8).view(view.dtype)[..., 0]
    typical = {
        FP8: 120.0,
        NVFP4: 2.0,
        Q2K: 24.0,
        Q3K: 74 * 2.3,
        Q4K: 32 * 5.0,
        Q5K: 32 * 10.0,
        Q6K: 74 * 18.0,
        IQ4NL: 65.0,
    }
    widest = typical.get(type(encoding), 2**encoding.bits / 3)
    if isinstance(encoding, Levels):
        widest = 74 * float(KINDS[encoding.id].levels.std())
    values = (rng.uniform(0.5, 1.5, view.shape) * size / widest).astype(np.float32)
    if isinstance(encoding, NVFP4) and encoding.global_scale == "divide":
        values = 1 / values
    if name == "biases":
        values = -values * np.float32(2 ** (encoding.bits - 1))
    if view.dtype == np.uint16:  # bf16
        return (values.view(np.uint32) >> 16).astype(np.uint16)
    return values.astype(view.dtype)


LARGEST_INTEGER = {"fast": 127, "close": 127 * 257}  # digits of at most 127 each


def rounded(encoding: Encoding, x: Float32, precision: str) -> Float32:
    """What a precision multiplies the weights of an encoding by: integers times one scale for each group."""
    if isinstance(encoding, Plain | FP8) or precision == "exact":
        return x
    limit = np.float32(LARGEST_INTEGER[precision])
    groups = x.reshape(-1, group_size_of(encoding))
    largest = np.abs(groups).max(axis=1, keepdims=True)
    with np.errstate(divide="ignore"):
        inverse = np.where(largest > 0, limit / largest, np.float32(0))
    return (np.rint(groups * inverse) * (largest / limit)).reshape(x.shape)


def relative_error(found: Float32, expected: Float64, typical: float = 0.0) -> float:
    """Of the answer's norm, or of that of so many typical numbers: one sum alone may cancel to almost nothing."""
    norm = max(float(np.linalg.norm(expected)), typical * math.sqrt(expected.size))
    return float(np.linalg.norm(found - expected)) / norm
