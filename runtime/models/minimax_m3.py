"""MiniMax-M3: the plain decoder, whose groups of heads each see the blocks of tokens that an indexer chooses for them.

Source: transformers' modeling_minimax_m3_vl.py (text part). Shapes: T tokens of one step, D hidden_size, d width of a
head, H heads of the indexer.
"""

from collections.abc import Sequence as Items
from dataclasses import dataclass

from formats.config import INDEXED_ATTENTION, MiniMaxM3Config
from runtime.backends.facts import Array, State, Turn
from runtime.models.decoder import Decoder, Layer
from runtime.session import Sequence


@dataclass(frozen=True)
class MiniMaxM3(Decoder):
    config: MiniMaxM3Config

    def _indexed(self, layer: int) -> bool:
        return self.config.layer_types[layer] == INDEXED_ATTENTION

    def _layer_of(self, layer: int) -> Layer:
        own = super()._layer_of(layer)
        return own._replace(block=None) if self._indexed(layer) else own

    def new_states(self) -> list[State]:
        """A cache of keys and values per layer, or one for each head of its indexer and one of the indexer's keys."""
        layers = range(self.config.num_hidden_layers)
        return [self._new_indexed_state() if self._indexed(i) else self._new_kv_cache(i) for i in layers]

    def _new_indexed_state(self) -> State:
        c, ops = self.config, self.ops
        key_heads = c.num_key_value_heads // c.index_n_heads  # which see the same blocks
        caches = [ops.new_kv_cache(key_heads, c.head_dim) for _ in range(c.index_n_heads)]
        return caches, ops.new_index_cache(c.index_head_dim)

    def _attention(self, layer: int, x: Array, sequences: Items[Sequence]) -> Array:
        """As `Ops.self_attention`, but a query sees only tokens of the blocks that are chosen for its group."""
        if not self._indexed(layer):
            return super()._attention(layer, x, sequences)
        c, ops, own, name = self.config, self.ops, self._layers[layer].attention, f"layers.{layer}.self_attn.indexer"
        assert own is not None
        indexer = [ops.weight(f"{name}.{part}_proj") for part in "qk"]
        q, k, v, index_q, index_k = ops.linears(x, [*own.projections, *indexer])
        # one group for each head of the indexer: [T, H, heads of the group, d]
        q, k, v = (y.reshape(y.shape[0], c.index_n_heads, -1, c.head_dim) for y in (q, k, v))
        index_q = index_q.reshape(-1, c.index_n_heads, c.index_head_dim)
        index_k = index_k.reshape(-1, 1, c.index_head_dim)
        index_q, index_k = (
            ops.rms_norm(y, ops.weight(f"{name}.{part}_norm"), own.eps, own.offset)
            for y, part in ((index_q, "q"), (index_k, "k"))
        )
        outputs = []
        for s in sequences:
            rows, (caches, keys) = s.rows, s.states[layer]
            chosen, keys = ops.select_blocks(
                ops.rope(index_q[rows], s.position, c.rope),
                ops.rope(index_k[rows], s.position, c.rope).reshape(-1, c.index_head_dim),
                keys,
                c.index_block_size,
                c.index_topk_blocks,
                c.index_local_blocks,
            )  # [H, tokens, whole blocks]
            turn = Turn(c.rope, s.position, own.q_norm, own.k_norm, own.eps, own.offset)
            groups, after = [], []
            for group, before in enumerate(caches):
                output, cache = ops.attention(
                    q[rows, group],
                    k[rows, group],
                    v[rows, group],
                    before,
                    own.scale,
                    turn=turn,
                    selection=ops.block_tokens(chosen[group], s.position, c.index_block_size),
                )
                groups.append(output)  # [tokens, heads of the group, d]
                after.append(cache)
            s.states[layer] = after, keys
            outputs.append(ops.concatenate(groups, axis=1))
        return ops.linear(ops.concatenate(outputs).reshape(-1, own.heads * c.head_dim), own.output)
