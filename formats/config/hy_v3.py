"""Hunyuan 3 (source: transformers' configuration_hy_v3.py)."""

from formats.config.base import DENSE, SPARSE, only
from formats.config.decoder import HEAD_NORM, DecoderConfig
from formats.config.glm4_moe import read_grouped_sigmoid
from formats.fields import Fields


def read_hy_v3(config: Fields) -> DecoderConfig:
    """Queries and keys normalised, a dense layer first. Raises FormatError or UnsupportedError naming the key."""
    num_layers = config.integer("num_hidden_layers", 1, 10_000)
    mlp_layer_types = config.strings("mlp_layer_types", [DENSE] + [SPARSE] * (num_layers - 1))
    if "mlp_layer_types" not in config:
        only(config, "first_k_dense_replace", 1)
    only(config, "mlp_bias", False)
    only(config, "route_norm", True)
    only(config, "expert_hidden_dim", config.integer("moe_intermediate_size", 1, 2**24))
    bias = config.boolean("attention_bias", default=False)
    return read_grouped_sigmoid(
        config,
        "num_experts",
        "num_shared_experts",
        model_type="hy_v3",
        head_dim=config.integer("head_dim", 1, 2**16),  # transformers would take 128
        attention_bias=bias,
        attention_output_bias=bias,
        qk_norm=HEAD_NORM,
        mlp_layer_types=tuple(mlp_layer_types),
        norm_topk_prob=True,
        routed_scaling_factor=config.number("router_scaling_factor", 2.826),
        n_group=1,
        topk_group=1,
    )
