"""config.json of GGUF files of plain decoders, a function for each model_type.

Source: llama.cpp's conversion/*.py, and its models' graphs for what the metadata leaves out.
"""

from formats.config import FACTORS
from formats.errors import FormatError, UnsupportedError
from formats.fields import shown
from repack.sources.gguf_keys import (
    SIGMOID,
    SOFTMAX,
    Config,
    Keys,
    decoder_config,
    groups,
    linear_attention_config,
    rope_scaling,
)

FULL, SLIDING = "full_attention", "sliding_attention"


def qwen2_moe(keys: Keys) -> Config:
    return decoder_config(keys, "qwen2_moe") | {
        "moe_intermediate_size": keys["expert_feed_forward_length"],
        "shared_expert_intermediate_size": keys["expert_shared_feed_forward_length"],
        "norm_topk_prob": False,
    }


def qwen3_moe(keys: Keys) -> Config:
    return decoder_config(keys, "qwen3_moe") | {
        "moe_intermediate_size": keys["expert_feed_forward_length"],
        "norm_topk_prob": True,
        "attention_bias": keys.has("attn_q.bias"),
    }


def qwen3_vl_moe(keys: Keys) -> Config:
    return qwen3_moe(keys) | {"model_type": "qwen3_vl_moe"}


def qwen3_next(keys: Keys) -> Config:
    apart = {"linear_in_proj_grouped": keys.has("ssm_in.weight")}
    return linear_attention_config(keys, "qwen3_next") | apart


def qwen3_5_moe(keys: Keys) -> Config:
    return linear_attention_config(keys, "qwen3_5_moe") | {"linear_value_head_order": "tiled"}


def mixtral(keys: Keys) -> Config:
    return decoder_config(keys, "mixtral", experts="num_local_experts") | {
        "intermediate_size": keys["feed_forward_length"],
        "interleaved_rotary_pairs": True,
    }


def olmoe(keys: Keys) -> Config:
    return decoder_config(keys, "olmoe") | {"intermediate_size": keys["feed_forward_length"], "norm_topk_prob": False}


def glm4_moe(keys: Keys) -> Config:
    keys.only("expert_gating_func", SIGMOID)
    config = decoder_config(keys, "glm4_moe", experts="n_routed_experts", whole=False)
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


def afmoe(keys: Keys) -> Config:
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


def bailing_moe(keys: Keys) -> Config:
    """Ling 2, and Sarvam-30B, whose biases of routers the converter moves by their mean, which chooses alike."""
    keys.only("expert_gating_func", SIGMOID)
    config = decoder_config(keys, "bailing_moe", whole=False)
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


def cohere2_moe(keys: Keys) -> Config:
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


def dots1(keys: Keys) -> Config:
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


def ernie4_5_moe(keys: Keys) -> Config:
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


def lfm2_moe(keys: Keys) -> Config:
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


def minimax_m2(keys: Keys) -> Config:
    keys.only("expert_gating_func", SIGMOID)
    return decoder_config(keys, "minimax_m2", experts="num_local_experts", whole=False) | {
        "intermediate_size": keys["expert_feed_forward_length"],
        "rotary_dim": keys["rope.dimension_count"],
    }


def gpt_oss(keys: Keys) -> Config:
    config = decoder_config(keys, "gpt_oss", experts="num_local_experts")
    if config["rope_scaling"] is not None:
        config["rope_scaling"]["truncate"] = False  # the published models; llama.cpp has no key for it
    return config | {
        "intermediate_size": keys["expert_feed_forward_length"],
        "sliding_window": keys["attention.sliding_window"],
        "attention_bias": True,
    }


def llama4(keys: Keys) -> Config:
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


def exaone_moe(keys: Keys) -> Config:
    """K-EXAONE, which knows positions in layers with a window alone."""
    keys.only("expert_gating_func", SIGMOID)
    keys.only("rope.scaling.type", "none")
    keys.only("rope.freq_base_swa", keys.get("rope.freq_base", 10000.0))
    slides = keys.items("attention.sliding_window_pattern", bool, keys.layers, more=True)[: keys.layers]
    return decoder_config(keys, "exaone_moe") | {
        "layer_types": [SLIDING if kind else FULL for kind in slides],
        "sliding_window": keys["attention.sliding_window"],
        "moe_intermediate_size": keys["expert_feed_forward_length"],
        "intermediate_size": keys["feed_forward_length"],
        "first_k_dense_replace": keys.get("leading_dense_block_count", 0),
        "num_shared_experts": keys.get("expert_shared_count", 1),
        "norm_topk_prob": keys.get("expert_weights_norm", False),
        "routed_scaling_factor": keys.get("expert_weights_scale", 1.0),
        **groups(keys),
    }


def hunyuan_v1_moe(keys: Keys) -> Config:
    """Hunyuan-A13B, whose alpha is in the base of positions that the converter writes."""
    keys.only("rope.scaling.type", "none")
    keys.only("rope.scaling.factor", 1)
    keys.only("expert_shared_count", 1)
    keys.only("expert_shared_feed_forward_length", inner := keys["expert_feed_forward_length"])
    return decoder_config(keys, "hunyuan_v1_moe") | {
        "intermediate_size": inner,
        "norm_topk_prob": True,
        "routed_scaling_factor": keys.get("expert_weights_scale", 1.0),
    }


def hy_v3(keys: Keys) -> Config:
    """Hunyuan 3; which layers are dense, tensors say, and no key."""
    keys.only("expert_gating_func", SIGMOID)
    inner = keys.size("expert_feed_forward_length")
    sparse = [keys.has("ffn_gate_inp.weight", layer) for layer in range(keys.layers)]
    return decoder_config(keys, "hy_v3") | {
        "intermediate_size": keys["feed_forward_length"],
        "mlp_layer_types": ["sparse" if kind else "dense" for kind in sparse],
        "moe_intermediate_size": inner,
        "num_shared_experts": keys.size("expert_shared_feed_forward_length", inner) // inner,
        "route_norm": keys.get("expert_weights_norm", False),
        "router_scaling_factor": keys.get("expert_weights_scale", 1.0),
    }


def laguna(keys: Keys) -> Config:
    """Laguna, whose layers with a window are told by no key, nor how finely the gate of attention is."""
    keys.only("expert_gating_func", SIGMOID)
    keys.only("expert_weights_norm", True)
    layers, head_dim = keys.layers, keys.size("attention.key_length")
    keys.only("attention.value_length", head_dim)
    heads, window = keys.items("attention.head_count", int, layers), keys.get("attention.sliding_window", 0)
    slides = [layer % 4 != 0 for layer in range(layers)]
    if keys.get("attention.sliding_window_pattern") is not None:
        slides = keys.items("attention.sliding_window_pattern", bool, layers)
    theta, turned = keys.get("rope.freq_base", 10000.0), keys.size("rope.dimension_count", head_dim)
    return {
        "model_type": "laguna",
        "hidden_size": keys["embedding_length"],
        "num_hidden_layers": layers,
        "max_position_embeddings": keys["context_length"],
        "rms_norm_eps": keys["attention.layer_norm_rms_epsilon"],
        "layer_types": [SLIDING if kind and window else FULL for kind in slides],
        "sliding_window": window or None,
        "num_attention_heads": heads[0],
        "num_attention_heads_per_layer": heads,
        "num_key_value_heads": keys["attention.head_count_kv"],
        "head_dim": head_dim,
        "gating": "per-head" if keys.shape("blk.0.attn_gate.weight")[0] == heads[0] else "per-element",
        "rope_parameters": {
            FULL: {
                "rope_theta": theta,
                "partial_rotary_factor": turned / head_dim,
                **(rope_scaling(keys) or {"rope_type": "default"}),
            },
            SLIDING: {
                "rope_theta": keys.get("rope.freq_base_swa", theta),
                "partial_rotary_factor": keys.size("rope.dimension_count_swa", turned) / head_dim,
                "rope_type": "default",
            },
        },
        "mlp_layer_types": ["sparse" if kind else "dense" for kind in _sparse(keys)],
        "intermediate_size": keys["feed_forward_length"],
        "num_experts": keys["expert_count"],
        "num_experts_per_tok": keys["expert_used_count"],
        "moe_intermediate_size": keys["expert_feed_forward_length"],
        "shared_expert_intermediate_size": keys["expert_shared_feed_forward_length"],
        "moe_routed_scaling_factor": keys.get("expert_weights_scale", 1.0),
    }


def minimax_m3(keys: Keys) -> Config:
    """MiniMax-M3, whose layers with experts have indexers; that SwiGLU is clamped at 7, no key says."""
    keys.only("expert_gating_func", SIGMOID)
    keys.only("expert_weights_norm", True)
    sparse = _sparse(keys)
    config = decoder_config(keys, "minimax_m3_vl", experts="num_local_experts", whole=False)
    return config | {
        "layer_types": ["minimax_m3_sparse" if kind else FULL for kind in sparse],
        "moe_layer_freq": [int(kind) for kind in sparse],
        "intermediate_size": keys["expert_feed_forward_length"],
        "dense_intermediate_size": keys["feed_forward_length"],
        "n_shared_experts": keys["expert_shared_count"],
        "shared_intermediate_size": keys["expert_feed_forward_length"],
        "routed_scaling_factor": keys.get("expert_weights_scale", 1.0),
        "swiglu_limit": 7.0,
        "partial_rotary_factor": keys.size("rope.dimension_count", config["head_dim"]) / config["head_dim"],
        "index_n_heads": keys["attention.indexer.head_count"],
        "index_head_dim": keys["attention.indexer.key_length"],
        "index_topk_blocks": keys["attention.indexer.top_k"],
        "index_block_size": keys["attention.indexer.block_size"],
        "index_local_blocks": keys["attention.indexer.local_blocks"],
    }


def _sparse(keys: Keys) -> list[bool]:
    """Which layers have experts: all but the first ones. Raises FormatError."""
    dense = keys.get("leading_dense_block_count", 0)
    if type(dense) is not int:
        raise FormatError(
            f"{keys.where}: {keys.architecture}.leading_dense_block_count is {shown(dense)}, expected a whole number"
        )
    return [layer >= dense for layer in range(keys.layers)]
