"""Muse Spark: the plain decoder with a norm before and behind everything, and a gate where others add.

Experts work in a width of their own, and what each gives is normalised before it is weighed.
Source: transformers' modeling_muse_spark.py. Shapes: T tokens of one step, D hidden_size.
"""

from collections.abc import Sequence as Items
from dataclasses import dataclass, replace
from functools import cached_property

from formats.config import MuseSparkConfig, Rope
from runtime.backends.facts import Array, ScaledNorm, Wanted
from runtime.models.decoder import Decoder
from runtime.models.norms import unit_norm
from runtime.session import Sequence


@dataclass(frozen=True)
class MuseSpark(Decoder):
    config: MuseSparkConfig

    def forward(self, token_ids: Items[int], sequences: Items[Sequence], wanted: Wanted = None) -> Array:
        """Tokens of one step, sequence after sequence -> last hidden states [T, D]; replaces the states."""
        c, ops = self.config, self.ops
        h = unit_norm(ops, ops.embed(token_ids), c.rms_norm_eps)  # [T, D]
        for layer in range(c.num_hidden_layers):
            name, last = f"layers.{layer}", layer + 1 == c.num_hidden_layers
            y = self._mixer(layer, self._norm(h, f"{name}.input_layernorm"), sequences)
            h, y = (ops.rows(part, wanted if last else None) for part in (h, y))
            h = self._joined(layer, "post_attention", h, unit_norm(ops, y, c.post_norm_eps))
            y = self._feed_forward(layer, self._norm(h, f"{name}.pre_feedforward_layernorm"))
            y = ops.scaled_norm(y, self._scaled_norm(f"{name}.post_feedforward_layernorm"))
            h = self._joined(layer, "post_feedforward", h, y)
        return ops.rms_norm(h, ops.weight("norm"), c.rms_norm_eps)

    def logits(self, hidden: Array) -> Array:
        """[T, D] -> [T, vocab_size]."""
        logits = self.ops.linear(hidden, self.ops.weight("lm_head")) * self.config.output_multiplier
        return self.ops.softcap(logits, self.config.final_logit_softcapping)

    def _norm(self, x: Array, name: str) -> Array:
        return self.ops.rms_norm(x, self.ops.weight(name), self.config.rms_norm_eps, self.config.norm_offset)

    def _scaled_norm(self, name: str) -> ScaledNorm:
        return ScaledNorm(self.ops.weight(name), self.config.post_norm_eps, self.config.norm_offset)

    def _joined(self, layer: int, half: str, h: Array, y: Array) -> Array:
        """The stream h and what half a layer gives, each value by its gate."""
        ops, name = self.ops, f"layers.{layer}.{half}_residual_gate"
        if self.config.residual_gate_split:
            return ops.scale(h, ops.weight(f"{name}.alpha")) + ops.scale(y, ops.weight(f"{name}.beta"))
        kept, added = self._gates[f"{name}.gate"]
        return h * kept + y * added

    @cached_property
    def _gates(self) -> dict[str, tuple[Array, Array]]:
        """By name, what the stream and what is added to it are multiplied by: [D] each."""
        c, halves = self.config, ("post_attention", "post_feedforward")
        names = [f"layers.{layer}.{half}_residual_gate.gate" for layer in range(c.num_hidden_layers) for half in halves]
        return {name: self.ops.residual_gate(self.ops.weight(name), c.residual_gate_temperature) for name in names}

    # ---- attention

    def _rope_of(self, layer: int) -> Rope:
        """One that turns nothing where positions are not known: heads are normalised there, too."""
        c = self.config
        return c.rope_of(layer) if c.turns(layer) else replace(c.rope, turned=0, scaling=None)

    def _gated(self, o: Array, gate: Array, heads: int) -> Array:
        by_head = o.reshape(-1, heads, self.config.value_dim)
        return super()._gated(unit_norm(self.ops, by_head, self.config.rms_norm_eps).reshape(o.shape), gate, heads)

    # ---- feed forward

    def _feed_forward(self, layer: int, x: Array) -> Array:
        c, ops, name = self.config, self.ops, f"layers.{layer}.mlp"
        if not c.has_experts(layer):
            return super()._feed_forward(layer, x)
        expert_ids, routing_weights = self._route(layer, x)
        ops.fetch(layer, expert_ids)
        if self._router_after(layer) is not None:
            ops.look_ahead(layer + 1, lambda: self._route(layer + 1, x)[0])
        narrow = self._norm(ops.linear(x, ops.weight(f"{name}.pre_expert_proj")), f"{name}.pre_expert_norm")
        norm = self._scaled_norm(f"{name}.experts.post_expert_norm")
        y = ops.experts(layer, narrow, expert_ids, routing_weights, norm)
        return ops.linear(y, ops.weight(f"{name}.post_expert_proj"))

    def _route(self, layer: int, x: Array) -> tuple[Array, Array]:
        router = self._layers[layer].router
        assert router is not None
        logits = self.ops.linear(x, router.matrices[0]) * self.config.output_multiplier
        return self.ops.route(logits, router.routing, router.correction)
