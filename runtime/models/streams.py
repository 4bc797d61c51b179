"""Residual streams that every half of a layer reads a mixture of: hyper-connections, whose streams mix or stay apart.

Source: Xie et al.; transformers' DeepseekV4HyperConnection, Glm5NextTextHyperConnection and HYV4HyperConnection.
Shapes: T tokens of one step, D hidden_size, N streams.
"""

from abc import abstractmethod
from collections.abc import Sequence as Items
from dataclasses import dataclass

from formats.config import CompressedConfig, Glm5NextConfig, HyV4Config
from runtime.backends.base import Ops
from runtime.backends.facts import Array, Wanted
from runtime.models.deepseek_v3 import DeepseekV3
from runtime.models.norms import unit_norm
from runtime.session import Sequence

Config = CompressedConfig | Glm5NextConfig | HyV4Config


def spread(ops: Ops, token_ids: Items[int], streams: int) -> Array:
    """The embedding of each token in every stream: [T, N, D]."""
    return ops.concatenate([ops.embed(token_ids)[:, None]] * streams, axis=1)


def collapse(ops: Ops, config: CompressedConfig | Glm5NextConfig, h: Array, name: str) -> tuple[Array, Array, Array]:
    """(what half a layer reads [T, D], how its output enters the streams [T, N], how they mix [T, N, N])."""
    pre, post, comb = weights(ops, config, h, name)
    return ops.collapse_streams(h, pre), post, comb


def weights(ops: Ops, config: CompressedConfig | Glm5NextConfig, h: Array, name: str) -> tuple[Array, Array, Array]:
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


def gathered(ops: Ops, config: CompressedConfig | HyV4Config, h: Array) -> Array:
    """All streams in one behind the last layer, each weighed by its gate: [T, D]."""
    scale, base = ops.weight("hc_head.scale"), ops.weight("hc_head.base")
    return ops.collapse_streams(h, ops.stream_gates(mixes(ops, config, h, "hc_head"), scale, base, config.hc_eps))


@dataclass(frozen=True)
class OnStreams(DeepseekV3):
    """The layers of DeepSeek-V3 on residual streams."""

    config: Glm5NextConfig | HyV4Config

    def forward(self, token_ids: Items[int], sequences: Items[Sequence], wanted: Wanted = None) -> Array:
        """Tokens of one step, sequence after sequence -> last hidden states [T, D]; replaces the states."""
        c, ops = self.config, self.ops
        h = spread(ops, token_ids, c.hc_mult)  # [T, N, D]
        selections: list[Array | None] = [None for _ in sequences]  # of the last indexer, which layers may share
        for layer in range(c.num_hidden_layers):
            x, post, comb = self._collapsed(h, f"layers.{layer}.attn_hc")
            y = self._attention(layer, self._norm(x, f"layers.{layer}.input_layernorm"), sequences, selections)
            h = ops.expand_streams(h, y, post, comb)
            if layer + 1 == c.num_hidden_layers:
                h = ops.rows(h, wanted)
            x, post, comb = self._collapsed(h, f"layers.{layer}.ffn_hc")
            x = self._norm(x, f"layers.{layer}.post_attention_layernorm")
            y = self._moe(layer, x) if c.has_experts(layer) else self._mlp(f"layers.{layer}.mlp", x)
            h = ops.expand_streams(h, y, post, comb)
        return self._norm(self._gathered(h), "norm")

    @abstractmethod
    def _collapsed(self, h: Array, name: str) -> tuple[Array, Array, Array | None]:
        """(what half a layer reads [T, D], how its output enters the streams [T, N], how they mix, if they do)."""

    @abstractmethod
    def _gathered(self, h: Array) -> Array:
        """All streams in one behind the last layer: [T, D]."""
