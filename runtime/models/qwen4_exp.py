"""Qwen3.8-Flash-Next: several streams of hidden values, of which every half of a layer reads a mixture.

Gated DeltaNet, attention and experts are Qwen3.5 MoE's; attention sees the blocks of tokens that an indexer chooses,
and one layer adds an embedding of the last n-grams, read from disk as that of tokens is.
Source: transformers' modular_qwen4_exp.py (text part). Shapes: T tokens of one step, D hidden_size, S streams.
"""

from collections.abc import Sequence as Items
from dataclasses import dataclass, replace

from formats.config import LINEAR_ATTENTION, SIGMOID, Qwen4ExpConfig
from runtime.backends.facts import Array, Attention, DeltaNet, Part, State, Turn, Wanted
from runtime.models.ngrams import ngram_rows
from runtime.models.norms import unit_norm
from runtime.models.qwen3_5_moe import Qwen3_5Moe
from runtime.session import Sequence


@dataclass(frozen=True)
class Qwen4Exp(Qwen3_5Moe):
    config: Qwen4ExpConfig

    def new_states(self) -> list[State]:
        """What every layer remembers of a sequence that has not begun; last, what n-grams need of it."""
        kinds = self.config.layer_types
        layers = [self._new_delta_state() if kind == LINEAR_ATTENTION else self._new_indexed_state() for kind in kinds]
        return [*layers, self._new_ngram_state()]

    def forward(self, token_ids: Items[int], sequences: Items[Sequence], wanted: Wanted = None) -> Array:
        """Tokens of one step, sequence after sequence -> last hidden states [T, D]; replaces the states."""
        c, ops = self.config, self.ops
        h = ops.concatenate([ops.embed(token_ids)] * c.hc_count, axis=1)  # [T, S * D]
        for layer, layer_type in enumerate(c.layer_types):
            mixer = self._linear_attention if layer_type == LINEAR_ATTENTION else self._block_attention
            if layer in c.ngram_layers:
                h = h + self._ngrams(f"layers.{layer}.ple", h, token_ids, sequences)
            x, normed = self._mixed(h, f"layers.{layer}.attn_hyper_connection")
            h = self._injected(h, mixer(layer, x, sequences), normed, f"layers.{layer}.attn_hyper_connection")
            if layer + 1 == c.num_hidden_layers:
                h = ops.rows(h, wanted)
            x, normed = self._mixed(h, f"layers.{layer}.mlp_hyper_connection")
            h = self._injected(h, self._moe(layer, x), normed, f"layers.{layer}.mlp_hyper_connection")
        return self._mixed(h, "hyper_connection_mixer")[0]

    # ---- streams

    def _stream_norm(self, h: Array, name: str) -> Array:
        """RMSNorm of each stream, with weights of its own around zero: [T, S * D] -> [T, S * D]."""
        c, ops = self.config, self.ops
        x = unit_norm(ops, h.reshape(-1, c.hc_count, c.hidden_size), c.rms_norm_eps).reshape(-1, c.hc_width)
        return x + ops.scale(x, ops.weight(name))

    def _mixed(self, h: Array, name: str) -> tuple[Array, Array]:
        """What a layer's half reads of the streams [T, S * D]: their mixture [T, D], and the streams normalised."""
        c, ops = self.config, self.ops
        normed = self._stream_norm(h, f"{name}.hc_norm")
        low = ops.silu(ops.linear(normed, ops.weight(f"{name}.input_mix_weight_down")) * (1 / c.hc_count))
        parts = ops.sigmoid(ops.linear(low, ops.weight(f"{name}.input_mix_weight_up"))) * normed
        parts = parts.reshape(-1, c.hc_count, c.hidden_size)
        total = parts[:, 0]
        for stream in range(1, c.hc_count):
            total = total + parts[:, stream]
        return total * (1 / c.hc_count), normed

    def _injected(self, h: Array, y: Array, normed: Array, name: str) -> Array:
        """The streams h [T, S * D] and what a layer's half gives [T, D], to each of them a share."""
        c, ops = self.config, self.ops
        weights = ops.sigmoid(ops.linear(normed, ops.weight(f"{name}.block_inject_weight")) * (1 / c.hc_count)) * 2.0
        shares = weights.reshape(-1, c.hc_count, 1) * y.reshape(-1, 1, c.hidden_size)
        return h + shares.reshape(-1, c.hc_width)

    # ---- n-grams

    def _new_ngram_state(self) -> State:
        """The last tokens, and the last inputs of the convolution."""
        c, ngrams = self.config, self.config.ngrams
        if ngrams is None:
            return None
        behind = (ngrams.conv_kernel_size - 1) * ngrams.size
        return [ngrams.eos_token_id] * (ngrams.size - 1), self.ops.zeros((behind, c.hc_width))

    def _ngrams(self, name: str, h: Array, token_ids: Items[int], sequences: Items[Sequence]) -> Array:
        """What the embedding of n-grams adds to the streams: [T, S * D]."""
        c, ops, ngrams = self.config, self.ops, self.config.ngrams
        assert ngrams is not None
        rows: list[Items[int]] = []
        for s in sequences:
            before, convolution = s.states[-1]
            history = [*before, *token_ids[s.rows]]
            rows += ngram_rows(ngrams, c.vocab_size, history)
            s.states[-1] = history[len(history) - ngrams.size + 1 :], convolution
        embedded = ops.embed_ngrams(rows)  # [T, embed_dim]
        key, value = ops.linears(embedded, [ops.weight(f"{name}.{part}_proj") for part in ("key", "value")])
        shape = (-1, c.hc_count, c.hidden_size)
        key = self._stream_norm(key, f"{name}.norm_key").reshape(shape)
        gate = ops.root_gate(key, self._stream_norm(h, f"{name}.norm_query").reshape(shape))  # [T, S, 1]
        gated = (gate * value.reshape(-1, 1, c.hidden_size)).reshape(-1, c.hc_width)
        normed = self._stream_norm(gated, f"{name}.norm_conv")
        outputs = []
        for s in sequences:
            before, convolution = s.states[-1]
            output, convolution = ops.causal_conv1d(
                normed[s.rows], ops.weight(f"{name}.conv1d"), convolution, ngrams.size
            )
            s.states[-1] = before, convolution
            outputs.append(output)
        return gated + ops.silu(ops.concatenate(outputs))

    # ---- attention to chosen blocks

    def _new_indexed_state(self) -> State:
        """Keys and values, the keys of blocks, and those of the tokens after the last whole block."""
        c, ops = self.config, self.ops
        blocks = ops.new_index_cache(c.indexer_head_dim, c.indexer_compress_ratio)
        return self._new_kv_cache(), blocks, ops.zeros((0, c.indexer_head_dim))

    def _block_attention(self, layer: int, x: Array, sequences: Items[Sequence]) -> Array:
        """As `Ops.self_attention`, but every query sees the tokens of the blocks that are chosen for it."""
        c, ops, own, name = self.config, self.ops, self._mixers[layer], f"layers.{layer}.self_attn"
        assert isinstance(own, Attention)
        parts = ("index_q", "index_k") if c.indexer_qk_split else ("index_qk",)
        indexer = [ops.weight(f"{name}.indexer.{part}_proj") for part in parts]
        q_gate, k, v, *index = ops.linears(x, [*own.projections, *indexer])
        index_qk = ops.concatenate(index, axis=1) if c.indexer_qk_split else index[0]
        q_gate = q_gate.reshape(-1, own.heads, 2 * c.head_dim)  # per head: query, then gate
        q, gate = q_gate[..., : c.head_dim], q_gate[..., c.head_dim :]  # [T, heads, d]
        k, v = (y.reshape(-1, own.key_heads, c.head_dim) for y in (k, v))
        outputs = []
        for s in sequences:
            rows, (cache, blocks, after) = s.rows, s.states[layer]
            selection, blocks, after = self._select(f"{name}.indexer", index_qk[rows], s.position, blocks, after)
            turn = Turn(c.rope, s.position, own.q_norm, own.k_norm, own.eps, own.offset)
            output, cache = ops.attention(q[rows], k[rows], v[rows], cache, own.scale, turn=turn, selection=selection)
            s.states[layer] = cache, blocks, after
            outputs.append(output)  # [tokens, heads, d]
        o = ops.gate(ops.concatenate(outputs), gate, SIGMOID)
        return ops.linear(o.reshape(-1, own.heads * c.head_dim), own.output)

    def _select(
        self, name: str, index_qk: Array, position: int, blocks: State, after: Array
    ) -> tuple[Array, State, Array]:
        """What tokens see whose queries and key for the indexer are projected, and the two states after them."""
        c, ops = self.config, self.ops
        heads, d, block = c.indexer_n_heads, c.indexer_head_dim, c.indexer_compress_ratio
        q = index_qk[:, : heads * d].reshape(-1, heads, d)
        q = ops.rope(ops.rms_norm(q, ops.weight(f"{name}.q_layernorm"), c.rms_norm_eps, offset=1.0), position, c.rope)
        keys = ops.concatenate([after, index_qk[:, heads * d :]])  # of tokens since the last whole block
        whole = keys.shape[0] // block
        new = keys[: whole * block].reshape(-1, block, d)
        total = new[:, 0]
        for token in range(1, block):
            total = total + new[:, token]
        k = total * (1 / block)  # [whole, d]
        if whole:  # a block stands where its first token does
            k = ops.rms_norm(k, ops.weight(f"{name}.k_layernorm"), c.rms_norm_eps, offset=1.0).reshape(-1, 1, d)
            k = ops.rope(k, position // block, replace(c.rope, stride=block)).reshape(-1, d)
        weights = ops.zeros((q.shape[0], heads)) + d**-0.5
        seen = [(position + i + 1) // block for i in range(q.shape[0])]
        chosen, blocks = ops.select_tokens(q, k, weights, blocks, c.indexer_budget // block, seen)
        after = ops.concatenate([keys[whole * block :]])  # a copy, which keeps no keys of the whole chunk
        return ops.block_tokens(chosen, position, block), blocks, after

    # ---- gated DeltaNet and experts

    @property
    def _output_gate(self) -> str:
        return self.config.output_gate_type

    def _linear_attention(self, layer: int, x: Array, sequences: Items[Sequence]) -> Array:
        own = self._mixers[layer]
        assert isinstance(own, DeltaNet)
        y, states = self.ops.delta_net(x, own, [Part(s.rows, s.position, s.states[layer]) for s in sequences])
        for s, state in zip(sequences, states, strict=True):
            s.states[layer] = state
        return y

    def _moe(self, layer: int, x: Array) -> Array:
        ops, routed = self.ops, self.ops.route_input(x, self._routers[layer])
        ops.fetch_routed(layer, routed, self._routers_after[layer])
        shared = ops.sigmoid(routed.further[0]) * ops.feed_forward(x, *self._shared[layer])
        return ops.experts(layer, x, routed.expert_ids, routed.routing_weights) + shared
