"""The plain decoder: attention over keys and values, then routed experts, each added to the stream.

Mixtral, OLMoE, Granite, Qwen2 and Qwen3, GLM-4.5, MiniMax-M2, gpt-oss, Llama 4, MiMo-V2-Flash and others (README) are
this model with other facts. Sources: transformers' modeling files of those names. Shapes: T tokens of one step, D
hidden_size, d width of a head.
"""

from collections.abc import Iterable, Iterator
from collections.abc import Sequence as Items
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby
from typing import NamedTuple

from formats.config import (
    HEAD_NORM,
    NO_GATE,
    SIGMOID,
    SIGMOID_BY_HEAD,
    SOFTPLUS_BY_HEAD,
    TURNED_NORM,
    UNIT_NORM,
    WHOLE_NORM,
    DecoderConfig,
    Rope,
)
from runtime.backends.base import Ops
from runtime.backends.facts import (
    Array,
    Attention,
    Block,
    RoutedLayer,
    Router,
    Routing,
    Shared,
    Stack,
    State,
    Turn,
    Wanted,
    Weight,
)
from runtime.models.norms import unit_norm
from runtime.session import Sequence


class Layer(NamedTuple):
    """Attention of one layer, and what some models do beside it."""

    attention: Attention | None  # None where another mixer stands in its place
    chunk: int | None
    uniform: bool  # neither chunks nor scales that depend on the position
    router: Router | None  # None where the layer is dense
    shared: Shared | None
    block: Block | None  # all of this, where there are experts and nothing beside it


@dataclass(frozen=True)
class Decoder:
    config: DecoderConfig
    ops: Ops

    def new_states(self) -> list[State]:
        """What every layer remembers, before the first token."""
        return [self._new_state(layer) for layer in range(self.config.num_hidden_layers)]

    def _new_state(self, layer: int) -> State:
        """What a convolution remembers, or a cache of keys and values."""
        c = self.config
        if c.is_conv(layer):
            return self.ops.zeros(((c.conv_kernel_size or 1) - 1, c.hidden_size))
        return self._new_kv_cache(layer)

    def _new_kv_cache(self, layer: int) -> State:
        c = self.config
        return self.ops.new_kv_cache(c.key_heads(layer), c.head_dim, c.window(layer), c.chunk(layer), c.value_dim)

    def forward(self, token_ids: Items[int], sequences: Items[Sequence], wanted: Wanted = None) -> Array:
        """Tokens of one step, sequence after sequence -> last hidden states [T, D]; replaces the states."""
        c = self.config
        h = self.ops.embed(token_ids) * c.embedding_multiplier  # [T, D]
        y = h * 0.0
        last = self._parts_of_model[-1]
        for part in self._parts_of_model:
            wanted_here = wanted if part is last else None
            if isinstance(part, Stack):
                h, y = self.ops.layers(h, y, part, sequences, wanted_here)
            else:
                h, y = self._layer(part, h, y, sequences, wanted_here)
        return self._add_norm(h, y, "norm")[1]

    def _layer(self, layer: int, h: Array, y: Array, sequences: Items[Sequence], wanted: Wanted) -> tuple[Array, Array]:
        """Of the stream and what the layer before adds to it: the stream, and what this one adds, as far as wanted."""
        name = f"layers.{layer}"
        h, x = self._input(h, y, f"{name}.input_layernorm")
        h, y = (self.ops.rows(part, wanted) for part in (h, self._mixer(layer, x, sequences)))
        y = self._output_norm(y, f"{name}.attention_output_norm")
        h, x = self._input(h, y, f"{name}.post_attention_layernorm")
        return h, self._output_norm(self._feed_forward(layer, x), f"{name}.post_mlp_layernorm")

    def logits(self, hidden: Array) -> Array:
        """[T, D] -> [T, vocab_size]."""
        return self.ops.linear(hidden, self.ops.weight("lm_head")) * (1 / self.config.logits_scaling)

    def _input(self, h: Array, y: Array, norm: str) -> tuple[Array, Array]:
        """The stream with what is added to it, and what attention or experts read of it."""
        if self.config.input_norms:
            return self._add_norm(h, y, norm)
        h = h + y * self.config.residual_multiplier
        return h, h

    def _add_norm(self, h: Array, y: Array, name: str) -> tuple[Array, Array]:
        c = self.config
        return self.ops.add_norm(
            h, y, self.ops.weight(name), c.rms_norm_eps, offset=c.norm_offset, multiplier=c.residual_multiplier
        )

    def _output_norm(self, y: Array, name: str) -> Array:
        c = self.config
        return self.ops.rms_norm(y, self.ops.weight(name), c.rms_norm_eps) if c.output_norms else y

    # ---- weights and facts of a layer, looked up before the first step and not in each (docs/LEARNED.md 66)

    @cached_property
    def _layers(self) -> list[Layer]:
        return [self._layer_of(layer) for layer in range(self.config.num_hidden_layers)]

    @cached_property
    def _parts_of_model(self) -> list[Stack | int]:
        """Layers of a block that follow each other together, all others alone."""
        parts: list[Stack | int] = []
        for stacked, group in groupby(enumerate(self._layers), lambda layer: layer[1].block is not None):
            numbers = [layer for layer, _ in group]
            parts += [Stack(numbers[0], tuple(map(self._routed_layer, numbers)))] if stacked else numbers
        return parts

    def _routed_layer(self, layer: int) -> RoutedLayer:
        own = self._layers[layer]
        assert own.block is not None
        return RoutedLayer(own.block, own.shared, self._router_after(layer))

    def _router_after(self, layer: int) -> Router | None:
        """That of the next layer, if it has one."""
        return self._layers[layer + 1].router if layer + 1 < len(self._layers) else None

    def _layer_of(self, layer: int) -> Layer:
        c, name = self.config, f"layers.{layer}"
        attention = self._attention_of(layer) if c.attends(layer) else None
        router = self._router_of(layer) if c.has_experts(layer) else None
        block = None
        plain = (  # what a block of one call knows
            c.is_uniform(layer)
            and c.one_call
            and not c.fused_qkv
            and c.qk_norm not in (TURNED_NORM, UNIT_NORM)
            and c.clip_qkv is None
            and c.attention_value_scale == 1
            and c.attention_gate == NO_GATE
            and c.input_norms
            and not c.output_norms
        )
        if attention is not None and router is not None and plain:
            norms = [self.ops.weight(f"{name}.{norm}_layernorm") for norm in ("input", "post_attention")]
            block = Block(
                norms[0], attention, norms[1], router, c.rms_norm_eps, c.norm_offset, multiplier=c.residual_multiplier
            )
        shared = None
        if router is not None and c.shared_expert_intermediate_size is not None:
            shared = self._mlp_of(layer, f"{name}.mlp.shared_expert")
        return Layer(attention, c.chunk(layer), c.is_uniform(layer), router, shared, block)

    def _attention_of(self, layer: int) -> Attention:
        c, ops, name = self.config, self.ops, f"layers.{layer}.self_attn"
        names = [f"{name}.{part}_proj" for part in (("qkv",) if c.fused_qkv else "qkv")]
        by_head = self._qk_norms_of(layer, HEAD_NORM) or self._qk_norms_of(layer, TURNED_NORM)
        q_norm, k_norm = by_head or (None, None)
        return Attention(
            projections=tuple(ops.weight(proj) for proj in names),
            biases=tuple(ops.weight(f"{proj}.bias") for proj in names) if c.attention_bias else None,
            output=ops.weight(f"{name}.o_proj"),
            output_bias=ops.weight(f"{name}.o_proj.bias") if c.attention_output_bias else None,
            heads=c.query_heads(layer),
            key_heads=c.key_heads(layer),
            scale=c.attention_multiplier,
            rope=self._rope_of(layer),
            q_norm=q_norm,
            k_norm=k_norm,
            whole_norms=self._qk_norms_of(layer, WHOLE_NORM),
            eps=c.rms_norm_eps,
            offset=c.norm_offset,
            window=c.window(layer),
            sinks=ops.weight(f"{name}.sinks") if c.has_sinks(layer) else None,
        )

    def _rope_of(self, layer: int) -> Rope | None:
        """None where positions are not known; one that turns nothing where heads are normalised all the same."""
        c = self.config
        if c.turns(layer):
            return c.rope_of(layer)
        return replace(c.rope, turned=0, scaling=None) if c.qk_norm in (HEAD_NORM, TURNED_NORM) else None

    def _qk_norms_of(self, layer: int, kind: str) -> tuple[Weight, Weight] | None:
        if self.config.qk_norm != kind:
            return None
        q_norm, k_norm = (self.ops.weight(f"layers.{layer}.self_attn.{part}_norm") for part in "qk")
        return q_norm, k_norm

    def _router_of(self, layer: int) -> Router:
        c, weight, name = self.config, self.ops.weight, f"layers.{layer}.mlp.gate"
        gate = (weight(f"layers.{layer}.mlp.shared_expert_gate"),) if c.shared_expert_gate else ()
        return Router(
            (weight(name), *gate),
            (weight(f"{name}.bias"),) if c.router_bias else None,
            Routing(c.top_k, c.scoring_func, c.norm_topk_prob, c.routed_scaling_factor, c.n_group, c.topk_group),
            weight(f"{name}.e_score_correction_bias") if c.e_score_correction_bias else None,
        )

    # ---- attention, or a short convolution

    def _mixer(self, layer: int, x: Array, sequences: Items[Sequence]) -> Array:
        return (self._convolution if self.config.is_conv(layer) else self._attention)(layer, x, sequences)

    def _convolution(self, layer: int, x: Array, sequences: Items[Sequence]) -> Array:
        """A causal convolution of x gated by itself, and gated once more (LFM2)."""
        ops, name, d = self.ops, f"layers.{layer}.conv", self.config.hidden_size
        projected = ops.linear(x, ops.weight(f"{name}.in_proj"))  # [T, 3 D]
        y, after = projected[:, :d] * projected[:, 2 * d :], projected[:, d : 2 * d]
        outputs = []
        for s in sequences:
            output, s.states[layer] = ops.causal_conv1d(y[s.rows], ops.weight(f"{name}.conv"), s.states[layer])
            outputs.append(output)  # [tokens, D]
        return ops.linear(after * ops.concatenate(outputs), ops.weight(f"{name}.out_proj"))

    def _attention(self, layer: int, x: Array, sequences: Items[Sequence]) -> Array:
        """As `Ops.self_attention`, and what some models do between the projections and attention."""
        c, ops, (own, chunk, *_) = self.config, self.ops, self._layers[layer]
        assert own is not None
        q, k, v = self._projected(x, own)
        q_norm, k_norm = own.whole_norms or (None, None)
        q = self._heads(q, q_norm, own.heads)  # [T, heads, d]
        k = self._heads(k, k_norm, own.key_heads)
        v = self._heads(v, None, own.key_heads)  # [T, key heads, value_dim]
        if c.attention_value_scale != 1:
            v = v * c.attention_value_scale
        if c.qk_norm == UNIT_NORM and own.rope is not None:
            # a rotation, which follows here and comes first there, keeps lengths
            q, k = unit_norm(ops, q, c.rms_norm_eps), unit_norm(ops, k, c.rms_norm_eps)
        outputs = []
        for s in sequences:
            for rows, position, scale in self._runs(layer, s, own.scale):
                if chunk is not None and position % chunk == 0:
                    s.states[layer] = self._new_kv_cache(layer)
                turn = (
                    Turn(own.rope, position, own.q_norm, own.k_norm, own.eps, own.offset)
                    if own.rope is not None
                    else None
                )
                own_q, own_k = q[rows], k[rows]
                if c.qk_norm == TURNED_NORM and turn is not None:
                    own_q, own_k = self._turned(own_q, own.q_norm, turn), self._turned(own_k, own.k_norm, turn)
                    turn = None
                output, s.states[layer] = ops.attention(
                    own_q, own_k, v[rows], s.states[layer], scale, window=own.window, sinks=own.sinks, turn=turn
                )
                outputs.append(output)  # [tokens, heads, value_dim]
        o = ops.concatenate(outputs).reshape(-1, own.heads * c.value_dim)
        if c.attention_gate != NO_GATE:
            o = self._gated(o, ops.linear(x, ops.weight(f"layers.{layer}.self_attn.g_proj")), own.heads)
        return ops.linear(o, own.output, own.output_bias)

    def _projected(self, x: Array, own: Attention) -> Items[Array]:
        """Queries, keys and values [T, any]."""
        if not self.config.fused_qkv:
            return self.ops.linears(x, own.projections, own.biases)
        (qkv,) = self.ops.linears(x, own.projections)
        queries, keys = own.heads * self.config.head_dim, own.key_heads * self.config.head_dim
        return qkv[:, :queries], qkv[:, queries : queries + keys], qkv[:, queries + keys :]

    def _gated(self, o: Array, gate: Array, heads: int) -> Array:
        """What heads give [T, heads * value_dim], each value or each head by its gate."""
        c = self.config
        if c.attention_gate == SIGMOID:
            return self.ops.gate(o, gate, SIGMOID)
        gate = self.ops.sigmoid(gate) if c.attention_gate == SIGMOID_BY_HEAD else self.ops.softplus(gate)
        if c.attention_gate in (SIGMOID_BY_HEAD, SOFTPLUS_BY_HEAD):
            return (o.reshape(-1, heads, c.value_dim) * gate.reshape(-1, heads, 1)).reshape(o.shape)
        return o * gate

    def _turned(self, x: Array, norm: Weight, turn: Turn) -> Array:
        """Queries or keys [T, heads, d], turned and then normalised."""
        return self.ops.rms_norm(self.ops.rope(x, turn.position, turn.rope), norm, turn.eps)

    def _runs(self, layer: int, s: Sequence, scale: float) -> Iterable[tuple[slice, int, float]]:
        """(rows, position, scale of scores) of a sequence's tokens, cut where a chunk begins or the scale changes."""
        return [(s.rows, s.position, scale)] if self._layers[layer].uniform else self._parts(layer, s)

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

    def _feed_forward(self, layer: int, x: Array) -> Array:
        """What a layer's experts, or a dense layer, make of x [T, D]."""
        own = self._layers[layer]
        if own.router is None:
            return self.ops.feed_forward(x, *self._mlp_of(layer, f"layers.{layer}.mlp"))
        routed = self.ops.route_input(x, own.router)
        self.ops.fetch_routed(layer, routed, self._router_after(layer))
        return self.ops.routed_experts(layer, routed, own.shared)

    def _mlp_of(self, layer: int, name: str) -> Shared:
        """A dense layer or a shared expert."""
        gate, up, down = (self.ops.weight(f"{name}.{part}_proj") for part in ("gate", "up", "down"))
        return Shared(gate, up, down, self.config.dense_activation(layer))
