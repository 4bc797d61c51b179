"""MiniMax-M3, text part (source: transformers' configuration_minimax_m3_vl.py)."""

from dataclasses import dataclass
from typing import Any

from formats.config.base import (
    DENSE,
    FULL_ATTENTION,
    INDEXED_ATTENTION,
    INDEXER_CHOICE,
    SPARSE,
    Where,
    language_model,
    only,
)
from formats.config.decoder import HEAD_NORM, SIGMOID, SWIGLU_ALPHA, DecoderConfig, decoder_facts
from formats.config.rope import read_rotary_dim
from formats.fields import Fields
from formats.window import in_lanes

SPARSE_ATTENTION = "minimax_m3_sparse"  # a layer type of transformers
# Keys of transformers, and those of the published sparse_attention_config.
INDEXER = {
    "index_n_heads": "sparse_num_index_heads",
    "index_head_dim": "sparse_index_dim",
    "index_block_size": "sparse_block_size",
    "index_topk_blocks": "sparse_topk_blocks",
    "index_local_blocks": "sparse_local_block",
}


@dataclass(frozen=True, kw_only=True)
class MiniMaxM3Config(DecoderConfig):
    """A decoder whose indexer has a head for each group of key heads, and chooses blocks of keys for it."""

    index_n_heads: int
    index_head_dim: int
    index_block_size: int  # tokens of a block
    index_topk_blocks: int  # blocks that a token sees at most
    index_local_blocks: int  # of them the last ones, its own included

    @property
    def norm_offset(self) -> float:
        return 1.0

    @property
    def numpy_parts(self) -> tuple[str, ...]:
        return (INDEXER_CHOICE,) if self._indexed_layers else ()

    @property
    def _indexed_layers(self) -> int:
        return self.layer_types.count(INDEXED_ATTENTION)

    def cache_values(self, ctx_size: int, chunk_size: int) -> int:
        keys = self._indexed_layers * in_lanes(ctx_size) * self.index_head_dim
        return super().cache_values(ctx_size, chunk_size) + keys

    def mixer_values(self, tokens: int) -> int:
        index = 3 * (self.index_n_heads + 1) * self.index_head_dim  # projected, normalised and turned
        return super().mixer_values(tokens) + tokens * (index + self.num_attention_heads * self.head_dim)

    def scores_per_token(self, ctx_size: int) -> int:
        return max(super().scores_per_token(ctx_size), ctx_size * self.index_n_heads)

    def marks_per_token(self, ctx_size: int) -> int:
        """Of blocks by head, and of the tokens of one head's blocks twice while they are spread over them."""
        return 2 * ctx_size + 2 * self.index_n_heads * -(-ctx_size // self.index_block_size)

    @property
    def known_layer_types(self) -> tuple[str, ...]:
        return FULL_ATTENTION, INDEXED_ATTENTION

    def check(self, where: Where) -> None:
        super().check(where)
        self.require_divides(where, "index_n_heads", "num_key_value_heads")
        wide = self.index_head_dim >= self.rotary_dim
        self.require(where, wide, "index_head_dim", f"rotary_dim {self.rotary_dim} or more")
        fits = self.index_local_blocks <= self.index_topk_blocks
        self.require(where, fits, "index_local_blocks", f"at most index_topk_blocks {self.index_topk_blocks}")


def read_minimax_m3(outer: Fields) -> MiniMaxM3Config:
    """From config.json, nested in text_config or flat. Raises FormatError or UnsupportedError naming the key."""
    text = language_model(outer)
    for key, value in {
        "use_qk_norm": True,
        "qk_norm_type": "per_head",
        "use_gemma_norm": True,
        "attention_output_gate": False,
        "scoring_func": SIGMOID,
        "use_routing_bias": True,
        "n_shared_experts": 1,
        "swiglu_alpha": SWIGLU_ALPHA,
    }.items():
        only(text, key, value)
    if text.raw("hidden_act", "silu") != "silu":  # as transformers saves it, which computes the other in any case
        only(text, "hidden_act", "swigluoai")
    num_layers = text.integer("num_hidden_layers", 1, 10_000)
    head_dim = text.integer("head_dim", 1, 2**16)
    rotary_dim = read_rotary_dim(text, head_dim, head_dim)
    only(text, "rotary_dim", rotary_dim)
    tied = outer.boolean("tie_word_embeddings", default=False)  # either of the two is enough for transformers
    facts = decoder_facts(
        text,
        model_type="minimax_m3_vl",
        tie_word_embeddings=tied or text.boolean("tie_word_embeddings", default=False),
        num_experts=text.integer("num_local_experts", 1, 2**20),
        moe_intermediate_size=text.integer("intermediate_size", 1, 2**24),
        intermediate_size=text.integer("dense_intermediate_size", 1, 2**24),
        shared_expert_intermediate_size=text.integer("shared_intermediate_size", 1, 2**24),
        mlp_layer_types=_by_layer(text, "mlp_layer_types", text, "moe_layer_freq", (DENSE, SPARSE)),
        rotary_dim=rotary_dim,
        qk_norm=HEAD_NORM,
        scoring_func=SIGMOID,
        e_score_correction_bias=True,
        routed_scaling_factor=text.number("routed_scaling_factor"),
        swiglu_limit=text.number("swiglu_limit"),
    )
    return MiniMaxM3Config(**facts | _read_indexer(text, num_layers))


def _read_indexer(text: Fields, num_layers: int) -> dict[str, Any]:
    """Which layers have one, and what it chooses."""
    sparse = text.object("sparse_attention_config") if "sparse_attention_config" in text else text
    for key, value in {"use_sparse_attention": True, "sparse_score_type": "max", "sparse_init_block": 0}.items():
        only(sparse, key, value)
    kinds = FULL_ATTENTION, SPARSE_ATTENTION
    layer_types = _by_layer(text, "layer_types", sparse, "sparse_attention_freq", kinds)
    valueless = sparse.integers("sparse_disable_index_value", 0, 1, default=[1] * num_layers)
    if any(kind == SPARSE_ATTENTION and valueless[i : i + 1] != [1] for i, kind in enumerate(layer_types)):
        only(sparse, "sparse_disable_index_value", [int(kind == SPARSE_ATTENTION) for kind in layer_types])
    facts: dict[str, Any] = {
        "layer_types": tuple(INDEXED_ATTENTION if kind == SPARSE_ATTENTION else kind for kind in layer_types)
    }
    for key, published in INDEXER.items():
        source, found = (sparse, published) if published in sparse else (text, key)
        facts[key] = source.integer(found, 1, 2**31 - 1)
    return facts


def _by_layer(text: Fields, key: str, other: Fields, flags: str, kinds: tuple[str, str]) -> tuple[str, ...]:
    """A list of kinds as transformers has it, or one of zeros and ones as published, one of which must stand."""
    if key in text:
        return tuple(text.strings(key))
    return tuple(kinds[flag] for flag in other.integers(flags, 0, 1))
