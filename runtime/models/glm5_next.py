"""GLM-5.3-Flash: Kimi Delta Attention and latent attention without positions, on DeepSeek-V4's residual streams.

Latent attention sees pools of tokens that an indexer chooses, and the tokens after the last whole pool. The key of a
pool is made of those of its tokens, channel by channel.
Source: transformers' modeling_glm5_next.py (text part). Shapes: T tokens of one step, D hidden_size, N streams.
"""

from collections.abc import Sequence as Items
from dataclasses import dataclass

from formats.config import INDEXED_ATTENTION, Glm5NextConfig
from runtime.backends.facts import Array, State
from runtime.models.deepseek_v3 import INDEX_NORM_EPS
from runtime.models.kimi_linear import KimiLinear, Weights
from runtime.models.streams import OnStreams, collapse
from runtime.session import Sequence


@dataclass(frozen=True)
class Glm5Next(OnStreams, KimiLinear):
    config: Glm5NextConfig

    def _new_index_cache(self, layer_type: str) -> State:
        """Keys of pools, and what keys of the tokens after the last whole pool are made of."""
        if layer_type != INDEXED_ATTENTION:
            return None
        d, pool = self.config.index_head_dim, self.config.index_kpool
        return self.ops.new_index_cache(d, pool), self.ops.new_open_window(pool, d, False)

    def _collapsed(self, h: Array, name: str) -> tuple[Array, Array, Array]:
        return collapse(self.ops, self.config, h, name)

    def _gathered(self, h: Array) -> Array:
        """Their mean."""
        total = h[:, 0]
        for stream in range(1, self.config.hc_mult):
            total = total + h[:, stream]
        return total * (1 / self.config.hc_mult)

    @property
    def _latent_norm_eps(self) -> float:
        return self.config.rms_norm_eps

    def _selections(self, layer: int, x: Array, latent_q: Array, sequences: Items[Sequence]) -> list[Array]:
        """The tokens that attention may see, per sequence: those of the pools that are chosen, and all after them."""
        c, ops, name = self.config, self.ops, f"layers.{layer}.self_attn.indexer"
        heads, d, pool = c.index_n_heads, c.index_head_dim, c.index_kpool
        q = ops.linear(latent_q, ops.weight(f"{name}.wq_b")).reshape(-1, heads, d)
        projections = [ops.weight(f"{name}.{part}") for part in ("wk", "index_kpool_compress_gate", "weights_proj")]
        k, gate, weights = ops.linears(x, projections)  # [T, d] twice, [T, heads]
        k = ops.layer_norm(k, ops.weight(f"{name}.k_norm"), ops.weight(f"{name}.k_norm.bias"), INDEX_NORM_EPS)
        weights = weights * (heads * d) ** -0.5
        selections = []
        for s in sequences:
            rows, (latents, (index, window)) = s.rows, s.states[layer]
            places = ops.weight(f"{name}.index_kpool_compress_ape")
            keys, window = ops.compress(k[rows], gate[rows], places, window)  # of the pools that these complete
            seen = [(s.position + i + 1) // pool for i in range(rows.stop - rows.start)]
            chosen, index = ops.select_tokens(q[rows], keys, weights[rows], index, c.index_topk // pool, seen)
            s.states[layer] = latents, (index, window)
            selections.append(ops.block_tokens(chosen, s.position, pool))
        return selections

    def _log_decay(self, f: Array, w: Weights) -> Array:
        bound = self.config.gate_lower_bound
        if bound is None:
            return super()._log_decay(f, w)
        return self.ops.bounded_decay(self.ops.linear(f, w("f_b_proj")), w("dt_bias"), w("A_log"), bound)
