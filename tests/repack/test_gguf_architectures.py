"""Metadata of GGUF files alone: what llama.cpp's converter recorded of the tiny checkpoints, and changes of it."""

import re
from contextlib import suppress
from typing import Any

import pytest

from formats.errors import FormatError, StreamingExpertsError, UnsupportedError
from repack.sources.gguf_keys import Config
from repack.sources.gguf_models import architecture_of
from tests.gguf_files import CHECKPOINTS, recorded

WRONG: tuple[Any, ...] = ("x", 0, -1, [], True, 1.5, None, 2**70)
RECORDED = {name: recorded(name) for name in CHECKPOINTS}


def config_of(name: str, **changes: Any) -> Config:
    """config.json of a recorded file whose metadata are changed; None leaves one out."""
    return config_and_notes(name, **changes)[0]


def config_and_notes(name: str, **changes: Any) -> tuple[Config, list[str]]:
    record = RECORDED[name]
    architecture = record["metadata"]["general.architecture"]
    changed = {f"{architecture}.{key.replace('__', '.')}": value for key, value in changes.items()}
    metadata = {key: value for key, value in (record["metadata"] | changed).items() if value is not None}
    shapes = {name: shape for name, (shape, *_) in record["tensors"].items()}
    known, keys = architecture_of(metadata, shapes, None, "m.gguf")
    return known.config(keys), keys.notes


def test_a_glm_5_that_lists_no_layers_has_indexers_where_their_tensors_are() -> None:
    assert config_of("glm_moe_dsa", attention__indexer__types=None) == config_of("glm_moe_dsa")
    assert config_of("glm_moe_dsa")["indexer_types"] == ["full", "shared", "full"]


def test_layers_of_deepseek_v4_without_heavy_compression_have_the_published_rate() -> None:
    config = config_of("deepseek_v4_gguf", attention__compress_ratios=[0, 4, 0, 4, 0])
    assert config["compress_rates"] == {"compressed_sparse_attention": 4, "heavily_compressed_attention": 128}


@pytest.mark.parametrize(
    ("name", "experts", "groups"),
    [("deepseek_v2_groups", 160, (8, 3)), ("deepseek_v3_gguf", 256, (8, 4)), ("deepseek_v2_groups", 64, (1, 1))],
)
def test_a_deepseek_of_an_older_converter_has_the_groups_of_the_published_models_and_says_so(
    name: str, experts: int, groups: tuple[int, int]
) -> None:
    left_out = {"expert_group_count": None, "expert_group_used_count": None}
    config, notes = config_and_notes(name, expert_count=experts, **left_out)
    assert (config["n_group"], config["topk_group"]) == groups
    assert len(notes) == (groups != (1, 1))
    assert all(
        f"expert_group_count is missing, as in files of older converters: taken for {groups[0]} groups" in note
        for note in notes
    )
    assert config_and_notes(name)[1] == []


def test_a_flash_next_without_n_grams_has_no_layer_of_them() -> None:
    assert config_of("qwen4_exp_gguf", ple__layers=None)["ple_layer_ids"] == []


def test_a_nemotron_3_has_layers_as_heads_and_widths_say_and_a_latent_or_none() -> None:
    config = config_of("nemotron_h_super_gguf")
    kinds = ["mamba", "moe", "mamba", "attention", "moe", "mamba", "moe"]
    assert (config["layers_block_type"], config["num_key_value_heads"]) == (kinds, 2)
    assert config["moe_latent_size"] == 32
    assert config_of("nemotron_h_gguf")["moe_latent_size"] is None
    both = {"attention__layer_norm_rms_epsilon": 1e-6}
    assert config_of("nemotron_h_gguf", **both)["layer_norm_epsilon"] == 1e-6
    assert config["layer_norm_epsilon"] == 1e-5


def test_a_laguna_without_windows_has_one_kind_of_layers() -> None:
    config = config_of("laguna_gguf", attention__sliding_window=None)
    assert config["layer_types"] == ["full_attention"] * 5
    listed = config_of("laguna_gguf", attention__sliding_window_pattern=[True] * 5)
    assert listed["layer_types"] == ["sliding_attention"] * 5


def test_a_mistral_small_4_that_says_nothing_of_its_queries_has_the_published_growth_and_says_so() -> None:
    config, notes = config_and_notes("mistral4_gguf")
    assert config["rope_scaling"]["llama_4_scaling_beta"] == 0.1
    assert "mistral4.attention.temperature_scale is missing" in notes[0]
    config, notes = config_and_notes("mistral4_gguf", attention__temperature_scale=0.25)
    assert (config["rope_scaling"]["llama_4_scaling_beta"], notes) == (0.25, [])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope__dimension_count": 8}, "rope.dimension_count is 8, only 16 is implemented"),
        ({"rope__scaling__attn_factor": 1.2}, "rope.scaling.attn_factor is 1.2, only 1.0 is implemented"),
        ({"rope__scaling__factor": 4.0}, "rope.scaling.factor is 4.0, only 1.0 or 0.0 is implemented"),
    ],
)
@pytest.mark.parametrize("name", ["exaone_moe", "hy_v3", "qwen3_moe"])
def test_positions_that_turn_otherwise_are_refused(name: str, changes: dict[str, Any], message: str) -> None:
    unscaled = {"rope__scaling__type": None} | changes
    head_dim = config_of(name)["head_dim"]
    with pytest.raises(UnsupportedError, match=re.escape(message.replace("only 16", f"only {head_dim}"))):
        config_of(name, **unscaled)


def test_a_head_that_knows_no_positions_may_say_how_much_of_it_turns() -> None:
    assert config_of("granitemoehybrid", rope__dimension_count=8) == config_of("granitemoehybrid")


def test_limits_of_the_shared_expert_may_be_missing() -> None:
    assert config_of("deepseek_v4_gguf", swiglu_clamp_shexp=None)["swiglu_limit"] == 1.5


@pytest.mark.parametrize(
    ("name", "changes", "error", "message"),
    [
        (
            "deepseek_v4_gguf",
            {"attention__compress_ratios": [0, 4, 8, 4, 16]},
            UnsupportedError,
            "deepseek4.attention.compress_ratios has [8, 16], only one beside 0 and 4 is implemented",
        ),
        (
            "deepseek_v4_gguf",
            {"attention__compress_ratios": [0, 4]},
            FormatError,
            "deepseek4.attention.compress_ratios is [0, 4], expected a list of 5 or more int",
        ),
        (
            "deepseek_v4_gguf",
            {"swiglu_clamp_shexp": [2.0] * 5},
            UnsupportedError,
            "deepseek4.swiglu_clamp_exp and swiglu_clamp_shexp have [1.5, 2.0], only one limit is implemented",
        ),
        (
            "mimo_v2_flash",
            {"attention__head_count_kv": [1, 2, 4, 1, 2, 2, 2]},
            UnsupportedError,
            "mimo2.attention.head_count_kv differs among layers of one kind",
        ),
        (
            "qwen4_exp_gguf",
            {"ple__layer_multipliers": [1, 3, 5]},
            UnsupportedError,
            "qwen4exp.ple.layer_multipliers is [1, 3, 5], only [112381549946653559, 107512210695146523, ",
        ),
        (
            "qwen4_exp_gguf",
            {"ple__head_vocab_sizes": [2**40, 3, 5, 7]},
            FormatError,
            "qwen4exp.ple.head_vocab_sizes is [1099511627776, 3, 5, 7], expected rows of per_layer_token_embd.weight",
        ),
        (
            "qwen4_exp_gguf",
            {"ple__layers": [3]},
            UnsupportedError,
            "qwen4exp.ple.layers is [3], only [1] is implemented",
        ),
        (
            "glm_moe_dsa",
            {"attention__indexer__types": [True]},
            FormatError,
            "glm-dsa.attention.indexer.types is [True], expected a list of 3 bool",
        ),
        (
            "bailing_hybrid",
            {"kda__safe_gate": False},
            UnsupportedError,
            "bailingmoe3.kda.safe_gate is False, only True is implemented",
        ),
        (
            "nemotron_h_gguf",
            {"expert_used_count": [0, 3, 0, 0, 2, 0, 3]},
            FormatError,
            "nemotron_h_moe.expert_used_count is [0, 3, 0, 0, 2, 0, 3], expected a number",
        ),
        (
            "nemotron_h_gguf",
            {"attention__head_count_kv": [0, 2, 0, 4, 0, 0, 0]},
            UnsupportedError,
            "nemotron_h_moe.attention.head_count_kv is [0, 2, 0, 4, 0, 0, 0], only 0 and one other number are",
        ),
        (
            "nemotron_h_gguf",
            {"ssm__inner_size": 100},
            FormatError,
            "nemotron_h_moe.ssm.inner_size is 100, expected a multiple of the 8 heads of ssm.time_step_rank",
        ),
        (
            "granitemoehybrid",
            {"rope__scaling__finetuned": None},
            UnsupportedError,
            "granitehybrid.rope.scaling.finetuned is True, only False is implemented",
        ),
        (
            "exaone_moe",
            {"attention__sliding_window_pattern": 4},
            FormatError,
            "exaone-moe.attention.sliding_window_pattern is 4, expected a list of 3 or more bool",
        ),
        (
            "minimax_m3_gguf",
            {"leading_dense_block_count": [1]},
            FormatError,
            "minimax-m3.leading_dense_block_count is [1], expected a whole number",
        ),
        (
            "deepseek_v3_gguf",
            {"attention__temperature_scale": 0.1},
            UnsupportedError,
            "deepseek2.attention.temperature_scale is 0.1, only 0 is implemented",
        ),
        (
            "kimi_linear_gguf",
            {"attention__head_count_kv": 1},
            FormatError,
            "kimi-linear.attention.head_count_kv is 1, expected a list of 5 int",
        ),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(
    name: str, changes: Config, error: type[StreamingExpertsError], message: str
) -> None:
    with pytest.raises(error, match=re.escape(f"m.gguf: {message}")):
        config_of(name, **changes)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_no_value_of_any_key_is_more_than_one_clear_line(name: str) -> None:
    """What is not refused here is when config.json is read."""
    record = RECORDED[name]
    prefix = f"{record['metadata']['general.architecture']}."
    for key in (key.removeprefix(prefix) for key in record["metadata"] if key.startswith(prefix)):
        for value in WRONG:
            with suppress(StreamingExpertsError):
                config_of(name, **{key.replace(".", "__"): value})
