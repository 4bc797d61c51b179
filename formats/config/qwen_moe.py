"""Qwen1.5-MoE, Qwen2-57B-A14B; Qwen3-30B-A3B, 235B-A22B, Coder, VL, Omni (source: transformers' files of qwen*_moe)."""

from typing import Any

from formats.config.base import DENSE, FULL_ATTENTION, key_of, language_model, only, thinker
from formats.config.decoder import HEAD_NORM, DecoderConfig, read_decoder, read_mlp_layer_types
from formats.errors import UnsupportedError
from formats.fields import Fields


def read_qwen2_moe(config: Fields) -> DecoderConfig:
    """Biases before attention, a gated shared expert. Raises FormatError or UnsupportedError naming the key."""
    return _read(
        config,
        "qwen2_moe",
        attention_bias=config.boolean("qkv_bias", default=True),
        norm_topk_prob=config.boolean("norm_topk_prob", default=False),
        shared_expert_intermediate_size=config.integer("shared_expert_intermediate_size", 1, 2**24),
        shared_expert_gate=True,
    )


def read_qwen3_moe(config: Fields) -> DecoderConfig:
    """Normalised queries and keys, routed experts alone. Raises FormatError or UnsupportedError naming the key."""
    return _read_qwen3(config, "qwen3_moe", norm_topk_prob=config.boolean("norm_topk_prob", default=False))


def read_qwen3_vl_moe(outer: Fields) -> DecoderConfig:
    """Qwen3 within text_config; the positions of its three axes are one in text.

    Raises FormatError or UnsupportedError naming the key.
    """
    text = language_model(outer)
    only(text, "norm_topk_prob", True)  # what transformers does whatever it says
    model = _read_qwen3(text, "qwen3_vl_moe", norm_topk_prob=True, tie_word_embeddings=_is_tied(outer, text))
    if model.hidden_size in (model.moe_intermediate_size, 2 * model.moe_intermediate_size):
        raise UnsupportedError(
            f"{text.name('moe_intermediate_size')} is {model.moe_intermediate_size}, with which the shapes of experts "
            f"do not tell their rows from hidden_size {model.hidden_size} columns"
        )
    return model


def read_qwen3_omni_moe(outer: Fields) -> DecoderConfig:
    """As Qwen3-VL, within thinker_config. Raises FormatError or UnsupportedError naming the key."""
    text = language_model(outer)
    return _read_qwen3(
        text,
        "qwen3_omni_moe",
        norm_topk_prob=text.boolean("norm_topk_prob", default=True),
        tie_word_embeddings=_is_tied(thinker(outer), text),
    )


def _is_tied(whole: Fields, text: Fields) -> bool:
    """transformers reads this key from the whole model's config; files hold it in either place."""
    return whole.boolean("tie_word_embeddings", default=text.boolean("tie_word_embeddings", default=False))


def _read_qwen3(config: Fields, model_type: str, **facts: Any) -> DecoderConfig:
    bias = config.boolean("attention_bias", default=False)
    return _read(config, model_type, attention_bias=bias, attention_output_bias=bias, qk_norm=HEAD_NORM, **facts)


def _read(config: Fields, model_type: str, **facts: Any) -> DecoderConfig:
    only(config, "use_sliding_window", False)
    only(config, "layer_types", [FULL_ATTENTION] * config.integer("num_hidden_layers", 1, 10_000))
    mlp_layer_types = read_mlp_layer_types(config)
    num_experts = key_of(config, "num_local_experts", "num_experts")  # the first as transformers 5 saves it
    if DENSE in mlp_layer_types:
        facts["intermediate_size"] = config.integer("intermediate_size", 1, 2**24)
    return read_decoder(
        config,
        model_type=model_type,
        num_experts=config.integer(num_experts, 1, 2**20),
        moe_intermediate_size=config.integer("moe_intermediate_size", 1, 2**24),
        mlp_layer_types=mlp_layer_types,
        **facts,
    )
