"""Resident matrices and arrays as the kernels take them."""

from dataclasses import dataclass

import numpy as np

from formats.dtypes import Float32
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
