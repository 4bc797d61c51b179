"""GLM-5.3-Flash's config.json: as transformers names the published model, and what is refused."""

from typing import Any

import pytest

from formats.config import Activation, Glm5NextConfig, Indexer, model_facts, read_model_facts
from formats.errors import StreamingExpertsError
from formats.fields import Fields
from tests.formats.published import GLM_5_3_FLASH, LONGCAT_FLASH, read

INDEXED = ["indexed_attention"] * 45


def flash(taken: str = "", **changes: Any) -> dict[str, Any]:
    """With another text_config, from which a key may be taken."""
    text = GLM_5_3_FLASH["text_config"] | changes
    return GLM_5_3_FLASH | {"text_config": {key: value for key, value in text.items() if key != taken}}


def read_flash(taken: str = "", **changes: Any) -> Glm5NextConfig:
    model = read(flash(taken, **changes))
    assert isinstance(model, Glm5NextConfig)
    return model


def test_the_published_config_becomes_facts() -> None:
    model = read_flash()
    assert (model.num_experts, model.top_k, model.head_dim, model.scoring_func) == (288, 8, 256, "sigmoid")
    assert model.indexer == Indexer(32, 128, 2048, rope_interleave=False)
    assert model.layer_types.count("indexed_attention") == 11
    assert model.expert_activation == Activation("silu_clamped", limit=10.0)
    assert [model.has_experts(layer) for layer in (2, 3)] == [False, True]
    assert model.cache_values(4096, 64) == 11 * (4096 * 512 + 256 * 128)
    of_delta = 34 * (64 * 128 * 128 + 3 * 3 * 64 * 128)
    assert model.state_values == of_delta + 11 * 2 * 16 * 128
    assert read_model_facts(Fields(model_facts(model), "x")) == model


def test_linear_attn_config_goes_before_what_is_said_beside_it() -> None:
    said = {"num_heads": 32, "head_dim": 64, "short_conv_kernel_size": 3, "gate_lower_bound": -2.0}
    model = read_flash(linear_attn_config=said)
    assert (model.linear_num_heads, model.linear_head_dim, model.linear_conv_kernel_dim) == (32, 64, 3)
    assert model.gate_lower_bound == -2


@pytest.mark.parametrize(
    ("taken", "change", "bound"),
    [
        ("linear_lower_bound", {}, -5.0),
        ("", {"linear_lower_bound": None}, None),
        ("", {"linear_lower_bound": None, "linear_attn_config": {}}, -5.0),
        ("", {"linear_attn_config": {"gate_lower_bound": None, "safe_gate": False}}, None),
    ],
)
def test_a_bound_of_decays_is_null_by_word_alone(taken: str, change: dict[str, Any], bound: float | None) -> None:
    assert read_flash(taken, **change).gate_lower_bound == bound


def test_layers_may_share_the_choice_of_the_layer_before() -> None:
    model = read_flash(layer_types=["full_attention"] * 45, index_topk_pattern="FS" * 22 + "F")
    assert model.layer_types.count("shared_index_attention") == 22


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "glm5_next"}, "model_type is glm5_next, only 'glm5_next_text' is implemented"),
        ({"hidden_act": "gelu"}, "hidden_act is gelu, only 'silu' is implemented"),
        ({"attention_bias": True}, "attention_bias is True, only False is implemented"),
        ({"qk_rope_head_dim": 64}, "qk_rope_head_dim is 64, only 0 is implemented"),
        ({"num_key_value_heads": 32}, "num_key_value_heads is 32, only 64 is implemented"),
        ({"index_kpool_always_select_tail": False}, "index_kpool_always_select_tail is False, only True"),
        ({"index_kpool": 3}, "index_kpool is 3, expected a divisor of index_topk 2048"),
        ({"first_k_dense_replace": 1}, "first_k_dense_replace is 1, only 3 is implemented"),
        ({"q_lora_rank": None}, "q_lora_rank is missing"),
        ({"linear_lower_bound": 1.0}, "linear_lower_bound is 1.0, expected a number below 0"),
        ({"swiglu_limit": 0.0}, "swiglu_limit is 0.0, expected a number above 0"),
        ({"hc_mult": 65}, "hc_mult is 65"),
        ({"layer_types": ["sliding_attention"] * 45}, "layer_types is .*, expected only linear_attention"),
        ({"layer_types": INDEXED[1:]}, "layer_types is .*, expected 45 entries"),
        ({"index_topk_pattern": "FFF"}, "index_topk_pattern is FFF, expected 45 entries"),
        ({"layer_types": INDEXED, "index_topk_pattern": "FSS" * 15}, "layer_types is .*, expected shared_index_"),
        ({"index_topk_pattern": "FFF" + "S" * 42}, "layer_types is .*, expected shared_index_attention only behind"),
    ],
)
def test_what_is_not_implemented_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(StreamingExpertsError, match=f"config.json: text_config.*{message}"):
        read(flash(**change))


def test_an_index_without_an_indexer_is_refused() -> None:
    facts = model_facts(read_flash()) | {"indexer": None}
    with pytest.raises(StreamingExpertsError, match="indexer is None, expected an object"):
        read_model_facts(Fields(facts, "index.json: model"))


def test_nothing_turns_in_no_other_model() -> None:
    facts = model_facts(read_flash())
    assert (facts["rotary_dim"], facts["qk_rope_head_dim"]) == (0, 0)
    other = model_facts(read(LONGCAT_FLASH)) | {"rotary_dim": 0, "qk_rope_head_dim": 0}
    with pytest.raises(StreamingExpertsError, match="rotary_dim is 0, expected at most head_dim"):
        read_model_facts(Fields(other, "index.json: model"))
