"""What every model's facts have, and how config.json is refused."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from operator import attrgetter
from typing import Any, NamedTuple

from formats.config.scaling import LOWEST_THETA, LongRope, Rope, Scaling, Yarn, flaw_of, misfit_of
from formats.errors import FormatError, UnsupportedError
from formats.fields import Fields, shown
from formats.record import PART_NAMES

LINEAR_ATTENTION = "linear_attention"
FULL_ATTENTION = "full_attention"
SLIDING_ATTENTION = "sliding_attention"
CHUNKED_ATTENTION = "chunked_attention"  # to the tokens since the last multiple of attention_chunk_size
CONV = "conv"  # no attention but a short convolution, between two gates
INDEXED_ATTENTION = "indexed_attention"  # to the tokens that an indexer chooses
SHARED_INDEX_ATTENTION = "shared_index_attention"  # to those that the layer before chose
COMPRESSED_SPARSE_ATTENTION = "compressed_sparse_attention"  # to a window, and to entries that an indexer chooses
HEAVILY_COMPRESSED_ATTENTION = "heavily_compressed_attention"  # to a window, and to all entries
DENSE, SPARSE = "dense", "sparse"
SILU, SWIGLU_CLAMPED, GELU_TANH, SILU_CLAMPED = "silu", "swiglu_clamped", "gelu_tanh", "silu_clamped"
SITU = "situ"
RELU2 = "relu2"  # max(up, 0)^2, without a gate
CLAMPED_SILU = "clamped_silu"  # silu(gate) is cut at the limit, where silu_clamped cuts the gate before
# What no kernel computes, in words for people: `ModelConfig.numpy_parts`.
MEAN_NORMS, POSITION_SCALES = "norms that subtract the mean", "queries that grow with their position"
SPARSEMIXER_CHOICE, INDEXER_CHOICE = "SparseMixer", "the choice of an indexer"
STREAM_GATES, NGRAM_GATES, ROUNDING = "gates of residual streams", "gates of n-gram embeddings", "rounding of keys"


class Activation(NamedTuple):
    """What joins the gate and up of an expert, or what is done to up alone."""

    kind: str = SILU
    alpha: float = 0.0  # of swiglu_clamped and situ
    limit: float = 0.0  # of swiglu_clamped, silu_clamped, clamped_silu and situ
    scale_input: bool = False  # routing weights multiply the experts' input, not their output

    @property
    def gated(self) -> bool:
        """Whether there is a gate to join."""
        return self.kind != RELU2


# Keys of config.json that hold a field of another name, by field: the one that is there, else the last.
_KEYS: Mapping[str, tuple[str, ...]] = {
    "top_k": ("num_experts_per_token", "top_k_experts", "moe_k", "moe_topk", "moe_top_k", "num_experts_per_tok"),
    "num_experts": ("num_local_experts", "n_routed_experts", "moe_num_experts", "num_experts"),
    "intermediate_size": ("ffn_hidden_size", "intermediate_size"),
    "n_group": ("num_expert_group", "n_group"),
    "rms_norm_eps": ("layer_norm_epsilon", "rms_norm_eps", "layer_norm_eps"),
    "layer_types": ("layers_block_type", "hybrid_override_pattern", "layer_types"),
    "mamba.num_heads": ("mamba_n_heads", "mamba_num_heads"),
    "mamba.head_dim": ("mamba_d_head", "mamba_head_dim"),
    "mamba.state_size": ("mamba_d_state", "ssm_state_size"),
    "mamba.n_groups": ("mamba_n_groups", "n_groups"),
    "mamba.conv_kernel": ("mamba_d_conv", "conv_kernel"),
    "rotary_dim": ("rotary_dim", "qk_rope_head_dim", "head_dim"),
    "indexer.index_head_dim": ("index_head_dim",),
    "gate_lower_bound": ("linear_attn_config.gate_lower_bound", "linear_lower_bound", "kda_lower_bound"),
    "linear_num_heads": ("linear_attn_config.num_heads",),
    "ngrams.layer_id": ("ple_layer_ids",),
    "ngrams.size": ("ngram_size",),
    "ngrams.heads": ("heads_per_ngram",),
    "ngrams.embed_dim": ("ple_embed_dim",),
    "ngrams.conv_kernel_size": ("ple_conv_kernel_size",),
    "ngrams.vocab_size_base": ("ngram_vocab_size_base",),
    "ngrams.eos_token_id": ("eos_token_id",),
    "ngrams.shards": ("split_ngram_parts",),
    "candidates.layer_id": ("candidate_source_layer_id",),
    "candidates.topk_blocks": ("candidate_topk_blocks",),
    "engrams.layer_ids": ("engram_layer_ids",),
    "engrams.max_ngram_size": ("engram_max_ngram_size",),
    "engrams.n_heads": ("engram_n_heads",),
    "engrams.vocab_size": ("engram_vocab_size",),
    "engrams.compressed_vocab_size": ("engram_compressed_vocab_size",),
    "engrams.pad_token_id": ("engram_pad_token_id",),
    "global_head_dim": ("per_layer_config.*.head_dim", "global_head_dim"),
    "num_global_key_value_heads": ("per_layer_config.*.num_key_value_heads", "num_global_key_value_heads"),
}


def thinker(outer: Fields) -> Fields:
    """What config.json says of the part that sees, hears and writes: all of it, if no other part speaks."""
    return outer.object("thinker_config") if "thinker_config" in outer else outer


def language_model(outer: Fields) -> Fields:
    """What config.json says of the language model: its text_config, or all of it where there is none.

    Of a model that speaks, too (Qwen3-Omni), the text_config of its thinker.
    """
    outer = thinker(outer)
    return outer.object("text_config") if "text_config" in outer else outer


def key_of(config: Fields, *keys: str) -> str:
    """The first of the keys that is there, else the last: one value that several writers name otherwise."""
    return next((key for key in keys if key in config), keys[-1])


class Where(NamedTuple):
    """The object of a file that a config was read from, and what fields are called there."""

    source: Fields
    keys: Mapping[str, str]

    @classmethod
    def of_index(cls, facts: Fields) -> "Where":
        """An index, which calls every field by its name."""
        return cls(facts, {})

    @classmethod
    def of_config(cls, outer: Fields) -> "Where":
        """A config.json, nested in text_config or flat."""
        text = language_model(outer)
        keys = {field: next((k for k in names if k.split(".")[0] in text), names[-1]) for field, names in _KEYS.items()}
        return cls(text, keys)

    def key(self, field: str) -> str:
        return self.keys.get(field, field)

    def name(self, field: str) -> str:
        """`file: a.b.key`, as messages name it."""
        return self.source.name(self.key(field))


@dataclass(frozen=True)
class ModelConfig(ABC):
    """Facts that the runtime needs of any model; a family adds its own.

    Names are those of config.json, but `top_k` is num_experts_per_tok, and `rotary_dim` is
    head_dim * partial_rotary_factor.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    max_position_embeddings: int
    rms_norm_eps: float
    tie_word_embeddings: bool
    layer_types: tuple[str, ...]  # [num_hidden_layers]
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rotary_dim: int
    rope_theta: float
    rope_scaling: Scaling | None
    num_experts: int
    top_k: int
    moe_intermediate_size: int

    @cached_property
    def rope(self) -> Rope:
        """How positions turn queries and keys."""
        assert not isinstance(self.rope_scaling, LongRope), "the context decides: within"
        return Rope(self.rope_theta, self.rotary_dim, scaling=self.rope_scaling)

    def within(self, ctx_size: int) -> "ModelConfig":
        """The model of a run whose context has room for so many tokens, where that decides how positions turn."""
        scaling = self.rope_scaling
        return replace(self, rope_scaling=scaling.within(ctx_size)) if isinstance(scaling, LongRope) else self

    @property
    def ngram_layers(self) -> tuple[int, ...]:
        """The layers that an embedding of n-grams is added to, in the order of its rows."""
        return ()

    @property
    def ngram_table(self) -> tuple[int, int] | None:
        """(rows, columns) of the embedding of n-grams."""
        return None

    @property
    def ngrams_per_token(self) -> int:
        """Rows of it that a token reads."""
        return 0

    @property
    def token_classes(self) -> int:
        """Of how many classes tokens are for it, by their texts; 0 where each is its own."""
        return 0

    @property
    def knows_positions(self) -> bool:
        """Whether some values of queries and keys turn with their position."""
        return True

    def has_experts(self, layer: int) -> bool:
        """Whether the layer's feed-forward part is a mixture of experts; a dense one otherwise."""
        return True

    @property
    def expert_hidden_size(self) -> int:
        """Width of what routed experts read and give."""
        return self.hidden_size

    @property
    def expert_activation(self) -> Activation:
        """What the experts do between their projections."""
        return Activation()

    def routed_activation(self, layer: int) -> Activation:
        """That of a layer's routed experts, where layers differ."""
        return self.expert_activation

    @property
    def expert_parts(self) -> tuple[str, ...]:
        """The parts of an expert's record, in their order."""
        return PART_NAMES if self.expert_activation.gated else PART_NAMES[1:]

    @property
    def numpy_parts(self) -> tuple[str, ...]:
        """What no kernel computes, and NumPy does beside them: named for people, who may wonder about speed."""
        return ()

    @property
    def feed_forward_width(self) -> int:
        """Width between the matrices of the widest expert, shared expert or dense layer."""
        return self.moe_intermediate_size

    @abstractmethod
    def cache_values(self, ctx_size: int, chunk_size: int) -> int:
        """Keys and values that the caches of all layers have room for at most, of a sequence read in chunks."""

    @property
    @abstractmethod
    def state_values(self) -> int:
        """Values of recurrent and convolution state of one sequence, whatever its length."""

    @abstractmethod
    def mixer_values(self, tokens: int) -> int:
        """Activations of a step alive at the widest point of a mixer (attention or what stands for it), but scores."""

    def scores_per_token(self, ctx_size: int) -> int:
        """Scores of one token that are there together: of the queries that share a key head, or of an indexer."""
        return ctx_size * self.num_attention_heads // self.num_key_value_heads

    def marks_per_token(self, ctx_size: int) -> int:
        """Bytes that mark what a token sees of its context, where an indexer chooses."""
        return 0

    def check(self, where: Where) -> None:
        """Relations between values. Raises FormatError naming both; families add their own."""
        self.require(where, len(self.layer_types) == self.num_hidden_layers, "layer_types", self._entries)
        self.require_divides(where, "num_key_value_heads", "num_attention_heads")
        every = f"{where.key('num_experts')} {self.num_experts}"
        self.require(where, 0 < self.top_k <= self.num_experts, "top_k", f"1 to {every}")
        self.require(where, self.rms_norm_eps > 0, "rms_norm_eps", "a number above 0")
        self.require(where, self.rotary_dim % 2 == 0, "rotary_dim", "an even number")
        fits = int(self.knows_positions) <= self.rotary_dim <= self.head_dim
        self.require(where, fits, "rotary_dim", f"at most {where.key('head_dim')} {self.head_dim}")
        if (misfit := misfit_of(self.rope_scaling, self.rotary_dim)) is not None:
            self.require(where, False, f"rope_scaling.{misfit.key}", misfit.expected)
        self.check_scaling(where, "rope_theta")

    def check_mlp_layer_types(self, where: Where, known: tuple[str, ...]) -> None:
        """Of models that state for each layer what its feed-forward part is. Raises FormatError."""
        key = "mlp_layer_types"
        self.require(where, len(getattr(self, key)) == self.num_hidden_layers, key, self._entries)
        self.require_known(where, key, known)
        any_experts = any(map(self.has_experts, range(self.num_hidden_layers)))
        self.require(where, any_experts, key, "at least one layer with experts")

    @property
    def _entries(self) -> str:
        return f"{self.num_hidden_layers} entries"

    def require(self, where: Where, holds: bool, key: str, expected: str) -> None:
        """Raises FormatError unless the condition on field `key` holds."""
        if not holds:
            raise FormatError(f"{where.name(key)} is {shown(attrgetter(key)(self))}, expected {expected}")

    def require_known(self, where: Where, key: str, known: tuple[str, ...]) -> None:
        """Raises FormatError unless field `key`, a name or several, holds only known ones."""
        value = getattr(self, key)
        names = {value} if isinstance(value, str) else set(value)
        others = f"{', '.join(known[:-1])} and " if len(known) > 1 else ""
        self.require(where, names <= set(known), key, f"only {others}{known[-1]}")

    def check_groups(self, where: Where, n_group: int, topk_group: int) -> None:
        """Experts in n_group groups of which a token may use topk_group. Raises FormatError."""
        self.require_divides(where, "n_group", "num_experts")
        self.require(where, 0 < topk_group <= n_group, "topk_group", f"1 to {where.key('n_group')} {n_group}")
        reachable = topk_group * self.num_experts // n_group
        self.require(where, self.top_k <= reachable, "top_k", f"at most the {reachable} experts of topk_group groups")

    def check_scaling(self, where: Where, theta: str) -> None:
        """Whether angles can be made of rope_scaling and the field `theta`. Raises FormatError."""
        self.require(where, getattr(self, theta) >= LOWEST_THETA, theta, f"a number of at least {LOWEST_THETA}")
        if (flaw := flaw_of(self.rope_scaling)) is not None:
            self.require(where, False, f"rope_scaling.{flaw.key}", flaw.expected)
        if isinstance(self.rope_scaling, Yarn):
            self.require(where, getattr(self, theta) > 1, theta, "a number above 1, of which YaRN takes the logarithm")

    def require_divides(self, where: Where, key: str, other: str) -> None:
        """Raises FormatError unless field `key` divides field `other`."""
        divisor, value = getattr(self, key), getattr(self, other)
        self.require(where, divisor > 0 and value % divisor == 0, key, f"a divisor of {where.key(other)} {value}")


def only(source: Fields, key: str, implemented: Any) -> None:
    """A key may be absent, null, or hold the one value that the code implements. Raises UnsupportedError."""
    value = source.raw(key, implemented)
    if value != implemented or isinstance(value, bool) != isinstance(implemented, bool):  # True is 1, too
        wanted = "nothing" if implemented is None else repr(implemented)
        raise UnsupportedError(f"{source.name(key)} is {shown(value)}, only {wanted} is implemented")
