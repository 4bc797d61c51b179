"""The native library, a file that the package's build leaves beside its sources; and the affine encoder in it.

runtime/backends/abi.py has the kernels of the same library. Without it everything works, on NumPy only.
"""

import ctypes
from collections.abc import Mapping
from ctypes import c_char_p, c_int32, c_int64, c_void_p
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from formats.dtypes import AnyArray, storage_dtype
from formats.encodings import Affine
from formats.errors import UnsupportedError

ABI_VERSION = 11
LIBRARY_NAMES = ("libse_native.so", "libse_native.dylib")
ENCODED_BITS = (4, 8)  # that the encoder has
DTYPES = {"bf16": 0, "f16": 1, "f32": 2}
_NOT_FINITE, _TOO_LARGE = 4, 5


@cache
def load_library() -> ctypes.CDLL | None:
    """The shared library; None when there is none. Raises UnsupportedError for one of another version or machine."""
    folder = Path(__file__).resolve().parent.parent / "runtime" / "native"
    path = next((folder / name for name in LIBRARY_NAMES if (folder / name).is_file()), None)
    if path is None:
        return None
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise UnsupportedError(f"{path}: cannot be loaded ({error}); build it again") from None
    declare(library, {"se_abi_version": (c_int32, ())})
    if (found := library.se_abi_version()) != ABI_VERSION:
        raise UnsupportedError(f"{path}: ABI version is {found}, expected {ABI_VERSION}; build it again")
    declare(
        library,
        {
            "se_encode_level": (c_char_p, (c_int32,)),
            "se_encode_affine": (
                c_int32,
                (c_char_p, c_int32, c_int64, c_int32, c_int32, c_void_p, c_int64, c_void_p, c_void_p, c_void_p),
            ),
        },
    )
    return library


def declare(library: ctypes.CDLL, signatures: Mapping[str, tuple[Any, tuple[Any, ...]]]) -> None:
    """Set result and argument types, so that no size is guessed."""
    for name, (restype, argtypes) in signatures.items():
        function = getattr(library, name)
        function.restype, function.argtypes = restype, argtypes


@cache
def encoder_levels() -> tuple[str, ...]:
    """Instruction sets of the affine encoder on this machine, best first; none without the library."""
    library = load_library()
    levels: list[str] = []
    while library is not None and (name := library.se_encode_level(len(levels))) is not None:
        levels.append(name.decode())
    return tuple(levels)


def encode_affine(
    encoding: Affine, values: AnyArray, dtype: str, level: str | None = None
) -> dict[str, AnyArray] | None:
    """What encoding.encode gives for float bits [rows, columns] of dtype, to the bit, outside of Python's lock.

    None when a weight is not finite, or a scale or bias too large for scale_dtype.
    """
    library = load_library()
    assert library is not None
    assert values.flags.c_contiguous
    assert values.dtype == storage_dtype(dtype)
    arrays = {spec.name: np.empty(spec.shape, storage_dtype(spec.dtype)) for spec in encoding.arrays(*values.shape)}
    status = library.se_encode_affine(
        level.encode() if level else None, encoding.bits, encoding.group_size,
        DTYPES[dtype], DTYPES[encoding.scale_dtype], values.ctypes.data, values.size // encoding.group_size,
        arrays["codes"].ctypes.data, arrays["scales"].ctypes.data, arrays["biases"].ctypes.data,
    )  # fmt: skip
    if status in (_NOT_FINITE, _TOO_LARGE):
        return None
    assert status == 0
    return arrays
