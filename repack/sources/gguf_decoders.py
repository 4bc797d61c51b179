"""config.json of GGUF files of plain decoders.

Source: llama.cpp's conversion/exaone.py, hunyuan.py, laguna.py and minimax.py, and its graphs of the same names.
"""

from formats.errors import FormatError
from formats.fields import shown
from repack.sources.gguf_keys import SIGMOID, Config, Keys, decoder_config, groups, rope_scaling

FULL, SLIDING = "full_attention", "sliding_attention"


def exaone_moe_config(keys: Keys) -> Config:
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


def hunyuan_v1_moe_config(keys: Keys) -> Config:
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


def hy_v3_config(keys: Keys) -> Config:
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


def laguna_config(keys: Keys) -> Config:
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


def minimax_m3_config(keys: Keys) -> Config:
    """MiniMax-M3, whose layers with experts have indexers; that SwiGLU is clamped at 7, no key says."""
    keys.only("expert_gating_func", SIGMOID)
    keys.only("expert_weights_norm", True)
    sparse = _sparse(keys)
    config = decoder_config(keys, "minimax_m3_vl", experts="num_local_experts")
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
