"""Mistral Large 4: DeepSeek-V3.2's attention to chosen tokens, with less of everything that grows with the context.

Layers share choices of tokens, as GLM-5's do, and latents, too; some know no positions. Queries grow with the
logarithm of their position, each head in its own way. Angles of the rotation are learned.
Source: transformers' modeling_mistral_large4.py. Shapes: T tokens of one step, D hidden_size, H heads.
"""

from collections.abc import Sequence as Items
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

from formats.config import INDEXED_ATTENTION, MistralLarge4Config, Rope
from runtime.backends.facts import Array, State, Weight
from runtime.models.deepseek_v3 import INDEX_NORM_EPS, DeepseekV3
from runtime.session import Sequence


class Latents(NamedTuple):
    """What a layer makes of a sequence's tokens in this step, for itself and for the layers that share it."""

    before: State  # a cache of the tokens before them
    latent: Array  # [tokens, kv_lora_rank]
    k_rope: Array  # [tokens, qk_rope_head_dim], or nothing in a layer without positions


@dataclass(frozen=True)
class MistralLarge4(DeepseekV3):
    config: MistralLarge4Config

    @cached_property
    def _rope(self) -> Rope:
        return replace(self.config.rope, learned=self.ops.values("rotary_emb.alpha"))

    def new_states(self) -> list[State]:
        """A cache of latents where a layer has its own, and one of the indexer's keys where it chooses."""
        kinds = enumerate(self.config.layer_types)
        return [(self._new_latents(layer), self._new_index_cache(kind)) for layer, kind in kinds]

    def _new_latents(self, layer: int) -> State:
        c = self.config
        return self.ops.new_latent_cache(c.kv_lora_rank, c.rope_dim(layer)) if c.owns_latents(layer) else None

    def logits(self, hidden: Array) -> Array:
        """[T, D] -> [T, vocab_size]."""
        return self.ops.softcap(super().logits(hidden), self.config.final_logit_softcapping)

    def _attention(self, layer: int, x: Array, sequences: Items[Sequence], selections: list[Array | None]) -> Array:
        c, ops, name = self.config, self.ops, f"layers.{layer}.self_attn"

        def w(tensor: str) -> Weight:
            return ops.weight(f"{name}.{tensor}")

        if c.layer_types[layer] == INDEXED_ATTENTION:
            index_x = ops.layer_norm(x, w("indexer.q_input_norm"), w("indexer.q_input_norm.bias"), INDEX_NORM_EPS)
            selections[:] = self._selections(layer, x, index_x, sequences)
        if c.owns_latents(layer):
            self._hand_latents(layer, x, sequences)
        q = ops.linear(x, w("q_proj")).reshape(-1, c.num_attention_heads, c.head_dim)
        still = c.head_dim - c.rope_dim(layer)  # values of a head that do not turn come first
        outputs = []
        for s, selection in zip(sequences, selections, strict=True):
            shared, index = s.states[layer]
            q_s = ops.scale_by_position(q[s.rows], s.position, w("softmax_scaling.scale"), w("softmax_scaling.bias"))
            q_rope = self._placed(layer, q_s[..., still:], s.position)
            output, latents = ops.latent_attention(
                q_s[..., :still],
                q_rope,
                shared.latent,
                shared.k_rope,
                [w("kv_b_proj")],
                shared.before,
                scale=c.attention_scale,
                selection=selection,
            )
            s.states[layer] = (latents if c.owns_latents(layer) else None, index)
            outputs.append(output)  # [tokens, H, v_head_dim]
        o = ops.concatenate(outputs).reshape(-1, c.num_attention_heads * c.v_head_dim)
        return ops.linear(o, w("o_proj"))

    def _hand_latents(self, layer: int, x: Array, sequences: Items[Sequence]) -> None:
        """Puts what this layer makes of x [T, D] into the states of all that read it, until they do in this step.

        Each of them writes it into the one cache, behind what stood there before: the same bytes.
        """
        c, ops, rank, name = self.config, self.ops, self.config.kv_lora_rank, f"layers.{layer}.self_attn"
        latent_k = ops.linear(x, ops.weight(f"{name}.kv_a_proj_with_mqa"))  # [T, rank + rope]
        latent = ops.rms_norm(latent_k[:, :rank], ops.weight(f"{name}.kv_a_layernorm"), c.rms_norm_eps)
        for s in sequences:
            k_rope = self._placed(layer, latent_k[s.rows, None, rank:], s.position)[:, 0]
            made = Latents(s.states[layer][0], latent[s.rows], k_rope)
            for reader in c.readers(layer):
                s.states[reader] = (made, s.states[reader][1])

    def _placed(self, layer: int, x: Array, position: int) -> Array:
        """Turned, in a layer that knows positions."""
        return self.ops.rope(x, position, self._rope) if self.config.rope_dim(layer) else x

    def _index_turned(self, layer: int, x: Array, position: int) -> Array:
        return self._placed(layer, x, position)

    def _index_queries(self, layer: int, q: Array, position: int) -> Array:
        at = f"layers.{layer}.self_attn.indexer.softmax_scaling"
        grown = self.ops.scale_by_position(q, position, self.ops.weight(f"{at}.scale"), self.ops.weight(f"{at}.bias"))
        return super()._index_queries(layer, grown, position)
