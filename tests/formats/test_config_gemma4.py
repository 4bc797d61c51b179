"""config.json of Gemma 4: published values become facts, and what is not implemented is refused."""

import json
from typing import Any

import pytest

from formats.config import Gemma4Config, model_facts, read_config, read_model_facts
from formats.errors import StreamingExpertsError
from formats.fields import Fields
from formats.window import held_tokens
from repack.known_models import KNOWN_MODELS

PUBLISHED: dict[str, Any] = dict(KNOWN_MODELS["google/gemma-4-26B-A4B"])


FULL_LAYERS = ("05", "11", "17", "23", "29")
SAVED = {"head_dim": 512, "num_key_value_heads": 2}


def read(**text: Any) -> Gemma4Config:
    """The published config with other values in text_config."""
    config = read_config(json.dumps(PUBLISHED | {"text_config": PUBLISHED["text_config"] | text}).encode())
    assert isinstance(config, Gemma4Config)
    return config


def test_the_published_config_becomes_facts() -> None:
    model = read()
    assert (model.model_type, model.num_experts, model.top_k, model.intermediate_size) == ("gemma4", 128, 8, 2112)
    assert [model.key_heads(layer) for layer in range(6)] == [(8, 256)] * 5 + [(2, 512)]
    assert [model.window(layer) for layer in range(6)] == [1024] * 5 + [None]
    assert (model.rotary_dim, model.rope.inv_freq.shape) == (256, (128,))
    assert (model.global_rotary_dim, model.global_rope.inv_freq.shape) == (128, (256,))
    assert (model.rope_theta, model.global_rope_theta, model.final_logit_softcapping) == (1e4, 1e6, 30.0)
    assert read_model_facts(Fields(json.loads(json.dumps(model_facts(model))), "x")) == model


def test_the_language_model_alone_has_a_flat_config() -> None:
    flat = PUBLISHED["text_config"] | {"model_type": "gemma4_text"}
    assert read_config(json.dumps(flat).encode()) == read()


def test_whether_the_head_is_tied_stands_beside_the_text_as_transformers_looks_for_it() -> None:
    text = PUBLISHED["text_config"]
    untied = PUBLISHED | {"tie_word_embeddings": False, "text_config": text | {"tie_word_embeddings": True}}
    assert not read_config(json.dumps(untied).encode()).tie_word_embeddings
    unsaid = PUBLISHED | {"tie_word_embeddings": None, "text_config": text | {"tie_word_embeddings": False}}
    assert read_config(json.dumps(unsaid).encode()).tie_word_embeddings
    flat = text | {"model_type": "gemma4_text", "tie_word_embeddings": False}
    assert not read_config(json.dumps(flat).encode()).tie_word_embeddings


def saved_again(changes: dict[str, Any]) -> Gemma4Config:
    """As transformers 5.24's Gemma4TextConfig.to_dict has it: layers of full attention state what differs there."""
    return read(global_head_dim=None, num_global_key_value_heads=None, per_layer_config=changes)


def test_a_config_that_transformers_saved_again_is_the_published_one() -> None:
    assert saved_again(dict.fromkeys(FULL_LAYERS, SAVED)) == read()
    assert saved_again({str(int(layer)): SAVED for layer in FULL_LAYERS}) == read()
    sliding = {"head_dim": 256, "num_key_value_heads": 8}
    assert saved_again({f"{layer:02}": SAVED if layer % 6 == 5 else sliding for layer in range(30)}) == read()


def test_what_no_layer_changes_is_that_of_all_layers() -> None:
    assert saved_again({layer: {"head_dim": 512} for layer in FULL_LAYERS}) == read(num_global_key_value_heads=8)
    assert saved_again({}) == read(global_head_dim=256, num_global_key_value_heads=8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict.fromkeys(FULL_LAYERS[1:], SAVED), " is .*, expected one head_dim and num_key_value_heads for the"),
        (dict.fromkeys((*FULL_LAYERS, "04"), SAVED), " is .*, expected one head_dim and num_key_value_heads"),
        (dict.fromkeys((*FULL_LAYERS, "30"), SAVED), " is .*, expected one head_dim and num_key_value_heads"),
        (dict.fromkeys((*FULL_LAYERS, "all"), SAVED), " is .*, expected one head_dim and num_key_value_heads"),
        (dict.fromkeys(FULL_LAYERS, SAVED | {"skip": ["mlp"]}), ".5.skip is unknown to this version"),
        (dict.fromkeys(FULL_LAYERS, SAVED | {"head_dim": "512"}), ".5.head_dim is 512, expected an integer from 1"),
        (dict.fromkeys(FULL_LAYERS, SAVED | {"head_dim": 513}), r".\*.head_dim is 513, expected an even number"),
        (dict.fromkeys(FULL_LAYERS, 512), ".5: is 512, expected an object"),
        ([512], r" is \[512\], expected an object"),
    ],
)
def test_layers_that_change_anything_else_are_refused(changes: Any, message: str) -> None:
    with pytest.raises(StreamingExpertsError, match=f"config.json: text_config.per_layer_config{message}"):
        saved_again(changes)


def test_caches_count_the_heads_of_each_layer_and_only_what_a_window_keeps() -> None:
    model = read()
    held = held_tokens(1024, 32768, 512)
    assert held == 2 * 22 * 128  # an old cache and a new one, in whole blocks
    assert model.cache_values(32768, 512) == 2 * (25 * 8 * 256 * held + 5 * 2 * 512 * 32768)
    assert model.scores_per_token(1000) == 8 * 1000


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("enable_moe_block", False, "text_config.enable_moe_block is False, only True is implemented"),
        ("attention_k_eq_v", False, "attention_k_eq_v is False, only True is implemented"),
        ("attention_bias", True, "attention_bias is True, only False is implemented"),
        ("hidden_activation", "silu", "hidden_activation is silu, only 'gelu_pytorch_tanh' is implemented"),
        ("hidden_size_per_layer_input", 256, "hidden_size_per_layer_input is 256, only 0 is implemented"),
        ("num_kv_shared_layers", 20, "num_kv_shared_layers is 20, only 0 is implemented"),
        ("use_bidirectional_attention", "all", "use_bidirectional_attention is all, only nothing is implemented"),
        ("global_head_dim", None, "global_head_dim is missing"),
        ("global_head_dim", 513, "global_head_dim is 513, expected an even number"),
        ("num_global_key_value_heads", 3, "num_global_key_value_heads is 3, expected a divisor of"),
        ("layer_types", ["chunked_attention"] * 30, "layer_types is .*, expected only full_attention and"),
        ("layer_types", ["sliding_attention"] * 30, "layer_types is .*, expected full_attention as the last one"),
        ("sliding_window", None, "sliding_window is missing"),
        ("top_k_experts", 129, "top_k_experts is 129, expected 1 to num_experts 128"),
        ("final_logit_softcapping", 0, "final_logit_softcapping is 0.0, expected a number above 0"),
    ],
)
def test_what_is_not_implemented_is_refused(key: str, value: Any, message: str) -> None:
    with pytest.raises(StreamingExpertsError, match=f"config.json: .*{message}"):
        read(**{key: value})


@pytest.mark.parametrize(
    ("layer_type", "key", "value", "message"),
    [
        ("full_attention", "rope_type", "default", "full_attention.rope_type is default, only proportional"),
        ("full_attention", "factor", 8.0, "full_attention.factor is 8.0, only 1 is implemented"),
        ("full_attention", "partial_rotary_factor", 1.5, "partial_rotary_factor is 1.5, expected a share of head_dim"),
        ("full_attention", "rope_theta", -1.0, "full_attention.rope_theta is -1.0, expected a number of at least 1"),
        ("sliding_attention", "rope_type", "yarn", "sliding_attention.rope_type is yarn, only default"),
        ("sliding_attention", "partial_rotary_factor", 0.5, "partial_rotary_factor is 0.5, only 1 is implemented"),
        ("sliding_attention", "rope_theta", None, "sliding_attention.rope_theta is missing"),
        ("sliding_attention", "rope_theta", 0.5, "rope_parameters.sliding_attention.rope_theta is 0.5, expected a"),
    ],
)
def test_another_rotation_is_refused(layer_type: str, key: str, value: Any, message: str) -> None:
    parameters = PUBLISHED["text_config"]["rope_parameters"]
    changed = parameters | {layer_type: parameters[layer_type] | {key: value}}
    with pytest.raises(StreamingExpertsError, match=f"config.json: .*{message}"):
        read(rope_parameters=changed)
