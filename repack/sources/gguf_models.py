"""What llama.cpp's converter makes of a checkpoint, undone as data: architectures of GGUF files by name.

Tensors get the names that the model's publisher gave them, and config.json is written from the metadata, so that a
GGUF file goes the way of every other checkpoint. Nothing is permuted back: where the converter turned the order of
heads or of rotary pairs, the config states that order, and quantized blocks stay as they are.
Source: llama.cpp's conversion/*.py, and its models' graphs for what the metadata leaves out.
"""

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field

from formats.config import FACTORS
from formats.encodings.sources.plain import LOG_OF_MINUS, MINUS_ONE
from formats.errors import FormatError, UnsupportedError
from formats.fields import shown
from formats.gguf import ROPE_FREQS
from repack.sources.gguf_gemma4 import gemma4_config
from repack.sources.gguf_keys import Config, Keys, Metadata, dimensions

SIGMOID = 2  # of expert_gating_func


@dataclass(frozen=True)
class Architecture:
    """One `general.architecture`: the model_type it is, its config.json, and its names of tensors."""

    model_type: str
    config: Callable[[Keys], Config]
    layer: Mapping[str, str]  # name after `blk.N.` -> name after `model.layers.N.`
    adjustments: Mapping[str, str] = field(default_factory=dict)  # of tensors by the GGUF name after `blk.N.`
    extra_layers: str = ""  # prefix of the publisher's names of layers that predict further tokens
    rope_factors: bool = False  # whether the tensor rope_freqs.weight says how positions turn


OUTSIDE = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_ATTENTION = {
    f"attn_{gguf}.{kind}": f"self_attn.{name}_proj.{kind}"
    for gguf, name in (("q", "q"), ("k", "k"), ("v", "v"), ("output", "o"))
    for kind in ("weight", "bias")
} | {"attn_q_norm.weight": "self_attn.q_norm.weight", "attn_k_norm.weight": "self_attn.k_norm.weight"}
_DENSE = {f"ffn_{part}.weight": f"mlp.{part}_proj.weight" for part in ("gate", "up", "down")}
_EXPERTS = {
    f"ffn_{part}_exps.{kind}": f"mlp.switch_mlp.{part}_proj.{kind}"
    for part in ("gate", "up", "gate_up", "down")
    for kind in ("weight", "bias")
}
_COMMON = {
    "attn_norm.weight": "input_layernorm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "post_attention_norm.weight": "post_attention_layernorm.weight",
    "ffn_gate_inp.weight": "mlp.gate.weight",
    **_ATTENTION,
    **_DENSE,
    **_EXPERTS,
}
_PARTS = ("gate", "up", "down")
_SHARED_EXPERT = {f"ffn_{part}_shexp.weight": f"mlp.shared_expert.{part}_proj.weight" for part in _PARTS}
_SHARED_EXPERT |= {"ffn_gate_inp_shexp.weight": "mlp.shared_expert_gate.weight"}
_FEED_FORWARD = {  # of Llama 4, experts as MLX names them
    "ffn_gate_inp.weight": "feed_forward.router.weight",
    **{f"ffn_{part}.weight": f"feed_forward.{part}_proj.weight" for part in _PARTS},
    **{f"ffn_{part}_shexp.weight": f"feed_forward.shared_expert.{part}_proj.weight" for part in _PARTS},
    **{f"ffn_{part}_exps.weight": f"feed_forward.experts.{part}_proj.weight" for part in _PARTS},
}
_BESIDE_EXPERTS = {  # of Gemma 4, experts as MLX names them
    "ffn_norm.weight": "pre_feedforward_layernorm.weight",
    "post_ffw_norm.weight": "post_feedforward_layernorm.weight",
    "post_ffw_norm_1.weight": "post_feedforward_layernorm_1.weight",
    "pre_ffw_norm_2.weight": "pre_feedforward_layernorm_2.weight",
    "post_ffw_norm_2.weight": "post_feedforward_layernorm_2.weight",
    "layer_output_scale.weight": "layer_scalar",
    "ffn_gate_inp.weight": "router.proj.weight",
    "ffn_gate_inp.scale": "router.scale",
    "ffn_down_exps.scale": "router.per_expert_scale",
    **{name: hf.replace("mlp.switch_mlp", "experts.switch_glu") for name, hf in _EXPERTS.items()},
}
_SHARED_EXPERTS = {f"ffn_{part}_shexp.weight": f"mlp.shared_experts.{part}_proj.weight" for part in _PARTS}
_LINEAR_ATTENTION = {
    "attn_qkv.weight": "linear_attn.in_proj_qkv.weight",
    "attn_gate.weight": "linear_attn.in_proj_z.weight",
    "ssm_alpha.weight": "linear_attn.in_proj_a.weight",
    "ssm_beta.weight": "linear_attn.in_proj_b.weight",
    "ssm_ba.weight": "linear_attn.in_proj_ba.weight",
    "ssm_in.weight": "linear_attn.in_proj_qkvz.weight",  # of the first files of Qwen3-Next
    "ssm_conv1d.weight": "linear_attn.conv1d.weight",
    "ssm_a": "linear_attn.A_log",
    "ssm_dt.bias": "linear_attn.dt_bias",
    "ssm_norm.weight": "linear_attn.norm.weight",
    "ssm_out.weight": "linear_attn.out_proj.weight",
}
_LATENT_ATTENTION = {
    "attn_q_a.weight": "self_attn.q_a_proj.weight",
    "attn_q_a_norm.weight": "self_attn.q_a_layernorm.weight",
    "attn_q_b.weight": "self_attn.q_b_proj.weight",
    "attn_kv_a_mqa.weight": "self_attn.kv_a_proj_with_mqa.weight",
    "attn_kv_a_norm.weight": "self_attn.kv_a_layernorm.weight",
    "attn_kv_b.weight": "self_attn.kv_b_proj.weight",
    "attn_k_b.weight": "self_attn.embed_q.weight",  # [heads, kv_lora_rank, ...], as MLX splits and names them
    "attn_v_b.weight": "self_attn.unembed_out.weight",
}
_ZERO_CENTRED = {
    "attn_norm.weight": MINUS_ONE,
    "post_attention_norm.weight": MINUS_ONE,
    "attn_q_norm.weight": MINUS_ONE,
    "attn_k_norm.weight": MINUS_ONE,
    "output_norm.weight": MINUS_ONE,
    "ssm_a": LOG_OF_MINUS,
}


def _decoder_config(keys: Keys, model_type: str, *, experts: str = "num_experts") -> Config:
    """What all decoders have."""
    heads = keys["attention.head_count"]
    head_dim = keys.get("attention.key_length", keys["embedding_length"] // heads)
    keys.only("attention.value_length", head_dim)
    return dimensions(keys) | {
        "model_type": model_type,
        "num_key_value_heads": keys.get("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "rope_scaling": _rope_scaling(keys),
        experts: keys["expert_count"],
    }


def _rope_scaling(keys: Keys) -> Config | None:
    keys.only("rope.scaling.type", "none", "yarn")
    if keys.get("rope.scaling.type", "none") == "none":
        return None
    factor = keys["rope.scaling.factor"]
    scaling = {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": keys["rope.scaling.original_context_length"],
        "beta_fast": keys.get("rope.scaling.yarn_beta_fast", 32.0),
        "beta_slow": keys.get("rope.scaling.yarn_beta_slow", 1.0),
    }
    keys.only("rope.scaling.yarn_ext_factor", 1.0)
    if (attention_factor := keys.get("rope.scaling.yarn_attn_factor")) is not None:
        scaling["attention_factor"] = attention_factor
    return scaling


def _qwen2_moe(keys: Keys) -> Config:
    return _decoder_config(keys, "qwen2_moe") | {
        "moe_intermediate_size": keys["expert_feed_forward_length"],
        "shared_expert_intermediate_size": keys["expert_shared_feed_forward_length"],
        "norm_topk_prob": False,
    }


def _qwen3_moe(keys: Keys) -> Config:
    return _decoder_config(keys, "qwen3_moe") | {
        "moe_intermediate_size": keys["expert_feed_forward_length"],
        "norm_topk_prob": True,
        "attention_bias": keys.has("attn_q.bias"),
    }


def _linear_attention_config(keys: Keys, model_type: str) -> Config:
    config = _decoder_config(keys, model_type)
    value_heads = keys["ssm.time_step_rank"]
    head_dim = config["head_dim"]
    rotary = {"partial_rotary_factor": keys.get("rope.dimension_count", head_dim // 4) / head_dim}
    if (recurrent := keys.get("attention.recurrent_layers")) is not None:
        kinds = ["linear_attention" if kind else "full_attention" for kind in recurrent]
        config["layer_types"] = kinds[: config["num_hidden_layers"]]
    return config | {
        "moe_intermediate_size": keys["expert_feed_forward_length"],
        "shared_expert_intermediate_size": keys["expert_shared_feed_forward_length"],
        "full_attention_interval": keys.get("full_attention_interval", 4),
        "linear_num_key_heads": keys["ssm.group_count"],
        "linear_num_value_heads": value_heads,
        "linear_key_head_dim": keys["ssm.state_size"],
        "linear_value_head_dim": keys["ssm.inner_size"] // value_heads,
        "linear_conv_kernel_dim": keys["ssm.conv_kernel"],
        "rope_parameters": {"rope_type": "default", "rope_theta": config["rope_theta"], **rotary},
    }


def _qwen3_next(keys: Keys) -> Config:
    apart = {"linear_in_proj_grouped": keys.has("ssm_in.weight")}
    return _linear_attention_config(keys, "qwen3_next") | apart


def _qwen3_5_moe(keys: Keys) -> Config:
    return _linear_attention_config(keys, "qwen3_5_moe") | {"linear_value_head_order": "tiled"}


def _mixtral(keys: Keys) -> Config:
    return _decoder_config(keys, "mixtral", experts="num_local_experts") | {
        "intermediate_size": keys["feed_forward_length"],
        "rope_interleave": True,
    }


def _olmoe(keys: Keys) -> Config:
    return _decoder_config(keys, "olmoe") | {"intermediate_size": keys["feed_forward_length"], "norm_topk_prob": False}


def _granitemoe(keys: Keys) -> Config:
    if keys.get("expert_shared_feed_forward_length", 0):
        raise UnsupportedError(f"{keys.where}: granitemoe with a shared expert is not implemented")
    return _decoder_config(keys, "granitemoe", experts="num_local_experts") | {
        "intermediate_size": keys["feed_forward_length"],
        "attention_multiplier": keys["attention.scale"],
        "embedding_multiplier": keys.get("embedding_scale", 1.0),
        "residual_multiplier": keys.get("residual_scale", 1.0),
        "logits_scaling": keys.get("logit_scale", 1.0),
        "rope_interleave": True,
    }


def _glm4_moe(keys: Keys) -> Config:
    keys.only("expert_gating_func", SIGMOID)
    config = _decoder_config(keys, "glm4_moe", experts="n_routed_experts")
    return config | {
        "moe_intermediate_size": keys["expert_feed_forward_length"],
        "intermediate_size": keys["feed_forward_length"],
        "first_k_dense_replace": keys.get("leading_dense_block_count", 0),
        "attention_bias": keys.has("attn_q.bias"),
        "use_qk_norm": keys.has("attn_q_norm.weight"),
        "n_shared_experts": keys.get("expert_shared_count", 1),
        "norm_topk_prob": keys.get("expert_weights_norm", True),
        "routed_scaling_factor": keys.get("expert_weights_scale", 1.0),
        **_groups(keys),
        "partial_rotary_factor": keys.get("rope.dimension_count", config["head_dim"] // 2) / config["head_dim"],
    }


def _minimax_m2(keys: Keys) -> Config:
    keys.only("expert_gating_func", SIGMOID)
    return _decoder_config(keys, "minimax_m2", experts="num_local_experts") | {
        "intermediate_size": keys["expert_feed_forward_length"],
        "rotary_dim": keys["rope.dimension_count"],
    }


def _gpt_oss(keys: Keys) -> Config:
    config = _decoder_config(keys, "gpt_oss", experts="num_local_experts")
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
    config = _decoder_config(keys, "llama4_text", experts="num_local_experts")
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


def _deepseek_v3(keys: Keys) -> Config:
    """DeepSeek-V3, Kimi K2 and GLM-4.7-Flash. Older files have kv_b whole and no lengths for "mla"."""
    dense = keys.get("leading_dense_block_count", 0)
    if not keys.has("exp_probs_b.bias", layer=dense):
        raise UnsupportedError(f"{keys.where}: deepseek2 without exp_probs_b (DeepSeek-V2) is not implemented")
    keys.only("expert_gating_func", SIGMOID)
    head_dim = keys.get("attention.key_length_mla") or keys["attention.key_length"]
    rotary_dim = keys["rope.dimension_count"]
    scaling = _rope_scaling(keys)
    if scaling and (log_multiplier := keys.get("rope.scaling.yarn_log_multiplier")):
        # The converter writes mscale_all_dim / 10 and drops mscale, which llama.cpp takes to be the same.
        scaling["mscale"] = scaling["mscale_all_dim"] = round(10 * log_multiplier, 6)
    return dimensions(keys) | {
        "model_type": "deepseek_v3",
        "rope_scaling": scaling,
        "q_lora_rank": keys.get("attention.q_lora_rank"),
        "kv_lora_rank": keys["attention.kv_lora_rank"],
        "qk_nope_head_dim": head_dim - rotary_dim,
        "qk_rope_head_dim": rotary_dim,
        "v_head_dim": keys.get("attention.value_length_mla") or keys["attention.value_length"],
        "n_routed_experts": keys["expert_count"],
        "moe_intermediate_size": keys["expert_feed_forward_length"],
        "intermediate_size": keys["feed_forward_length"],
        "first_k_dense_replace": dense,
        "n_shared_experts": keys["expert_shared_count"],
        "norm_topk_prob": keys.get("expert_weights_norm", False),
        "routed_scaling_factor": keys.get("expert_weights_scale", 1.0),
        **_groups(keys),
    }


def _groups(keys: Keys) -> Config:
    """Groups of experts; a file that does not say so has one, as llama.cpp runs it."""
    return {"n_group": keys.get("expert_group_count", 1), "topk_group": keys.get("expert_group_used_count", 1)}


ARCHITECTURES: Mapping[str, Architecture] = {
    "qwen2moe": Architecture("qwen2_moe", _qwen2_moe, _COMMON | _SHARED_EXPERT),
    "qwen3moe": Architecture("qwen3_moe", _qwen3_moe, _COMMON),
    "qwen3next": Architecture(
        "qwen3_next", _qwen3_next, _COMMON | _SHARED_EXPERT | _LINEAR_ATTENTION, _ZERO_CENTRED, "mtp."
    ),
    "qwen35moe": Architecture(
        "qwen3_5_moe", _qwen3_5_moe, _COMMON | _SHARED_EXPERT | _LINEAR_ATTENTION, _ZERO_CENTRED, "mtp."
    ),
    "deepseek2": Architecture(
        "deepseek_v3",
        _deepseek_v3,
        _COMMON | _SHARED_EXPERTS | _LATENT_ATTENTION | {"exp_probs_b.bias": "mlp.gate.e_score_correction_bias"},
    ),
    "llama": Architecture("mixtral", _mixtral, _COMMON | {"ffn_gate_inp.weight": "block_sparse_moe.gate.weight"}),
    "olmoe": Architecture("olmoe", _olmoe, _COMMON),
    "granitemoe": Architecture(
        "granitemoe", _granitemoe, _COMMON | {"ffn_gate_inp.weight": "block_sparse_moe.router.layer.weight"}
    ),
    "glm4moe": Architecture(
        "glm4_moe",
        _glm4_moe,
        _COMMON | _SHARED_EXPERTS | {"exp_probs_b.bias": "mlp.gate.e_score_correction_bias"},
    ),
    "gemma4": Architecture("gemma4", gemma4_config, _COMMON | _BESIDE_EXPERTS, rope_factors=True),
    "llama4": Architecture("llama4", _llama4, _COMMON | _FEED_FORWARD, rope_factors=True),
    "minimax-m2": Architecture(
        "minimax_m2",
        _minimax_m2,
        _COMMON
        | {
            "ffn_gate_inp.weight": "block_sparse_moe.gate.weight",
            "exp_probs_b.bias": "block_sparse_moe.e_score_correction_bias",
        },
    ),
    "gpt-oss": Architecture(
        "gpt_oss",
        _gpt_oss,
        _COMMON
        | {
            "ffn_gate_inp.weight": "mlp.router.weight",
            "ffn_gate_inp.bias": "mlp.router.bias",
            "attn_sinks.weight": "self_attn.sinks",
        }
        | {name: hf.replace("switch_mlp", "experts") for name, hf in _EXPERTS.items()},
    ),
}


def architecture_of(
    metadata: Metadata, tensors: Container[str], rope_factors: Sequence[float] | None, where: str
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
    if name in OUTSIDE:
        return OUTSIDE[name], architecture.adjustments.get(name, "")
    words = name.split(".", 2)
    if len(words) == 3 and words[0] == "blk" and words[1].isdecimal():
        rest = architecture.layer.get(words[2], words[2])
        prefix = architecture.extra_layers if int(words[1]) >= num_layers else ""
        return f"{prefix}model.layers.{words[1]}.{rest}", architecture.adjustments.get(words[2], "")
    return name, ""
