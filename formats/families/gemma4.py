"""Gemma 4 with experts, which stand beside a dense layer."""

from collections.abc import Mapping

from formats.config import FULL_ATTENTION, SLIDING_ATTENTION, Gemma4Config
from formats.families.shared import DENSE_MLP, SWITCH_GATE_UP, SWITCH_MLP, expert_dims
from formats.family import Experts, Family, Tensor


def _gemma4_dims(config: Gemma4Config) -> Mapping[str, int]:
    heads, d = config.num_attention_heads, config.global_head_dim
    return {
        **expert_dims(config),
        "F": config.intermediate_size,
        "O": heads * config.head_dim,
        "K": config.num_key_value_heads * config.head_dim,
        "h": config.head_dim,
        "gO": heads * d,
        "gK": config.num_global_key_value_heads * d,
        "gh": d,
    }


GEMMA4 = Family(
    prefixes=("model.language_model.", "model.", "language_model.model."),
    dims=_gemma4_dims,
    before_mixer=(Tensor("input_layernorm", "D"),),
    mixers={
        SLIDING_ATTENTION: (
            Tensor("self_attn.q_proj", "O D"),
            Tensor("self_attn.k_proj", "K D"),
            Tensor("self_attn.v_proj", "K D"),
            Tensor("self_attn.q_norm", "h"),
            Tensor("self_attn.k_norm", "h"),
            Tensor("self_attn.o_proj", "D O"),
        ),
        FULL_ATTENTION: (  # of which keys are values
            Tensor("self_attn.q_proj", "gO D"),
            Tensor("self_attn.k_proj", "gK D"),
            Tensor("self_attn.q_norm", "gh"),
            Tensor("self_attn.k_norm", "gh"),
            Tensor("self_attn.o_proj", "D gO"),
        ),
    },
    after_mixer=(
        Tensor("post_attention_layernorm", "D"),
        Tensor("pre_feedforward_layernorm", "D"),
        *DENSE_MLP,
        Tensor("post_feedforward_layernorm_1", "D"),
    ),
    moe=(
        Tensor("router.proj", "E D", keep=True),
        Tensor("router.scale", "D", suffix=""),
        Tensor("router.per_expert_scale", "E", suffix=""),
        Tensor("pre_feedforward_layernorm_2", "D"),
        Tensor("post_feedforward_layernorm_2", "D"),
        Tensor("post_feedforward_layernorm", "D"),
        Tensor("layer_scalar", "1", suffix=""),
    ),
    expert_layouts=(
        (
            Experts("experts.gate_up_proj", "2I D", ("gate", "up"), suffix=""),
            Experts("experts.down_proj", "D I", ("down",), suffix=""),
        ),
        *(
            tuple(rule._replace(name=rule.name.replace("mlp.switch_mlp", "experts.switch_glu")) for rule in layout)
            for layout in (SWITCH_MLP, SWITCH_GATE_UP)
        ),
    ),
    skipped={
        "model.vision_tower.": "the vision tower",
        "model.embed_vision.": "the projector of the vision tower",
        "vision_tower.": "the vision tower",
        "embed_vision.": "the projector of the vision tower",
    },
)
