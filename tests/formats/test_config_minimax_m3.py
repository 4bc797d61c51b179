"""MiniMax-M3's config.json: as published, as transformers saves it, and what is refused."""

import math
from typing import Any

import pytest

from formats.config import MiniMaxM3Config
from formats.errors import StreamingExpertsError
from tests.formats.published import MINIMAX_M3, read

TEXT: dict[str, Any] = MINIMAX_M3["text_config"]
SPARSE: dict[str, Any] = TEXT["sparse_attention_config"]
# transformers' names of what the published file nests, and lists of kinds for lists of zeros and ones.
SAVED: dict[str, Any] = {
    **{key: value for key, value in TEXT.items() if key not in ("sparse_attention_config", "moe_layer_freq")},
    "hidden_act": "silu",
    "index_block_size": 128,
    "index_head_dim": 128,
    "index_local_blocks": 1,
    "index_n_heads": 4,
    "index_topk_blocks": 16,
    "layer_types": [*["full_attention"] * 3, *["minimax_m3_sparse"] * 57],
    "mlp_layer_types": [*["dense"] * 3, *["sparse"] * 57],
}


def read_text(text: dict[str, Any]) -> MiniMaxM3Config:
    model = read({**MINIMAX_M3, "text_config": text})
    assert isinstance(model, MiniMaxM3Config)
    return model


def test_the_published_config_becomes_facts() -> None:
    model = read_text(TEXT)
    assert model.layer_types == ("full_attention",) * 3 + ("indexed_attention",) * 57
    assert [model.has_experts(layer) for layer in (0, 2, 3, 59)] == [False, False, True, True]
    assert (model.index_n_heads, model.index_block_size, model.index_topk_blocks) == (4, 128, 16)
    assert (model.intermediate_size, model.moe_intermediate_size) == (12288, 3072)
    assert (model.shared_expert_intermediate_size, model.swiglu_limit, model.routed_scaling_factor) == (3072, 7.0, 2.0)
    assert (model.rotary_dim, model.qk_norm, model.norm_offset) == (64, "head", 1.0)
    assert model.attention_multiplier == 1 / math.sqrt(128)


def test_what_transformers_saves_is_the_same() -> None:
    assert read_text(SAVED) == read_text(TEXT)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("use_gemma_norm", False, "use_gemma_norm is False, only True is implemented"),
        ("attention_output_gate", True, "attention_output_gate is True, only False is implemented"),
        ("qk_norm_type", "per_layer", "qk_norm_type is per_layer, only 'per_head' is implemented"),
        ("swiglu_alpha", 1.0, "swiglu_alpha is 1.0, only 1.702 is implemented"),
        ("n_shared_experts", 2, "n_shared_experts is 2, only 1 is implemented"),
        ("hidden_act", "gelu", "hidden_act is gelu, only 'swigluoai' is implemented"),
        ("rotary_dim", 128, "rotary_dim is 128, only 64 is implemented"),
        ("partial_rotary_factor", None, "rotary_dim is 64, only 128 is implemented"),
        ("moe_layer_freq", None, "moe_layer_freq is missing"),
        ("moe_layer_freq", [1, 1], "mlp_layer_types is .*, expected 60 entries"),
        ("routed_scaling_factor", None, "routed_scaling_factor is missing"),
        ("num_key_value_heads", 2, "index_n_heads is 4, expected a divisor of num_key_value_heads 2"),
    ],
)
def test_what_is_not_implemented_is_refused(key: str, value: Any, message: str) -> None:
    with pytest.raises(StreamingExpertsError, match=f"config.json: text_config.{message}"):
        read_text({**TEXT, key: value})


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("use_sparse_attention", False, "use_sparse_attention is False, only True is implemented"),
        ("sparse_score_type", "mean", "sparse_score_type is mean, only 'max' is implemented"),
        ("sparse_init_block", 1, "sparse_init_block is 1, only 0 is implemented"),
        ("sparse_disable_index_value", [0] * 60, r"sparse_disable_index_value is \[0.*, only \[0, 0, 0, 1, 1"),
        ("sparse_local_block", 0, "sparse_local_block is 0, expected an integer from 1"),
        ("sparse_local_block", 17, "index_local_blocks is 17, expected at most index_topk_blocks 16"),
        ("sparse_index_dim", 32, "index_head_dim is 32, expected rotary_dim 64 or more"),
        ("sparse_attention_freq", None, "sparse_attention_freq is missing"),
    ],
)
def test_what_its_indexer_does_not_do_is_refused(key: str, value: Any, message: str) -> None:
    with pytest.raises(StreamingExpertsError, match=f"config.json: text_config.*{message}"):
        read_text({**TEXT, "sparse_attention_config": {**SPARSE, key: value}})
