"""Element types of tensors on disk and their exact meaning as float32.

NumPy has no bfloat16: its bits are kept in uint16. All storage is little-endian.
"""

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from formats.errors import UnsupportedError

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]
AnyArray = npt.NDArray[np.generic]

# A dtype's name in the container -> the NumPy type that holds its bits.
DTYPES: Mapping[str, np.dtype[np.generic]] = {
    "bf16": np.dtype("<u2"),
    "f16": np.dtype("<f2"),
    "f32": np.dtype("<f4"),
    "u32": np.dtype("<u4"),
    "u8": np.dtype("u1"),
    "i8": np.dtype("i1"),
}
FLOAT_DTYPES = ("bf16", "f16", "f32")


def storage_dtype(name: str) -> np.dtype[np.generic]:
    """The NumPy dtype that holds the bits of dtype `name`. Raises UnsupportedError for an unknown name."""
    if name not in DTYPES:
        raise UnsupportedError(f"dtype is {name!r}, expected one of {', '.join(DTYPES)}")
    return DTYPES[name]


def to_float32(array: AnyArray, dtype: str) -> Float32:
    """Bits of a float dtype, any shape -> float32 of the same shape; exact for every value."""
    if dtype == "bf16":
        bits = array.astype(np.uint32)
        bits <<= 16
        return bits.view(np.float32)
    if dtype in FLOAT_DTYPES:
        return array.astype(np.float32, copy=False)
    raise UnsupportedError(f"dtype is {dtype!r}, expected one of {', '.join(FLOAT_DTYPES)}")


def from_float32(values: Float32, dtype: str) -> AnyArray:
    """float32, any shape -> bits of a float dtype, rounded to nearest, ties to even; NaN stays NaN."""
    if dtype == "bf16":
        bits = values.view(np.uint32)
        rounded = (bits + (np.uint32(0x7FFF) + ((bits >> 16) & 1))) >> 16
        return np.where(np.isnan(values), np.uint32(0x7FC0), rounded).astype(np.uint16)
    if dtype in FLOAT_DTYPES:
        return values.astype(DTYPES[dtype])
    raise UnsupportedError(f"dtype is {dtype!r}, expected one of {', '.join(FLOAT_DTYPES)}")
