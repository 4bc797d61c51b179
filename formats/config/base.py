"""What every model's facts have, and how config.json is refused."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from formats.config.rope import Factors, Rope, Scaling
from formats.errors import FormatError, UnsupportedError
from formats.fields import Fields, shown

LINEAR_ATTENTION = "linear_attention"
FULL_ATTENTION = "full_attention"
SLIDING_ATTENTION = "sliding_attention"
CHUNKED_ATTENTION = "chunked_attention"  # to the tokens since the last multiple of attention_chunk_size
INDEXED_ATTENTION = "indexed_attention"  # to the tokens that an indexer chooses
SHARED_INDEX_ATTENTION = "shared_index_attention"  # to those that the layer before chose
COMPRESSED_SPARSE_ATTENTION = "compressed_sparse_attention"  # to a window, and to entries that an indexer chooses
HEAVILY_COMPRESSED_ATTENTION = "heavily_compressed_attention"  # to a window, and to all entries
DENSE, SPARSE = "dense", "sparse"
SILU, SWIGLU_CLAMPED, GELU_TANH, SILU_CLAMPED = "silu", "swiglu_clamped", "gelu_tanh", "silu_clamped"


class Activation(NamedTuple):
    """What joins the gate and up of an expert."""

    kind: str = SILU
    alpha: float = 0.0  # of swiglu_clamped
    limit: float = 0.0  # of swiglu_clamped and silu_clamped
    scale_input: bool = False  # routing weights multiply the experts' input, not their output


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
        return Rope(self.rope_theta, self.rotary_dim, scaling=self.rope_scaling)

    def has_experts(self, layer: int) -> bool:
        """Whether the layer's feed-forward part is a mixture of experts; a dense one otherwise."""
        return True

    @property
    def expert_activation(self) -> Activation:
        """What the experts do between their projections."""
        return Activation()

    @property
    def query_values_per_token(self) -> int:
        """Width of all queries of a token, in the layer where they are widest."""
        return self.num_attention_heads * self.head_dim

    @property
    def queries_per_key(self) -> int:
        """Query heads that share a key head, in the layer where most do."""
        return self.num_attention_heads // self.num_key_value_heads

    @property
    def cache_values_per_token(self) -> int:
        """Keys and values that one token adds to the caches of all layers."""
        full = self.layer_types.count(FULL_ATTENTION)
        return full * 2 * self.num_key_value_heads * self.head_dim

    def cache_values(self, ctx_size: int, chunk_size: int) -> int:
        """Keys and values in the caches of all layers at most, of a sequence read in chunks."""
        return ctx_size * self.cache_values_per_token

    @property
    @abstractmethod
    def state_values(self) -> int:
        """Values of recurrent and convolution state of one sequence, whatever its length."""

    @property
    @abstractmethod
    def mixer_values_per_token(self) -> int:
        """Activations per token alive at the widest point of a mixer (attention or what stands for it)."""

    def check(self, where: str) -> None:
        """Relations between values. Raises FormatError naming both; families add their own."""
        self.require(where, len(self.layer_types) == self.num_hidden_layers, "layer_types", self._entries)
        self.require_divides(where, "num_key_value_heads", "num_attention_heads")
        self.require(where, 0 < self.top_k <= self.num_experts, "top_k", f"1 to num_experts {self.num_experts}")
        self.require(where, self.rms_norm_eps > 0, "rms_norm_eps", "a number above 0")
        self.require(where, self.rope_theta > 0, "rope_theta", "a number above 0")
        even = self.rotary_dim % 2 == 0
        self.require(where, even and 0 < self.rotary_dim <= self.head_dim, "rotary_dim", "even, up to head_dim")
        if isinstance(scaling := self.rope_scaling, Factors):
            fit = len(scaling.factors) == self.rotary_dim // 2 and all(factor > 0 for factor in scaling.factors)
            self.require(where, fit, "rope_scaling", f"{self.rotary_dim // 2} factors above 0")

    @property
    def _entries(self) -> str:
        return f"{self.num_hidden_layers} entries"

    def require(self, where: str, holds: bool, key: str, expected: str) -> None:
        """Raises FormatError unless the condition on field `key` holds."""
        if not holds:
            raise FormatError(f"{where}: {key} is {shown(getattr(self, key))}, expected {expected}")

    def require_known(self, where: str, key: str, known: tuple[str, ...]) -> None:
        """Raises FormatError unless field `key`, a name or several, holds only known ones."""
        value = getattr(self, key)
        names = {value} if isinstance(value, str) else set(value)
        self.require(where, names <= set(known), key, f"only {', '.join(known[:-1])} and {known[-1]}")

    def check_groups(self, where: str, n_group: int, topk_group: int) -> None:
        """Experts in n_group groups of which a token may use topk_group. Raises FormatError."""
        self.require_divides(where, "n_group", "num_experts")
        self.require(where, 0 < topk_group <= n_group, "topk_group", f"1 to n_group {n_group}")
        reachable = topk_group * self.num_experts // n_group
        self.require(where, self.top_k <= reachable, "top_k", f"at most the {reachable} experts of topk_group groups")

    def require_divides(self, where: str, key: str, other: str) -> None:
        """Raises FormatError unless field `key` divides field `other`."""
        divisor, value = getattr(self, key), getattr(self, other)
        self.require(where, divisor > 0 and value % divisor == 0, key, f"a divisor of {other} {value}")


def only(source: Fields, key: str, implemented: Any) -> None:
    """A key may be absent, null, or hold the one value that the code implements. Raises UnsupportedError."""
    value = source.raw(key, implemented)
    if value != implemented or type(value) is not type(implemented):
        wanted = "nothing" if implemented is None else repr(implemented)
        raise UnsupportedError(f"{source.name(key)} is {shown(value)}, only {wanted} is implemented")
