"""The plain decoder that most families are, by facts: attention over keys and values, then experts."""

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from formats.config.base import (
    DENSE,
    FULL_ATTENTION,
    SLIDING_ATTENTION,
    SPARSE,
    SWIGLU_CLAMPED,
    Activation,
    ModelConfig,
    only,
)
from formats.config.rope import Rope, read_rope
from formats.fields import Fields
from formats.window import held_tokens

SOFTMAX, SIGMOID = "softmax", "sigmoid"
NO_NORM, HEAD_NORM, WHOLE_NORM = "none", "head", "whole"
SWIGLU_ALPHA = 1.702  # gpt-oss


@dataclass(frozen=True)
class DecoderConfig(ModelConfig):
    """Each fact is one family's way or another's; a family's reader (below this folder) sets those that it has."""

    attention_multiplier: float  # of scores
    mlp_layer_types: tuple[str, ...]  # [num_hidden_layers]
    intermediate_size: int | None = None  # of dense layers
    rope_interleave: bool = False  # pairs (2i, 2i + 1) turn together, as some GGUF files order queries and keys
    # attention
    sliding_window: int | None = None  # of layers with sliding_attention: tokens that a token sees, itself included
    attention_sinks: bool = False
    attention_bias: bool = False  # of queries, keys and values
    attention_output_bias: bool = False
    qk_norm: str = NO_NORM  # of queries and keys: none, each head, or the whole projection
    clip_qkv: float | None = None  # queries, keys and values are cut to -clip_qkv and clip_qkv
    # router and experts
    scoring_func: str = SOFTMAX  # or sigmoid
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 1.0
    n_group: int = 1
    topk_group: int = 1
    router_bias: bool = False  # of its logits
    e_score_correction_bias: bool = False  # added to scores where they are compared
    swiglu_limit: float | None = None  # experts are clamped, as gpt-oss's
    shared_expert_intermediate_size: int | None = None  # of all shared experts together
    shared_expert_gate: bool = False
    # scales
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    logits_scaling: float = 1.0  # logits are divided by it

    @property
    def expert_activation(self) -> Activation:
        if self.swiglu_limit is None:
            return Activation()
        return Activation(SWIGLU_CLAMPED, SWIGLU_ALPHA, self.swiglu_limit)

    @cached_property
    def rope(self) -> Rope:
        return replace(super().rope, interleaved=self.rope_interleave)

    def has_experts(self, layer: int) -> bool:
        return self.mlp_layer_types[layer] == SPARSE

    def window(self, layer: int) -> int | None:
        """Tokens that a token of this layer sees, itself included; None for all before it."""
        return self.sliding_window if self.layer_types[layer] == SLIDING_ATTENTION else None

    @property
    def cache_values_per_token(self) -> int:
        return self.num_hidden_layers * 2 * self.num_key_value_heads * self.head_dim

    def cache_values(self, ctx_size: int, chunk_size: int) -> int:
        windows = [self.window(layer) for layer in range(self.num_hidden_layers)]
        tokens = sum(ctx_size if w is None else held_tokens(w, ctx_size, chunk_size) for w in windows)
        return tokens * 2 * self.num_key_value_heads * self.head_dim

    @property
    def state_values(self) -> int:
        return 0

    @property
    def mixer_values_per_token(self) -> int:
        width = max(self.intermediate_size or 0, self.shared_expert_intermediate_size or 0)
        return max(6 * self.num_attention_heads * self.head_dim, 3 * width)

    def check(self, where: str) -> None:
        super().check(where)
        layers, entries = self.num_hidden_layers, f"{self.num_hidden_layers} entries"
        self.require_known(where, "layer_types", (FULL_ATTENTION, SLIDING_ATTENTION))
        self.require(where, len(self.mlp_layer_types) == layers, "mlp_layer_types", entries)
        self.require_known(where, "mlp_layer_types", (DENSE, SPARSE))
        if DENSE in self.mlp_layer_types:
            self.require(where, self.intermediate_size is not None, "intermediate_size", "a width, for dense layers")
        if SLIDING_ATTENTION in self.layer_types:
            self.require(where, self.sliding_window is not None, "sliding_window", "a number, for sliding_attention")
        self.require_known(where, "qk_norm", (NO_NORM, HEAD_NORM, WHOLE_NORM))
        self.require_known(where, "scoring_func", (SOFTMAX, SIGMOID))
        for key in ("clip_qkv", "swiglu_limit"):
            value = getattr(self, key)
            self.require(where, value is None or value > 0, key, "a number above 0")
        self.require(where, self.logits_scaling != 0, "logits_scaling", "a number other than 0")
        self.check_groups(where, self.n_group, self.topk_group)


def read_decoder(config: Fields, **facts: Any) -> DecoderConfig:
    """What all families of decoders name alike; `facts` are the family's own, and win.

    Raises FormatError or UnsupportedError naming the key.
    """
    only(config, "hidden_act", "silu")
    num_layers = config.integer("num_hidden_layers", 1, 10_000)
    hidden_size = config.integer("hidden_size", 1, 2**24)
    heads = config.integer("num_attention_heads", 1, 2**16)
    if heads > hidden_size:
        raise config.wrong("num_attention_heads", f"at most hidden_size {hidden_size}")
    head_dim = config.integer("head_dim", 1, 2**16, default=hidden_size // heads)
    rope_theta, rope_scaling = read_rope(config)
    common: dict[str, Any] = {
        "vocab_size": config.integer("vocab_size", 1, 2**31),
        "hidden_size": hidden_size,
        "num_hidden_layers": num_layers,
        "max_position_embeddings": config.integer("max_position_embeddings", 1, 2**31),
        "rms_norm_eps": config.number("rms_norm_eps"),
        "tie_word_embeddings": config.boolean("tie_word_embeddings", default=False),
        "layer_types": (FULL_ATTENTION,) * num_layers,
        "num_attention_heads": heads,
        "num_key_value_heads": config.integer("num_key_value_heads", 1, 2**16, default=heads),
        "head_dim": head_dim,
        "rotary_dim": head_dim,
        "rope_theta": rope_theta,
        "rope_scaling": rope_scaling,
        "rope_interleave": config.boolean("rope_interleave", default=False),
        "attention_multiplier": 1 / math.sqrt(head_dim),
        "mlp_layer_types": (SPARSE,) * num_layers,
    }
    if "top_k" not in facts:
        common["top_k"] = config.integer("num_experts_per_tok", 1, 2**20)
    return DecoderConfig(**(common | facts))


def read_mlp_layer_types(config: Fields) -> tuple[str, ...]:
    """Qwen's way to say which layers are dense: mlp_only_layers, and all but every decoder_sparse_step-th."""
    dense = config.integers("mlp_only_layers", default=[])
    step = config.integer("decoder_sparse_step", 1, 10_000, default=1)
    num_layers = config.integer("num_hidden_layers", 1, 10_000)
    return tuple(DENSE if i in dense or (i + 1) % step else SPARSE for i in range(num_layers))
