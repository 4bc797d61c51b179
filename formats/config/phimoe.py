"""Phi-3.5-MoE, Phi-mini-MoE and Phi-tiny-MoE (source: transformers' configuration_phimoe.py)."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace

from formats.config.base import (
    FULL_ATTENTION,
    MEAN_NORMS,
    SLIDING_ATTENTION,
    SPARSEMIXER_CHOICE,
    Where,
    only,
)
from formats.config.decoder import SPARSEMIXER, DecoderConfig, decoder_facts
from formats.config.rope import read_rope, read_scale, rope_parameters
from formats.config.scaling import LongRope
from formats.fields import Fields

# Facts of other decoders that neither its norms, its router nor its head knows.
UNREAD: Mapping[str, float | bool] = {
    "e_score_correction_bias": False,
    "logits_scaling": 1,
    "input_norms": True,
    "n_group": 1,
    "norm_topk_prob": False,
    "output_norms": False,
    "residual_multiplier": 1,
}


@dataclass(frozen=True, kw_only=True)
class PhimoeConfig(DecoderConfig):
    """Norms with a mean and a bias; two experts that are chosen one after the other, each of those that come near."""

    router_jitter_noise: float  # a logit is far from the largest when it is more than twice this share below it
    lm_head_bias: bool

    @property
    def one_call(self) -> bool:
        return False

    @property
    def numpy_parts(self) -> tuple[str, ...]:
        return SPARSEMIXER_CHOICE, MEAN_NORMS

    @property
    def known_scoring_funcs(self) -> tuple[str, ...]:
        return (SPARSEMIXER,)

    def check(self, where: Where) -> None:
        super().check(where)
        self.require(where, self.top_k == 2, "top_k", "2")
        self.require(where, self.num_experts >= 2, "num_experts", "2 or more")
        self.require(where, self.router_jitter_noise >= 0, "router_jitter_noise", "a number of at least 0")
        for key, value in UNREAD.items():
            self.require(where, getattr(self, key) == value, key, json.dumps(value))


def read_phimoe(config: Fields) -> PhimoeConfig:
    """Raises FormatError or UnsupportedError naming the key."""
    only(config, "hidden_act", "silu")
    rope_theta, scaling = read_rope(config, ("default", "longrope"))
    if isinstance(scaling, LongRope):  # whose numbers of cos and sin are this model's own
        own, key = rope_parameters(config), "original_max_position_embeddings"
        only(config, key, own.integer(key, 1, 2**31))  # transformers takes the one, mlx-lm the other
        short_mscale, long_mscale = (read_scale(own, f"{length}_mscale") for length in ("short", "long"))
        scaling = replace(scaling, short_mscale=short_mscale, long_mscale=long_mscale)
    window = config.integer("sliding_window", 1, 2**31) if "sliding_window" in config else None
    layer_type = FULL_ATTENTION if window is None else SLIDING_ATTENTION
    bias = config.boolean("attention_bias", default=False)
    facts = decoder_facts(
        config,
        model_type="phimoe",
        rope_theta=rope_theta,
        rope_scaling=scaling,
        layer_types=(layer_type,) * config.integer("num_hidden_layers", 1, 10_000),
        sliding_window=window,
        attention_bias=bias,
        attention_output_bias=bias,
        num_experts=config.integer("num_local_experts", 1, 2**20),
        moe_intermediate_size=config.integer("intermediate_size", 1, 2**24),
        scoring_func=SPARSEMIXER,
        norm_topk_prob=False,
    )
    return PhimoeConfig(
        **facts,
        router_jitter_noise=config.number("router_jitter_noise", 0.01),
        lm_head_bias=config.boolean("lm_head_bias", default=False),
    )
