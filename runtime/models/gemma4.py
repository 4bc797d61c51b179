"""Gemma 4 with experts: each layer has a dense MLP and routed experts side by side, and norms before and after both.

Source: transformers' modeling_gemma4.py (text part). Shapes: T tokens of one step, D hidden_size, d width of a head.
"""

from collections.abc import Sequence as Items
from dataclasses import dataclass

from formats.config import Gemma4Config
from runtime.backends.base import Ops
from runtime.backends.facts import Array, Routing, State, Turn, Wanted
from runtime.models.norms import unit_norm
from runtime.session import Sequence


@dataclass(frozen=True)
class Gemma4:
    config: Gemma4Config
    ops: Ops

    def new_states(self) -> list[State]:
        """An empty cache of keys and values per layer."""
        c = self.config
        return [self.ops.new_kv_cache(*c.key_heads(layer), c.window(layer)) for layer in range(c.num_hidden_layers)]

    def forward(self, token_ids: Items[int], sequences: Items[Sequence], wanted: Wanted = None) -> Array:
        """Tokens of one step, sequence after sequence -> last hidden states [T, D]; replaces the states."""
        c, ops = self.config, self.ops
        h = ops.embed(token_ids) * c.hidden_size**0.5  # [T, D]
        x = self._norm(h, "layers.0.input_layernorm")
        for layer in range(c.num_hidden_layers):
            name = f"layers.{layer}"
            last = layer + 1 == c.num_hidden_layers
            h, y = (ops.rows(part, wanted if last else None) for part in (h, self._attention(layer, x, sequences)))
            y = self._norm(y, f"{name}.post_attention_layernorm")
            h, x = ops.add_norm(h, y, ops.weight(f"{name}.pre_feedforward_layernorm"), c.rms_norm_eps)
            h = ops.scale(h + self._feed_forward(layer, h, x), ops.weight(f"{name}.layer_scalar"))
            x = self._norm(h, "norm" if last else f"layers.{layer + 1}.input_layernorm")
        return x

    def logits(self, hidden: Array) -> Array:
        """[T, D] -> [T, vocab_size]."""
        cap, logits = self.config.final_logit_softcapping, self.ops.linear(hidden, self.ops.weight("lm_head"))
        return logits if cap is None else self.ops.softcap(logits, cap)

    def _norm(self, x: Array, name: str) -> Array:
        return self.ops.rms_norm(x, self.ops.weight(name), self.config.rms_norm_eps)

    # ---- attention

    def _attention(self, layer: int, x: Array, sequences: Items[Sequence]) -> Array:
        c, ops, name = self.config, self.ops, f"layers.{layer}.self_attn"
        window, (kv_heads, d) = c.window(layer), c.key_heads(layer)
        projections = "qkv" if window else "qk"  # full attention takes its keys as values, before norm and rotation
        q, k, *v = ops.linears(x, [ops.weight(f"{name}.{part}_proj") for part in projections])
        values = unit_norm(ops, (v[0] if v else k).reshape(-1, kv_heads, d), c.rms_norm_eps)
        q, k = q.reshape(-1, c.num_attention_heads, d), k.reshape(-1, kv_heads, d)
        q_norm, k_norm = (ops.weight(f"{name}.{part}_norm") for part in "qk")
        outputs = []
        for s in sequences:
            turn = Turn(c.rope if window else c.global_rope, s.position, q_norm, k_norm, c.rms_norm_eps)
            output, s.states[layer] = ops.attention(
                q[s.rows], k[s.rows], values[s.rows], s.states[layer], scale=1.0, window=window, turn=turn
            )
            outputs.append(output)  # [tokens, heads, d]
        o = ops.concatenate(outputs).reshape(-1, c.num_attention_heads * d)
        return ops.linear(o, ops.weight(f"{name}.o_proj"))

    # ---- feed forward

    def _feed_forward(self, layer: int, h: Array, x: Array) -> Array:
        """What the dense MLP and the experts add to the stream h; x is what the MLP's norm makes of it."""
        ops, name = self.ops, f"layers.{layer}"
        expert_ids, routing_weights = self._route(layer, h)
        ops.fetch(layer, expert_ids)
        ops.look_ahead(layer + 1, lambda: self._route(layer + 1, h)[0])
        gate, up, down = (ops.weight(f"{name}.mlp.{part}_proj") for part in ("gate", "up", "down"))
        dense = self._norm(ops.feed_forward(x, gate, up, down), f"{name}.post_feedforward_layernorm_1")
        x = self._norm(h, f"{name}.pre_feedforward_layernorm_2")
        routed = ops.experts(layer, x, expert_ids, routing_weights)
        routed = self._norm(routed, f"{name}.post_feedforward_layernorm_2")
        return self._norm(dense + routed, f"{name}.post_feedforward_layernorm")

    def _route(self, layer: int, h: Array) -> tuple[Array, Array]:
        c, ops, name = self.config, self.ops, f"layers.{layer}.router"
        x = self._norm(h, f"{name}.scale") * c.hidden_size**-0.5
        logits = ops.linear(x, ops.weight(f"{name}.proj"))
        return ops.route(logits, Routing(c.top_k), None, ops.weight(f"{name}.per_expert_scale"))
