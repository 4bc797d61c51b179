"""LongCat-Flash's config.json: as published, and what is refused."""

from typing import Any

import pytest

from formats.config import LongcatFlashConfig
from formats.errors import StreamingExpertsError
from tests.formats.published import LONGCAT_FLASH, read


def test_the_published_config_becomes_facts() -> None:
    model = read(LONGCAT_FLASH)
    assert isinstance(model, LongcatFlashConfig)
    assert (model.num_hidden_layers, model.num_experts, model.zero_expert_num, model.top_k) == (28, 512, 256, 12)
    assert (model.intermediate_size, model.moe_intermediate_size, model.head_dim) == (12288, 2048, 192)
    assert model.attention_scale == 192**-0.5 * 2  # the root of 6144 over 1536
    assert model.latent_scale == 12**0.5
    latents = 2 * 28 * 4096 * (512 + 64)
    assert model.cache_values(4096, 512) == latents


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("attention_bias", True, "attention_bias is True, only False is implemented"),
        ("attention_method", "MHA", "attention_method is MHA, only 'MLA' is implemented"),
        ("mla_scale_q_lora", False, "mla_scale_q_lora is False, only True is implemented"),
        ("mla_scale_kv_lora", False, "mla_scale_kv_lora is False, only True is implemented"),
        ("zero_expert_type", "copy", "zero_expert_type is copy, only 'identity' is implemented"),
        ("zero_expert_num", 0, "zero_expert_num is 0, expected an integer from 1"),
        ("router_bias", True, "router_bias is True, only False is implemented"),
        ("norm_topk_prob", True, "norm_topk_prob is True, only False is implemented"),
        ("head_dim", 128, "head_dim is 128, only 64 is implemented"),
        ("hidden_act", "gelu", "hidden_act is gelu, only 'silu' is implemented"),
        ("moe_topk", 513, "moe_topk is 513, expected 1 to n_routed_experts 512"),
        ("ffn_hidden_size", None, "ffn_hidden_size is missing"),
        ("routed_scaling_factor", None, "routed_scaling_factor is missing"),
    ],
)
def test_what_is_not_implemented_is_refused(key: str, value: Any, message: str) -> None:
    with pytest.raises(StreamingExpertsError, match=f"config.json: {message}"):
        read({**LONGCAT_FLASH, key: value})
