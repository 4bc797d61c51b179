"""Muse Spark: norms before and behind attention and experts, gates of the stream, and experts of a narrower width."""

from collections.abc import Mapping
from dataclasses import replace

from formats.config import MuseSparkConfig
from formats.families.decoders import OLMOE
from formats.families.shared import CORRECTION_BIAS, FUSED, PER_EXPERT, ROUTER
from formats.family import Experts, Tensor


def _dims(config: MuseSparkConfig) -> Mapping[str, int]:
    return {**OLMOE.dims(config), "l": config.moe_hidden_size}


def _of_latents(rule: Experts) -> Experts:
    """What experts read and give is moe_hidden_size wide."""
    return rule._replace(shape=rule.shape.replace("D", "l"))


def _residual_gate(name: str) -> Tensor:
    return Tensor(f"{name}_residual_gate.gate", "D", suffix="", dtype="F32")


MUSE_SPARK = replace(
    OLMOE,
    prefixes=("model.language_model.",),
    dims=_dims,
    after_mixer=(
        _residual_gate("post_attention"),
        Tensor("pre_feedforward_layernorm", "D"),
        Tensor("post_feedforward_layernorm", "D"),
        _residual_gate("post_feedforward"),
    ),
    moe=(
        ROUTER._replace(dtype="F32"),
        CORRECTION_BIAS,
        Tensor("mlp.pre_expert_proj", "l D"),
        Tensor("mlp.pre_expert_norm", "l"),
        Tensor("mlp.experts.post_expert_norm", "l"),
        Tensor("mlp.post_expert_proj", "D l"),
    ),
    expert_layouts=tuple(tuple(map(_of_latents, layout)) for layout in (FUSED, PER_EXPERT)),
    skipped={
        "model.vision_tower.": "the vision tower",
        "model.vision_adapter.": "the projector of the vision tower",
        "model.vision_projection.": "the projector of the vision tower",
        "model.audio_tower.": "the audio tower",
    },
    mlx=False,  # mlx-lm turns neighbouring rows, and keeps gates of the stream as what they come to
)
