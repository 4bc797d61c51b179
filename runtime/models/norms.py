"""A norm that several models take of queries, keys or streams, and that has no weights."""

from runtime.backends.base import Ops
from runtime.backends.facts import Array


def unit_norm(ops: Ops, x: Array, eps: float) -> Array:
    """x / sqrt(mean(x^2) + eps) over the last axis."""
    d = x.shape[-1]
    return ops.l2_norm(x, d * eps, d**0.5)
