"""config.json of a GGUF file of Gemma 4 (source: llama.cpp's conversion/gemma.py and src/models/gemma4.cpp)."""

from formats.errors import UnsupportedError
from formats.fields import shown
from formats.gguf import ROPE_FREQS
from repack.sources.gguf_keys import Config, Keys, dimensions, key_heads

STANDING_STILL = 1e29  # of ROPE_FREQS


def gemma4_config(keys: Keys) -> Config:
    """Gemma 4 with experts; what llama.cpp's graph has and no key says is that of the published models."""
    keys.only("embedding_length_per_layer_input", 0)
    keys.only("attention.shared_kv_layers", 0)
    layers, head_dim, sliding_head_dim = (
        keys[key] for key in ("block_count", "attention.key_length", "attention.key_length_swa")
    )
    keys.only("attention.value_length", head_dim)
    keys.only("attention.value_length_swa", sliding_head_dim)
    keys.only("rope.dimension_count", head_dim)
    keys.only("rope.dimension_count_swa", sliding_head_dim)
    sliding = keys.items("attention.sliding_window_pattern", bool, layers)
    full_heads, sliding_heads = key_heads(keys, sliding)
    full = {"rope_theta": keys["rope.freq_base"], "partial_rotary_factor": _turned_share(keys, head_dim)}
    return dimensions(keys) | {
        "model_type": "gemma4_text",
        "layer_types": ["sliding_attention" if kind else "full_attention" for kind in sliding],
        "head_dim": sliding_head_dim,
        "num_key_value_heads": sliding_heads,
        "global_head_dim": head_dim,
        "num_global_key_value_heads": full_heads,
        "sliding_window": keys["attention.sliding_window"],
        "rope_parameters": {
            "full_attention": full | {"rope_type": "proportional"},
            "sliding_attention": {"rope_theta": keys["rope.freq_base_swa"], "rope_type": "default"},
        },
        "num_experts": keys["expert_count"],
        "top_k_experts": keys["expert_used_count"],
        "moe_intermediate_size": keys["expert_feed_forward_length"],
        "intermediate_size": keys["feed_forward_length"],
        "final_logit_softcapping": keys.get("final_logit_softcapping"),
    }


def _turned_share(keys: Keys, head_dim: int) -> float:
    """How much of a head turns: the converter slows all other pairs down until they stand still."""
    factors = keys.rope_factors or ()
    turned = sum(factor == 1 for factor in factors)
    still = all(factor >= STANDING_STILL for factor in factors[turned:])
    if not turned or not still or 2 * len(factors) != head_dim:
        raise UnsupportedError(
            f"{keys.where}: {ROPE_FREQS} is {shown(list(factors))}, expected {head_dim // 2} factors: ones, then 1e30"
        )
    return 2 * turned / head_dim
