"""DeepSeek-V3: multi-head latent attention, dense layers first, then routed experts and a shared one.

Kimi K2 and GLM-4.7-Flash are the same model with other numbers, DeepSeek-V2 and Mistral Small 4 with other scores,
A.X-K1 with one more norm.
Source: transformers' modeling_deepseek_v3.py. Shapes: T tokens of one step, D hidden_size, H heads.
"""

from collections.abc import Iterator
from collections.abc import Sequence as Items
from dataclasses import dataclass, replace

from formats.config import INDEXED_ATTENTION, DeepseekV3Config
from runtime.backends.base import Ops
from runtime.backends.facts import Array, Routing, State, Wanted, Weight
from runtime.session import Sequence

INDEX_NORM_EPS = 1e-6
LATENT_NORM_EPS = 1e-6  # whatever rms_norm_eps is


@dataclass(frozen=True)
class DeepseekV3:
    config: DeepseekV3Config
    ops: Ops

    def new_states(self) -> list[State]:
        """What every layer remembers of a sequence that has not begun."""
        return [self._new_state(layer_type) for layer_type in self.config.layer_types]

    def _new_state(self, layer_type: str) -> State:
        """An empty cache of latents, and one of the indexer's keys where it chooses."""
        return self._new_latent_cache(), self._new_index_cache(layer_type)

    def _new_latent_cache(self) -> State:
        return self.ops.new_latent_cache(self.config.kv_lora_rank, self.config.qk_rope_head_dim)

    def _new_index_cache(self, layer_type: str) -> State:
        indexer = self.config.indexer
        if indexer is None or layer_type != INDEXED_ATTENTION:
            return None
        return self.ops.new_index_cache(indexer.index_head_dim)

    def forward(self, token_ids: Items[int], sequences: Items[Sequence], wanted: Wanted = None) -> Array:
        """Tokens of one step, sequence after sequence -> last hidden states [T, D]; replaces the states."""
        h = self.ops.embed(token_ids)  # [T, D]
        selections: list[Array | None] = [None for _ in sequences]  # of the last indexer, which layers may share
        x = self._norm(h, "layers.0.input_layernorm")
        for layer in range(self.config.num_hidden_layers):
            last = layer + 1 == self.config.num_hidden_layers
            y = self._attention(layer, x, sequences, selections)
            h, y = (self.ops.rows(part, wanted if last else None) for part in (h, y))
            h, x = self._add_norm(h, y, f"layers.{layer}.post_attention_layernorm")
            y = self._moe(layer, x) if self.config.has_experts(layer) else self._mlp(f"layers.{layer}.mlp", x)
            h, x = self._add_norm(h, y, "norm" if last else f"layers.{layer + 1}.input_layernorm")
        return x

    def logits(self, hidden: Array) -> Array:
        """[T, D] -> [T, vocab_size]."""
        return self.ops.linear(hidden, self.ops.weight("lm_head"))

    def _norm(self, x: Array, name: str) -> Array:
        return self.ops.rms_norm(x, self.ops.weight(name), self.config.rms_norm_eps)

    def _add_norm(self, h: Array, y: Array, name: str) -> tuple[Array, Array]:
        return self.ops.add_norm(h, y, self.ops.weight(name), self.config.rms_norm_eps)

    # ---- multi-head latent attention

    def _attention(self, layer: int, x: Array, sequences: Items[Sequence], selections: list[Array | None]) -> Array:
        c, ops, rank = self.config, self.ops, self.config.kv_lora_rank

        def w(tensor: str) -> Weight:
            return ops.weight(f"{self._attention_name(layer)}.{tensor}")

        if c.q_lora_rank is None:
            q = ops.linear(x, w("q_proj"))
        else:
            latent_q = ops.rms_norm(ops.linear(x, w("q_a_proj")), w("q_a_layernorm"), self._latent_norm_eps)
            q = ops.linear(latent_q, w("q_b_proj"))
            if c.indexer is not None and c.layer_types[layer] == INDEXED_ATTENTION:
                selections[:] = self._selections(layer, x, latent_q, sequences)
        q = q.reshape(-1, c.num_attention_heads, c.head_dim)  # per head: without, then with position
        latent_k = ops.linear(x, w("kv_a_proj_with_mqa"))  # [T, rank + rope]: one key with position for all heads
        latent = self._latent(latent_k[:, :rank], w("kv_a_layernorm"))
        outputs = []
        for s, selection in zip(sequences, selections, strict=True):
            for rows, position, scale in self._runs(s):
                latents, index = s.states[layer]
                q_rope = self._turned(q[rows, :, c.qk_nope_head_dim :], position)
                k_rope = self._turned(latent_k[rows, None, rank:], position)[:, 0]
                output, latents = ops.latent_attention(
                    q[rows, :, : c.qk_nope_head_dim],
                    q_rope,
                    latent[rows],
                    k_rope,
                    [w(part) for part in (("embed_q", "unembed_out") if c.kv_b_split else ("kv_b_proj",))],
                    latents,
                    scale=scale,
                    selection=selection,
                    sinks=self._sinks(layer),
                )
                s.states[layer] = (latents, index)
                outputs.append(output)  # [tokens, H, v_head_dim]
        o = ops.concatenate(outputs).reshape(-1, c.num_attention_heads * c.v_head_dim)
        return ops.linear(self._gated(layer, x, o), w("o_proj"))

    def _runs(self, s: Sequence) -> Iterator[tuple[slice, int, float]]:
        """(rows, position, scale of scores) of a sequence's tokens, cut where the scale changes."""
        begin, stop = s.rows.start, s.rows.stop
        while begin < stop:
            position = s.position + begin - s.rows.start
            tokens, scale = self.config.run_of_scale(position, stop - begin)
            yield slice(begin, begin + tokens), position, scale
            begin += tokens

    def _attention_name(self, layer: int) -> str:
        return f"layers.{layer}.self_attn"

    def _latent(self, latent: Array, norm: Weight) -> Array:
        """What keys and values are made of: [T, rank]."""
        return self.ops.rms_norm(latent, norm, self._latent_norm_eps)

    @property
    def _latent_norm_eps(self) -> float:
        """Of q_a_layernorm and kv_a_layernorm."""
        return LATENT_NORM_EPS

    def _sinks(self, layer: int) -> Weight | None:
        """A score per head that takes part in the softmax and brings no value."""
        return None

    def _gated(self, layer: int, x: Array, o: Array) -> Array:
        """What attention gives [T, H * v_head_dim], as it is."""
        return o

    def _turned(self, x: Array, position: int) -> Array:
        return self.ops.rope(x, position, self.config.rope)

    def _selections(self, layer: int, x: Array, latent_q: Array, sequences: Items[Sequence]) -> list[Array]:
        """The tokens that attention may see, per sequence: DeepSeek-V3.2's indexer."""
        ops, indexer, name = self.ops, self.config.indexer, f"layers.{layer}.self_attn.indexer"
        assert indexer is not None
        heads, d = indexer.index_n_heads, indexer.index_head_dim
        q = ops.linear(latent_q, ops.weight(f"{name}.wq_b")).reshape(-1, heads, d)  # per head: with position first
        k = ops.linear(x, ops.weight(f"{name}.wk"))  # [T, d]
        k = ops.layer_norm(k, ops.weight(f"{name}.k_norm"), ops.weight(f"{name}.k_norm.bias"), self._index_norm_eps)
        weights = ops.linear(x, ops.weight(f"{name}.weights_proj")) * (heads * d) ** -0.5  # [T, heads]
        selections = []
        for s in sequences:
            latents, index = s.states[layer]
            q_s = self._index_queries(layer, q[s.rows], s.position)
            k_s = self._index_turned(layer, k[s.rows, None], s.position)[:, 0]
            selection, index = ops.select_tokens(q_s, k_s, weights[s.rows], index, indexer.index_topk)
            s.states[layer] = (latents, index)
            selections.append(selection)
        return selections

    @property
    def _index_norm_eps(self) -> float:
        """Of the norm of the indexer's keys."""
        return INDEX_NORM_EPS

    def _index_queries(self, layer: int, q: Array, position: int) -> Array:
        """As they meet keys."""
        return self._index_turned(layer, q, position)

    def _index_turned(self, layer: int, x: Array, position: int) -> Array:
        assert self.config.indexer is not None
        rope = replace(self.config.rope, interleaved=self.config.indexer.rope_interleave)
        return self.ops.rope(x, position, rope)

    # ---- feed forward

    def _moe(self, layer: int, x: Array) -> Array:
        expert_ids, routing_weights = self._route(layer, x)
        self.ops.fetch(layer, expert_ids)
        self.ops.look_ahead(layer + 1, lambda: self._route(layer + 1, x)[0])
        shared = self._mlp(f"layers.{layer}.mlp.shared_experts", x)
        y = self.ops.experts(layer, x, expert_ids, routing_weights) + shared
        return self._norm(y, f"layers.{layer}.post_mlp_layernorm") if self.config.post_mlp_norm else y

    def _route(self, layer: int, x: Array) -> tuple[Array, Array]:
        c, ops, name = self.config, self.ops, f"layers.{layer}.mlp.gate"
        routing = Routing(c.top_k, c.scoring_func, c.norm_topk_prob, c.routed_scaling_factor, c.n_group, c.topk_group)
        bias = ops.weight(f"{name}.e_score_correction_bias") if c.has_correction_bias else None
        return ops.route(ops.linear(x, ops.weight(name)), routing, bias)

    def _mlp(self, name: str, x: Array) -> Array:
        gate, up, down = (self.ops.weight(f"{name}.{part}_proj") for part in ("gate", "up", "down"))
        return self.ops.feed_forward(x, gate, up, down)
