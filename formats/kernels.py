"""How a matrix of a container is told to the native kernels, and how fast those multiply by it on this machine."""

import ctypes
import time
from collections.abc import Callable
from ctypes import POINTER, c_char_p, c_int32, c_int64, c_void_p
from typing import NamedTuple

import numpy as np

from formats.dtypes import storage_dtype
from formats.encodings import (
    FP8,
    IQ4NL,
    MXFP4,
    NVFP4,
    Q2K,
    Q3K,
    Q4K,
    Q6K,
    Affine,
    Encoding,
    Levels,
    Plain,
    Symmetric,
    ZeroPoint,
)
from formats.errors import UnsupportedError
from formats.native import DTYPES, declare, load_library
from formats.record import LINEAR_BIAS, place

PRECISIONS = {"exact": 3, "close": 2, "fast": 1}  # enum se_precision
DEFAULT_PRECISION = "close"  # the fastest that cannot be told from the reference (docs/LEARNED.md 70)
PRODUCT_S = 0.25  # that products are measured for
ARENA_BYTES = 128 << 20  # that they take their matrices from, more than caches hold
MATRICES = 8  # of a native call at most
NORMAL = 0x3C  # bytes of it are ordinary numbers in every float format: others may be slower
_SPIN_US = 50


class Matrix(ctypes.Structure):
    """se_matrix: where the arrays of a matrix lie, in bytes from the start of its record or tensor."""

    _fields_ = (
        ("rows", c_int64),
        ("columns", c_int64),
        ("weight_offset", c_int64),
        ("scales_offset", c_int64),
        ("biases_offset", c_int64),
        ("linear_bias_offset", c_int64),
        ("encoding", c_int32),
        ("dtype", c_int32),
        ("bits", c_int32),
        ("group_size", c_int32),
        ("linear_bias_dtype", c_int32),
        ("reserved", c_int32),
    )

    def moved(self, nbytes: int) -> "Matrix":
        """The same matrix further on."""
        other = Matrix.from_buffer_copy(self)
        other.weight_offset += nbytes
        other.scales_offset += nbytes
        other.biases_offset += nbytes
        if other.linear_bias_offset >= 0:
            other.linear_bias_offset += nbytes
        return other


def matrix(
    encoding: Encoding,
    rows: int,
    columns: int,
    offsets: dict[str, int],
    linear_bias: str | None = None,
) -> Matrix:
    """Describe a matrix whose arrays begin at the offsets. Raises UnsupportedError for an encoding without a kernel."""
    kind, dtype, bits, group_size, arrays = _parameters(encoding)
    weight, scales, biases = (offsets[name] if name else 0 for name in arrays)
    return Matrix(
        rows, columns, weight, scales, biases, offsets.get(LINEAR_BIAS, -1), kind, DTYPES[dtype], bits,
        group_size, DTYPES[linear_bias] if linear_bias is not None else 0, 0,
    )  # fmt: skip


class Parameters(NamedTuple):
    """How se_matrix says what an encoding is, and which of its arrays stand for weight, scales and biases."""

    kind: int  # enum se_encoding
    dtype: str
    bits: int
    group_size: int
    arrays: tuple[str, str, str]


def _parameters(encoding: Encoding) -> Parameters:
    match encoding:
        case Plain():
            return Parameters(0, encoding.id, 0, 0, ("weight", "", ""))
        case Affine(bits, group_size, dtype):
            return Parameters(1, dtype, bits, group_size, ("codes", "scales", "biases"))
        case Symmetric(bits, group_size, dtype):
            return Parameters(2, dtype, bits, group_size, ("codes", "scales", ""))
        case ZeroPoint(bits, group_size, dtype):
            return Parameters(3, dtype, bits, group_size, ("codes", "scales", "zeros"))
        case MXFP4():
            return Parameters(4, "f32", 4, 32, ("codes", "scales", ""))
        case NVFP4(how):
            return Parameters(5 if how == "multiply" else 6, "f32", 4, 16, ("codes", "scales", "global"))
        case FP8(group_size, dtype):
            return Parameters(7, dtype, 8, group_size, ("codes", "scales", ""))
        case Q4K():  # and Q5K
            return Parameters(8, "f16", encoding.bits, 32, ("codes", "scales", "d"))
        case Q2K():
            return Parameters(10, "f16", 2, 16, ("codes", "scales", "d"))
        case Q3K():
            return Parameters(11, "f16", 3, 16, ("codes", "scales", "d"))
        case Q6K():
            return Parameters(9, "f16", 6, 16, ("codes", "scales", "d"))
        case IQ4NL():
            return Parameters(12, "f16", 4, 32, ("codes", "scales", ""))
        case Levels(name):
            kind = 13 + ("iq4_xs", "iq3_s", "iq3_xxs", "iq2_xxs", "iq2_xs", "iq1_s", "iq1_m").index(name)
            return Parameters(kind, "f16", encoding.bits, encoding.group_size, ("codes", "scales", "d"))
    raise UnsupportedError(f"encoding {encoding.id} has no native kernel")


def product_rate(encoding: Encoding, rows: int, columns: int, threads: int) -> float:
    """Bytes of weights per second when one token is multiplied by matrices [rows, columns], each from memory.

    By the native kernels in their default precision, or by NumPy where those were not built or have no such encoding.
    """
    arrays = place(encoding.arrays(rows, columns))
    nbytes = sum(array.nbytes for array in arrays)
    stride = -(-(arrays[-1].offset + arrays[-1].nbytes) // 64) * 64
    library = load_library()
    try:
        at_zero = matrix(encoding, rows, columns, {array.name: array.offset for array in arrays})
    except UnsupportedError:
        library = None
    if library is None:
        made_up = {
            array.name: np.full(array.nbytes, NORMAL, np.uint8).view(storage_dtype(array.dtype)).reshape(array.shape)
            for array in arrays
        }
        x = np.ones(columns, np.float32)
        with np.errstate(all="ignore"):
            return nbytes / _seconds(lambda _: encoding.decode(made_up) @ x)
    declare(
        library,
        {
            "se_open": (c_void_p, (c_char_p, c_int64, c_int64)),
            "se_close": (None, (c_void_p,)),
            "se_linear": (
                c_int32,
                (c_void_p, c_int32, POINTER(Matrix), c_int64, c_void_p, c_void_p, c_int64, c_void_p),
            ),
        },
    )
    memory = np.full(max(ARENA_BYTES, MATRICES * stride), NORMAL, np.uint8)
    count = len(memory) // (MATRICES * stride)  # of calls before a matrix comes again
    x, y = np.ones(columns, np.float32), np.empty(MATRICES * rows, np.float32)
    matrices = (Matrix * MATRICES)(*(at_zero.moved(nth * stride) for nth in range(MATRICES)))
    context = library.se_open(None, threads, _SPIN_US)
    try:

        def multiply(nth: int) -> None:
            base = memory.ctypes.data + nth % count * MATRICES * stride
            status = library.se_linear(
                context, PRECISIONS[DEFAULT_PRECISION], matrices, MATRICES, base, x.ctypes.data, 1, y.ctypes.data
            )
            assert status == 0

        return MATRICES * nbytes / _seconds(multiply)
    finally:
        library.se_close(context)


def _seconds(work: Callable[[int], object]) -> float:
    """Of one call of work(0), work(1)...; the first ones warm up."""
    began, calls = 0.0, -2
    while calls < 1 or time.perf_counter() - began < PRODUCT_S:
        if calls == 0:
            began = time.perf_counter()
        work(calls + 2)
        calls += 1
    return (time.perf_counter() - began) / calls
