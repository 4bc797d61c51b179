"""What the native backend does row by row or element by element: norms, activations, decays, rotation, the router."""

from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np

from formats.budget import ROPE_TABLES
from formats.config import SIGMOID, SILU, SPARSEMIXER, Rope
from formats.dtypes import AnyArray, Float32
from runtime.backends import abi
from runtime.backends.facts import Routing, ScaledNorm
from runtime.backends.native import address
from runtime.backends.native_weights import Told, require_shapes, with_result
from runtime.backends.numpy_compressed import CompressedOps
from runtime.backends.numpy_ops import Weight, rope_tables
from runtime.backends.numpy_route import choose_by_sparsemixer

MAPS = {SILU: abi.MAP_SILU, SIGMOID: abi.MAP_SIGMOID}


class NativeRowOps(CompressedOps):
    """Operations of numpy_elementwise.py and numpy_route.py by the functions of native/rows.c and route.c."""

    _call: Callable[..., None]  # of native.Context
    _told: Told

    def rms_norm(self, x: Float32, weight: Weight, eps: float, offset: float = 0.0) -> Float32:
        x, y = with_result(x)
        columns = x.shape[-1]
        scale = self._told.place(weight, columns, offset)
        self._call("se_rms_norm", address(x), x.size // columns, columns, scale, eps, address(y))
        return y

    def scaled_norm(self, x: Float32, norm: ScaledNorm) -> Float32:
        columns = x.shape[-1]
        return self.l2_norm(x * self._told.vector(norm.weight, columns, norm.offset), columns * norm.eps, columns**0.5)

    def add_norm(
        self, h: Float32, y: Float32, weight: Weight, eps: float, *, offset: float = 0.0, multiplier: float = 1.0
    ) -> tuple[Float32, Float32]:
        h, x = with_result(h)
        y, total = with_result(y)
        require_shapes("residual stream", (y, h.shape))
        scale = self._told.place(weight, h.shape[1], offset)
        self._call("se_add_norm", address(h), address(y), multiplier, *h.shape, scale, eps, address(total), address(x))
        return total, x

    def l2_norm(self, x: Float32, eps: float, scale: float = 1.0) -> Float32:
        x, y = with_result(x)
        columns = x.shape[-1]
        self._call("se_l2_norm", address(x), x.size // columns, columns, eps, scale, address(y))
        return y

    def silu(self, x: Float32) -> Float32:
        x, y = with_result(x)
        self._call("se_map", abi.MAP_SILU, address(x), x.size, address(y))
        return y

    def sigmoid(self, x: Float32) -> Float32:
        x, y = with_result(x)
        self._call("se_map", abi.MAP_SIGMOID, address(x), x.size, address(y))
        return y

    def gate(self, x: Float32, gate: Float32, kind: str) -> Float32:
        x, y = with_result(x)
        gate = np.ascontiguousarray(gate, np.float32)
        require_shapes("gate", (gate, x.shape))
        self._call("se_gate", MAPS[kind], address(x), address(gate), x.size, address(y))
        return y

    def decay(self, a: Float32, dt_bias: Weight, a_log: Weight) -> Float32:
        a, y = with_result(a)
        bias, log = self._told.place(dt_bias, a.shape[1]), address(self._told.repeated(a_log, a.shape[1]))
        self._call("se_decay", address(a), bias, log, *a.shape, address(y))
        return y

    def softplus(self, x: Float32, bias: Weight | None = None) -> Float32:
        x, y = with_result(x)
        zeros = np.zeros(x.shape[1], np.float32)  # logarithms of 1: a decay is then the softplus less than zero
        added = address(zeros) if bias is None else self._told.place(bias, x.shape[1])
        self._call("se_decay", address(x), added, address(zeros), *x.shape, address(y))
        return np.negative(y, out=y)

    def bounded_decay(self, a: Float32, dt_bias: Weight, a_log: Weight, lower_bound: float) -> Float32:
        rate = self._told.exponents(a_log)[:, None]  # [H, 1]
        by_head = (a + self._told.vector(dt_bias)).reshape(len(a), len(rate), -1)
        bounded = self.sigmoid(rate * by_head) * np.float32(lower_bound)
        return bounded.reshape(a.shape)

    def softmax(self, x: Float32) -> Float32:
        z = x - x.max(axis=-1, keepdims=True)
        y = self.sigmoid(z) / self.sigmoid(-z)  # exp(z), with the same bits on any machine
        total = y[..., :1].copy()
        for column in range(1, x.shape[-1]):
            total += y[..., column : column + 1]
        return y / total

    def rope(self, x: Float32, position: int, rope: Rope) -> Float32:
        x, y = with_result(x)
        cos, sin = rope_tables(rope, position, len(x))
        half, interleaved = rope.dim // 2, rope.interleaved
        self._call("se_rope", address(x), *x.shape, half, interleaved, address(cos), address(sin), address(y))
        return y

    def scale(self, x: Float32, weight: Weight) -> Float32:
        return x * self._told.vector(weight)

    def scale_heads(self, x: Float32, weight: Weight) -> Float32:
        return x * self._told.vector(weight)[:, None]

    def softcap(self, x: Float32, cap: float) -> Float32:
        y = self.sigmoid(x * np.float32(2 / cap))  # tanh(x) is 2 sigmoid(2x) - 1; NumPy's tanh depends on the machine
        y *= np.float32(2)
        y -= np.float32(1)
        y *= np.float32(cap)
        return y

    def route(
        self,
        logits: Float32,
        routing: Routing,
        correction_bias: Weight | None = None,
        expert_scale: Weight | None = None,
    ) -> tuple[AnyArray, Float32]:
        if routing.scoring_func == SPARSEMIXER:  # which no kernel has
            return choose_by_sparsemixer(logits, routing)
        ids = np.empty((len(logits), routing.top_k), np.int64)
        bias = self._told.place(correction_bias, logits.shape[1]) if correction_bias is not None else None
        weights = self._routing_weights_of(logits, routing, bias, ids, False)
        return ids, weights if expert_scale is None else weights * self._told.vector(expert_scale)[ids]

    def route_by_token(
        self, logits: Float32, token_ids: Sequence[int], table: Weight, routing: Routing
    ) -> tuple[AnyArray, Float32]:
        ids = self.experts_of_tokens(token_ids, table, routing.top_k, logits.shape[1])
        return ids, self._routing_weights_of(logits, routing, None, ids, True)

    def _routing_weights_of(
        self, logits: Float32, routing: Routing, bias: object, ids: AnyArray, chosen: bool
    ) -> Float32:
        """Of ids that are chosen, or that this chooses: [T, k]."""
        tokens, num_experts = logits.shape
        weights = np.empty((tokens, routing.top_k), np.float32)
        how = self._told.routing(num_experts, routing, chosen)
        self._call("se_route", how, address(np.ascontiguousarray(logits)), bias, tokens, address(ids), address(weights))
        return weights


@lru_cache(maxsize=ROPE_TABLES)  # all layers of a step ask for the same
def placed_tables(rope: Rope, position: int, tokens: int) -> tuple[int, int, tuple[Float32, Float32]]:
    """Where the tables of a rotation lie, cos and sin, and they themselves."""
    cos, sin = rope_tables(rope, position, tokens)
    return cos.ctypes.data, sin.ctypes.data, (cos, sin)
