"""DeepSeek-V2 and V3, Kimi K2, GLM-4.7-Flash and GLM-5, Mistral Small 4, A.X-K1, Sarvam.

Source: configuration_deepseek_v3.py of transformers, and those of the others.
"""

from dataclasses import dataclass

from formats.config.base import (
    DENSE,
    FULL_ATTENTION,
    INDEXED_ATTENTION,
    INDEXER_CHOICE,
    LINEAR_ATTENTION,
    MEAN_NORMS,
    SHARED_INDEX_ATTENTION,
    SPARSE,
    ModelConfig,
    Where,
    key_of,
    language_model,
    only,
)
from formats.config.decoder import SIGMOID, SOFTMAX, Temperature
from formats.config.rope import read_yarn_rope, source_of
from formats.config.scaling import Rope, Yarn, mscale
from formats.fields import Fields
from formats.window import in_lanes

ABSORBED_VALUES = 16 << 20  # of a block of tokens in the space of latents
GREEDY, LIMITED_GREEDY = "greedy", "group_limited_greedy"  # DeepSeek-V2-Lite, DeepSeek-V2
MISTRAL4, SARVAM = "mistral4", "sarvam_mla"
AXK1 = ("AXK1", "axk1")  # as first published, and as transformers has it


@dataclass(frozen=True)
class Indexer:
    """Small heads with keys of their own, which choose the index_topk tokens that attention may see."""

    index_n_heads: int
    index_head_dim: int
    index_topk: int
    rope_interleave: bool  # of the indexer's own pairs

    @classmethod
    def read(cls, config: Fields, interleaved: bool) -> "Indexer":
        """From config.json; what it does not say of pairs is the family's default."""
        return cls(
            config.integer("index_n_heads", 1, 2**16),
            config.integer("index_head_dim", 1, 2**16),
            config.integer("index_topk", 1, 2**31),
            config.boolean("indexer_rope_interleave", interleaved),
        )


@dataclass(frozen=True)
class DeepseekV3Config(ModelConfig):
    """Multi-head latent attention; dense layers, then routed experts and a shared one.

    head_dim is the width of a query head, qk_nope_head_dim + qk_rope_head_dim; only the latter is turned.
    """

    rope_scaling: Yarn | None
    mlp_layer_types: tuple[str, ...]  # [num_hidden_layers]
    intermediate_size: int  # of dense layers
    shared_expert_intermediate_size: int | None  # of all shared experts together
    q_lora_rank: int | None  # None: queries are projected at once
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    n_group: int
    topk_group: int
    norm_topk_prob: bool
    routed_scaling_factor: float
    indexer: Indexer | None  # of DeepSeek-V3.2 and GLM-5
    scoring_func: str = SIGMOID  # with a correction bias, or softmax without one, as DeepSeek-V2 has it
    kv_b_split: bool = False  # kv_b_proj stands as embed_q and unembed_out, as MLX has it
    attention_temperature: Temperature | None = None  # of Mistral Small 4, which counts positions from 0
    post_mlp_norm: bool = False  # what experts give is normalised, as A.X-K1 does
    without_correction_bias: bool = False  # where scores are sigmoids

    @property
    def rope(self) -> Rope:
        return Rope(self.rope_theta, self.rotary_dim, interleaved=True, scaling=self.rope_scaling)

    @property
    def attention_scale(self) -> float:
        """Of scores: one over the root of head_dim, corrected for a context that YaRN stretches."""
        yarn = self.rope_scaling
        corrected = mscale(yarn.factor, yarn.mscale_all_dim) if yarn else 1.0
        return self.head_dim**-0.5 * corrected**2

    def run_of_scale(self, position: int, tokens: int) -> tuple[int, float]:
        """How many of `tokens` tokens from this position on share the scale of their scores, and that scale."""
        if self.attention_temperature is None:
            return tokens, self.attention_scale
        before = position - 1  # where Temperature, which counts from 1, has the factor of this position
        length = self.attention_temperature.next_change(before) - before
        return min(tokens, length), self.attention_scale * self.attention_temperature.at(before)

    @property
    def has_correction_bias(self) -> bool:
        """Whether a bias is added to scores where they are compared."""
        return self.scoring_func == SIGMOID and not self.without_correction_bias

    def has_experts(self, layer: int) -> bool:
        return self.mlp_layer_types[layer] == SPARSE

    def cache_values(self, ctx_size: int, chunk_size: int) -> int:
        indexed = self.layer_types.count(INDEXED_ATTENTION) * self.indexer.index_head_dim if self.indexer else 0
        return in_lanes(ctx_size) * (sum(self.latent_widths) + indexed)

    @property
    def numpy_parts(self) -> tuple[str, ...]:
        return () if self.indexer is None else (MEAN_NORMS, INDEXER_CHOICE)

    @property
    def indexer_needs_q_rank(self) -> bool:
        """Whether an indexer's queries are made of those of q_lora_rank."""
        return True

    @property
    def latent_widths(self) -> tuple[int, ...]:
        """Of each layer that keeps latents: values of a token's latent and of the key beside it."""
        latents = sum(kind != LINEAR_ATTENTION for kind in self.layer_types)
        return (self.kv_lora_rank + self.qk_rope_head_dim,) * latents

    @property
    def known_layer_types(self) -> tuple[str, ...]:
        return (FULL_ATTENTION,) if self.indexer is None else (INDEXED_ATTENTION, SHARED_INDEX_ATTENTION)

    @property
    def state_values(self) -> int:
        return 0

    @property
    def feed_forward_width(self) -> int:
        return max(self.intermediate_size, self.shared_expert_intermediate_size or 0, self.moe_intermediate_size)

    def mixer_values(self, tokens: int) -> int:
        queries = self.num_attention_heads * (self.head_dim + self.qk_rope_head_dim)  # and the turned part of them
        outputs = 2 * self.num_attention_heads * self.v_head_dim
        latents = 2 * self.kv_lora_rank + (self.q_lora_rank or 0)
        index = 3 * self.indexer.index_n_heads * self.indexer.index_head_dim if self.indexer else 0
        absorbed = self.absorbed_values_per_token
        return tokens * (queries + outputs + latents + index) + min(tokens * absorbed, max(ABSORBED_VALUES, absorbed))

    @property
    def absorbed_values_per_token(self) -> int:
        """Of queries in the space of latents, and of what is mixed for them."""
        return self.num_attention_heads * (2 * self.kv_lora_rank + self.qk_rope_head_dim)

    def scores_per_token(self, ctx_size: int) -> int:
        return ctx_size * (self.indexer.index_n_heads if self.indexer else 1)

    def marks_per_token(self, ctx_size: int) -> int:
        """Of a layer, of the one that chose before it, and a copy of a part."""
        return 3 * ctx_size if self.indexer else 0

    def check(self, where: Where) -> None:
        super().check(where)
        self.require_known(where, "layer_types", self.known_layer_types)
        if self.indexer is not None:
            self.check_choices(where)
            wide = self.indexer.index_head_dim >= self.qk_rope_head_dim
            self.require(where, wide, "indexer.index_head_dim", f"qk_rope_head_dim {self.qk_rope_head_dim} or more")
            known = self.q_lora_rank is not None or not self.indexer_needs_q_rank
            self.require(where, known, "q_lora_rank", "a rank, which the indexer needs")
            untempered = self.attention_temperature is None
            self.require(where, untempered, "attention_temperature", "null where there is an indexer")
        self.check_mlp_layer_types(where, (DENSE, SPARSE))
        scoring = self.scoring_func in (SIGMOID, SOFTMAX)
        self.require(where, scoring, "scoring_func", f"{SIGMOID} or {SOFTMAX}")
        widths = self.qk_nope_head_dim + self.qk_rope_head_dim
        self.require(where, self.head_dim == widths, "head_dim", f"qk_nope_head_dim + qk_rope_head_dim, {widths}")
        turned = f"qk_rope_head_dim {self.qk_rope_head_dim}"
        self.require(where, self.rotary_dim == self.qk_rope_head_dim, "rotary_dim", turned)
        self.check_groups(where, self.n_group, self.topk_group)
        pairs = self.scoring_func != SIGMOID or self.n_group == 1 or self.num_experts >= 2 * self.n_group
        self.require(where, pairs, "n_group", "groups of two experts or more, whose best two scores are added")

    def check_choices(self, where: Where) -> None:
        """Whether every layer knows which tokens it attends to. Raises FormatError."""
        first = self.layer_types[0] == INDEXED_ATTENTION
        self.require(where, first, "layer_types", f"{INDEXED_ATTENTION} first")

    @classmethod
    def read(cls, outer: Fields) -> "DeepseekV3Config":
        """From config.json; Kimi K2.5 nests it in text_config. Raises FormatError or UnsupportedError with the key."""
        text = language_model(outer)
        only(text, "hidden_act", "silu")
        only(text, "attention_bias", False)
        only(text, "moe_layer_freq", 1)
        kind = text.string("model_type")
        scoring_func = SOFTMAX if kind in ("deepseek_v2", MISTRAL4) else SIGMOID
        only(text, "scoring_func", scoring_func)
        grouped = scoring_func == SIGMOID or text.string("topk_method", GREEDY) == LIMITED_GREEDY
        if kind not in AXK1:  # of which nothing reads it: tensors tell whether there is a correction bias
            only(text, "topk_method", "noaux_tc" if scoring_func == SIGMOID else LIMITED_GREEDY if grouped else GREEDY)
        if kind == "deepseek_v2":  # transformers multiplies, the published code either normalises or multiplies
            only(text, "norm_topk_prob", False)
        only(text, "rope_interleave", True)
        if kind != MISTRAL4:
            only(source_of(text, "partial_rotary_factor"), "partial_rotary_factor", 1.0)
        rope_theta, rope_scaling = read_yarn_rope(text, ("yarn", "deepseek_yarn") if kind == SARVAM else ("yarn",))
        num_layers = text.integer("num_hidden_layers", 1, 10_000)
        heads = text.integer("num_attention_heads", 1, 2**16)
        nope, rope = text.integer("qk_nope_head_dim", 1, 2**16), text.integer("qk_rope_head_dim", 1, 2**16)
        inner = text.integer("moe_intermediate_size", 1, 2**24)
        dense = text.integer("first_k_dense_replace", 0, num_layers, default=0 if kind == MISTRAL4 else 1)
        one_group = {"default": 1} if kind == SARVAM else {}
        experts, shared = "n_routed_experts", "n_shared_experts"
        if kind == SARVAM:  # as published, or as transformers saves it
            experts, shared = key_of(text, "num_experts", experts), key_of(text, "num_shared_experts", shared)
        by_position = [DENSE] * dense + [SPARSE] * (num_layers - dense)
        indexer = Indexer.read(text, kind == "glm_moe_dsa") if kind in ("deepseek_v32", "glm_moe_dsa") else None
        return cls(
            model_type="deepseek_v3",
            vocab_size=text.integer("vocab_size", 1, 2**31),
            hidden_size=text.integer("hidden_size", 1, 2**24),
            num_hidden_layers=num_layers,
            max_position_embeddings=text.integer("max_position_embeddings", 1, 2**31),
            rms_norm_eps=text.number("rms_norm_eps"),
            tie_word_embeddings=text.boolean("tie_word_embeddings", default=False),
            layer_types=read_indexer_types(text, num_layers) if indexer else (FULL_ATTENTION,) * num_layers,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            head_dim=nope + rope,
            rotary_dim=rope,
            rope_theta=rope_theta,
            rope_scaling=rope_scaling,
            num_experts=text.integer(experts, 1, 2**20),
            top_k=text.integer("num_experts_per_tok", 1, 2**20),
            moe_intermediate_size=inner,
            mlp_layer_types=tuple(text.strings("mlp_layer_types", by_position)),
            intermediate_size=text.integer("intermediate_size", 1, 2**24),
            shared_expert_intermediate_size=inner * text.integer(shared, 1, 2**10),
            q_lora_rank=text.integer("q_lora_rank", 1, 2**24) if "q_lora_rank" in text else None,
            kv_lora_rank=text.integer("kv_lora_rank", 1, 2**24),
            qk_nope_head_dim=nope,
            qk_rope_head_dim=rope,
            v_head_dim=text.integer("v_head_dim", 1, 2**16),
            n_group=text.integer("n_group", 1, 2**20, **one_group) if grouped else 1,
            topk_group=text.integer("topk_group", 1, 2**20, **one_group) if grouped else 1,
            norm_topk_prob=text.boolean("norm_topk_prob", default=kind != "deepseek_v2"),
            routed_scaling_factor=text.number("routed_scaling_factor"),
            indexer=indexer,
            scoring_func=scoring_func,
            post_mlp_norm=kind in AXK1,
        )


def read_indexer_types(config: Fields, num_layers: int, every: int = 1) -> tuple[str, ...]:
    """Which layers choose and which share the choice before theirs: listed, or by a pattern or a schedule (GLM-5.2).

    every: of how many layers one chooses, where nothing is said.
    """
    every = config.integer("index_topk_freq", 1, 2**20, default=every)
    offset = config.integer("index_skip_topk_offset", 0, 2**20, default=2)
    scheduled = ["shared" if max(i - offset + 1, 0) % every else "full" for i in range(num_layers)]
    key = key_of(config, "indexer_types", "index_topk_pattern")
    kinds = config.raw(key, scheduled)
    if isinstance(kinds, str):  # a letter per layer
        kinds = [{"F": "full", "S": "shared"}.get(letter, letter) for letter in kinds]
    names = {"full": INDEXED_ATTENTION, "shared": SHARED_INDEX_ATTENTION}
    if not isinstance(kinds, list) or any(kind not in [*names] for kind in kinds):  # some of which have no hash
        raise config.wrong(key, "only full and shared")
    return tuple(names[kind] for kind in kinds)
