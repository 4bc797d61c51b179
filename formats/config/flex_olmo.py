"""FlexOlmo-7x7B-1T (source: transformers' configuration_flex_olmo.py)."""

from formats.config.base import key_of, only
from formats.config.decoder import WHOLE_NORM, DecoderConfig, read_decoder
from formats.fields import Fields


def read_flex_olmo(config: Fields) -> DecoderConfig:
    """OLMo 2 with OLMoE's experts: norms stand behind attention and experts, and none before them.

    Raises FormatError or UnsupportedError naming the key.
    """
    only(config, "clip_qkv", None)  # of OLMoE
    bias = config.boolean("attention_bias", default=False)
    return read_decoder(
        config,
        model_type="flex_olmo",
        num_experts=config.integer(key_of(config, "num_local_experts", "num_experts"), 1, 2**20),
        moe_intermediate_size=config.integer("intermediate_size", 1, 2**24),
        norm_topk_prob=config.boolean("norm_topk_prob", default=False),
        attention_bias=bias,
        attention_output_bias=bias,
        qk_norm=WHOLE_NORM,
        input_norms=False,
        output_norms=True,
    )
