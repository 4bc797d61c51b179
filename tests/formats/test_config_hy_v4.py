"""Hunyuan 4's config.json: as public readers state the published one, and what is refused."""

import json
from typing import Any

import pytest

from formats.config import Activation, HyV4Config, Indexer, model_facts, read_model_facts
from formats.errors import StreamingExpertsError
from formats.fields import Fields
from repack.known_models import KNOWN_MODELS
from tests.fixtures.hy_v4_tiny import HY_V4_VL
from tests.formats.published import read

PREVIEW = dict(KNOWN_MODELS["tencent/Hy4-preview"])
SPARSE = ["deepseek_sparse_attention"]


def preview(taken: str = "", **changes: Any) -> dict[str, Any]:
    """With other values; a key may be taken."""
    return {key: value for key, value in (PREVIEW | changes).items() if key != taken}


def read_preview(taken: str = "", **changes: Any) -> HyV4Config:
    model = read(preview(taken, **changes))
    assert isinstance(model, HyV4Config)
    return model


def test_the_published_config_becomes_facts() -> None:
    model = read_preview(layer_types=SPARSE * 78, num_key_value_heads=8)
    assert (model.num_experts, model.top_k, model.head_dim, model.num_key_value_heads) == (256, 8, 256, 64)
    assert model.indexer == Indexer(32, 128, 2048, rope_interleave=True)
    assert model.rope.interleaved
    choosing = [layer for layer, kind in enumerate(model.layer_types) if kind == "indexed_attention"]
    assert choosing == [0, *range(1, 78, 4)]
    assert model.expert_activation == Activation("silu_clamped", limit=10.0)
    assert [model.has_experts(layer) for layer in (0, 1)] == [False, True]
    assert (model.hc_mult, model.hc_magnitude, model.hc_eps, model.attention_scale) == (4, 2.0, 1e-6, 1 / 16)
    assert model.cache_values(4096, 64) == 4096 * (78 * 576 + 21 * 128)
    assert read_model_facts(Fields(model_facts(model), "x")) == model


def test_the_vision_model_says_the_same_in_its_text_config() -> None:
    text = preview("tie_word_embeddings", model_type="hy_v4_vl_text")
    text["rope_parameters"] = {"rope_theta": 1e7, "rope_type": "default", "mrope_section": [12, 10, 10]}
    model = read({"model_type": "hy_v4_vl", "text_config": text, "tie_word_embeddings": False})
    assert model == read_preview()


def test_layers_choose_as_listed() -> None:
    listed = read_preview(indexer_types=["full", "shared"] * 39).layer_types
    assert listed == ("indexed_attention", "shared_index_attention") * 39


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act is gelu, only 'silu' is implemented"),
        ({"attention_bias": True}, "attention_bias is True, only False is implemented"),
        ({"enable_ihc": False}, "enable_ihc is False, only True is implemented"),
        ({"gated_mla": False}, "gated_mla is False, only True is implemented"),
        ({"gating_type": "headwise"}, "gating_type is headwise, only 'elementwise' is implemented"),
        ({"learnable_sink": False}, "learnable_sink is False, only True is implemented"),
        ({"rope_interleave": False}, "rope_interleave is False, only True is implemented"),
        ({"indexer_rope_interleave": False}, "indexer_rope_interleave is False, only True is implemented"),
        ({"index_topk_freq": 2}, "index_topk_freq is 2, only 4 is implemented"),
        ({"index_topk_pattern": "F" * 78}, "index_topk_pattern is F*..., only nothing is implemented"),
        ({"first_k_dense_replace": 3}, "first_k_dense_replace is 3, only 1 is implemented"),
        ({"sliding_window": 128}, "sliding_window is 128, only nothing is implemented"),
        ({"scoring_func": "softmax"}, "scoring_func is softmax, only 'sigmoid' is implemented"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5, only 1.0 is implemented"),
        ({"layer_types": ["full_attention"] * 78}, "layer_types is .*, expected 78 times indexed_attention"),
        ({"layer_types": SPARSE * 77}, "layer_types is .*, expected 78 times indexed_attention"),
        ({"indexer_types": ["full"] * 77}, "indexer_types is .*, expected 78 entries"),
        ({"indexer_types": ["shared"] * 78}, "layer_types is .*, expected indexed_attention first"),
        ({"index_head_dim": 32}, "index_head_dim is 32, expected qk_rope_head_dim 64 or more"),
        ({"n_group": 256, "topk_group": 8}, "n_group is 256, expected groups of two experts or more"),
        ({"hc_mult": 65}, "hc_mult is 65"),
        ({"hc_magnitude": 0.0}, "hc_magnitude is 0.0, expected a number from"),
        ({"hc_eps": 0.0}, "hc_eps is 0.0, expected a number above 0"),
        ({"swiglu_limit": 0.0}, "swiglu_limit is 0.0, expected a number above 0"),
        ({"model_type": "hy_v4_vl"}, "text_config is missing"),
    ],
)
def test_what_is_not_implemented_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(StreamingExpertsError, match=f"config.json: {message}"):
        read(preview(**change))


def test_another_text_model_in_the_vision_model_is_refused() -> None:
    other = HY_V4_VL | {"text_config": HY_V4_VL["text_config"] | {"model_type": "hy_v4"}}
    with pytest.raises(StreamingExpertsError, match=r"text_config\.model_type is hy_v4, only 'hy_v4_vl_text'"):
        read(json.loads(json.dumps(other)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"indexer": None}, "indexer is None, expected an object"),
        ({"kv_b_split": True}, "kv_b_split is True, expected false"),
        ({"post_mlp_norm": True}, "post_mlp_norm is True, expected false"),
        ({"num_key_value_heads": 1}, "num_key_value_heads is 1, expected 64, as num_attention_heads"),
    ],
)
def test_an_index_that_says_what_the_model_has_not_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(StreamingExpertsError, match=message):
        read_model_facts(Fields(model_facts(read_preview()) | change, "index.json: model"))
