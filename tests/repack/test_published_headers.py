"""Names, shapes and dtypes of families against headers of published checkpoints, as public readers of them state them.

Kimi K3: headers of layers 0, 11 and 12, by two readers of the checkpoint, which agree. DeepSeek-V4-Flash: of layer 2,
by two others. Qwen3.8-Flash-Next: an inventory of the checkpoint. Kolibri-1: numbers of tensors in its index, and the
names of a layer, by readers of it. Hy4-preview: numbers of tensors in its index and shapes of a layer, by readers of
it, and its numbers of weights, by its publisher.
"""

import json
import math

import pytest

from formats.config import ModelConfig, read_config
from formats.families import FAMILIES
from repack.known_models import KNOWN_MODELS

HALF = {
    "input_layernorm.weight": ([7168], "BF16"),
    "mlp_res_norm.weight": ([7168], "BF16"),
    "mlp_res_proj.weight": ([1, 7168], "BF16"),
    "post_attention_layernorm.weight": ([7168], "BF16"),
    "self_attention_res_norm.weight": ([7168], "BF16"),
    "self_attention_res_proj.weight": ([1, 7168], "BF16"),
    "self_attn.g_proj.weight": ([12288, 7168], "BF16"),
    "self_attn.o_proj.weight": ([7168, 12288], "BF16"),
}
DELTA = HALF | {
    "self_attn.A_log": ([128], "F32"),
    "self_attn.b_proj.weight": ([96, 7168], "BF16"),
    "self_attn.dt_bias": ([12288], "F32"),
    "self_attn.f_a_proj.weight": ([128, 7168], "BF16"),
    "self_attn.f_b_proj.weight": ([12288, 128], "BF16"),
    "self_attn.o_norm.weight": ([128], "F32"),
    **{f"self_attn.{part}_conv1d.weight": ([12288, 1, 4], "F32") for part in "qkv"},
    **{f"self_attn.{part}_proj.weight": ([12288, 7168], "BF16") for part in "qkv"},
}
LATENT = HALF | {
    "self_attn.kv_a_layernorm.weight": ([512], "BF16"),
    "self_attn.kv_a_proj_with_mqa.weight": ([576, 7168], "BF16"),
    "self_attn.kv_b_proj.weight": ([24576, 512], "BF16"),
    "self_attn.q_a_layernorm.weight": ([1536], "BF16"),
    "self_attn.q_a_proj.weight": ([1536, 7168], "BF16"),
    "self_attn.q_b_proj.weight": ([18432, 1536], "BF16"),
}
DENSE = {
    "mlp.down_proj.weight": ([7168, 33792], "BF16"),
    "mlp.gate_proj.weight": ([33792, 7168], "BF16"),
    "mlp.up_proj.weight": ([33792, 7168], "BF16"),
}
SPARSE = {
    "block_sparse_moe.gate.e_score_correction_bias": ([896], "F32"),
    "block_sparse_moe.gate.weight": ([896, 7168], "BF16"),
    "block_sparse_moe.routed_expert_down_proj.weight": ([3584, 7168], "BF16"),
    "block_sparse_moe.routed_expert_norm.weight": ([3584], "BF16"),
    "block_sparse_moe.routed_expert_up_proj.weight": ([7168, 3584], "BF16"),
    "block_sparse_moe.shared_experts.down_proj.weight": ([7168, 6144], "BF16"),
    "block_sparse_moe.shared_experts.gate_proj.weight": ([6144, 7168], "BF16"),
    "block_sparse_moe.shared_experts.up_proj.weight": ([6144, 7168], "BF16"),
}


def config_of(name: str) -> ModelConfig:
    return read_config(json.dumps(KNOWN_MODELS[name]).encode())


@pytest.mark.parametrize(("layer", "expected"), [(0, DELTA | DENSE), (11, LATENT | SPARSE), (12, DELTA | SPARSE)])
def test_a_layer_of_kimi_k3_has_the_published_tensors(layer: int, expected: dict[str, tuple[list[int], str]]) -> None:
    config = config_of("moonshotai/Kimi-K3")
    family = FAMILIES[config.model_type]
    found = {
        tensor.published: (list(family.shape(tensor.padded or tensor.shape, config)), tensor.dtype)
        for tensor in family.layer_tensors(config, layer)
    }
    assert found == expected


def test_experts_of_kimi_k3_read_and_give_what_their_published_codes_hold() -> None:
    config = config_of("moonshotai/Kimi-K3")
    family = FAMILIES[config.model_type]
    codes = {"w1": [3072, 2 * 1792], "w2": [3584, 2 * 1536], "w3": [3072, 2 * 1792]}  # two to a byte
    found = {
        rule.name.removeprefix("block_sparse_moe.experts.{expert}."): list(family.shape(rule.shape, config))
        for rule in family.expert_layouts[0]
    }
    assert found == codes


MIXTURE = ("hc_norm", "input_mix_weight_down", "input_mix_weight_up")
STREAMS = {
    f"{half}_hyper_connection.{name}.weight" for half in ("attn", "mlp") for name in (*MIXTURE, "block_inject_weight")
}
BESIDE_EXPERTS = {
    "mlp.gate.weight",
    "mlp.shared_expert_gate.weight",
    *(f"mlp.shared_expert.{part}_proj.weight" for part in ("gate", "up", "down")),
}
DELTA_NET = {
    "linear_attn.A_log",
    "linear_attn.dt_bias",
    *(f"linear_attn.{name}.weight" for name in ("conv1d", "norm", "out_proj")),
    *(f"linear_attn.in_proj_{name}.weight" for name in ("a", "b", "qkv", "z")),
}
INDEXED = {
    *(f"self_attn.{part}_proj.weight" for part in "qkvo"),
    *(f"self_attn.{part}_norm.weight" for part in "qk"),
    "self_attn.indexer.index_qk_proj.weight",
    *(f"self_attn.indexer.{part}_layernorm.weight" for part in "qk"),
}
NGRAMS = {f"ple.{name}.weight" for name in ("key_proj", "value_proj", "conv1d", "norm_conv", "norm_key", "norm_query")}


@pytest.mark.parametrize(("layer", "mixer"), [(0, DELTA_NET), (1, DELTA_NET | NGRAMS), (3, INDEXED)])
def test_a_layer_of_flash_next_has_the_published_names(layer: int, mixer: set[str]) -> None:
    config = config_of("Qwen/Qwen3.8-Flash-Next")
    family = FAMILIES[config.model_type]
    found = {tensor.published for tensor in family.layer_tensors(config, layer)}
    assert found == STREAMS | BESIDE_EXPERTS | mixer


def test_the_table_of_flash_next_comes_in_the_published_shards() -> None:
    config = config_of("Qwen/Qwen3.8-Flash-Next")
    family = FAMILIES[config.model_type]
    shards = [(tensor.published, family.shape(tensor.shape, config)) for _, tensor in family.ngram_shards(config)]
    assert len(shards) == 128
    assert shards[127] == ("ple.ple_embedding.ngram_embedding.shard_127.weight", (2500012, 160))


COMPRESSORS = {  # of layer 2 of DeepSeek-V4-Flash, the first with an indexer
    "attn.compressor.ape": ([4, 1024], "F32"),
    "attn.compressor.norm.weight": ([512], "BF16"),
    "attn.compressor.wgate.weight": ([1024, 4096], "BF16"),
    "attn.compressor.wkv.weight": ([1024, 4096], "BF16"),
    "attn.indexer.compressor.ape": ([4, 256], "F32"),
    "attn.indexer.compressor.norm.weight": ([128], "BF16"),
    "attn.indexer.compressor.wgate.weight": ([256, 4096], "BF16"),
    "attn.indexer.compressor.wkv.weight": ([256, 4096], "BF16"),
    "attn.indexer.weights_proj.weight": ([64, 4096], "BF16"),
    "attn.indexer.wq_b.weight": ([8192, 1024], "BF16"),  # FP8 in the file, as its quantization_config says
}


def test_what_compresses_in_deepseek_v4_has_the_published_tensors() -> None:
    config = config_of("deepseek-ai/DeepSeek-V4-Flash")
    family = FAMILIES[config.model_type]
    found = {
        tensor.published: (list(family.shape(tensor.shape, config)), tensor.dtype)
        for tensor in family.layer_tensors(config, 2)
        if tensor.published.startswith(("attn.compressor.", "attn.indexer."))
    }
    assert found == COMPRESSORS


def test_kolibri_has_as_many_tensors_as_its_index_lists() -> None:
    """116,303, of which 57,950 are the scales of what is in FP8: attention, the shared expert and 384 routed ones."""
    config = config_of("Aleph-Alpha/Kolibri-1")
    names = [name for name, *_ in FAMILIES[config.model_type].checkpoint(config)]
    in_fp8 = [name for name in names if name.endswith("_proj.weight")]
    assert (len(in_fp8), len(names) + len(in_fp8)) == (50 * 1159, 116303)
    assert {
        "model.layers.49.mlp.experts.383.down_proj.weight",
        "model.layers.49.mlp.gate.weight",
        "model.layers.49.mlp.shared_experts.up_proj.weight",
        "model.layers.49.moe.router.expert_bias",
        "model.layers.49.post_attention_layernorm.weight",
        "model.layers.49.post_attn_norm.weight",
        "model.layers.49.post_ffn_norm.weight",
        "model.layers.49.self_attn.k_norm.weight",
    } <= set(names)


def test_hunyuan_4_has_the_published_streams_indexers_and_weights() -> None:
    """770 billion weights, 49 of them per token: all but the experts, of which 8 of 256."""
    config = config_of("tencent/Hy4-preview")
    shapes = {name: list(shape) for name, shape, _ in FAMILIES[config.model_type].checkpoint(config)}
    assert sum(".hc_" in name for name in shapes) == 471
    assert sum(name.endswith("indexer.wk.weight") for name in shapes) == 21
    weights = {name: math.prod(shape) for name, shape in shapes.items()}
    routed = sum(number for name, number in weights.items() if ".mlp.experts." in name)
    total = sum(weights.values())
    assert (round(total / 1e9), round((total - routed + routed * 8 / 256) / 1e9)) == (770, 49)
    assert {
        "model.hc_head.hc_head_fn": [4, 24576],
        "model.layers.1.hc_attn_layer.hc_pre.hc_fn": [8, 24576],
        "model.layers.1.hc_mlp_layer.hc_pre.hc_scale": [2],
        "model.layers.1.mlp.experts.gate_up_proj": [256, 4096, 6144],
        "model.layers.1.mlp.gate.weight": [256, 6144],
        "model.layers.1.self_attn.learnable_sink_param": [64],
        "model.layers.1.self_attn.linear_gate.weight": [16384, 6144],
        "model.layers.1.self_attn.kv_b_proj.weight": [28672, 512],
        "model.layers.1.self_attn.o_proj.weight": [6144, 16384],
    }.items() <= shapes.items()
