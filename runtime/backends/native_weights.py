"""Resident matrices and arrays as the kernels take them."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from formats.dtypes import AnyArray, Float32
from formats.errors import FormatError
from formats.kernels import Matrix
from runtime.backends.numpy_ops import Weight


@dataclass(frozen=True)
class NativeWeight(Weight):
    """A resident matrix that kernels can read where it lies: offsets count from the start of resident memory."""

    matrix: Matrix


def native_weight(weight: Weight) -> NativeWeight:
    """A weight of this backend."""
    assert isinstance(weight, NativeWeight)
    return weight


def with_result(x: Float32) -> tuple[Float32, Float32]:
    """x as kernels take it, and an array of its shape for what they make of it."""
    x = np.ascontiguousarray(x, np.float32)
    return x, np.empty(x.shape, np.float32)


def require_size(weights: Mapping[str, Weight], weight: Weight, what: str, found: int, expected: int) -> None:
    """Raise FormatError where an index gives a weight another size than C will read, which config.json decides."""
    if found != expected:
        name = next((name for name, known in weights.items() if known is weight), "a weight")
        raise FormatError(f"{name}: has {found} {what}, config.json asks for {expected}")


def require_shapes(what: str, *found_and_expected: tuple[AnyArray, tuple[int, ...]]) -> None:
    """Raise FormatError where an index gives matrices other rows than C will read of what they make."""
    for array, expected in found_and_expected:
        if array.shape != expected:
            raise FormatError(f"{what}: an input is {list(array.shape)}, config.json asks for {list(expected)}")
