"""Muse Spark: norms before and behind attention and experts, gates of the stream, and experts of a narrower width."""

from collections.abc import Mapping
from dataclasses import replace

from formats.config import MuseSparkConfig
from formats.families.decoders import EXPERTS_BY_PART, OLMOE
from formats.families.shared import CORRECTION_BIAS, FUSED, PER_EXPERT, ROUTER
from formats.family import Experts, Tensor


def _dims(config: MuseSparkConfig) -> Mapping[str, int]:
    return {**OLMOE.dims(config), "l": config.moe_hidden_size}


def _of_latents(rule: Experts) -> Experts:
    """What experts read and give is moe_hidden_size wide."""
    return rule._replace(shape=rule.shape.replace("D", "l"))


def _residual_gate(half: str, by_mlx: str) -> tuple[Tensor, ...]:
    """As it is, or as the two factors that it comes to, of the stream and of what is added."""
    name, vector = f"{half}_residual_gate", Tensor("", "D", suffix="", dtype="F32")
    return (
        vector._replace(name=f"{name}.gate", when=lambda config: not config.residual_gate_split),
        vector._replace(name=f"{name}.alpha", source=f"{by_mlx}_alpha", when=lambda config: config.residual_gate_split),
        vector._replace(name=f"{name}.beta", source=f"{by_mlx}_beta", when=lambda config: config.residual_gate_split),
    )


MUSE_SPARK = replace(
    OLMOE,
    prefixes=("model.language_model.",),
    dims=_dims,
    after_mixer=(
        *_residual_gate("post_attention", "add_attn"),
        Tensor("pre_feedforward_layernorm", "D"),
        Tensor("post_feedforward_layernorm", "D"),
        *_residual_gate("post_feedforward", "add_ffn"),
    ),
    moe=(
        ROUTER._replace(dtype="F32"),
        CORRECTION_BIAS,
        Tensor("mlp.pre_expert_proj", "l D"),
        Tensor("mlp.pre_expert_norm", "l"),
        Tensor("mlp.experts.post_expert_norm", "l"),
        Tensor("mlp.post_expert_proj", "D l"),
    ),
    expert_layouts=tuple(tuple(map(_of_latents, layout)) for layout in (FUSED, PER_EXPERT, EXPERTS_BY_PART)),
    skipped={
        "model.vision_tower.": "the vision tower",
        "model.vision_adapter.": "the projector of the vision tower",
        "model.vision_projection.": "the projector of the vision tower",
        "model.audio_tower.": "the audio tower",
    },
)
