"""GLM-4.5, 4.6, 4.7 and 4.5-Air, GLM-4.5V and 4.6V (source: transformers' files configuration_glm4*_moe.py)."""

from typing import Any

from formats.config.base import DENSE, SPARSE, language_model, only
from formats.config.decoder import HEAD_NORM, NO_NORM, SIGMOID, DecoderConfig, read_decoder
from formats.config.rope import read_rotary_dim
from formats.fields import Fields


def read_glm4_moe(config: Fields) -> DecoderConfig:
    """Half of a head is turned. Raises FormatError or UnsupportedError naming the key."""
    head_dim = config.integer("head_dim", 1, 2**16)
    return read_grouped_sigmoid(
        config,
        model_type="glm4_moe",
        rotary_dim=read_rotary_dim(config, head_dim, head_dim // 2),
        attention_bias=config.boolean("attention_bias", default=False),
        qk_norm=HEAD_NORM if config.boolean("use_qk_norm", default=False) else NO_NORM,
    )


def read_glm4v_moe(outer: Fields) -> DecoderConfig:
    """GLM-4.5 within text_config; the positions of its three axes are one in text.

    Raises FormatError or UnsupportedError naming the key.
    """
    text = language_model(outer)
    only(text, "use_qk_norm", False)
    head_dim = text.integer("head_dim", 1, 2**16)
    tied = outer.boolean("tie_word_embeddings", default=False)  # either of the two is enough for transformers
    return read_grouped_sigmoid(
        text,
        model_type="glm4v_moe",
        rotary_dim=read_rotary_dim(text, head_dim, head_dim // 2),
        attention_bias=text.boolean("attention_bias", default=True),
        tie_word_embeddings=tied or text.boolean("tie_word_embeddings", default=False),
    )


def read_grouped_sigmoid(
    config: Fields, num_experts: str = "n_routed_experts", num_shared: str = "n_shared_experts", **facts: Any
) -> DecoderConfig:
    """DeepSeek's router and shared expert behind attention; `facts` are the family's own, and win.

    num_experts and num_shared: what the family calls these numbers.

    Raises FormatError or UnsupportedError naming the key.
    """
    num_layers = config.integer("num_hidden_layers", 1, 10_000)
    num_dense = config.integer("first_k_dense_replace", 0, num_layers, default=1)
    inner = config.integer("moe_intermediate_size", 1, 2**24)
    shared: dict[str, Any] = {
        "num_experts": config.integer(num_experts, 1, 2**20),
        "moe_intermediate_size": inner,
        "mlp_layer_types": (DENSE,) * num_dense + (SPARSE,) * (num_layers - num_dense),
        "scoring_func": SIGMOID,
        "norm_topk_prob": config.boolean("norm_topk_prob", default=True),
        "routed_scaling_factor": config.number("routed_scaling_factor", 1.0),
        "n_group": config.integer("n_group", 1, 2**20, default=1),
        "topk_group": config.integer("topk_group", 1, 2**20, default=1),
        "e_score_correction_bias": True,
        "shared_expert_intermediate_size": inner * config.integer(num_shared, 1, 2**10, default=1),
    }
    if DENSE in (shared | facts)["mlp_layer_types"]:
        shared["intermediate_size"] = config.integer("intermediate_size", 1, 2**24)
    return read_decoder(config, **(shared | facts))
