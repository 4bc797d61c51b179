"""config.json of Nemotron 3 Nano and Super: their values, and what is refused."""

import json
from typing import Any

import pytest

from formats.config import (
    FULL_ATTENTION,
    LINEAR_ATTENTION,
    Mamba2,
    NemotronHConfig,
    model_facts,
    read_config,
    read_model_facts,
)
from formats.errors import FormatError, StreamingExpertsError
from formats.fields import Fields
from repack.known_models import KNOWN_MODELS

# As the NVFP4 repositories have them at 6efb4a2a and 4f0cf9da.
NANO: dict[str, Any] = dict(KNOWN_MODELS["nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16"])
SUPER: dict[str, Any] = dict(KNOWN_MODELS["nvidia/NVIDIA-Nemotron-3-Super-120B-A12B-BF16"])


def read(config: dict[str, Any] = NANO, **changes: Any) -> NemotronHConfig:
    model = read_config(json.dumps(config | changes).encode())
    assert isinstance(model, NemotronHConfig)
    return model


def test_nano_is_read() -> None:
    model = read()
    assert model.mamba == Mamba2(64, 64, 128, 8, 4, True)
    assert model.mamba.projected == 2 * 4096 + 2 * 8 * 128 + 64
    kinds = [model.layer_types.count(kind) for kind in (LINEAR_ATTENTION, FULL_ATTENTION, "moe", "mlp")]
    assert kinds == [23, 6, 23, 0]
    assert (model.num_experts, model.top_k, model.moe_intermediate_size) == (128, 6, 1856)
    assert model.expert_hidden_size == model.hidden_size
    assert model.expert_parts == ("up", "down")
    assert [model.has_experts(layer) for layer in range(3)] == [False, True, False]


def test_experts_of_super_are_behind_a_narrower_projection() -> None:
    model = read(SUPER)
    assert (model.expert_hidden_size, model.num_hidden_layers, model.top_k) == (1024, 88, 22)


def test_layers_may_be_listed_under_older_and_newer_names() -> None:
    older = {"M": "mamba", "*": "attention", "E": "moe", "-": "mlp"}
    listed = [older[letter] for letter in NANO["hybrid_override_pattern"]]
    assert read(hybrid_override_pattern=None, layers_block_type=listed) == read()
    newer = list(read().layer_types)
    assert read(hybrid_override_pattern=None, layers_block_type=newer, num_hidden_layers=None) == read()


def test_facts_are_those_of_the_index() -> None:
    for config in (NANO, SUPER):
        model = read(config)
        assert read_model_facts(Fields(model_facts(model), "index.json: model")) == model


@pytest.mark.parametrize("infinite", [float("inf"), {"__float__": "Infinity"}, 1e30])
def test_no_limit_of_steps_of_time_is_none(infinite: Any) -> None:
    assert read(time_step_limit=[0.0, infinite]) == read()  # as Python writes it, as transformers 5 does, as JSON can


def test_an_infinity_is_refused_where_a_number_counts() -> None:
    with pytest.raises(FormatError, match=r"config.json: rope_theta is .*Infinity.*, expected a finite number"):
        read(rope_theta=float("inf"))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("mlp_hidden_act", "silu", "only 'relu2' is implemented"),
        ("mamba_hidden_act", "gelu", "only 'silu' is implemented"),
        ("attention_bias", True, "only False is implemented"),
        ("mlp_bias", True, "only False is implemented"),
        ("use_bias", True, "only False is implemented"),
        ("mamba_proj_bias", True, "only False is implemented"),
        ("n_shared_experts", 2, "only 1 is implemented"),
        ("sliding_window", 4096, "only nothing is implemented"),
        ("time_step_limit", [0.001, 0.1], "only 0 to infinity is implemented"),
        ("time_step_limit", [0.0, 100.0], "only 0 to infinity is implemented"),
        ("time_step_limit", [], "only 0 to infinity is implemented"),
    ],
)
def test_what_nemotron_h_does_not_implement_is_refused(key: str, value: Any, message: str) -> None:
    with pytest.raises(StreamingExpertsError, match=rf"config.json: {key} is .*{message}"):
        read(**{key: value})


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("n_groups", 7, "n_groups is 7, expected a divisor of mamba_num_heads 64"),
        ("ssm_state_size", 127, "ssm_state_size is 127, expected an even number"),
        ("hybrid_override_pattern", "MEX", "hybrid_override_pattern is MEX, expected only the letters"),
        ("hybrid_override_pattern", "M*M", "expected at least one layer with experts"),
        ("n_group", 3, "n_group is 3, expected a divisor of n_routed_experts 128"),
        ("layer_norm_epsilon", 0.0, "layer_norm_epsilon is 0.0, expected a number above 0"),
    ],
)
def test_wrong_values_are_named(key: str, value: Any, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        read(**{key: value})
