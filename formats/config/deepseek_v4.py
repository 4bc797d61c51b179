"""DeepSeek-V4-Flash and Pro (source: transformers' configuration_deepseek_v4.py and the published config.json)."""

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from formats.config.base import (
    COMPRESSED_SPARSE_ATTENTION,
    HEAVILY_COMPRESSED_ATTENTION,
    INDEXER_CHOICE,
    SILU_CLAMPED,
    SLIDING_ATTENTION,
    STREAM_GATES,
    Activation,
    ModelConfig,
    Where,
    only,
)
from formats.config.rope import read_theta, read_yarn, read_yarn_rope
from formats.config.scaling import Rope, Yarn
from formats.errors import UnsupportedError
from formats.fields import Fields
from formats.window import held_tokens, in_lanes

HASH_MOE, MOE = "hash_moe", "moe"  # experts by a table of token ids, or by scores
MAX_STREAMS, MAX_ITERATIONS = 64, 1000  # of hyper-connections
_BY_RATIO = {0: SLIDING_ATTENTION, 4: COMPRESSED_SPARSE_ATTENTION, 128: HEAVILY_COMPRESSED_ATTENTION}


@dataclass(frozen=True, kw_only=True)
class CompressedConfig(ModelConfig):
    """Several residual streams; one key head, which is the value too, over a window and over compressed entries.

    The last rotary_dim of head_dim values are turned: by rope_theta in layers of sliding_attention, by
    compress_rope_theta and rope_scaling in the others.
    """

    rope_scaling: Yarn | None
    compress_rope_theta: float
    sliding_window: int  # tokens that a token of any layer sees as they are, itself included
    q_lora_rank: int
    o_groups: int  # of heads, each with an output projection of its own
    o_lora_rank: int  # of the output of each
    index_n_heads: int
    index_head_dim: int
    index_topk: int  # entries that a token sees in layers that choose among them
    hc_mult: int  # residual streams
    hc_sinkhorn_iters: int
    hc_eps: float
    routed_scaling_factor: float
    swiglu_limit: float

    @cached_property
    def rope(self) -> Rope:
        return Rope(self.rope_theta, self.rotary_dim, interleaved=True)

    @cached_property
    def compress_rope(self) -> Rope:
        """How positions turn queries and keys of layers that compress, and their entries."""
        return Rope(self.compress_rope_theta, self.rotary_dim, interleaved=True, scaling=self.rope_scaling)

    @property
    def streams_width(self) -> int:
        """Values of all residual streams of a token."""
        return self.hc_mult * self.hidden_size

    @property
    def queries_width(self) -> int:
        """Values of all queries of a token."""
        return self.num_attention_heads * self.head_dim

    @property
    def expert_activation(self) -> Activation:
        return Activation(SILU_CLAMPED, limit=self.swiglu_limit)

    @abstractmethod
    def compressors(self) -> Iterator[tuple[int, int, bool]]:
        """(tokens per entry, width of an entry, whether windows overlap) of every compressor."""

    def cache_values(self, ctx_size: int, chunk_size: int) -> int:
        windows = self.num_hidden_layers * held_tokens(self.sliding_window, ctx_size, chunk_size) * 2 * self.head_dim
        return windows + sum(in_lanes(-(-ctx_size // rate)) * width for rate, width, _ in self.compressors())

    def mixer_values(self, tokens: int) -> int:
        compressed = 8 * self.head_dim + 3 * self.index_n_heads * self.index_head_dim
        return tokens * (2 * self.streams_width + 6 * self.queries_width + compressed)

    def check(self, where: Where) -> None:
        super().check(where)
        self.require(where, self.num_key_value_heads == 1, "num_key_value_heads", "1")
        self.require_divides(where, "o_groups", "num_attention_heads")
        self.require(where, self.hc_mult <= MAX_STREAMS, "hc_mult", f"at most {MAX_STREAMS}")
        few = self.hc_sinkhorn_iters <= MAX_ITERATIONS
        self.require(where, few, "hc_sinkhorn_iters", f"at most {MAX_ITERATIONS}")
        turned = self.index_head_dim >= self.rotary_dim
        self.require(where, turned, "index_head_dim", f"{where.key('rotary_dim')} {self.rotary_dim} or more")
        for key in ("hc_eps", "swiglu_limit"):
            self.require(where, getattr(self, key) > 0, key, "a number above 0")
        self.check_scaling(where, "compress_rope_theta")


@dataclass(frozen=True, kw_only=True)
class DeepseekV4Config(CompressedConfig):
    """An entry stands for sparse_compress_rate tokens and as many before them, or for heavy_compress_rate tokens."""

    sparse_compress_rate: int
    heavy_compress_rate: int
    mlp_layer_types: tuple[str, ...]  # [num_hidden_layers]

    def compress_rate(self, layer: int) -> int | None:
        """Tokens from one entry to the next; None for a layer without entries."""
        rates = {
            COMPRESSED_SPARSE_ATTENTION: self.sparse_compress_rate,
            HEAVILY_COMPRESSED_ATTENTION: self.heavy_compress_rate,
        }
        return rates.get(self.layer_types[layer])

    def has_indexer(self, layer: int) -> bool:
        """Whether the layer chooses among its entries; each then takes two windows of tokens."""
        return self.layer_types[layer] == COMPRESSED_SPARSE_ATTENTION

    @property
    def numpy_parts(self) -> tuple[str, ...]:
        chooses = COMPRESSED_SPARSE_ATTENTION in self.layer_types
        return (*((INDEXER_CHOICE,) if chooses else ()), STREAM_GATES)

    def compressors(self) -> Iterator[tuple[int, int, bool]]:
        for layer in range(self.num_hidden_layers):
            rate, overlap = self.compress_rate(layer), self.has_indexer(layer)
            if rate is not None:
                yield rate, self.head_dim, overlap
            if rate is not None and overlap:
                yield rate, self.index_head_dim, overlap

    @property
    def state_values(self) -> int:
        """Projections of tokens that no entry stands for yet, and of the window before where windows overlap."""
        return sum(
            rate * 2 * width * (4 if overlap else 1)  # keys and gates; twice as wide and as many where they overlap
            for rate, width, overlap in self.compressors()
        )

    def scores_per_token(self, ctx_size: int) -> int:
        return max(self.num_attention_heads, self.index_n_heads) * -(-ctx_size // self.sparse_compress_rate)

    def marks_per_token(self, ctx_size: int) -> int:
        """As chosen, as far as they are complete, and both."""
        return 3 * -(-ctx_size // self.sparse_compress_rate)

    def check(self, where: Where) -> None:
        super().check(where)
        self.require_known(where, "layer_types", tuple(_BY_RATIO.values()))
        self.check_mlp_layer_types(where, (HASH_MOE, MOE))

    @classmethod
    def read(cls, config: Fields) -> "DeepseekV4Config":
        """From config.json. Raises FormatError or UnsupportedError naming the key."""
        num_layers = config.integer("num_hidden_layers", 1, 10_000)
        sparse, heavy = _read_compress_rates(config)
        hashed = config.integer("num_hash_layers", 0, 10_000, default=3)
        by_position = [HASH_MOE if layer < hashed else MOE for layer in range(num_layers)]
        sizes = read_sizes(config)
        rope_theta, compress_rope_theta, rope_scaling = _read_rope(config, sizes["rotary_dim"] / sizes["head_dim"])
        return cls(
            model_type="deepseek_v4",
            **sizes,
            rope_theta=rope_theta,
            rope_scaling=rope_scaling,
            compress_rope_theta=compress_rope_theta,
            layer_types=_read_layer_types(config, num_layers),
            sparse_compress_rate=sparse,
            heavy_compress_rate=heavy,
            mlp_layer_types=tuple(config.strings("mlp_layer_types", by_position)),
        )


def read_sizes(config: Fields) -> dict[str, Any]:
    """The facts that V4 and V4.1 state alike. Raises FormatError or UnsupportedError naming the key."""
    for key, implemented in {
        "attention_bias": False,
        "hidden_act": "silu",
        "mlp_bias": False,
        "n_shared_experts": 1,
        "norm_topk_prob": True,
        "num_key_value_heads": 1,
        "scoring_func": "sqrtsoftplus",
        "topk_method": "noaux_tc",
    }.items():
        only(config, key, implemented)
    return {
        "vocab_size": config.integer("vocab_size", 1, 2**31),
        "hidden_size": config.integer("hidden_size", 1, 2**24),
        "num_hidden_layers": config.integer("num_hidden_layers", 1, 10_000),
        "max_position_embeddings": config.integer("max_position_embeddings", 1, 2**31),
        "rms_norm_eps": config.number("rms_norm_eps"),
        "tie_word_embeddings": config.boolean("tie_word_embeddings", default=False),
        "num_attention_heads": config.integer("num_attention_heads", 1, 2**16),
        "num_key_value_heads": 1,
        "head_dim": config.integer("head_dim", 1, 2**16),
        "rotary_dim": config.integer("qk_rope_head_dim", 1, 2**16),
        "num_experts": config.integer("n_routed_experts", 1, 2**20),
        "top_k": config.integer("num_experts_per_tok", 1, 2**20),
        "moe_intermediate_size": config.integer("moe_intermediate_size", 1, 2**24),
        "sliding_window": config.integer("sliding_window", 1, 2**31),
        "q_lora_rank": config.integer("q_lora_rank", 1, 2**24),
        "o_groups": config.integer("o_groups", 1, 2**16),
        "o_lora_rank": config.integer("o_lora_rank", 1, 2**24),
        "index_n_heads": config.integer("index_n_heads", 1, 2**16),
        "index_head_dim": config.integer("index_head_dim", 1, 2**16),
        "index_topk": config.integer("index_topk", 1, 2**31),
        "hc_mult": config.integer("hc_mult", 1, MAX_STREAMS),
        "hc_sinkhorn_iters": config.integer("hc_sinkhorn_iters", 1, MAX_ITERATIONS),
        "hc_eps": config.number("hc_eps"),
        "routed_scaling_factor": config.number("routed_scaling_factor"),
        "swiglu_limit": config.number("swiglu_limit"),
    }


def _read_rope(config: Fields, share: float) -> tuple[float, float, Yarn | None]:
    """(rope_theta, compress_rope_theta, scaling of layers that compress), whose heads turn by that share.

    Published files do not say that cosines and sines are not multiplied; transformers 5.24 saves all of it in
    rope_parameters.
    """
    _check_share(config, config.number("partial_rotary_factor", share), share)
    if "rope_parameters" not in config:
        _, yarn = read_yarn_rope(config)
        if yarn is not None and "attention_factor" not in config.object("rope_scaling"):
            yarn = replace(yarn, attention_factor=1.0)
        return read_theta(config), read_theta(config, "compress_rope_theta"), yarn
    only(config, "rope_scaling", None)
    main, compress = (config.object("rope_parameters").object(kind) for kind in ("main", "compress"))
    for parameters in (main, compress):
        _check_share(parameters, parameters.number("partial_rotary_factor"), share)
    only(main, "rope_type", "default")
    return read_theta(main), read_theta(compress), read_yarn(compress, config)


def _check_share(parameters: Fields, found: float, share: float) -> None:
    if found != share:
        raise parameters.wrong("partial_rotary_factor", f"{share} as qk_rope_head_dim is of head_dim")


def _read_layer_types(config: Fields, num_layers: int) -> tuple[str, ...]:
    """By name, or by how many tokens an entry stands for, which also says it of multi-token prediction behind."""
    if "layer_types" in config:
        return tuple(config.strings("layer_types"))
    ratios = config.integers("compress_ratios")[:num_layers]
    if unknown := set(ratios) - _BY_RATIO.keys():
        known = ", ".join(map(str, _BY_RATIO))
        raise UnsupportedError(f"{config.name('compress_ratios')} has {min(unknown)}, only {known} are implemented")
    return tuple(_BY_RATIO[ratio] for ratio in ratios)


def _read_compress_rates(config: Fields) -> tuple[int, int]:
    """Tokens of an entry in layers that choose among entries, and in the others."""
    if "compress_rates" not in config:
        return 4, 128
    rates = config.object("compress_rates")
    return (
        rates.integer(COMPRESSED_SPARSE_ATTENTION, 1, 2**20),
        rates.integer(HEAVILY_COMPRESSED_ATTENTION, 1, 2**20),
    )
