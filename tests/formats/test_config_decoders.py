"""config.json of the plain decoders: published values become facts, and what is not implemented is refused."""

import copy
import json
import math
from dataclasses import MISSING, fields, replace
from pathlib import Path
from typing import Any

import pytest

import formats
from formats.config import (
    DecoderConfig,
    Llama3,
    LongRope,
    Temperature,
    Yarn,
    model_facts,
    read_model_facts,
)
from formats.errors import FormatError, StreamingExpertsError, UnsupportedError
from formats.fields import Fields
from tests.containers import HYBRID
from tests.formats.published import DECODERS, ERNIE_4_5_VL_28B, GLM_4_5V, QWEN3_30B, QWEN3_VL_30B, read

ORIGINAL = {"factor": 4.0, "original_max_position_embeddings": 32768}
FORMAT = Path(formats.__file__).parent / "FORMAT.md"


MIMO_SIX = ("full_attention", *("sliding_attention",) * 5)
# What each of them has that a plain decoder has not.
GLM_4_5_FACTS: dict[str, Any] = {
    "rotary_dim": 64,
    "attention_bias": True,
    "mlp_layer_types": ("dense",) + ("sparse",) * 45,
    "intermediate_size": 10944,
    "scoring_func": "sigmoid",
    "e_score_correction_bias": True,
    "shared_expert_intermediate_size": 1408,
}
ERNIE_FACTS: dict[str, Any] = {
    "rotary_dim": 128,
    "rope_interleave": True,
    "mlp_layer_types": ("dense",) + ("sparse",) * 27,
    "intermediate_size": 12288,
    "e_score_correction_bias": True,
    "shared_expert_intermediate_size": 3072,
    "tie_word_embeddings": True,
}
FACTS: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"rotary_dim": 128, "qk_norm": "head"},
    "qwen3_omni_moe": {"rotary_dim": 128, "qk_norm": "head"},
    "qwen3_vl_moe": {"rotary_dim": 128, "qk_norm": "head"},
    "qwen2_moe": {
        "rotary_dim": 128,
        "norm_topk_prob": False,
        "attention_bias": True,
        "shared_expert_intermediate_size": 5632,
        "shared_expert_gate": True,
    },
    "mixtral": {"rotary_dim": 128, "moe_intermediate_size": 14336},
    "olmoe": {"rotary_dim": 128, "norm_topk_prob": False, "qk_norm": "whole"},
    "flex_olmo": {
        "rotary_dim": 128,
        "norm_topk_prob": False,
        "qk_norm": "whole",
        "input_norms": False,
        "output_norms": True,
    },
    "granitemoe": {
        "rotary_dim": 64,
        "attention_multiplier": 0.015625,
        "embedding_multiplier": 12.0,
        "residual_multiplier": 0.22,
        "logits_scaling": 6.0,
        "tie_word_embeddings": True,
    },
    "dots1": {
        "rotary_dim": 128,
        "qk_norm": "head",
        "mlp_layer_types": ("dense",) + ("sparse",) * 61,
        "intermediate_size": 10944,
        "scoring_func": "sigmoid",
        "routed_scaling_factor": 2.5,
        "e_score_correction_bias": True,
        "shared_expert_intermediate_size": 2816,
    },
    "solar_open": {
        "rotary_dim": 128,
        "scoring_func": "sigmoid",
        "e_score_correction_bias": True,
        "shared_expert_intermediate_size": 1280,
    },
    "exaone_moe": {
        "rotary_dim": 128,
        "layer_types": (*("sliding_attention",) * 3, "full_attention") * 12,
        "sliding_window": 128,
        "full_attention_rope": False,
        "qk_norm": "head",
        "mlp_layer_types": ("dense",) + ("sparse",) * 47,
        "intermediate_size": 18432,
        "scoring_func": "sigmoid",
        "routed_scaling_factor": 2.5,
        "e_score_correction_bias": True,
        "shared_expert_intermediate_size": 2048,
    },
    "hy_v3": {
        "rotary_dim": 128,
        "qk_norm": "head",
        "mlp_layer_types": ("dense",) + ("sparse",) * 79,
        "intermediate_size": 13312,
        "scoring_func": "sigmoid",
        "routed_scaling_factor": 2.826,
        "e_score_correction_bias": True,
        "shared_expert_intermediate_size": 1536,
    },
    "hunyuan_v1_moe": {
        "rotary_dim": 128,
        "rope_theta": pytest.approx(11158839.9251),  # as llama.cpp's converter works it out
        "qk_norm": "turned_head",
        "shared_expert_intermediate_size": 3072,
        "tie_word_embeddings": True,
    },
    "ernie4_5_moe": ERNIE_FACTS,
    "ernie4_5_vl_moe": ERNIE_FACTS,
    "glm4_moe": GLM_4_5_FACTS,
    "glm4v_moe": GLM_4_5_FACTS,
    "minimax_m2": {
        "rotary_dim": 64,
        "qk_norm": "whole",
        "scoring_func": "sigmoid",
        "e_score_correction_bias": True,
    },
    "gpt_oss": {
        "rotary_dim": 64,
        "rope_scaling": Yarn(32.0, 4096, 32.0, 1.0, False, 0.1 * math.log(32) + 1, 0.0),
        "layer_types": ("sliding_attention", "full_attention") * 12,
        "sliding_window": 128,
        "attention_sinks": True,
        "attention_bias": True,
        "attention_output_bias": True,
        "router_bias": True,
        "swiglu_limit": 7.0,
    },
    "llama4": {
        "rotary_dim": 128,
        "rope_scaling": Llama3(16.0, 8192, 1.0, 1.0),
        "rope_interleave": True,
        "layer_types": (*("chunked_attention",) * 3, "full_attention") * 12,
        "attention_chunk_size": 8192,
        "full_attention_rope": False,
        "attention_temperature": Temperature(8192, 0.1),
        "qk_norm": "unit",
        "intermediate_size": 16384,
        "shared_expert_intermediate_size": 8192,
        "scoring_func": "sigmoid_of_chosen",
        "norm_topk_prob": False,
        "scale_expert_input": True,
    },
    "mimo_v2_flash": {
        "rotary_dim": 64,  # of 192 values 0.334, cut
        "layer_types": ("full_attention", *(("sliding_attention",) * 4), *MIMO_SIX * 7, "full_attention"),
        "v_head_dim": 128,
        "attention_value_scale": 0.707,
        "sliding_window": 129,
        "swa_num_key_value_heads": 8,
        "swa_rope_theta": 10000.0,
        "attention_sinks": True,
        "full_attention_sinks": False,
        "mlp_layer_types": ("dense",) + ("sparse",) * 47,
        "intermediate_size": 16384,
        "scoring_func": "sigmoid",
        "e_score_correction_bias": True,
    },
}
FACTS["kolibri1"] = {
    "rotary_dim": 128,
    "layer_types": (*("sliding_attention",) * 4, "full_attention") * 10,
    "sliding_window": 513,
    "full_attention_rope": False,
    "qk_norm": "head",
    "output_norms": True,
    "scoring_func": "sigmoid_of_chosen",
    "norm_topk_prob": False,
    "e_score_correction_bias": True,
    "shared_expert_intermediate_size": 512,
}
FACTS["phimoe"] = {
    "rotary_dim": 128,
    "rope_scaling": LongRope(
        tuple(1 + i / 64 for i in range(64)), tuple(1.0 + i for i in range(64)), 1.125, 1.25, 4096
    ),
    "layer_types": ("sliding_attention",) * 32,
    "sliding_window": 131072,
    "attention_bias": True,
    "attention_output_bias": True,
    "scoring_func": "sparsemixer",
    "norm_topk_prob": False,
    "router_jitter_noise": 0.01,
    "lm_head_bias": True,
}
FACTS["afmoe"] = {
    "rotary_dim": 64,
    "layer_types": (*("sliding_attention",) * 3, "full_attention") * 8,
    "sliding_window": 2048,
    "full_attention_rope": False,
    "attention_gate": "sigmoid",
    "qk_norm": "head",
    "output_norms": True,
    "mlp_layer_types": ("dense",) * 2 + ("sparse",) * 30,
    "intermediate_size": 6144,
    "scoring_func": "sigmoid",
    "routed_scaling_factor": 2.826,
    "e_score_correction_bias": True,
    "shared_expert_intermediate_size": 1024,
    "embedding_multiplier": 2048**0.5,
}
FACTS["lfm2_moe"] = {
    "rotary_dim": 64,
    "layer_types": (*("conv",) * 2, *("full_attention", *("conv",) * 3) * 4, *("full_attention", *("conv",) * 2) * 2),
    "conv_kernel_size": 3,
    "qk_norm": "head",
    "mlp_layer_types": ("dense",) * 2 + ("sparse",) * 22,
    "intermediate_size": 7168,
    "scoring_func": "sigmoid",
    "e_score_correction_bias": True,
    "tie_word_embeddings": True,
}
FACTS["laguna"] = {
    "rotary_dim": 64,
    "swa_rotary_dim": 128,
    "swa_rope_theta": 10000.0,
    "layer_types": ("full_attention", *("sliding_attention",) * 3) * 10,
    "sliding_window": 512,
    "attention_gate": "softplus_by_head",
    "qk_norm": "head",
    "mlp_layer_types": ("dense",) + ("sparse",) * 39,
    "intermediate_size": 8192,
    "scoring_func": "sigmoid",
    "e_score_correction_bias": True,
    "shared_expert_intermediate_size": 512,
}
FACTS["bailing_moe"] = {
    "rotary_dim": 32,
    "fused_qkv": True,
    "qk_norm": "head",
    "mlp_layer_types": ("dense",) + ("sparse",) * 18,
    "intermediate_size": 8192,
    "scoring_func": "sigmoid",
    "routed_scaling_factor": 2.5,
    "e_score_correction_bias": True,
    "shared_expert_intermediate_size": 1024,
}
FACTS["mellum"] = {"rotary_dim": 128, "qk_norm": "head"}
TIED = ("ernie4_5_moe", "ernie4_5_vl_moe", "lfm2_moe")  # if nothing is said, as in transformers
STATES = {"lfm2_moe": 18 * 2 * 2048}  # values that do not grow with a sequence
CACHED = {
    "lfm2_moe": 6 * 2 * 512,
    "mimo_v2_flash": (9 * 4 + 39 * 8) * (192 + 128),
}  # where key heads or widths differ: values per token


@pytest.mark.parametrize("model_type", DECODERS)
def test_published_configs_become_facts(model_type: str) -> None:
    model = read(DECODERS[model_type])
    assert isinstance(model, DecoderConfig)
    plain: dict[str, Any] = {"rope_scaling": None, "layer_types": ("full_attention",) * model.num_hidden_layers}
    plain |= {"mlp_layer_types": ("sparse",) * model.num_hidden_layers, "tie_word_embeddings": False}
    plain |= {"attention_multiplier": 1 / math.sqrt(model.head_dim), "norm_topk_prob": True, "scoring_func": "softmax"}
    own = FACTS[model_type]
    for key, value in model_facts(model).items():
        expected = (plain | own).get(key, getattr(DecoderConfig, key, None))
        if key in plain or key in own or hasattr(DecoderConfig, key):
            assert getattr(model, key) == expected, (key, value)
    assert model.state_values == STATES.get(model_type, 0)
    alike = model.num_hidden_layers * 2 * model.num_key_value_heads * model.head_dim
    assert model.cache_values(64, 64) == 64 * CACHED.get(model_type, alike)
    assert read_model_facts(Fields(json.loads(json.dumps(model_facts(model))), "x")) == model


def test_qwen3_moe_is_the_same_with_its_rope_where_transformers_5_writes_it() -> None:
    config = {key: value for key, value in QWEN3_30B.items() if key not in ("rope_theta", "rope_scaling")}
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": 1000000.0}
    assert read(config) == read(QWEN3_30B)


def test_heads_are_tied_if_nothing_is_said_in_two_families() -> None:
    for model_type, config in DECODERS.items():
        assert read({**config, "tie_word_embeddings": None}).tie_word_embeddings == (model_type in TIED)


def test_qwen3_vl_ties_its_head_as_either_config_says() -> None:
    """transformers reads the outer one, files hold it in both."""
    text = {**QWEN3_VL_30B["text_config"], "tie_word_embeddings": True}
    assert not read({**QWEN3_VL_30B, "text_config": text}).tie_word_embeddings
    assert read({**QWEN3_VL_30B, "text_config": text, "tie_word_embeddings": None}).tie_word_embeddings
    assert read({**QWEN3_VL_30B, "tie_word_embeddings": True}).tie_word_embeddings


def test_glm_4_5v_ties_its_head_as_either_config_says() -> None:
    text = {**GLM_4_5V["text_config"], "tie_word_embeddings": True}
    assert read({**GLM_4_5V, "text_config": text}).tie_word_embeddings
    assert read({**GLM_4_5V, "tie_word_embeddings": True}).tie_word_embeddings


def test_glm_4_5v_with_norms_of_queries_is_refused() -> None:
    with pytest.raises(StreamingExpertsError, match="use_qk_norm is True, only False is implemented"):
        read({**GLM_4_5V, "text_config": {**GLM_4_5V["text_config"], "use_qk_norm": True}})


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("norm_topk_prob", False, "norm_topk_prob is False, only True is implemented"),
        ("use_sliding_window", True, "use_sliding_window is True, only False is implemented"),
        ("moe_intermediate_size", 1024, "moe_intermediate_size is 1024, with which the shapes of experts do not tell"),
        ("moe_intermediate_size", 2048, "moe_intermediate_size is 2048, with which the shapes of experts do not tell"),
        ("rope_scaling", {"rope_type": "mrope"}, "rope_type is mrope, only default, yarn, linear, dynamic and"),
    ],
)
def test_what_qwen3_vl_does_not_implement_is_refused(key: str, value: Any, message: str) -> None:
    with pytest.raises(StreamingExpertsError, match=f"config.json: text_config.*{message}"):
        read({**QWEN3_VL_30B, "text_config": {**QWEN3_VL_30B["text_config"], key: value}})


def test_a_whole_number_may_be_written_as_a_float_but_not_as_true() -> None:
    assert read({**DECODERS["minimax_m2"], "shared_intermediate_size": 0.0}) == read(DECODERS["minimax_m2"])
    with pytest.raises(StreamingExpertsError, match="shared_intermediate_size is False, only 0 is implemented"):
        read({**DECODERS["minimax_m2"], "shared_intermediate_size": False})


def test_qwen_says_in_two_ways_which_layers_are_dense() -> None:
    dense = {"num_hidden_layers": 4, "mlp_only_layers": [1], "decoder_sparse_step": 3, "intermediate_size": 6144}
    model = read({**QWEN3_30B, **dense})
    assert [model.has_experts(layer) for layer in range(4)] == [False, False, True, False]
    assert model_facts(model)["intermediate_size"] == 6144


def test_a_window_of_mixtral_is_that_of_every_layer() -> None:
    model = read({**DECODERS["mixtral"], "sliding_window": 4096})
    assert isinstance(model, DecoderConfig)
    assert {model.window(layer) for layer in range(32)} == {4096}


def test_kolibri_is_read_as_transformers_saves_it_and_means_windows_by_place() -> None:
    saved = {**DECODERS["kolibri1"], "num_local_experts": 384, "num_experts": None, "layer_types": None}
    assert read(saved) == read(DECODERS["kolibri1"])


def test_windows_of_dots1_are_in_its_last_layers() -> None:
    """As transformers: of 4096 tokens after 62 layers where nothing is said."""
    windowed = {**DECODERS["dots1"], "sliding_window": 4096, "max_window_layers": 60}
    model = read(windowed)
    assert isinstance(model, DecoderConfig)
    assert [model.window(layer) for layer in (0, 59, 60, 61)] == [None, None, 4096, 4096]
    listed = ["full_attention"] * 60 + ["sliding_attention"] * 2
    assert read({**windowed, "max_window_layers": None, "layer_types": listed}) == model
    silent = {key: value for key, value in windowed.items() if "window" not in key} | {"num_hidden_layers": 64}
    silent_model = read(silent)
    assert isinstance(silent_model, DecoderConfig)
    assert [silent_model.window(layer) for layer in (61, 62, 63)] == [None, 4096, 4096]


def test_k_exaone_knows_positions_where_it_has_windows_or_everywhere() -> None:
    by_number = {**DECODERS["exaone_moe"], "layer_types": None, "sliding_window_pattern": 4}
    assert read(by_number) == read(DECODERS["exaone_moe"])
    without = read({**by_number, "sliding_window": None})
    assert isinstance(without, DecoderConfig)
    assert {(without.window(layer), without.turns(layer)) for layer in range(48)} == {(None, True)}


def test_layers_of_laguna_with_windows_may_have_other_heads() -> None:
    heads = [48, 64, 64, 64] * 10
    model = read({**DECODERS["laguna"], "num_attention_heads_per_layer": heads})
    assert isinstance(model, DecoderConfig)
    assert [model.query_heads(layer) for layer in range(40)] == heads
    with pytest.raises(FormatError, match="swa_num_attention_heads is 60, expected a multiple of 8 heads of keys"):
        read({**DECODERS["laguna"], "num_attention_heads_per_layer": [48, 60, 60, 60] * 10})


def test_sarvam_30b_is_ling_2_turned_whole() -> None:
    silent = ("partial_rotary_factor", "score_function", "use_qk_norm", "routed_scaling_factor")
    config = {key: value for key, value in DECODERS["bailing_moe"].items() if key not in silent}
    sarvam = read({**config, "model_type": "sarvam_moe"})
    assert sarvam == replace(read(DECODERS["bailing_moe"]), rotary_dim=64)
    assert read({**DECODERS["bailing_moe"], "partial_rotary_factor": None, "rotary_dim": 64}) == sarvam


@pytest.mark.parametrize("model_type", ["mixtral", "granitemoe", "qwen3_moe", "olmoe", "dots1"])
def test_the_order_of_rotary_pairs_has_a_key_of_our_own(model_type: str) -> None:
    """What a GGUF file becomes says it; rope_interleave means nothing to these models in transformers."""
    published = DECODERS[model_type]
    model = read(published)
    assert isinstance(model, DecoderConfig)
    assert read({**published, "rope_interleave": True}) == model
    assert read({**published, "interleaved_rotary_pairs": True}) == replace(model, rope_interleave=True)


def test_gpt_oss_has_windows_in_every_second_layer() -> None:
    config = {key: value for key, value in DECODERS["gpt_oss"].items() if key != "layer_types"}
    model = read(config)
    assert isinstance(model, DecoderConfig)
    assert [model.window(layer) for layer in range(4)] == [128, None, 128, None]
    assert model == read(DECODERS["gpt_oss"])


@pytest.mark.parametrize(
    ("model_type", "key", "value", "message"),
    [
        ("qwen3_moe", "use_sliding_window", True, "use_sliding_window is True, only False is implemented"),
        ("qwen2_moe", "layer_types", ["sliding_attention"] * 24, "layer_types is .+, only .+ is implemented"),
        (
            "qwen3_moe",
            "rope_scaling",
            {"type": "su"},
            "type is su, only default, yarn, linear, dynamic and longrope are",
        ),
        ("qwen3_moe", "rope_scaling", {"type": "yarn"}, "rope_scaling.factor is missing"),
        ("qwen3_moe", "rope_parameters", {"rope_type": "llama3", "rope_theta": 1.0}, "rope_type is llama3, only"),
        ("qwen3_moe", "hidden_act", "gelu", "hidden_act is gelu, only 'silu' is implemented"),
        ("qwen3_moe", "num_experts_per_tok", 129, "num_experts_per_tok is 129, expected 1 to num_experts 128"),
        ("ernie4_5_moe", "moe_k", 65, "moe_k is 65, expected 1 to moe_num_experts 64"),
        ("mixtral", "num_experts_per_tok", 9, "num_experts_per_tok is 9, expected 1 to num_local_experts 8"),
        ("qwen3_moe", "num_key_value_heads", 5, "num_key_value_heads is 5, expected a divisor of"),
        ("qwen3_moe", "head_dim", 127, "head_dim is 127, expected an even number"),
        ("minimax_m2", "rotary_dim", 130, "rotary_dim is 130, expected at most head_dim 128"),
        ("qwen3_moe", "rope_theta", None, "rope_theta is missing"),
        ("qwen3_moe", "hidden_size", 0, "hidden_size is 0, expected an integer from 1"),
        ("qwen3_moe", "mlp_only_layers", [0], "intermediate_size is missing"),
        ("qwen2_moe", "shared_expert_intermediate_size", None, "shared_expert_intermediate_size is missing"),
        ("mixtral", "sliding_window", 0, "sliding_window is 0, expected an integer from 1"),
        ("olmoe", "clip_qkv", -1.0, "clip_qkv is -1.0, expected a number above 0"),
        ("granitemoe", "logits_scaling", 0, "logits_scaling is 0.0, expected a number other than 0"),
        ("glm4_moe", "partial_rotary_factor", 0.3, "partial_rotary_factor is 0.3, expected a share of head_dim 128"),
        ("glm4_moe", "n_group", 3, "n_group is 3, expected a divisor of n_routed_experts 128"),
        ("glm4_moe", "topk_group", 2, "topk_group is 2, expected 1 to n_group 1"),
        ("glm4_moe", "first_k_dense_replace", 47, "first_k_dense_replace is 47, expected an integer from 0 to 46"),
        ("flex_olmo", "clip_qkv", 8.0, "clip_qkv is 8.0, only nothing is implemented"),
        ("minimax_m2", "qk_norm_type", "per_head", "qk_norm_type is per_head, only 'per_layer' is implemented"),
        ("minimax_m2", "shared_intermediate_size", 1536, "shared_intermediate_size is 1536, only 0 is implemented"),
        ("minimax_m2", "attn_type_list", [0] * 62, r"attn_type_list is \[0, .*, only \[1, "),
        ("minimax_m2", "use_routing_bias", False, "use_routing_bias is False, only True is implemented"),
        ("gpt_oss", "attention_bias", False, "attention_bias is False, only True is implemented"),
        ("gpt_oss", "swiglu_alpha", 1.5, "swiglu_alpha is 1.5, only 1.702 is implemented"),
        ("gpt_oss", "layer_types", ["chunked_attention"] * 24, "layer_types is .*, expected only full_attention and"),
        ("gpt_oss", "sliding_window", None, "sliding_window is missing"),
        ("gpt_oss", "rope_scaling", {}, "rope_scaling is {}, expected a rope_type: transformers would take numbers"),
        ("gpt_oss", "rope_scaling", None, "rope_scaling is missing"),
        ("glm4_moe", "first_k_dense_replace", 46, "mlp_layer_types is .*, expected at least one layer with experts"),
        ("gpt_oss", "swiglu_limit", 0, "swiglu_limit is 0.0, expected a number above 0"),
        ("mimo_v2_flash", "swa_num_attention_heads", 32, "swa_num_attention_heads is 32, only 64 is implemented"),
        ("mimo_v2_flash", "swa_head_dim", 128, "swa_head_dim is 128, only 192 is implemented"),
        ("mimo_v2_flash", "swa_v_head_dim", 192, "swa_v_head_dim is 192, only 128 is implemented"),
        ("mimo_v2_flash", "add_swa_attention_sink_bias", False, "add_swa_attention_sink_bias is False, only True"),
        ("mimo_v2_flash", "add_full_attention_sink_bias", True, "add_full_attention_sink_bias is True, only False"),
        ("solar_open", "use_qk_norm", True, "use_qk_norm is True, only False is implemented"),
        ("solar_open", "first_k_dense_replace", 1, "first_k_dense_replace is 1, only 0 is implemented"),
        ("solar_open", "partial_rotary_factor", 0.5, "partial_rotary_factor is 0.5, only 1.0 is implemented"),
        ("solar_open", "head_dim", None, "head_dim is missing"),
        ("exaone_moe", "is_moe_layer", [True] * 48, r"is_moe_layer is \[True, .*, only \[False, True"),
        ("exaone_moe", "swiglu_limits", [7.0], r"swiglu_limits is \[7.0\], only nothing is implemented"),
        ("exaone_moe", "sliding_windows", [128], r"sliding_windows is \[128\], only nothing is implemented"),
        ("exaone_moe", "layer_types", None, "sliding_window_pattern is LLLG, expected an integer from 1"),
        ("kolibri1", "attention_bias", True, "attention_bias is True, only False is implemented"),
        ("kolibri1", "decoder_sparse_step", 2, "decoder_sparse_step is 2, only 1 is implemented"),
        ("kolibri1", "mlp_only_layers", [0], r"mlp_only_layers is \[0\], only \[\] is implemented"),
        ("kolibri1", "use_sliding_window", False, "use_sliding_window is False, only True is implemented"),
        ("kolibri1", "partial_rotary_factor", 0.5, "partial_rotary_factor is 0.5, only 1.0 is implemented"),
        ("kolibri1", "num_local_experts", 128, "num_local_experts is 128, only 384 is implemented"),
        ("kolibri1", "sliding_window", 0, "sliding_window is 0, expected an integer from 1"),
        ("kolibri1", "sliding_window", None, "sliding_window is missing"),
        ("kolibri1", "num_key_value_heads", None, "num_key_value_heads is missing"),
        ("kolibri1", "shared_expert_intermediate_size", None, "shared_expert_intermediate_size is missing"),
        ("kolibri1", "hidden_act", "gelu", "hidden_act is gelu, only 'silu' is implemented"),
        ("hy_v3", "mlp_bias", True, "mlp_bias is True, only False is implemented"),
        ("hy_v3", "route_norm", False, "route_norm is False, only True is implemented"),
        ("hy_v3", "expert_hidden_dim", 768, "expert_hidden_dim is 768, only 1536 is implemented"),
        ("hy_v3", "first_k_dense_replace", 2, "first_k_dense_replace is 2, only 1 is implemented"),
        ("hy_v3", "head_dim", None, "head_dim is missing"),
        ("hunyuan_v1_moe", "moe_topk", [8] * 31 + [4], r"moe_topk is \[8, .*, only one number for all layers is"),
        ("hunyuan_v1_moe", "num_shared_expert", [2] * 32, "num_shared_expert is 2, only 1 is implemented"),
        ("hunyuan_v1_moe", "moe_intermediate_size", 1024, "moe_intermediate_size is 1024, only 3072 is implemented"),
        ("hunyuan_v1_moe", "attention_head_dim", 64, "attention_head_dim is 64, only 128 is implemented"),
        ("hunyuan_v1_moe", "use_cla", True, "use_cla is True, only False is implemented"),
        ("hunyuan_v1_moe", "rope_scaling", {"type": "dynamic", "factor": 2.0}, "rope_scaling.alpha is missing"),
        ("hunyuan_v1_moe", "rope_scaling", {"type": "dynamic", "alpha": 0}, "rope_scaling.alpha is 0, expected a num"),
        ("hunyuan_v1_moe", "rope_scaling", {"type": "yarn"}, "type is yarn, only default and dynamic are implemented"),
        ("afmoe", "score_func", "softmax", "score_func is softmax, only 'sigmoid' is implemented"),
        ("afmoe", "route_norm", False, "route_norm is False, only True is implemented"),
        ("afmoe", "n_group", 2, "n_group is 2, only 1 is implemented"),
        ("afmoe", "num_shared_experts", 0, "num_shared_experts is 0, expected an integer from 1"),
        ("laguna", "gating", False, "gating is False, only True, per-head and per-element are implemented"),
        ("laguna", "num_attention_heads_per_layer", [48, 64] * 20, r"per_layer is \[48, .*, only one number for each"),
        ("laguna", "num_attention_heads_per_layer", [48], "per_layer is .*, expected 40 entries"),
        ("laguna", "moe_router_logit_softcapping", 1.0, "softcapping is 1.0, only 0.0 is implemented"),
        ("laguna", "rope_parameters", None, "rope_parameters is missing"),
        ("bailing_moe", "score_function", "softmax", "score_function is softmax, only 'sigmoid' is implemented"),
        ("bailing_moe", "score_function", None, "score_function is missing"),
        ("bailing_moe", "norm_head", True, "norm_head is True, only False is implemented"),
        ("bailing_moe", "use_qkv_bias", True, "use_qkv_bias is True, only False is implemented"),
        ("bailing_moe", "moe_shared_expert_intermediate_size", 512, "_size is 512, only 1024 is implemented"),
        ("bailing_moe", "partial_rotary_factor", None, "partial_rotary_factor is missing"),
        ("mellum", "use_sliding_window", False, "use_sliding_window is False, only True is implemented"),
        ("mellum", "layer_types", [], "layer_types is .*, expected an entry for each layer"),
        ("lfm2_moe", "conv_bias", True, "conv_bias is True, only False is implemented"),
        ("lfm2_moe", "conv_L_cache", 1, "conv_L_cache is 1, expected an integer from 2"),
        ("lfm2_moe", "layer_types", None, "layer_types is missing"),
        ("mimo_v2_flash", "n_shared_experts", 1, "n_shared_experts is 1, only nothing is implemented"),
        ("mimo_v2_flash", "scoring_func", "softmax", "scoring_func is softmax, only 'sigmoid' is implemented"),
        ("mimo_v2_flash", "topk_method", "greedy", "topk_method is greedy, only 'noaux_tc' is implemented"),
        ("mimo_v2_flash", "rope_scaling", {"type": "yarn", **ORIGINAL}, "rope_scaling is .*, only none is implemented"),
        ("mimo_v2_flash", "partial_rotary_factor", 1e308, r"partial_rotary_factor is 1e\+308, expected a share of"),
        ("mimo_v2_flash", "partial_rotary_factor", -0.5, "partial_rotary_factor is -0.5, expected a share of head_dim"),
        ("mimo_v2_flash", "swa_num_key_value_heads", 5, "swa_num_key_value_heads is 5, expected a divisor of"),
        ("mimo_v2_flash", "swa_rope_theta", 0, "swa_rope_theta is 0.0, expected a number of at least 1"),
        ("mimo_v2_flash", "hybrid_layer_pattern", None, "hybrid_layer_pattern is missing"),
        ("mimo_v2_flash", "hybrid_layer_pattern", [0, 1], "layer_types is .*, expected 48 entries"),
        ("mimo_v2_flash", "moe_layer_freq", 1, "moe_layer_freq is 1, expected a list"),
        ("mimo_v2_flash", "sliding_window_size", None, "sliding_window_size is missing"),
    ],
)
def test_what_a_decoder_does_not_implement_is_refused(model_type: str, key: str, value: Any, message: str) -> None:
    with pytest.raises(StreamingExpertsError, match=f"config.json: .*{message}"):
        read({**DECODERS[model_type], key: value})


def test_facts_of_one_family_are_not_those_of_another() -> None:
    facts = {**model_facts(HYBRID), "model_type": "qwen3_moe"}
    with pytest.raises(FormatError, match="x: attention_multiplier is missing"):
        read_model_facts(Fields(facts, "x"))


def test_an_index_older_than_a_fact_means_its_default_and_the_format_says_so() -> None:
    model = read(QWEN3_30B)
    facts, default = model_facts(model), {f.name: f.default for f in fields(DecoderConfig) if f.default is not MISSING}
    sentence = next(line for line in FORMAT.read_text().splitlines() if line.startswith("Containers that are older"))
    for key in facts:
        others = Fields({k: v for k, v in facts.items() if k != key}, "x")
        if key in default:
            assert read_model_facts(others) == replace(model, **{key: default[key]})
            assert f"`{key}`" in sentence
        else:
            with pytest.raises(FormatError, match=f"x: {key} is missing"):
                read_model_facts(others)


def test_qwen3_as_transformers_5_saves_it_is_read() -> None:
    saved = {key: value for key, value in QWEN3_30B.items() if key not in ("num_experts", "rope_theta", "rope_scaling")}
    saved |= {"num_local_experts": 128, "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0}}
    assert read(saved) == read(QWEN3_30B)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("use_bias", True, "text_config.use_bias is True, only False is implemented"),
        ("moe_norm_min", 0.5, "text_config.moe_norm_min is 0.5, only 1e-12 is implemented"),
        (
            "moe_intermediate_size",
            [1536],
            r"moe_intermediate_size is \[1536\], expected the widths of experts for text",
        ),
        ("mlp_layer_types", ["sparse"], "mlp_layer_types is .*, expected 28 entries"),
        ("rope_parameters", {"rope_type": "linear"}, "rope_type is linear, only default is implemented"),
        ("head_dim", 64, r"mrope_section is \[22, 22, 20\], only two equal numbers and a third, together half of head"),
    ],
)
def test_what_ernie_4_5_vl_does_not_implement_is_refused(key: str, value: Any, message: str) -> None:
    with pytest.raises(StreamingExpertsError, match=rf"^config.json: .*{message}"):
        read({**ERNIE_4_5_VL_28B, "text_config": {**ERNIE_4_5_VL_28B["text_config"], key: value}})


@pytest.mark.parametrize("sections", [[20, 24, 20], [32, 32, 0], [22, 22], [20, 20, 20]])
def test_sections_of_ernie_4_5_vl_that_text_does_not_turn_alike_are_refused(sections: list[int]) -> None:
    rope = {**ERNIE_4_5_VL_28B["text_config"]["rope_parameters"], "mrope_section": sections}
    with pytest.raises(StreamingExpertsError, match=r"rope_parameters\.mrope_section is .*, only two equal numbers"):
        read({**ERNIE_4_5_VL_28B, "text_config": {**ERNIE_4_5_VL_28B["text_config"], "rope_parameters": rope}})


def test_a_router_of_ernie_with_another_least_sum_is_refused() -> None:
    assert read({**DECODERS["ernie4_5_moe"], "moe_norm_min": 1e-12}) == read(DECODERS["ernie4_5_moe"])
    with pytest.raises(StreamingExpertsError, match=r"moe_norm_min is 0.5, only 1e-12 is implemented"):
        read({**DECODERS["ernie4_5_moe"], "moe_norm_min": 0.5})


@pytest.mark.parametrize("missing", [{}, {"rope_scaling": None}])
def test_gpt_oss_without_a_word_of_rope_scaling_is_refused(missing: dict[str, Any]) -> None:
    """transformers would take YaRN by a factor of 32."""
    config = {key: value for key, value in DECODERS["gpt_oss"].items() if key != "rope_scaling"}
    with pytest.raises(FormatError, match=r"config.json: rope_scaling is missing"):
        read(config | missing)


@pytest.mark.parametrize("config", DECODERS.values(), ids=DECODERS)
def test_attention_to_later_tokens_is_refused(config: dict[str, Any]) -> None:
    changed = copy.deepcopy(config)
    text = changed.get("thinker_config", changed)
    text.get("text_config", text)["is_causal"] = False
    with pytest.raises(UnsupportedError, match="is_causal is False, only True is implemented"):
        read(changed)
