"""Latent attention: DeepSeek-V3 and its like (Kimi K2, GLM-5), Kimi Linear, and Ling 3."""

from collections.abc import Mapping
from dataclasses import replace

from formats.config import (
    FULL_ATTENTION,
    INDEXED_ATTENTION,
    LINEAR_ATTENTION,
    SHARED_INDEX_ATTENTION,
    DeepseekV3Config,
    Glm5NextConfig,
    KimiK3Config,
    KimiLinearConfig,
    LongcatFlashConfig,
    MistralLarge4Config,
)
from formats.families.shared import (
    CORRECTION_BIAS,
    DENSE_MLP,
    FUSED,
    PER_EXPERT,
    ROUTER,
    SWITCH_GATE_UP,
    SWITCH_MLP,
    VISION_TOWER,
    W1_W3_W2,
    expert_dims,
    hyper_connection,
    stream_dims,
)
from formats.family import EMBEDDING, FINAL_NORM, LM_HEAD, Family, Tensor


def deepseek_dims(config: DeepseekV3Config) -> Mapping[str, int]:
    heads, indexer = config.num_attention_heads, config.indexer
    return {
        **expert_dims(config),
        "F": config.intermediate_size,
        "S": config.shared_expert_intermediate_size or 0,
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

POST_MLP_NORM = Tensor("post_mlp_layernorm", "D", when=lambda config: config.post_mlp_norm)

DEEPSEEK_V3 = Family(
    prefixes=("model.", "language_model.model."),
    dims=deepseek_dims,
    before_mixer=(Tensor("input_layernorm", "D"),),
    mixers={
        FULL_ATTENTION: LATENT_ATTENTION,
        INDEXED_ATTENTION: LATENT_ATTENTION + INDEXER,
        SHARED_INDEX_ATTENTION: LATENT_ATTENTION,
    },
    after_mixer=(Tensor("post_attention_layernorm", "D"),),
    dense=DENSE_MLP,
    moe=(
        ROUTER,
        CORRECTION_BIAS._replace(when=lambda config: config.has_correction_bias),
        Tensor("mlp.shared_experts.gate_proj", "S D"),
        Tensor("mlp.shared_experts.up_proj", "S D"),
        Tensor("mlp.shared_experts.down_proj", "D S"),
        POST_MLP_NORM,
    ),
    unread=(POST_MLP_NORM,),
    expert_layouts=(PER_EXPERT, FUSED, SWITCH_MLP, SWITCH_GATE_UP),
    skipped={
        "vision_tower.": "the vision tower",
        "mm_projector.": "the projector of the vision tower",
        "multi_modal_projector.": "the projector of the vision tower",
    },
    extra_layers="multi-token prediction",
)


def _longcat_dims(config: LongcatFlashConfig) -> Mapping[str, int]:
    return {**deepseek_dims(config), "E+Z": config.num_experts + config.zero_expert_num}


def _twice(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Of both halves of a layer, which number the modules that these are of."""
    return tuple(
        tensor._replace(name=".".join((module, str(half), *rest)))
        for half in (0, 1)
        for tensor in tensors
        for module, *rest in [tensor.name.split(".")]
    )


LONGCAT_FLASH = Family(
    prefixes=("model.",),
    dims=_longcat_dims,
    before_mixer=_twice((Tensor("input_layernorm", "D"),)),
    mixers={FULL_ATTENTION: _twice(LATENT_ATTENTION)},
    after_mixer=_twice(
        (
            Tensor("post_attention_layernorm", "D"),
            *(tensor._replace(name=tensor.name.replace("mlp.", "mlps.")) for tensor in DENSE_MLP),
        )
    ),
    moe=(
        Tensor("mlp.router.classifier", "E+Z D", keep=True),
        Tensor("mlp.router.e_score_correction_bias", "E+Z", suffix="", dtype="F32"),
    ),
    expert_layouts=(PER_EXPERT, SWITCH_MLP),
    skipped={"model.mtp.": "multi-token prediction"},
)


def _mistral_large4_dims(config: MistralLarge4Config) -> Mapping[str, int]:
    return {
        **deepseek_dims(config),
        "r/2": config.qk_rope_head_dim // 2,
        "heads": config.num_attention_heads,
        "QV": config.num_attention_heads * (config.head_dim + config.v_head_dim),
    }


def _of_mistral(tensor: Tensor) -> Tensor:
    """By its name in Mistral's own checkpoints."""
    name = tensor.name
    for ours, theirs in {
        "input_layernorm": "attention_norm",
        "post_attention_layernorm": "ffn_norm",
        "self_attn.": "attention.",
        "kv_a_layernorm": "kv_a_norm",
        "softmax_scaling.scale": "ssmax_scaling.s",
        "softmax_scaling.bias": "ssmax_scaling.b",
        "kv_a_proj_with_mqa": "wkv_a_with_mqa",
        "kv_b_proj": "wkv_b",
        "q_proj": "wq",
        "o_proj": "wo",
        "gate_proj": "w1",
        "down_proj": "w2",
        "up_proj": "w3",
        "mlp.gate": "gate",
        "mlp.shared_experts.": "shared_experts.",
        "mlp.": "feed_forward.",
    }.items():
        name = name.replace(ours, theirs)
    return tensor._replace(source=name)


def _owns_latents(config: MistralLarge4Config, layer: int) -> bool:
    return config.owns_latents(layer)


def _turns(config: MistralLarge4Config, layer: int) -> bool:
    return config.rope_dim(layer) > 0


def _is_still(config: MistralLarge4Config, layer: int) -> bool:
    return not _turns(config, layer)


def _softmax_scaling(at: str, heads: str) -> tuple[Tensor, ...]:
    """How the queries of each head grow with their position."""
    return tuple(Tensor(f"{at}.softmax_scaling.{what}", heads, suffix="") for what in ("scale", "bias"))


_SHARED_LATENT_ATTENTION = (
    Tensor("self_attn.q_proj", "Q D"),
    Tensor("self_attn.kv_a_proj_with_mqa", "L+r D", where=lambda c, i: _owns_latents(c, i) and _turns(c, i)),
    Tensor("self_attn.kv_a_proj_with_mqa", "L D", where=lambda c, i: _owns_latents(c, i) and _is_still(c, i)),
    Tensor("self_attn.kv_a_layernorm", "L", where=_owns_latents),
    Tensor("self_attn.kv_b_proj", "KV L", where=_turns),
    Tensor("self_attn.kv_b_proj", "QV L", where=_is_still),
    Tensor("self_attn.o_proj", "D O"),
    *_softmax_scaling("self_attn", "heads"),
)
_INDEXER_OF_STREAM = (
    Tensor("self_attn.indexer.q_input_norm", "D"),
    Tensor("self_attn.indexer.q_input_norm.bias", "D", suffix=""),
    Tensor("self_attn.indexer.wq_b", "X D"),
    *INDEXER[1:],
    *_softmax_scaling("self_attn.indexer", "i"),
)
MISTRAL_LARGE4 = Family(
    prefixes=("",),
    dims=_mistral_large4_dims,
    embedding=EMBEDDING._replace(source="tok_embeddings"),
    before_mixer=tuple(map(_of_mistral, DEEPSEEK_V3.before_mixer)),
    mixers={
        INDEXED_ATTENTION: tuple(map(_of_mistral, _SHARED_LATENT_ATTENTION + _INDEXER_OF_STREAM)),
        SHARED_INDEX_ATTENTION: tuple(map(_of_mistral, _SHARED_LATENT_ATTENTION)),
    },
    after_mixer=tuple(map(_of_mistral, DEEPSEEK_V3.after_mixer)),
    dense=tuple(map(_of_mistral, DENSE_MLP)),
    moe=tuple(_of_mistral(tensor) for tensor in DEEPSEEK_V3.moe if tensor.name != POST_MLP_NORM.name),
    expert_layouts=(tuple(rule._replace(name=rule.name.removeprefix("block_sparse_moe.")) for rule in W1_W3_W2),),
    last=(FINAL_NORM, Tensor("rotary_emb.alpha", "r/2", suffix="", source="lerope.alpha", dtype="F32")),
    head=LM_HEAD._replace(source="output"),
    mlx=False,
    skipped={
        "vision_encoder.": "the vision tower",
        "pre_mm_projector_norm.": "the projector of the vision tower",
        "patch_merger.": "the projector of the vision tower",
        "vision_language_adapter.": "the projector of the vision tower",
        "model.vision_tower.": "the vision tower",  # as transformers saves it again
        "model.multi_modal_projector.": "the projector of the vision tower",
        "mtp_dspark.": "multi-token prediction",
    },
)


def _kimi_linear_dims(config: KimiLinearConfig) -> Mapping[str, int]:
    return {
        **deepseek_dims(config),
        "C": config.linear_width,
        "k": config.linear_conv_kernel_dim,
        "d": config.linear_head_dim,
        "H": config.linear_num_heads,
    }


DELTA_ATTENTION = (
    Tensor("self_attn.q_proj", "C D"),
    Tensor("self_attn.k_proj", "C D"),
    Tensor("self_attn.v_proj", "C D"),
    Tensor("self_attn.q_conv1d", "C 1 k", keep=True, also="self_attn.q_conv.conv"),
    Tensor("self_attn.k_conv1d", "C 1 k", keep=True, also="self_attn.k_conv.conv"),
    Tensor("self_attn.v_conv1d", "C 1 k", keep=True, also="self_attn.v_conv.conv"),
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
    moe=tuple(
        tensor._replace(
            source=tensor.name.replace("mlp.", "block_sparse_moe."),
            also=tensor.name.replace("gate.e_score", "e_score"),  # as MLX has them
        )
        for tensor in DEEPSEEK_V3.moe
    ),
    dense=tuple(  # as transformers saves them again
        tensor._replace(also=tensor.name.replace("mlp.", "block_sparse_moe.")) for tensor in DENSE_MLP
    ),
    expert_layouts=(W1_W3_W2, SWITCH_MLP),
    skipped={},
)


def _of_ling(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Attention by the names of Ling."""
    return tuple(tensor._replace(source=tensor.name.replace("self_attn.", "attention."), also="") for tensor in tensors)


BAILING_HYBRID = replace(
    KIMI_LINEAR,
    embedding=EMBEDDING._replace(source="word_embeddings"),
    mixers={
        FULL_ATTENTION: (
            *_of_ling(*LATENT_ATTENTION[:-1], Tensor("self_attn.g_proj", "H D")),
            LATENT_ATTENTION[-1]._replace(source="attention.dense"),
        ),
        LINEAR_ATTENTION: (
            *_of_ling(
                *(
                    tensor
                    for tensor in DELTA_ATTENTION[:-1]
                    if not tensor.name.endswith(("f_a_proj", "f_b_proj", "g_a_proj", "g_b_proj"))
                ),
                Tensor("self_attn.f_proj", "C D"),
                Tensor("self_attn.g_proj", "C D"),
            ),
            # As transformers saves it again it is `dense`.
            DELTA_ATTENTION[-1]._replace(source="attention.o_proj", also="attention.dense"),
        ),
    },
    moe=tuple(
        tensor._replace(source="mlp.gate.expert_bias") if tensor.name == CORRECTION_BIAS.name else tensor
        for tensor in DEEPSEEK_V3.moe
    ),
    dense=DENSE_MLP,
    expert_layouts=(PER_EXPERT, SWITCH_MLP, SWITCH_GATE_UP),
)


def _kimi_k3_dims(config: KimiK3Config) -> Mapping[str, int]:
    return {**_kimi_linear_dims(config), "l": config.routed_expert_hidden_size}


def _attention_residual(name: str) -> tuple[Tensor, ...]:
    return (
        Tensor(f"{name}_norm", "D", when=lambda config: not config.attn_res_fused),
        Tensor(f"{name}_proj", "1 D", keep=True, when=lambda config: not config.attn_res_fused),
        Tensor(f"{name}_score", "1 D", keep=True, when=lambda config: config.attn_res_fused),
    )


def _routed(name: str, shape: str) -> Tensor:
    """Beside the experts, by its published name and by MLX's."""
    return Tensor(f"mlp.{name}", shape, source=f"block_sparse_moe.{name}", also=f"mlp.{name}")


A_LOG = Tensor("self_attn.A_log", "H", suffix="", dtype="F32", padded="d")  # with zeros up to the width of a head
IN_F32 = ("self_attn.q_conv1d", "self_attn.k_conv1d", "self_attn.v_conv1d", "self_attn.o_norm", "self_attn.dt_bias")
KIMI_K3 = replace(
    KIMI_LINEAR,
    prefixes=("language_model.model.", "model."),
    dims=_kimi_k3_dims,
    before_mixer=(*_attention_residual("self_attention_res"), *KIMI_LINEAR.before_mixer),
    mixers={
        FULL_ATTENTION: (*LATENT_ATTENTION, Tensor("self_attn.g_proj", "O D")),
        LINEAR_ATTENTION: (
            *(
                A_LOG
                if tensor.name == A_LOG.name
                else tensor._replace(dtype="F32" if tensor.name in IN_F32 else "BF16")
                for tensor in DELTA_ATTENTION
                if tensor.name not in ("self_attn.g_a_proj", "self_attn.g_b_proj")
            ),
            Tensor("self_attn.g_proj", "C D"),
        ),
    },
    after_mixer=(*_attention_residual("mlp_res"), *KIMI_LINEAR.after_mixer),
    moe=(
        *KIMI_LINEAR.moe,
        _routed("routed_expert_down_proj", "l D"),
        _routed("routed_expert_norm", "l"),
        _routed("routed_expert_up_proj", "D l"),
    ),
    expert_layouts=tuple(
        tuple(rule._replace(shape=rule.shape.replace("D", "l")) for rule in layout)
        for layout in KIMI_LINEAR.expert_layouts
    ),
    last=(*_attention_residual("output_attn_res"), FINAL_NORM),
    never_quantized=("*.routed_expert_*", "*_res_proj"),
    skipped=DEEPSEEK_V3.skipped,
)


def _glm5_next_dims(config: Glm5NextConfig) -> Mapping[str, int]:
    return {**_kimi_linear_dims(config), **stream_dims(config), "m": config.index_kpool}


GLM5_NEXT = replace(
    DEEPSEEK_V3,
    prefixes=("model.language_model.",),
    dims=_glm5_next_dims,
    before_mixer=(*hyper_connection("attn"), *DEEPSEEK_V3.before_mixer),
    mixers={
        LINEAR_ATTENTION: tuple(
            A_LOG._replace(padded="") if tensor.name == A_LOG.name else tensor._replace(also="")
            for tensor in DELTA_ATTENTION
        ),
        INDEXED_ATTENTION: (
            *LATENT_ATTENTION,
            *INDEXER,
            # What weighs the keys of the tokens of a pool: by their places in it, and by what they are.
            Tensor("self_attn.indexer.index_kpool_compress_ape", "m x", keep=True, suffix=""),
            Tensor("self_attn.indexer.index_kpool_compress_gate", "x D", suffix=""),
        ),
        SHARED_INDEX_ATTENTION: LATENT_ATTENTION,
    },
    after_mixer=(*hyper_connection("ffn"), *DEEPSEEK_V3.after_mixer),
    expert_layouts=(PER_EXPERT, FUSED),
    mlx=False,
    skipped=VISION_TOWER,
)
