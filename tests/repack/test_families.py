"""The table of Qwen3.5 MoE against the published names and shapes of Qwen3.5-397B-A17B (ARCHITECTURES, 3c)."""

import json

from formats.config import CONFIG_CLASSES, FULL_ATTENTION, LINEAR_ATTENTION, ModelConfig, read_config
from formats.families import FAMILIES
from formats.families.qwen3_5 import QWEN3_5_MOE
from formats.family import EMBEDDING
from tests.repack.checkpoints import QWEN3_5_397B, SMALL, config_json

CONFIG: ModelConfig = read_config(config_json(QWEN3_5_397B))

PUBLISHED = {
    "input_layernorm": (4096,),
    "post_attention_layernorm": (4096,),
    "linear_attn.in_proj_qkv": (12288, 4096),
    "linear_attn.in_proj_z": (8192, 4096),
    "linear_attn.in_proj_a": (64, 4096),
    "linear_attn.in_proj_b": (64, 4096),
    "linear_attn.conv1d": (12288, 1, 4),
    "linear_attn.A_log": (64,),
    "linear_attn.dt_bias": (64,),
    "linear_attn.norm": (128,),
    "linear_attn.out_proj": (4096, 8192),
    "self_attn.q_proj": (16384, 4096),
    "self_attn.k_proj": (512, 4096),
    "self_attn.v_proj": (512, 4096),
    "self_attn.o_proj": (4096, 8192),
    "self_attn.q_norm": (256,),
    "self_attn.k_norm": (256,),
    "mlp.gate": (512, 4096),
    "mlp.shared_expert.gate_proj": (1024, 4096),
    "mlp.shared_expert.up_proj": (1024, 4096),
    "mlp.shared_expert.down_proj": (4096, 1024),
    "mlp.shared_expert_gate": (1, 4096),
}


def test_shapes_of_both_kinds_of_layers_are_the_published_ones() -> None:
    found = {
        tensor.name: QWEN3_5_MOE.shape(tensor.shape, CONFIG)
        for layer_type in (LINEAR_ATTENTION, FULL_ATTENTION)
        for tensor in QWEN3_5_MOE.layer_tensors(CONFIG, CONFIG.layer_types.index(layer_type))
    }
    assert found == PUBLISHED


def test_shapes_of_experts_and_embedding_are_the_published_ones() -> None:
    fused, separate, *_ = QWEN3_5_MOE.expert_layouts
    assert [(rule.name, QWEN3_5_MOE.shape(rule.shape, CONFIG)) for rule in fused] == [
        ("mlp.experts.gate_up_proj", (2048, 4096)),
        ("mlp.experts.down_proj", (4096, 1024)),
    ]
    assert [QWEN3_5_MOE.shape(rule.shape, CONFIG) for rule in separate] == [(1024, 4096), (1024, 4096), (4096, 1024)]
    assert QWEN3_5_MOE.shape(EMBEDDING.shape, CONFIG) == (248320, 4096)


def test_every_layout_of_experts_gives_each_part_once() -> None:
    for layout in QWEN3_5_MOE.expert_layouts:
        assert sorted(part for rule in layout for part in rule.parts) == ["down", "gate", "up"]


def test_what_decides_or_remembers_is_never_quantized() -> None:
    kept = {tensor.name for tensors in QWEN3_5_MOE.mixers.values() for tensor in tensors if tensor.keep}
    kept |= {tensor.name for tensor in QWEN3_5_MOE.moe if tensor.keep}
    assert kept == {
        "linear_attn.in_proj_a",
        "linear_attn.in_proj_b",
        "linear_attn.in_proj_ba",
        "linear_attn.conv1d",
        "mlp.gate",
        "mlp.shared_expert_gate",
    }


def test_every_model_that_is_read_has_a_family() -> None:
    assert FAMILIES.keys() == CONFIG_CLASSES.keys()


def test_the_text_model_saved_alone_is_the_same_family() -> None:
    flat = json.dumps({"model_type": "qwen3_5_moe_text", **SMALL}).encode()
    assert FAMILIES[read_config(flat).model_type] is QWEN3_5_MOE
