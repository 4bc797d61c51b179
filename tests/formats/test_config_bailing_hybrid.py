"""config.json of Ling 3: published values, and what is refused."""

import json
from typing import Any

import pytest

from formats.config import BailingHybridConfig, model_facts, read_config, read_model_facts
from formats.errors import StreamingExpertsError
from formats.fields import Fields

LING_3_FLASH: dict[str, Any] = {  # what Ling-3.0-Flash is said to have in transformers, in the names of its publisher
    "architectures": ["BailingMoeV3ForCausalLM"],
    "model_type": "bailing_hybrid",
    "first_k_dense_replace": 2,
    "gated_attention_proj_granularity_type": "head_wise",
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 2560,
    "intermediate_size": 6144,
    "kda_lower_bound": -5.0,
    "kda_safe_gate": True,
    "kv_lora_rank": 512,
    "layer_group_size": 6,
    "max_position_embeddings": 262144,
    "moe_intermediate_size": 768,
    "moe_shared_expert_intermediate_size": 768,
    "n_group": 8,
    "no_kda_lora": True,
    "norm_topk_prob": True,
    "num_attention_heads": 32,
    "num_experts": 512,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 42,
    "num_key_value_heads": 32,
    "num_nextn_predict_layers": 1,
    "num_shared_experts": 1,
    "partial_rotary_factor": 0.5,
    "q_lora_rank": None,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-06,
    "rope_interleave": True,
    "rope_scaling": None,
    "rope_theta": 6000000,
    "routed_scaling_factor": 2.5,
    "score_function": "sigmoid",
    "short_conv_kernel_size": 4,
    "tie_word_embeddings": False,
    "topk_group": 4,
    "use_bias": False,
    "use_qkv_bias": False,
    "v_head_dim": 128,
    "vocab_size": 157184,
}


def read(config: dict[str, Any]) -> BailingHybridConfig:
    model = read_config(json.dumps(config).encode())
    assert isinstance(model, BailingHybridConfig)
    return model


def test_ling_3_is_read() -> None:
    model = read(LING_3_FLASH)
    assert [layer for layer, kind in enumerate(model.layer_types) if kind == "full_attention"] == [
        5,
        11,
        17,
        23,
        29,
        35,
        41,
    ]
    assert (model.linear_width, model.head_dim, model.rotary_dim, model.gate_lower_bound) == (4096, 192, 64, -5.0)
    assert [model.has_experts(layer) for layer in (1, 2)] == [False, True]
    assert model.rope.interleaved
    assert model.cache_values(64, 64) == 64 * 7 * 576
    assert read_model_facts(Fields(model_facts(model), "x")) == model


def test_ling_3_is_read_as_transformers_saves_it() -> None:
    left_out = (
        "head_dim",
        "num_experts",
        "num_shared_experts",
        "n_group",
        "norm_topk_prob",
        "rope_scaling",
        "rope_theta",
    )
    saved = {key: value for key, value in LING_3_FLASH.items() if key not in (*left_out, "max_position_embeddings")} | {
        "architectures": ["BailingHybridForCausalLM"],
        "head_dim": 64,
        "layer_types": list(read(LING_3_FLASH).layer_types),
        "linear_head_dim": 128,
        "mlp_layer_types": ["dense"] * 2 + ["sparse"] * 40,
        "model_max_length": 262144,
        "moe_renormalize": True,
        "num_expert_group": 8,
        "num_local_experts": 512,
        "n_shared_experts": 1,
        "rope_parameters": {"rope_theta": 6000000, "rope_type": "default"},
    }
    assert read(saved) == read(LING_3_FLASH)


def test_decays_need_no_bound() -> None:
    assert read(LING_3_FLASH | {"kda_safe_gate": False}).gate_lower_bound is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["BailingMoeV2_5ForCausalLM"]}, "architectures is BailingMoeV2_5ForCausalLM, only 'Bail"),
        ({"no_kda_lora": False}, "no_kda_lora is False, only True is implemented"),
        ({"gated_attention_proj_granularity_type": "element_wise"}, "only 'head_wise' is implemented"),
        ({"rope_interleave": False}, "rope_interleave is False, only True is implemented"),
        ({"use_qkv_bias": True}, "use_qkv_bias is True, only False is implemented"),
        ({"score_function": "softmax"}, "score_function is softmax, only 'sigmoid' is implemented"),
        ({"expert_swiglu_limit_list": [None, 7.0]}, "expert_swiglu_limit_list holds limits, only null and 0"),
        ({"moe_shared_expert_intermediate_size": 512}, "moe_shared_expert_intermediate_size is 512, only 768 is"),
        ({"layer_group_size": 5}, "layer_group_size is 5, expected a divisor of num_hidden_layers 42"),
        ({"kda_lower_bound": 0.5}, "kda_lower_bound is 0.5, expected a number below 0"),
        ({"n_group": None}, "num_expert_group is missing"),
        ({"topk_group": 9}, "topk_group is 9, expected 1 to n_group 8"),
        ({"num_experts": 500}, "n_group is 8, expected a divisor of num_experts 500"),
        (
            {"rope_scaling": {"type": "yarn", "factor": 4, "original_max_position_embeddings": 4096}},
            "partial_rotary_factor is 0.5, only 1.0 is implemented",
        ),
    ],
)
def test_what_ling_3_does_not_implement_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(StreamingExpertsError, match=f"config.json: .*{message}"):
        read(LING_3_FLASH | change)
