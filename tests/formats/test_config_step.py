"""Step-3.5-Flash's config.json: as published, within Step 3.7, as transformers saves it, and what is refused."""

from typing import Any

import pytest

from formats.config import CLAMPED_SILU, Activation, Llama3, Step3p5Config, model_facts, read_model_facts
from formats.errors import StreamingExpertsError
from formats.fields import Fields
from tests.formats.published import STEP_3_5, read

FULL, SLIDING = "full_attention", "sliding_attention"
BY_LAYER = ("attention_other_setting", "moe_layers_enum", "partial_rotary_factors", "rope_scaling", "rope_theta")
LAYERS = STEP_3_5["layer_types"][:45]
# One number, or an object, for each kind of layers in the place of lists by layer.
SAVED: dict[str, Any] = {
    **{key: value for key, value in STEP_3_5.items() if key not in BY_LAYER},
    "layer_types": LAYERS,
    "mlp_layer_types": [*["dense"] * 3, *["sparse"] * 42],
    "num_sliding_attention_heads": 96,
    "per_layer_config": {f"{i:02}": {"num_attention_heads": 96} for i, kind in enumerate(LAYERS) if kind == SLIDING},
    "query_pre_attn_scalar": 128,
    "rope_parameters": {
        FULL: {**STEP_3_5["rope_scaling"], "partial_rotary_factor": 0.5, "rope_theta": 5000000.0},
        SLIDING: {"partial_rotary_factor": 1.0, "rope_theta": 10000.0, "rope_type": "default"},
    },
}


def read_step(config: dict[str, Any]) -> Step3p5Config:
    model = read(config)
    assert isinstance(model, Step3p5Config)
    return model


def test_the_published_config_becomes_facts() -> None:
    model = read_step(STEP_3_5)
    assert model.layer_types == tuple(LAYERS)
    assert [model.has_experts(layer) for layer in (0, 2, 3, 44)] == [False, False, True, True]
    assert [model.query_heads(layer) for layer in (0, 1)] == [64, 96]
    assert [model.rope_of(layer).dim for layer in (0, 1)] == [64, 128]
    assert [model.rope_of(layer).theta for layer in (0, 1)] == [5000000.0, 10000.0]
    assert [model.rope_of(layer).scaling for layer in (0, 1)] == [Llama3(2.0, 131072, 1.0, 32.0), None]
    assert (model.num_experts, model.top_k, model.routed_scaling_factor) == (288, 8, 3.0)
    assert (model.attention_gate, model.qk_norm, model.norm_offset) == ("sigmoid_by_head", "head", 1.0)


def test_layers_cut_routed_and_shared_experts_at_limits_of_their_own() -> None:
    model = read_step(STEP_3_5)
    assert [model.routed_activation(layer) for layer in (42, 43)] == [Activation(), Activation(CLAMPED_SILU, limit=7.0)]
    shared = [model.dense_activation(layer) for layer in (42, 43)]
    assert shared == [Activation(), Activation(CLAMPED_SILU, limit=16.0)]


def test_nulls_zeros_and_no_list_are_no_limit() -> None:
    found = [read_step({**STEP_3_5, "swiglu_limits": limits}).swiglu_limits for limits in (None, [], [None] * 45)]
    assert found == [(0.0,) * 45] * 3


@pytest.mark.parametrize("config", [SAVED, {"model_type": "step3p7", "text_config": STEP_3_5, "vision_config": {}}])
def test_what_transformers_saves_and_what_step_3_7_nests_is_the_same(config: dict[str, Any]) -> None:
    assert read_step(config) == read_step(STEP_3_5)


def test_numbers_of_layers_may_be_a_list() -> None:
    assert read_step({**STEP_3_5, "moe_layers_enum": list(range(3, 45))}) == read_step(STEP_3_5)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("gating", "per-element", "gating is per-element, only True is implemented"),
        ("mlp_bias", True, "mlp_bias is True, only False is implemented"),
        ("moe_router_activation", "softmax", "moe_router_activation is softmax, only 'sigmoid' is implemented"),
        ("norm_expert_weight", False, "norm_expert_weight is False, only True is implemented"),
        ("use_head_wise_attn_gate", False, "use_head_wise_attn_gate is False, only True is implemented"),
        ("use_moe_router_bias", False, "use_moe_router_bias is False, only True is implemented"),
        ("zero_centered", False, "zero_centered is False, only True is implemented"),
        ("yarn_only_types", [FULL, SLIDING], "yarn_only_types is .*, only .* is implemented"),
        ("moe_router_scaling_factor", None, "moe_router_scaling_factor is missing"),
        ("moe_layers_enum", "3,x", "moe_layers_enum is 3,x, expected numbers of layers"),
        ("moe_layers_enum", None, "moe_layers_enum is missing"),
        ("num_key_value_heads", 4, "num_key_value_heads is 4, only 8 is implemented"),
        ("n_routed_experts", 8, "n_routed_experts is 8, only 288 is implemented"),
        ("num_sliding_attention_heads", 64, "num_sliding_attention_heads is 64, only 96 is implemented"),
        ("per_layer_config", {"0": {"num_attention_heads": 8}}, "per_layer_config is .*, only num_attention_heads 96"),
        ("attention_other_setting", {"num_attention_groups": 4}, "num_attention_groups is 4, only 8 is implemented"),
        ("attention_other_setting", {"head_dim": 64}, "head_dim is 64, only 128 is implemented"),
        ("layer_types", [FULL] * 46, "layer_types is .*, expected 45 entries, or 48"),
        ("swiglu_limits", [7.0], "swiglu_limits is .*, expected 45 entries, or 48"),
        ("swiglu_limits", [-1.0] * 45, "swiglu_limits is .*, expected numbers of at least 0"),
        ("swiglu_limits", ["7"] * 45, "swiglu_limits is .*, expected a list of numbers"),
        ("rope_theta", [1e4, 1e4, 2e4, 3e4] * 12, "rope_theta is .*, only one number for each of layer_types"),
        ("partial_rotary_factors", [0.01] * 48, "partial_rotary_factors is .*, expected a share of head_dim 128"),
        ("rope_scaling", {"rope_type": "linear"}, "rope_scaling.rope_type is linear, only default, yarn, llama3 and"),
        ("query_pre_attn_scalar", 0, "query_pre_attn_scalar is 0, expected a number above 0"),
        ("rope_parameters", SAVED["rope_parameters"], "rope_theta is .*, only nothing is implemented"),
    ],
)
def test_what_is_not_implemented_is_refused(key: str, value: Any, message: str) -> None:
    with pytest.raises(StreamingExpertsError, match=f"config.json: .*{message}"):
        read_step({**STEP_3_5, key: value})


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("swiglu_limit", 7.0, "swiglu_limit is 7.0, expected null where layers have limits of their own"),
        ("scale_expert_input", True, "scale_expert_input is True, expected false"),
    ],
)
def test_an_index_of_another_activation_is_refused(key: str, value: Any, message: str) -> None:
    facts = model_facts(read_step(STEP_3_5)) | {key: value}
    with pytest.raises(StreamingExpertsError, match=message):
        read_model_facts(Fields(facts, "index.json: model"))
