"""Nemotron 3: layers of one part each, of Mamba2, attention, experts or an MLP, all of them called mixer."""

from collections.abc import Mapping

from formats.config import FULL_ATTENTION, LINEAR_ATTENTION, NemotronHConfig
from formats.config.nemotron_h import MLP, MOE
from formats.families.shared import CORRECTION_BIAS, ROUTER, expert_dims
from formats.family import EMBEDDING, FINAL_NORM, Experts, Family, Tensor


def _dims(config: NemotronHConfig) -> Mapping[str, int]:
    mamba = config.mamba
    return {
        **expert_dims(config),
        "F": config.intermediate_size,
        "S": config.shared_expert_intermediate_size,
        "l": config.expert_hidden_size,
        "O": config.num_attention_heads * config.head_dim,
        "K": config.num_key_value_heads * config.head_dim,
        "P": mamba.projected,
        "C": mamba.conv_channels,
        "k": mamba.conv_kernel,
        "v": mamba.width,
        "H": mamba.num_heads,
    }


MAMBA2 = (
    Tensor("mixer.in_proj", "P D"),
    Tensor("mixer.conv1d", "C 1 k", keep=True),
    Tensor("mixer.conv1d.bias", "C", suffix="", when=lambda config: config.mamba.conv_bias),
    Tensor("mixer.A_log", "H", suffix=""),
    Tensor("mixer.dt_bias", "H", suffix=""),
    Tensor("mixer.D", "H", suffix=""),
    Tensor("mixer.norm", "v"),
    Tensor("mixer.out_proj", "D v"),
)

NEMOTRON_H = Family(
    prefixes=("backbone.", "model."),  # as published; as transformers calls it
    dims=_dims,
    embedding=EMBEDDING._replace(source="embeddings"),
    before_mixer=(Tensor("norm", "D"),),
    mixers={
        LINEAR_ATTENTION: MAMBA2,
        FULL_ATTENTION: (
            Tensor("mixer.q_proj", "O D"),
            Tensor("mixer.k_proj", "K D"),
            Tensor("mixer.v_proj", "K D"),
            Tensor("mixer.o_proj", "D O"),
        ),
        MLP: (Tensor("mixer.up_proj", "F D"), Tensor("mixer.down_proj", "D F")),
        MOE: (),
    },
    after_mixer=(),
    moe=(
        ROUTER._replace(name="mixer.gate"),
        CORRECTION_BIAS._replace(name="mixer.gate.e_score_correction_bias"),
        Tensor("mixer.shared_experts.up_proj", "S D"),
        Tensor("mixer.shared_experts.down_proj", "D S"),
        Tensor("mixer.fc1_latent_proj", "l D", when=lambda config: config.moe_latent_size is not None),
        Tensor("mixer.fc2_latent_proj", "D l", when=lambda config: config.moe_latent_size is not None),
    ),
    expert_layouts=(
        (
            Experts("mixer.experts.{expert}.up_proj", "I l", ("up",)),
            Experts("mixer.experts.{expert}.down_proj", "l I", ("down",)),
        ),
        (  # stacked, as transformers computes them
            Experts("mixer.experts.up_proj", "I l", ("up",), suffix=""),
            Experts("mixer.experts.down_proj", "l I", ("down",), suffix=""),
        ),
        (  # as MLX names them
            Experts("mixer.switch_mlp.fc1", "I l", ("up",)),
            Experts("mixer.switch_mlp.fc2", "l I", ("down",)),
        ),
    ),
    last=(FINAL_NORM._replace(source="norm_f"),),
    skipped={"mtp.": "multi-token prediction"},
)
