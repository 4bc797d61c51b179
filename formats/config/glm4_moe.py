"""GLM-4.5, 4.6, 4.7 and 4.5-Air (source: transformers' configuration_glm4_moe.py)."""

from formats.config.base import DENSE, SPARSE
from formats.config.decoder import HEAD_NORM, NO_NORM, SIGMOID, DecoderConfig, read_decoder
from formats.config.rope import read_rotary_dim
from formats.fields import Fields


def read_glm4_moe(config: Fields) -> DecoderConfig:
    """DeepSeek's router and shared expert behind attention. Raises FormatError or UnsupportedError naming the key."""
    num_layers = config.integer("num_hidden_layers", 1, 10_000)
    num_dense = config.integer("first_k_dense_replace", 0, num_layers, default=1)
    inner, head_dim = config.integer("moe_intermediate_size", 1, 2**24), config.integer("head_dim", 1, 2**16)
    return read_decoder(
        config,
        model_type="glm4_moe",
        num_experts=config.integer("n_routed_experts", 1, 2**20),
        moe_intermediate_size=inner,
        rotary_dim=read_rotary_dim(config, head_dim, head_dim // 2),
        mlp_layer_types=(DENSE,) * num_dense + (SPARSE,) * (num_layers - num_dense),
        intermediate_size=config.integer("intermediate_size", 1, 2**24),
        attention_bias=config.boolean("attention_bias", default=False),
        qk_norm=HEAD_NORM if config.boolean("use_qk_norm", default=False) else NO_NORM,
        scoring_func=SIGMOID,
        norm_topk_prob=config.boolean("norm_topk_prob", default=True),
        routed_scaling_factor=config.number("routed_scaling_factor", 1.0),
        n_group=config.integer("n_group", 1, 2**20, default=1),
        topk_group=config.integer("topk_group", 1, 2**20, default=1),
        e_score_correction_bias=True,
        shared_expert_intermediate_size=inner * config.integer("n_shared_experts", 1, 2**10, default=1),
    )
