"""The plain decoder: attention over keys and values, then routed experts, each added to the stream.

Mixtral, OLMoE, Granite, Qwen2 and Qwen3, GLM-4.5, MiniMax-M2, gpt-oss, Llama 4 and MiMo-V2-Flash are this model with
other facts. Sources: transformers' modeling files of those names. Shapes: T tokens of one step, D hidden_size, d width
of a head.
"""

from collections.abc import Iterator
from collections.abc import Sequence as Items
from dataclasses import dataclass

from formats.config import HEAD_NORM, UNIT_NORM, WHOLE_NORM, DecoderConfig
from runtime.backends.base import Array, Ops, Routing, State, Turn
from runtime.models.norms import unit_norm
from runtime.session import Sequence


@dataclass(frozen=True)
class Decoder:
    config: DecoderConfig
    ops: Ops

    def new_states(self) -> list[State]:
        """An empty cache of keys and values per layer."""
        return [self._new_kv_cache(layer) for layer in range(self.config.num_hidden_layers)]

    def _new_kv_cache(self, layer: int) -> State:
        c = self.config
        return self.ops.new_kv_cache(c.key_heads(layer), c.head_dim, c.window(layer), c.chunk(layer), c.value_dim)

    def forward(self, token_ids: Items[int], sequences: Items[Sequence]) -> Array:
        """Tokens of one step, sequence after sequence -> last hidden states [T, D]; replaces the states."""
        c = self.config
        h = self.ops.embed(token_ids) * c.embedding_multiplier  # [T, D]
        x = self._norm(h, "layers.0.input_layernorm")
        for layer in range(c.num_hidden_layers):
            h, x = self._add_norm(h, self._attention(layer, x, sequences), f"layers.{layer}.post_attention_layernorm")
            y = self._moe(layer, x) if c.has_experts(layer) else self._mlp(f"layers.{layer}.mlp", x)
            last = layer + 1 == c.num_hidden_layers
            h, x = self._add_norm(h, y, "norm" if last else f"layers.{layer + 1}.input_layernorm")
        return x

    def logits(self, hidden: Array) -> Array:
        """[T, D] -> [T, vocab_size]."""
        return self.ops.linear(hidden, self.ops.weight("lm_head")) * (1 / self.config.logits_scaling)

    def _norm(self, x: Array, name: str) -> Array:
        return self.ops.rms_norm(x, self.ops.weight(name), self.config.rms_norm_eps)

    def _add_norm(self, h: Array, y: Array, name: str) -> tuple[Array, Array]:
        c = self.config
        return self.ops.add_norm(h, y, self.ops.weight(name), c.rms_norm_eps, multiplier=c.residual_multiplier)

    def _linear(self, x: Array, name: str, has_bias: bool) -> Array:
        return self.ops.linear(x, self.ops.weight(name), self.ops.weight(f"{name}.bias") if has_bias else None)

    # ---- attention

    def _attention(self, layer: int, x: Array, sequences: Items[Sequence]) -> Array:
        c, ops, name = self.config, self.ops, f"layers.{layer}.self_attn"
        names = [f"{name}.{part}_proj" for part in "qkv"]
        biases = [ops.weight(f"{proj}.bias") for proj in names] if c.attention_bias else None
        q, k, v = ops.linears(x, [ops.weight(proj) for proj in names], biases)
        q = self._heads(q, f"{name}.q_norm", c.num_attention_heads)  # [T, heads, d]
        k = self._heads(k, f"{name}.k_norm", c.key_heads(layer))
        v = self._heads(v, None, c.key_heads(layer))  # [T, key heads, value_dim]
        if c.attention_value_scale != 1:
            v = v * c.attention_value_scale
        if c.qk_norm == UNIT_NORM and c.turns(layer):
            # a rotation, which follows here and comes first there, keeps lengths
            q, k = unit_norm(ops, q, c.rms_norm_eps), unit_norm(ops, k, c.rms_norm_eps)
        window, chunk = c.window(layer), c.chunk(layer)
        sinks = ops.weight(f"{name}.sinks") if c.has_sinks(layer) else None
        q_norm, k_norm = (ops.weight(f"{name}.{part}_norm") if c.qk_norm == HEAD_NORM else None for part in "qk")
        outputs = []
        for s in sequences:
            for rows, position in self._runs(layer, s):
                if chunk is not None and position % chunk == 0:
                    s.states[layer] = self._new_kv_cache(layer)
                output, s.states[layer] = ops.attention(
                    q[rows],
                    k[rows],
                    v[rows],
                    s.states[layer],
                    c.attention_scale(layer, position),
                    window=window,
                    sinks=sinks,
                    turn=Turn(c.rope_of(layer), position, q_norm, k_norm, c.rms_norm_eps) if c.turns(layer) else None,
                )
                outputs.append(output)  # [tokens, heads, value_dim]
        o = ops.concatenate(outputs).reshape(-1, c.num_attention_heads * c.value_dim)
        return self._linear(o, f"{name}.o_proj", c.attention_output_bias)

    def _runs(self, layer: int, s: Sequence) -> Iterator[tuple[slice, int]]:
        """(rows, position) of a sequence's tokens, cut where a chunk begins and where the scale of scores changes."""
        begin, stop = s.rows.start, s.rows.stop
        while begin < stop:
            position = s.position + begin - s.rows.start
            end = begin + self.config.run_length(layer, position, stop - begin)
            yield slice(begin, end), position
            begin = end

    def _heads(self, y: Array, norm: str | None, heads: int) -> Array:
        """Queries, keys or values as projected: [T, heads, d]."""
        c = self.config
        if c.qk_norm == WHOLE_NORM and norm:
            y = self._norm(y, norm)
        if c.clip_qkv is not None:
            y = self.ops.clip(y, c.clip_qkv)
        return y.reshape(y.shape[0], heads, -1)

    # ---- feed forward

    def _moe(self, layer: int, x: Array) -> Array:
        c, ops, name = self.config, self.ops, f"layers.{layer}.mlp"
        expert_ids, routing_weights = self._route(layer, x)
        ops.fetch(layer, expert_ids)
        ops.look_ahead(layer + 1, lambda: self._route(layer + 1, x)[0])
        if c.shared_expert_intermediate_size is None:
            return ops.experts(layer, x, expert_ids, routing_weights)
        shared = self._mlp(f"{name}.shared_expert", x)
        if c.shared_expert_gate:
            shared = ops.sigmoid(ops.linear(x, ops.weight(f"{name}.shared_expert_gate"))) * shared
        return ops.experts(layer, x, expert_ids, routing_weights) + shared

    def _route(self, layer: int, x: Array) -> tuple[Array, Array]:
        c, ops, name = self.config, self.ops, f"layers.{layer}.mlp.gate"
        routing = Routing(c.top_k, c.scoring_func, c.norm_topk_prob, c.routed_scaling_factor, c.n_group, c.topk_group)
        correction = ops.weight(f"{name}.e_score_correction_bias") if c.e_score_correction_bias else None
        return ops.route(self._linear(x, name, c.router_bias), routing, correction)

    def _mlp(self, name: str, x: Array) -> Array:
        gate, up, down = (self.ops.weight(f"{name}.{part}_proj") for part in ("gate", "up", "down"))
        return self.ops.feed_forward(x, gate, up, down)
