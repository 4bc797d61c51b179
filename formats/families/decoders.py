"""Families of one shape: attention over heads, then experts; each is what it does not share with the others."""

from collections.abc import Mapping
from dataclasses import replace

from formats.config import (
    CHUNKED_ATTENTION,
    CONV,
    FULL_ATTENTION,
    HEAD_NORM,
    INDEXED_ATTENTION,
    LINEAR_ATTENTION,
    SIGMOID,
    SIGMOID_BY_HEAD,
    SLIDING_ATTENTION,
    SOFTPLUS,
    SOFTPLUS_BY_HEAD,
    TURNED_NORM,
    WHOLE_NORM,
    DecoderConfig,
    MiniMaxM3Config,
)
from formats.families.shared import (
    CORRECTION_BIAS,
    DENSE_MLP,
    FUSED,
    MAMBA2,
    PER_EXPERT,
    ROUTER,
    SHARED_EXPERT,
    SHARED_EXPERT_GATE,
    SWITCH_GATE_UP,
    SWITCH_MLP,
    VISION_TOWER,
    W1_W3_W2,
    expert_dims,
    mamba_dims,
)
from formats.family import FINAL_NORM, Experts, Family, Tensor


def _decoder_dims(config: DecoderConfig) -> Mapping[str, int]:
    return {
        **expert_dims(config),
        "F": config.intermediate_size or 0,
        "S": config.shared_expert_intermediate_size or 0,
        "O": config.num_attention_heads * config.head_dim,
        "Ov": config.num_attention_heads * config.value_dim,
        "K": config.num_key_value_heads * config.head_dim,
        "Kv": config.num_key_value_heads * config.value_dim,
        "sK": (config.swa_num_key_value_heads or config.num_key_value_heads) * config.head_dim,
        "sKv": (config.swa_num_key_value_heads or config.num_key_value_heads) * config.value_dim,
        "sO": (config.swa_num_attention_heads or config.num_attention_heads) * config.head_dim,
        "sOv": (config.swa_num_attention_heads or config.num_attention_heads) * config.value_dim,
        "sH": config.swa_num_attention_heads or config.num_attention_heads,
        "h": config.head_dim,
        "H": config.num_attention_heads,
        "3D": 3 * config.hidden_size,
        "O2K": (config.num_attention_heads + 2 * config.num_key_value_heads) * config.head_dim,
        "k": config.conv_kernel_size or 0,
    }


def _has_shared_expert(config: DecoderConfig) -> bool:
    return config.shared_expert_intermediate_size is not None


def _attention(sliding: str, sinks: Tensor) -> tuple[Tensor, ...]:
    """Of a kind of layers; `sliding` is what symbols of widths begin with that are not those of the others."""
    queries, keys, values, given, heads = (f"{sliding}{symbol}" for symbol in ("O", "K", "Kv", "Ov", "H"))
    return (
        Tensor("self_attn.q_proj", f"{queries} D"),
        Tensor("self_attn.k_proj", f"{keys} D"),
        Tensor("self_attn.v_proj", f"{values} D"),
        Tensor("self_attn.q_proj.bias", queries, suffix="", when=lambda c: c.attention_bias),
        Tensor("self_attn.k_proj.bias", keys, suffix="", when=lambda c: c.attention_bias),
        Tensor("self_attn.v_proj.bias", values, suffix="", when=lambda c: c.attention_bias),
        Tensor("self_attn.q_norm", "h", when=lambda c: c.qk_norm == HEAD_NORM),
        Tensor("self_attn.k_norm", "h", when=lambda c: c.qk_norm == HEAD_NORM),
        Tensor("self_attn.q_norm", "h", source="self_attn.query_layernorm", when=lambda c: c.qk_norm == TURNED_NORM),
        Tensor("self_attn.k_norm", "h", source="self_attn.key_layernorm", when=lambda c: c.qk_norm == TURNED_NORM),
        Tensor("self_attn.q_norm", queries, when=lambda c: c.qk_norm == WHOLE_NORM),
        Tensor("self_attn.k_norm", keys, when=lambda c: c.qk_norm == WHOLE_NORM),
        sinks._replace(shape=heads),
        Tensor(
            "self_attn.g_proj", f"{given} D", source="self_attn.gate_proj", when=lambda c: c.attention_gate == SIGMOID
        ),
        Tensor("self_attn.g_proj", f"{given} D", when=lambda c: c.attention_gate == SOFTPLUS),
        Tensor(
            "self_attn.g_proj", f"{heads} D", when=lambda c: c.attention_gate in (SOFTPLUS_BY_HEAD, SIGMOID_BY_HEAD)
        ),
        Tensor("self_attn.o_proj", f"D {given}"),
        Tensor("self_attn.o_proj.bias", "D", suffix="", when=lambda c: c.attention_output_bias),
    )


def _mixers(sinks_source: str = "") -> Mapping[str, tuple[Tensor, ...]]:
    """Attention by layer type; its sinks may have another name in a source."""
    sinks = Tensor("self_attn.sinks", "H", suffix="", source=sinks_source)
    full = _attention("", sinks._replace(when=lambda c: c.attention_sinks and c.full_attention_sinks))
    sliding = _attention("s", sinks._replace(when=lambda c: c.attention_sinks))
    return {FULL_ATTENTION: full, CHUNKED_ATTENTION: full, SLIDING_ATTENTION: sliding}


MIXERS = _mixers()
NOTHING: Mapping[str, str] = {}
WITHIN_VISION = ("model.language_model.", "model.", "language_model.model.")  # as published, in GGUF files, by MLX


def _decoder(
    moe: tuple[Tensor, ...],
    expert_layouts: tuple[tuple[Experts, ...], ...] = (PER_EXPERT, FUSED, SWITCH_MLP, SWITCH_GATE_UP),
    extra_layers: str = "",
    skipped: Mapping[str, str] = NOTHING,
    prefixes: tuple[str, ...] = ("model.",),
    dense: tuple[Tensor, ...] = DENSE_MLP,
    mixers: Mapping[str, tuple[Tensor, ...]] = MIXERS,
) -> Family:
    return Family(
        prefixes=prefixes,
        dims=_decoder_dims,
        before_mixer=(Tensor("input_layernorm", "D"),),
        mixers=mixers,
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

SHARED_EXPERTS = (
    Tensor("mlp.shared_expert.gate_proj", "S D", source="mlp.shared_experts.gate_proj"),
    Tensor("mlp.shared_expert.up_proj", "S D", source="mlp.shared_experts.up_proj"),
    Tensor("mlp.shared_expert.down_proj", "D S", source="mlp.shared_experts.down_proj"),
)
SHARED_EXPERTS_OR_NONE = tuple(tensor._replace(when=_has_shared_expert) for tensor in SHARED_EXPERTS)
# Switched experts under their own names, as mlx-lm leaves them.
EXPERTS_BY_PART = tuple(rule._replace(name=rule.name.replace("switch_mlp", "experts")) for rule in SWITCH_MLP)
AFMOE = replace(
    _decoder(
        (
            ROUTER._replace(source="mlp.router.gate"),
            CORRECTION_BIAS._replace(source="mlp.expert_bias"),
            *SHARED_EXPERTS,
        ),
        (PER_EXPERT, FUSED, EXPERTS_BY_PART, SWITCH_MLP, SWITCH_GATE_UP),
    ),
    after_mixer=(
        Tensor("attention_output_norm", "D", source="post_attention_layernorm"),
        Tensor("post_attention_layernorm", "D", source="pre_mlp_layernorm"),
        Tensor("post_mlp_layernorm", "D"),
    ),
)
BAILING_MOE = replace(
    _decoder(
        (
            ROUTER._replace(also="mlp.gate.gate_proj"),
            CORRECTION_BIAS._replace(source="mlp.gate.expert_bias"),
            *SHARED_EXPERTS,
        ),
        mixers={
            FULL_ATTENTION: (
                Tensor("self_attn.qkv_proj", "O2K D", source="attention.query_key_value"),
                Tensor(
                    "self_attn.q_norm", "h", source="attention.query_layernorm", when=lambda c: c.qk_norm == HEAD_NORM
                ),
                Tensor(
                    "self_attn.k_norm", "h", source="attention.key_layernorm", when=lambda c: c.qk_norm == HEAD_NORM
                ),
                Tensor("self_attn.o_proj", "D O", source="attention.dense"),
            )
        },
        extra_layers="multi-token prediction",
    ),
    embedding=Tensor("embed_tokens", "V D", source="word_embeddings"),
)
COHERE2_MOE = replace(
    _decoder((ROUTER, *SHARED_EXPERTS_OR_NONE), extra_layers="multi-token prediction"),
    after_mixer=(),
    mlx=False,
)
DOTS1 = _decoder(
    (ROUTER, CORRECTION_BIAS, *SHARED_EXPERTS),
    (PER_EXPERT, FUSED, EXPERTS_BY_PART, SWITCH_MLP, SWITCH_GATE_UP),
)
ERNIE4_5_MOE = _decoder(
    (
        ROUTER,
        CORRECTION_BIAS._replace(shape="1 E", keep=True, source="mlp.moe_statics.e_score_correction_bias"),
        *SHARED_EXPERTS_OR_NONE,
    ),
    skipped={"model.mtp_": "multi-token prediction"},
)
ERNIE4_5_VL_MOE = replace(
    _decoder(
        (
            ROUTER._replace(dtype="F32", transposed=True),
            CORRECTION_BIAS._replace(
                shape="1 E", keep=True, source="mlp.moe_statics.e_score_correction_bias", part=0, parts=2
            ),
            *SHARED_EXPERTS_OR_NONE,
        ),
        (PER_EXPERT,),
        skipped={
            "vision_model.": "the vision tower",
            "model.vision_tower.": "the vision tower",  # as transformers saves it
            "model.resampler_model.": "the projector of the vision tower",
        },
    ),
    other_experts="experts for vision",
    mlx=False,
)
EXAONE_MOE = _decoder(
    (
        ROUTER,
        CORRECTION_BIAS._replace(source="mlp.e_score_correction_bias", also=CORRECTION_BIAS.name),
        *SHARED_EXPERTS,
    ),
    skipped={"mtp.": "multi-token prediction"},
)
FLEX_OLMO = replace(
    _decoder((ROUTER,), (PER_EXPERT, FUSED)),
    before_mixer=(),
    after_mixer=(
        Tensor("attention_output_norm", "D", source="post_attention_layernorm"),
        Tensor("post_mlp_layernorm", "D", source="post_feedforward_layernorm"),
    ),
    mlx=False,
)
GLM4_MOE = _decoder((ROUTER, CORRECTION_BIAS, *SHARED_EXPERTS), extra_layers="multi-token prediction")
GLM4V_MOE = replace(GLM4_MOE, prefixes=WITHIN_VISION, skipped=VISION_TOWER, mlx=False)
SHARED_IN_ONE = (  # gate and up are one matrix; GGUF files have them apart
    *(
        Tensor(
            f"mlp.shared_expert.{name}_proj",
            "S D",
            source="shared_mlp.input_linear",
            also=f"mlp.shared_expert.{name}_proj",
            part=part,
            parts=2,
            when=_has_shared_expert,
        )
        for part, name in enumerate(("gate", "up"))
    ),
    Tensor(
        "mlp.shared_expert.down_proj",
        "D S",
        source="shared_mlp.output_linear",
        also="mlp.shared_expert.down_proj",
        when=_has_shared_expert,
    ),
)
GRANITEMOE = _decoder(
    (ROUTER._replace(source="block_sparse_moe.router.layer", also="block_sparse_moe.router"), *SHARED_IN_ONE),
    (
        (
            Experts("block_sparse_moe.input_linear", "2I D", ("gate", "up")),
            Experts("block_sparse_moe.output_linear", "D I", ("down",)),
        ),
        tuple(rule._replace(name=rule.name.replace("mlp", "block_sparse_moe")) for rule in FUSED),  # Swash
        SPARSE_SWITCH_MLP,
        SWITCH_MLP,
        SWITCH_GATE_UP,
    ),
)
GRANITEMOEHYBRID = replace(
    GRANITEMOE,
    dims=lambda config: {**_decoder_dims(config), **mamba_dims(config.mamba)},
    mixers={FULL_ATTENTION: MIXERS[FULL_ATTENTION], LINEAR_ATTENTION: MAMBA2},
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
        tuple(rule._replace(bias=".bias") for rule in EXPERTS_BY_PART),
        tuple(rule._replace(bias=".bias") for rule in PER_EXPERT),  # as AutoRound takes them apart
    ),
)
SHARED_MLP = tuple(
    tensor._replace(source=tensor.source.replace("shared_experts", "shared_mlp"), also=tensor.source)
    for tensor in SHARED_EXPERTS
)
HUNYUAN_V1_MOE = replace(_decoder((ROUTER._replace(source="mlp.gate.wg"), *SHARED_MLP)), mlx=False)
HY_V3 = replace(
    _decoder(
        (
            ROUTER._replace(source="mlp.router.gate", also=ROUTER.name),
            CORRECTION_BIAS._replace(source="mlp.expert_bias", also="mlp.e_score_correction_bias"),
            *SHARED_MLP,
        ),
        extra_layers="multi-token prediction",
    ),
    mlx=False,
)

KOLIBRI1 = replace(
    _decoder(
        (
            ROUTER,
            CORRECTION_BIAS._replace(source="moe.router.expert_bias", also=CORRECTION_BIAS.name, dtype="BF16"),
            *SHARED_EXPERTS,
        )
    ),
    after_mixer=(
        Tensor("attention_output_norm", "D", source="post_attn_norm", also="post_self_attn_layernorm"),
        Tensor("post_attention_layernorm", "D"),
        Tensor("post_mlp_layernorm", "D", source="post_ffn_norm", also="post_mlp_layernorm"),
    ),
    mlx=False,
)


def _in_feed_forward(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """As Llama 4 calls what others call mlp."""
    return tuple(tensor._replace(source=tensor.name.replace("mlp.", "feed_forward.")) for tensor in tensors)


LAGUNA = _decoder(
    (
        ROUTER._replace(also="mlp.gate.proj"),
        CORRECTION_BIAS._replace(source="mlp.experts.e_score_correction_bias", also=CORRECTION_BIAS.name),
        *SHARED_EXPERT,
    )
)
LFM2_NAMES = {
    "self_attn.q_norm": "self_attn.q_layernorm",
    "self_attn.k_norm": "self_attn.k_layernorm",
    "self_attn.o_proj": "self_attn.out_proj",
}
LFM2_MOE = replace(
    _decoder(
        (
            ROUTER._replace(source="feed_forward.gate"),
            CORRECTION_BIAS._replace(source="feed_forward.expert_bias", when=lambda c: c.e_score_correction_bias),
        ),
        (
            tuple(rule._replace(name=rule.name.replace("block_sparse_moe", "feed_forward")) for rule in W1_W3_W2),
            tuple(rule._replace(name=rule.name.replace("mlp", "feed_forward", 1)) for rule in FUSED),
            tuple(rule._replace(name=rule.name.replace("mlp", "feed_forward", 1)) for rule in SWITCH_MLP),
        ),
        dense=tuple(
            tensor._replace(source=f"feed_forward.{weight}", also=tensor.name.replace("mlp", "feed_forward"))
            for tensor, weight in zip(DENSE_MLP, ("w1", "w3", "w2"), strict=True)
        ),
        mixers={
            FULL_ATTENTION: tuple(
                tensor._replace(source=LFM2_NAMES.get(tensor.name, "")) for tensor in MIXERS[FULL_ATTENTION]
            ),
            CONV: (
                Tensor("conv.in_proj", "3D D"),
                Tensor("conv.conv", "D 1 k", keep=True),
                Tensor("conv.out_proj", "D D"),
            ),
        },
    ),
    before_mixer=(Tensor("input_layernorm", "D", source="operator_norm"),),
    after_mixer=(Tensor("post_attention_layernorm", "D", source="ffn_norm"),),
    last=(Tensor("norm", "D", source="embedding_norm"),),
)
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
MELLUM = _decoder((ROUTER,), skipped={"mtp.": "multi-token prediction"})
MIMO_V2_FLASH = _decoder(
    (ROUTER, CORRECTION_BIAS),
    mixers=_mixers(sinks_source="self_attn.attention_sink_bias"),
    skipped={"model.mtp.": "multi-token prediction"},
)
MINIMAX_M2 = _decoder(
    (
        ROUTER._replace(source="block_sparse_moe.gate"),
        CORRECTION_BIAS._replace(source="block_sparse_moe.e_score_correction_bias"),
    ),
    (W1_W3_W2, SWITCH_MLP, SPARSE_SWITCH_MLP, SWITCH_GATE_UP),
    extra_layers="multi-token prediction",
)


def _minimax_m3_dims(config: MiniMaxM3Config) -> Mapping[str, int]:
    x = config.index_head_dim
    return {**_decoder_dims(config), "x": x, "X": config.index_n_heads * x}


def _in_block_sparse_moe(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """As MiniMax calls what transformers calls mlp."""
    return tuple(
        tensor._replace(source=tensor.base.replace("mlp.", "block_sparse_moe."), also=tensor.base) for tensor in tensors
    )


MINIMAX_M3 = replace(
    _decoder(
        (
            ROUTER._replace(source="block_sparse_moe.gate", also=ROUTER.name),
            CORRECTION_BIAS._replace(
                source="block_sparse_moe.e_score_correction_bias", also="mlp.gate.e_score_correction_bias"
            ),
            *_in_block_sparse_moe(SHARED_EXPERTS),
        ),
        (W1_W3_W2, SPARSE_SWITCH_MLP),
        mixers={
            FULL_ATTENTION: MIXERS[FULL_ATTENTION],
            INDEXED_ATTENTION: (
                *MIXERS[FULL_ATTENTION],
                Tensor("self_attn.indexer.q_proj", "X D", source="self_attn.index_q_proj"),
                Tensor("self_attn.indexer.k_proj", "x D", source="self_attn.index_k_proj"),
                Tensor("self_attn.indexer.q_norm", "x", source="self_attn.index_q_norm"),
                Tensor("self_attn.indexer.k_norm", "x", source="self_attn.index_k_norm"),
            ),
        },
        prefixes=("language_model.model.", "model."),
        skipped={
            "vision_tower.": "the vision tower",
            "multi_modal_projector.": "the projector of the vision tower",
            "patch_merge_mlp.": "the projector of the vision tower",
            "mtp.": "multi-token prediction",
        },
    ),
    dims=_minimax_m3_dims,
)
MIXTRAL = _decoder(
    (ROUTER._replace(source="block_sparse_moe.gate"),), (W1_W3_W2, SWITCH_MLP, SPARSE_SWITCH_MLP, SWITCH_GATE_UP)
)
OLMOE = _decoder((ROUTER,))
PHIMOE = replace(
    _decoder((ROUTER._replace(source="block_sparse_moe.gate"),), (W1_W3_W2, SPARSE_SWITCH_MLP)),
    before_mixer=(Tensor("input_layernorm", "D"), Tensor("input_layernorm.bias", "D", suffix="")),
    after_mixer=(Tensor("post_attention_layernorm", "D"), Tensor("post_attention_layernorm.bias", "D", suffix="")),
    last=(FINAL_NORM, FINAL_NORM._replace(name="norm.bias", suffix="")),
    of_head=(Tensor("lm_head.bias", "V", suffix="", when=lambda c: c.lm_head_bias),),
)
QWEN2_MOE = _decoder((ROUTER, *SHARED_EXPERT, SHARED_EXPERT_GATE))
QWEN3_MOE = _decoder((ROUTER,))
QWEN3_OMNI_MOE = replace(
    _decoder(
        (ROUTER,),
        prefixes=("thinker.model.",),
        skipped={
            "thinker.visual.": "the vision tower",
            "thinker.audio_tower.": "the audio tower",
            "talker.": "the part that speaks",
            "code2wav.": "the part that speaks",
        },
    ),
    mlx=False,
)
QWEN3_VL_MOE = _decoder(
    (ROUTER,),
    (
        tuple(rule._replace(transposed=True, either=True) for rule in FUSED),  # published, or as transformers 5 saves
        PER_EXPERT,
        SWITCH_MLP,
        SWITCH_GATE_UP,
    ),
    prefixes=WITHIN_VISION,
    skipped=VISION_TOWER,
)
SOLAR_OPEN = _decoder((ROUTER, CORRECTION_BIAS, *SHARED_EXPERTS))
STEP3P5 = replace(
    _decoder(
        (
            ROUTER._replace(source="moe.gate", also="mlp.gate.gate"),
            CORRECTION_BIAS._replace(source="moe.router_bias", also="mlp.gate.router_bias"),
            *(
                tensor._replace(
                    source=tensor.name.replace("mlp.shared", "share"), also=tensor.name.replace("shared", "share")
                )
                for tensor in SHARED_EXPERT
            ),
        ),
        (tuple(rule._replace(name=rule.name.replace("mlp.switch_mlp", "moe")) for rule in SWITCH_MLP), SWITCH_MLP),
        extra_layers="multi-token prediction",
        skipped={
            "vision_model.": "the vision tower",
            "vit_large_projector.": "the projector of the vision tower",
            "model.vision_model.": "the vision tower",  # as transformers saves it
            "model.multi_modal_projector.": "the projector of the vision tower",
        },
    ),
    norms_around_zero=True,
)
