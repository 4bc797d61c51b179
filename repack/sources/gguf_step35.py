"""config.json of a GGUF file of Step-3.5-Flash (source: llama.cpp's conversion/step3.py and src/models/step35.cpp)."""

from collections.abc import Sequence

from formats.config import FACTORS
from formats.errors import UnsupportedError
from formats.fields import shown
from formats.gguf import ROPE_FREQS
from repack.sources.gguf_keys import SIGMOID, Config, Keys, key_heads

FULL, SLIDING = "full_attention", "sliding_attention"


def step35_config(keys: Keys) -> Config:
    """Step 3.5; that half of a head turns in layers without a window, no key says."""
    keys.only("expert_gating_func", SIGMOID)
    keys.only("rope.scaling.type", "none")
    layers, blocks = keys.layers, keys.size("block_count")
    head_dim = keys.size("attention.key_length")
    for key in ("attention.value_length", "rope.dimension_count", "rope.dimension_count_swa"):
        keys.only(key, head_dim)
    slides = keys.items("attention.sliding_window_pattern", bool, blocks)[:layers]
    layer_types = [SLIDING if kind else FULL for kind in slides]
    heads = keys.items("attention.head_count", int, blocks)[:layers]
    by_kind = {kind: {heads[i] for i, one in enumerate(layer_types) if one == kind} for kind in (FULL, SLIDING)}
    full_keys, sliding_keys = key_heads(keys, slides)
    if any(len(several) != 1 for several in by_kind.values()) or full_keys != sliding_keys:
        raise UnsupportedError(
            f"{keys.where}: {keys.architecture}.attention.head_count is {shown(heads)}, only one number for each kind "
            f"of layers is implemented, and as many heads of keys in both"
        )
    full, sliding = (by_kind[kind].pop() for kind in (FULL, SLIDING))
    return {
        "model_type": "step3p5",
        "hidden_size": keys["embedding_length"],
        "num_hidden_layers": layers,
        "max_position_embeddings": keys["context_length"],
        "rms_norm_eps": keys["attention.layer_norm_rms_epsilon"],
        "layer_types": layer_types,
        "sliding_window": keys["attention.sliding_window"],
        "num_attention_heads": full,
        "num_sliding_attention_heads": sliding,
        "num_key_value_heads": full_keys,
        "head_dim": head_dim,
        "rope_parameters": {
            FULL: {
                "rope_theta": keys["rope.freq_base"],
                "partial_rotary_factor": 0.5,
                **_scaling(keys, head_dim),
            },
            SLIDING: {"rope_type": "default", "rope_theta": keys["rope.freq_base_swa"]},
        },
        "mlp_layer_types": ["sparse" if keys.has("ffn_gate_inp.weight", i) else "dense" for i in range(layers)],
        "intermediate_size": keys["feed_forward_length"],
        "num_experts_per_tok": keys["expert_used_count"],
        "n_routed_experts": keys["expert_count"],
        "moe_intermediate_size": keys["expert_feed_forward_length"],
        "share_expert_dim": keys["expert_shared_feed_forward_length"],
        "moe_router_scaling_factor": keys.get("expert_weights_scale", 1.0),
        "norm_expert_weight": keys.get("expert_weights_norm", False),
        "swiglu_limits": _limits(keys, "swiglu_clamp_exp", blocks)[:layers],
        "swiglu_limits_shared": _limits(keys, "swiglu_clamp_shexp", blocks)[:layers],
    }


def _scaling(keys: Keys, head_dim: int) -> Config:
    """Of the half of a head that turns; the converter fills the factors up with ones, to half of the whole."""
    if keys.rope_factors is None:
        return {"rope_type": "default"}
    turned, rest = keys.rope_factors[: head_dim // 4], keys.rope_factors[head_dim // 4 :]
    if len(keys.rope_factors) != head_dim // 2 or set(rest) != {1.0}:
        raise UnsupportedError(
            f"{keys.where}: {ROPE_FREQS} is {shown(list(keys.rope_factors))}, expected {head_dim // 2} factors, the "
            f"second half of them ones"
        )
    return {"rope_type": FACTORS, "factors": list(turned)}


def _limits(keys: Keys, key: str, blocks: int) -> Sequence[float]:
    """One for each layer, or none at all; 0 for no limit."""
    return [0.0] * blocks if keys.get(key) is None else keys.items(key, float, blocks)
