"""The plain decoder: attention over keys and values, then routed experts, each added to the stream.

Mixtral, OLMoE, Granite, Qwen2 and Qwen3, GLM-4.5, MiniMax-M2, gpt-oss, Llama 4 and MiMo-V2-Flash are this model with
other facts. Sources: transformers' modeling files of those names. Shapes: T tokens of one step, D hidden_size, d width
of a head.
"""

from collections.abc import Iterable, Iterator
from collections.abc import Sequence as Items
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from formats.config import HEAD_NORM, UNIT_NORM, WHOLE_NORM, DecoderConfig, Rope
from runtime.backends.base import Array, Ops, Routing, State, Turn, Weight
from runtime.models.norms import unit_norm
from runtime.session import Sequence


class Linear(NamedTuple):
    """A matrix [rows, columns], and what is added to the product [rows]."""

    weight: Weight
    bias: Weight | None


class Attention(NamedTuple):
    """What attention of one layer has."""

    projections: list[Weight]  # to queries, keys and values
    biases: list[Weight] | None
    whole_norms: tuple[Weight | None, Weight | None]  # of queries and of keys, all heads together
    head_norms: tuple[Weight | None, Weight | None]  # or head by head
    sinks: Weight | None
    output: Linear
    key_heads: int
    window: int | None
    chunk: int | None
    scale: float | None  # of scores; None where it depends on the position, or where tokens are cut into chunks
    rope: Rope | None  # None where positions are not known


class Router(NamedTuple):
    """How one layer chooses its experts."""

    matrix: Linear
    routing: Routing
    correction: Weight | None


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

    def _linear(self, x: Array, matrix: Linear) -> Array:
        return self.ops.linear(x, matrix.weight, matrix.bias)

    # ---- weights and facts of a layer, looked up before the first step and not in each (docs/LEARNED.md 66)

    @cached_property
    def _attentions(self) -> list[Attention]:
        return [self._attention_of(layer) for layer in range(self.config.num_hidden_layers)]

    @cached_property
    def _routers(self) -> list[Router | None]:
        layers = range(self.config.num_hidden_layers)
        return [self._router_of(layer) if self.config.has_experts(layer) else None for layer in layers]

    def _attention_of(self, layer: int) -> Attention:
        c, ops, name = self.config, self.ops, f"layers.{layer}.self_attn"
        names = [f"{name}.{part}_proj" for part in "qkv"]
        return Attention(
            projections=[ops.weight(proj) for proj in names],
            biases=[ops.weight(f"{proj}.bias") for proj in names] if c.attention_bias else None,
            whole_norms=self._qk_norms_of(name, WHOLE_NORM),
            head_norms=self._qk_norms_of(name, HEAD_NORM),
            sinks=ops.weight(f"{name}.sinks") if c.has_sinks(layer) else None,
            output=self._linear_of(f"{name}.o_proj", c.attention_output_bias),
            key_heads=c.key_heads(layer),
            window=c.window(layer),
            chunk=c.chunk(layer),
            scale=c.attention_multiplier if c.is_uniform(layer) else None,
            rope=c.rope_of(layer) if c.turns(layer) else None,
        )

    def _qk_norms_of(self, name: str, kind: str) -> tuple[Weight | None, Weight | None]:
        if self.config.qk_norm != kind:
            return None, None
        return self.ops.weight(f"{name}.q_norm"), self.ops.weight(f"{name}.k_norm")

    def _router_of(self, layer: int) -> Router:
        c, name = self.config, f"layers.{layer}.mlp.gate"
        return Router(
            self._linear_of(name, c.router_bias),
            Routing(c.top_k, c.scoring_func, c.norm_topk_prob, c.routed_scaling_factor, c.n_group, c.topk_group),
            self.ops.weight(f"{name}.e_score_correction_bias") if c.e_score_correction_bias else None,
        )

    def _linear_of(self, name: str, has_bias: bool) -> Linear:
        return Linear(self.ops.weight(name), self.ops.weight(f"{name}.bias") if has_bias else None)

    # ---- attention

    def _attention(self, layer: int, x: Array, sequences: Items[Sequence]) -> Array:
        c, ops, own = self.config, self.ops, self._attentions[layer]
        q, k, v = ops.linears(x, own.projections, own.biases)
        q = self._heads(q, own.whole_norms[0], c.num_attention_heads)  # [T, heads, d]
        k = self._heads(k, own.whole_norms[1], own.key_heads)
        v = self._heads(v, None, own.key_heads)  # [T, key heads, value_dim]
        if c.attention_value_scale != 1:
            v = v * c.attention_value_scale
        if c.qk_norm == UNIT_NORM and own.rope is not None:
            # a rotation, which follows here and comes first there, keeps lengths
            q, k = unit_norm(ops, q, c.rms_norm_eps), unit_norm(ops, k, c.rms_norm_eps)
        outputs = []
        for s in sequences:
            for rows, position, scale in self._runs(layer, s):
                if own.chunk is not None and position % own.chunk == 0:
                    s.states[layer] = self._new_kv_cache(layer)
                turn = None if own.rope is None else Turn(own.rope, position, *own.head_norms, c.rms_norm_eps)
                output, s.states[layer] = ops.attention(
                    q[rows], k[rows], v[rows], s.states[layer], scale, window=own.window, sinks=own.sinks, turn=turn
                )
                outputs.append(output)  # [tokens, heads, value_dim]
        o = ops.concatenate(outputs).reshape(-1, c.num_attention_heads * c.value_dim)
        return self._linear(o, own.output)

    def _runs(self, layer: int, s: Sequence) -> Iterable[tuple[slice, int, float]]:
        """(rows, position, scale of scores) of a sequence's tokens, cut where a chunk begins or the scale changes."""
        scale = self._attentions[layer].scale
        return self._parts(layer, s) if scale is None else [(s.rows, s.position, scale)]

    def _parts(self, layer: int, s: Sequence) -> Iterator[tuple[slice, int, float]]:
        """`_runs` of a layer that is cut."""
        begin, stop = s.rows.start, s.rows.stop
        while begin < stop:
            position = s.position + begin - s.rows.start
            end = begin + self.config.run_length(layer, position, stop - begin)
            yield slice(begin, end), position, self.config.attention_scale(layer, position)
            begin = end

    def _heads(self, y: Array, norm: Weight | None, heads: int) -> Array:
        """Queries, keys or values as projected: [T, heads, d]."""
        c = self.config
        if norm is not None:
            y = self.ops.rms_norm(y, norm, c.rms_norm_eps)
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
        router = self._routers[layer]
        assert router is not None
        return self.ops.route(self._linear(x, router.matrix), router.routing, router.correction)

    def _mlp(self, name: str, x: Array) -> Array:
        gate, up, down = (self.ops.weight(f"{name}.{part}_proj") for part in ("gate", "up", "down"))
        return self.ops.feed_forward(x, gate, up, down)
