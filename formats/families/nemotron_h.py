"""Nemotron 3: layers of one part each, of Mamba2, attention, experts or an MLP, all of them called mixer."""

from collections.abc import Mapping

from formats.config import FULL_ATTENTION, LINEAR_ATTENTION, NemotronHConfig
from formats.config.nemotron_h import MLP, MOE
from formats.families.shared import CORRECTION_BIAS, MAMBA2, ROUTER, expert_dims, mamba_dims
from formats.family import EMBEDDING, FINAL_NORM, Experts, Family, Tensor


def _dims(config: NemotronHConfig) -> Mapping[str, int]:
    return {
        **expert_dims(config),
        **mamba_dims(config.mamba),
        "F": config.intermediate_size,
        "S": config.shared_expert_intermediate_size,
        "l": config.expert_hidden_size,
        "O": config.num_attention_heads * config.head_dim,
        "K": config.num_key_value_heads * config.head_dim,
    }


def _mixer(*tensors: Tensor) -> tuple[Tensor, ...]:
    """As published, where whatever a layer is made of is its mixer."""
    return tuple(tensor._replace(source=f"mixer.{tensor.name.partition('.')[2]}") for tensor in tensors)


def _latent(name: str, shape: str, source: str) -> Tensor:
    return Tensor(name, shape, source=source, when=lambda config: config.moe_latent_size is not None)


NEMOTRON_H = Family(
    prefixes=("backbone.", "model."),  # as published; as transformers calls it
    dims=_dims,
    embedding=EMBEDDING._replace(source="embeddings"),
    before_mixer=(Tensor("norm", "D"),),
    mixers={
        LINEAR_ATTENTION: _mixer(*MAMBA2),
        FULL_ATTENTION: _mixer(
            Tensor("self_attn.q_proj", "O D"),
            Tensor("self_attn.k_proj", "K D"),
            Tensor("self_attn.v_proj", "K D"),
            Tensor("self_attn.o_proj", "D O"),
        ),
        MLP: _mixer(Tensor("mlp.up_proj", "F D"), Tensor("mlp.down_proj", "D F")),
        MOE: (),
    },
    after_mixer=(),
    moe=(
        *_mixer(ROUTER, CORRECTION_BIAS),
        *_mixer(Tensor("mlp.shared_experts.up_proj", "S D"), Tensor("mlp.shared_experts.down_proj", "D S")),
        _latent("mlp.routed_expert_down_proj", "l D", "mixer.fc1_latent_proj"),
        _latent("mlp.routed_expert_up_proj", "D l", "mixer.fc2_latent_proj"),
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
