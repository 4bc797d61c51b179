"""Command A+: the plain decoder, whose attention and experts stand side by side behind one norm.

Source: transformers' modeling_cohere2_moe.py. Shapes: T tokens of one step, D hidden_size.
"""

from collections.abc import Sequence as Items
from dataclasses import dataclass

from formats.config import Cohere2MoeConfig
from runtime.backends.facts import Array, Wanted
from runtime.models.decoder import Decoder
from runtime.session import Sequence


@dataclass(frozen=True)
class Cohere2Moe(Decoder):
    config: Cohere2MoeConfig

    def _layer(self, layer: int, h: Array, y: Array, sequences: Items[Sequence], wanted: Wanted) -> tuple[Array, Array]:
        """As of any decoder; experts are chosen, and their reads begun, before attention."""
        h, x = self._add_norm(h, y, f"layers.{layer}.input_layernorm")
        h, read = self.ops.rows(h, wanted), self.ops.rows(x, wanted)
        own = self._layers[layer]
        if own.router is None:
            y = self.ops.feed_forward(read, *self._mlp_of(layer, f"layers.{layer}.mlp"))
            return h, self.ops.rows(self._mixer(layer, x, sequences), wanted) + y
        routed = self.ops.route_input(read, own.router)
        self.ops.fetch_routed(layer, routed, self._router_after(layer))
        attended = self.ops.rows(self._mixer(layer, x, sequences), wanted)
        y = self.ops.routed_experts(layer, routed, own.shared)
        return h, attended + (y * 0.5 if self.config.average_shared_expert else y)

    def _add_norm(self, h: Array, y: Array, name: str) -> tuple[Array, Array]:
        if not self.config.layer_norm:
            return super()._add_norm(h, y, name)
        h = h + y
        return h, self.ops.layer_norm(h, self.ops.weight(name), None, self.config.rms_norm_eps)
