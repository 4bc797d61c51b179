"""Ling and Ring 3: Kimi Linear whose latent attention knows positions, with gates and decays of full rank.

Source: transformers' modeling_bailing_hybrid.py. Shapes: T tokens of one step, H heads, C linear_width.
"""

from dataclasses import dataclass

from formats.config import BailingHybridConfig
from runtime.backends.facts import Array
from runtime.models.deepseek_v3 import DeepseekV3
from runtime.models.kimi_linear import KimiLinear, Weights


@dataclass(frozen=True)
class BailingHybrid(KimiLinear):
    config: BailingHybridConfig

    decay_projection, gate_projection = "f", "g"

    def _turned(self, x: Array, position: int) -> Array:
        return DeepseekV3._turned(self, x, position)

    def _gated(self, layer: int, x: Array, o: Array) -> Array:
        """Each head of attention by its own gate: [T, H * v_head_dim]."""
        ops, heads = self.ops, self.config.num_attention_heads
        gate = ops.sigmoid(ops.linear(x, ops.weight(f"layers.{layer}.self_attn.g_proj")))  # [T, H]
        return (o.reshape(-1, heads, self.config.v_head_dim) * gate.reshape(-1, heads, 1)).reshape(o.shape)

    def _log_decay(self, f: Array, w: Weights) -> Array:
        bound = self.config.gate_lower_bound
        if bound is None:
            return self.ops.decay(f, w("dt_bias"), w("A_log"))
        return self.ops.bounded_decay(f, w("dt_bias"), w("A_log"), bound)

    def _output_gate(self, g: Array, w: Weights) -> Array:
        return self.ops.sigmoid(g)
