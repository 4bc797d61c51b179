"""config.json of DeepSeek-V4.1-Flash: its values, and what is refused."""

import json
from typing import Any

import pytest

from formats.config import DeepseekV41Config, model_facts, read_config, read_model_facts
from formats.config.deepseek_v41 import Candidates
from formats.errors import StreamingExpertsError
from formats.fields import Fields
from repack.known_models import KNOWN_MODELS, known_geometry

FLASH: dict[str, Any] = dict(KNOWN_MODELS["deepseek-ai/DeepSeek-V4.1-Flash"])
YARN = FLASH["text_config"]["rope_scaling"]


def read(**changes: Any) -> DeepseekV41Config:
    model = read_config(json.dumps(FLASH | {"text_config": FLASH["text_config"] | changes}).encode())
    assert isinstance(model, DeepseekV41Config)
    return model


def test_deepseek_v41_flash_is_read() -> None:
    model = read()
    assert model.layer_types == ("sliding_attention",) * 2 + ("compressed_sparse_attention",) * 38
    assert [model.kv_source(layer) for layer in (2, 7, 8, 19, 20, 39)] == [2, 2, 8, 14, 20, 20]
    assert model.candidates == Candidates(layer_id=20, topk_blocks=2048, block_size=8)
    assert (model.gate_temp, model.rms_norm_eps) == (1, 1e-20)
    assert (model.rope.theta, model.rope.scaling) == (10000, None)
    assert model.compress_rope.theta == 160000
    assert model.compress_rope.attention_factor == 1
    assert model.state_values == 3 * 2 * 2 * 512  # the source of one token for an entry leaves none open
    assert (model.ngram_layers, model.ngrams_per_token, model.token_classes) == ((1, 14), 48, 99092)
    assert read_model_facts(Fields(json.loads(json.dumps(model_facts(model))), "x")) == model
    assert read_config(json.dumps(FLASH["text_config"] | {"model_type": "deepseek_v41"}).encode()) == model


def test_the_tables_of_n_grams_have_the_published_rows_and_hashes() -> None:
    """The publisher's engram.py gives these, which several programs that run the checkpoint state."""
    engrams = read().engrams
    assert engrams is not None
    assert engrams.table_rows == (384006168, 384016682)  # engram_num_embeddings
    assert engrams.head_rows[0][:3] == (16000057, 16000079, 16000081)
    assert engrams.head_rows[1][-3:] == (16000877, 16000879, 16000889)
    assert engrams.multipliers == (
        (76632096046245, 4839876093313, 35959672319349, 73987337458391),
        (67716810739261, 51510806800915, 30921347202721, 82619226485591),
    )


def test_an_index_whose_attention_would_grow_is_refused() -> None:
    facts = json.loads(json.dumps(model_facts(read())))
    facts["rope_scaling"]["mscale_all_dim"] = 0.7
    with pytest.raises(StreamingExpertsError, match=r"rope_scaling is .*, expected an mscale_all_dim of 0"):
        read_model_facts(Fields(facts, "x"))


SHAPES = {
    "layers.1.engram.embed.scale": ("F8_E8M0", (384006168, 8)),
    "layers.1.engram.q_weight": ("BF16", (4, 5120)),
    "layers.1.engram.wkv.scale": ("F8_E8M0", (800, 192)),
    "layers.1.engram.wkv.weight": ("F8_E4M3", (25600, 6144)),
    "layers.2.attn.compressor.wgate.weight": ("BF16", (512, 5120)),
    "layers.2.attn.indexer.weights_proj.weight": ("BF16", (32, 5120)),
    "layers.2.attn.indexer.wk.weight": ("BF16", (128, 512)),
    "layers.2.attn.indexer.wq_b.scale": ("F8_E8M0", (128, 40)),
    "layers.3.hc_attn_fn": ("F32", (24, 20480)),
    "layers.6.ffn.experts.0.w2.scale": ("F8_E8M0", (5120, 72)),
    "layers.6.ffn.shared_experts.w1.scale": ("F8_E8M0", (72, 160)),
    "layers.14.engram.embed.weight": ("F8_E4M3", (384016682, 256)),
}


def test_the_tensors_of_a_whole_checkpoint_are_the_published_ones() -> None:
    """Shapes as the headers of its shards state them."""
    tensors = known_geometry("deepseek-ai/DeepSeek-V4.1-Flash").tensors
    assert {name: (tensors[name].dtype, tensors[name].shape) for name in SHAPES} == SHAPES
    assert "layers.20.attn.compressor.wkv.weight" in tensors
    for missing in ("20.attn.compressor.wgate", "24.attn.indexer.wk", "3.attn.compressor.wkv", "3.attn.indexer.wq_b"):
        assert f"layers.{missing}.weight" not in tensors


def test_a_model_without_n_grams_or_candidates_is_read() -> None:
    model = read(engram_layer_ids=[], candidate_source_layer_id=-1)
    assert (model.engrams, model.candidates) == (None, None)
    assert (model.ngram_table, model.ngrams_per_token, model.token_classes) == (None, 0, 0)
    assert read(candidate_topk_blocks=0).candidates is None
    assert read_model_facts(Fields(json.loads(json.dumps(model_facts(model))), "x")) == model


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("scoring_func", "sigmoid", "scoring_func is sigmoid, only 'sqrtsoftplus' is implemented"),
        ("norm_topk_prob", False, "norm_topk_prob is False, only True is implemented"),
        ("num_key_value_heads", 2, "num_key_value_heads is 2, only 1 is implemented"),
        ("n_shared_experts", 2, "n_shared_experts is 2, only 1 is implemented"),
        ("num_hash_layers", 3, "num_hash_layers is 3, only 0 is implemented"),
        ("tie_word_embeddings", True, "tie_word_embeddings is True, only False is implemented"),
        ("model_type", "other", "model_type is other, only 'deepseek_v41_text' is implemented"),
        ("gate_temp", 0, "gate_temp is 0.0, expected a number above 0"),
        ("head_dim", 500, "head_dim is 500, expected a multiple of 32"),
        ("index_head_dim", 100, "index_head_dim is 100, expected a multiple of 32"),
        ("rope_parameters", YARN, "rope_parameters is .*, only nothing is implemented"),
        ("rope_scaling", YARN | {"rope_type": "linear"}, "rope_type is linear, only default and yarn are implemented"),
        ("rope_scaling", YARN | {"rope_type": "default"}, "rope_scaling is of type default, only yarn or null is"),
        ("rope_scaling", YARN | {"mscale": 1}, "rope_scaling.mscale is 1, only 0 is implemented"),
        ("rope_scaling", YARN | {"attention_factor": 1.2}, "attention_factor is 1.2, only 1 is implemented"),
        ("rope_scaling", YARN | {"truncate": False}, "truncate is False, only True is implemented"),
        ("rope_scaling", YARN | {"beta_fast": 1.5}, "beta_fast is 1.5, only whole numbers are implemented"),
        ("compress_ratios", [1] * 40, r"kv_source_layer_ids is .*, expected layer 0 or one before it"),
        ("compress_ratios", [0, 0] + [2] * 10 + [1] * 28, "compress_ratios is .*, expected 2 in layer 12, as in layer"),
        ("kv_source_layer_ids", [2, 8, 14, 20, 30], "kv_source_layer_ids is .*, expected only layers of index_source"),
        ("kv_source_layer_ids", [8, 2, 14, 20], "kv_source_layer_ids is .*, expected rising numbers of layers"),
        ("index_source_layer_ids", [1, 2, 8, 14, 20], "index_source_layer_ids is .*, expected rising numbers"),
        ("index_source_layer_ids", [2, 8, 14, 20, 40], "index_source_layer_ids is .*, expected rising numbers"),
        ("candidate_source_layer_id", 21, "candidate_source_layer_id is 21, expected a layer of index_source"),
        ("candidate_source_layer_id", 14, "candidate_source_layer_id is 14, expected the last of kv_source_layer_ids"),
        ("candidate_source_layer_id", 40, "candidate_source_layer_id is 40, expected an integer from 0 to 39"),
        ("candidate_topk_blocks", 64, "candidate_topk_blocks is 64, expected so many that all but one hold index_topk"),
        ("engram_layer_ids", [1, 1], "engram_layer_ids is .*, expected distinct layers below 40"),
        ("engram_layer_ids", [1, 40], "engram_layer_ids is .*, expected distinct layers below 40"),
        ("engram_num_embeddings", [384006168], r"engram_num_embeddings is .*, expected \[384006168, 384016682\] by"),
        ("engram_max_ngram_size", 1, "engram_max_ngram_size is 1, expected an integer from 2 to 64"),
        ("engram_vocab_size", 2**31, "engram_vocab_size is .*, expected so few that the rows of all tables are at"),
        ("engram_compressed_vocab_size", 129281, "engram_compressed_vocab_size is 129281, expected at most vocab_size"),
        ("engram_pad_token_id", 129280, "engram_pad_token_id is 129280, expected a token below vocab_size 129280"),
        ("engram_pad_token_id", None, "engram_pad_token_id is missing"),
        ("kv_source_layer_ids", None, "kv_source_layer_ids is missing"),
    ],
)
def test_what_deepseek_v41_does_not_implement_is_refused(key: str, value: Any, message: str) -> None:
    with pytest.raises(StreamingExpertsError, match=f"config.json: .*{message}"):
        read(**{key: value})
