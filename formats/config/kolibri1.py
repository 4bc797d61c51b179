"""Aleph Alpha's Kolibri-1 (sources: transformers' configuration_kolibri1.py, and the model for vLLM by its authors)."""

from formats.config.base import FULL_ATTENTION, SLIDING_ATTENTION, SPARSE, key_of, only
from formats.config.decoder import CHOSEN_SIGMOID, HEAD_NORM, DecoderConfig, read_decoder
from formats.config.rope import source_of
from formats.fields import Fields

NUM_EXPERTS = ("num_experts", "num_local_experts")  # published, and as transformers saves it


def read_kolibri1(config: Fields) -> DecoderConfig:
    """Experts in every layer, between two norms; positions where there are windows, and none in the other layers.

    Raises FormatError or UnsupportedError naming the key.
    """
    for key, value in {
        "attention_bias": False,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "use_sliding_window": True,  # which transformers does not read
    }.items():
        only(config, key, value)
    only(source_of(config, "partial_rotary_factor"), "partial_rotary_factor", 1.0)
    num_layers = config.integer("num_hidden_layers", 1, 10_000)
    num_experts = config.integer(key_of(config, *NUM_EXPERTS), 1, 2**20)
    for key in NUM_EXPERTS:
        only(config, key, num_experts)
    by_place = [SLIDING_ATTENTION if (i + 1) % 5 else FULL_ATTENTION for i in range(num_layers)]
    return read_decoder(
        config,
        model_type="kolibri1",
        head_dim=config.integer("head_dim", 1, 2**16),  # transformers would take 128
        num_key_value_heads=config.integer("num_key_value_heads", 1, 2**16),  # and 4
        layer_types=tuple(config.strings("layer_types", by_place)),
        sliding_window=config.integer("sliding_window", 1, 2**31),  # and 513
        full_attention_rope=False,
        qk_norm=HEAD_NORM,
        output_norms=True,
        mlp_layer_types=(SPARSE,) * num_layers,
        num_experts=num_experts,
        moe_intermediate_size=config.integer("moe_intermediate_size", 1, 2**24),
        shared_expert_intermediate_size=config.integer("shared_expert_intermediate_size", 1, 2**24),
        scoring_func=CHOSEN_SIGMOID,
        e_score_correction_bias=True,
        norm_topk_prob=config.boolean("norm_topk_prob", default=False),
    )
