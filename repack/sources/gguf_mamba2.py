"""config.json of GGUF files of models with Mamba2 layers, and of Granites, with them or not.

Source: llama.cpp's conversion/nemotron.py, granite.py and mamba.py, src/models/nemotron-h.cpp and granite-hybrid.cpp.
"""

from collections.abc import Sequence

from formats.errors import FormatError, UnsupportedError
from formats.fields import shown
from repack.sources.gguf_keys import SIGMOID, Config, Keys, decoder_config, groups

MAMBA, ATTENTION, MOE = "mamba", "attention", "moe"  # as config.json calls layers


def nemotron_h_config(keys: Keys) -> Config:
    """Nemotron 3: a layer with heads of keys is attention, one with a feed-forward experts, any other Mamba2."""
    keys.only("expert_gating_func", SIGMOID)
    keys.only("rope.scaling.finetuned", False)
    layers, blocks = keys.layers, keys.size("block_count")
    key_heads = keys.items("attention.head_count_kv", int, blocks)[:layers]
    widths = keys.items("feed_forward_length", int, blocks)[:layers]
    kinds = [ATTENTION if heads else MOE if width else MAMBA for heads, width in zip(key_heads, widths, strict=True)]
    head_dim, eps = keys.size("attention.key_length"), "attention.layer_norm_rms_epsilon"
    keys.only("attention.value_length", head_dim)
    return {
        "model_type": "nemotron_h",
        "hidden_size": keys["embedding_length"],
        "num_hidden_layers": layers,
        "layers_block_type": kinds,
        "max_position_embeddings": keys["context_length"],
        "layer_norm_epsilon": keys[eps if keys.get(eps) is not None else "attention.layer_norm_epsilon"],
        "num_attention_heads": keys["attention.head_count"],
        "num_key_value_heads": _of_attention(keys, key_heads),
        "head_dim": head_dim,
        "n_routed_experts": keys["expert_count"],
        "num_experts_per_tok": keys["expert_used_count"],
        "moe_intermediate_size": keys["expert_feed_forward_length"],
        "moe_shared_expert_intermediate_size": keys["expert_shared_feed_forward_length"],
        "moe_latent_size": keys.get("moe_latent_size"),
        "n_shared_experts": keys.get("expert_shared_count", 1),
        "intermediate_size": keys["expert_feed_forward_length"],  # of dense layers, which these files have not
        "norm_topk_prob": keys.get("expert_weights_norm", False),
        "routed_scaling_factor": keys.get("expert_weights_scale", 1.0),
        **groups(keys),
        **_mamba2(keys, kinds),
    }


def granitemoe_config(keys: Keys) -> Config:
    """Granite 3 with experts, and with a shared one beside them."""
    shared = keys.get("expert_shared_feed_forward_length", 0)
    return _granite(keys, "granitemoeshared" if shared else "granitemoe") | {
        "shared_intermediate_size": shared,
        "interleaved_rotary_pairs": True,
    }


def granitehybrid_config(keys: Keys) -> Config:
    """Granite 4.0 H: a layer without heads of keys is Mamba2; attention knows no positions."""
    turned = keys.get("rope.scaling.finetuned", True)  # which tells llama.cpp whether positions turn
    if turned is not False:
        raise UnsupportedError(
            f"{keys.where}: {keys.architecture}.rope.scaling.finetuned is {shown(turned)}, only False is implemented"
        )
    key_heads = keys.items("attention.head_count_kv", int, keys.layers)
    kinds = [ATTENTION if heads else MAMBA for heads in key_heads]
    return _granite(keys, "granitemoehybrid", turned=False) | {
        "layer_types": kinds,
        "num_key_value_heads": _of_attention(keys, key_heads),
        "position_embedding_type": "nope",
        "shared_intermediate_size": keys["expert_shared_feed_forward_length"],
        **_mamba2(keys, kinds),
    }


def _granite(keys: Keys, model_type: str, *, turned: bool = True) -> Config:
    return decoder_config(keys, model_type, experts="num_local_experts", whole=turned) | {
        "intermediate_size": keys["feed_forward_length"],
        "attention_bias": any(keys.has("attn_q.bias", layer) for layer in range(keys.layers)),
        "attention_multiplier": keys["attention.scale"],
        "embedding_multiplier": keys.get("embedding_scale", 1.0),
        "residual_multiplier": keys.get("residual_scale", 1.0),
        "logits_scaling": keys.get("logit_scale", 1.0),
    }


def _mamba2(keys: Keys, kinds: Sequence[str]) -> Config:
    """Under the names of Nemotron, or those of Granite, which are read alike."""
    heads, width = keys.size("ssm.time_step_rank"), keys.size("ssm.inner_size")
    if width % heads:
        raise FormatError(
            f"{keys.where}: {keys.architecture}.ssm.inner_size is {width}, expected a multiple of the {heads} heads of "
            "ssm.time_step_rank"
        )
    first = kinds.index(MAMBA) if MAMBA in kinds else 0
    return {
        "mamba_num_heads": heads,
        "mamba_head_dim": width // heads,
        "ssm_state_size": keys["ssm.state_size"],
        "n_groups": keys["ssm.group_count"],
        "conv_kernel": keys["ssm.conv_kernel"],
        "use_conv_bias": keys.has("ssm_conv1d.bias", first),
    }


def _of_attention(keys: Keys, key_heads: Sequence[int]) -> int:
    """The heads of keys of every layer that has any, 1 where none has. Raises UnsupportedError where they differ."""
    counts = set(key_heads) - {0}
    if len(counts) > 1:
        raise UnsupportedError(
            f"{keys.where}: {keys.architecture}.attention.head_count_kv is {shown(key_heads)}, only 0 and one other "
            "number are implemented"
        )
    return counts.pop() if counts else 1
