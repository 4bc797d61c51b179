"""config.json of GGUF files of plain decoders.

Source: llama.cpp's conversion/exaone.py, hunyuan.py and laguna.py, and its graphs of the same names.
"""

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
    dense = keys.size("leading_dense_block_count") if keys.get("leading_dense_block_count") else 0
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
        "mlp_layer_types": ["sparse" if layer >= dense else "dense" for layer in range(layers)],
        "intermediate_size": keys["feed_forward_length"],
        "num_experts": keys["expert_count"],
        "num_experts_per_tok": keys["expert_used_count"],
        "moe_intermediate_size": keys["expert_feed_forward_length"],
        "shared_expert_intermediate_size": keys["expert_shared_feed_forward_length"],
        "moe_routed_scaling_factor": keys.get("expert_weights_scale", 1.0),
    }
