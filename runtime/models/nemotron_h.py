"""Nemotron 3: a stream to which each layer adds one part, of Mamba2, attention, experts or an MLP.

Neither experts nor MLPs have gates: down(max(up(x), 0)^2). In Super experts work behind a narrower projection.
Source: transformers' modeling_nemotron_h.py. Shapes: T tokens of one step, D hidden_size.
"""

from collections.abc import Sequence as Items
from dataclasses import dataclass
from functools import cached_property, partial

from formats.config import FULL_ATTENTION, LINEAR_ATTENTION, SIGMOID, NemotronHConfig
from runtime.backends.base import Ops
from runtime.backends.facts import Array, Attention, Part, Routing, State, Wanted, Weight
from runtime.models.mamba2 import mamba2, new_mamba2_state
from runtime.session import Sequence


@dataclass(frozen=True)
class NemotronH:
    config: NemotronHConfig
    ops: Ops

    def new_states(self) -> list[State]:
        """What every layer remembers of a sequence that has not begun; experts and MLPs nothing."""
        return [self._new_state(layer_type) for layer_type in self.config.layer_types]

    def _new_state(self, layer_type: str) -> State:
        c = self.config
        if layer_type == LINEAR_ATTENTION:
            return new_mamba2_state(self.ops, c.mamba)
        return self.ops.new_kv_cache(c.num_key_value_heads, c.head_dim) if layer_type == FULL_ATTENTION else None

    def forward(self, token_ids: Items[int], sequences: Items[Sequence], wanted: Wanted = None) -> Array:
        """Tokens of one step, sequence after sequence -> last hidden states [T, D]; replaces the states."""
        ops, eps = self.ops, self.config.rms_norm_eps
        h = ops.embed(token_ids)  # [T, D]
        x = ops.rms_norm(h, ops.weight("layers.0.norm"), eps)
        for layer in range(self.config.num_hidden_layers):
            y = self._part(layer, x, sequences)
            if layer == self._last_mixing:
                h, y = (ops.rows(part, wanted) for part in (h, y))
            last = layer + 1 == self.config.num_hidden_layers
            h, x = ops.add_norm(h, y, ops.weight("norm" if last else f"layers.{layer + 1}.norm"), eps)
        return x

    def logits(self, hidden: Array) -> Array:
        """[T, D] -> [T, vocab_size]."""
        return self.ops.linear(hidden, self.ops.weight("lm_head"))

    @cached_property
    def _last_mixing(self) -> int:
        """The last layer in which tokens meet."""
        mixing = (LINEAR_ATTENTION, FULL_ATTENTION)
        return max((layer for layer, kind in enumerate(self.config.layer_types) if kind in mixing), default=0)

    def _part(self, layer: int, x: Array, sequences: Items[Sequence]) -> Array:
        c = self.config
        if c.layer_types[layer] == LINEAR_ATTENTION:
            return mamba2(self.ops, c.mamba, c.rms_norm_eps, partial(self._weight, layer, "mamba"), x, sequences, layer)
        if c.layer_types[layer] == FULL_ATTENTION:
            return self._attention(layer, x, sequences)
        return self._moe(layer, x) if c.has_experts(layer) else self._mlp(layer, "mlp", x)

    def _weight(self, layer: int, part: str, name: str) -> Weight:
        return self.ops.weight(f"layers.{layer}.{part}.{name}")

    # ---- attention without positions

    def _attention(self, layer: int, x: Array, sequences: Items[Sequence]) -> Array:
        parts = [Part(s.rows, s.position, s.states[layer]) for s in sequences]
        y, caches = self.ops.self_attention(x, self._attentions[layer], parts)
        for s, cache in zip(sequences, caches, strict=True):
            s.states[layer] = cache
        return y

    @cached_property
    def _attentions(self) -> dict[int, Attention]:
        c = self.config
        return {
            layer: Attention(
                projections=tuple(self._weight(layer, "self_attn", f"{part}_proj") for part in "qkv"),
                biases=None,
                output=self._weight(layer, "self_attn", "o_proj"),
                output_bias=None,
                heads=c.num_attention_heads,
                key_heads=c.num_key_value_heads,
                scale=c.head_dim**-0.5,
                rope=None,
            )
            for layer, layer_type in enumerate(c.layer_types)
            if layer_type == FULL_ATTENTION
        }

    # ---- feed forward

    def _moe(self, layer: int, x: Array) -> Array:
        c, ops = self.config, self.ops
        expert_ids, routing_weights = self._route(layer, x)
        ops.fetch(layer, expert_ids)
        following = next((i for i in range(layer + 1, c.num_hidden_layers) if c.has_experts(i)), None)
        if following is not None:
            ops.look_ahead(following, lambda: self._route(following, x)[0])
        latent = (
            x if c.moe_latent_size is None else ops.linear(x, self._weight(layer, "mlp", "routed_expert_down_proj"))
        )
        shared = self._mlp(layer, "mlp.shared_experts", x)
        y = ops.experts(layer, latent, expert_ids, routing_weights)
        if c.moe_latent_size is not None:
            y = ops.linear(y, self._weight(layer, "mlp", "routed_expert_up_proj"))
        return y + shared

    def _route(self, layer: int, x: Array) -> tuple[Array, Array]:
        c = self.config
        routing = Routing(c.top_k, SIGMOID, c.norm_topk_prob, c.routed_scaling_factor, c.n_group, c.topk_group)
        logits = self.ops.linear(x, self._weight(layer, "mlp", "gate"))
        return self.ops.route(logits, routing, self._weight(layer, "mlp", "gate.e_score_correction_bias"))

    def _mlp(self, layer: int, name: str, x: Array) -> Array:
        up, down = (self._weight(layer, name, f"{part}_proj") for part in ("up", "down"))
        return self.ops.feed_forward(x, None, up, down)
