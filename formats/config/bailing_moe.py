"""Ling 2 and Ring 2, and Sarvam-30B (sources: mlx-lm's bailing_moe.py, llama.cpp's bailingmoe.py, transformers)."""

from formats.config.base import key_of, only
from formats.config.decoder import HEAD_NORM, NO_NORM, DecoderConfig
from formats.config.glm4_moe import read_grouped_sigmoid
from formats.config.rope import read_rotary_dim, source_of
from formats.fields import Fields


def read_bailing_moe(config: Fields) -> DecoderConfig:
    """GLM-4.5's router behind one matrix of queries, keys and values; the first generation, by softmax, is refused.

    Raises FormatError or UnsupportedError naming the key.
    """
    config.string("score_function")
    config.boolean("moe_router_enable_expert_bias")
    width, heads = config.integer("hidden_size", 1, 2**24), config.integer("num_attention_heads", 1, 2**16)
    head_dim = config.integer("head_dim", 1, 2**16, default=width // heads)
    if config.states("rotary_dim"):
        rotary_dim = config.integer("rotary_dim", 2, head_dim)
    else:
        source_of(config, "partial_rotary_factor").number("partial_rotary_factor")
        rotary_dim = read_rotary_dim(config, head_dim, head_dim)
    return _read(config, rotary_dim, config.boolean("use_qk_norm"), config.number("routed_scaling_factor"))


def read_sarvam_moe(config: Fields) -> DecoderConfig:
    """As Ling 2, and in what is not said as transformers. Raises FormatError or UnsupportedError naming the key."""
    head_dim = config.integer("head_dim", 1, 2**16)
    rotary_dim = read_rotary_dim(config, head_dim, head_dim)
    qk_norm = config.boolean("use_qk_norm", default=True)
    return _read(config, rotary_dim, qk_norm, config.number("routed_scaling_factor", 2.5))


def _read(config: Fields, rotary_dim: int, qk_norm: bool, routed_scaling_factor: float) -> DecoderConfig:
    for key, value in {
        "attention_bias": False,
        "moe_router_enable_expert_bias": True,
        "moe_router_enable_routed_scaling": True,
        "moe_router_enable_shared_expert": True,
        "moe_shared_expert_intermediate_size": config.integer("moe_intermediate_size", 1, 2**24),
        "norm_head": False,
        "norm_softmax": False,
        "score_function": "sigmoid",
        "use_bias": False,
        "use_qkv_bias": False,
    }.items():
        only(config, key, value)
    return read_grouped_sigmoid(
        config,
        key_of(config, "num_experts", "n_routed_experts"),
        key_of(config, "num_shared_experts", "n_shared_experts"),
        model_type="bailing_moe",
        rotary_dim=rotary_dim,
        fused_qkv=True,
        qk_norm=HEAD_NORM if qk_norm else NO_NORM,
        routed_scaling_factor=routed_scaling_factor,
    )
