"""config.json of DeepSeek-V3, Kimi K2 and GLM-4.7-Flash: published values, and what is refused."""

import json
import math
from typing import Any

import numpy as np
import pytest

from formats.config import DeepseekV3Config, Indexer, model_facts, read_config, read_model_facts
from formats.errors import StreamingExpertsError
from formats.fields import Fields

DEEPSEEK_V3: dict[str, Any] = {  # what DeepSeek-V3 publishes, without what no code reads
    "model_type": "deepseek_v3",
    "attention_bias": False,
    "first_k_dense_replace": 3,
    "hidden_act": "silu",
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "moe_intermediate_size": 2048,
    "moe_layer_freq": 1,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "v_head_dim": 128,
    "vocab_size": 129280,
}
KIMI_K25: dict[str, Any] = {  # as Kimi K2.5 differs
    "model_type": "kimi_k25",
    "text_config": DEEPSEEK_V3
    | {"model_type": "kimi_k2", "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "n_routed_experts": 384}
    | {"rope_scaling": DEEPSEEK_V3["rope_scaling"] | {"factor": 64.0}, "rope_theta": 50000.0, "rms_norm_eps": 1e-5},
}


DEEPSEEK_V32 = DEEPSEEK_V3 | {
    "model_type": "deepseek_v32",
    "index_head_dim": 128,
    "index_n_heads": 64,
    "index_topk": 2048,
}
GLM_5 = DEEPSEEK_V32 | {"model_type": "glm_moe_dsa", "index_n_heads": 32, "num_hidden_layers": 7}
MISTRAL_SMALL_4: dict[str, Any] = {
    "model_type": "mistral3",
    "text_config": {
        "model_type": "mistral4",
        "attention_bias": False,
        "first_k_dense_replace": 0,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "kv_lora_rank": 256,
        "max_position_embeddings": 1048576,
        "moe_intermediate_size": 2048,
        "n_group": 1,
        "n_routed_experts": 128,
        "n_shared_experts": 1,
        "norm_topk_prob": True,
        "num_attention_heads": 32,
        "num_experts_per_tok": 4,
        "num_hidden_layers": 36,
        "num_key_value_heads": 32,
        "q_lora_rank": 1024,
        "qk_nope_head_dim": 64,
        "qk_rope_head_dim": 64,
        "rms_norm_eps": 1e-06,
        "rope_interleave": True,
        "rope_parameters": {
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "factor": 128.0,
            "llama_4_scaling_beta": 0.1,
            "max_position_embeddings": 1048576,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 8192,
            "partial_rotary_factor": 0.5,
            "rope_theta": 10000.0,
            "rope_type": "yarn",
            "type": "yarn",
        },
        "routed_scaling_factor": 1.0,
        "tie_word_embeddings": False,
        "topk_group": 1,
        "v_head_dim": 128,
        "vocab_size": 131072,
    },
    "tie_word_embeddings": False,
    "vision_config": {"model_type": "pixtral"},
}


def read(config: dict[str, Any]) -> DeepseekV3Config:
    model = read_config(json.dumps(config).encode())
    assert isinstance(model, DeepseekV3Config)
    return model


def test_deepseek_v3_is_read() -> None:
    model = read(DEEPSEEK_V3)
    assert [model.has_experts(layer) for layer in (0, 2, 3, 60)] == [False, False, True, True]
    assert (model.head_dim, model.rotary_dim, model.q_lora_rank) == (192, 64, 1536)
    assert model.cache_values(64, 64) == 64 * 61 * 576
    assert model.state_values == 0
    assert read_model_facts(Fields(model_facts(model), "x")) == model


def test_kimi_k25_is_its_text_config() -> None:
    model = read(KIMI_K25)
    assert model.model_type == "deepseek_v3"
    assert (model.num_experts, model.n_group, model.rms_norm_eps) == (384, 1, 1e-5)
    assert [model.has_experts(layer) for layer in (0, 1)] == [False, True]


@pytest.mark.parametrize(("config", "square"), [(DEEPSEEK_V3, 1.8738), (KIMI_K25, 2.0047)])
def test_yarn_scales_attention_by_the_square_of_its_mscale(config: dict[str, Any], square: float) -> None:
    model = read(config)
    assert model.attention_scale * math.sqrt(192) == pytest.approx(square, abs=1e-4)
    assert model.rope.attention_factor == 1


def test_yarn_leaves_fast_pairs_and_stretches_slow_ones() -> None:
    rope = read(DEEPSEEK_V3).rope
    plain = 10000.0 ** -(np.arange(32) / 32)
    assert rope.interleaved
    np.testing.assert_allclose(rope.inv_freq[:11], plain[:11])
    np.testing.assert_allclose(rope.inv_freq[23:], plain[23:] / 40)


def test_deepseek_v32_has_an_indexer_in_every_layer() -> None:
    model = read(DEEPSEEK_V32)
    assert model.indexer == Indexer(64, 128, 2048, rope_interleave=False)
    assert model.layer_types == ("indexed_attention",) * 61
    assert model.cache_values(64, 64) == 64 * 61 * (576 + 128)
    assert read_model_facts(Fields(model_facts(model), "x")) == model


def test_layers_of_glm_5_may_share_an_indexer_as_listed_or_by_schedule() -> None:
    listed = read(GLM_5 | {"indexer_types": ["full", "full", "full", "shared", "shared", "shared", "full"]})
    assert listed.layer_types.count("shared_index_attention") == 3
    assert listed.indexer == Indexer(32, 128, 2048, rope_interleave=True)
    assert read(GLM_5 | {"index_topk_freq": 4, "index_skip_topk_offset": 3}) == listed
    assert read(GLM_5 | {"index_topk_pattern": "FFFSSSF", "index_topk_freq": 1}) == listed
    assert read(GLM_5 | {"index_topk_pattern": ["full"] * 3 + ["shared"] * 3 + ["full"]}) == listed
    assert read(GLM_5).layer_types == ("indexed_attention",) * 7


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"index_topk_pattern": "FFSFFTF"}, "index_topk_pattern is FFSFFTF, expected only full and shared"),
        ({"index_topk_pattern": [["full"]]}, r"index_topk_pattern is .*, expected only full and shared"),
        ({"index_topk_pattern": "FS"}, "layer_types is .*, expected 7 entries"),
        ({"indexer_types": ["half"] * 7}, r"indexer_types is .*, expected only full and shared"),
        ({"indexer_types": ["shared"] * 7}, r"layer_types is .*, expected indexed_attention first"),
        ({"index_head_dim": 32}, "index_head_dim is 32, expected qk_rope_head_dim 64 or more"),
        ({"q_lora_rank": None}, "q_lora_rank is None, expected a rank, which the indexer needs"),
        ({"index_n_heads": None}, "index_n_heads is missing"),
    ],
)
def test_an_indexer_that_is_not_implemented_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(StreamingExpertsError, match=f"config.json: {message}"):
        read(GLM_5 | change)


def test_queries_may_come_without_a_rank() -> None:
    assert read(DEEPSEEK_V3 | {"q_lora_rank": None}).q_lora_rank is None


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("scoring_func", "softmax", "scoring_func is softmax, only 'sigmoid' is implemented"),
        ("topk_method", "greedy", "topk_method is greedy, only 'noaux_tc' is implemented"),
        ("attention_bias", True, "attention_bias is True, only False is implemented"),
        ("first_k_dense_replace", 61, "mlp_layer_types is .*, expected at least one layer with experts"),
        ("moe_layer_freq", 2, "moe_layer_freq is 2, only 1 is implemented"),
        ("rope_interleave", False, "rope_interleave is False, only True is implemented"),
        ("partial_rotary_factor", 0.5, "partial_rotary_factor is 0.5, only 1.0 is implemented"),
        ("rope_scaling", {"partial_rotary_factor": 0.5}, "rope_scaling.partial_rotary_factor is 0.5, only 1.0 is"),
        ("n_group", 7, "n_group is 7, expected a divisor of n_routed_experts 256"),
        ("topk_group", 9, "topk_group is 9, expected 1 to n_group 8"),
        (
            "num_experts_per_tok",
            129,
            "num_experts_per_tok is 129, expected at most the 128 experts of topk_gr",
        ),
        ("first_k_dense_replace", 62, "first_k_dense_replace is 62, expected an integer from 0 to 61"),
        ("mlp_layer_types", ["sparse"], r"mlp_layer_types is .*, expected 61 entries"),
        ("mlp_layer_types", ["moe"] * 61, r"mlp_layer_types is .*, expected only dense and sparse"),
        ("qk_rope_head_dim", 63, "qk_rope_head_dim is 63, expected an even number"),
        ("kv_lora_rank", None, "kv_lora_rank is missing"),
        ("n_shared_experts", 0, "n_shared_experts is 0, expected an integer from 1"),
        ("rope_scaling", {"type": "dynamic"}, "type is dynamic, only default and yarn are implemented"),
    ],
)
def test_what_is_not_implemented_is_refused(key: str, value: Any, message: str) -> None:
    with pytest.raises(StreamingExpertsError, match=f"config.json: .*{message}"):
        read({**DEEPSEEK_V3, key: value})


def test_sarvam_is_deepseek_v3_as_published_and_as_transformers_saves_it() -> None:
    left_out = ("n_group", "topk_group", "n_routed_experts", "n_shared_experts", "rope_scaling", "topk_method")
    common = {key: value for key, value in DEEPSEEK_V3.items() if key not in left_out} | {"model_type": "sarvam_mla"}
    yarn = DEEPSEEK_V3["rope_scaling"]
    published = {"num_experts": 128, "num_shared_experts": 1, "rope_scaling": yarn | {"type": "deepseek_yarn"}}
    saved = {"n_routed_experts": 128, "n_shared_experts": 1, "n_group": 1, "topk_group": 1}
    model = read(common | published)
    assert (model.num_experts, model.n_group, model.topk_group) == (128, 1, 1)
    assert read(common | saved | {"rope_parameters": yarn | {"rope_type": "yarn", "rope_theta": 10000}}) == model


def test_only_sarvam_calls_yarn_by_the_name_of_deepseek() -> None:
    yarn = DEEPSEEK_V3["rope_scaling"] | {"type": "deepseek_yarn"}
    with pytest.raises(StreamingExpertsError, match="type is deepseek_yarn, only default and yarn are implemented"):
        read(DEEPSEEK_V3 | {"rope_scaling": yarn})


@pytest.mark.parametrize("kind", ["AXK1", "axk1"])
def test_ax_k1_is_deepseek_v3_with_a_norm(kind: str) -> None:
    model = read(DEEPSEEK_V3 | {"model_type": kind, "topk_method": "none"})
    assert (model.model_type, model.post_mlp_norm, model.scoring_func) == ("deepseek_v3", True, "sigmoid")
    assert model.has_correction_bias  # which tensors may deny
    assert read_model_facts(Fields(model_facts(model), "x")) == model


@pytest.mark.parametrize("key", ["n_group", "topk_group"])
def test_groups_of_experts_are_never_guessed(key: str) -> None:
    """transformers' default is one family's way or another's."""
    with pytest.raises(StreamingExpertsError, match=f"config.json: {key} is missing"):
        read({name: value for name, value in DEEPSEEK_V3.items() if name != key})


def mistral4(**changes: Any) -> dict[str, Any]:
    """Mistral Small 4 with another text_config."""
    return MISTRAL_SMALL_4 | {"text_config": MISTRAL_SMALL_4["text_config"] | changes}


def mistral4_turned(**changes: Any) -> dict[str, Any]:
    """Mistral Small 4 with other rope_parameters; None takes one away."""
    parameters = MISTRAL_SMALL_4["text_config"]["rope_parameters"] | changes
    return mistral4(rope_parameters={key: value for key, value in parameters.items() if value is not None})


def test_mistral_small_4_is_deepseek_v3_with_a_temperature() -> None:
    model = read(MISTRAL_SMALL_4)
    assert (model.model_type, model.scoring_func, model.norm_topk_prob) == ("deepseek_v3", "softmax", True)
    assert (model.n_group, model.rotary_dim, model.rope.attention_factor) == (1, 64, 1)
    assert all(map(model.has_experts, range(36)))
    assert model.run_of_scale(0, 9000) == (8192, model.attention_scale)
    assert model.run_of_scale(8191, 1) == (1, model.attention_scale)
    tokens, scale = model.run_of_scale(8192, 100_000)
    assert tokens == 8192
    assert scale / model.attention_scale == pytest.approx(1 + 0.1 * math.log(2))
    assert read_model_facts(Fields(model_facts(model), "x")) == model
    assert read(MISTRAL_SMALL_4["text_config"]) == model


def test_whether_the_head_of_mistral_small_4_is_tied_is_said_beside_its_text() -> None:
    assert not read(mistral4(tie_word_embeddings=True)).tie_word_embeddings
    assert read({key: value for key, value in MISTRAL_SMALL_4.items() if "tie" not in key}).tie_word_embeddings


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (mistral4(model_type="mistral"), "model_type is mistral, only 'mistral4' is implemented"),
        (mistral4(n_group=2), "n_group is 2, only 1 is implemented"),
        (mistral4(scoring_func="sigmoid"), "scoring_func is sigmoid, only 'softmax' is implemented"),
        (mistral4(rope_interleave=False), "rope_interleave is False, only True is implemented"),
        (mistral4_turned(rope_type="default"), "rope_parameters.rope_type is default, only yarn is implemented for"),
        (mistral4_turned(partial_rotary_factor=1.0), "partial_rotary_factor is 1.0, expected 64 of 128"),
        (mistral4_turned(llama_4_scaling_beta=None), "llama_4_scaling_beta is missing"),
    ],
)
def test_what_mistral_small_4_does_not_implement_is_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(StreamingExpertsError, match=f"config.json: text_config.*{message}"):
        read(config)
