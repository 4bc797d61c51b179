"""What llama.cpp's converter makes of a checkpoint, undone as data: architectures of GGUF files by name.

Tensors get the names that the model's publisher gave them, and config.json is written from the metadata, so that a
GGUF file goes the way of every other checkpoint. Nothing is permuted back: where the converter turned the order of
heads or of rotary pairs, the config states that order, and quantized blocks stay as they are.
Source: llama.cpp's conversion/*.py, and its models' graphs for what the metadata leaves out.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from formats.config import FACTORS
from formats.encodings.sources.plain import LOG, LOG_OF_MINUS
from formats.errors import FormatError, UnsupportedError
from formats.fields import shown
from formats.gguf import ROPE_FREQS
from repack.sources.gguf_decoders import (
    exaone_moe_config,
    hunyuan_v1_moe_config,
    hy_v3_config,
    laguna_config,
    minimax_m3_config,
)
from repack.sources.gguf_deepseek4 import DEEPSEEK4, OUTSIDE_DEEPSEEK4, deepseek4_config
from repack.sources.gguf_gemma4 import gemma4_config
from repack.sources.gguf_keys import (
    SIGMOID,
    SOFTMAX,
    Config,
    Keys,
    Metadata,
    decoder_config,
    groups,
    linear_attention_config,
)
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


def _qwen2_moe(keys: Keys) -> Config:
    return decoder_config(keys, "qwen2_moe") | {
        "moe_intermediate_size": keys["expert_feed_forward_length"],
        "shared_expert_intermediate_size": keys["expert_shared_feed_forward_length"],
        "norm_topk_prob": False,
    }


def _qwen3_moe(keys: Keys) -> Config:
    return decoder_config(keys, "qwen3_moe") | {
        "moe_intermediate_size": keys["expert_feed_forward_length"],
        "norm_topk_prob": True,
        "attention_bias": keys.has("attn_q.bias"),
    }


def _qwen3_vl_moe(keys: Keys) -> Config:
    return _qwen3_moe(keys) | {"model_type": "qwen3_vl_moe"}


def _qwen3_next(keys: Keys) -> Config:
    apart = {"linear_in_proj_grouped": keys.has("ssm_in.weight")}
    return linear_attention_config(keys, "qwen3_next") | apart


def _qwen3_5_moe(keys: Keys) -> Config:
    return linear_attention_config(keys, "qwen3_5_moe") | {"linear_value_head_order": "tiled"}


def _mixtral(keys: Keys) -> Config:
    return decoder_config(keys, "mixtral", experts="num_local_experts") | {
        "intermediate_size": keys["feed_forward_length"],
        "interleaved_rotary_pairs": True,
    }


def _olmoe(keys: Keys) -> Config:
    return decoder_config(keys, "olmoe") | {"intermediate_size": keys["feed_forward_length"], "norm_topk_prob": False}


def _glm4_moe(keys: Keys) -> Config:
    keys.only("expert_gating_func", SIGMOID)
    config = decoder_config(keys, "glm4_moe", experts="n_routed_experts")
    return config | {
        "moe_intermediate_size": keys["expert_feed_forward_length"],
        "intermediate_size": keys["feed_forward_length"],
        "first_k_dense_replace": keys.get("leading_dense_block_count", 0),
        "attention_bias": keys.has("attn_q.bias"),
        "use_qk_norm": keys.has("attn_q_norm.weight"),
        "n_shared_experts": keys.get("expert_shared_count", 1),
        "norm_topk_prob": keys.get("expert_weights_norm", True),
        "routed_scaling_factor": keys.get("expert_weights_scale", 1.0),
        **groups(keys),
        "partial_rotary_factor": keys.size("rope.dimension_count", config["head_dim"] // 2) / config["head_dim"],
    }


def _afmoe(keys: Keys) -> Config:
    """Trinity, of whose layers with windows and scaled embedding llama.cpp has no keys."""
    keys.only("expert_gating_func", SIGMOID)
    return decoder_config(keys, "afmoe") | {
        "moe_intermediate_size": keys["expert_feed_forward_length"],
        "intermediate_size": keys["feed_forward_length"],
        "num_dense_layers": keys.get("leading_dense_block_count", 0),
        "num_shared_experts": keys["expert_shared_count"],
        "route_norm": keys.get("expert_weights_norm", True),
        "route_scale": keys.get("expert_weights_scale", 1.0),
        "sliding_window": keys["attention.sliding_window"],
        "global_attn_every_n_layers": 4,
        "mup_enabled": True,
    }


def _bailing_moe(keys: Keys) -> Config:
    """Ling 2, and Sarvam-30B, whose biases of routers the converter moves by their mean, which chooses alike."""
    keys.only("expert_gating_func", SIGMOID)
    config = decoder_config(keys, "bailing_moe")
    return config | {
        "moe_intermediate_size": keys["expert_feed_forward_length"],
        "intermediate_size": keys["feed_forward_length"],
        "first_k_dense_replace": keys.get("leading_dense_block_count", 0),
        "moe_router_enable_expert_bias": True,
        "num_shared_experts": keys["expert_shared_count"],
        "norm_topk_prob": keys.get("expert_weights_norm", False),
        "rotary_dim": keys.size("rope.dimension_count", config["head_dim"]),
        "routed_scaling_factor": keys.get("expert_weights_scale", 1.0),
        "score_function": "sigmoid",
        "use_qk_norm": keys.has("attn_q_norm.weight"),
        **groups(keys),
    }


def _cohere2_moe(keys: Keys) -> Config:
    """Command A+; that dense layers know positions, and that shared experts are averaged in, no key says."""
    keys.only("expert_gating_func", SIGMOID, SOFTMAX)
    keys.only("rope.scaling.type", "none")
    head_dim, layers = keys.size("attention.key_length"), keys.layers
    for key in ("attention.value_length", "rope.dimension_count"):
        keys.only(key, head_dim)
    keys.only("rope.freq_base_swa", keys.get("rope.freq_base", 10000.0))
    keys.only("expert_weights_scale", 1.0)
    slides = keys.items("attention.sliding_window_pattern", bool, layers, more=True)[:layers]
    rms = keys.get("attention.layer_norm_rms_epsilon", 0.0) != 0
    return {
        "model_type": "cohere2_moe",
        "hidden_size": keys["embedding_length"],
        "num_hidden_layers": layers,
        "max_position_embeddings": keys["context_length"],
        "rms_norm_eps": keys["attention.layer_norm_rms_epsilon"] if rms else None,
        "layer_norm_eps": None if rms else keys["attention.layer_norm_epsilon"],
        "num_attention_heads": keys["attention.head_count"],
        "num_key_value_heads": keys.get("attention.head_count_kv"),
        "head_dim": head_dim,
        "rope_theta": keys.get("rope.freq_base", 10000.0),
        "layer_types": ["sliding_attention" if kind else "full_attention" for kind in slides],
        "first_k_dense_replace": keys.get("leading_dense_block_count", 0),
        "prefix_dense_sliding_window_pattern": 1,
        "sliding_window": keys["attention.sliding_window"],
        "intermediate_size": keys["expert_feed_forward_length"],
        "prefix_dense_intermediate_size": keys["feed_forward_length"],
        "num_experts": keys["expert_count"],
        "num_experts_per_tok": keys["expert_used_count"],
        "num_shared_experts": keys.get("expert_shared_count", 0),
        "expert_selection_fn": "softmax" if keys.get("expert_gating_func") == SOFTMAX else "sigmoid",
        "norm_topk_prob": keys.get("expert_weights_norm", False),
        "logit_scale": keys["logit_scale"],
    }


def _dots1(keys: Keys) -> Config:
    keys.only("expert_gating_func", SIGMOID)
    return decoder_config(keys, "dots1", experts="n_routed_experts") | {
        "moe_intermediate_size": keys["expert_feed_forward_length"],
        "intermediate_size": keys["feed_forward_length"],
        "first_k_dense_replace": keys.get("leading_dense_block_count", 0),
        "n_shared_experts": keys["expert_shared_count"],
        "norm_topk_prob": keys.get("expert_weights_norm", False),
        "routed_scaling_factor": keys.get("expert_weights_scale", 1.0),
        "sliding_window": None,
        **groups(keys),
    }


def _ernie4_5_moe(keys: Keys) -> Config:
    """ERNIE-4.5; that its router has a softmax and a bias, no key says."""
    keys.only("expert_gating_func", SOFTMAX)
    layers = keys.layers
    sparse = [layer for layer in range(layers) if keys.has("ffn_gate_inp.weight", layer)]
    config = decoder_config(keys, "ernie4_5_moe", experts="moe_num_experts")
    return config | {
        "moe_k": keys["expert_used_count"],
        "moe_layer_start_index": min(sparse, default=layers),
        "moe_layer_end_index": max(sparse, default=-1),
        "moe_layer_interval": keys["interleave_moe_layer_step"],
        "moe_intermediate_size": keys["expert_feed_forward_length"],
        "moe_num_shared_experts": keys.get("expert_shared_count", 0),
        "intermediate_size": keys["feed_forward_length"],
    }


def _lfm2_moe(keys: Keys) -> Config:
    """LFM2: layers without keys have a convolution."""
    keys.only("expert_gating_func", SIGMOID)
    key_heads = keys.items("attention.head_count_kv", int, keys.layers)
    if len(heads := set(key_heads) - {0}) != 1:
        raise UnsupportedError(f"{keys.where}: {keys.architecture}.attention.head_count_kv is {shown(key_heads)}")
    return decoder_config(keys, "lfm2_moe") | {
        "norm_eps": keys["attention.layer_norm_rms_epsilon"],
        "num_key_value_heads": heads.pop(),
        "layer_types": ["full_attention" if count else "conv" for count in key_heads],
        "conv_L_cache": keys["shortconv.l_cache"],
        "intermediate_size": keys["feed_forward_length"],
        "moe_intermediate_size": keys["expert_feed_forward_length"],
        "num_dense_layers": keys.get("leading_dense_block_count", 0),
        "norm_topk_prob": keys.get("expert_weights_norm", True),
        "routed_scaling_factor": keys.get("expert_weights_scale", 1.0),
    }


def _minimax_m2(keys: Keys) -> Config:
    keys.only("expert_gating_func", SIGMOID)
    return decoder_config(keys, "minimax_m2", experts="num_local_experts") | {
        "intermediate_size": keys["expert_feed_forward_length"],
        "rotary_dim": keys["rope.dimension_count"],
    }


def _gpt_oss(keys: Keys) -> Config:
    config = decoder_config(keys, "gpt_oss", experts="num_local_experts")
    if config["rope_scaling"] is not None:
        config["rope_scaling"]["truncate"] = False  # the published models; llama.cpp has no key for it
    return config | {
        "intermediate_size": keys["expert_feed_forward_length"],
        "sliding_window": keys["attention.sliding_window"],
        "attention_bias": True,
    }


def _llama4(keys: Keys) -> Config:
    """Llama 4, of whose chunks, temperature and layers without positions llama.cpp has no keys."""
    keys.only("attention.sliding_window", 8192)
    keys.only("attention.sliding_window_pattern", 4)
    keys.only("rope.scaling.type", "none")
    config = decoder_config(keys, "llama4_text", experts="num_local_experts")
    if keys.rope_factors is not None:
        config["rope_scaling"] = {"rope_type": FACTORS, "factors": keys.rope_factors}
    keys.only("rope.dimension_count", config["head_dim"])
    return config | {
        "intermediate_size": keys["expert_feed_forward_length"],
        "intermediate_size_mlp": keys["feed_forward_length"],
        "interleave_moe_layer_step": keys["interleave_moe_layer_step"],
        "attention_chunk_size": 8192,
        "use_qk_norm": keys["expert_count"] != 128,  # llama.cpp tells Maverick so
    }


_DEEPSEEK = COMMON | SHARED_EXPERTS | CORRECTION_BIAS | LATENT_ATTENTION
_KIMI_LINEAR = COMMON | SHARED_EXPERTS | LATENT_ATTENTION | DELTA_ATTENTION
ARCHITECTURES: Mapping[str, Architecture] = {
    "qwen2moe": Architecture("qwen2_moe", _qwen2_moe, COMMON | SHARED_EXPERT),
    "qwen3moe": Architecture("qwen3_moe", _qwen3_moe, COMMON),
    "qwen3vlmoe": Architecture("qwen3_vl_moe", _qwen3_vl_moe, COMMON),
    "qwen3next": Architecture(
        "qwen3_next", _qwen3_next, COMMON | SHARED_EXPERT | LINEAR_ATTENTION, ZERO_CENTRED, "mtp."
    ),
    "qwen35moe": Architecture(
        "qwen3_5_moe", _qwen3_5_moe, COMMON | SHARED_EXPERT | LINEAR_ATTENTION, ZERO_CENTRED, "mtp."
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
    "afmoe": Architecture("afmoe", _afmoe, AFMOE),
    "bailingmoe2": Architecture("bailing_moe", _bailing_moe, BAILING_MOE, outside=OUTSIDE_LING),
    "cohere2moe": Architecture("cohere2_moe", _cohere2_moe, COMMON | SHARED_EXPERTS),
    "dots1": Architecture("dots1", _dots1, COMMON | SHARED_EXPERTS | CORRECTION_BIAS),
    "ernie4_5-moe": Architecture(
        "ernie4_5_moe",
        _ernie4_5_moe,
        COMMON | SHARED_EXPERTS | {"exp_probs_b.bias": "mlp.moe_statics.e_score_correction_bias"},
    ),
    "exaone-moe": Architecture(
        "exaone_moe",
        exaone_moe_config,
        COMMON | SHARED_EXPERTS | {"exp_probs_b.bias": "mlp.e_score_correction_bias"},
        extra_layers="mtp.",
    ),
    "hunyuan-moe": Architecture("hunyuan_v1_moe", hunyuan_v1_moe_config, HUNYUAN),
    "hy_v3": Architecture("hy_v3", hy_v3_config, HY_V3),
    "llama": Architecture("mixtral", _mixtral, COMMON | {"ffn_gate_inp.weight": "block_sparse_moe.gate.weight"}),
    "olmoe": Architecture("olmoe", _olmoe, COMMON),
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
    "glm4moe": Architecture("glm4_moe", _glm4_moe, COMMON | SHARED_EXPERTS | CORRECTION_BIAS),
    "gemma4": Architecture("gemma4", gemma4_config, COMMON | BESIDE_EXPERTS, rope_factors=True),
    "laguna": Architecture("laguna", laguna_config, LAGUNA),
    "lfm2moe": Architecture("lfm2_moe", _lfm2_moe, LFM2_MOE, outside=OUTSIDE_LFM2),
    "llama4": Architecture("llama4", _llama4, COMMON | FEED_FORWARD, rope_factors=True),
    "mimo2": Architecture(
        "mimo_v2_flash",
        mimo2_config,
        COMMON | CORRECTION_BIAS | {"attn_sinks.weight": "self_attn.attention_sink_bias"},
        extra_layers="model.mtp.",
    ),
    "minimax-m2": Architecture(
        "minimax_m2",
        _minimax_m2,
        COMMON
        | {
            "ffn_gate_inp.weight": "block_sparse_moe.gate.weight",
            "exp_probs_b.bias": "block_sparse_moe.e_score_correction_bias",
        },
    ),
    "mistral4": Architecture("mistral4", mistral4_config, _DEEPSEEK),
    "minimax-m3": Architecture("minimax_m3_vl", minimax_m3_config, MINIMAX_M3, ZERO_CENTRED | ZERO_CENTRED_INDEXER),
    "step35": Architecture("step3p5", step35_config, STEP35, ZERO_CENTRED, rope_factors=True),
    "gpt-oss": Architecture(
        "gpt_oss",
        _gpt_oss,
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
