"""Qwen3.8-Flash-Next, text part (sources: transformers' configuration_qwen4_exp.py and modular_qwen4_exp.py)."""

import math
from dataclasses import dataclass
from functools import cached_property

from formats.config.base import (
    FULL_ATTENTION,
    INDEXED_ATTENTION,
    INDEXER_CHOICE,
    LINEAR_ATTENTION,
    NGRAM_GATES,
    SILU,
    Where,
    language_model,
    only,
)
from formats.config.qwen3_5_moe import Qwen3_5MoeConfig, read_hybrid
from formats.errors import UnsupportedError
from formats.fields import Fields, shown
from formats.window import in_lanes

SIGMOID_GATE = "sigmoid"  # an output_gate_type, as SILU
GAMMA, MIX_1, MIX_2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB  # of splitmix64 (Steele et al., 2014)
MASK = 2**64 - 1
MAX_SIZE, MAX_HEADS = 64, 2**10  # of n-grams
MAX_ROWS = 2**31  # of the table, as of any axis


@dataclass(frozen=True)
class NGrams:
    """An embedding of n-grams of 2 to `size` tokens, each hashed to one row of every of its heads' own rows."""

    layer_id: int  # of the layer that it is added to, counted from 1
    size: int
    heads: int  # of each n
    embed_dim: int  # of all heads of all n together
    conv_kernel_size: int
    vocab_size_base: int  # the heads have the next primes of rows
    divisor: int  # of the rows of all heads together, the last of which stand for nothing
    shards: int  # in which checkpoints hold these rows
    seed: int
    eos_token_id: int  # which no n-gram reaches across

    @property
    def rows_per_token(self) -> int:
        return (self.size - 1) * self.heads

    @cached_property
    def head_rows(self) -> tuple[int, ...]:
        """Rows of each head, one after another in the table: [rows_per_token]."""
        primes: list[int] = []
        candidate = self.vocab_size_base
        while len(primes) < self.rows_per_token:
            if _is_prime(candidate):
                primes.append(candidate)
            candidate += 1
        return tuple(primes)

    @property
    def rows(self) -> int:
        """Of the whole table."""
        return -(-sum(self.head_rows) // self.divisor) * self.divisor

    @property
    def columns(self) -> int:
        return self.embed_dim // self.rows_per_token

    def multipliers(self, vocab_size: int) -> tuple[int, ...]:
        """Odd numbers that a token, the one before it... are multiplied by: [size]."""
        bound = (2**63 - 1) // vocab_size // 2
        return tuple(2 * (_splitmix64(self.seed + GAMMA * (i + 1)) % bound) + 1 for i in range(self.size))


def _splitmix64(value: int) -> int:
    value = (value + GAMMA) & MASK
    value = ((value ^ (value >> 30)) * MIX_1) & MASK
    value = ((value ^ (value >> 27)) * MIX_2) & MASK
    return value ^ (value >> 31)


def _is_prime(value: int) -> bool:
    return value > 1 and all(value % divisor for divisor in range(2, math.isqrt(value) + 1))


@dataclass(frozen=True)
class Qwen4ExpConfig(Qwen3_5MoeConfig):
    """Gated DeltaNet and attention to blocks that an indexer chooses, between several streams that are mixed."""

    hc_count: int  # streams
    hc_lowrank: int
    output_gate_type: str  # of gated DeltaNet
    indexer_n_heads: int
    indexer_head_dim: int
    indexer_budget: int  # tokens of the blocks that a token attends to at most
    indexer_compress_ratio: int  # tokens of a block
    ngrams: NGrams | None
    indexer_qk_split: bool = False  # index_qk_proj stands as index_q_proj and index_k_proj, as GGUF files have it

    @property
    def hc_width(self) -> int:
        """Values of all streams of a token."""
        return self.hc_count * self.hidden_size

    @property
    def known_layer_types(self) -> tuple[str, ...]:
        return LINEAR_ATTENTION, INDEXED_ATTENTION

    @property
    def numpy_parts(self) -> tuple[str, ...]:
        choices = (INDEXER_CHOICE,) if INDEXED_ATTENTION in self.layer_types else ()
        return (*choices, *((NGRAM_GATES,) if self.ngrams else ()))

    @property
    def ngram_layers(self) -> tuple[int, ...]:
        return () if self.ngrams is None else (self.ngrams.layer_id - 1,)

    @property
    def ngram_table(self) -> tuple[int, int] | None:
        return None if self.ngrams is None else (self.ngrams.rows, self.ngrams.columns)

    @property
    def ngrams_per_token(self) -> int:
        return 0 if self.ngrams is None else self.ngrams.rows_per_token

    def cache_values(self, ctx_size: int, chunk_size: int) -> int:
        blocks = self.layer_types.count(INDEXED_ATTENTION) * in_lanes(-(-ctx_size // self.indexer_compress_ratio))
        return super().cache_values(ctx_size, chunk_size) + blocks * self.indexer_head_dim

    @property
    def state_values(self) -> int:
        after = self.indexer_compress_ratio - 1  # tokens behind the last whole block, at most
        last_keys = self.layer_types.count(INDEXED_ATTENTION) * after * self.indexer_head_dim
        ngrams = self.ngrams
        convolution = 0 if ngrams is None else (ngrams.conv_kernel_size - 1) * ngrams.size * self.hc_width
        return super().state_values + last_keys + convolution

    def mixer_values(self, tokens: int) -> int:
        index = 3 * self.indexer_n_heads * self.indexer_head_dim
        mixer = super().mixer_values(tokens) + tokens * index
        return tokens * 3 * self.hc_width + max(mixer, tokens * 6 * self.hc_width)  # or what n-grams add

    def marks_per_token(self, ctx_size: int) -> int:
        """Of blocks, and of their tokens twice while they are spread over them."""
        return 2 * ctx_size + 2 * -(-ctx_size // self.indexer_compress_ratio)

    def check(self, where: Where) -> None:
        super().check(where)
        self.require(where, self.hc_count > 1, "hc_count", "2 or more")
        self.require_known(where, "output_gate_type", (SILU, SIGMOID_GATE))
        self.require_divides(where, "indexer_compress_ratio", "indexer_budget")
        wide = self.indexer_head_dim >= self.rotary_dim
        self.require(where, wide, "indexer_head_dim", f"rotary_dim {self.rotary_dim} or more")
        if self.ngrams is not None:
            self._check_ngrams(where, self.ngrams)

    def _check_ngrams(self, where: Where, ngrams: NGrams) -> None:
        """Raises FormatError; bounds come before the primes, of which absurd counts would take forever."""
        self.require(where, 1 < ngrams.size <= MAX_SIZE, "ngrams.size", f"2 to {MAX_SIZE}")
        self.require(where, ngrams.heads <= MAX_HEADS, "ngrams.heads", f"at most {MAX_HEADS}")
        self.require(where, ngrams.conv_kernel_size > 1, "ngrams.conv_kernel_size", "2 or more")
        fits = ngrams.embed_dim % ngrams.rows_per_token == 0
        self.require(where, fits, "ngrams.embed_dim", f"a multiple of all {ngrams.rows_per_token} heads of n-grams")
        known = ngrams.eos_token_id < self.vocab_size
        self.require(where, known, "ngrams.eos_token_id", f"a token below vocab_size {self.vocab_size}")
        few = ngrams.rows_per_token * ngrams.vocab_size_base <= MAX_ROWS and ngrams.rows <= MAX_ROWS
        self.require(where, few, "ngrams.vocab_size_base", f"so few that the rows of all heads are at most {MAX_ROWS}")
        even = ngrams.rows % ngrams.shards == 0
        self.require(where, even, "ngrams.shards", f"a divisor of the {ngrams.rows} rows of n-grams")
        known = ngrams.layer_id <= self.num_hidden_layers
        linear = known and self.layer_types[ngrams.layer_id - 1] == LINEAR_ATTENTION
        self.require(where, linear, "ngrams.layer_id", f"a layer of {LINEAR_ATTENTION}")

    @classmethod
    def read(cls, outer: Fields) -> "Qwen4ExpConfig":
        """From config.json, nested in text_config or flat. Raises FormatError or UnsupportedError naming the key."""
        text = language_model(outer)
        only(text, "indexer_kv_heads", 1)
        facts = read_hybrid(outer, text, "qwen4_exp")
        kinds = {FULL_ATTENTION: INDEXED_ATTENTION}  # as the published config calls them
        facts["layer_types"] = tuple(kinds.get(kind, kind) for kind in facts["layer_types"])
        return cls(
            **facts,
            hc_count=text.integer("hc_count", 1, 2**10, default=4),
            hc_lowrank=text.integer("hc_lowrank", 1, 2**24, default=320),
            output_gate_type=text.string("output_gate_type", SILU),
            indexer_n_heads=text.integer("indexer_n_heads", 1, 2**16),
            indexer_head_dim=text.integer("indexer_head_dim", 1, 2**16),
            indexer_budget=text.integer("indexer_budget", 1, 2**31),
            indexer_compress_ratio=text.integer("indexer_compress_ratio", 1, 2**16),
            ngrams=_read_ngrams(text),
            indexer_qk_split=text.boolean("indexer_qk_split", default=False),  # our own key
        )


def _read_ngrams(text: Fields) -> NGrams | None:
    layers = text.integers("ple_layer_ids", 1, 10_000, default=[])
    if not layers:
        return None
    if len(layers) > 1:
        raise UnsupportedError(f"{text.name('ple_layer_ids')} is {shown(layers)}, only one layer is implemented")
    eos = text.raw("eos_token_id")
    if isinstance(eos, list) and eos:  # of which the first ends n-grams
        eos = eos[0]
    if type(eos) is not int or not 1 <= eos < 2**31:
        raise text.wrong("eos_token_id", f"an integer from 1 to {2**31 - 1}, or a list that begins with one")
    return NGrams(
        layer_id=layers[0],
        size=text.integer("ngram_size", 1, MAX_SIZE, default=3),
        heads=text.integer("heads_per_ngram", 1, MAX_HEADS, default=8),
        embed_dim=text.integer("ple_embed_dim", 1, 2**24, default=text.integer("hidden_size", 1, 2**24)),
        conv_kernel_size=text.integer("ple_conv_kernel_size", 1, 64, default=4),
        vocab_size_base=text.integer("ngram_vocab_size_base", 1, 2**31, default=20_000_000),
        divisor=text.integer("make_ngram_vocab_size_divisible_by", 1, 2**31, default=128),
        shards=text.integer("split_ngram_parts", 1, 2**16, default=512),
        seed=text.integer("seed", 1, 2**31, default=1234),
        eos_token_id=eos,
    )
