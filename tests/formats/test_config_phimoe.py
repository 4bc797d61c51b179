"""Phi-3.5-MoE's config.json: what is read of it, and what is refused."""

import json
from typing import Any

import pytest

from formats.config import LongRope, PhimoeConfig, model_facts, read_config, read_model_facts
from formats.errors import StreamingExpertsError
from formats.fields import Fields
from tests.formats.published import PHI_3_5_MOE, QWEN3_30B

SCALING: dict[str, Any] = PHI_3_5_MOE["rope_scaling"]


def read(**changes: Any) -> PhimoeConfig:
    model = read_config(json.dumps(PHI_3_5_MOE | changes).encode())
    assert isinstance(model, PhimoeConfig)
    return model


def test_facts_are_those_of_config_json() -> None:
    model = read()
    assert (model.top_k, model.num_experts, model.moe_intermediate_size) == (2, 16, 6400)
    assert (model.scoring_func, model.norm_topk_prob, model.router_jitter_noise) == ("sparsemixer", False, 0.01)
    assert (model.attention_bias, model.attention_output_bias, model.lm_head_bias) == (True, True, True)
    assert (model.head_dim, model.rotary_dim, model.sliding_window) == (128, 128, 131072)
    assert model.rope_scaling == LongRope(
        tuple(SCALING["short_factor"]), tuple(map(float, SCALING["long_factor"])), 1.125, 1.25, 4096
    )
    assert read_model_facts(Fields(json.loads(json.dumps(model_facts(model))), "x")) == model


def test_what_is_not_said_is_as_transformers_has_it() -> None:
    said = {**PHI_3_5_MOE, "head_dim": 64, "rope_scaling": None}
    silent = ("attention_bias", "lm_head_bias", "router_jitter_noise", "sliding_window")
    model = read_config(json.dumps({key: value for key, value in said.items() if key not in silent}).encode())
    assert isinstance(model, PhimoeConfig)
    assert (model.attention_bias, model.attention_output_bias, model.lm_head_bias) == (False, False, False)
    assert (model.router_jitter_noise, model.sliding_window, model.rope_scaling) == (0.01, None, None)
    assert model.layer_types == ("full_attention",) * 32


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_experts_per_tok": 1}, "num_experts_per_tok is 1, expected 2"),
        ({"num_experts_per_tok": 3}, "num_experts_per_tok is 3, expected 2"),
        ({"router_jitter_noise": -0.01}, "router_jitter_noise is -0.01, expected a number of at least 0"),
        ({"router_jitter_noise": "no"}, "router_jitter_noise is no, expected a finite number"),
        ({"hidden_act": "gelu"}, "hidden_act is gelu, only 'silu' is implemented"),
        ({"original_max_position_embeddings": 8192}, "original_max_position_embeddings is 8192, only 4096 is"),
        ({"rope_scaling": SCALING | {"type": "yarn"}}, "type is yarn, only default and longrope are implemented"),
        ({"rope_scaling": SCALING | {"type": "su"}}, "type is su, only default and longrope are implemented"),
        ({"rope_scaling": SCALING | {"short_mscale": None}}, "rope_scaling.short_mscale is missing"),
        ({"rope_scaling": SCALING | {"long_mscale": 0}}, "rope_scaling.long_mscale is 0, expected a number from"),
        ({"rope_scaling": SCALING | {"long_factor": [1.0]}}, "long_factor is .*, expected 64 factors"),
        ({"rope_scaling": SCALING | {"short_factor": [0.0] * 64}}, "short_factor is .*, expected 64 factors"),
        (
            {"rope_scaling": SCALING | {"original_max_position_embeddings": None}},
            "rope_scaling.original_max_position_embeddings is missing",
        ),
    ],
)
def test_what_is_not_implemented_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(StreamingExpertsError, match=rf"^config.json: .*{message}"):
        read(**changes)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("residual_multiplier", 0.5, "residual_multiplier is 0.5, expected 1"),
        ("logits_scaling", 2.0, "logits_scaling is 2.0, expected 1"),
        ("norm_topk_prob", True, "norm_topk_prob is True, expected false"),
        ("input_norms", False, "input_norms is False, expected true"),
        ("output_norms", True, "output_norms is True, expected false"),
        ("scoring_func", "softmax", "scoring_func is softmax, expected only sparsemixer"),
        ("router_jitter_noise", -1.0, "router_jitter_noise is -1.0, expected a number of at least 0"),
    ],
)
def test_an_index_with_facts_that_the_model_would_ignore_is_refused(key: str, value: Any, message: str) -> None:
    facts = json.loads(json.dumps(model_facts(read()))) | {key: value}
    with pytest.raises(StreamingExpertsError, match=f"x: {message}"):
        read_model_facts(Fields(facts, "x"))


def test_a_mixer_of_scores_is_no_fact_of_other_decoders() -> None:
    facts = json.loads(json.dumps(model_facts(read_config(json.dumps(QWEN3_30B).encode()))))
    with pytest.raises(StreamingExpertsError, match="x: scoring_func is sparsemixer, expected only softmax"):
        read_model_facts(Fields(facts | {"scoring_func": "sparsemixer"}, "x"))
