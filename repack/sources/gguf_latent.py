"""config.json of GGUF files with latent attention.

Source: llama.cpp's conversion/deepseek.py, glm.py, kimi_linear.py, kimi_k3.py, bailingmoe3.py and mistral3.py.
"""

from repack.sources.gguf_keys import SIGMOID, SOFTMAX, Config, Keys, dimensions, groups, rope_scaling

# By architecture and number of experts: DeepSeek-V2 and V2.5 with 236 billion weights, V3 and R1.
GROUPS_OF_OLDER_FILES = {"deepseek2": {160: (8, 3), 256: (8, 4)}}
TEMPERATURE = "attention.temperature_scale"
MISTRAL4_BETA = 0.1  # of the published model, and of transformers where nothing is said


def deepseek_v3_config(keys: Keys) -> Config:
    """DeepSeek-V2 and V3, Kimi K2, GLM-4.7-Flash; older files have kv_b whole and no lengths for "mla".

    V3.2 and GLM-5 have all of it, too.
    """
    keys.only(TEMPERATURE, 0)  # Mistral Large 3 is such a file
    return _latent_config(keys)


def mistral4_config(keys: Keys) -> Config:
    """Mistral Small 4, of whose queries, which grow with their position, the converter says nothing."""
    config = _latent_config(keys)
    beta = keys.get(TEMPERATURE)
    if beta is None:
        keys.notes.append(
            f"{keys.architecture}.{TEMPERATURE} is missing, as the converter leaves it out: taken for {MISTRAL4_BETA}, "
            "as the published model has it"
        )
    if config["rope_scaling"] is not None:
        config["rope_scaling"]["llama_4_scaling_beta"] = MISTRAL4_BETA if beta is None else beta
    return config | {"model_type": "mistral4"}


def _latent_config(keys: Keys) -> Config:
    """What all of DeepSeek-V3's kind have."""
    dense = keys.get("leading_dense_block_count", 0)
    by_sigmoid = keys.has("exp_probs_b.bias", layer=dense)
    keys.only("expert_gating_func", SIGMOID if by_sigmoid else SOFTMAX)
    grouped = groups(keys, GROUPS_OF_OLDER_FILES.get(keys.architecture))
    head_dim = keys.size("attention.key_length_mla", keys.size("attention.key_length"))
    rotary_dim = keys.size("rope.dimension_count")
    scaling = rope_scaling(keys)
    if scaling and keys.get("rope.scaling.yarn_log_multiplier"):
        # The converter writes mscale_all_dim / 10 and drops mscale, which llama.cpp takes to be the same.
        scaling["mscale"] = scaling["mscale_all_dim"] = round(10 * keys["rope.scaling.yarn_log_multiplier"], 6)
    return dimensions(keys) | {
        "model_type": "deepseek_v3" if by_sigmoid else "deepseek_v2",
        "topk_method": "noaux_tc" if by_sigmoid else "greedy" if grouped["n_group"] == 1 else "group_limited_greedy",
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
        **grouped,
    }


def deepseek_v32_config(keys: Keys) -> Config:
    """DeepSeek-V3.2, whose layers all have an indexer."""
    return deepseek_v3_config(keys) | _indexer_config(keys) | {"model_type": "deepseek_v32"}


def glm_moe_dsa_config(keys: Keys) -> Config:
    """GLM-5; files that do not list the layers that choose have an indexer in those alone."""
    layers = keys.layers
    chooses = [keys.has("indexer.proj.weight", layer) for layer in range(layers)]
    if keys.get("attention.indexer.types") is not None:
        chooses = keys.items("attention.indexer.types", bool, layers)
    return (
        deepseek_v3_config(keys)
        | _indexer_config(keys)
        | {"model_type": "glm_moe_dsa", "indexer_types": ["full" if chosen else "shared" for chosen in chooses]}
    )


def _indexer_config(keys: Keys) -> Config:
    return {
        "index_n_heads": keys["attention.indexer.head_count"],
        "index_head_dim": keys["attention.indexer.key_length"],
        "index_topk": keys["attention.indexer.top_k"],
    }


def kimi_linear_config(keys: Keys) -> Config:
    """Kimi Linear, whose norm of routing weights and shared key of attention no key says."""
    keys.only("rope.scaling.type", "none")
    return _delta_config(keys) | {
        "model_type": "kimi_linear",
        "model_max_length": keys["context_length"],
        "moe_renormalize": keys.get("expert_weights_norm", True),
    }


def kimi_k3_config(keys: Keys) -> Config:
    """Kimi K3, whose gates and norm behind the experts are tensors, and no keys."""
    keys.only("rope.scaling.type", "none")
    config = _delta_config(keys)
    config["linear_attn_config"] |= {"gate_lower_bound": keys["kda.gate_lower_bound"], "use_full_rank_gate": True}
    return config | {
        "model_type": "kimi_k3",
        "hidden_act": "situ",
        "activation_situ_beta": keys["activation.situ_beta"],
        "activation_situ_linear_beta": keys["activation.situ_linear_beta"],
        "attn_res_block_size": keys["attn_res.block_size"],
        "latent_moe_use_norm": True,
        "mla_use_output_gate": True,
        "moe_renormalize": keys.get("expert_weights_norm", False),
        "routed_expert_hidden_size": keys["expert_latent_length"],
    }


def _delta_config(keys: Keys) -> Config:
    """Layers with latent attention without positions, and those with delta attention, which have no heads of keys."""
    keys.only("expert_gating_func", SIGMOID)
    layers = keys.layers
    full = [layer for layer, heads in enumerate(keys.items("attention.head_count_kv", int, layers), 1) if heads]
    shared_key = keys["rope.dimension_count"]  # what turns in DeepSeek-V3, and here is one more part of keys
    return dimensions(keys) | {
        "linear_attn_config": {
            "full_attn_layers": full,
            "kda_layers": [layer for layer in range(1, layers + 1) if layer not in full],
            "head_dim": keys["kda.head_dim"],
            "num_heads": keys["attention.head_count"],
            "short_conv_kernel_size": keys["ssm.conv_kernel"],
        },
        "q_lora_rank": keys.get("attention.q_lora_rank"),
        "kv_lora_rank": keys["attention.kv_lora_rank"],
        "qk_nope_head_dim": keys["attention.key_length_mla"] - shared_key,
        "qk_rope_head_dim": shared_key,
        "v_head_dim": keys["attention.value_length_mla"],
        "intermediate_size": keys["feed_forward_length"],
        "first_k_dense_replace": keys.get("leading_dense_block_count", 0),
        "num_experts": keys["expert_count"],
        "num_experts_per_token": keys["expert_used_count"],
        "moe_intermediate_size": keys["expert_feed_forward_length"],
        "num_shared_experts": keys["expert_shared_count"],
        "routed_scaling_factor": keys.get("expert_weights_scale", 1.0),
        "num_expert_group": keys.get("expert_group_count", 1),
        "topk_group": keys.get("expert_group_used_count", 1),
    }


def ling_config(keys: Keys) -> Config:
    """Ling 3; layers without heads of keys have delta attention."""
    keys.only("expert_gating_func", SIGMOID)
    keys.only("kda.safe_gate", True)
    keys.only("rope.scaling.type", "none")
    layers = keys.layers
    heads = keys.items("attention.head_count_kv", int, layers, more=True)[:layers]
    turned = keys.size("rope.dimension_count")
    return dimensions(keys) | {
        "model_type": "bailing_hybrid",
        "layer_types": ["full_attention" if count else "linear_attention" for count in heads],
        "head_dim": keys["kda.head_dim"],
        "kda_lower_bound": keys["kda.gate_lower_bound"],
        "short_conv_kernel_size": keys["ssm.conv_kernel"],
        "q_lora_rank": keys.get("attention.q_lora_rank"),
        "kv_lora_rank": keys["attention.kv_lora_rank"],
        "qk_nope_head_dim": keys.size("attention.key_length_mla") - turned,
        "qk_rope_head_dim": turned,
        "v_head_dim": keys["attention.value_length_mla"],
        "intermediate_size": keys["feed_forward_length"],
        "first_k_dense_replace": keys.get("leading_dense_block_count", 0),
        "num_experts": keys["expert_count"],
        "num_shared_experts": keys["expert_shared_count"],
        "moe_intermediate_size": keys["expert_feed_forward_length"],
        "moe_shared_expert_intermediate_size": keys.get("expert_shared_feed_forward_length"),
        "expert_swiglu_limit_list": keys.get("swiglu_clamp_exp"),
        "share_expert_swiglu_limit_list": keys.get("swiglu_clamp_shexp"),
        "norm_topk_prob": keys.get("expert_weights_norm", False),
        "routed_scaling_factor": keys.get("expert_weights_scale", 1.0),
        **groups(keys),
    }
