"""config.json of Qwen3.8-Flash-Next: its values, and what is refused."""

import json
from typing import Any

import pytest

from formats.config import Qwen4ExpConfig, model_facts, read_config, read_model_facts
from formats.errors import StreamingExpertsError
from formats.fields import Fields
from repack.known_models import KNOWN_MODELS

PUBLISHED: dict[str, Any] = dict(KNOWN_MODELS["Qwen/Qwen3.8-Flash-Next"])


def read(**changes: Any) -> Qwen4ExpConfig:
    config = PUBLISHED | {"text_config": PUBLISHED["text_config"] | changes}
    model = read_config(json.dumps(config).encode())
    assert isinstance(model, Qwen4ExpConfig)
    return model


def test_the_published_config_is_read() -> None:
    model = read()
    assert model.layer_types == (*("linear_attention",) * 3, "indexed_attention") * 12
    assert (model.hidden_size, model.hc_width, model.rotary_dim) == (2560, 10240, 64)
    assert model.output_gate_type == "sigmoid"
    assert read_config(json.dumps(PUBLISHED["text_config"]).encode()) == model  # the text model saved alone
    assert read_model_facts(Fields(json.loads(json.dumps(model_facts(model))), "x")) == model


def test_the_table_of_n_grams_is_as_long_as_the_published_shards() -> None:
    model = read()
    assert model.ngram_table == (128 * 2500012, 160)  # which is what the headers of the published shards say
    assert (model.ngram_layers, model.ngrams_per_token) == ((1,), 16)


def test_a_model_without_n_grams_has_no_table() -> None:
    model = read(ple_layer_ids=[], eos_token_id=None)
    assert (model.ngrams, model.ngram_table, model.ngram_layers) == (None, None, ())
    assert model.ngrams_per_token == 0


def test_the_first_of_several_ends_is_that_of_n_grams() -> None:
    assert read(eos_token_id=[248044, 248046]) == read()


def test_layers_by_interval_are_indexed() -> None:
    assert read(layer_types=None) == read()


def test_caches_hold_keys_of_tokens_and_of_blocks() -> None:
    model = read()
    assert model.cache_values(4000, 100) == 12 * (4000 * 2 * 2 * 256 + 1008 * 128)  # in lanes of 16
    delta = 36 * (48 * 128 * 128 + (2 * 16 + 48) * 128 * 3)
    assert model.state_values == delta + 12 * 3 * 128 + 9 * 10240


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("indexer_kv_heads", 2, "indexer_kv_heads is 2, only 1 is implemented"),
        ("indexer_n_heads", None, "indexer_n_heads is missing"),
        ("indexer_budget", 2047, "indexer_compress_ratio is 4, expected a divisor of indexer_budget 2047"),
        ("indexer_head_dim", 32, "indexer_head_dim is 32, expected rotary_dim 64 or more"),
        ("output_gate_type", "gelu", "output_gate_type is gelu, expected only silu and sigmoid"),
        ("hc_count", 1, "hc_count is 1, expected 2 or more"),
        ("layer_types", ["sliding_attention"] * 48, "layer_types is .*, expected only linear_attention and indexed"),
        ("ple_layer_ids", [2, 6], r"ple_layer_ids is \[2, 6\], only one layer is implemented"),
        ("ple_layer_ids", [4], "ple_layer_ids is 4, expected a layer of linear_attention"),
        ("ple_layer_ids", [49], "ple_layer_ids is 49, expected a layer of linear_attention"),
        ("eos_token_id", None, "eos_token_id is missing"),
        ("eos_token_id", [], r"eos_token_id is \[\], expected an integer from 1"),
        ("ple_embed_dim", 100, "ple_embed_dim is 100, expected a multiple of all 16 heads"),
        ("split_ngram_parts", 100, "split_ngram_parts is 100, expected a divisor of the 320001536 rows"),
        ("eos_token_id", 248320, "eos_token_id is 248320, expected a token below vocab_size 248320"),
        ("ngram_size", 1, "ngram_size is 1, expected 2 to 64"),
        ("ngram_vocab_size_base", 2**31, "ngram_vocab_size_base is 2147483648, expected so few that the rows"),
        ("norm_topk_prob", False, "norm_topk_prob is False, only True is implemented"),
    ],
)
def test_what_is_not_implemented_is_refused(key: str, value: Any, message: str) -> None:
    with pytest.raises(StreamingExpertsError, match=f"config.json: .*{message}"):
        read(**{key: value})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size": 2, "heads": 2**30, "embed_dim": 2**30}, "ngrams.heads is 1073741824, expected at most 1024"),
        ({"size": 2**30 + 1, "heads": 1, "embed_dim": 2**30}, "ngrams.size is 1073741825, expected 2 to 64"),
        ({"vocab_size_base": 2**28}, "ngrams.vocab_size_base is 268435456, expected so few that the rows"),
    ],
)
def test_absurd_counts_in_an_index_are_refused_before_primes_are_looked_for(
    changes: dict[str, int], message: str
) -> None:
    facts = json.loads(json.dumps(model_facts(read())))
    facts["ngrams"] |= changes
    with pytest.raises(StreamingExpertsError, match=f"index.json: model.{message}"):
        read_model_facts(Fields(facts, "index.json: model"))
