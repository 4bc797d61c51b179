"""LFM2-8B-A1B and 24B-A2B (source: transformers' configuration_lfm2_moe.py)."""

from formats.config.base import DENSE, SPARSE, key_of, only
from formats.config.decoder import HEAD_NORM, SIGMOID, DecoderConfig, read_decoder
from formats.fields import Fields


def read_lfm2_moe(config: Fields) -> DecoderConfig:
    """Short convolutions in most layers. Raises FormatError or UnsupportedError naming the key.

    The 1e-6 that transformers adds to a sum of scores is left out: it moves weights by less than float32's rounding of
    what they weigh.
    """
    only(config, "conv_bias", False)
    num_layers = config.integer("num_hidden_layers", 1, 10_000)
    num_dense = config.integer("num_dense_layers", 0, num_layers)
    config.integer("num_key_value_heads", 1, 2**16)
    return read_decoder(
        config,
        model_type="lfm2_moe",
        rms_norm_eps=config.number("norm_eps"),
        tie_word_embeddings=config.boolean(key_of(config, "tie_embedding", "tie_word_embeddings"), default=True),
        layer_types=tuple(config.strings("layer_types")),
        conv_kernel_size=config.integer("conv_L_cache", 2, 2**10),
        qk_norm=HEAD_NORM,
        mlp_layer_types=(DENSE,) * num_dense + (SPARSE,) * (num_layers - num_dense),
        intermediate_size=config.integer("intermediate_size", 1, 2**24),
        num_experts=config.integer("num_experts", 1, 2**20),
        moe_intermediate_size=config.integer("moe_intermediate_size", 1, 2**24),
        scoring_func=SIGMOID,
        norm_topk_prob=config.boolean("norm_topk_prob", default=True),
        routed_scaling_factor=config.number("routed_scaling_factor", 1.0),
        e_score_correction_bias=config.boolean("use_expert_bias", default=True),
    )
