"""Command A+'s config.json: layers by lists or by place, and what is refused."""

from typing import Any

import pytest

from formats.config import Cohere2MoeConfig, model_facts, read_model_facts
from formats.errors import StreamingExpertsError
from formats.fields import Fields
from tests.fixtures.cohere_tiny import COHERE, FULL, SLIDING, SOFTMAX
from tests.formats.published import read


def read_cohere(config: dict[str, Any]) -> Cohere2MoeConfig:
    model = read(config)
    assert isinstance(model, Cohere2MoeConfig)
    return model


def test_the_config_becomes_facts() -> None:
    model = read_cohere(COHERE)
    assert model.layer_types == (FULL, SLIDING, SLIDING, FULL, SLIDING)
    assert [model.has_experts(layer) for layer in range(5)] == [False, True, True, True, True]
    assert [model.turns(layer) for layer in range(5)] == [True, True, True, False, True]
    assert (model.moe_intermediate_size, model.intermediate_size, model.shared_expert_intermediate_size) == (
        64,
        96,
        128,
    )
    assert (model.layer_norm, model.rms_norm_eps, model.average_shared_expert) == (True, 1e-5, True)
    assert (model.scoring_func, model.norm_topk_prob, model.logits_scaling) == ("sigmoid_of_chosen", True, 4.0)
    assert (model.rope_interleave, model.tie_word_embeddings) == (True, True)


def test_its_other_ways_become_facts() -> None:
    model = read_cohere(SOFTMAX | {"norm_topk_prob": False})
    assert (model.layer_norm, model.rms_norm_eps, model.average_shared_expert) == (False, 1e-6, False)
    assert (model.scoring_func, model.norm_topk_prob) == ("softmax", True)  # of the chosen ones alone, in any case
    assert [model.turns(layer) for layer in range(5)] == [False, True, True, False, True]


@pytest.mark.parametrize(("every", "dense"), [(1, [FULL, FULL]), (2, [SLIDING, FULL])])
def test_layers_without_a_list_follow_from_their_place(every: int, dense: list[str]) -> None:
    config = {key: value for key, value in COHERE.items() if key not in ("layer_types", "mlp_layer_types")}
    config |= {"first_k_dense_replace": 2, "prefix_dense_sliding_window_pattern": every, "sliding_window_pattern": 2}
    model = read_cohere(config)
    assert model.layer_types == (*dense, SLIDING, FULL, SLIDING)
    assert model.mlp_layer_types == ("dense", "dense", "sparse", "sparse", "sparse")


def test_what_is_missing_is_what_transformers_takes() -> None:
    keys = ("logit_scale", "expert_selection_fn", "shared_expert_combination_strategy", "tie_word_embeddings")
    model = read_cohere({key: value for key, value in COHERE.items() if key not in keys})
    assert (model.logits_scaling, model.scoring_func, model.tie_word_embeddings) == (16.0, "softmax", True)
    assert model.average_shared_expert
    assert not read_cohere(COHERE | {"num_shared_experts": 0}).average_shared_expert


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("expert_selection_fn", "relu", "expert_selection_fn is relu, only softmax and sigmoid are implemented"),
        (
            "shared_expert_combination_strategy",
            "max",
            "shared_expert_combination_strategy is max, only average and sum",
        ),
        ("hidden_act", "gelu", "hidden_act is gelu, only 'silu' is implemented"),
        ("use_parallel_block", False, "use_parallel_block is False, only True is implemented"),
        ("use_qk_norm", True, "use_qk_norm is True, only False is implemented"),
        ("rotary_pct", 0.5, "rotary_pct is 0.5, only 1.0 is implemented"),
        ("partial_rotary_factor", 0.5, "partial_rotary_factor is 0.5, only 1.0 is implemented"),
        ("rope_scaling", {"rope_type": "yarn", "factor": 4.0}, "rope_scaling is .*, only nothing is implemented"),
        (
            "rope_parameters",
            {"rope_type": "llama3"},
            "rope_type is llama3, only default, yarn, linear, dynamic and longrope are",
        ),
        ("logit_scale", 0.0, "logit_scale is 0.0, expected a number above 0"),
        ("layer_norm_eps", 0.0, "layer_norm_eps is 0.0, expected a number above 0"),
        ("sliding_window", None, "sliding_window is missing"),
        ("head_dim", None, "head_dim is missing"),
        ("layer_types", ["chunked_attention"] * 5, "layer_types is .*, expected only full_attention and sliding"),
        ("mlp_layer_types", ["dense"] * 5, "mlp_layer_types is .*, expected at least one layer with experts"),
    ],
)
def test_what_is_not_implemented_is_refused(key: str, value: Any, message: str) -> None:
    with pytest.raises(StreamingExpertsError, match=f"config.json: .*{message}"):
        read_cohere(COHERE | {key: value})


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("residual_multiplier", 0.5, "residual_multiplier is 0.5, expected 1"),
        ("input_norms", False, "input_norms is False, expected true"),
        ("output_norms", True, "output_norms is True, expected false"),
    ],
)
def test_an_index_of_another_stream_is_refused(key: str, value: Any, message: str) -> None:
    facts = model_facts(read_cohere(COHERE)) | {key: value}
    with pytest.raises(StreamingExpertsError, match=message):
        read_model_facts(Fields(facts, "index.json: model"))
