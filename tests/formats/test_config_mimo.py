"""config.json of MiMo-V2-Flash: layers with a window have key heads, sinks and a theta of their own."""

from typing import Any

import pytest

from formats.config import DecoderConfig
from formats.errors import FormatError, StreamingExpertsError
from formats.window import held_tokens
from tests.formats.published import DECODERS, read


def test_layers_of_mimo_with_a_window_have_key_heads_sinks_and_a_theta_of_their_own() -> None:
    model = read(DECODERS["mimo_v2_flash"])
    assert isinstance(model, DecoderConfig)
    assert [model.window(layer) for layer in (0, 1, 5)] == [None, 129, None]
    assert [model.key_heads(layer) for layer in (0, 1, 5)] == [4, 8, 4]
    assert [model.has_sinks(layer) for layer in (0, 1, 5)] == [False, True, False]
    assert [model.rope_of(layer).theta for layer in (0, 1, 5)] == [5e6, 1e4, 5e6]
    assert model.scores_per_token(1000) == 16 * 1000
    # Nine layers hold every token; what the others hold of a long context is that of a cache that forgets.
    held = held_tokens(129, 2**18, 512)
    assert model.cache_values(2**18, 512) == (9 * 2**18 * 4 + 39 * held * 8) * (192 + 128)


SAVED_MIMO_ROPE = {  # of transformers 5.24's MiMoV2FlashConfig.to_dict
    "full_attention": {"partial_rotary_factor": 0.334, "rope_theta": 5000000.0, "rope_type": "default"},
    "sliding_attention": {"partial_rotary_factor": 0.334, "rope_theta": 10000.0, "rope_type": "default"},
}


def test_mimo_that_transformers_saved_again_states_its_angles_by_layer_type() -> None:
    """Where they stand, too, the published keys count for nothing."""
    published = DECODERS["mimo_v2_flash"]
    assert read(published | {"rope_parameters": SAVED_MIMO_ROPE}) == read(published)
    other = dict.fromkeys(("rope_theta", "swa_rope_theta", "partial_rotary_factor"), 0.5)
    assert read(published | other | {"rope_parameters": SAVED_MIMO_ROPE}) == read(published)


@pytest.mark.parametrize(
    ("layer_type", "key", "value", "message"),
    [
        ("full_attention", "rope_type", "yarn", "rope_type is yarn, only 'default' is implemented"),
        ("sliding_attention", "rope_type", "linear", "rope_type is linear, only 'default' is implemented"),
        ("full_attention", "partial_rotary_factor", 2, "partial_rotary_factor is 2, expected a share of head_dim"),
        ("sliding_attention", "partial_rotary_factor", 0.5, "partial_rotary_factor is 0.5, expected 0.334 as that of"),
        ("sliding_attention", "rope_theta", None, "rope_theta is missing"),
        ("sliding_attention", "rope_theta", 0.5, "rope_theta is 0.5, expected a number of at least 1"),
        ("full_attention", "rope_theta", 0.5, "rope_theta is 0.5, expected a number of at least 1"),
    ],
)
def test_angles_of_mimo_that_differ_by_more_than_theta_are_refused(
    layer_type: str, key: str, value: Any, message: str
) -> None:
    changed = SAVED_MIMO_ROPE | {layer_type: SAVED_MIMO_ROPE[layer_type] | {key: value}}
    with pytest.raises(StreamingExpertsError, match=f"config.json: rope_parameters.{layer_type}.{message}"):
        read(DECODERS["mimo_v2_flash"] | {"rope_parameters": changed})


def test_mimo_without_its_value_scale_is_refused() -> None:
    """transformers would take 0.707, and none for a null."""
    config = {key: value for key, value in DECODERS["mimo_v2_flash"].items() if key != "attention_value_scale"}
    with pytest.raises(FormatError, match=r"config.json: attention_value_scale is missing"):
        read(config)
    model = read(config | {"attention_value_scale": None})
    assert isinstance(model, DecoderConfig)
    assert model.attention_value_scale == 1
