"""config.json of Granite 4.0 H and of Granite Swash: values, and what is refused."""

import json
from typing import Any

import pytest

from formats.config import (
    FULL_ATTENTION,
    LINEAR_ATTENTION,
    SLIDING_ATTENTION,
    DecoderConfig,
    GraniteMoeHybridConfig,
    Mamba2,
    model_facts,
    read_config,
    read_model_facts,
)
from formats.errors import StreamingExpertsError
from formats.fields import Fields
from tests.formats.published import GRANITE_3B_A800M, GRANITE_4_H_TINY


def read(**changes: Any) -> GraniteMoeHybridConfig:
    model = read_config(json.dumps(GRANITE_4_H_TINY | changes).encode())
    assert isinstance(model, GraniteMoeHybridConfig)
    return model


def test_granite_4_is_read() -> None:
    model = read()
    assert model.mamba == Mamba2(48, 64, 128, 1, 4, True)
    assert [model.layer_types.count(kind) for kind in (LINEAR_ATTENTION, FULL_ATTENTION)] == [36, 4]
    assert not model.full_attention_rope
    assert read_model_facts(Fields(model_facts(model), "index.json: model")) == model


def test_positions_and_widths_may_be_said_otherwise() -> None:
    assert read(position_embedding_type=None) == read(mamba_d_head="auto") == read()
    assert read(position_embedding_type="rope").full_attention_rope


def test_a_shared_expert_of_granitemoeshared_is_there_or_not() -> None:
    for width, shared in ((0, None), (256, 256)):
        config = GRANITE_3B_A800M | {"model_type": "granitemoeshared", "shared_intermediate_size": width}
        assert model_facts(read_config(json.dumps(config).encode()))["shared_expert_intermediate_size"] == shared


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("num_local_experts", 0, "only models with experts are implemented"),
        ("mamba_proj_bias", True, "only False is implemented"),
        ("mlp_bias", True, "only False is implemented"),
        ("is_causal", False, "only True is implemented"),
        ("hidden_act", "gelu", "only 'silu' is implemented"),
        ("time_step_limit", [0.001, 0.1], "only 0 to infinity is implemented"),
        ("layer_types", ["conv"] * 40, "only full_attention and linear_attention"),
        ("shared_intermediate_size", 0, "expected an integer from 1"),
        ("mamba_n_groups", 5, "a divisor of mamba_n_heads 48"),
    ],
)
def test_what_granite_4_does_not_implement_is_refused(key: str, value: Any, message: str) -> None:
    with pytest.raises(StreamingExpertsError, match=rf"config.json: {key} is .*{message}"):
        read(**{key: value})


@pytest.mark.parametrize(("key", "value"), [("is_causal", False), ("hidden_act", "gelu")])
def test_what_granitemoeshared_does_not_implement_is_refused(key: str, value: Any) -> None:
    config = GRANITE_3B_A800M | {"model_type": "granitemoeshared", key: value}
    with pytest.raises(StreamingExpertsError, match=f"config.json: {key} is {value}, only .* is implemented"):
        read_config(json.dumps(config).encode())


# Numbers of layers, heads and experts of the 3B-A600M by descriptions of it, which do not tell what it turns by.
SWASH: dict[str, Any] = GRANITE_3B_A800M | {
    "model_type": "granitemoe_swa",
    "layer_rope_theta": [0, *[10000.0] * 3] * 7,
    "layer_types": [FULL_ATTENTION, *[SLIDING_ATTENTION] * 3] * 7,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 28,
    "num_local_experts": 48,
    "shared_intermediate_size": 0,
    "sliding_window": 128,
}


def swash(**changes: Any) -> DecoderConfig:
    model = read_config(json.dumps(SWASH | changes).encode())
    assert isinstance(model, DecoderConfig)
    return model


def test_swash_is_granite_with_windows_and_sinks() -> None:
    model = swash()
    assert (model.model_type, model.shared_expert_intermediate_size) == ("granitemoe", None)
    assert [model.window(layer) for layer in range(5)] == [None, 128, 128, 128, None]
    assert all(model.has_sinks(layer) for layer in range(28))
    assert swash(layer_types=None) == model
    assert swash(shared_intermediate_size=256).shared_expert_intermediate_size == 256
    assert read_model_facts(Fields(model_facts(model), "index.json: model")) == model


@pytest.mark.parametrize(
    ("thetas", "full", "sliding"),
    [
        ([0, *[10000.0] * 3] * 7, None, 10000.0),
        ([50000.0, *[10000.0] * 3] * 7, 50000.0, 10000.0),
        ([500.0] * 28, 500.0, 500.0),
        (None, 10000000, 10000000),  # rope_theta
    ],
)
def test_layers_of_swash_turn_by_a_theta_of_their_own(thetas: Any, full: float | None, sliding: float) -> None:
    model = swash(layer_rope_theta=thetas)
    assert (model.rope_of(0).theta if model.turns(0) else None, model.rope_of(1).theta) == (full, sliding)
    assert model.turns(1)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("layer_rope_theta", [10000.0], "expected 28 entries"),
        ("layer_rope_theta", [10000.0, *[0] * 3] * 7, "only one number of at least 1 for each of layer_types, or 0"),
        ("layer_rope_theta", [0, 1.0, 2.0, 3.0] * 7, "only one number of at least 1 for each of layer_types, or 0"),
        ("layer_rope_theta", [0.5, *[100.0] * 3] * 7, "only one number of at least 1 for each of layer_types, or 0"),
        ("no_rope_layers", [0, 1, 1, 1] * 7, "only nothing is implemented"),
        ("sliding_window", 0, "expected an integer from 1"),
        ("hidden_act", "gelu", "only 'silu' is implemented"),
        ("layer_types", ["conv"] * 28, "expected only full_attention and sliding_attention"),
    ],
)
def test_what_swash_does_not_implement_is_refused(key: str, value: Any, message: str) -> None:
    with pytest.raises(StreamingExpertsError, match=rf"config.json: {key} is .*{message}"):
        swash(**{key: value})


def test_swash_without_its_window_is_refused() -> None:
    with pytest.raises(StreamingExpertsError, match=r"^config.json: sliding_window is missing"):
        swash(sliding_window=None)
