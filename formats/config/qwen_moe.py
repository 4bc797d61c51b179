"""Qwen1.5-MoE, Qwen2-57B-A14B; Qwen3-30B-A3B, 235B-A22B, Coder (source: transformers' configuration_qwen*_moe.py)."""

from typing import Any

from formats.config.base import DENSE, only
from formats.config.decoder import HEAD_NORM, DecoderConfig, read_decoder, read_mlp_layer_types
from formats.fields import Fields


def read_qwen2_moe(config: Fields) -> DecoderConfig:
    """Biases before attention, a gated shared expert. Raises FormatError or UnsupportedError naming the key."""
    return _read(
        config,
        "qwen2_moe",
        attention_bias=config.boolean("qkv_bias", default=True),
        shared_expert_intermediate_size=config.integer("shared_expert_intermediate_size", 1, 2**24),
        shared_expert_gate=True,
    )


def read_qwen3_moe(config: Fields) -> DecoderConfig:
    """Normalised queries and keys, routed experts alone. Raises FormatError or UnsupportedError naming the key."""
    bias = config.boolean("attention_bias", default=False)
    return _read(config, "qwen3_moe", attention_bias=bias, attention_output_bias=bias, qk_norm=HEAD_NORM)


def _read(config: Fields, model_type: str, **facts: Any) -> DecoderConfig:
    only(config, "use_sliding_window", False)
    mlp_layer_types = read_mlp_layer_types(config)
    num_experts = "num_local_experts" if "num_local_experts" in config else "num_experts"  # as transformers 5 saves it
    if DENSE in mlp_layer_types:
        facts["intermediate_size"] = config.integer("intermediate_size", 1, 2**24)
    return read_decoder(
        config,
        model_type=model_type,
        num_experts=config.integer(num_experts, 1, 2**20),
        moe_intermediate_size=config.integer("moe_intermediate_size", 1, 2**24),
        norm_topk_prob=config.boolean("norm_topk_prob", default=False),
        mlp_layer_types=mlp_layer_types,
        **facts,
    )
