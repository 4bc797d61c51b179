"""config.json of a GGUF file of MiMo-V2-Flash (source: llama.cpp's conversion/mimo.py and src/models/mimo2.cpp)."""

from repack.sources.gguf_keys import SIGMOID, Config, Keys, dimensions, groups, key_heads


def mimo2_config(keys: Keys) -> Config:
    """MiMo-V2-Flash; sinks where there is a window, and the norm of routing weights, are not said by any key."""
    keys.only("expert_gating_func", SIGMOID)
    keys.only("rope.scaling.type", "none")
    dimensions_of_all = dimensions(keys)
    layers, head_dim = keys.layers, keys.size("attention.key_length")
    pattern = keys.items("attention.sliding_window_pattern", int, keys.size("block_count"))[:layers]
    full_heads, sliding_heads = key_heads(keys, [kind == 1 for kind in pattern])
    return dimensions_of_all | {
        "model_type": "mimo_v2_flash",
        "layernorm_epsilon": keys["attention.layer_norm_rms_epsilon"],
        "hybrid_layer_pattern": pattern,
        "moe_layer_freq": [int(keys.has("ffn_gate_inp.weight", layer)) for layer in range(layers)],
        "head_dim": head_dim,
        "v_head_dim": keys["attention.value_length"],
        "num_key_value_heads": full_heads,
        "swa_num_key_value_heads": sliding_heads,
        "swa_rope_theta": keys["rope.freq_base_swa"],
        "partial_rotary_factor": keys["rope.dimension_count"] / head_dim,
        "attention_value_scale": keys.get("attention.value_scale", 1.0),
        "sliding_window_size": keys["attention.sliding_window"],
        "n_routed_experts": keys["expert_count"],
        "moe_intermediate_size": keys["expert_feed_forward_length"],
        "intermediate_size": keys["feed_forward_length"],
        "norm_topk_prob": True,
        "routed_scaling_factor": keys.get("expert_weights_scale", 1.0),
        **groups(keys),
    }
