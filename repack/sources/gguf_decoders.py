"""config.json of GGUF files of plain decoders (source: llama.cpp's conversion/exaone.py and hunyuan.py, and graphs)."""

from repack.sources.gguf_keys import SIGMOID, Config, Keys, decoder_config, groups


def exaone_moe_config(keys: Keys) -> Config:
    """K-EXAONE, which knows positions in layers with a window alone."""
    keys.only("expert_gating_func", SIGMOID)
    keys.only("rope.scaling.type", "none")
    keys.only("rope.freq_base_swa", keys.get("rope.freq_base", 10000.0))
    slides = keys.items("attention.sliding_window_pattern", bool, keys.layers, more=True)[: keys.layers]
    return decoder_config(keys, "exaone_moe") | {
        "layer_types": ["sliding_attention" if kind else "full_attention" for kind in slides],
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
