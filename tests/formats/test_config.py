"""config.json: what is used is read, what is not implemented is refused by name."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from formats.config import (
    ModelConfig,
    Qwen3_5MoeConfig,
    Yarn,
    model_facts,
    read_config,
    read_model_facts,
)
from formats.errors import FormatError, StreamingExpertsError, UnsupportedError
from formats.fields import Fields
from tests.containers import HYBRID
from tests.formats.published import DECODERS
from tests.refusals import result_or_line

DEMO = Path(__file__).resolve().parents[2] / "repack" / "demo" / "config.json"


@pytest.fixture
def config() -> dict[str, Any]:
    result: dict[str, Any] = json.loads(DEMO.read_bytes())
    return result


def read(config: dict[str, Any]) -> ModelConfig:
    return read_config(json.dumps(config).encode())


def test_the_demo_is_read(config: dict[str, Any]) -> None:
    model, text = read(config), config["text_config"]
    assert isinstance(model, Qwen3_5MoeConfig)
    assert model.hidden_size == text["hidden_size"]
    assert model.top_k == text["num_experts_per_tok"]
    assert model.rotary_dim == 16
    assert model.layer_types == tuple(text["layer_types"])
    assert model.linear_conv_channels == 2 * 2 * 64 + 4 * 64
    assert model.cache_values(1000, 64) == 1008 * 2 * 2 * 2 * 64
    assert model.state_values == 6 * (4 * 64 * 64 + 512 * 3)


def test_a_flat_config_of_the_text_model_means_the_same(config: dict[str, Any]) -> None:
    assert read(config["text_config"]) == read(config)


def test_layer_types_follow_from_the_interval_when_they_are_not_given(config: dict[str, Any]) -> None:
    expected = read(config)
    del config["text_config"]["layer_types"]
    assert read(config) == expected


def test_tied_embeddings_are_found_in_either_place(config: dict[str, Any]) -> None:
    del config["tie_word_embeddings"]
    config["text_config"]["tie_word_embeddings"] = True
    assert read(config).tie_word_embeddings
    config["tie_word_embeddings"] = False
    assert not read(config).tie_word_embeddings


def test_keys_that_change_nothing_are_left_alone(config: dict[str, Any]) -> None:
    expected = read(config)
    config["transformers_version"] = "5.0"
    config["text_config"]["initializer_range"] = 1
    config["vision_config"] = {"depth": 3}
    assert read(config) == expected


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("hidden_act", "gelu", "text_config.hidden_act is gelu, only 'silu' is implemented"),
        ("attention_bias", True, "text_config.attention_bias is True, only False is implemented"),
        ("attn_output_gate", False, "text_config.attn_output_gate is False, only True is implemented"),
        ("norm_topk_prob", False, "text_config.norm_topk_prob is False, only True is implemented"),
        ("mlp_only_layers", [1], r"text_config.mlp_only_layers is \[1\], only \[\] is implemented"),
        ("decoder_sparse_step", 2, "text_config.decoder_sparse_step is 2, only 1 is implemented"),
        ("mamba_ssm_dtype", "bfloat16", "text_config.mamba_ssm_dtype is bfloat16, only 'float32'"),
        ("rope_scaling", {"type": "llama3"}, "text_config.rope_scaling.type is llama3, only default, yarn, linear,"),
        ("sliding_window", 4096, "text_config.sliding_window is 4096, only nothing is implemented"),
        ("final_logit_softcapping", 30.0, "text_config.final_logit_softcapping is 30.0, only nothing"),
    ],
)
def test_mathematics_that_is_not_implemented_is_refused_with_both_values(
    config: dict[str, Any], key: str, value: Any, message: str
) -> None:
    config["text_config"][key] = value
    with pytest.raises(UnsupportedError, match=f"config.json: {message}"):
        read(config)


def test_qwen3_next_is_the_same_config_with_grouped_projections(config: dict[str, Any]) -> None:
    text = dict(config["text_config"])
    rope = text.pop("rope_parameters")
    published = {**text, "model_type": "qwen3_next", "rope_theta": rope["rope_theta"], "rope_scaling": None}
    published["partial_rotary_factor"] = rope.get("partial_rotary_factor", 0.25)
    found, expected = read(published), read(config)
    grouped = {"linear_in_proj_grouped": True, "linear_in_proj_ba_grouped": True}
    assert found == replace(expected, model_type="qwen3_next", **grouped)  # type: ignore[arg-type]
    assert read_model_facts(Fields(model_facts(found), "x")) == found


def test_yarn_stretches_qwen3_5_too(config: dict[str, Any]) -> None:
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 262144}
    config["text_config"]["rope_parameters"] |= scaling
    yarn = read(config).rope_scaling
    assert isinstance(yarn, Yarn)
    assert (yarn.factor, yarn.truncate) == (4.0, True)


def test_another_rope_is_refused(config: dict[str, Any]) -> None:
    config["text_config"]["rope_parameters"]["rope_type"] = "llama3"
    with pytest.raises(UnsupportedError, match=r"rope_parameters.rope_type is llama3, only default, yarn, linear,"):
        read(config)


@pytest.mark.parametrize("key", ["quantization_config", "quantization"])
def test_how_weights_are_quantized_is_no_fact_of_the_model(config: dict[str, Any], key: str) -> None:
    plain = read(config)
    config[key] = {"quant_method": "fp8"}
    assert read(config) == plain


def test_another_architecture_is_refused_by_name(config: dict[str, Any]) -> None:
    config["model_type"] = "mamba"
    with pytest.raises(UnsupportedError, match=r"model_type is mamba, supported are .*qwen3_5_moe"):
        read(config)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("hidden_size", None, "hidden_size is missing"),
        ("hidden_size", -1, "hidden_size is -1, expected an integer from 1"),
        ("hidden_size", 2**40, "hidden_size is 1099511627776, expected an integer from 1 to"),
        ("vocab_size", "4096", "vocab_size is 4096, expected an integer"),
        ("num_hidden_layers", 7, "layer_types is .*, expected 7 entries"),
        ("num_hidden_layers", 10**9, "num_hidden_layers is 1000000000, expected an integer from 1 to 10000"),
        ("layer_types", ["sliding_attention"] * 8, "layer_types is .*, expected only linear_attention and full_att"),
        ("num_key_value_heads", 3, "num_key_value_heads is 3, expected a divisor of num_attention_heads 4"),
        ("linear_num_key_heads", 3, "linear_num_key_heads is 3, expected a divisor of linear_num_value_heads 4"),
        ("num_experts_per_tok", 41, "num_experts_per_tok is 41, expected 1 to num_experts 40"),
        ("rms_norm_eps", 0, "rms_norm_eps is 0.0, expected a number above 0"),
        ("rms_norm_eps", "small", "rms_norm_eps is small, expected a finite number"),
        ("head_dim", 6, "partial_rotary_factor is 0.25, expected a share of head_dim 6 that is an even"),
        ("full_attention_interval", 0, "full_attention_interval is 0, expected an integer from 1"),
        ("linear_conv_kernel_dim", 1, "linear_conv_kernel_dim is 1, expected an integer from 2"),
        ("rope_parameters", None, "rope_theta is missing"),
    ],
)
def test_a_wrong_value_is_refused_with_its_name(config: dict[str, Any], key: str, value: Any, message: str) -> None:
    config["text_config"][key] = value
    with pytest.raises(FormatError, match=f"config.json: (text_config.|text_config.rope_parameters.)?{message}"):
        read(config)


@pytest.mark.parametrize("factor", [0, -0.25, 1.1, 0.3, 1e300])
def test_a_share_of_rotary_dimensions_that_cannot_be_is_refused(config: dict[str, Any], factor: float) -> None:
    config["text_config"]["rope_parameters"]["partial_rotary_factor"] = factor
    with pytest.raises(FormatError, match=r"partial_rotary_factor is .*, expected a share of head_dim 64"):
        read(config)


def test_the_facts_in_an_index_survive_and_are_strict() -> None:
    facts = model_facts(HYBRID)
    assert read_model_facts(Fields(facts, "x")) == HYBRID
    assert read_model_facts(Fields(json.loads(json.dumps(facts)), "x")) == HYBRID
    for key in facts:
        with pytest.raises(FormatError, match=f"x: {key} is missing"):
            read_model_facts(Fields({k: v for k, v in facts.items() if k != key}, "x"))
        with pytest.raises(StreamingExpertsError, match=f"x: {key} is"):
            read_model_facts(Fields({**facts, key: -1}, "x"))
    with pytest.raises(FormatError, match="x: rope_type is unknown to this version"):
        read_model_facts(Fields({**facts, "rope_type": None}, "x"))


# ---- any bytes

NUMBERS = st.integers() | st.floats(allow_nan=False, allow_infinity=False)
ANY: st.SearchStrategy[Any] = st.none() | st.booleans() | NUMBERS | st.text() | st.just([])


@given(data=st.data())
def test_any_value_in_any_place_gives_a_config_or_one_line(data: st.DataObject) -> None:
    demo = json.loads(DEMO.read_bytes())
    config = data.draw(st.sampled_from([demo, *(dict(published) for published in DECODERS.values())]))
    text = demo["text_config"]
    place = data.draw(st.sampled_from([demo, text, text["rope_parameters"]])) if config is demo else config
    place[data.draw(st.sampled_from(sorted(place)))] = data.draw(ANY)
    model, line = result_or_line(read_config, json.dumps(config).encode())
    assert model is not None or line.startswith("config.json: ")


@given(st.binary(max_size=60))
def test_any_bytes_are_refused_with_one_line(raw: bytes) -> None:
    model, line = result_or_line(read_config, raw, "x/config.json")
    assert model is None
    assert line.startswith("x/config.json: ")
