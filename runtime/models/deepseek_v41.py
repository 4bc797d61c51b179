"""DeepSeek-V4.1: streams, a window and compressed entries as in DeepSeek-V4, but few layers make and choose entries.

What a half of a layer reads of the streams the half before it has weighed. Some layers add embeddings of n-grams to the
streams, read from disk as that of tokens is. Keys and entries are rounded to few bits, as they were in training.
Sources: mlx-lm's deepseek_v41.py; of n-grams the published inference/engram.py. Shapes: T tokens of one step, D
hidden_size, N streams, H heads, d width of a head.
"""

from collections.abc import Iterator
from collections.abc import Sequence as Items
from dataclasses import dataclass, replace
from typing import NamedTuple

from formats.config import SQRT_SOFTPLUS, DeepseekV41Config
from formats.errors import RequestError
from runtime.backends.facts import Array, Beside, Rounding, Routing, State, Wanted, Weight
from runtime.models.compressed import OverEntries
from runtime.models.ngrams import engram_rows
from runtime.models.norms import unit_norm
from runtime.models.streams import spread, weights
from runtime.session import Sequence

KEYS, ENTRIES, INDEX = Rounding(8, 32), Rounding(4, 16, e4m3_scales=True), Rounding(4, 32)


class LayerState(NamedTuple):
    """What a layer remembers: tokens of the window; where it makes entries these, open tokens, and index keys."""

    cache: State
    entries: State = None
    window: State = None  # of tokens, open; None where each token has an entry
    index: State = None


@dataclass
class Chosen:
    """Which entries a sequence's tokens see, and among which the next indexer may choose: [tokens, entries]."""

    selection: Array = None
    candidates: Array = None


@dataclass(frozen=True)
class DeepseekV41(OverEntries):
    config: DeepseekV41Config
    classes: Items[int] = ()  # of tokens, for n-grams

    def new_states(self) -> list[State]:
        """What every layer remembers of a sequence that has not begun; last, the classes that n-grams look back at."""
        engrams = self.config.engrams
        behind = [self._class(engrams.pad_token_id)] * (engrams.max_ngram_size - 1) if engrams else []
        return [*(self._new_state(layer) for layer in range(self.config.num_hidden_layers)), behind]

    def _new_state(self, layer: int) -> LayerState:
        c, ops, ratio = self.config, self.ops, self.config.compress_ratios[layer]
        cache = ops.new_kv_cache(1, c.head_dim, c.sliding_window)
        if not c.is_kv_source(layer):
            return LayerState(cache)
        window = ops.new_open_window(ratio, c.head_dim, False) if ratio > 1 else None
        return LayerState(
            cache, ops.new_entries(c.head_dim, ratio), window, ops.new_index_cache(c.index_head_dim, ratio)
        )

    def forward(self, token_ids: Items[int], sequences: Items[Sequence], wanted: Wanted = None) -> Array:
        """Tokens of one step, sequence after sequence -> last hidden states [T, D]; replaces the states."""
        c, ops = self.config, self.ops
        histories = list(self._histories(token_ids, sequences))
        chosen = [Chosen() for _ in sequences]
        h = spread(ops, token_ids, c.hc_mult)  # [T, N, D]
        pre = ops.concatenate([ops.zeros((len(h), 1)) + 1.0, ops.zeros((len(h), c.hc_mult - 1))], axis=1)  # [T, N]
        for layer in range(c.num_hidden_layers):
            if layer in c.ngram_layers:
                h = self._engram(layer, h, histories)
            following, post, comb = weights(ops, c, h, f"layers.{layer}.attn_hc")
            x = self._norm(ops.collapse_streams(h, pre), f"layers.{layer}.input_layernorm")
            h = ops.expand_streams(h, self._attention(layer, x, sequences, chosen), post, comb)
            if layer + 1 == c.num_hidden_layers:
                h, following = ops.rows(h, wanted), ops.rows(following, wanted)
            pre, post, comb = weights(ops, c, h, f"layers.{layer}.ffn_hc")
            x = self._norm(ops.collapse_streams(h, following), f"layers.{layer}.post_attention_layernorm")
            h = ops.expand_streams(h, self._moe(layer, x), post, comb)
        return self._norm(ops.collapse_streams(h, pre), "norm")

    # ---- n-grams

    def _class(self, token_id: int) -> int:
        if token_id >= len(self.classes):
            raise RequestError(f"token {token_id} is none of the {len(self.classes)} in tokenizer.json")
        return self.classes[token_id]

    def _histories(self, token_ids: Items[int], sequences: Items[Sequence]) -> Iterator[list[int]]:
        """The classes of each sequence's tokens, behind those that their n-grams look back at."""
        engrams = self.config.engrams
        for s in sequences if engrams else ():
            assert engrams is not None
            history = [*s.states[-1], *map(self._class, token_ids[s.rows])]
            s.states[-1] = history[len(history) - engrams.max_ngram_size + 1 :]
            yield history

    def _engram(self, layer: int, h: Array, histories: Items[list[int]]) -> Array:
        """The streams [T, N, D], to each of them added what n-grams say, as far as its key agrees with the stream."""
        c, ops, name = self.config, self.ops, f"layers.{layer}.engram"
        assert c.engrams is not None
        table = c.engrams.layer_ids.index(layer)
        embedded = ops.embed_ngrams([row for history in histories for row in engram_rows(c.engrams, table, history)])
        both = ops.linear(embedded, ops.weight(f"{name}.wkv"))  # a key for each stream, then a value
        keys, value = both[:, : c.streams_width].reshape(h.shape), both[:, None, c.streams_width :]
        query, key = (
            ops.scale_streams(unit_norm(ops, x, c.rms_norm_eps), ops.weight(f"{name}.{part}_weight"))
            for part, x in (("q", h), ("k", keys))
        )
        return h + ops.root_gate(query, key) * value

    # ---- attention

    def _attention(self, layer: int, x: Array, sequences: Items[Sequence], chosen: Items[Chosen]) -> Array:
        c, ops, name = self.config, self.ops, f"layers.{layer}.self_attn"
        rope = c.compress_rope if c.compress_ratios[layer] else c.rope
        makes, chooses = self._of_input(layer), c.is_index_source(layer)
        q_latent, kv, *parts = ops.linears(
            x, [ops.weight(f"{name}.{part}") for part in ("q_a_proj", "kv_proj", *makes)]
        )
        q_latent = self._norm(q_latent, f"{name}.q_a_norm")  # [T, q_lora_rank]
        queries = ("q_b_proj", "indexer.q_b_proj") if chooses else ("q_b_proj",)
        q, *index_q = ops.linears(q_latent, [ops.weight(f"{name}.{part}") for part in queries])
        q = q.reshape(-1, c.num_attention_heads, c.head_dim)
        kv = self._norm(kv, f"{name}.kv_norm")[:, None]  # [T, 1, d]
        outputs = []
        for s, choice in zip(sequences, chosen, strict=True):
            beside = self._beside(layer, s, choice, [part[s.rows] for part in (*parts, *index_q)])
            q_s, kv_s = (self._turned(part[s.rows], s.position, rope) for part in (q, kv))
            outputs.append(self._attend(layer, s, q_s, ops.rounded(kv_s, KEYS), rope, beside))
        return self._projected(layer, outputs)

    def _of_input(self, layer: int) -> Items[str]:
        """What `_beside` takes of projections of a layer's input."""
        c = self.config
        entries = ("compressor.kv_proj",) if c.is_kv_source(layer) else ()
        gates = ("compressor.gate_proj",) if c.is_kv_source(layer) and c.compress_ratios[layer] > 1 else ()
        return (*entries, *gates, *(("indexer.weights_proj",) if c.is_index_source(layer) else ()))

    def _beside(self, layer: int, s: Sequence, choice: Chosen, projected: list[Array]) -> Beside | None:
        """The entries that a sequence's tokens see, after those that they complete, as the layer or one before chose.

        projected: as `_of_input` names them, then the indexer's queries.
        """
        c, ratio = self.config, self.config.compress_ratios[layer]
        if not ratio:
            return None
        if c.is_kv_source(layer):
            kv, *projected = projected
            gate = projected.pop(0) if ratio > 1 else None
            self._make_entries(layer, s, kv, gate)
        source = s.states[c.kv_source(layer)]
        rows = s.rows.stop - s.rows.start
        seen = [(s.position + i + 1) // ratio for i in range(rows)]
        if c.is_index_source(layer):
            self._choose(layer, s.position, choice, source.index, seen, projected)
        return Beside(source.entries, seen, choice.selection)

    def _make_entries(self, layer: int, s: Sequence, kv: Array, gate: Array | None) -> None:
        """Entries, and the indexer's keys of them, that tokens complete."""
        c, ops, name = self.config, self.ops, f"layers.{layer}.self_attn"
        ratio, state = c.compress_ratios[layer], s.states[layer]
        first, window = s.position // ratio, state.window  # number of the first new entry
        if gate is not None:
            kv, window = ops.compress(kv, gate, None, window)
        entries, index = state.entries, state.index
        if len(kv):
            rope = replace(c.compress_rope, stride=ratio)
            latent = self._norm(kv, f"{name}.compressor.kv_norm")
            k = self._norm(ops.linear(latent, ops.weight(f"{name}.indexer.k_proj")), f"{name}.indexer.k_norm")
            turned, k = (self._turned(x[:, None], first, rope)[:, 0] for x in (latent, k))
            entries = ops.add_entries(entries, ops.rounded(turned, ENTRIES))
            index = ops.add_entries(index, ops.rounded(k, INDEX))
        s.states[layer] = state._replace(entries=entries, window=window, index=index)

    def _choose(
        self, layer: int, position: int, choice: Chosen, index: State, seen: Items[int], projected: Items[Array]
    ) -> None:
        """Which of its first `seen` entries each token sees in this layer and those that go by it."""
        c, ops = self.config, self.ops
        scale, q = projected
        q = self._turned(q.reshape(-1, c.index_n_heads, c.index_head_dim), position, c.compress_rope)
        q, scale = ops.rounded(q, INDEX), scale * (c.index_n_heads * c.index_head_dim) ** -0.5  # [tokens, heads]
        if c.candidates is None or layer != c.candidates.layer_id:
            choice.selection = ops.select_among(q, scale, index, c.index_topk, seen, choice.candidates)
        else:
            choice.selection, choice.candidates = ops.select_candidates(
                q, scale, index, c.index_topk, seen, c.candidates.block_size, c.candidates.topk_blocks
            )

    # ---- feed forward

    def _moe(self, layer: int, x: Array) -> Array:
        expert_ids, routing_weights = self._route(layer, x)
        self.ops.fetch(layer, expert_ids)
        self.ops.look_ahead(layer + 1, lambda: self._route(layer + 1, x)[0])
        gate, up, down = (self._shared(layer, part) for part in ("gate", "up", "down"))
        shared = self.ops.feed_forward(x, gate, up, down)
        return self.ops.experts(layer, x, expert_ids, routing_weights) + shared

    def _shared(self, layer: int, part: str) -> Weight:
        return self.ops.weight(f"layers.{layer}.mlp.shared_experts.{part}_proj")

    def _route(self, layer: int, x: Array) -> tuple[Array, Array]:
        c, ops, name = self.config, self.ops, f"layers.{layer}.mlp.gate"
        routing = Routing(c.top_k, SQRT_SOFTPLUS, c.top_k > 1, c.routed_scaling_factor)  # one weight is not normalised
        logits = ops.linear(x, ops.weight(name)) * (1 / c.gate_temp)
        return ops.route(logits, routing, ops.weight(f"{name}.e_score_correction_bias"))
