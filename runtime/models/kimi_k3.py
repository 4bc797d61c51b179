"""Kimi K3: Kimi Linear with gates, bounded decays, experts behind a narrower projection, and attention residuals.

What a half of a layer reads is a mixture of the values that blocks of layers began with and of the sum since the last.
Source: mlx-lm's kimi_k3.py. Shapes: T tokens of one step, D hidden_size, N values that a half may read.
"""

from collections.abc import Sequence as Items
from dataclasses import dataclass

from formats.config import KimiK3Config
from runtime.backends.facts import Array, Wanted
from runtime.models.kimi_linear import KimiLinear, Weights
from runtime.models.norms import unit_norm
from runtime.session import Sequence


@dataclass(frozen=True)
class KimiK3(KimiLinear):
    config: KimiK3Config

    gate_projection = "g"

    def forward(self, token_ids: Items[int], sequences: Items[Sequence], wanted: Wanted = None) -> Array:
        """Tokens of one step, sequence after sequence -> last hidden states [T, D]; replaces the states."""
        c, ops = self.config, self.ops
        h: Array = ops.embed(token_ids)  # [T, D]: the sum since the last block began, None where one begins
        begun: list[Array] = []  # [T, 1, D] each
        selections: list[Array | None] = [None for _ in sequences]
        for layer in range(c.num_hidden_layers):
            name = f"layers.{layer}"
            x = self._mixed(begun, h, f"{name}.self_attention_res")
            if layer % c.attn_res_block_size == 0:
                begun.append(h[:, None])
                h = None
            y = self._attention(layer, self._norm(x, f"{name}.input_layernorm"), sequences, selections)
            h = y if h is None else h + y
            if layer + 1 == c.num_hidden_layers:
                h, *begun = (ops.rows(part, wanted) for part in (h, *begun))
            x = self._norm(self._mixed(begun, h, f"{name}.mlp_res"), f"{name}.post_attention_layernorm")
            h = h + (self._moe(layer, x) if c.has_experts(layer) else self._mlp(f"{name}.mlp", x))
        return self._norm(self._mixed(begun, h, "output_attn_res"), "norm")

    def _mixed(self, begun: list[Array], h: Array, name: str) -> Array:
        """The mean of what blocks began with and of h [T, D], weighed by the softmax of a score of each: [T, D]."""
        if not begun:
            return h
        ops, c = self.ops, self.config
        values = ops.concatenate([*begun, h[:, None]], axis=1)  # [T, N, D]
        x = values.reshape(-1, c.hidden_size)
        normed = unit_norm(ops, x, c.rms_norm_eps) if c.attn_res_fused else self._norm(x, f"{name}_norm")
        projection = ops.weight(f"{name}_score" if c.attn_res_fused else f"{name}_proj")
        scores = ops.linear(normed, projection).reshape(-1, values.shape[1])
        return ops.collapse_streams(values, ops.softmax(scores))

    # ---- attention

    def _gated(self, layer: int, x: Array, o: Array) -> Array:
        ops = self.ops
        return o * ops.sigmoid(ops.linear(x, ops.weight(f"layers.{layer}.self_attn.g_proj")))

    def _log_decay(self, f: Array, w: Weights) -> Array:
        f = self.ops.linear(f, w("f_b_proj"))
        return self.ops.bounded_decay(f, w("dt_bias"), w("A_log"), self.config.gate_lower_bound)

    def _output_gate(self, g: Array, w: Weights) -> Array:
        return self.ops.sigmoid(g)

    # ---- feed forward

    def _moe(self, layer: int, x: Array) -> Array:
        ops, name = self.ops, f"layers.{layer}.mlp"
        expert_ids, routing_weights = self._route(layer, x)
        ops.fetch(layer, expert_ids)
        ops.look_ahead(layer + 1, lambda: self._route(layer + 1, x)[0])
        latent = ops.linear(x, ops.weight(f"{name}.routed_expert_down_proj"))  # [T, routed_expert_hidden_size]
        shared = self._mlp(f"{name}.shared_experts", x)
        routed = self._norm(ops.experts(layer, latent, expert_ids, routing_weights), f"{name}.routed_expert_norm")
        return ops.linear(routed, ops.weight(f"{name}.routed_expert_up_proj")) + shared
