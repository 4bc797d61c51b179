"""config.json of Llama 4: chunks, layers without positions, and a scale that grows there."""

import math
from typing import Any

import pytest

from formats.errors import StreamingExpertsError
from tests.formats.published import DECODERS, LLAMA_4_SCOUT_TEXT, llama4, read


def test_the_text_of_llama_4_is_the_same_alone() -> None:
    assert llama4() == read(DECODERS["llama4"])


def test_whether_the_head_of_llama_4_is_tied_is_the_text_s_to_say() -> None:
    """Its whole model ties nothing in transformers; the language model within does."""
    text = {**LLAMA_4_SCOUT_TEXT, "tie_word_embeddings": True}
    assert read({"model_type": "llama4", "text_config": text, "tie_word_embeddings": False}).tie_word_embeddings
    whole = {"model_type": "llama4", "text_config": LLAMA_4_SCOUT_TEXT, "tie_word_embeddings": True}
    assert not read(whole).tie_word_embeddings


def test_llama_4_says_in_two_ways_which_layers_have_experts_and_which_know_positions() -> None:
    changes = {"num_hidden_layers": 6, "interleave_moe_layer_step": 2, "no_rope_layer_interval": 3}
    model = llama4(**changes)
    assert [model.has_experts(layer) for layer in range(6)] == [False, True] * 3
    assert [model.turns(layer) for layer in range(6)] == [True, True, False] * 2
    assert [model.chunk(layer) for layer in range(6)] == [8192, 8192, None] * 2
    listed = {"num_hidden_layers": 6, "moe_layers": [1, 3, 5], "no_rope_layers": [1, 1, 0] * 2}
    assert llama4(**listed) == model
    assert llama4(no_rope_layers=[]) == llama4()  # as the first published files have it


@pytest.mark.parametrize(("tuned", "known"), [(4, True), (True, True), (0, False), (False, False)])
def test_the_temperature_of_llama_4_is_a_number_or_a_choice(tuned: Any, known: bool) -> None:
    model = llama4(attn_temperature_tuning=tuned)
    assert (model.attention_temperature is not None) == known


def test_the_scale_of_scores_grows_with_position_where_there_are_no_positions() -> None:
    model, plain = llama4(), 1 / math.sqrt(128)
    assert model.attention_scale(0, 10**6) == plain
    assert [model.attention_scale(3, position) for position in (0, 8190)] == [plain, plain]
    assert model.attention_scale(3, 8191) == pytest.approx(plain * (1 + 0.1 * math.log(2)))
    assert model.attention_scale(3, 81920) == pytest.approx(plain * (1 + 0.1 * math.log(11)))


def test_a_run_of_tokens_shares_a_chunk_and_a_scale() -> None:
    model = llama4()
    assert [model.run_length(0, position, 500) for position in (0, 8000, 8191, 8192)] == [500, 192, 1, 500]
    assert [model.run_length(3, position, 500) for position in (0, 8000, 8190, 8191)] == [500, 191, 1, 500]
    assert llama4(attn_temperature_tuning=False).run_length(3, 8000, 500) == 500


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("rope_scaling", {"rope_type": "yarn"}, "rope_type is yarn, only default, llama3 and factors are"),
        ("rope_scaling", {"rope_type": "llama3"}, "factor is missing"),
        ("layer_types", ["full_attention"] * 48, "layer_types is .*, only chunked_attention in layers with positions"),
        ("no_rope_layers", [1, 0], "no_rope_layers is .*, expected 48 entries"),
        ("no_rope_layers", [2] * 48, "no_rope_layers"),
        ("moe_layers", [48], "moe_layers"),
        ("attention_chunk_size", None, "attention_chunk_size is missing"),
        ("attention_chunk_size", 0, "attention_chunk_size is 0, expected an integer from 1"),
        ("attn_temperature_tuning", "yes", "attn_temperature_tuning is yes, expected true, false or an integer"),
        ("floor_scale", 0, "floor_scale is 0, expected an integer from 1"),
        ("hidden_act", "gelu", "hidden_act is gelu, only 'silu' is implemented"),
        ("intermediate_size_mlp", None, "intermediate_size_mlp is missing"),
    ],
)
def test_what_llama_4_does_not_implement_is_refused(key: str, value: Any, message: str) -> None:
    with pytest.raises(StreamingExpertsError, match=f"config.json: .*{message}"):
        llama4(**{key: value})
