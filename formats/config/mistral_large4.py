"""Mistral Large 4, text part (source: transformers' configuration_mistral_large4.py)."""

from collections import Counter
from dataclasses import dataclass

from formats.config.base import DENSE, INDEXED_ATTENTION, POSITION_SCALES, SPARSE, Where, key_of, only
from formats.config.decoder import SOFTMAX
from formats.config.deepseek_v3 import DeepseekV3Config, Indexer, read_indexer_types
from formats.config.rope import read_yarn_rope, source_of
from formats.fields import Fields


@dataclass(frozen=True, kw_only=True)
class MistralLarge4Config(DeepseekV3Config):
    """DeepSeek-V3.2 whose layers may share latents, know no positions, and whose angles are a tensor.

    In a layer without positions a head has nothing that turns: all head_dim values of it meet the latents.
    """

    no_rope_layers: tuple[int, ...]  # [num_hidden_layers], 1 for a layer that knows positions
    kv_source_layers: tuple[int, ...]  # [num_hidden_layers], the layer whose latents are read
    final_logit_softcapping: float

    def rope_dim(self, layer: int) -> int:
        """Values of a head that turn in this layer."""
        return self.qk_rope_head_dim if self.no_rope_layers[layer] else 0

    def owns_latents(self, layer: int) -> bool:
        return self.kv_source_layers[layer] == layer

    def readers(self, layer: int) -> list[int]:
        """Layers that read the latents of this one: itself, if it has any, and others after it."""
        return [reader for reader, source in enumerate(self.kv_source_layers) if source == layer]

    @property
    def latent_widths(self) -> tuple[int, ...]:
        layers = filter(self.owns_latents, range(self.num_hidden_layers))
        return tuple(self.kv_lora_rank + self.rope_dim(layer) for layer in layers)

    @property
    def numpy_parts(self) -> tuple[str, ...]:
        return (*super().numpy_parts, POSITION_SCALES)

    @property
    def indexer_needs_q_rank(self) -> bool:
        return False

    def mixer_values(self, tokens: int) -> int:
        """And queries before they grow with their position, and latents that wait for the layers that share them."""
        assert self.indexer is not None
        grown = self.num_attention_heads * self.head_dim + self.indexer.index_n_heads * self.indexer.index_head_dim
        waiting = 2 * (self.kv_lora_rank + self.qk_rope_head_dim)  # of a layer with positions, and of one without
        return super().mixer_values(tokens) + tokens * (grown + waiting + self.hidden_size)

    def check(self, where: Where) -> None:
        self.require(where, self.indexer is not None, "indexer", "an object")
        self.require(where, self.q_lora_rank is None, "q_lora_rank", "null")
        for key in ("kv_b_split", "post_mlp_norm"):
            self.require(where, not getattr(self, key), key, "false")
        super().check(where)
        for key in ("no_rope_layers", "kv_source_layers"):
            self.require(where, len(getattr(self, key)) == self.num_hidden_layers, key, self._entries)
        self.require(where, set(self.no_rope_layers) <= {0, 1}, "no_rope_layers", "only 0 and 1")
        readers = Counter(self.kv_source_layers)
        last: dict[int, int] = {}  # layer that others read, by whether it knows positions
        for layer, source in enumerate(self.kv_source_layers):
            kind = self.no_rope_layers[layer]
            if readers[layer] > 1 and source == layer:
                last[kind] = layer
            # transformers reads the last such layer, whatever is stated.
            fits = source == layer or last.get(kind) == source
            said = f"for layer {layer} itself, or the last layer before it of its kind that others read"
            self.require(where, fits, "kv_source_layers", said)
        self.require(where, self.final_logit_softcapping > 0, "final_logit_softcapping", "a number above 0")

    @classmethod
    def read(cls, outer: Fields) -> "MistralLarge4Config":
        """From config.json, nested in its text_config. Raises FormatError or UnsupportedError naming the key."""
        text = outer.object("text_config")
        num_layers = text.integer("num_hidden_layers", 1, 10_000)
        heads = text.integer("num_attention_heads", 1, 2**16)
        for key, implemented in {
            "model_type": "mistral_large4_text",
            "hidden_act": "silu",
            "attention_bias": False,
            "n_group": 1,  # groups are ranked by their two best scores, and DeepSeek-V2's by the best
            "topk_group": 1,
            "norm_topk_prob": True,
            "num_key_value_heads": heads,
            "layer_types": [INDEXED_ATTENTION] * num_layers,
        }.items():
            only(text, key, implemented)
        only(source_of(text, "partial_rotary_factor"), "partial_rotary_factor", 1.0)
        rope_theta, rope_scaling = read_yarn_rope(text)
        nope, rope = text.integer("qk_nope_head_dim", 1, 2**16), text.integer("qk_rope_head_dim", 1, 2**16)
        inner = text.integer("moe_intermediate_size", 1, 2**24)
        dense = min(text.integer("first_k_dense_replace", 0, 10_000, default=1), num_layers)
        every = text.integer("no_rope_layer_interval", 1, 10_000, default=4)
        no_rope = text.integers("no_rope_layers", 0, 1, [int((i + 1) % every != 0) for i in range(num_layers)])
        return cls(
            model_type="mistral_large4",
            vocab_size=text.integer("vocab_size", 1, 2**31),
            hidden_size=text.integer("hidden_size", 1, 2**24),
            num_hidden_layers=num_layers,
            max_position_embeddings=text.integer("max_position_embeddings", 1, 2**31),
            rms_norm_eps=text.number("rms_norm_eps"),
            tie_word_embeddings=outer.boolean("tie_word_embeddings", default=False),
            layer_types=read_indexer_types(text, num_layers),
            num_attention_heads=heads,
            num_key_value_heads=heads,
            head_dim=nope + rope,
            rotary_dim=rope,
            rope_theta=rope_theta,
            rope_scaling=rope_scaling,
            num_experts=text.integer(key_of(text, "num_experts", "num_local_experts", "n_routed_experts"), 1, 2**20),
            top_k=text.integer("num_experts_per_tok", 1, 2**20),
            moe_intermediate_size=inner,
            mlp_layer_types=tuple(text.strings("mlp_layer_types", [DENSE] * dense + [SPARSE] * (num_layers - dense))),
            intermediate_size=text.integer("intermediate_size", 1, 2**24),
            shared_expert_intermediate_size=inner * text.integer("n_shared_experts", 1, 2**10),
            q_lora_rank=None,
            kv_lora_rank=text.integer("kv_lora_rank", 1, 2**24),
            qk_nope_head_dim=nope,
            qk_rope_head_dim=rope,
            v_head_dim=text.integer("v_head_dim", 1, 2**16),
            n_group=1,
            topk_group=1,
            norm_topk_prob=True,
            routed_scaling_factor=text.number("routed_scaling_factor"),
            indexer=Indexer.read(text, interleaved=True),
            scoring_func=SOFTMAX,
            no_rope_layers=tuple(no_rope[:num_layers]),
            kv_source_layers=tuple(text.integers("kv_source_layers", 0, 10_000, list(range(num_layers)))),
            final_logit_softcapping=text.number("final_logit_softcapping"),
        )
