"""Mistral Small 4, text part: DeepSeek-V3 whose queries grow with their position and whose scores are a softmax."""

from dataclasses import replace

from formats.config.base import language_model, only
from formats.config.decoder import Temperature
from formats.config.deepseek_v3 import MISTRAL4, DeepseekV3Config
from formats.config.rope import read_rotary_dim, source_of
from formats.config.scaling import Yarn
from formats.errors import UnsupportedError
from formats.fields import Fields


def read_mistral4(outer: Fields) -> DeepseekV3Config:
    """From config.json, nested in the text_config of mistral3 or flat (source: transformers' Mistral4Config).

    Raises FormatError or UnsupportedError naming the key.
    """
    text = language_model(outer)
    only(text, "model_type", MISTRAL4)
    only(text, "n_group", 1)  # groups are ranked by their two best scores, and DeepSeek-V2's by the best
    config = DeepseekV3Config.read(outer)
    yarn = config.rope_scaling
    if not isinstance(yarn, Yarn):  # whose angles transformers makes of the whole head
        source = source_of(text, "rope_type")
        raise UnsupportedError(f"{source.name('rope_type')} is default, only yarn is implemented for {MISTRAL4}")
    source = source_of(text, "partial_rotary_factor")
    if read_rotary_dim(text, config.head_dim, config.qk_rope_head_dim) != config.qk_rope_head_dim:
        raise source.wrong("partial_rotary_factor", f"{config.qk_rope_head_dim} of {config.head_dim}")
    scale = source_of(text, "llama_4_scaling_beta").number("llama_4_scaling_beta")
    return replace(
        config,
        attention_temperature=Temperature(yarn.original_max_position_embeddings, scale),
        tie_word_embeddings=outer.boolean("tie_word_embeddings", default="text_config" in outer),
    )
