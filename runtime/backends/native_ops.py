"""The native backend: the reference with its hot operations done by the kernels of runtime/native."""

from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass

import numpy as np

from formats.config import GELU_TANH, SILU, SWIGLU_CLAMPED
from formats.dtypes import AnyArray, Float32
from formats.layout import Layout
from runtime.backends import native
from runtime.backends.numpy_ops import NumpyOps, Weight
from runtime.experts import Experts
from runtime.store import EmbeddingRows

ACTIVATION_KINDS = {SILU: native.SILU, SWIGLU_CLAMPED: native.SWIGLU_CLAMPED, GELU_TANH: native.GELU_TANH}


@dataclass(frozen=True)
class NativeWeight(Weight):
    """A resident matrix that kernels can read where it lies: offsets count from address base."""

    matrix: native.Matrix
    base: int


class NativeOps(NumpyOps):
    """Ops on native kernels. Results do not depend on threads, chunks, cache or on sequences that share a step."""

    name = "native"

    def __init__(
        self,
        layout: Layout,
        resident: AnyArray,
        embedding: EmbeddingRows,
        experts: Experts,
        pool: ThreadPoolExecutor,
        ctx_size: int,
        *,
        threads: int,
        precision: str,
        level: str | None = None,
    ) -> None:
        """Raises UnsupportedError without the library, or for an encoding or level that it does not have."""
        super().__init__(layout, resident, embedding, experts, pool, ctx_size)
        base = resident.ctypes.data
        for tensor in layout.resident:
            weight = self._weights[tensor.name]
            offsets = {array.name: tensor.offset + array.offset for array in tensor.arrays}
            matrix = native.matrix(weight.encoding, weight.rows, weight.columns, offsets)
            self._weights[tensor.name] = NativeWeight(
                weight.encoding, weight.arrays, weight.rows, weight.columns, matrix, base
            )
        kind, alpha, limit, self._scale_input = layout.model.expert_activation
        activation = native.Activation(ACTIVATION_KINDS[kind], alpha, limit, self._scale_input)
        self._record_layouts = {i: native.expert_layout(layer.record, activation) for i, layer in layout.moe_layers()}
        self._context = native.Context(threads, precision, level)
        self.level = self._context.level
        self.precision = precision

    @property
    def description(self) -> str:
        return f"{self.name} ({self.level}, {self.precision})"

    def linear(self, x: Float32, weight: Weight, bias: Weight | None = None) -> Float32:
        assert isinstance(weight, NativeWeight)
        y = self._context.linear(weight.matrix, weight.base, x)
        return y if bias is None else y + bias.vector()

    def experts(self, layer: int, x: Float32, expert_ids: AnyArray, routing_weights: Float32) -> Float32:
        layout, reader = self._record_layouts[layer], self._experts.native
        assert reader is not None
        x = np.ascontiguousarray(x, np.float32)
        weights = np.ascontiguousarray(routing_weights, np.float32)
        outputs = np.empty((expert_ids.size, x.shape[1]), np.float32)  # [T * k, D]
        distinct, starts, counts, pairs = by_expert(expert_ids)
        place = {expert: i for i, expert in enumerate(distinct)}
        with closing(self._experts.waves(layer, distinct)) as waves:
            for wave in waves:
                rows = [place[key.expert] for key, _ in wave]
                slots = np.array([slot for _, slot in wave])
                arriving = native.Arriving(slots, starts[rows], counts[rows], pairs)
                try:
                    self._context.experts_streamed(layout, reader.handle, arriving, x, weights, outputs)
                except native.ReadFailedError:
                    for key, slot in wave:
                        reader.check(key, slot)
                    raise
        return self._context.weighted_sum(outputs, np.ones_like(weights) if self._scale_input else weights)

    def close(self) -> None:
        """End the kernels' threads."""
        self._context.close()


def by_expert(expert_ids: AnyArray) -> tuple[list[int], AnyArray, AnyArray, AnyArray]:
    """Pairs (token * k + place) sorted by expert: distinct ids, ascending, their first places, their numbers, pairs."""
    flat = expert_ids.reshape(-1)
    pairs = np.argsort(flat, kind="stable")
    distinct, starts, counts = np.unique(flat[pairs], return_index=True, return_counts=True)
    return distinct.tolist(), starts, counts, pairs
