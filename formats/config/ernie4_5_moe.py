"""ERNIE-4.5-21B-A3B and 300B-A47B, and ERNIE-4.5-VL-28B-A3B and 424B-A47B.

Sources: transformers' configuration_ernie4_5_moe.py and configuration_ernie4_5_vl_moe.py.
"""

from typing import Any

from formats.config.base import DENSE, SPARSE, language_model, only
from formats.config.decoder import DecoderConfig, read_decoder
from formats.config.rope import read_rope, rope_parameters
from formats.errors import UnsupportedError
from formats.fields import Fields

MROPE_SECTION = [22, 22, 20]  # pairs of a head that turn by height, width and time


def read_ernie4_5_moe(config: Fields) -> DecoderConfig:
    """Softmax with a correction bias, ungated shared experts. Raises FormatError or UnsupportedError naming the key."""
    num_layers = config.integer("num_hidden_layers", 1, 10_000)
    first, last = config.integer("moe_layer_start_index", 0, num_layers, 1), _last_layer(config, num_layers)
    every = config.integer("moe_layer_interval", 1, 10_000, default=1)
    return _read_ernie(
        config,
        model_type="ernie4_5_moe",
        tie_word_embeddings=config.boolean("tie_word_embeddings", default=True),
        moe_intermediate_size=config.integer("moe_intermediate_size", 1, 2**24),
        shared_experts=config.integer("moe_num_shared_experts", 0, 2**10, default=0),
        mlp_layer_types=tuple(
            SPARSE if first <= i <= last and (i + 1) % every == 0 else DENSE for i in range(num_layers)
        ),
    )


def read_ernie4_5_vl_moe(outer: Fields) -> DecoderConfig:
    """ERNIE 4.5 within text_config, with the experts that text goes to; its three positions are one in text.

    Raises FormatError or UnsupportedError naming the key.
    """
    text = language_model(outer)
    num_layers = text.integer("num_hidden_layers", 1, 10_000)
    widths = text.integers("moe_intermediate_size", default=[1536, 512])
    if len(widths) != 2 or not 1 <= widths[0] <= 2**24:
        raise text.wrong("moe_intermediate_size", "the widths of experts for text and for vision")
    tied = outer.boolean("tie_word_embeddings", default=True)
    rope_theta, scaling = read_rope(text, ("default",))
    _check_sections(text)
    return _read_ernie(
        text,
        model_type="ernie4_5_vl_moe",
        rope_theta=rope_theta,
        rope_scaling=scaling,
        tie_word_embeddings=tied,
        moe_intermediate_size=widths[0],
        shared_experts=text.integer("moe_num_shared_experts", 0, 2**10, default=2),
        mlp_layer_types=tuple(text.strings("mlp_layer_types", [DENSE] + [SPARSE] * (num_layers - 1))),
    )


def _check_sections(text: Fields) -> None:
    """Only as many pairs for the height as for the width, and all together, are the plain rotation in text."""
    heads = text.integer("num_attention_heads", 1, 2**16)
    pairs = text.integer("head_dim", 1, 2**16, default=text.integer("hidden_size", 1, 2**24) // heads) // 2
    parameters = rope_parameters(text)
    sections = parameters.integers("mrope_section", default=MROPE_SECTION)
    if len(sections) != 3 or sections[0] != sections[1] or min(sections) < 1 or sum(sections) != pairs:
        name = parameters.name("mrope_section")
        raise UnsupportedError(
            f"{name} is {sections}, only two equal numbers and a third, together half of head_dim {2 * pairs}, "
            "are implemented"
        )


def _read_ernie(config: Fields, moe_intermediate_size: int, shared_experts: int, **facts: Any) -> DecoderConfig:
    """What both have alike; `facts` are the one's own."""
    only(config, "use_bias", False)
    only(config, "moe_norm_min", 1e-12)  # below any sum of the chosen scores
    return read_decoder(
        config,
        num_experts=config.integer("moe_num_experts", 1, 2**20),
        top_k=config.integer("moe_k", 1, 2**20),
        moe_intermediate_size=moe_intermediate_size,
        intermediate_size=config.integer("intermediate_size", 1, 2**24),
        rope_interleave=True,
        e_score_correction_bias=True,
        shared_expert_intermediate_size=moe_intermediate_size * shared_experts or None,
        **facts,
    )


def _last_layer(config: Fields, num_layers: int) -> int:
    last = config.integer("moe_layer_end_index", -1, num_layers, default=-1)
    return num_layers - 1 if last == -1 else last
