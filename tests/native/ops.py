"""Operations of the native backend at every level and number of threads, beside those of the reference."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
from hypothesis import strategies as st

from formats.dtypes import Float32
from formats.encodings import Plain
from formats.kernels import matrix as matrix_of
from runtime.backends import native
from runtime.backends.native_ops import NativeOps
from runtime.backends.native_weights import NativeWeight
from runtime.backends.numpy_ops import NumpyOps
from tests.containers import make_layout

Float64 = npt.NDArray[np.float64]
CTX_SIZE = 500
NOTHING: Any = None
LAYOUT = replace(make_layout(), layers=(None,) * 4, resident=())  # the tests bring their own weights
RESIDENT = np.zeros(LAYOUT.resident_bytes, np.uint8)
REFERENCE = NumpyOps(LAYOUT, RESIDENT, NOTHING, NOTHING, NOTHING, CTX_SIZE, CTX_SIZE)
seeds = st.integers(0, 2**32 - 1)


def every_ops(threads: Sequence[int] = (1, 2, 3)) -> Iterator[NativeOps]:
    """Every level with every number of threads, one after another."""
    with ThreadPoolExecutor(1) as pool:
        for level in native.levels():
            for n in threads:
                arguments = (LAYOUT, RESIDENT, NOTHING, NOTHING, pool, CTX_SIZE, CTX_SIZE)
                ops = NativeOps(*arguments, threads=n, precision="exact", level=level)
                yield ops
                ops.close()


def the_same(compute: Callable[[NativeOps], Sequence[Any]]) -> Sequence[Any]:
    """What compute makes of all ops, which is the same to the bit."""
    expected, *others = [compute(ops) for ops in every_ops()]
    for other in others:
        for a, b in zip(expected, other, strict=True):
            assert np.array_equal(a, b, equal_nan=True)
    return expected


def normal(seed: int, *shape: int, scale: float = 1.0) -> Float32:
    return np.random.default_rng([seed, *shape]).standard_normal(shape, np.float32) * np.float32(scale)


def weight(values: Float32) -> NativeWeight:
    """A resident tensor of these values, which must outlive it."""
    matrix = np.atleast_2d(values)
    rows, columns = matrix.shape
    place = matrix_of(Plain("f32"), rows, columns, {"weight": values.ctypes.data - RESIDENT.ctypes.data})
    return NativeWeight(Plain("f32"), {"weight": matrix}, rows, columns, "a weight", place)


def near(found: Float32, expected: npt.NDArray[Any], tolerance: float = 1e-5) -> bool:
    """Error relative to the largest value."""
    return bool(np.abs(found - expected).max() <= tolerance * max(1.0, np.abs(expected).max()))


def cuts(seed: int, tokens: int) -> list[slice]:
    """Steps that together are all the tokens."""
    rng = np.random.default_rng(seed)
    places = {int(rng.integers(0, tokens)) for _ in range(rng.integers(0, 6))}
    return [slice(a, b) for a, b in pairwise(sorted({0, tokens, *places}))]
