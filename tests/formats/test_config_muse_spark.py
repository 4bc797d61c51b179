"""Muse Spark's config.json: as transformers names the published model, and what is refused."""

from typing import Any

import pytest

from formats.config import MuseSparkConfig, model_facts, read_model_facts
from formats.errors import StreamingExpertsError
from formats.fields import Fields
from tests.formats.published import MUSE_SPARK, read


def spark(**changes: Any) -> dict[str, Any]:
    """With another text_config; None takes a key away."""
    text = MUSE_SPARK["text_config"] | changes
    return MUSE_SPARK | {"text_config": {key: value for key, value in text.items() if value is not None}}


def read_spark(**changes: Any) -> MuseSparkConfig:
    model = read(spark(**changes))
    assert isinstance(model, MuseSparkConfig)
    return model


def test_the_published_config_becomes_facts() -> None:
    model = read_spark()
    assert (model.num_experts, model.top_k, model.expert_hidden_size, model.hidden_size) == (256, 8, 4096, 8192)
    assert model.attention_multiplier == 5.4730064863875 / 8
    assert [model.turns(layer) for layer in range(6)] == [True, False, True, True, True, False]
    assert [model.window(layer) for layer in range(3)] == [2048, None, 2048]
    assert read_model_facts(Fields(model_facts(model), "x")) == model


def test_lists_that_are_not_there_are_those_of_the_published_config() -> None:
    left_out = {"layer_rope_theta": None, "layer_types": None, "mlp_layer_types": None}
    assert read_spark(**left_out) == read_spark()
    null = MUSE_SPARK | {"text_config": MUSE_SPARK["text_config"] | left_out}
    assert read(null) == read_spark()


def test_what_transformers_has_a_default_for_has_it_here() -> None:
    keys = ("head_dim", "post_norm_eps", "qk_scale_factor", "residual_gate_temperature", "routed_scaling_factor")
    assert read_spark(**dict.fromkeys(keys)) == read_spark()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "qwen3_moe"}, "model_type is qwen3_moe, only 'muse_spark_text' is implemented"),
        ({"hidden_act": "gelu"}, "hidden_act is gelu, only 'silu' is implemented"),
        ({"num_shared_experts": 1}, "num_shared_experts is 1, only 0 is implemented"),
        ({"norm_topk_prob": False}, "norm_topk_prob is False, only True is implemented"),
        ({"n_group": 2}, "n_group is 2, only 1 is implemented"),
        ({"rope_theta": 1e4}, "rope_theta is 10000.0, only nothing is implemented"),
        ({"rope_parameters": {"rope_theta": 5e5, "partial_rotary_factor": 0.5}}, "partial_rotary_factor is 0.5, only"),
        ({"rope_parameters": None}, "rope_theta is missing"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings is True, only False is implemented"),
        ({"layer_rope_theta": [0, 1e4] * 31}, "layer_rope_theta is .*, only 0 and rope_theta 500000.0 are implemented"),
        ({"layer_rope_theta": [0]}, "no_rope_layers is .*, expected 62 entries"),
        ({"sliding_window": None}, "sliding_window is missing"),
        ({"final_logit_softcapping": 0.0}, "final_logit_softcapping is 0.0, expected a number above 0"),
        ({"final_logit_softcapping": None}, "final_logit_softcapping is missing"),
        ({"post_norm_eps": 0.0}, "post_norm_eps is 0.0, expected a number above 0"),
        ({"residual_gate_temperature": 0.0}, "residual_gate_temperature is 0.0, expected a number above 0"),
        ({"moe_hidden_size": None}, "moe_hidden_size is missing"),
        ({"output_multiplier": None}, "output_multiplier is missing"),
    ],
)
def test_what_is_not_implemented_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(StreamingExpertsError, match=f"config.json: text_config.*{message}"):
        read(spark(**change))


def test_a_tied_head_is_refused() -> None:
    with pytest.raises(StreamingExpertsError, match=r"config\.json: tie_word_embeddings is True, only False"):
        read(MUSE_SPARK | {"tie_word_embeddings": True})


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("no_rope_layers", [2] * 62, "no_rope_layers is .*, expected only 0 and 1"),
        ("qk_norm", "head", "qk_norm is head, expected unit"),
        ("scoring_func", "softmax", "scoring_func is softmax, expected sigmoid"),
        ("residual_multiplier", 2.0, "residual_multiplier is 2.0, expected 1"),
        ("n_group", 2, "n_group is 2, expected 1"),
        ("swiglu_limit", 7.0, "swiglu_limit is 7.0, expected None"),
        ("scale_expert_input", True, "scale_expert_input is True, expected false"),
        ("full_attention_sinks", False, "full_attention_sinks is False, expected True"),
        ("conv_kernel_size", 3, "conv_kernel_size is 3, expected None"),
    ],
)
def test_an_index_of_another_decoder_is_refused(key: str, value: Any, message: str) -> None:
    facts = model_facts(read_spark()) | {key: value}
    with pytest.raises(StreamingExpertsError, match=message):
        read_model_facts(Fields(facts, "index.json: model"))
