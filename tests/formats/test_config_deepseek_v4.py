"""config.json of DeepSeek-V4-Flash: its values, and what is refused."""

import json
from typing import Any

import pytest

from formats.config import DeepseekV4Config, model_facts, read_config, read_model_facts
from formats.errors import StreamingExpertsError
from formats.fields import Fields
from repack.known_models import KNOWN_MODELS

FLASH: dict[str, Any] = dict(KNOWN_MODELS["deepseek-ai/DeepSeek-V4-Flash"])


def read(**changes: Any) -> DeepseekV4Config:
    model = read_config(json.dumps({**FLASH, **changes}).encode())
    assert isinstance(model, DeepseekV4Config)
    return model


def test_deepseek_v4_flash_is_read() -> None:
    model = read()
    assert [model.compress_rate(layer) for layer in (0, 1, 2, 3, 41, 42)] == [None, None, 4, 128, 128, 4]
    assert [model.has_indexer(layer) for layer in (1, 2, 3)] == [False, True, False]
    assert model.mlp_layer_types == ("hash_moe",) * 3 + ("moe",) * 40
    assert (model.head_dim, model.rotary_dim, model.num_key_value_heads) == (512, 64, 1)
    assert model.scores_per_token(1000) == 64 * 250
    assert (model.rope.theta, model.rope.scaling) == (10000, None)
    assert model.compress_rope.theta == 160000
    assert model.compress_rope.attention_factor == 1  # which YaRN would make 1.28
    assert read_model_facts(Fields(json.loads(json.dumps(model_facts(model))), "x")) == model


SAVED: dict[str, Any] = {  # what transformers 5.24's DeepseekV4Config.to_dict has instead of the published keys
    "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 128},
    "compress_ratios": None,
    "layer_types": [
        *["sliding_attention"] * 2,
        *["compressed_sparse_attention", "heavily_compressed_attention"] * 20,
        "compressed_sparse_attention",
    ],
    "mlp_layer_types": ["hash_moe"] * 3 + ["moe"] * 40,
    "num_hash_layers": None,
    "partial_rotary_factor": 0.125,
    "rope_parameters": {
        "compress": {
            "attention_factor": 1.0,
            "beta_fast": 32,
            "beta_slow": 1,
            "factor": 16,
            "original_max_position_embeddings": 65536,
            "partial_rotary_factor": 0.125,
            "rope_theta": 160000,
            "rope_type": "yarn",
            "type": "yarn",
        },
        "main": {"partial_rotary_factor": 0.125, "rope_theta": 10000, "rope_type": "default"},
    },
    "rope_scaling": None,
}


def test_a_config_that_transformers_saved_again_is_the_published_one() -> None:
    assert read(**SAVED) == read()
    assert read(**SAVED, rope_theta=1, compress_rope_theta=1) == read()  # which count for nothing there


@pytest.mark.parametrize(
    ("kind", "key", "value", "message"),
    [
        ("main", "rope_type", "yarn", "rope_type is yarn, only 'default' is implemented"),
        ("main", "rope_theta", None, "rope_theta is missing"),
        ("main", "rope_theta", 0.5, "rope_theta is 0.5, expected a number of at least 1"),
        ("compress", "rope_theta", 0.5, "rope_theta is 0.5, expected a number of at least 1"),
        ("compress", "beta_slow", 0, "beta_slow is 0.0, expected a number from 1/1048576 to 1048576"),
        ("main", "partial_rotary_factor", 0.5, "partial_rotary_factor is 0.5, expected 0.125 as qk_rope_head_dim is"),
        ("compress", "rope_type", "llama3", "rope_type is llama3, only default and yarn are implemented"),
        ("compress", "partial_rotary_factor", None, "partial_rotary_factor is missing"),
    ],
)
def test_other_angles_of_a_config_that_was_saved_again_are_refused(
    kind: str, key: str, value: Any, message: str
) -> None:
    parameters = SAVED["rope_parameters"]
    changed = parameters | {kind: parameters[kind] | {key: value}}
    with pytest.raises(StreamingExpertsError, match=f"config.json: rope_parameters.{kind}.{message}"):
        read(**SAVED | {"rope_parameters": changed})


def test_a_theta_beside_the_scaling_counts_for_nothing() -> None:
    """transformers puts compress_rope_theta in its place."""
    assert read(rope_scaling=FLASH["rope_scaling"] | {"rope_theta": 5e6}) == read()


def test_entries_are_what_grows_with_a_long_context() -> None:
    model = read()
    windows = model.cache_values(2**20, 512) - sum(2**20 // rate * width for rate, width, _ in model.compressors())
    assert windows == 43 * 2048 * 2 * 512
    assert model.cache_values(2**20, 512) * 4 < 15 << 30  # float32, at the whole context
    assert model.state_values == 21 * 4 * 2 * 4 * (512 + 128) + 20 * 128 * 2 * 512


def test_layers_and_rates_may_be_named() -> None:
    kinds = ["sliding_attention", "heavily_compressed_attention"] * 21 + ["compressed_sparse_attention"]
    rates = {"compressed_sparse_attention": 2, "heavily_compressed_attention": 16}
    model = read(layer_types=kinds, compress_rates=rates, mlp_layer_types=["moe"] * 43, num_hash_layers=None)
    assert [model.compress_rate(layer) for layer in (0, 1, 42)] == [None, 16, 2]
    assert set(model.mlp_layer_types) == {"moe"}


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("scoring_func", "sigmoid", "scoring_func is sigmoid, only 'sqrtsoftplus' is implemented"),
        ("norm_topk_prob", False, "norm_topk_prob is False, only True is implemented"),
        ("num_key_value_heads", 2, "num_key_value_heads is 2, only 1 is implemented"),
        ("n_shared_experts", 2, "n_shared_experts is 2, only 1 is implemented"),
        ("hidden_act", "gelu", "hidden_act is gelu, only 'silu' is implemented"),
        ("attention_bias", True, "attention_bias is True, only False is implemented"),
        ("topk_method", "greedy", "topk_method is greedy, only 'noaux_tc' is implemented"),
        ("partial_rotary_factor", 0.25, "partial_rotary_factor is 0.25, expected 0.125 as qk_rope_head_dim is of"),
        ("rope_parameters", {"main": {}}, "rope_scaling is .*, only nothing is implemented"),
        ("rope_scaling", {"type": "linear"}, "rope_scaling.type is linear, only default and yarn are implemented"),
        ("compress_ratios", [0, 8] * 22, "compress_ratios has 8, only 0, 4, 128 are implemented"),
        ("compress_ratios", [0, 4], "layer_types is .*, expected 43 entries"),
        ("compress_ratios", None, "compress_ratios is missing"),
        ("layer_types", ["full_attention"] * 43, "layer_types is .*, expected only sliding_attention, "),
        ("mlp_layer_types", ["dense"] * 43, "mlp_layer_types is .*, expected only hash_moe and moe"),
        ("mlp_layer_types", ["moe"], "mlp_layer_types is .*, expected 43 entries"),
        (
            "compress_rates",
            {"compressed_sparse_attention": 4},
            "compress_rates.heavily_compressed_.* is missing",
        ),
        ("o_groups", 7, "o_groups is 7, expected a divisor of num_attention_heads 64"),
        ("index_head_dim", 32, "index_head_dim is 32, expected qk_rope_head_dim 64 or more"),
        ("qk_rope_head_dim", 63, "qk_rope_head_dim is 63, expected an even number"),
        ("compress_rope_theta", 0, "compress_rope_theta is 0.0, expected a number of at least 1"),
        ("compress_rope_theta", 1, "compress_rope_theta is 1.0, expected a number above 1, of which YaRN"),
        ("swiglu_limit", 0, "swiglu_limit is 0.0, expected a number above 0"),
        ("hc_eps", 0, "hc_eps is 0.0, expected a number above 0"),
        ("hc_mult", 0, "hc_mult is 0, expected an integer from 1 to 64"),
        ("hc_sinkhorn_iters", 0, "hc_sinkhorn_iters is 0, expected an integer from 1"),
        ("index_topk", None, "index_topk is missing"),
    ],
)
def test_what_deepseek_v4_does_not_implement_is_refused(key: str, value: Any, message: str) -> None:
    with pytest.raises(StreamingExpertsError, match=f"config.json: .*{message}"):
        read(**{key: value})


@pytest.mark.parametrize(("key", "bound"), [("hc_mult", 64), ("hc_sinkhorn_iters", 1000)])
def test_absurd_counts_in_an_index_are_refused(key: str, bound: int) -> None:
    facts = json.loads(json.dumps(model_facts(read()))) | {key: 2**31}
    with pytest.raises(StreamingExpertsError, match=f"index.json: model.{key} is 2147483648, expected at most {bound}"):
        read_model_facts(Fields(facts, "index.json: model"))
