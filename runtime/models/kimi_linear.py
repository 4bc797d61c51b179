"""Kimi Linear: Kimi Delta Attention in three layers of four, latent attention without positions in the fourth.

Its decay is of each key channel, where that of a gated DeltaNet is of a head. Feed-forward layers and latent attention
are DeepSeek-V3's.
Source: transformers' modeling_kimi_linear.py. Shapes: T tokens of one step, D hidden_size, H heads, d width of a head.
"""

from collections.abc import Callable
from collections.abc import Sequence as Items
from dataclasses import dataclass
from typing import TypeAlias

from formats.config import LINEAR_ATTENTION, KimiLinearConfig
from runtime.backends.facts import Array, State, Weight
from runtime.models.deepseek_v3 import DeepseekV3
from runtime.session import Sequence

Weights: TypeAlias = Callable[[str], Weight]  # of a layer, by name
QK_NORM_EPS = 1e-6  # of queries and keys, whatever rms_norm_eps is


@dataclass(frozen=True)
class KimiLinear(DeepseekV3):
    config: KimiLinearConfig

    decay_projection, gate_projection = "f_a", "g_a"

    def _new_state(self, layer_type: str) -> State:
        if layer_type != LINEAR_ATTENTION:
            return super()._new_state(layer_type)
        c = self.config
        convolutions = [self.ops.zeros((c.linear_conv_kernel_dim - 1, c.linear_width)) for _ in "qkv"]
        return convolutions, self.ops.new_delta_state(c.linear_num_heads, c.linear_head_dim, c.linear_head_dim)

    def _turned(self, x: Array, position: int) -> Array:
        """As it is: no layer knows positions."""
        return x

    def _attention(self, layer: int, x: Array, sequences: Items[Sequence], selections: list[Array | None]) -> Array:
        if self.config.layer_types[layer] == LINEAR_ATTENTION:
            return self._delta_attention(layer, x, sequences)
        return super()._attention(layer, x, sequences, selections)

    def _delta_attention(self, layer: int, x: Array, sequences: Items[Sequence]) -> Array:
        c, ops = self.config, self.ops
        heads, d = c.linear_num_heads, c.linear_head_dim

        def w(tensor: str) -> Weight:
            return ops.weight(f"layers.{layer}.self_attn.{tensor}")

        parts = ("q", "k", "v", self.decay_projection, self.gate_projection, "b")
        *qkv, f, g, b = ops.linears(x, [w(f"{part}_proj") for part in parts])
        beta = ops.sigmoid(b)  # [T, H]
        log_decay = self._log_decay(f, w).reshape(-1, heads, d)
        gate = self._output_gate(g, w).reshape(-1, heads, d)
        outputs = []
        for s in sequences:
            convolutions, recurrent = s.states[layer]
            mixed = [
                ops.causal_conv1d(y[s.rows], w(f"{part}_conv1d"), before)
                for part, y, before in zip("qkv", qkv, convolutions, strict=True)
            ]
            q, k, v = (ops.silu(y).reshape(-1, heads, d) for y, _ in mixed)
            q, k = ops.l2_norm(q, QK_NORM_EPS, d**-0.5), ops.l2_norm(k, QK_NORM_EPS)
            output, recurrent = ops.gated_delta_rule(q, k, v, log_decay[s.rows], beta[s.rows], recurrent)
            s.states[layer] = ([after for _, after in mixed], recurrent)
            outputs.append(output)  # [tokens, H, d]
        o = ops.rms_norm(ops.concatenate(outputs), w("o_norm"), c.rms_norm_eps) * gate
        return ops.linear(o.reshape(-1, heads * d), w("o_proj"))

    def _log_decay(self, f: Array, w: Weights) -> Array:
        """[T, C], one of each key channel, of the projection to decays."""
        return self.ops.decay(self.ops.linear(f, w("f_b_proj")), w("dt_bias"), w("A_log"))

    def _output_gate(self, g: Array, w: Weights) -> Array:
        """[T, C] of the projection to a gate."""
        return self.ops.sigmoid(self.ops.linear(g, w("g_b_proj")))
