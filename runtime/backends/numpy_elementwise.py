"""What the reference does row by row or element by element: norms, activations, decays (base.py defines them)."""

import math
from collections.abc import Sequence

import numpy as np

from formats.config import CLAMPED_SILU, GELU_TANH, RELU2, SILU, SILU_CLAMPED, SITU, SWIGLU_CLAMPED, Activation
from formats.dtypes import Float32
from runtime.backends.facts import ScaledNorm, Weight
from runtime.backends.numpy_latent import softmax
from runtime.backends.numpy_route import sigmoid


class ElementwiseOps:
    """A part of NumpyOps."""

    def rms_norm(self, x: Float32, weight: Weight, eps: float, offset: float = 0.0) -> Float32:
        mean_square = np.mean(x * x, axis=-1, keepdims=True)
        return x / np.sqrt(mean_square + np.float32(eps)) * (np.float32(offset) + weight.vector())

    def scaled_norm(self, x: Float32, norm: ScaledNorm) -> Float32:
        x = x * (np.float32(norm.offset) + norm.weight.vector())
        return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + np.float32(norm.eps))

    def add_norm(
        self, h: Float32, y: Float32, weight: Weight, eps: float, *, offset: float = 0.0, multiplier: float = 1.0
    ) -> tuple[Float32, Float32]:
        h = h + y * np.float32(multiplier)
        return h, self.rms_norm(h, weight, eps, offset)

    def layer_norm(self, x: Float32, weight: Weight, bias: Weight | None, eps: float) -> Float32:
        centred = x - np.mean(x, axis=-1, keepdims=True)
        variance = np.mean(centred * centred, axis=-1, keepdims=True)
        normed = centred / np.sqrt(variance + np.float32(eps)) * weight.vector()
        return normed if bias is None else normed + bias.vector()

    def l2_norm(self, x: Float32, eps: float, scale: float = 1.0) -> Float32:
        return x / np.sqrt(np.sum(x * x, axis=-1, keepdims=True) + np.float32(eps)) * np.float32(scale)

    def silu(self, x: Float32) -> Float32:
        return x * self.sigmoid(x)

    def sigmoid(self, x: Float32) -> Float32:
        return sigmoid(x)

    def gate(self, x: Float32, gate: Float32, kind: str) -> Float32:
        return x * (self.silu(gate) if kind == SILU else self.sigmoid(gate))

    def clip(self, x: Float32, limit: float) -> Float32:
        return np.clip(x, np.float32(-limit), np.float32(limit))

    def softplus(self, x: Float32, bias: Weight | None = None) -> Float32:
        return np.logaddexp(np.float32(0), x if bias is None else x + bias.vector())

    def decay(self, a: Float32, dt_bias: Weight, a_log: Weight) -> Float32:
        rate = np.exp(a_log.vector())
        return -np.repeat(rate, a.shape[1] // len(rate)) * self.softplus(a + dt_bias.vector())

    def bounded_decay(self, a: Float32, dt_bias: Weight, a_log: Weight, lower_bound: float) -> Float32:
        rate = np.exp(a_log.vector())
        return np.float32(lower_bound) * self.sigmoid(np.repeat(rate, a.shape[1] // len(rate)) * (a + dt_bias.vector()))

    def softmax(self, x: Float32) -> Float32:
        return softmax(x)

    def residual_gate(self, gate: Weight, temperature: float) -> tuple[Float32, Float32]:
        x = gate.vector() / np.float32(temperature)
        added = self.sigmoid(x)
        return np.sqrt(np.maximum(self.sigmoid(-x) * (1 + added), np.float32(1e-3))), added

    def scale(self, x: Float32, weight: Weight) -> Float32:
        return x * weight.vector()

    def scale_heads(self, x: Float32, weight: Weight) -> Float32:
        return x * weight.vector()[:, None]

    def scale_by_position(self, x: Float32, position: int, weight: Weight, bias: Weight) -> Float32:
        logs = np.array([math.log(position + i + 1) for i in range(len(x))], np.float32)
        return x * (weight.vector() * logs[:, None] + bias.vector())[..., None]

    def softcap(self, x: Float32, cap: float) -> Float32:
        return np.tanh(x / np.float32(cap)) * np.float32(cap)

    def scale_streams(self, x: Float32, weight: Weight) -> Float32:
        return x * weight.decode()

    def root_gate(self, x: Float32, y: Float32) -> Float32:
        products = np.moveaxis(x * y, -1, 0)  # summed one after another, on any machine in one order
        d = np.add.reduce(np.ascontiguousarray(products), axis=0)[..., None] * np.float32(x.shape[-1] ** -0.5)
        return self.sigmoid(np.sign(d) * np.sqrt(np.maximum(np.abs(d), np.float32(1e-6))))

    def concatenate(self, arrays: Sequence[Float32], axis: int = 0) -> Float32:
        return np.concatenate(arrays, axis)

    def _activate(self, activation: Activation, gate: Float32 | None, up: Float32) -> Float32:
        """What joins gate and up, element by element; without a gate what is done to up."""
        if gate is None:
            assert activation.kind == RELU2
            return np.square(np.maximum(up, np.float32(0)))
        if activation.kind == SILU:
            return self.silu(gate) * up
        if activation.kind == GELU_TANH:
            inner = np.float32(math.sqrt(2 / math.pi)) * (gate + np.float32(0.044715) * gate**3)
            return np.float32(0.5) * gate * (1 + np.tanh(inner)) * up
        if activation.kind == SITU:
            beta, linear = np.float32(activation.alpha), np.float32(activation.limit)
            return beta * np.tanh(gate / beta) * self.sigmoid(gate) * (linear * np.tanh(up / linear))
        limit = np.float32(activation.limit)
        if activation.kind == CLAMPED_SILU:
            return np.minimum(self.silu(gate), limit) * np.clip(up, -limit, limit)
        gate, up = np.minimum(gate, limit), np.clip(up, -limit, limit)
        if activation.kind == SILU_CLAMPED:
            return self.silu(gate) * up
        assert activation.kind == SWIGLU_CLAMPED
        return gate * self.sigmoid(np.float32(activation.alpha) * gate) * (up + 1)
