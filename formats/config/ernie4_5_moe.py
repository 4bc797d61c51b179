"""ERNIE-4.5-21B-A3B and 300B-A47B (source: transformers' configuration_ernie4_5_moe.py)."""

from formats.config.base import DENSE, SPARSE, only
from formats.config.decoder import DecoderConfig, read_decoder
from formats.fields import Fields


def read_ernie4_5_moe(config: Fields) -> DecoderConfig:
    """Softmax with a correction bias, ungated shared experts. Raises FormatError or UnsupportedError naming the key."""
    only(config, "use_bias", False)
    only(config, "moe_norm_min", 1e-12)  # below any sum of the chosen scores
    num_layers = config.integer("num_hidden_layers", 1, 10_000)
    first, last = config.integer("moe_layer_start_index", 0, num_layers, 1), _last_layer(config, num_layers)
    every = config.integer("moe_layer_interval", 1, 10_000, default=1)
    inner = config.integer("moe_intermediate_size", 1, 2**24)
    shared = config.integer("moe_num_shared_experts", 0, 2**10, default=0)
    return read_decoder(
        config,
        model_type="ernie4_5_moe",
        tie_word_embeddings=config.boolean("tie_word_embeddings", default=True),
        num_experts=config.integer("moe_num_experts", 1, 2**20),
        top_k=config.integer("moe_k", 1, 2**20),
        moe_intermediate_size=inner,
        mlp_layer_types=tuple(
            SPARSE if first <= i <= last and (i + 1) % every == 0 else DENSE for i in range(num_layers)
        ),
        intermediate_size=config.integer("intermediate_size", 1, 2**24),
        rope_interleave=True,
        e_score_correction_bias=True,
        shared_expert_intermediate_size=inner * shared or None,
    )


def _last_layer(config: Fields, num_layers: int) -> int:
    last = config.integer("moe_layer_end_index", -1, num_layers, default=-1)
    return num_layers - 1 if last == -1 else last
