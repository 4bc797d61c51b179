"""Mistral Large 4's config.json: as transformers names the published model, and what is refused."""

from typing import Any

import numpy as np
import pytest

from formats.config import MistralLarge4Config, model_facts, read_model_facts
from formats.errors import StreamingExpertsError
from formats.fields import Fields
from tests.formats.published import MISTRAL_LARGE_4, read


def large4(**changes: Any) -> dict[str, Any]:
    """With another text_config; None takes a key away."""
    text = MISTRAL_LARGE_4["text_config"] | changes
    return MISTRAL_LARGE_4 | {"text_config": {key: value for key, value in text.items() if value is not None}}


def read_large4(**changes: Any) -> MistralLarge4Config:
    model = read(large4(**changes))
    assert isinstance(model, MistralLarge4Config)
    return model


def test_the_published_config_becomes_facts() -> None:
    model = read_large4()
    assert (model.num_experts, model.top_k, model.head_dim, model.scoring_func) == (128, 4, 128, "softmax")
    assert [model.rope_dim(layer) for layer in range(4)] == [64, 64, 64, 0]
    assert all(map(model.owns_latents, range(72)))
    assert model.cache_values(64, 64) == 64 * (54 * (512 + 64) + 18 * 512 + 72 * 128)
    assert read_model_facts(Fields(model_facts(model), "x")) == model


def test_layers_that_share_have_no_cache_of_their_own() -> None:
    sources = [*range(4), *(3 if layer % 4 == 3 else 2 for layer in range(4, 72))]
    model = read_large4(kv_source_layers=sources, indexer_types=["full"] * 3 + ["shared"] * 69)
    assert model.readers(3) == list(range(3, 72, 4))
    assert model.cache_values(64, 64) == 64 * (3 * (512 + 64) + 512 + 3 * 128)
    assert read_model_facts(Fields(model_facts(model), "x")) == model


def test_learned_angles_multiply_those_of_yarn() -> None:
    rope = read_large4().rope
    learned = rope.__class__(rope.theta, rope.dim, scaling=rope.scaling, learned=(0.5,) * 32)
    np.testing.assert_allclose(learned.inv_freq, rope.inv_freq * np.exp(0.5))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mistral4"}, "model_type is mistral4, only 'mistral_large4_text' is implemented"),
        ({"hidden_act": "gelu"}, "hidden_act is gelu, only 'silu' is implemented"),
        ({"attention_bias": True}, "attention_bias is True, only False is implemented"),
        ({"n_group": 2}, "n_group is 2, only 1 is implemented"),
        ({"norm_topk_prob": False}, "norm_topk_prob is False, only True is implemented"),
        ({"num_key_value_heads": 32}, "num_key_value_heads is 32, only 64 is implemented"),
        ({"layer_types": ["full_attention"] * 72}, "layer_types is .*, only .* is implemented"),
        ({"rope_parameters": None}, "rope_theta is missing"),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial_rotary_factor is 0.5, only"),
        ({"indexer_types": ["shared"] * 72}, "layer_types is .*, expected indexed_attention first"),
        ({"index_head_dim": 32}, "index_head_dim is 32, expected qk_rope_head_dim 64 or more"),
        ({"no_rope_layers": [1, 0]}, "no_rope_layers is .*, expected 72 entries"),
        ({"no_rope_layers": [2] * 72}, "no_rope_layers is .*"),
        ({"kv_source_layers": [0]}, "kv_source_layers is .*, expected 72 entries"),
        ({"kv_source_layers": [0, 2, *range(2, 72)]}, "kv_source_layers is .*, expected for layer 1 itself"),
        ({"kv_source_layers": [0, 1, 2, 2, *range(4, 72)]}, "kv_source_layers is .*, expected for layer 3 itself"),
        ({"kv_source_layers": [0, 0, 2, 3, 2, 0, *range(6, 72)]}, "kv_source_layers is .*, expected for layer 5"),
        ({"final_logit_softcapping": 0.0}, "final_logit_softcapping is 0.0, expected a number above 0"),
        ({"final_logit_softcapping": None}, "final_logit_softcapping is missing"),
    ],
)
def test_what_is_not_implemented_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(StreamingExpertsError, match=f"config.json: text_config.*{message}"):
        read(large4(**change))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("q_lora_rank", 64, "q_lora_rank is 64, expected null"),
        ("kv_b_split", True, "kv_b_split is True, expected false"),
        ("post_mlp_norm", True, "post_mlp_norm is True, expected false"),
    ],
)
def test_an_index_of_another_attention_is_refused(key: str, value: Any, message: str) -> None:
    facts = model_facts(read_large4()) | {key: value}
    with pytest.raises(StreamingExpertsError, match=message):
        read_model_facts(Fields(facts, "index.json: model"))


def test_an_index_without_an_indexer_is_refused() -> None:
    facts = model_facts(read_large4()) | {"indexer": None, "layer_types": ["full_attention"] * 72}
    with pytest.raises(StreamingExpertsError, match="indexer is None, expected an object"):
        read_model_facts(Fields(facts, "index.json: model"))
