"""Qwen3.5 MoE and Qwen3-Next: gated DeltaNet and attention in turns."""

from collections.abc import Mapping
from dataclasses import replace

from formats.config import FULL_ATTENTION, LINEAR_ATTENTION, Qwen3_5MoeConfig
from formats.families.shared import (
    FUSED,
    PER_EXPERT,
    ROUTER,
    SHARED_EXPERT,
    SHARED_EXPERT_GATE,
    SWITCH_GATE_UP,
    SWITCH_MLP,
    VISION_TOWER,
    expert_dims,
)
from formats.family import Family, Tensor


def _qwen3_5_dims(config: Qwen3_5MoeConfig) -> Mapping[str, int]:
    queries = config.num_attention_heads * config.head_dim
    return {
        **expert_dims(config),
        "S": config.shared_expert_intermediate_size,
        "Q": 2 * queries,
        "O": queries,
        "K": config.num_key_value_heads * config.head_dim,
        "h": config.head_dim,
        "C": config.linear_conv_channels,
        "k": config.linear_conv_kernel_dim,
        "v": config.linear_num_value_heads * config.linear_value_head_dim,
        "H": config.linear_num_value_heads,
        "C+v": config.linear_conv_channels + config.linear_num_value_heads * config.linear_value_head_dim,
        "2H": 2 * config.linear_num_value_heads,
        "d": config.linear_value_head_dim,
    }


QWEN3_5_MOE = Family(
    prefixes=("model.language_model.", "model.", "language_model.model."),
    norms_around_zero=True,
    dims=_qwen3_5_dims,
    before_mixer=(Tensor("input_layernorm", "D"),),
    mixers={
        LINEAR_ATTENTION: (
            Tensor("linear_attn.in_proj_qkv", "C D", when=lambda c: not c.linear_in_proj_grouped),
            Tensor("linear_attn.in_proj_z", "v D", when=lambda c: not c.linear_in_proj_grouped),
            Tensor("linear_attn.in_proj_qkvz", "C+v D", when=lambda c: c.linear_in_proj_grouped),
            # Tiny, and they make the decay and step of a recurrence, where errors add up over the sequence.
            Tensor("linear_attn.in_proj_a", "H D", keep=True, when=lambda c: not c.linear_in_proj_ba_grouped),
            Tensor("linear_attn.in_proj_b", "H D", keep=True, when=lambda c: not c.linear_in_proj_ba_grouped),
            Tensor("linear_attn.in_proj_ba", "2H D", keep=True, when=lambda c: c.linear_in_proj_ba_grouped),
            Tensor("linear_attn.conv1d", "C 1 k", keep=True),
            Tensor("linear_attn.A_log", "H", suffix=""),
            Tensor("linear_attn.dt_bias", "H", suffix=""),
            Tensor("linear_attn.norm", "d"),
            Tensor("linear_attn.out_proj", "D v"),
        ),
        FULL_ATTENTION: (
            Tensor("self_attn.q_proj", "Q D"),
            Tensor("self_attn.k_proj", "K D"),
            Tensor("self_attn.v_proj", "K D"),
            Tensor("self_attn.q_norm", "h"),
            Tensor("self_attn.k_norm", "h"),
            Tensor("self_attn.o_proj", "D O"),
        ),
    },
    after_mixer=(Tensor("post_attention_layernorm", "D"),),
    moe=(
        ROUTER,
        *SHARED_EXPERT,
        SHARED_EXPERT_GATE,
    ),
    expert_layouts=(FUSED, PER_EXPERT, SWITCH_MLP, SWITCH_GATE_UP),
    skipped={**VISION_TOWER, "mtp.": "multi-token prediction"},
)


QWEN3_NEXT = replace(QWEN3_5_MOE, prefixes=("model.",), expert_layouts=(PER_EXPERT, SWITCH_MLP, SWITCH_GATE_UP))
