"""config.json of Granite 4.0 H: its values, and what is refused."""

import json
from typing import Any

import pytest

from formats.config import (
    FULL_ATTENTION,
    LINEAR_ATTENTION,
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
