"""GGUF files of DeepSeek-V4 (source: llama.cpp's conversion/deepseek.py and src/models/deepseek4.cpp)."""

from formats.config import COMPRESSED_SPARSE_ATTENTION, HEAVILY_COMPRESSED_ATTENTION, SLIDING_ATTENTION
from formats.errors import UnsupportedError
from formats.fields import shown
from repack.sources.gguf_keys import Config, Keys, dimensions, rope_scaling

SQRT_SOFTPLUS = 4  # of expert_gating_func
SPARSE_RATE = 4  # tokens of an entry of layers that choose among entries: llama.cpp knows them by it
HEAVY_RATE = 128  # of the published models; no file without such layers needs it

OUTSIDE_DEEPSEEK4 = {
    "token_embd.weight": "embed.weight",
    "output_norm.weight": "norm.weight",
    "output.weight": "head.weight",
    **{f"output_hc_{what}.weight": f"hc_head_{what}" for what in ("fn", "base", "scale")},
}
DEEPSEEK4 = {
    **{f"hc_{half}_{what}.weight": f"hc_{half}_{what}" for half in ("attn", "ffn") for what in ("fn", "base", "scale")},
    "attn_norm.weight": "attn_norm.weight",
    "attn_q_a.weight": "attn.wq_a.weight",
    "attn_q_a_norm.weight": "attn.q_norm.weight",
    "attn_q_b.weight": "attn.wq_b.weight",
    "attn_kv.weight": "attn.wkv.weight",
    "attn_kv_a_norm.weight": "attn.kv_norm.weight",
    "attn_sinks.weight": "attn.attn_sink",
    "attn_output_a.weight": "attn.wo_a.weight",
    "attn_output_b.weight": "attn.wo_b.weight",
    **{
        f"{gguf}compressor_{what}": f"attn.{hf}compressor.{name}"
        for gguf, hf in (("attn_", ""), ("indexer_", "indexer."))
        for what, name in (
            ("kv.weight", "wkv.weight"),
            ("gate.weight", "wgate.weight"),
            ("ape.weight", "ape"),
            ("norm.weight", "norm.weight"),
        )
    },
    "indexer.attn_q_b.weight": "attn.indexer.wq_b.weight",
    "indexer.proj.weight": "attn.indexer.weights_proj.weight",
    "ffn_norm.weight": "ffn_norm.weight",
    "ffn_gate_inp.weight": "ffn.gate.weight",
    "exp_probs_b.bias": "ffn.gate.bias",
    "ffn_gate_tid2eid.weight": "ffn.gate.tid2eid",
    **{
        f"ffn_{part}_{gguf}.weight": f"ffn.{hf}.{name}.weight"
        for part, name in (("gate", "w1"), ("up", "w3"), ("down", "w2"))
        for gguf, hf in (("shexp", "shared_experts"), ("exps", "experts"))
    },
}


def deepseek4_config(keys: Keys) -> Config:
    """DeepSeek-V4; its layers are told by how many tokens their entries stand for."""
    keys.only("expert_gating_func", SQRT_SOFTPLUS)
    keys.only("attention.head_count_kv", 1)
    keys.only("expert_shared_count", 1)
    keys.only("expert_weights_norm", True)
    layers, head_dim = keys.layers, keys["attention.key_length"]
    keys.only("attention.value_length", head_dim)
    ratios = keys.items("attention.compress_ratios", int, layers, more=True)[:layers]
    heavy = sorted(set(ratios) - {0, SPARSE_RATE}) or [HEAVY_RATE]
    if len(heavy) != 1:
        raise UnsupportedError(
            f"{keys.where}: {keys.architecture}.attention.compress_ratios has {shown(heavy)}, only one beside 0 and "
            f"{SPARSE_RATE} is implemented"
        )
    kinds = {0: SLIDING_ATTENTION, SPARSE_RATE: COMPRESSED_SPARSE_ATTENTION, heavy[0]: HEAVILY_COMPRESSED_ATTENTION}
    return dimensions(keys) | {
        "model_type": "deepseek_v4",
        "layer_types": [kinds[ratio] for ratio in ratios],
        "compress_rates": {COMPRESSED_SPARSE_ATTENTION: SPARSE_RATE, HEAVILY_COMPRESSED_ATTENTION: heavy[0]},
        "compress_rope_theta": keys["attention.compress_rope_freq_base"],
        "rope_scaling": rope_scaling(keys),
        "head_dim": head_dim,
        "qk_rope_head_dim": keys["rope.dimension_count"],
        "q_lora_rank": keys["attention.q_lora_rank"],
        "o_groups": keys["attention.output_group_count"],
        "o_lora_rank": keys["attention.output_lora_rank"],
        "index_n_heads": keys["attention.indexer.head_count"],
        "index_head_dim": keys["attention.indexer.key_length"],
        "index_topk": keys["attention.indexer.top_k"],
        "sliding_window": keys["attention.sliding_window"],
        "hc_mult": keys["hyper_connection.count"],
        "hc_sinkhorn_iters": keys["hyper_connection.sinkhorn_iterations"],
        "hc_eps": keys["hyper_connection.epsilon"],
        "num_hash_layers": keys["hash_layer_count"],
        "n_routed_experts": keys["expert_count"],
        "moe_intermediate_size": keys["expert_feed_forward_length"],
        "routed_scaling_factor": keys["expert_weights_scale"],
        "swiglu_limit": _limit(keys, layers),
    }


def _limit(keys: Keys, layers: int) -> float:
    """Of activations, the same in all layers, of routed experts and of the shared one."""
    limits = set(keys.items("swiglu_clamp_exp", float, layers, more=True))
    if keys.get("swiglu_clamp_shexp") is not None:
        limits |= set(keys.items("swiglu_clamp_shexp", float, layers, more=True))
    if len(limits) != 1:
        raise UnsupportedError(
            f"{keys.where}: {keys.architecture}.swiglu_clamp_exp and swiglu_clamp_shexp have {shown(sorted(limits))}, "
            "only one limit is implemented"
        )
    return limits.pop()
