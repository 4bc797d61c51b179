"""Muse Spark, its text (sources: transformers' configuration_muse_spark.py and modeling_muse_spark.py, mlx-lm's
muse_spark.py).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from formats.config.base import DENSE, FULL_ATTENTION, SLIDING_ATTENTION, SPARSE, Where, only
from formats.config.decoder import SIGMOID, UNIT_NORM, DecoderConfig, decoder_facts
from formats.config.rope import read_rope, source_of
from formats.errors import UnsupportedError
from formats.fields import Fields, shown

EVERY = 4  # counted from the last layer, layers without positions and without a window
# What the model file does, whatever these facts of decoders say.
FIXED: Mapping[str, Any] = {
    "attention_gate": SIGMOID,
    "attention_sinks": False,
    "attention_temperature": None,
    "attention_value_scale": 1,
    "clip_qkv": None,
    "conv_kernel_size": None,
    "e_score_correction_bias": True,
    "embedding_multiplier": 1,
    "full_attention_rope": True,
    "full_attention_sinks": True,
    "fused_qkv": False,
    "input_norms": True,
    "logits_scaling": 1,
    "n_group": 1,
    "norm_topk_prob": True,
    "output_norms": True,
    "qk_norm": UNIT_NORM,
    "residual_multiplier": 1,
    "router_bias": False,
    "scoring_func": SIGMOID,
    "shared_expert_gate": False,
    "shared_expert_intermediate_size": None,
    "swiglu_limit": None,
}


@dataclass(frozen=True, kw_only=True)
class MuseSparkConfig(DecoderConfig):
    """A decoder with norms before and behind everything, a gate where others add, and narrower experts."""

    moe_hidden_size: int  # of what experts read and give
    no_rope_layers: tuple[int, ...]  # [num_hidden_layers], 1 for a layer that knows positions
    post_norm_eps: float  # of what attention, experts and each expert give
    output_multiplier: float  # of the router's logits, and of logits before they are cut
    final_logit_softcapping: float
    residual_gate_temperature: float
    residual_gate_split: bool = False  # a gate stands as the two factors that it comes to, as MLX has it

    @property
    def norm_offset(self) -> float:
        return 1.0

    @property
    def expert_hidden_size(self) -> int:
        return self.moe_hidden_size

    def turns(self, layer: int) -> bool:
        return bool(self.no_rope_layers[layer])

    def check(self, where: Where) -> None:
        super().check(where)
        for key, value in FIXED.items():
            self.require(where, getattr(self, key) == value, key, shown(value))
        self.require(where, not self.scale_expert_input, "scale_expert_input", "false")
        self.require(where, len(self.no_rope_layers) == self.num_hidden_layers, "no_rope_layers", self._entries)
        self.require(where, set(self.no_rope_layers) <= {0, 1}, "no_rope_layers", "only 0 and 1")
        for key in ("final_logit_softcapping", "post_norm_eps", "residual_gate_temperature"):
            self.require(where, getattr(self, key) > 0, key, "a number above 0")


def read_muse_spark(outer: Fields) -> MuseSparkConfig:
    """From text_config, beside what sees and hears. Raises FormatError or UnsupportedError naming the key."""
    text = outer.object("text_config")
    for key, value in {
        "hidden_act": "silu",
        "model_type": "muse_spark_text",
        "n_group": 1,  # and others that mean something in other models, and nothing to transformers here
        "norm_topk_prob": True,
        "num_shared_experts": 0,
        "rope_scaling": None,
        "rope_theta": None,
        "topk_group": 1,
    }.items():
        only(text, key, value)
    only(source_of(text, "partial_rotary_factor"), "partial_rotary_factor", 1.0)
    for source in (outer, text):  # transformers has the head by itself, whatever is said
        only(source, "tie_word_embeddings", False)
    num_layers, heads = text.integer("num_hidden_layers", 1, 10_000), text.integer("num_attention_heads", 1, 2**16)
    head_dim = text.integer("head_dim", 1, 2**16, default=64)
    places = [(num_layers - 1 - i) % EVERY for i in range(num_layers)]
    layer_types = tuple(text.strings("layer_types", [SLIDING_ATTENTION if n else FULL_ATTENTION for n in places]))
    mlp_layer_types = tuple(text.strings("mlp_layer_types", [SPARSE] * num_layers))
    rope_theta, rope_scaling = read_rope(text)
    bias = text.boolean("attention_bias", default=False)
    facts = decoder_facts(
        text,
        model_type="muse_spark",
        tie_word_embeddings=False,
        rope_theta=rope_theta,
        rope_scaling=rope_scaling,
        num_attention_heads=heads,
        head_dim=head_dim,
        rotary_dim=head_dim,
        layer_types=layer_types,
        sliding_window=text.integer("sliding_window", 1, 2**31) if SLIDING_ATTENTION in layer_types else None,
        attention_multiplier=text.number("qk_scale_factor", 5.4730064863875) / math.sqrt(head_dim),
        attention_bias=bias,
        attention_output_bias=bias,
        attention_gate=SIGMOID,
        qk_norm=UNIT_NORM,
        output_norms=True,
        mlp_layer_types=mlp_layer_types,
        intermediate_size=text.integer("intermediate_size", 1, 2**24) if DENSE in mlp_layer_types else None,
        num_experts=text.integer("num_local_experts", 1, 2**20),
        moe_intermediate_size=text.integer("moe_intermediate_size", 1, 2**24),
        scoring_func=SIGMOID,
        routed_scaling_factor=text.number("routed_scaling_factor", 1.0),
        e_score_correction_bias=True,
    )
    return MuseSparkConfig(
        **facts,
        moe_hidden_size=text.integer("moe_hidden_size", 1, 2**24),
        no_rope_layers=_read_no_rope(text, rope_theta, [int(n > 0) for n in places]),
        post_norm_eps=text.number("post_norm_eps", 1e-8),
        output_multiplier=text.number("output_multiplier"),
        final_logit_softcapping=text.number("final_logit_softcapping"),
        residual_gate_temperature=text.number("residual_gate_temperature", 0.3),
    )


def _read_no_rope(text: Fields, rope_theta: float, by_place: list[int]) -> tuple[int, ...]:
    """Which layers know positions: a base of 0 says none, and every other turns by rope_theta, whatever it says."""
    if "layer_rope_theta" not in text:
        return tuple(by_place)
    thetas = text.numbers("layer_rope_theta")
    if not set(thetas) <= {0, rope_theta}:
        raise UnsupportedError(
            f"{text.name('layer_rope_theta')} is {shown(thetas)}, only 0 and rope_theta {rope_theta} are implemented"
        )
    return tuple(int(theta != 0) for theta in thetas)
