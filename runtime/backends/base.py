"""Ops: all that a model may call, as a Protocol with shapes.

Shapes: T tokens of one step, H heads, d width of a head, D hidden_size, k experts per token. Arrays are float32 in
meaning and opaque in type: NumPy arrays here, lazy ones elsewhere; models only slice, reshape, add and multiply them.
A cache or state is changed by no one: an operation returns the new one.
"""

from collections.abc import Sequence
from typing import Any, Protocol, TypeAlias

from formats.config import Rope

Array: TypeAlias = Any  # of the backend: supports + - * with broadcasting, slicing, .shape and .reshape
State: TypeAlias = Any  # of the backend: a KV cache, or an Array
Weight: TypeAlias = Any  # of the backend: a resident tensor in its encoding


class Ops(Protocol):
    """One backend. The NumPy implementation (numpy_ops.py) is the definition of every operation."""

    name: str

    def weight(self, name: str) -> Weight:
        """The resident tensor of that name."""

    def embed(self, token_ids: Sequence[int]) -> Array:
        """Rows of the token embedding: [T, D]."""

    def linear(self, x: Array, weight: Weight) -> Array:
        """x @ weight.T: [T, columns], weight [rows, columns] -> [T, rows]."""

    def rms_norm(self, x: Array, weight: Weight, eps: float, offset: float = 0.0) -> Array:
        """x / sqrt(mean(x^2) + eps) * (offset + weight) over the last axis; weight [last axis]."""

    def l2_norm(self, x: Array, eps: float) -> Array:
        """x / sqrt(sum(x^2) + eps) over the last axis."""

    def silu(self, x: Array) -> Array:
        """x * sigmoid(x)."""

    def sigmoid(self, x: Array) -> Array:
        """1 / (1 + exp(-x))."""

    def decay(self, a: Array, dt_bias: Weight, a_log: Weight) -> Array:
        """Log of the DeltaNet's decay, -exp(a_log) * softplus(a + dt_bias): [T, H]."""

    def repeat_heads(self, x: Array, times: int) -> Array:
        """[T, H, d] -> [T, H * times, d], each head `times` in a row."""

    def concatenate(self, arrays: Sequence[Array]) -> Array:
        """Join along the first axis."""

    def rope(self, x: Array, position: int, rope: Rope) -> Array:
        """Rotary embedding of x [T, H, d] at position, position + 1, ...: the first rope.dim values are turned.

        Pair j is (j, j + dim/2), or (2j, 2j + 1) if rope.interleaved; it turns by position * rope.inv_freq[j] and
        grows by rope.attention_factor. Values stay in their places.
        """

    def new_kv_cache(self, num_heads: int, head_dim: int) -> State:
        """An empty cache of keys and values."""

    def attention(self, q: Array, k: Array, v: Array, cache: State, scale: float) -> tuple[Array, State]:
        """Causal softmax attention of q [T, Hq, d] over the cache and k, v [T, Hkv, d]: ([T, Hq, d], new cache)."""

    def zeros(self, shape: tuple[int, ...]) -> Array:
        """An empty convolution or recurrent state."""

    def causal_conv1d(self, x: Array, weight: Weight, state: Array) -> tuple[Array, Array]:
        """Depthwise convolution of x [T, C] with weight [C, K] after state [K-1, C]: ([T, C], last K-1 inputs)."""

    def gated_delta_rule(
        self, q: Array, k: Array, v: Array, log_decay: Array, beta: Array, state: Array
    ) -> tuple[Array, Array]:
        """Recurrence over T: q, k [T, H, dk], v [T, H, dv], log_decay, beta [T, H], state [H, dk, dv].

        Per token: S *= exp(log_decay); S += outer(k, beta * (v - S^T k)); o = S^T q. Returns (o [T, H, dv], S).
        Source: Yang et al., Gated Delta Networks (2412.06464); transformers' torch_recurrent_gated_delta_rule.
        """

    def route(self, logits: Array, top_k: int, *, normalize: bool) -> tuple[Array, Array]:
        """Softmax, then the top_k largest: ids [T, k] and routing_weights [T, k], largest first; sum 1 if normalize."""

    def experts(self, layer: int, x: Array, expert_ids: Array, routing_weights: Array) -> Array:
        """Sum over k, in that order, of routing_weights * expert(x): x [T, D] -> [T, D]. Reads the experts."""
