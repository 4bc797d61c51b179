"""Gemma 4 with experts, text part: Gemma-4-26B-A4B (source: transformers' configuration_gemma4.py)."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from formats.config.base import (
    FULL_ATTENTION,
    GELU_TANH,
    SLIDING_ATTENTION,
    Activation,
    ModelConfig,
    Where,
    language_model,
    only,
)
from formats.config.rope import read_theta
from formats.config.scaling import Rope
from formats.errors import UnsupportedError
from formats.fields import Fields, shown
from formats.window import held_tokens, in_lanes


@dataclass(frozen=True)
class Gemma4Config(ModelConfig):
    """Experts beside a dense MLP; two kinds of attention: head_dim and the like are those of sliding layers.

    Layers of full attention have wider and fewer key heads, and their values are the keys.
    """

    intermediate_size: int  # of the dense MLP of every layer
    sliding_window: int  # tokens that a token of a sliding layer sees, itself included
    global_head_dim: int
    num_global_key_value_heads: int
    global_rotary_dim: int  # values of a head that turn: pairs (i, i + global_head_dim / 2), the first of them
    global_rope_theta: float
    final_logit_softcapping: float | None

    @property
    def expert_activation(self) -> Activation:
        return Activation(GELU_TANH)

    @cached_property
    def global_rope(self) -> Rope:
        """How positions turn queries and keys of full attention."""
        return Rope(self.global_rope_theta, self.global_head_dim, turned=self.global_rotary_dim // 2)

    def key_heads(self, layer: int) -> tuple[int, int]:
        """(key heads, width of a head) of a layer."""
        if self.window(layer) is None:
            return self.num_global_key_value_heads, self.global_head_dim
        return self.num_key_value_heads, self.head_dim

    def window(self, layer: int) -> int | None:
        """Tokens that a token of this layer sees, itself included; None for all before it."""
        return self.sliding_window if self.layer_types[layer] == SLIDING_ATTENTION else None

    def cache_values(self, ctx_size: int, chunk_size: int) -> int:
        total = 0
        for layer in range(self.num_hidden_layers):
            (heads, width), window = self.key_heads(layer), self.window(layer)
            tokens = in_lanes(ctx_size) if window is None else held_tokens(window, ctx_size, chunk_size)
            total += tokens * heads * (width + in_lanes(width))
        return total

    @property
    def state_values(self) -> int:
        return 0

    @property
    def feed_forward_width(self) -> int:
        return max(self.moe_intermediate_size, self.intermediate_size)

    def mixer_values(self, tokens: int) -> int:
        """As of a plain decoder, in the layers that are wider."""
        kinds = (self.num_key_value_heads, self.head_dim), (self.num_global_key_value_heads, self.global_head_dim)
        return tokens * max(5 * (self.num_attention_heads + heads) * width for heads, width in kinds)

    def scores_per_token(self, ctx_size: int) -> int:
        return ctx_size * self.num_attention_heads // min(self.num_key_value_heads, self.num_global_key_value_heads)

    def check(self, where: Where) -> None:
        super().check(where)
        self.require_known(where, "layer_types", (FULL_ATTENTION, SLIDING_ATTENTION))
        last = self.layer_types[-1] == FULL_ATTENTION  # transformers would make it so
        self.require(where, last, "layer_types", f"{FULL_ATTENTION} as the last one")
        self.require_divides(where, "num_global_key_value_heads", "num_attention_heads")
        fits = self.global_rotary_dim % 2 == 0 and self.global_rotary_dim <= self.global_head_dim
        self.require(where, fits, "global_rotary_dim", f"even, up to global_head_dim {self.global_head_dim}")
        self.require(where, self.global_head_dim % 2 == 0, "global_head_dim", "an even number")
        self.check_scaling(where, "global_rope_theta")
        cap = self.final_logit_softcapping
        self.require(where, cap is None or cap > 0, "final_logit_softcapping", "a number above 0")

    @classmethod
    def read(cls, outer: Fields) -> "Gemma4Config":
        """From config.json, nested in text_config or flat. Raises FormatError or UnsupportedError naming the key."""
        text = language_model(outer)
        only(text, "enable_moe_block", True)
        only(text, "attention_k_eq_v", True)
        only(text, "attention_bias", False)
        only(text, "hidden_activation", "gelu_pytorch_tanh")
        only(text, "hidden_size_per_layer_input", 0)
        only(text, "num_kv_shared_layers", 0)
        if text.raw("use_bidirectional_attention", None) != "vision":  # which says nothing of text
            only(text, "use_bidirectional_attention", None)
        head_dim = text.integer("head_dim", 1, 2**16)
        layer_types = tuple(text.strings("layer_types"))
        global_heads, global_head_dim = _full_attention_heads(text, layer_types)
        sliding, full = (_rope_parameters(text, kind) for kind in (SLIDING_ATTENTION, FULL_ATTENTION))
        return cls(
            model_type="gemma4",
            vocab_size=text.integer("vocab_size", 1, 2**31),
            hidden_size=text.integer("hidden_size", 1, 2**24),
            num_hidden_layers=text.integer("num_hidden_layers", 1, 10_000),
            max_position_embeddings=text.integer("max_position_embeddings", 1, 2**31),
            rms_norm_eps=text.number("rms_norm_eps"),
            tie_word_embeddings=outer.boolean("tie_word_embeddings", default=True),
            layer_types=layer_types,
            num_attention_heads=text.integer("num_attention_heads", 1, 2**16),
            num_key_value_heads=text.integer("num_key_value_heads", 1, 2**16),
            head_dim=head_dim,
            rotary_dim=head_dim,
            rope_theta=read_theta(sliding),
            rope_scaling=None,
            num_experts=text.integer("num_experts", 1, 2**20),
            top_k=text.integer("top_k_experts", 1, 2**20),
            moe_intermediate_size=text.integer("moe_intermediate_size", 1, 2**24),
            intermediate_size=text.integer("intermediate_size", 1, 2**24),
            sliding_window=text.integer("sliding_window", 1, 2**31),
            global_head_dim=global_head_dim,
            num_global_key_value_heads=global_heads,
            global_rotary_dim=_turned_pairs(full, global_head_dim) * 2,
            global_rope_theta=read_theta(full),
            final_logit_softcapping=text.nullable("final_logit_softcapping", text.number),
        )


def _full_attention_heads(text: Fields, layer_types: Sequence[str]) -> tuple[int, int]:
    """(key heads, width of a head) of full attention, as published, or by layer as transformers 5.24 saves them."""
    if "per_layer_config" not in text:
        return text.integer("num_global_key_value_heads", 1, 2**16), text.integer("global_head_dim", 1, 2**16)
    heads, width = text.integer("num_key_value_heads", 1, 2**16), text.integer("head_dim", 1, 2**16)
    where, by_layer = text.name("per_layer_config"), text.mapping("per_layer_config")
    by_layer = {name.lstrip("0") or "0": changes for name, changes in by_layer.items()}  # padded to sort by number
    full: set[tuple[int, int]] = set()
    others = {(heads, width)}
    for layer, kind in enumerate(layer_types):
        changes = Fields(by_layer.pop(str(layer), {}), f"{where}.{layer}")
        changed = changes.integer("num_key_value_heads", 1, 2**16, heads), changes.integer("head_dim", 1, 2**16, width)
        changes.close()
        (full if kind == FULL_ATTENTION else others).add(changed)
    if by_layer or len(full) != 1 or len(others) != 1:
        raise text.wrong("per_layer_config", f"one head_dim and num_key_value_heads for the layers of {FULL_ATTENTION}")
    return full.pop()


KINDS = {SLIDING_ATTENTION: "default", FULL_ATTENTION: "proportional"}


def _rope_parameters(text: Fields, layer_type: str) -> Fields:
    """The rotary embedding of a layer type. Raises UnsupportedError for another kind than the published models have."""
    parameters = text.object("rope_parameters").object(layer_type)
    kind = parameters.string("rope_type")
    if kind != KINDS[layer_type]:
        name = parameters.name("rope_type")
        raise UnsupportedError(f"{name} is {shown(kind)}, only {KINDS[layer_type]} is implemented")
    for key in ("factor", "partial_rotary_factor")[: 1 if layer_type == FULL_ATTENTION else 2]:
        if parameters.number(key, 1.0) != 1.0:
            raise UnsupportedError(f"{parameters.name(key)} is {shown(parameters.raw(key))}, only 1 is implemented")
    return parameters


def _turned_pairs(parameters: Fields, head_dim: int) -> int:
    """Pairs of a head that turn (transformers' _compute_proportional_rope_parameters)."""
    share = parameters.number("partial_rotary_factor", 1.0)
    pairs = int(share * head_dim // 2) if 0 < share <= 1 else 0
    if pairs < 1:
        raise parameters.wrong("partial_rotary_factor", f"a share of head_dim {head_dim}, at least one pair")
    return pairs
