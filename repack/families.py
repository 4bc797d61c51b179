"""Families of checkpoints as data, one per model type of the container (repack/family.py says what the words mean)."""

from collections.abc import Mapping
from dataclasses import replace

from formats.config import (
    CHUNKED_ATTENTION,
    FULL_ATTENTION,
    HEAD_NORM,
    INDEXED_ATTENTION,
    LINEAR_ATTENTION,
    SHARED_INDEX_ATTENTION,
    SLIDING_ATTENTION,
    WHOLE_NORM,
    DecoderConfig,
    DeepseekV3Config,
    Gemma4Config,
    KimiLinearConfig,
    Qwen3_5MoeConfig,
)
from repack.family import Experts, Family, Tensor

PER_EXPERT = (
    Experts("mlp.experts.{expert}.gate_proj", "I D", ("gate",)),
    Experts("mlp.experts.{expert}.up_proj", "I D", ("up",)),
    Experts("mlp.experts.{expert}.down_proj", "D I", ("down",)),
)

# Stacked part by part, as MLX names them; GGUF files are given these names (repack/sources/gguf_models.py).
SWITCH_MLP = (
    Experts("mlp.switch_mlp.gate_proj", "I D", ("gate",)),
    Experts("mlp.switch_mlp.up_proj", "I D", ("up",)),
    Experts("mlp.switch_mlp.down_proj", "D I", ("down",)),
)
# As llama.cpp's converter stacks them with --fuse-gate-up-exps.
SWITCH_GATE_UP = (Experts("mlp.switch_mlp.gate_up_proj", "2I D", ("gate", "up")), SWITCH_MLP[2])


def _qwen3_5_dims(config: Qwen3_5MoeConfig) -> Mapping[str, int]:
    queries = config.num_attention_heads * config.head_dim
    return {
        "D": config.hidden_size,
        "V": config.vocab_size,
        "E": config.num_experts,
        "I": config.moe_intermediate_size,
        "2I": 2 * config.moe_intermediate_size,
        "S": config.shared_expert_intermediate_size,
        "Q": 2 * queries,
        "O": queries,
        "K": config.num_key_value_heads * config.head_dim,
        "h": config.head_dim,
        "C": config.linear_conv_channels,
        "k": config.linear_conv_kernel_dim,
        "v": config.linear_num_value_heads * config.linear_value_head_dim,
        "H": config.linear_num_value_heads,
        "C+v": config.linear_conv_channels + config.linear_num_value_heads * config.linear_value_head_dim,
        "2H": 2 * config.linear_num_value_heads,
        "d": config.linear_value_head_dim,
    }


QWEN3_5_MOE = Family(
    prefixes=("model.language_model.", "model.", "language_model.model."),
    norms_around_zero=True,
    dims=_qwen3_5_dims,
    before_mixer=(Tensor("input_layernorm", "D"),),
    mixers={
        LINEAR_ATTENTION: (
            Tensor("linear_attn.in_proj_qkv", "C D", when=lambda c: not c.linear_in_proj_grouped),
            Tensor("linear_attn.in_proj_z", "v D", when=lambda c: not c.linear_in_proj_grouped),
            Tensor("linear_attn.in_proj_qkvz", "C+v D", when=lambda c: c.linear_in_proj_grouped),
            # Tiny, and they make the decay and step of a recurrence, where errors add up over the sequence.
            Tensor("linear_attn.in_proj_a", "H D", keep=True, when=lambda c: not c.linear_in_proj_ba_grouped),
            Tensor("linear_attn.in_proj_b", "H D", keep=True, when=lambda c: not c.linear_in_proj_ba_grouped),
            Tensor("linear_attn.in_proj_ba", "2H D", keep=True, when=lambda c: c.linear_in_proj_ba_grouped),
            Tensor("linear_attn.conv1d", "C 1 k", keep=True),
            Tensor("linear_attn.A_log", "H", suffix=""),
            Tensor("linear_attn.dt_bias", "H", suffix=""),
            Tensor("linear_attn.norm", "d"),
            Tensor("linear_attn.out_proj", "D v"),
        ),
        FULL_ATTENTION: (
            Tensor("self_attn.q_proj", "Q D"),
            Tensor("self_attn.k_proj", "K D"),
            Tensor("self_attn.v_proj", "K D"),
            Tensor("self_attn.q_norm", "h"),
            Tensor("self_attn.k_norm", "h"),
            Tensor("self_attn.o_proj", "D O"),
        ),
    },
    after_mixer=(Tensor("post_attention_layernorm", "D"),),
    moe=(
        Tensor("mlp.gate", "E D", keep=True),  # the router
        Tensor("mlp.shared_expert.gate_proj", "S D"),
        Tensor("mlp.shared_expert.up_proj", "S D"),
        Tensor("mlp.shared_expert.down_proj", "D S"),
        Tensor("mlp.shared_expert_gate", "1 D", keep=True),
    ),
    expert_layouts=(
        (
            Experts("mlp.experts.gate_up_proj", "2I D", ("gate", "up"), suffix=""),
            Experts("mlp.experts.down_proj", "D I", ("down",), suffix=""),
        ),
        PER_EXPERT,
        SWITCH_MLP,
        SWITCH_GATE_UP,
    ),
    skipped={
        "model.visual.": "the vision tower",
        "vision_tower.": "the vision tower",
        "mtp.": "multi-token prediction",
    },
)


QWEN3_NEXT = replace(QWEN3_5_MOE, prefixes=("model.",), expert_layouts=(PER_EXPERT, SWITCH_MLP, SWITCH_GATE_UP))


def _decoder_dims(config: DecoderConfig) -> Mapping[str, int]:
    return {
        "D": config.hidden_size,
        "V": config.vocab_size,
        "E": config.num_experts,
        "I": config.moe_intermediate_size,
        "2I": 2 * config.moe_intermediate_size,
        "F": config.intermediate_size or 0,
        "S": config.shared_expert_intermediate_size or 0,
        "O": config.num_attention_heads * config.head_dim,
        "K": config.num_key_value_heads * config.head_dim,
        "h": config.head_dim,
        "H": config.num_attention_heads,
    }


ATTENTION = (
    Tensor("self_attn.q_proj", "O D"),
    Tensor("self_attn.k_proj", "K D"),
    Tensor("self_attn.v_proj", "K D"),
    Tensor("self_attn.q_proj.bias", "O", suffix="", when=lambda c: c.attention_bias),
    Tensor("self_attn.k_proj.bias", "K", suffix="", when=lambda c: c.attention_bias),
    Tensor("self_attn.v_proj.bias", "K", suffix="", when=lambda c: c.attention_bias),
    Tensor("self_attn.q_norm", "h", when=lambda c: c.qk_norm == HEAD_NORM),
    Tensor("self_attn.k_norm", "h", when=lambda c: c.qk_norm == HEAD_NORM),
    Tensor("self_attn.q_norm", "O", when=lambda c: c.qk_norm == WHOLE_NORM),
    Tensor("self_attn.k_norm", "K", when=lambda c: c.qk_norm == WHOLE_NORM),
    Tensor("self_attn.sinks", "H", suffix="", when=lambda c: c.attention_sinks),
    Tensor("self_attn.o_proj", "D O"),
    Tensor("self_attn.o_proj.bias", "D", suffix="", when=lambda c: c.attention_output_bias),
)
DENSE_MLP = (
    Tensor("mlp.gate_proj", "F D"),
    Tensor("mlp.up_proj", "F D"),
    Tensor("mlp.down_proj", "D F"),
)
ROUTER = Tensor("mlp.gate", "E D", keep=True)
CORRECTION_BIAS = Tensor("mlp.gate.e_score_correction_bias", "E", suffix="")


NOTHING: Mapping[str, str] = {}


def _decoder(
    moe: tuple[Tensor, ...],
    expert_layouts: tuple[tuple[Experts, ...], ...] = (PER_EXPERT, SWITCH_MLP, SWITCH_GATE_UP),
    extra_layers: str = "",
    skipped: Mapping[str, str] = NOTHING,
    prefixes: tuple[str, ...] = ("model.",),
    dense: tuple[Tensor, ...] = DENSE_MLP,
) -> Family:
    return Family(
        prefixes=prefixes,
        dims=_decoder_dims,
        before_mixer=(Tensor("input_layernorm", "D"),),
        mixers=dict.fromkeys((FULL_ATTENTION, SLIDING_ATTENTION, CHUNKED_ATTENTION), ATTENTION),
        after_mixer=(Tensor("post_attention_layernorm", "D"),),
        moe=moe,
        dense=dense,
        expert_layouts=expert_layouts,
        skipped=skipped,
        extra_layers=extra_layers,
    )


SPARSE_SWITCH_MLP = tuple(
    rule._replace(name=rule.name.replace("mlp.switch", "block_sparse_moe.switch")) for rule in SWITCH_MLP
)
W1_W3_W2 = (
    Experts("block_sparse_moe.experts.{expert}.w1", "I D", ("gate",)),
    Experts("block_sparse_moe.experts.{expert}.w3", "I D", ("up",)),
    Experts("block_sparse_moe.experts.{expert}.w2", "D I", ("down",)),
)
SHARED_EXPERT = (
    Tensor("mlp.shared_expert.gate_proj", "S D"),
    Tensor("mlp.shared_expert.up_proj", "S D"),
    Tensor("mlp.shared_expert.down_proj", "D S"),
)
SHARED_EXPERTS = (
    Tensor("mlp.shared_expert.gate_proj", "S D", source="mlp.shared_experts.gate_proj"),
    Tensor("mlp.shared_expert.up_proj", "S D", source="mlp.shared_experts.up_proj"),
    Tensor("mlp.shared_expert.down_proj", "D S", source="mlp.shared_experts.down_proj"),
)
ERNIE4_5_MOE = _decoder(
    (
        ROUTER,
        CORRECTION_BIAS._replace(shape="1 E", keep=True, source="mlp.moe_statics.e_score_correction_bias"),
        *(
            tensor._replace(when=lambda config: config.shared_expert_intermediate_size is not None)
            for tensor in SHARED_EXPERTS
        ),
    ),
    skipped={"model.mtp_": "multi-token prediction"},
)
GLM4_MOE = _decoder((ROUTER, CORRECTION_BIAS, *SHARED_EXPERTS), extra_layers="multi-token prediction")
GRANITEMOE = _decoder(
    (ROUTER._replace(source="block_sparse_moe.router.layer"),),
    (
        (
            Experts("block_sparse_moe.input_linear", "2I D", ("gate", "up")),
            Experts("block_sparse_moe.output_linear", "D I", ("down",)),
        ),
        SPARSE_SWITCH_MLP,
        SWITCH_MLP,
        SWITCH_GATE_UP,
    ),
)
GPT_OSS = _decoder(
    (
        ROUTER._replace(source="mlp.router"),
        Tensor("mlp.gate.bias", "E", suffix="", source="mlp.router.bias"),
    ),
    (
        (
            Experts(
                "mlp.experts.gate_up_proj", "2I D", ("gate", "up"), "", interleaved=True, transposed=True, bias="_bias"
            ),
            Experts("mlp.experts.down_proj", "D I", ("down",), "", transposed=True, bias="_bias"),
        ),
        tuple(rule._replace(name=rule.name.replace("switch_mlp", "experts"), bias=".bias") for rule in SWITCH_MLP),
    ),
)


def _in_feed_forward(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """As Llama 4 calls what others call mlp."""
    return tuple(tensor._replace(source=tensor.name.replace("mlp.", "feed_forward.")) for tensor in tensors)


LLAMA4 = _decoder(
    (ROUTER._replace(source="feed_forward.router"), *_in_feed_forward(SHARED_EXPERT)),
    (
        (
            Experts("feed_forward.experts.gate_up_proj", "2I D", ("gate", "up"), "", transposed=True),
            Experts("feed_forward.experts.down_proj", "D I", ("down",), "", transposed=True),
        ),
        tuple(rule._replace(name=rule.name.replace("mlp", "feed_forward")) for rule in PER_EXPERT),
        tuple(rule._replace(name=rule.name.replace("mlp.switch_mlp", "feed_forward.experts")) for rule in SWITCH_MLP),
    ),
    dense=_in_feed_forward(DENSE_MLP),
    prefixes=("language_model.model.", "model."),
    skipped={
        "vision_model.": "the vision tower",
        "multi_modal_projector.": "the projector of the vision tower",
    },
)
MINIMAX_M2 = _decoder(
    (
        ROUTER._replace(source="block_sparse_moe.gate"),
        CORRECTION_BIAS._replace(source="block_sparse_moe.e_score_correction_bias"),
    ),
    (W1_W3_W2, SWITCH_MLP, SPARSE_SWITCH_MLP, SWITCH_GATE_UP),
    extra_layers="multi-token prediction",
)
MIXTRAL = _decoder(
    (ROUTER._replace(source="block_sparse_moe.gate"),), (W1_W3_W2, SWITCH_MLP, SPARSE_SWITCH_MLP, SWITCH_GATE_UP)
)
OLMOE = _decoder((ROUTER,))
QWEN2_MOE = _decoder((ROUTER, *SHARED_EXPERT, Tensor("mlp.shared_expert_gate", "1 D", keep=True)))
QWEN3_MOE = _decoder((ROUTER,))


def _deepseek_dims(config: DeepseekV3Config) -> Mapping[str, int]:
    heads, indexer = config.num_attention_heads, config.indexer
    return {
        "D": config.hidden_size,
        "V": config.vocab_size,
        "E": config.num_experts,
        "I": config.moe_intermediate_size,
        "2I": 2 * config.moe_intermediate_size,
        "F": config.intermediate_size,
        "S": config.shared_expert_intermediate_size,
        "q": config.q_lora_rank or 0,
        "Q": heads * config.head_dim,
        "L": config.kv_lora_rank,
        "L+r": config.kv_lora_rank + config.qk_rope_head_dim,
        "KV": heads * (config.qk_nope_head_dim + config.v_head_dim),
        "O": heads * config.v_head_dim,
        "HL": heads * config.kv_lora_rank,
        "n": config.qk_nope_head_dim,
        "i": indexer.index_n_heads if indexer else 0,
        "x": indexer.index_head_dim if indexer else 0,
        "X": indexer.index_n_heads * indexer.index_head_dim if indexer else 0,
    }


LATENT_ATTENTION = (
    Tensor("self_attn.q_proj", "Q D", when=lambda config: config.q_lora_rank is None),
    Tensor("self_attn.q_a_proj", "q D", when=lambda config: config.q_lora_rank is not None),
    Tensor("self_attn.q_a_layernorm", "q", when=lambda config: config.q_lora_rank is not None),
    Tensor("self_attn.q_b_proj", "Q q", when=lambda config: config.q_lora_rank is not None),
    Tensor("self_attn.kv_a_proj_with_mqa", "L+r D"),
    Tensor("self_attn.kv_a_layernorm", "L"),
    Tensor("self_attn.kv_b_proj", "KV L", when=lambda config: not config.kv_b_split),
    Tensor("self_attn.embed_q", "HL n", when=lambda config: config.kv_b_split),  # per head W_k, turned
    Tensor("self_attn.unembed_out", "O L", when=lambda config: config.kv_b_split),
    Tensor("self_attn.o_proj", "D O"),
)
INDEXER = (
    Tensor("self_attn.indexer.wq_b", "X q"),
    Tensor("self_attn.indexer.wk", "x D"),
    Tensor("self_attn.indexer.k_norm", "x"),
    Tensor("self_attn.indexer.k_norm.bias", "x", suffix=""),
    Tensor("self_attn.indexer.weights_proj", "i D", keep=True),
)

DEEPSEEK_V3 = Family(
    prefixes=("model.", "language_model.model."),
    dims=_deepseek_dims,
    before_mixer=(Tensor("input_layernorm", "D"),),
    mixers={
        FULL_ATTENTION: LATENT_ATTENTION,
        INDEXED_ATTENTION: LATENT_ATTENTION + INDEXER,
        SHARED_INDEX_ATTENTION: LATENT_ATTENTION,
    },
    after_mixer=(Tensor("post_attention_layernorm", "D"),),
    dense=(
        Tensor("mlp.gate_proj", "F D"),
        Tensor("mlp.up_proj", "F D"),
        Tensor("mlp.down_proj", "D F"),
    ),
    moe=(
        Tensor("mlp.gate", "E D", keep=True),  # the router
        Tensor("mlp.gate.e_score_correction_bias", "E", suffix=""),
        Tensor("mlp.shared_experts.gate_proj", "S D"),
        Tensor("mlp.shared_experts.up_proj", "S D"),
        Tensor("mlp.shared_experts.down_proj", "D S"),
    ),
    expert_layouts=(PER_EXPERT, SWITCH_MLP, SWITCH_GATE_UP),
    skipped={"vision_tower.": "the vision tower", "mm_projector.": "the projector of the vision tower"},
    extra_layers="multi-token prediction",
)


def _gemma4_dims(config: Gemma4Config) -> Mapping[str, int]:
    heads, d = config.num_attention_heads, config.global_head_dim
    return {
        "D": config.hidden_size,
        "V": config.vocab_size,
        "E": config.num_experts,
        "I": config.moe_intermediate_size,
        "2I": 2 * config.moe_intermediate_size,
        "F": config.intermediate_size,
        "O": heads * config.head_dim,
        "K": config.num_key_value_heads * config.head_dim,
        "h": config.head_dim,
        "gO": heads * d,
        "gK": config.num_global_key_value_heads * d,
        "gh": d,
    }


GEMMA4 = Family(
    prefixes=("model.language_model.", "model.", "language_model.model."),
    dims=_gemma4_dims,
    before_mixer=(Tensor("input_layernorm", "D"),),
    mixers={
        SLIDING_ATTENTION: (
            Tensor("self_attn.q_proj", "O D"),
            Tensor("self_attn.k_proj", "K D"),
            Tensor("self_attn.v_proj", "K D"),
            Tensor("self_attn.q_norm", "h"),
            Tensor("self_attn.k_norm", "h"),
            Tensor("self_attn.o_proj", "D O"),
        ),
        FULL_ATTENTION: (  # of which keys are values
            Tensor("self_attn.q_proj", "gO D"),
            Tensor("self_attn.k_proj", "gK D"),
            Tensor("self_attn.q_norm", "gh"),
            Tensor("self_attn.k_norm", "gh"),
            Tensor("self_attn.o_proj", "D gO"),
        ),
    },
    after_mixer=(
        Tensor("post_attention_layernorm", "D"),
        Tensor("pre_feedforward_layernorm", "D"),
        *DENSE_MLP,
        Tensor("post_feedforward_layernorm_1", "D"),
    ),
    moe=(
        Tensor("router.proj", "E D", keep=True),
        Tensor("router.scale", "D", suffix=""),
        Tensor("router.per_expert_scale", "E", suffix=""),
        Tensor("pre_feedforward_layernorm_2", "D"),
        Tensor("post_feedforward_layernorm_2", "D"),
        Tensor("post_feedforward_layernorm", "D"),
        Tensor("layer_scalar", "1", suffix=""),
    ),
    expert_layouts=(
        (
            Experts("experts.gate_up_proj", "2I D", ("gate", "up"), suffix=""),
            Experts("experts.down_proj", "D I", ("down",), suffix=""),
        ),
        *(
            tuple(rule._replace(name=rule.name.replace("mlp.switch_mlp", "experts.switch_glu")) for rule in layout)
            for layout in (SWITCH_MLP, SWITCH_GATE_UP)
        ),
    ),
    skipped={
        "model.vision_tower.": "the vision tower",
        "model.embed_vision.": "the projector of the vision tower",
        "vision_tower.": "the vision tower",
        "embed_vision.": "the projector of the vision tower",
    },
)


def _kimi_linear_dims(config: KimiLinearConfig) -> Mapping[str, int]:
    return {
        **_deepseek_dims(config),
        "C": config.linear_width,
        "k": config.linear_conv_kernel_dim,
        "d": config.linear_head_dim,
        "H": config.linear_num_heads,
    }


DELTA_ATTENTION = (
    Tensor("self_attn.q_proj", "C D"),
    Tensor("self_attn.k_proj", "C D"),
    Tensor("self_attn.v_proj", "C D"),
    Tensor("self_attn.q_conv1d", "C 1 k", keep=True),
    Tensor("self_attn.k_conv1d", "C 1 k", keep=True),
    Tensor("self_attn.v_conv1d", "C 1 k", keep=True),
    # Small, and they make the decay and step of a recurrence, where errors add up over the sequence.
    Tensor("self_attn.f_a_proj", "d D", keep=True),
    Tensor("self_attn.f_b_proj", "C d", keep=True),
    Tensor("self_attn.b_proj", "H D", keep=True),
    Tensor("self_attn.A_log", "1 1 H 1", keep=True, suffix=""),
    Tensor("self_attn.dt_bias", "C", suffix=""),
    Tensor("self_attn.g_a_proj", "d D"),
    Tensor("self_attn.g_b_proj", "C d"),
    Tensor("self_attn.o_norm", "d"),
    Tensor("self_attn.o_proj", "D C"),
)
KIMI_LINEAR = replace(
    DEEPSEEK_V3,
    prefixes=("model.",),
    dims=_kimi_linear_dims,
    mixers={FULL_ATTENTION: LATENT_ATTENTION, LINEAR_ATTENTION: DELTA_ATTENTION},
    moe=tuple(tensor._replace(source=tensor.name.replace("mlp.", "block_sparse_moe.")) for tensor in DEEPSEEK_V3.moe),
    expert_layouts=(W1_W3_W2,),
    skipped={},
)

FAMILIES: Mapping[str, Family] = {
    "deepseek_v3": DEEPSEEK_V3,
    "ernie4_5_moe": ERNIE4_5_MOE,
    "gemma4": GEMMA4,
    "glm4_moe": GLM4_MOE,
    "gpt_oss": GPT_OSS,
    "granitemoe": GRANITEMOE,
    "kimi_linear": KIMI_LINEAR,
    "llama4": LLAMA4,
    "minimax_m2": MINIMAX_M2,
    "mixtral": MIXTRAL,
    "olmoe": OLMOE,
    "qwen2_moe": QWEN2_MOE,
    "qwen3_5_moe": QWEN3_5_MOE,
    "qwen3_moe": QWEN3_MOE,
    "qwen3_next": QWEN3_NEXT,
}
