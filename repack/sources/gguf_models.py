"""What llama.cpp's converter makes of a checkpoint, undone as data: architectures of GGUF files by name.

Tensors get the names that the model's publisher gave them, and config.json is written from the metadata, so that a
GGUF file goes the way of every other checkpoint. Nothing is permuted back: where the converter turned the order of
heads or of rotary pairs, the config states that order, and quantized blocks stay as they are.
Source: llama.cpp's conversion/*.py, and its models' graphs for what the metadata leaves out.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from formats.encodings.sources.plain import LOG, LOG_OF_MINUS
from formats.errors import FormatError, UnsupportedError
from formats.fields import shown
from formats.gguf import ROPE_FREQS
from repack.sources import gguf_decoders as decoders
from repack.sources.gguf_deepseek4 import DEEPSEEK4, OUTSIDE_DEEPSEEK4, deepseek4_config
from repack.sources.gguf_gemma4 import gemma4_config
from repack.sources.gguf_keys import Config, Keys, Metadata
from repack.sources.gguf_latent import (
    deepseek_v3_config,
    deepseek_v32_config,
    glm_moe_dsa_config,
    kimi_k3_config,
    kimi_linear_config,
    ling_config,
    mistral4_config,
)
from repack.sources.gguf_mamba2 import granitehybrid_config, granitemoe_config, nemotron_h_config
from repack.sources.gguf_mimo2 import mimo2_config
from repack.sources.gguf_names import (
    AFMOE,
    BAILING_MOE,
    BESIDE_EXPERTS,
    COMMON,
    CORRECTION_BIAS,
    DELTA_ATTENTION,
    EXPERTS,
    FEED_FORWARD,
    GRANITE,
    HUNYUAN,
    HY_V3,
    INDEXER,
    KIMI_K3,
    LAGUNA,
    LATENT_ATTENTION,
    LFM2_MOE,
    LINEAR_ATTENTION,
    LING,
    MAMBA2,
    MINIMAX_M3,
    NEMOTRON_H,
    OUTSIDE,
    OUTSIDE_KIMI_K3,
    OUTSIDE_LFM2,
    OUTSIDE_LING,
    OUTSIDE_NEMOTRON_H,
    SHARED_EXPERT,
    SHARED_EXPERTS,
    STEP35,
    ZERO_CENTRED,
    ZERO_CENTRED_INDEXER,
)
from repack.sources.gguf_qwen4 import OUTSIDE_QWEN4, QWEN4, ZERO_CENTRED_QWEN4, qwen4_config
from repack.sources.gguf_step35 import step35_config


@dataclass(frozen=True)
class Architecture:
    """One `general.architecture`: the model_type it is, its config.json, and its names of tensors."""

    model_type: str
    config: Callable[[Keys], Config]
    layer: Mapping[str, str]  # name after `blk.N.` -> name after `model.layers.N.`
    adjustments: Mapping[str, str] = field(default_factory=dict)  # of tensors by the GGUF name after `blk.N.`
    extra_layers: str = ""  # prefix of the publisher's names of layers that predict further tokens
    rope_factors: bool = False  # whether the tensor rope_freqs.weight says how positions turn
    prefix: str = "model."  # of the publisher's names of layers
    outside: Mapping[str, str] = field(default_factory=lambda: OUTSIDE)  # names of tensors of no layer


_DEEPSEEK = COMMON | SHARED_EXPERTS | CORRECTION_BIAS | LATENT_ATTENTION
_KIMI_LINEAR = COMMON | SHARED_EXPERTS | LATENT_ATTENTION | DELTA_ATTENTION
ARCHITECTURES: Mapping[str, Architecture] = {
    "qwen2moe": Architecture("qwen2_moe", decoders.qwen2_moe, COMMON | SHARED_EXPERT),
    "qwen3moe": Architecture("qwen3_moe", decoders.qwen3_moe, COMMON),
    "qwen3vlmoe": Architecture("qwen3_vl_moe", decoders.qwen3_vl_moe, COMMON),
    "qwen3next": Architecture(
        "qwen3_next", decoders.qwen3_next, COMMON | SHARED_EXPERT | LINEAR_ATTENTION, ZERO_CENTRED, "mtp."
    ),
    "qwen35moe": Architecture(
        "qwen3_5_moe", decoders.qwen3_5_moe, COMMON | SHARED_EXPERT | LINEAR_ATTENTION, ZERO_CENTRED, "mtp."
    ),
    "qwen4exp": Architecture(
        "qwen4_exp",
        qwen4_config,
        COMMON | SHARED_EXPERT | LINEAR_ATTENTION | QWEN4,
        ZERO_CENTRED | ZERO_CENTRED_QWEN4,
        "mtp.",
        outside=OUTSIDE_QWEN4,
    ),
    "deepseek2": Architecture("deepseek_v3", deepseek_v3_config, _DEEPSEEK),
    "deepseek32": Architecture("deepseek_v32", deepseek_v32_config, _DEEPSEEK | INDEXER),
    "glm-dsa": Architecture("glm_moe_dsa", glm_moe_dsa_config, _DEEPSEEK | INDEXER),
    "kimi-k3": Architecture(
        "kimi_k3", kimi_k3_config, _KIMI_LINEAR | KIMI_K3, {"ssm_a": LOG_OF_MINUS}, outside=OUTSIDE_KIMI_K3
    ),
    "kimi-linear": Architecture("kimi_linear", kimi_linear_config, _KIMI_LINEAR, {"ssm_a": LOG_OF_MINUS}),
    "bailingmoe3": Architecture("bailing_hybrid", ling_config, LING, {"ssm_a": LOG}, outside=OUTSIDE_LING),
    "deepseek4": Architecture("deepseek_v4", deepseek4_config, DEEPSEEK4, prefix="", outside=OUTSIDE_DEEPSEEK4),
    "afmoe": Architecture("afmoe", decoders.afmoe, AFMOE),
    "bailingmoe2": Architecture("bailing_moe", decoders.bailing_moe, BAILING_MOE, outside=OUTSIDE_LING),
    "cohere2moe": Architecture("cohere2_moe", decoders.cohere2_moe, COMMON | SHARED_EXPERTS),
    "dots1": Architecture("dots1", decoders.dots1, COMMON | SHARED_EXPERTS | CORRECTION_BIAS),
    "ernie4_5-moe": Architecture(
        "ernie4_5_moe",
        decoders.ernie4_5_moe,
        COMMON | SHARED_EXPERTS | {"exp_probs_b.bias": "mlp.moe_statics.e_score_correction_bias"},
    ),
    "exaone-moe": Architecture(
        "exaone_moe",
        decoders.exaone_moe,
        COMMON | SHARED_EXPERTS | {"exp_probs_b.bias": "mlp.e_score_correction_bias"},
        extra_layers="mtp.",
    ),
    "hunyuan-moe": Architecture("hunyuan_v1_moe", decoders.hunyuan_v1_moe, HUNYUAN),
    "hy_v3": Architecture("hy_v3", decoders.hy_v3, HY_V3),
    "llama": Architecture(
        "mixtral", decoders.mixtral, COMMON | {"ffn_gate_inp.weight": "block_sparse_moe.gate.weight"}
    ),
    "olmoe": Architecture("olmoe", decoders.olmoe, COMMON),
    "granitemoe": Architecture("granitemoe", granitemoe_config, GRANITE),
    "granitehybrid": Architecture("granitemoehybrid", granitehybrid_config, GRANITE | MAMBA2, {"ssm_a": LOG_OF_MINUS}),
    "nemotron_h_moe": Architecture(
        "nemotron_h",
        nemotron_h_config,
        NEMOTRON_H,
        {"ssm_a": LOG_OF_MINUS},
        extra_layers="mtp.",
        prefix="backbone.",
        outside=OUTSIDE_NEMOTRON_H,
    ),
    "glm4moe": Architecture("glm4_moe", decoders.glm4_moe, COMMON | SHARED_EXPERTS | CORRECTION_BIAS),
    "gemma4": Architecture("gemma4", gemma4_config, COMMON | BESIDE_EXPERTS, rope_factors=True),
    "laguna": Architecture("laguna", decoders.laguna, LAGUNA),
    "lfm2moe": Architecture("lfm2_moe", decoders.lfm2_moe, LFM2_MOE, outside=OUTSIDE_LFM2),
    "llama4": Architecture("llama4", decoders.llama4, COMMON | FEED_FORWARD, rope_factors=True),
    "mimo2": Architecture(
        "mimo_v2_flash",
        mimo2_config,
        COMMON | CORRECTION_BIAS | {"attn_sinks.weight": "self_attn.attention_sink_bias"},
        extra_layers="model.mtp.",
    ),
    "minimax-m2": Architecture(
        "minimax_m2",
        decoders.minimax_m2,
        COMMON
        | {
            "ffn_gate_inp.weight": "block_sparse_moe.gate.weight",
            "exp_probs_b.bias": "block_sparse_moe.e_score_correction_bias",
        },
    ),
    "mistral4": Architecture("mistral4", mistral4_config, _DEEPSEEK),
    "minimax-m3": Architecture("minimax_m3_vl", decoders.minimax_m3, MINIMAX_M3, ZERO_CENTRED | ZERO_CENTRED_INDEXER),
    "step35": Architecture("step3p5", step35_config, STEP35, ZERO_CENTRED, rope_factors=True),
    "gpt-oss": Architecture(
        "gpt_oss",
        decoders.gpt_oss,
        COMMON
        | {
            "ffn_gate_inp.weight": "mlp.router.weight",
            "ffn_gate_inp.bias": "mlp.router.bias",
            "attn_sinks.weight": "self_attn.sinks",
        }
        | {name: hf.replace("switch_mlp", "experts") for name, hf in EXPERTS.items()},
    ),
}


def architecture_of(
    metadata: Metadata, tensors: Mapping[str, Sequence[int]], rope_factors: Sequence[float] | None, where: str
) -> tuple[Architecture, Keys]:
    """Which architecture a file says it is. Raises FormatError, or UnsupportedError naming those that are known."""
    name = metadata.get("general.architecture")
    if not isinstance(name, str):
        raise FormatError(f"{where}: general.architecture is {shown(name)}, expected a string")
    if name not in ARCHITECTURES:
        raise UnsupportedError(
            f"{where}: general.architecture is {shown(name)}, supported are {', '.join(ARCHITECTURES)}"
        )
    architecture = ARCHITECTURES[name]
    if rope_factors is not None and not architecture.rope_factors:
        raise UnsupportedError(f"{where}: {ROPE_FREQS} is not implemented for {name}")
    return architecture, Keys(metadata, name, tensors, rope_factors, where)


def published_name(name: str, architecture: Architecture, num_layers: int) -> tuple[str, str]:
    """The publisher's name of a tensor, and the adjustment of its values, "" for none; an unknown name stays."""
    if name in architecture.outside:
        return architecture.outside[name], architecture.adjustments.get(name, "")
    words = name.split(".", 2)
    if len(words) == 3 and words[0] == "blk" and words[1].isdecimal():
        rest = architecture.layer.get(words[2], words[2])
        prefix = architecture.extra_layers if int(words[1]) >= num_layers else ""
        return f"{prefix}{architecture.prefix}layers.{words[1]}.{rest}", architecture.adjustments.get(words[2], "")
    return name, ""
