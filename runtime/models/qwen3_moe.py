"""Qwen3 MoE: full attention with normalised queries and keys, routed experts alone.

Source: transformers' modeling_qwen3_moe.py. Shapes: T tokens of one step, D hidden_size, d width of a head.
"""

from collections.abc import Sequence as Items
from dataclasses import dataclass

from formats.config import Qwen3MoeConfig
from runtime.backends.base import Array, Ops, Routing, State
from runtime.session import Sequence


@dataclass(frozen=True)
class Qwen3Moe:
    config: Qwen3MoeConfig
    ops: Ops

    def new_states(self) -> list[State]:
        """An empty cache of keys and values per layer."""
        c = self.config
        return [self.ops.new_kv_cache(c.num_key_value_heads, c.head_dim) for _ in range(c.num_hidden_layers)]

    def forward(self, token_ids: Items[int], sequences: Items[Sequence]) -> Array:
        """Tokens of one step, sequence after sequence -> last hidden states [T, D]; replaces the states."""
        h = self.ops.embed(token_ids)  # [T, D]
        for layer in range(self.config.num_hidden_layers):
            h = h + self._attention(layer, self._norm(h, f"layers.{layer}.input_layernorm"), sequences)
            h = h + self._moe(layer, self._norm(h, f"layers.{layer}.post_attention_layernorm"))
        return self._norm(h, "norm")

    def logits(self, hidden: Array) -> Array:
        """[T, D] -> [T, vocab_size]."""
        return self.ops.linear(hidden, self.ops.weight("lm_head"))

    def _norm(self, x: Array, name: str) -> Array:
        return self.ops.rms_norm(x, self.ops.weight(name), self.config.rms_norm_eps)

    def _attention(self, layer: int, x: Array, sequences: Items[Sequence]) -> Array:
        c, ops, name = self.config, self.ops, f"layers.{layer}.self_attn"
        heads, kv_heads, d = c.num_attention_heads, c.num_key_value_heads, c.head_dim
        q = self._norm(ops.linear(x, ops.weight(f"{name}.q_proj")).reshape(-1, heads, d), f"{name}.q_norm")
        k = self._norm(ops.linear(x, ops.weight(f"{name}.k_proj")).reshape(-1, kv_heads, d), f"{name}.k_norm")
        v = ops.linear(x, ops.weight(f"{name}.v_proj")).reshape(-1, kv_heads, d)
        outputs = []
        for s in sequences:
            q_s = ops.rope(q[s.rows], s.position, c.rope)
            k_s = ops.rope(k[s.rows], s.position, c.rope)
            output, s.states[layer] = ops.attention(q_s, k_s, v[s.rows], s.states[layer], scale=d**-0.5)
            outputs.append(output)  # [tokens, heads, d]
        o = ops.concatenate(outputs).reshape(-1, heads * d)
        return ops.linear(o, ops.weight(f"{name}.o_proj"))

    def _moe(self, layer: int, x: Array) -> Array:
        expert_ids, routing_weights = self._route(layer, x)
        self.ops.fetch(layer, expert_ids)
        self.ops.look_ahead(layer + 1, lambda: self._route(layer + 1, x)[0])
        return self.ops.experts(layer, x, expert_ids, routing_weights)

    def _route(self, layer: int, x: Array) -> tuple[Array, Array]:
        logits = self.ops.linear(x, self.ops.weight(f"layers.{layer}.mlp.gate"))
        return self.ops.route(logits, Routing(self.config.top_k, norm_topk_prob=self.config.norm_topk_prob))
