"""LongCat-Flash: layers of two halves, each latent attention and a dense MLP, with experts beside the second.

Experts are chosen behind the first attention and wanted at the end of the layer only, so their reads have the rest of
it. The router also chooses experts that give back what they read: a token uses as many real ones as it needs.
Source: transformers' modeling_longcat_flash.py. Shapes: T tokens of one step, D hidden_size.
"""

from collections.abc import Sequence as Items
from dataclasses import dataclass

from formats.config import LongcatFlashConfig
from runtime.backends.facts import Array, Routing, State, Wanted, Weight
from runtime.models.deepseek_v3 import DeepseekV3
from runtime.session import Sequence


@dataclass(frozen=True)
class LongcatFlash(DeepseekV3):
    config: LongcatFlashConfig

    def new_states(self) -> list[State]:
        """What the attention of every half of a layer remembers of a sequence that has not begun."""
        return [(self._new_latent_cache(), None) for _ in range(2 * self.config.num_hidden_layers)]

    def forward(self, token_ids: Items[int], sequences: Items[Sequence], wanted: Wanted = None) -> Array:
        """Tokens of one step, sequence after sequence -> last hidden states [T, D]; replaces the states."""
        h, layers = self.ops.embed(token_ids), self.config.num_hidden_layers  # [T, D]
        y = h * 0.0
        for layer in range(layers):
            at, wanted_here = f"layers.{layer}", wanted if layer + 1 == layers else None
            h, x = self._add_norm(h, y, f"{at}.input_layernorm.0")
            h, x = self._add_norm(h, self._half(2 * layer, x, sequences), f"{at}.post_attention_layernorm.0")
            read = self.ops.rows(x, wanted_here)
            chosen = self._fetched(layer, read)
            h, x = self._add_norm(h, self._mlp(f"{at}.mlps.0", x), f"{at}.input_layernorm.1")
            y = self._half(2 * layer + 1, x, sequences)
            h, y = (self.ops.rows(part, wanted_here) for part in (h, y))
            h, x = self._add_norm(h, y, f"{at}.post_attention_layernorm.1")
            y = self._mlp(f"{at}.mlps.1", x) + self.ops.experts(layer, read, *chosen)
        return self._add_norm(h, y, "norm")[1]

    def _half(self, half: int, x: Array, sequences: Items[Sequence]) -> Array:
        """Attention of a half of a layer, counted through all layers."""
        return self._attention(half, x, sequences, [None for _ in sequences])

    def _attention_name(self, layer: int) -> str:
        return f"layers.{layer // 2}.self_attn.{layer % 2}"

    def _latent(self, latent: Array, norm: Weight) -> Array:
        return super()._latent(latent, norm) * self.config.latent_scale

    def _fetched(self, layer: int, x: Array) -> tuple[Array, Array]:
        """The experts of each token and their weights, whose reads begin."""
        expert_ids, routing_weights = self._route(layer, x)
        self.ops.fetch(layer, expert_ids)
        self.ops.look_ahead(layer + 1, lambda: self._route(layer + 1, x)[0])
        return expert_ids, routing_weights

    def _route(self, layer: int, x: Array) -> tuple[Array, Array]:
        c, ops, name = self.config, self.ops, f"layers.{layer}.mlp.router"
        routing = Routing(c.top_k, c.scoring_func, c.norm_topk_prob, c.routed_scaling_factor)
        bias = ops.weight(f"{name}.e_score_correction_bias")
        return ops.route(ops.linear(x, ops.weight(f"{name}.classifier")), routing, bias)
