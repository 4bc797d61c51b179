"""Residual streams that every half of a layer reads a mixture of: manifold-constrained hyper-connections.

Source: Xie et al.; transformers' DeepseekV4HyperConnection and Glm5NextTextHyperConnection. Shapes: T tokens of one
step, D hidden_size, N streams.
"""

from collections.abc import Sequence

from formats.config import CompressedConfig, Glm5NextConfig
from runtime.backends.base import Ops
from runtime.backends.facts import Array
from runtime.models.norms import unit_norm

Config = CompressedConfig | Glm5NextConfig


def spread(ops: Ops, token_ids: Sequence[int], streams: int) -> Array:
    """The embedding of each token in every stream: [T, N, D]."""
    return ops.concatenate([ops.embed(token_ids)[:, None]] * streams, axis=1)


def collapse(ops: Ops, config: Config, h: Array, name: str) -> tuple[Array, Array, Array]:
    """(what half a layer reads [T, D], how its output enters the streams [T, N], how they mix [T, N, N])."""
    pre, post, comb = weights(ops, config, h, name)
    return ops.collapse_streams(h, pre), post, comb


def weights(ops: Ops, config: Config, h: Array, name: str) -> tuple[Array, Array, Array]:
    """As `collapse`, but what weighs the streams that are read [T, N] instead of what is read."""
    return ops.stream_weights(
        mixes(ops, config, h, name),
        ops.weight(f"{name}.scale"),
        ops.weight(f"{name}.base"),
        config.hc_mult,
        config.hc_sinkhorn_iters,
        config.hc_eps,
    )


def mixes(ops: Ops, config: Config, h: Array, name: str) -> Array:
    """What weights of streams are made of: a projection of all streams together."""
    together = h.reshape(len(h), config.streams_width)
    return ops.linear(unit_norm(ops, together, config.rms_norm_eps), ops.weight(f"{name}.fn"))
