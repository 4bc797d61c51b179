"""What several families have alike: sizes, stacks of experts, dense layers, routers, shared experts."""

from collections.abc import Mapping

from formats.config.base import ModelConfig
from formats.config.deepseek_v4 import CompressedConfig
from formats.config.glm5_next import Glm5NextConfig
from formats.config.hy_v4 import HyV4Config
from formats.config.mamba2 import Mamba2
from formats.family import Experts, Tensor


def expert_dims(config: ModelConfig) -> Mapping[str, int]:
    """Sizes that every family's shapes speak of."""
    return {
        "D": config.hidden_size,
        "V": config.vocab_size,
        "E": config.num_experts,
        "I": config.moe_intermediate_size,
        "2I": 2 * config.moe_intermediate_size,
    }


def stream_dims(config: CompressedConfig | Glm5NextConfig | HyV4Config) -> Mapping[str, int]:
    """Sizes of what weighs residual streams."""
    streams = config.hc_mult
    return {"3": 3, "N": streams, "ND": config.streams_width, "W": (2 + streams) * streams}


def hyper_connection(half: str) -> tuple[Tensor, ...]:
    """What weights the residual streams before and after one half of a layer."""
    return (
        Tensor(f"{half}_hc.fn", "W ND", keep=True, suffix="", dtype="F32", source=f"hc_{half}_fn"),
        Tensor(f"{half}_hc.base", "W", suffix="", dtype="F32", source=f"hc_{half}_base"),
        Tensor(f"{half}_hc.scale", "3", suffix="", dtype="F32", source=f"hc_{half}_scale"),
    )


def mamba_dims(mamba: Mamba2) -> Mapping[str, int]:
    """Sizes that MAMBA2 speaks of."""
    return {
        "P": mamba.projected,
        "C": mamba.conv_channels,
        "k": mamba.conv_kernel,
        "v": mamba.width,
        "H": mamba.num_heads,
    }


MAMBA2 = (
    Tensor("mamba.in_proj", "P D"),
    Tensor("mamba.conv1d", "C 1 k", keep=True),
    Tensor("mamba.conv1d.bias", "C", suffix="", when=lambda config: config.mamba.conv_bias),
    Tensor("mamba.A_log", "H", suffix=""),
    Tensor("mamba.dt_bias", "H", suffix=""),
    Tensor("mamba.D", "H", suffix=""),
    Tensor("mamba.norm", "v"),
    Tensor("mamba.out_proj", "D v"),
)
PER_EXPERT = (
    Experts("mlp.experts.{expert}.gate_proj", "I D", ("gate",)),
    Experts("mlp.experts.{expert}.up_proj", "I D", ("up",)),
    Experts("mlp.experts.{expert}.down_proj", "D I", ("down",)),
)

# Stacked part by part, as MLX names them; GGUF files are given these names (repack/sources/gguf_names.py).
SWITCH_MLP = (
    Experts("mlp.switch_mlp.gate_proj", "I D", ("gate",)),
    Experts("mlp.switch_mlp.up_proj", "I D", ("up",)),
    Experts("mlp.switch_mlp.down_proj", "D I", ("down",)),
)
# As llama.cpp's converter stacks them with --fuse-gate-up-exps.
SWITCH_GATE_UP = (Experts("mlp.switch_mlp.gate_up_proj", "2I D", ("gate", "up")), SWITCH_MLP[2])
# Stacked as transformers computes them, and as some publish them.
FUSED = (
    Experts("mlp.experts.gate_up_proj", "2I D", ("gate", "up"), suffix=""),
    Experts("mlp.experts.down_proj", "D I", ("down",), suffix=""),
)
W1_W3_W2 = (
    Experts("block_sparse_moe.experts.{expert}.w1", "I D", ("gate",)),
    Experts("block_sparse_moe.experts.{expert}.w3", "I D", ("up",)),
    Experts("block_sparse_moe.experts.{expert}.w2", "D I", ("down",)),
)

DENSE_MLP = (
    Tensor("mlp.gate_proj", "F D"),
    Tensor("mlp.up_proj", "F D"),
    Tensor("mlp.down_proj", "D F"),
)
ROUTER = Tensor("mlp.gate", "E D", keep=True)
CORRECTION_BIAS = Tensor("mlp.gate.e_score_correction_bias", "E", suffix="", dtype="F32")
SHARED_EXPERT = (
    Tensor("mlp.shared_expert.gate_proj", "S D"),
    Tensor("mlp.shared_expert.up_proj", "S D"),
    Tensor("mlp.shared_expert.down_proj", "D S"),
)
SHARED_EXPERT_GATE = Tensor("mlp.shared_expert_gate", "1 D", keep=True)
VISION_TOWER = {"model.visual.": "the vision tower", "vision_tower.": "the vision tower"}
