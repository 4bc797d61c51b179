"""The plain decoder that most families are, by facts: attention over keys and values, then experts."""

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from formats.config.base import (
    CHUNKED_ATTENTION,
    CONV,
    DENSE,
    FULL_ATTENTION,
    SILU,
    SLIDING_ATTENTION,
    SPARSE,
    SWIGLU_CLAMPED,
    Activation,
    ModelConfig,
    Where,
    only,
)
from formats.config.rope import read_rope
from formats.config.scaling import Rope, misfit_of
from formats.fields import Fields
from formats.window import chunked_tokens, held_tokens, in_lanes

SOFTMAX, SIGMOID = "softmax", "sigmoid"
SQRT_SOFTPLUS = "sqrtsoftplus"  # DeepSeek-V4
SPARSEMIXER = "sparsemixer"  # Phi-MoE: two softmaxes, each of what comes near to its largest logit
CHOSEN_SIGMOID = "sigmoid_of_chosen"  # logits are compared: sigmoids of large ones are all 1
NO_GATE = "none"
SOFTPLUS, SOFTPLUS_BY_HEAD, SIGMOID_BY_HEAD = "softplus", "softplus_by_head", "sigmoid_by_head"  # of a gate
NO_NORM, HEAD_NORM, WHOLE_NORM = "none", "head", "whole"
UNIT_NORM = "unit"  # of each head, without weights, where queries and keys are turned
TURNED_NORM = "turned_head"  # of each head, after queries and keys are turned
SWIGLU_ALPHA = 1.702  # gpt-oss


@dataclass(frozen=True)
class Temperature:
    """Queries grow with their position: times 1 + attn_scale * log(1 + floor((position + 1) / floor_scale))."""

    floor_scale: int
    attn_scale: float

    def at(self, position: int) -> float:
        """What a query at this position is multiplied by."""
        return 1 + self.attn_scale * math.log1p((position + 1) // self.floor_scale)

    def next_change(self, position: int) -> int:
        """The first later position with another factor."""
        return ((position + 1) // self.floor_scale + 1) * self.floor_scale - 1


@dataclass(frozen=True)
class DecoderConfig(ModelConfig):
    """Each fact is one family's way or another's; a family's reader (below this folder) sets those that it has."""

    attention_multiplier: float  # of scores
    mlp_layer_types: tuple[str, ...]  # [num_hidden_layers]
    intermediate_size: int | None = None  # of dense layers
    rope_interleave: bool = False  # pairs (2i, 2i + 1) turn together, as some GGUF files order queries and keys
    # attention
    v_head_dim: int | None = None  # of values, where it is not head_dim
    attention_value_scale: float = 1.0  # values are multiplied by it
    sliding_window: int | None = None  # of layers with sliding_attention: tokens that a token sees, itself included
    swa_num_key_value_heads: int | None = None  # of these layers, where it is not num_key_value_heads
    swa_num_attention_heads: int | None = None  # of these layers, where it is not num_attention_heads
    swa_rotary_dim: int | None = None  # of these layers, where it is not rotary_dim
    swa_rope_scaled: bool = True  # whether rope_scaling is theirs, too
    swa_rope_theta: float | None = None  # of these layers, where it is not rope_theta
    attention_chunk_size: int | None = None  # of layers with chunked_attention
    full_attention_rope: bool = True  # whether layers with full_attention know positions
    attention_temperature: Temperature | None = None  # of layers that know no positions
    attention_sinks: bool = False
    full_attention_sinks: bool = True  # whether layers with full_attention have them, too
    fused_qkv: bool = False  # queries, keys and values are one projection
    attention_bias: bool = False  # of queries, keys and values
    attention_output_bias: bool = False
    qk_norm: str = NO_NORM  # of queries and keys: none, each head, the whole projection, turned_head, or unit
    attention_gate: str = NO_GATE  # of what heads give: none, or sigmoid or softplus of each value or _by_head
    clip_qkv: float | None = None  # queries, keys and values are cut to -clip_qkv and clip_qkv
    input_norms: bool = True  # what attention and experts read is normalised
    output_norms: bool = False  # what attention and experts give is normalised before it is added
    # router and experts
    scoring_func: str = SOFTMAX  # or sigmoid, or sigmoid_of_chosen
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 1.0
    n_group: int = 1
    topk_group: int = 1
    router_bias: bool = False  # of its logits
    e_score_correction_bias: bool = False  # added to scores where they are compared
    swiglu_limit: float | None = None  # experts are clamped, as gpt-oss's
    scale_expert_input: bool = False  # routing weights multiply what experts read, not what they give
    shared_expert_intermediate_size: int | None = None  # of all shared experts together
    shared_expert_gate: bool = False
    conv_kernel_size: int | None = None  # of layers with conv
    # scales
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    logits_scaling: float = 1.0  # logits are divided by it

    @property
    def expert_activation(self) -> Activation:
        if self.swiglu_limit is None:
            return Activation(SILU, scale_input=self.scale_expert_input)
        return Activation(SWIGLU_CLAMPED, SWIGLU_ALPHA, self.swiglu_limit, self.scale_expert_input)

    def dense_activation(self, layer: int) -> Activation | None:
        """That of a dense layer or a shared expert, where it is not that of the model's experts."""
        return None

    @cached_property
    def rope(self) -> Rope:
        return replace(super().rope, interleaved=self.rope_interleave)

    @cached_property
    def _sliding_rope(self) -> Rope:
        return replace(
            self.rope,
            theta=self.swa_rope_theta or self.rope_theta,
            dim=self.swa_rotary_dim or self.rotary_dim,
            scaling=self.rope.scaling if self.swa_rope_scaled else None,
        )

    def rope_of(self, layer: int) -> Rope:
        """How positions turn queries and keys of a layer that knows them."""
        return self._sliding_rope if self._slides(layer) else self.rope

    @property
    def one_call(self) -> bool:
        """Whether a layer is one call of the kernels, where nothing else forbids it."""
        return True

    @property
    def known_scoring_funcs(self) -> tuple[str, ...]:
        return SOFTMAX, SIGMOID, CHOSEN_SIGMOID

    @property
    def value_dim(self) -> int:
        """Width of a head's values."""
        return self.v_head_dim or self.head_dim

    def query_heads(self, layer: int) -> int:
        """Heads of queries of a layer."""
        return (self.swa_num_attention_heads if self._slides(layer) else None) or self.num_attention_heads

    def key_heads(self, layer: int) -> int:
        """Heads of keys and values of a layer."""
        return (self.swa_num_key_value_heads if self._slides(layer) else None) or self.num_key_value_heads

    def has_sinks(self, layer: int) -> bool:
        """Whether the softmax of a layer has a score per head that brings no value."""
        return self.attention_sinks and (self.full_attention_sinks or self._slides(layer))

    def _slides(self, layer: int) -> bool:
        return self.layer_types[layer] == SLIDING_ATTENTION

    def is_conv(self, layer: int) -> bool:
        """Whether a layer has a short convolution in the place of attention."""
        return self.layer_types[layer] == CONV

    def attends(self, layer: int) -> bool:
        """Whether a layer has attention, and no other mixer in its place."""
        return not self.is_conv(layer)

    def has_experts(self, layer: int) -> bool:
        return self.mlp_layer_types[layer] == SPARSE

    def window(self, layer: int) -> int | None:
        """Tokens that a token of this layer sees, itself included; None for all before it."""
        return self.sliding_window if self._slides(layer) else None

    def chunk(self, layer: int) -> int | None:
        """Tokens after which attention of this layer begins anew; None where it never does."""
        return self.attention_chunk_size if self.layer_types[layer] == CHUNKED_ATTENTION else None

    def attention_scale(self, layer: int, position: int) -> float:
        """What multiplies the scores of a query at this position."""
        temperature = self._temperature(layer)
        return self.attention_multiplier * (temperature.at(position) if temperature else 1.0)

    def run_length(self, layer: int, position: int, tokens: int) -> int:
        """How many of the tokens from this position on share a chunk and an attention_scale."""
        chunk, temperature = self.chunk(layer), self._temperature(layer)
        if chunk is not None:
            tokens = min(tokens, chunk - position % chunk)
        if temperature is not None:
            tokens = min(tokens, temperature.next_change(position) - position)
        return tokens

    def is_uniform(self, layer: int) -> bool:
        """Whether a layer has neither chunks nor scales that depend on the position."""
        return self.chunk(layer) is None and self._temperature(layer) is None

    def _temperature(self, layer: int) -> Temperature | None:
        return None if self.turns(layer) else self.attention_temperature

    def turns(self, layer: int) -> bool:
        """Whether queries and keys of this layer know their positions."""
        return self.full_attention_rope or self.layer_types[layer] != FULL_ATTENTION

    def cache_values(self, ctx_size: int, chunk_size: int) -> int:
        return sum(
            self._held_tokens(layer, ctx_size, chunk_size) * self._cached_values(layer)
            for layer in range(self.num_hidden_layers)
            if self.attends(layer)
        )

    def _cached_values(self, layer: int) -> int:
        """Keys and values of a token in one layer."""
        return self.key_heads(layer) * (self.head_dim + in_lanes(self.value_dim))

    def _held_tokens(self, layer: int, ctx_size: int, chunk_size: int) -> int:
        if (window := self.window(layer)) is not None:
            return held_tokens(window, ctx_size, chunk_size)
        if (chunk := self.chunk(layer)) is not None:
            return chunked_tokens(chunk, ctx_size, chunk_size)
        return in_lanes(ctx_size)

    @property
    def known_layer_types(self) -> tuple[str, ...]:
        chunked = () if self.attention_chunk_size is None else (CHUNKED_ATTENTION,)
        conv = () if self.conv_kernel_size is None else (CONV,)
        return (FULL_ATTENTION, SLIDING_ATTENTION, *chunked, *conv)

    @property
    def norm_offset(self) -> float:
        """What is added to the weights of norms."""
        return 0.0

    @property
    def state_values(self) -> int:
        return self.layer_types.count(CONV) * ((self.conv_kernel_size or 1) - 1) * self.hidden_size

    @property
    def feed_forward_width(self) -> int:
        others = self.intermediate_size or 0, self.shared_expert_intermediate_size or 0
        return max(self.moe_intermediate_size, *others)

    def mixer_values(self, tokens: int) -> int:
        """Projections, normalised or cut, turned, and what attention gives, twice."""
        heads = max(self.query_heads(layer) + self.key_heads(layer) for layer in range(self.num_hidden_layers))
        attention = 5 * heads * max(self.head_dim, self.value_dim)
        return tokens * (max(attention, 9 * self.hidden_size) if CONV in self.layer_types else attention)

    def scores_per_token(self, ctx_size: int) -> int:
        return ctx_size * max(
            self.query_heads(layer) // self.key_heads(layer) for layer in range(self.num_hidden_layers)
        )

    def check(self, where: Where) -> None:
        super().check(where)
        self.require_known(where, "layer_types", self.known_layer_types)
        self.require(where, self.conv_kernel_size != 1, "conv_kernel_size", "2 or more")
        self.check_mlp_layer_types(where, (DENSE, SPARSE))
        if DENSE in self.mlp_layer_types:
            self.require(where, self.intermediate_size is not None, "intermediate_size", "a width, for dense layers")
        if SLIDING_ATTENTION in self.layer_types:
            self.require(where, self.sliding_window is not None, "sliding_window", "a number, for sliding_attention")
        if self.swa_num_key_value_heads is not None:
            self.require_divides(where, "swa_num_key_value_heads", "num_attention_heads")
        alike = not self.fused_qkv or self.v_head_dim is None
        self.require(where, alike, "v_head_dim", "null, where queries, keys and values are one projection")
        if self.swa_num_attention_heads is not None:
            key_heads = self.swa_num_key_value_heads or self.num_key_value_heads
            fit = self.swa_num_attention_heads % key_heads == 0
            self.require(where, fit, "swa_num_attention_heads", f"a multiple of {key_heads} heads of keys")
        if self.swa_rotary_dim is not None:
            fits = self.swa_rotary_dim % 2 == 0 and 0 < self.swa_rotary_dim <= self.head_dim
            self.require(where, fits, "swa_rotary_dim", f"an even number, at most head_dim {self.head_dim}")
            misfit = misfit_of(self.rope_scaling, self.swa_rotary_dim) if self.swa_rope_scaled else None
            self.require(
                where, misfit is None, "swa_rotary_dim", f"rotary_dim {self.rotary_dim}, as factors are shared"
            )
        self.require_known(where, "qk_norm", (NO_NORM, HEAD_NORM, WHOLE_NORM, TURNED_NORM, UNIT_NORM))
        self.require_known(where, "attention_gate", (NO_GATE, SIGMOID, SOFTPLUS, SOFTPLUS_BY_HEAD, SIGMOID_BY_HEAD))
        self.require_known(where, "scoring_func", self.known_scoring_funcs)
        for key in ("clip_qkv", "swiglu_limit"):
            value = getattr(self, key)
            self.require(where, value is None or value > 0, key, "a number above 0")
        if self.swa_rope_theta is not None:
            self.check_scaling(where, "swa_rope_theta")
        self.require(where, self.logits_scaling != 0, "logits_scaling", "a number other than 0")
        self.check_groups(where, self.n_group, self.topk_group)


def read_decoder(config: Fields, **facts: Any) -> DecoderConfig:
    """As `decoder_facts`, of the activation that most have."""
    only(config, "hidden_act", "silu")
    return DecoderConfig(**decoder_facts(config, **facts))


def decoder_facts(config: Fields, **facts: Any) -> dict[str, Any]:
    """What all families of decoders name alike; `facts` are the family's own, and win.

    Raises FormatError or UnsupportedError naming the key.
    """
    num_layers = config.integer("num_hidden_layers", 1, 10_000)
    hidden_size = config.integer("hidden_size", 1, 2**24)
    heads = config.integer("num_attention_heads", 1, 2**16)
    if heads > hidden_size:
        raise config.wrong("num_attention_heads", f"at most hidden_size {hidden_size}")
    head_dim = config.integer("head_dim", 1, 2**16, default=hidden_size // heads)
    common: dict[str, Any] = {
        "vocab_size": config.integer("vocab_size", 1, 2**31),
        "hidden_size": hidden_size,
        "num_hidden_layers": num_layers,
        "max_position_embeddings": config.integer("max_position_embeddings", 1, 2**31),
        "tie_word_embeddings": config.boolean("tie_word_embeddings", default=False),
        "layer_types": (FULL_ATTENTION,) * num_layers,
        "num_attention_heads": heads,
        "num_key_value_heads": config.integer("num_key_value_heads", 1, 2**16, default=heads),
        "head_dim": head_dim,
        "rotary_dim": head_dim,
        # Our own key: GGUF files of some order queries and keys so; transformers reads rope_interleave of no decoder.
        "rope_interleave": config.boolean("interleaved_rotary_pairs", default=False),
        "attention_multiplier": 1 / math.sqrt(head_dim),
        "mlp_layer_types": (SPARSE,) * num_layers,
    }
    if "rms_norm_eps" not in facts:
        common["rms_norm_eps"] = config.number("rms_norm_eps")
    if "rope_theta" not in facts:
        common["rope_theta"], common["rope_scaling"] = read_rope(config)
    if "top_k" not in facts:
        common["top_k"] = config.integer("num_experts_per_tok", 1, 2**20)
    return common | facts


def read_mlp_layer_types(config: Fields) -> tuple[str, ...]:
    """Qwen's way to say which layers are dense: mlp_only_layers, and all but every decoder_sparse_step-th."""
    dense = config.integers("mlp_only_layers", default=[])
    step = config.integer("decoder_sparse_step", 1, 10_000, default=1)
    num_layers = config.integer("num_hidden_layers", 1, 10_000)
    return tuple(DENSE if i in dense or (i + 1) % step else SPARSE for i in range(num_layers))
