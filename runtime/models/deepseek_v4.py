"""DeepSeek-V4: several residual streams, attention to a window and to compressed entries, experts by table or score.

Source: transformers' modeling_deepseek_v4.py. Shapes: T tokens of one step, D hidden_size, N streams, H heads, d width
of a head.
"""

from collections.abc import Sequence as Items
from dataclasses import dataclass, replace
from typing import NamedTuple

from formats.config import HASH_MOE, SQRT_SOFTPLUS, DeepseekV4Config
from runtime.backends.facts import Array, Beside, Routing, State, Wanted, Weight
from runtime.models.compressed import OverEntries
from runtime.models.norms import unit_norm
from runtime.models.streams import collapse, gathered, spread
from runtime.session import Sequence


class LayerState(NamedTuple):
    """What a layer remembers: tokens of the window, entries, the indexer's keys, and tokens without an entry yet."""

    cache: State
    entries: State = None
    window: State = None  # of tokens, open
    index: State = None
    index_window: State = None


@dataclass(frozen=True)
class DeepseekV4(OverEntries):
    config: DeepseekV4Config

    def new_states(self) -> list[State]:
        """What every layer remembers of a sequence that has not begun."""
        return [self._new_state(layer) for layer in range(self.config.num_hidden_layers)]

    def _new_state(self, layer: int) -> LayerState:
        c, ops, rate = self.config, self.ops, self.config.compress_rate(layer)
        cache = ops.new_kv_cache(1, c.head_dim, c.sliding_window)
        if rate is None:
            return LayerState(cache)
        entries = ops.new_entries(c.head_dim, rate)
        if not c.has_indexer(layer):
            return LayerState(cache, entries, ops.new_open_window(rate, c.head_dim, False))
        return LayerState(
            cache,
            entries,
            ops.new_open_window(rate, 2 * c.head_dim, True),
            ops.new_index_cache(c.index_head_dim, rate),
            ops.new_open_window(rate, 2 * c.index_head_dim, True),
        )

    def forward(self, token_ids: Items[int], sequences: Items[Sequence], wanted: Wanted = None) -> Array:
        """Tokens of one step, sequence after sequence -> last hidden states [T, D]; replaces the states."""
        ops = self.ops
        h = spread(ops, token_ids, self.config.hc_mult)  # [T, N, D]
        for layer in range(self.config.num_hidden_layers):
            x, post, comb = collapse(ops, self.config, h, f"layers.{layer}.attn_hc")
            y = self._attention(layer, self._norm(x, f"layers.{layer}.input_layernorm"), sequences)
            h = ops.expand_streams(h, y, post, comb)
            if layer + 1 == self.config.num_hidden_layers:
                h, token_ids = ops.rows(h, wanted), ops.rows(token_ids, wanted)
            x, post, comb = collapse(ops, self.config, h, f"layers.{layer}.ffn_hc")
            y = self._moe(layer, self._norm(x, f"layers.{layer}.post_attention_layernorm"), token_ids)
            h = ops.expand_streams(h, y, post, comb)
        return self._norm(gathered(ops, self.config, h), "norm")

    # ---- attention

    def _attention(self, layer: int, x: Array, sequences: Items[Sequence]) -> Array:
        c, ops, name = self.config, self.ops, f"layers.{layer}.self_attn"
        rope = c.rope if c.compress_rate(layer) is None else c.compress_rope
        compressed, queries = self._beside_projections(layer)
        q_latent, kv, *parts = ops.linears(
            x, [ops.weight(f"{name}.{part}") for part in ("q_a_proj", "kv_proj", *compressed)]
        )
        q_latent = self._norm(q_latent, f"{name}.q_a_norm")  # [T, q_lora_rank]
        q, *index_q = ops.linears(q_latent, [ops.weight(f"{name}.{part}") for part in ("q_b_proj", *queries)])
        q = q.reshape(-1, c.num_attention_heads, c.head_dim)
        q, kv = unit_norm(ops, q, c.rms_norm_eps), self._norm(kv, f"{name}.kv_norm")[:, None]  # [T, H, d], [T, 1, d]
        outputs = []
        for s in sequences:
            beside = self._beside(layer, s, [part[s.rows] for part in (*parts, *index_q)])
            q_s, kv_s = (self._turned(part[s.rows], s.position, rope) for part in (q, kv))
            outputs.append(self._attend(layer, s, q_s, kv_s, rope, beside))
        return self._projected(layer, outputs)

    def _beside_projections(self, layer: int) -> tuple[Items[str], Items[str]]:
        """What `_beside` takes of projections of a layer's input, then of those of its latent queries."""
        if self.config.compress_rate(layer) is None:
            return (), ()
        entries = "compressor.kv_proj", "compressor.gate_proj"
        if not self.config.has_indexer(layer):
            return entries, ()
        index = "indexer.compressor.kv_proj", "indexer.compressor.gate_proj", "indexer.weights_proj"
        return (*entries, *index), ("indexer.q_b_proj",)

    def _beside(self, layer: int, s: Sequence, projected: Items[Array]) -> Beside | None:
        """The entries that a sequence's tokens see, after those that they complete."""
        c, ops, name = self.config, self.ops, f"layers.{layer}.self_attn"
        rate, state = c.compress_rate(layer), s.states[layer]
        if rate is None:
            return None
        kv, gate, *index_parts = projected
        seen = [(s.position + i + 1) // rate for i in range(len(kv))]
        first = s.position // rate  # of the entries that are new
        keys, window = self._compress(kv, gate, f"{name}.compressor", state.window, first, rate)
        state = state._replace(entries=ops.add_entries(state.entries, keys), window=window)
        selection = None
        if c.has_indexer(layer):
            kv, gate, weights, q = index_parts
            keys, window = self._compress(kv, gate, f"{name}.indexer.compressor", state.index_window, first, rate)
            q = self._turned(q.reshape(-1, c.index_n_heads, c.index_head_dim), s.position, c.compress_rope)
            weights = weights * (c.index_n_heads * c.index_head_dim) ** -0.5  # [tokens, index_n_heads]
            selection, index = ops.select_tokens(q, keys, weights, state.index, c.index_topk, seen)
            state = state._replace(index=index, index_window=window)
        s.states[layer] = state
        return Beside(state.entries, seen, selection)

    def _compress(self, kv: Array, gate: Array, name: str, window: State, first: int, rate: int) -> tuple[Array, State]:
        """Entries [any, d] that tokens complete, the first of them number `first`, and what remains open."""
        ops = self.ops
        entries, window = ops.compress(kv, gate, ops.weight(f"{name}.position_bias"), window)
        if len(entries) == 0:
            return entries, window
        entries = self._norm(entries, f"{name}.kv_norm")[:, None]
        return self._turned(entries, first, replace(self.config.compress_rope, stride=rate))[:, 0], window

    # ---- feed forward

    def _moe(self, layer: int, x: Array, token_ids: Items[int]) -> Array:
        expert_ids, routing_weights = self._route(layer, x, token_ids)
        self.ops.fetch(layer, expert_ids)
        self.ops.look_ahead(layer + 1, lambda: self._route(layer + 1, x, token_ids)[0])
        gate, up, down = (self._shared(layer, part) for part in ("gate", "up", "down"))
        shared = self.ops.feed_forward(x, gate, up, down)
        return self.ops.experts(layer, x, expert_ids, routing_weights) + shared

    def _shared(self, layer: int, part: str) -> Weight:
        return self.ops.weight(f"layers.{layer}.mlp.shared_experts.{part}_proj")

    def _route(self, layer: int, x: Array, token_ids: Items[int]) -> tuple[Array, Array]:
        c, ops, name = self.config, self.ops, f"layers.{layer}.mlp.gate"
        routing = Routing(c.top_k, SQRT_SOFTPLUS, routed_scaling_factor=c.routed_scaling_factor)
        logits = ops.linear(x, ops.weight(name))
        if c.mlp_layer_types[layer] == HASH_MOE:
            return ops.route_by_token(logits, token_ids, ops.weight(f"{name}.tid2eid"), routing)
        return ops.route(logits, routing, ops.weight(f"{name}.e_score_correction_bias"))
