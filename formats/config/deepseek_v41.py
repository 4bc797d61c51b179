"""DeepSeek-V4.1, text part (sources: mlx-lm's deepseek_v41.py; of n-grams the published inference/engram.py)."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from formats.config.base import (
    COMPRESSED_SPARSE_ATTENTION,
    INDEXER_CHOICE,
    NGRAM_GATES,
    ROUNDING,
    SLIDING_ATTENTION,
    Where,
    language_model,
    only,
)
from formats.config.deepseek_v4 import CompressedConfig, read_sizes
from formats.config.rope import read_theta, read_yarn
from formats.config.scaling import Yarn
from formats.errors import FormatError, UnsupportedError
from formats.fields import Fields

MAX_SIZE, MAX_HEADS, MAX_ENGRAMS = 64, 2**10, 2**10  # of n-grams, and of the layers that have them
MAX_ROWS = 2**31  # of the table, as of any axis
SEED = 10007  # times a layer's number, of its multipliers
FP4_BLOCK, FP8_BLOCK = 32, 32  # values of a key that share a scale


@dataclass(frozen=True)
class Candidates:
    """Blocks of entries that one layer chooses; the indexers of later layers choose only among these."""

    layer_id: int
    topk_blocks: int
    block_size: int  # entries


@dataclass(frozen=True)
class Engrams:
    """Embeddings of n-grams of 2 to max_ngram_size classes of tokens, a table of them for each of some layers.

    Each n-gram is hashed to one row of every of its heads' own rows. Tokens whose texts differ in case, accents or
    blanks alone are of one class.
    """

    layer_ids: tuple[int, ...]
    max_ngram_size: int
    n_heads: int  # of each n
    head_dim: int
    vocab_size: int  # the heads have the primes from here on of rows, none of them twice
    compressed_vocab_size: int  # classes
    pad_token_id: int  # which stands before the first token

    @property
    def rows_per_token(self) -> int:
        """Of one table."""
        return (self.max_ngram_size - 1) * self.n_heads

    @cached_property
    def head_rows(self) -> tuple[tuple[int, ...], ...]:
        """Rows of each head, one after another in the table of each layer: [layers, rows_per_token]."""
        tables, candidate = [], self.vocab_size
        for _ in self.layer_ids:
            primes: list[int] = []
            while len(primes) < self.rows_per_token:
                if _is_prime(candidate):
                    primes.append(candidate)
                candidate += 1
            tables.append(tuple(primes))
        return tuple(tables)

    @property
    def table_rows(self) -> tuple[int, ...]:
        """Rows of the table of each layer."""
        return tuple(map(sum, self.head_rows))

    @cached_property
    def multipliers(self) -> tuple[tuple[int, ...], ...]:
        """Odd numbers that a class, the one before it... are multiplied by: [layers, max_ngram_size].

        The publisher draws them with NumPy's generator; products stay below 2^63.
        """
        size, bound = self.max_ngram_size, max(1, (2**63 - 1) // self.compressed_vocab_size // 2)
        return tuple(
            tuple(2 * int(drawn) + 1 for drawn in np.random.default_rng(SEED * layer).integers(0, bound, size))
            for layer in self.layer_ids
        )


def _is_prime(value: int) -> bool:
    return value > 1 and all(value % divisor for divisor in range(2, math.isqrt(value) + 1))


@dataclass(frozen=True, kw_only=True)
class DeepseekV41Config(CompressedConfig):
    """As DeepSeek-V4, but a few layers make the entries, and choose among them, for those that follow.

    A layer of compressed_sparse_attention sees entries of the last kv source up to it, as the last index source up to
    it chose them. What a half of a layer reads of the streams is weighed by the half before it.
    """

    compress_ratios: tuple[int, ...]  # [num_hidden_layers]: tokens of an entry, 0 where there is only the window
    kv_source_layer_ids: tuple[int, ...]
    index_source_layer_ids: tuple[int, ...]
    candidates: Candidates | None
    gate_temp: float  # divides the logits of routers
    engrams: Engrams | None

    def is_kv_source(self, layer: int) -> bool:
        """Whether the layer makes entries, and an indexer's keys of them."""
        return layer in self.kv_source_layer_ids

    def is_index_source(self, layer: int) -> bool:
        """Whether the layer chooses among entries."""
        return layer in self.index_source_layer_ids

    def kv_source(self, layer: int) -> int:
        """Whose entries a layer sees."""
        return max(source for source in self.kv_source_layer_ids if source <= layer)

    @property
    def ngram_layers(self) -> tuple[int, ...]:
        return self.engrams.layer_ids if self.engrams else ()

    @property
    def ngram_table(self) -> tuple[int, int] | None:
        return (sum(self.engrams.table_rows), self.engrams.head_dim) if self.engrams else None

    @property
    def ngrams_per_token(self) -> int:
        return len(self.engrams.layer_ids) * self.engrams.rows_per_token if self.engrams else 0

    @property
    def token_classes(self) -> int:
        return self.engrams.compressed_vocab_size if self.engrams else 0

    @property
    def numpy_parts(self) -> tuple[str, ...]:
        choices = (INDEXER_CHOICE,) if self.index_source_layer_ids else ()
        return (ROUNDING, *choices, *((NGRAM_GATES,) if self.engrams else ()))

    def compressors(self) -> Iterator[tuple[int, int, bool]]:
        for layer in self.kv_source_layer_ids:
            yield self.compress_ratios[layer], self.head_dim, False
            yield self.compress_ratios[layer], self.index_head_dim, False

    @property
    def state_values(self) -> int:
        """Projections and gates of tokens that no entry stands for yet."""
        ratios = (self.compress_ratios[layer] for layer in self.kv_source_layer_ids)
        return sum(ratio * 2 * self.head_dim for ratio in ratios if ratio > 1)

    def mixer_values(self, tokens: int) -> int:
        if self.engrams is None:
            return super().mixer_values(tokens)
        read = 2 * self.engrams.rows_per_token * self.engrams.head_dim  # as rows, and side by side
        return max(super().mixer_values(tokens), tokens * (read + 6 * self.streams_width))

    def _most_entries(self, ctx_size: int) -> int:
        """The most that any layer has."""
        return max((-(-ctx_size // self.compress_ratios[layer]) for layer in self.kv_source_layer_ids), default=0)

    def scores_per_token(self, ctx_size: int) -> int:
        return max(self.num_attention_heads, self.index_n_heads) * self._most_entries(ctx_size)

    def marks_per_token(self, ctx_size: int) -> int:
        """Candidates, and as DeepSeek-V4 twice: what the layers before go by is there while the next is chosen."""
        return 5 * self._most_entries(ctx_size)

    def check(self, where: Where) -> None:
        super().check(where)
        self.require_known(where, "layer_types", (SLIDING_ATTENTION, COMPRESSED_SPARSE_ATTENTION))
        self.require(where, self.gate_temp > 0, "gate_temp", "a number above 0")
        scaled = isinstance(self.rope_scaling, Yarn) and self.rope_scaling.mscale_all_dim != 0
        self.require(where, not scaled, "rope_scaling", "an mscale_all_dim of 0")
        for key, block in (("head_dim", FP8_BLOCK), ("index_head_dim", FP4_BLOCK)):
            self.require(where, getattr(self, key) % block == 0, key, f"a multiple of {block}")
        self._check_sources(where)
        if self.candidates is not None:
            self._check_candidates(where, self.candidates)
        if self.engrams is not None:
            self._check_engrams(where, self.engrams)

    def _check_sources(self, where: Where) -> None:
        """Sources are there before they are read, and a layer's entries are as its own ratio says."""
        known, ratios = range(self.num_hidden_layers), self.compress_ratios
        kinds = tuple(_kind(ratio) for ratio in ratios)
        self.require(where, kinds == self.layer_types, "compress_ratios", "0 in layers of sliding_attention alone")
        for key in ("kv_source_layer_ids", "index_source_layer_ids"):
            ids = getattr(self, key)
            rising = all(layer in known and ratios[layer] for layer in ids) and tuple(sorted(set(ids))) == ids
            self.require(where, rising, key, "rising numbers of layers whose compress_ratios are not 0")
        both = set(self.kv_source_layer_ids) <= set(self.index_source_layer_ids)
        self.require(where, both, "kv_source_layer_ids", "only layers of index_source_layer_ids")
        for layer, ratio in enumerate(ratios):
            if ratio:
                sources = [source for source in self.kv_source_layer_ids if source <= layer]
                expected = f"layer {layer} or one before it, as it has entries"
                self.require(where, bool(sources), "kv_source_layer_ids", expected)
                alike = ratios[sources[-1]] == ratio
                expected = f"{ratios[sources[-1]]} in layer {layer}, as in layer {sources[-1]}, whose entries it sees"
                self.require(where, alike, "compress_ratios", expected)

    def _check_candidates(self, where: Where, candidates: Candidates) -> None:
        source = self.is_index_source(candidates.layer_id)
        self.require(where, source, "candidates.layer_id", "a layer of index_source_layer_ids, or -1")
        last = not any(layer > candidates.layer_id for layer in self.kv_source_layer_ids)
        self.require(where, last, "candidates.layer_id", "the last of kv_source_layer_ids, or one behind it")
        chosen = (candidates.topk_blocks - 1) * candidates.block_size  # at least, where there are more blocks
        enough = chosen >= self.index_topk or candidates.topk_blocks * candidates.block_size > MAX_ROWS
        expected = f"so many that all but one hold {where.key('index_topk')} {self.index_topk} entries"
        self.require(where, enough, "candidates.topk_blocks", expected)

    def _check_engrams(self, where: Where, engrams: Engrams) -> None:
        """Few enough to count before any prime is looked for."""
        ids, known = engrams.layer_ids, range(self.num_hidden_layers)
        distinct = 0 < len(set(ids)) == len(ids) <= MAX_ENGRAMS and all(layer in known for layer in ids)
        self.require(where, distinct, "engrams.layer_ids", f"distinct layers below {self.num_hidden_layers}")
        sizes = 1 < engrams.max_ngram_size <= MAX_SIZE
        self.require(where, sizes, "engrams.max_ngram_size", f"2 to {MAX_SIZE}")
        self.require(where, engrams.n_heads <= MAX_HEADS, "engrams.n_heads", f"at most {MAX_HEADS}")
        few = len(ids) * engrams.rows_per_token * engrams.vocab_size <= MAX_ROWS
        few = few and len(ids) * engrams.rows_per_token <= 2**14 and sum(engrams.table_rows) <= MAX_ROWS
        self.require(where, few, "engrams.vocab_size", f"so few that the rows of all tables are at most {MAX_ROWS}")
        classes = engrams.compressed_vocab_size <= self.vocab_size
        self.require(where, classes, "engrams.compressed_vocab_size", f"at most vocab_size {self.vocab_size}")
        pad = engrams.pad_token_id < self.vocab_size
        self.require(where, pad, "engrams.pad_token_id", f"a token below vocab_size {self.vocab_size}")

    @classmethod
    def read(cls, outer: Fields) -> "DeepseekV41Config":
        """From config.json, nested in text_config or flat. Raises FormatError or UnsupportedError naming the key."""
        config = language_model(outer)
        for key, implemented in {"num_hash_layers": 0, "tie_word_embeddings": False, "rope_parameters": None}.items():
            only(config, key, implemented)
        if config is not outer:
            only(config, "model_type", "deepseek_v41_text")
        num_layers = config.integer("num_hidden_layers", 1, 10_000)
        ratios = config.integers("compress_ratios", 0, 2**20)[:num_layers]  # behind them those of the draft's layers
        ratios += [0] * (num_layers - len(ratios))
        return cls(
            model_type="deepseek_v41",
            **read_sizes(config),
            layer_types=tuple(map(_kind, ratios)),
            rope_theta=read_theta(config),
            rope_scaling=_read_yarn(config),
            compress_rope_theta=read_theta(config, "compress_rope_theta"),
            compress_ratios=tuple(ratios),
            kv_source_layer_ids=tuple(config.integers("kv_source_layer_ids", 0, 10_000)),
            index_source_layer_ids=tuple(config.integers("index_source_layer_ids", 0, 10_000)),
            candidates=_read_candidates(config, num_layers),
            gate_temp=config.number("gate_temp", 1.0),
            engrams=_read_engrams(config),
        )


def _kind(ratio: int) -> str:
    return COMPRESSED_SPARSE_ATTENTION if ratio else SLIDING_ATTENTION


def _read_yarn(config: Fields) -> Yarn | None:
    """YaRN that multiplies no cosines and sines, or none."""
    if "rope_scaling" not in config or not config.raw("rope_scaling"):
        return None
    said = config.object("rope_scaling")
    for key, implemented in {"attention_factor": 1, "mscale": 0, "mscale_all_dim": 0, "truncate": True}.items():
        only(said, key, implemented)
    for key in ("beta_fast", "beta_slow"):
        if said.number(key, 1.0) % 1:
            raise UnsupportedError(f"{said.name(key)} is {said.number(key)}, only whole numbers are implemented")
    yarn = read_yarn(said, config)
    if yarn is None:
        raise UnsupportedError(f"{config.name('rope_scaling')} is of type default, only yarn or null is implemented")
    return Yarn(
        yarn.factor,
        yarn.original_max_position_embeddings,
        yarn.beta_fast,
        yarn.beta_slow,
        truncate=True,
        attention_factor=1.0,
        mscale_all_dim=0.0,
    )


def _read_candidates(config: Fields, num_layers: int) -> Candidates | None:
    """None where no layer chooses blocks, or every block."""
    source = config.raw("candidate_source_layer_id", -1)
    blocks = config.integer("candidate_topk_blocks", 0, 2**31, default=2048)
    if source == -1 or blocks == 0:
        return None
    return Candidates(
        layer_id=config.integer("candidate_source_layer_id", 0, num_layers - 1),
        topk_blocks=blocks,
        block_size=config.integer("candidate_block_size", 1, 2**31, default=8),
    )


def _read_engrams(config: Fields) -> Engrams | None:
    layers = config.integers("engram_layer_ids", 0, 10_000, default=[])
    if not layers:
        return None
    engrams = Engrams(
        layer_ids=tuple(layers),
        max_ngram_size=config.integer("engram_max_ngram_size", 2, MAX_SIZE),
        n_heads=config.integer("engram_n_heads", 1, MAX_HEADS),
        head_dim=config.integer("engram_head_dim", 1, 2**24),
        vocab_size=config.integer("engram_vocab_size", 1, 2**31),
        compressed_vocab_size=config.integer("engram_compressed_vocab_size", 1, 2**31),
        pad_token_id=config.integer("engram_pad_token_id", 0, 2**31),
    )
    rows = tuple(config.integers("engram_num_embeddings", 1, MAX_ROWS))
    hashed = len(layers) * engrams.rows_per_token
    if hashed * engrams.vocab_size > MAX_ROWS or hashed > 2**14:
        raise config.wrong("engram_vocab_size", f"so few that the rows of all tables are at most {MAX_ROWS}")
    if rows != engrams.table_rows:
        expected = ", ".join(map(str, engrams.table_rows))
        raise FormatError(f"{config.name('engram_num_embeddings')} is {list(rows)}, expected [{expected}] by its heads")
    return engrams
