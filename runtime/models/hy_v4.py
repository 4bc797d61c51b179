"""Hunyuan 4: DeepSeek-V3.2's attention to chosen tokens, with sinks and gates, on residual streams that stay apart.

Layers share choices of tokens, as GLM-5's do.
Source: transformers' modeling_hy_v4_vl.py (text part); its modeling_hy_v4.py turns other pairs than the publisher's
ports do (docs/LEARNED.md 117). Shapes: T tokens of one step, D hidden_size, H heads, N streams.
"""

from dataclasses import dataclass

from formats.config import SIGMOID, Activation, HyV4Config
from runtime.backends.facts import Array, Weight
from runtime.models.streams import OnStreams, gathered, mixes


@dataclass(frozen=True)
class HyV4(OnStreams):
    config: HyV4Config

    # ---- streams

    def _collapsed(self, h: Array, name: str) -> tuple[Array, Array, None]:
        c, ops = self.config, self.ops
        scale, base = ops.weight(f"{name}.scale"), ops.weight(f"{name}.base")
        gates = ops.stream_gates(mixes(ops, c, h, name), scale, base, 0.0)  # [T, 2N]: before and after
        pre, post = gates[:, : c.hc_mult] + c.hc_eps, gates[:, c.hc_mult :] * c.hc_magnitude + c.hc_eps
        return ops.collapse_streams(h, pre), post, None

    def _gathered(self, h: Array) -> Array:
        return gathered(self.ops, self.config, h)

    # ---- attention

    @property
    def _latent_norm_eps(self) -> float:
        return self.config.rms_norm_eps

    @property
    def _index_norm_eps(self) -> float:
        return self.config.rms_norm_eps

    def _sinks(self, layer: int) -> Weight:
        return self.ops.weight(f"layers.{layer}.self_attn.sinks")

    def _gated(self, layer: int, x: Array, o: Array) -> Array:
        return self.ops.gate(o, self.ops.linear(x, self.ops.weight(f"layers.{layer}.self_attn.g_proj")), SIGMOID)

    def _index_turned(self, layer: int, x: Array, position: int) -> Array:
        """The last values of a head, where DeepSeek's indexer turns the first."""
        still = x.shape[2] - self.config.rotary_dim
        turned = super()._index_turned(layer, x[:, :, still:], position)
        return self.ops.concatenate([x[:, :, :still], turned], axis=2)

    # ---- feed forward

    def _mlp(self, name: str, x: Array) -> Array:
        """Of a dense layer or a shared expert, whose gate and up are not cut."""
        gate, up, down = (self.ops.weight(f"{name}.{part}_proj") for part in ("gate", "up", "down"))
        return self.ops.feed_forward(x, gate, up, down, Activation())
