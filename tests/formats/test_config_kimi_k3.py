"""config.json of Kimi K3: its values, and what is refused."""

import json
from typing import Any

import pytest

from formats.config import Activation, KimiK3Config, model_facts, read_config, read_model_facts
from formats.errors import StreamingExpertsError
from formats.fields import Fields
from repack.known_models import KNOWN_MODELS

PUBLISHED: dict[str, Any] = dict(KNOWN_MODELS["moonshotai/Kimi-K3"])


def read(linear: dict[str, Any] | None = None, **changes: Any) -> KimiK3Config:
    text = PUBLISHED["text_config"] | changes
    if linear is not None:
        text["linear_attn_config"] = text["linear_attn_config"] | linear
    model = read_config(json.dumps(PUBLISHED | {"text_config": text}).encode())
    assert isinstance(model, KimiK3Config)
    return model


def test_the_published_config_is_read() -> None:
    model = read()
    assert (model.hidden_size, model.expert_hidden_size, model.num_experts, model.top_k) == (7168, 3584, 896, 16)
    assert model.expert_activation == Activation("situ", 4.0, 25.0)
    assert (model.gate_lower_bound, model.attn_res_block_size) == (-5.0, 12)
    assert [model.layer_types[layer - 1] for layer in (3, 4, 92, 93)] == ["linear_attention", *["full_attention"] * 3]
    assert [model.has_experts(layer) for layer in (0, 1, 92)] == [False, True, True]
    assert model.shared_expert_intermediate_size == 2 * 3072
    assert read_model_facts(Fields(json.loads(json.dumps(model_facts(model))), "x")) == model


def test_only_latent_attention_grows_with_the_context() -> None:
    model = read()
    assert model.cache_values(1000, 512) == 1008 * 24 * 576
    assert model.state_values == 69 * (96 * 128 * 128 + 3 * 3 * 96 * 128)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("hidden_act", "silu", "hidden_act is silu, only 'situ' is implemented"),
        ("hidden_act", None, "hidden_act is missing"),
        ("mla_use_output_gate", False, "mla_use_output_gate is False, only True is implemented"),
        ("latent_moe_use_norm", False, "latent_moe_use_norm is False, only True is implemented"),
        ("latent_moe_use_norm", None, "latent_moe_use_norm is missing"),
        ("mla_use_nope", False, "mla_use_nope is False, only True is implemented"),
        ("moe_router_activation_func", "softmax", "moe_router_activation_func is softmax, only 'sigmoid' is"),
        ("attn_res_block_size", None, "attn_res_block_size is missing"),
        ("routed_expert_hidden_size", None, "routed_expert_hidden_size is missing"),
        ("activation_situ_beta", 0, "activation_situ_beta is 0.0, expected a number above 0"),
        ("activation_situ_linear_beta", None, "activation_situ_linear_beta is missing"),
    ],
)
def test_what_is_not_implemented_is_refused(key: str, value: Any, message: str) -> None:
    with pytest.raises(StreamingExpertsError, match=f"config.json: .*{message}"):
        read(**{key: value})


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("use_full_rank_gate", False, "use_full_rank_gate is False, only True is implemented"),
        ("gate_lower_bound", None, "gate_lower_bound is missing"),
        ("gate_lower_bound", 1, "linear_attn_config.gate_lower_bound is 1.0, expected a number below 0"),
    ],
)
def test_delta_attention_that_is_not_implemented_is_refused(key: str, value: Any, message: str) -> None:
    with pytest.raises(StreamingExpertsError, match=f"config.json: .*{message}"):
        read({key: value})
