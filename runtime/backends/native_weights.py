"""Resident matrices and vectors as the kernels take them."""

import ctypes
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

import numpy as np

from formats.config import (
    CHOSEN_SIGMOID,
    CLAMPED_SILU,
    GELU_TANH,
    RELU2,
    SIGMOID,
    SILU,
    SILU_CLAMPED,
    SITU,
    SOFTMAX,
    SQRT_SOFTPLUS,
    SWIGLU_CLAMPED,
    Activation,
)
from formats.dtypes import AnyArray, Float32
from formats.encodings import Plain
from formats.errors import FormatError, UnsupportedError
from formats.kernels import Matrix
from formats.kernels import matrix as matrix_of
from runtime.backends import abi
from runtime.backends.facts import Routing, ScaledNorm
from runtime.backends.native import Factors, address
from runtime.backends.numpy_ops import Weight

SCORING = {
    SOFTMAX: abi.SCORE_SOFTMAX,
    SIGMOID: abi.SCORE_SIGMOID,
    CHOSEN_SIGMOID: abi.SCORE_CHOSEN_SIGMOID,
    SQRT_SOFTPLUS: abi.SCORE_SQRT_SOFTPLUS,
}
ACTIVATION_KINDS = {
    SILU: abi.SILU,
    SWIGLU_CLAMPED: abi.SWIGLU_CLAMPED,
    GELU_TANH: abi.GELU_TANH,
    SILU_CLAMPED: abi.SILU_CLAMPED,
    SITU: abi.SITU,
    RELU2: abi.RELU2,
    CLAMPED_SILU: abi.CLAMPED_SILU,
}


@dataclass(frozen=True, eq=False)
class NativeWeight(Weight):
    """A resident matrix that kernels can read where it lies: offsets count from the start of resident memory."""

    name: str
    matrix: Matrix


def native_weight(weight: Weight) -> NativeWeight:
    """A weight of this backend."""
    assert isinstance(weight, NativeWeight)
    return weight


class Told:
    """What kernels are told of weights: made at first use and kept, as what is made anew in every step costs most of
    what stands between kernels (docs/LEARNED.md 66).

    Keys are the weights themselves, so none can be gone, and its place another's, while something of it is kept.
    """

    def __init__(self, activation: Activation) -> None:
        """activation: that of the model's experts, which dense layers and shared experts have, too."""
        self.factors = cache(_factors)
        self.feed_forward = cache(partial(_feed_forward, activation))
        self.routing: Callable[[int, Routing, bool], abi.Routing] = cache(_routing)
        self.vector = vector = cache(_vector)
        self.place = cache(lambda *which: _place(vector(*which)))  # `vector` keeps what lies there
        self.expert_norm = cache(self._expert_norm)
        self.repeated = cache(_repeated)
        self.taps = cache(_taps)
        self.exponents = cache(_exponents)
        self.row_groups = cache(_row_groups)

    def _expert_norm(self, norm: ScaledNorm, columns: int) -> abi.ExpertNorm:
        """Of what experts give, `columns` values."""
        return abi.ExpertNorm(self.place(norm.weight, columns, norm.offset), norm.eps, 0)


def _factors(weights: tuple[Weight, ...], biases: tuple[Weight, ...] | None = None) -> Factors:
    """Matrices that are multiplied by one input, and what is added to the products."""
    matrices = [native_weight(weight).matrix for weight in weights]
    if biases is not None:
        matrices = [_with_bias(matrix, native_weight(bias)) for matrix, bias in zip(matrices, biases, strict=True)]
    return Factors.of(matrices)


def _with_bias(matrix: Matrix, bias: NativeWeight) -> Matrix:
    require_size(bias, "values", bias.rows * bias.columns, matrix.rows)
    if not isinstance(bias.encoding, Plain):
        raise UnsupportedError(f"{bias.name}: is {bias.encoding.id}, expected plain values")
    other = Matrix.from_buffer_copy(matrix)
    other.linear_bias_offset, other.linear_bias_dtype = bias.matrix.weight_offset, bias.matrix.dtype
    return other


def native_activation(activation: Activation) -> abi.Activation:
    """An activation as kernels are told of it."""
    kind, alpha, limit, scale_input = activation
    return abi.Activation(ACTIVATION_KINDS[kind], alpha, limit, scale_input)


def _feed_forward(
    experts: Activation, gate: Weight | None, up: Weight, down: Weight, activation: Activation | None = None
) -> abi.ExpertLayout:
    """As an expert whose record is the resident memory, and whose input nothing scales."""
    told = native_activation((activation or experts)._replace(scale_input=False))
    first = Matrix() if gate is None else native_weight(gate).matrix
    return abi.ExpertLayout(first, native_weight(up).matrix, native_weight(down).matrix, told)


def _routing(num_experts: int, routing: Routing, chosen: bool) -> abi.Routing:
    """chosen: whether experts are given, and only their weights asked for."""
    return abi.Routing(
        num_experts, routing.top_k, routing.n_group, routing.topk_group, SCORING[routing.scoring_func],
        routing.norm_topk_prob, routing.routed_scaling_factor, chosen,
    )  # fmt: skip


def _vector(weight: Weight, length: int | None = None, offset: float = 0.0) -> Float32:
    """offset + weight as float32; as many as C will read, or None where NumPy looks. Raises FormatError."""
    if length is not None:
        require_size(weight, "values", weight.rows * weight.columns, length)
    return np.float32(offset) + weight.vector()


def _place(values: Float32) -> int:
    return ctypes.addressof(address(values))


def _repeated(weight: Weight, channels: int) -> Float32:
    """A vector's values, each for as many channels as it has."""
    values = weight.vector()
    repeated = np.repeat(values, channels // max(1, len(values)))
    require_size(weight, "values after their repetition", len(repeated), channels)
    return repeated


def _taps(weight: Weight, dilation: int, channels: int) -> Float32:
    """A convolution's weights [C, K] as [(K - 1) * dilation + 1, C], zeros between them."""
    require_size(weight, "channels", weight.rows, channels)
    taps = np.zeros(((weight.columns - 1) * dilation + 1, weight.rows), np.float32)
    taps[::dilation] = weight.decode().T
    return taps


def _exponents(weight: Weight) -> Float32:
    """exp of a vector by the C library, whose exp does not depend on the instruction set."""
    return np.array([math.exp(x) for x in weight.vector()], np.float32)


def _row_groups(weight: Weight, groups: int, base: int) -> list[Matrix]:
    """A matrix cut into groups of rows, each a matrix in the resident memory that begins at address base."""
    rows = weight.rows // groups
    places = [
        {name: array[g * rows :].ctypes.data - base for name, array in weight.arrays.items()} for g in range(groups)
    ]
    return [matrix_of(weight.encoding, rows, weight.columns, offsets) for offsets in places]


def with_result(x: Float32) -> tuple[Float32, Float32]:
    """x as kernels take it, and an array of its shape for what they make of it."""
    x = np.ascontiguousarray(x, np.float32)
    return x, np.empty(x.shape, np.float32)


def require_size(weight: Weight, what: str, found: int, expected: int) -> None:
    """Raise FormatError where an index gives a weight another size than C will read, which config.json decides."""
    if found != expected:
        raise FormatError(f"{native_weight(weight).name}: has {found} {what}, config.json asks for {expected}")


def require_shapes(what: str, *found_and_expected: tuple[AnyArray, tuple[int, ...]]) -> None:
    """Raise FormatError where an index gives matrices other rows than C will read of what they make."""
    for array, expected in found_and_expected:
        if array.shape != expected:
            raise FormatError(f"{what}: an input is {list(array.shape)}, config.json asks for {list(expected)}")
