"""config.json of Kimi-Linear-48B-A3B: its values, and what is refused."""

import json
from typing import Any

import pytest

from formats.config import KimiLinearConfig, model_facts, read_config, read_model_facts
from formats.errors import FormatError, StreamingExpertsError
from formats.fields import Fields

FULL = [4, 8, 12, 16, 20, 24, 27]
KIMI_LINEAR: dict[str, Any] = {  # what transformers' defaults and the model's card say, without what no code reads
    "model_type": "kimi_linear",
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "kv_lora_rank": 512,
    "linear_attn_config": {
        "full_attn_layers": FULL,
        "head_dim": 128,
        "kda_layers": [layer for layer in range(1, 28) if layer not in FULL],
        "num_heads": 32,
        "short_conv_kernel_size": 4,
    },
    "mla_use_nope": True,
    "model_max_length": 1048576,
    "moe_intermediate_size": 1024,
    "moe_layer_freq": 1,
    "moe_renormalize": True,
    "moe_router_activation_func": "sigmoid",
    "num_attention_heads": 32,
    "num_expert_group": 1,
    "num_experts": 256,
    "num_experts_per_token": 8,
    "num_hidden_layers": 27,
    "num_shared_experts": 1,
    "q_lora_rank": None,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "routed_scaling_factor": 2.446,
    "tie_word_embeddings": False,
    "topk_group": 1,
    "v_head_dim": 128,
    "vocab_size": 163840,
}


def read(**changes: Any) -> KimiLinearConfig:
    model = read_config(json.dumps({**KIMI_LINEAR, **changes}).encode())
    assert isinstance(model, KimiLinearConfig)
    return model


def test_kimi_linear_is_read() -> None:
    model = read()
    assert [model.layer_types[layer - 1] for layer in (1, 3, 4, 26, 27)] == [
        "linear_attention",
        "linear_attention",
        "full_attention",
        "linear_attention",
        "full_attention",
    ]
    assert [model.has_experts(layer) for layer in (0, 1, 26)] == [False, True, True]
    assert (model.head_dim, model.q_lora_rank, model.top_k, model.num_experts) == (192, None, 8, 256)
    assert (model.linear_num_heads, model.linear_head_dim, model.linear_conv_kernel_dim) == (32, 128, 4)
    assert model.attention_scale == 192**-0.5
    assert read_model_facts(Fields(json.loads(json.dumps(model_facts(model))), "x")) == model


def test_only_latent_attention_grows_with_the_context() -> None:
    model = read()
    assert model.cache_values(1000, 512) == 1008 * 7 * (512 + 64)
    assert model.state_values == 20 * (32 * 128 * 128 + 3 * 3 * 32 * 128)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("mla_use_nope", False, "mla_use_nope is False, only True is implemented"),
        ("moe_router_activation_func", "softmax", "moe_router_activation_func is softmax, only 'sigmoid' is"),
        ("moe_layer_freq", 2, "moe_layer_freq is 2, only 1 is implemented"),
        ("rope_scaling", {"type": "yarn"}, "rope_scaling is .*, only nothing is implemented"),
        ("attention_bias", True, "attention_bias is True, only False is implemented"),
        ("hidden_act", "gelu", "hidden_act is gelu, only 'silu' is implemented"),
        ("linear_attn_config", None, "linear_attn_config is missing"),
        ("num_expert_group", 3, "num_expert_group is 3, expected a divisor of num_experts 256"),
        ("num_experts_per_token", 257, "num_experts_per_token is 257, expected 1 to num_experts 256"),
        ("routed_scaling_factor", None, "routed_scaling_factor is missing"),
        ("first_k_dense_replace", 28, "first_k_dense_replace is 28, expected an integer from 0 to 27"),
    ],
)
def test_what_kimi_linear_does_not_implement_is_refused(key: str, value: Any, message: str) -> None:
    with pytest.raises(StreamingExpertsError, match=f"config.json: .*{message}"):
        read(**{key: value})


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("kda_layers", [1, 2, 3], "kda_layers is .*, expected with full_attn_layers each layer from 1 to 27 once"),
        ("full_attn_layers", [*FULL, 1], "kda_layers is .*, expected with full_attn_layers each layer"),
        ("full_attn_layers", [0, *FULL], "full_attn_layers is .*, expected a list of integers from 1 to 27"),
        ("short_conv_kernel_size", 1, "short_conv_kernel_size is 1, expected an integer from 2"),
        ("num_heads", None, "num_heads is missing"),
    ],
)
def test_layers_and_widths_that_mean_nothing_are_refused(key: str, value: Any, message: str) -> None:
    with pytest.raises(FormatError, match=f"config.json: linear_attn_config.{message}"):
        read(linear_attn_config=KIMI_LINEAR["linear_attn_config"] | {key: value})
