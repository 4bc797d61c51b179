"""Names of tensors in GGUF files, after `blk.N.`, and the publishers' names, after `model.layers.N.`, as data.

What no publisher names alike has MLX's name: stacks of experts, the halves of kv_b_proj.
Source: llama.cpp's gguf-py/gguf/tensor_mapping.py and constants.py.
"""

from formats.encodings.sources.plain import LOG_OF_MINUS, MINUS_ONE

OUTSIDE = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
ATTENTION = {
    f"attn_{gguf}.{kind}": f"self_attn.{name}_proj.{kind}"
    for gguf, name in (("q", "q"), ("k", "k"), ("v", "v"), ("output", "o"))
    for kind in ("weight", "bias")
} | {"attn_q_norm.weight": "self_attn.q_norm.weight", "attn_k_norm.weight": "self_attn.k_norm.weight"}
DENSE = {f"ffn_{part}.weight": f"mlp.{part}_proj.weight" for part in ("gate", "up", "down")}
EXPERTS = {
    f"ffn_{part}_exps.{kind}": f"mlp.switch_mlp.{part}_proj.{kind}"
    for part in ("gate", "up", "gate_up", "down")
    for kind in ("weight", "bias")
}
COMMON = {
    "attn_norm.weight": "input_layernorm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "post_attention_norm.weight": "post_attention_layernorm.weight",
    "ffn_gate_inp.weight": "mlp.gate.weight",
    **ATTENTION,
    **DENSE,
    **EXPERTS,
}
PARTS = ("gate", "up", "down")
SHARED_EXPERT = {f"ffn_{part}_shexp.weight": f"mlp.shared_expert.{part}_proj.weight" for part in PARTS}
SHARED_EXPERT |= {"ffn_gate_inp_shexp.weight": "mlp.shared_expert_gate.weight"}
FEED_FORWARD = {  # of Llama 4, experts as MLX names them
    "ffn_gate_inp.weight": "feed_forward.router.weight",
    **{f"ffn_{part}.weight": f"feed_forward.{part}_proj.weight" for part in PARTS},
    **{f"ffn_{part}_shexp.weight": f"feed_forward.shared_expert.{part}_proj.weight" for part in PARTS},
    **{f"ffn_{part}_exps.weight": f"feed_forward.experts.{part}_proj.weight" for part in PARTS},
}
BESIDE_EXPERTS = {  # of Gemma 4, experts as MLX names them
    "ffn_norm.weight": "pre_feedforward_layernorm.weight",
    "post_ffw_norm.weight": "post_feedforward_layernorm.weight",
    "post_ffw_norm_1.weight": "post_feedforward_layernorm_1.weight",
    "pre_ffw_norm_2.weight": "pre_feedforward_layernorm_2.weight",
    "post_ffw_norm_2.weight": "post_feedforward_layernorm_2.weight",
    "layer_output_scale.weight": "layer_scalar",
    "ffn_gate_inp.weight": "router.proj.weight",
    "ffn_gate_inp.scale": "router.scale",
    "ffn_down_exps.scale": "router.per_expert_scale",
    **{name: hf.replace("mlp.switch_mlp", "experts.switch_glu") for name, hf in EXPERTS.items()},
}
SHARED_EXPERTS = {f"ffn_{part}_shexp.weight": f"mlp.shared_experts.{part}_proj.weight" for part in PARTS}
AFMOE = {
    **COMMON,
    **SHARED_EXPERTS,
    "attn_gate.weight": "self_attn.gate_proj.weight",
    "post_attention_norm.weight": "post_attention_layernorm.weight",
    "ffn_norm.weight": "pre_mlp_layernorm.weight",
    "post_ffw_norm.weight": "post_mlp_layernorm.weight",
    "ffn_gate_inp.weight": "mlp.router.gate.weight",
    "exp_probs_b.bias": "mlp.expert_bias",
}
BAILING_MOE = {
    **COMMON,
    **SHARED_EXPERTS,
    "attn_qkv.weight": "attention.query_key_value.weight",
    "attn_output.weight": "attention.dense.weight",
    "attn_q_norm.weight": "attention.query_layernorm.weight",
    "attn_k_norm.weight": "attention.key_layernorm.weight",
    "exp_probs_b.bias": "mlp.gate.expert_bias",
}
SHARED_MLP = {f"ffn_{part}_shexp.weight": f"mlp.shared_mlp.{part}_proj.weight" for part in PARTS}
HUNYUAN = {
    **COMMON,
    **SHARED_MLP,
    "attn_q_norm.weight": "self_attn.query_layernorm.weight",
    "attn_k_norm.weight": "self_attn.key_layernorm.weight",
    "ffn_gate_inp.weight": "mlp.gate.wg.weight",
}
HY_V3 = {
    **COMMON,
    **SHARED_MLP,
    "ffn_gate_inp.weight": "mlp.router.gate.weight",
    "exp_probs_b": "mlp.expert_bias",
}
LAGUNA = {
    **COMMON,
    **SHARED_EXPERT,
    "attn_gate.weight": "self_attn.g_proj.weight",
    "exp_probs_b.bias": "mlp.experts.e_score_correction_bias",
}
LFM2_MOE = {
    "attn_norm.weight": "operator_norm.weight",
    "ffn_norm.weight": "ffn_norm.weight",
    "ffn_gate_inp.weight": "feed_forward.gate.weight",
    "exp_probs_b.bias": "feed_forward.expert_bias",
    **{f"shortconv.{part}.weight": f"conv.{part}.weight" for part in ("conv", "in_proj", "out_proj")},
    **{f"attn_{part}.weight": f"self_attn.{part}_proj.weight" for part in "qkv"},
    "attn_output.weight": "self_attn.out_proj.weight",
    **{f"attn_{part}_norm.weight": f"self_attn.{part}_layernorm.weight" for part in "qk"},
    **{name: hf.replace("mlp", "feed_forward") for name, hf in DENSE.items()},
    **{name: hf.replace("mlp", "feed_forward", 1) for name, hf in EXPERTS.items()},
}
STEP35 = {
    **COMMON,
    **{name: hf.replace("mlp.switch_mlp", "moe") for name, hf in EXPERTS.items()},
    **{f"ffn_{part}_shexp.weight": f"share_expert.{part}_proj.weight" for part in PARTS},
    "attn_gate.weight": "self_attn.g_proj.weight",
    "ffn_gate_inp.weight": "moe.gate.weight",
    "exp_probs_b.bias": "moe.router_bias",
}
OUTSIDE_LFM2 = {**OUTSIDE, "token_embd_norm.weight": "model.embedding_norm.weight"}
LINEAR_ATTENTION = {
    "attn_qkv.weight": "linear_attn.in_proj_qkv.weight",
    "attn_gate.weight": "linear_attn.in_proj_z.weight",
    "ssm_alpha.weight": "linear_attn.in_proj_a.weight",
    "ssm_beta.weight": "linear_attn.in_proj_b.weight",
    "ssm_ba.weight": "linear_attn.in_proj_ba.weight",
    "ssm_in.weight": "linear_attn.in_proj_qkvz.weight",  # of the first files of Qwen3-Next
    "ssm_conv1d.weight": "linear_attn.conv1d.weight",
    "ssm_a": "linear_attn.A_log",
    "ssm_dt.bias": "linear_attn.dt_bias",
    "ssm_norm.weight": "linear_attn.norm.weight",
    "ssm_out.weight": "linear_attn.out_proj.weight",
}
LATENT_ATTENTION = {
    "attn_q_a.weight": "self_attn.q_a_proj.weight",
    "attn_q_a_norm.weight": "self_attn.q_a_layernorm.weight",
    "attn_q_b.weight": "self_attn.q_b_proj.weight",
    "attn_kv_a_mqa.weight": "self_attn.kv_a_proj_with_mqa.weight",
    "attn_kv_a_norm.weight": "self_attn.kv_a_layernorm.weight",
    "attn_kv_b.weight": "self_attn.kv_b_proj.weight",
    "attn_k_b.weight": "self_attn.embed_q.weight",  # [heads, kv_lora_rank, ...], as MLX splits and names them
    "attn_v_b.weight": "self_attn.unembed_out.weight",
}
INDEXER = {
    "indexer.attn_q_b.weight": "self_attn.indexer.wq_b.weight",
    "indexer.attn_k.weight": "self_attn.indexer.wk.weight",
    "indexer.k_norm.weight": "self_attn.indexer.k_norm.weight",
    "indexer.k_norm.bias": "self_attn.indexer.k_norm.bias",
    "indexer.proj.weight": "self_attn.indexer.weights_proj.weight",
}
CORRECTION_BIAS = {"exp_probs_b.bias": "mlp.gate.e_score_correction_bias"}
DELTA_ATTENTION = {
    **{f"ssm_conv1d_{part}.weight": f"self_attn.{part}_conv1d.weight" for part in "qkv"},
    **{f"ssm_{part}.weight": f"self_attn.{part}_proj.weight" for part in ("f_a", "f_b", "g_a", "g_b")},
    "ssm_beta.weight": "self_attn.b_proj.weight",
    "ssm_a": "self_attn.A_log",
    "ssm_dt.bias": "self_attn.dt_bias",
    "ssm_norm.weight": "self_attn.o_norm.weight",
    "exp_probs_b.bias": "mlp.e_score_correction_bias",
}
KIMI_K3 = {  # beside what Kimi Linear has; two kinds of layers have a gate, under two names
    "ssm_g.weight": "self_attn.g_proj.weight",
    "attn_gate.weight": "self_attn.g_proj.weight",
    "attn_res_score.weight": "self_attention_res_score.weight",
    "ffn_res_score.weight": "mlp_res_score.weight",
    **{f"ffn_routed_{part}.weight": f"mlp.routed_expert_{part}_proj.weight" for part in ("down", "up")},
    "ffn_routed_norm.weight": "mlp.routed_expert_norm.weight",
}
LING = {
    name: hf.replace("self_attn.", "attention.")
    for name, hf in (COMMON | SHARED_EXPERTS | LATENT_ATTENTION | DELTA_ATTENTION).items()
} | {
    "attn_output.weight": "attention.dense.weight",  # in both kinds of layers, as transformers saves it
    "ssm_f_a.weight": "attention.f_proj.weight",
    "ssm_g_a.weight": "attention.g_proj.weight",
    "attn_gate.weight": "attention.g_proj.weight",
    "exp_probs_b.bias": "mlp.gate.expert_bias",
}
OUTSIDE_LING = OUTSIDE | {"token_embd.weight": "model.word_embeddings.weight"}
OUTSIDE_KIMI_K3 = OUTSIDE | {"output_res_score.weight": "model.output_attn_res_score.weight"}
MAMBA2 = {
    **{f"ssm_{part}.weight": f"mamba.{part}_proj.weight" for part in ("in", "out")},
    **{f"ssm_conv1d.{kind}": f"mamba.conv1d.{kind}" for kind in ("weight", "bias")},
    "ssm_a": "mamba.A_log",
    "ssm_d": "mamba.D",
    "ssm_dt.bias": "mamba.dt_bias",
    "ssm_norm.weight": "mamba.norm.weight",
}
GRANITE = {
    **COMMON,
    "ffn_gate_inp.weight": "block_sparse_moe.router.layer.weight",
    **{f"ffn_{part}_shexp.weight": f"mlp.shared_expert.{part}_proj.weight" for part in PARTS},
}
NEMOTRON_H = {  # whatever a layer is made of is its mixer
    "attn_norm.weight": "norm.weight",
    **{name: hf.replace("mamba.", "mixer.") for name, hf in MAMBA2.items()},
    **{name: hf.replace("self_attn.", "mixer.") for name, hf in ATTENTION.items()},
    "ffn_gate_inp.weight": "mixer.gate.weight",
    "exp_probs_b.bias": "mixer.gate.e_score_correction_bias",
    "ffn_up_exps.weight": "mixer.switch_mlp.fc1.weight",
    "ffn_down_exps.weight": "mixer.switch_mlp.fc2.weight",
    **{f"ffn_{part}_shexp.weight": f"mixer.shared_experts.{part}_proj.weight" for part in PARTS},
    "ffn_latent_down.weight": "mixer.fc1_latent_proj.weight",
    "ffn_latent_up.weight": "mixer.fc2_latent_proj.weight",
}
OUTSIDE_NEMOTRON_H = OUTSIDE | {
    "token_embd.weight": "backbone.embeddings.weight",
    "output_norm.weight": "backbone.norm_f.weight",
}
MINIMAX_M3 = {
    **COMMON,
    **{name: hf.replace("mlp.", "block_sparse_moe.", 1) for name, hf in (EXPERTS | SHARED_EXPERTS).items()},
    "ffn_gate_inp.weight": "block_sparse_moe.gate.weight",
    "exp_probs_b.bias": "block_sparse_moe.e_score_correction_bias",
    **{
        f"indexer.{part}_{kind}.weight": f"self_attn.index_{part}_{kind}.weight"
        for part in "qk"
        for kind in ("proj", "norm")
    },
}
ZERO_CENTRED = {
    "attn_norm.weight": MINUS_ONE,
    "ffn_norm.weight": MINUS_ONE,
    "post_attention_norm.weight": MINUS_ONE,
    "attn_q_norm.weight": MINUS_ONE,
    "attn_k_norm.weight": MINUS_ONE,
    "output_norm.weight": MINUS_ONE,
    "ssm_a": LOG_OF_MINUS,
}
ZERO_CENTRED_INDEXER = {f"indexer.{part}_norm.weight": MINUS_ONE for part in "qk"}
