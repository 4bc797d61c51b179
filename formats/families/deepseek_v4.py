"""DeepSeek-V4: compressed attention, several residual streams, experts by table or by score."""

from collections.abc import Mapping

from formats.config import (
    COMPRESSED_SPARSE_ATTENTION,
    HASH_MOE,
    HEAVILY_COMPRESSED_ATTENTION,
    MOE,
    SLIDING_ATTENTION,
    CompressedConfig,
    DeepseekV4Config,
)
from formats.families.shared import expert_dims, hyper_connection, stream_dims
from formats.family import FINAL_NORM, Experts, Family, Tensor


def attention_dims(config: CompressedConfig) -> Mapping[str, int]:
    """Sizes of V4 and V4.1."""
    groups = config.o_groups
    return {
        **expert_dims(config),
        **stream_dims(config),
        "H": config.num_attention_heads,
        "h": config.head_dim,
        "q": config.q_lora_rank,
        "Q": config.queries_width,
        "O": config.queries_width // groups,
        "G": groups * config.o_lora_rank,
        "i": config.index_n_heads,
        "x": config.index_head_dim,
        "X": config.index_n_heads * config.index_head_dim,
    }


def _dims(config: DeepseekV4Config) -> Mapping[str, int]:
    return {
        **attention_dims(config),
        "K": config.top_k,
        "2h": 2 * config.head_dim,
        "2x": 2 * config.index_head_dim,
        "m": config.sparse_compress_rate,
        "M": config.heavy_compress_rate,
    }


def _compressor(name: str, source: str, rate: str, projected: str, width: str) -> tuple[Tensor, ...]:
    return (
        Tensor(f"{name}.kv_proj", f"{projected} D", source=f"{source}.wkv"),
        Tensor(f"{name}.gate_proj", f"{projected} D", source=f"{source}.wgate"),
        Tensor(
            f"{name}.position_bias", f"{rate} {projected}", keep=True, suffix="", dtype="F32", source=f"{source}.ape"
        ),
        Tensor(f"{name}.kv_norm", width, source=f"{source}.norm"),
    )


ATTENTION = (
    Tensor("self_attn.q_a_proj", "q D", source="attn.wq_a"),
    Tensor("self_attn.q_a_norm", "q", source="attn.q_norm"),
    Tensor("self_attn.q_b_proj", "Q q", source="attn.wq_b"),
    Tensor("self_attn.kv_proj", "h D", source="attn.wkv"),
    Tensor("self_attn.kv_norm", "h", source="attn.kv_norm"),
    Tensor("self_attn.sinks", "H", suffix="", dtype="F32", source="attn.attn_sink"),
    Tensor("self_attn.o_a_proj", "G O", source="attn.wo_a"),
    Tensor("self_attn.o_b_proj", "D G", source="attn.wo_b"),
)
INDEX_QUERIES = (
    Tensor("self_attn.indexer.q_b_proj", "X q", source="attn.indexer.wq_b"),
    Tensor("self_attn.indexer.weights_proj", "i D", keep=True, source="attn.indexer.weights_proj"),
)
_INDEXER = (
    *_compressor("self_attn.indexer.compressor", "attn.indexer.compressor", "m", "2x", "x"),
    *INDEX_QUERIES,
)

DEEPSEEK_V4 = Family(
    prefixes=("",),
    mlx=False,
    dims=_dims,
    before_mixer=(*hyper_connection("attn"), Tensor("input_layernorm", "D", source="attn_norm")),
    mixers={
        SLIDING_ATTENTION: ATTENTION,
        COMPRESSED_SPARSE_ATTENTION: ATTENTION
        + _compressor("self_attn.compressor", "attn.compressor", "m", "2h", "h")
        + _INDEXER,
        HEAVILY_COMPRESSED_ATTENTION: ATTENTION + _compressor("self_attn.compressor", "attn.compressor", "M", "h", "h"),
    },
    after_mixer=(*hyper_connection("ffn"), Tensor("post_attention_layernorm", "D", source="ffn_norm")),
    moe=(
        Tensor("mlp.gate", "E D", keep=True, source="ffn.gate"),
        Tensor("mlp.shared_experts.gate_proj", "I D", source="ffn.shared_experts.w1"),
        Tensor("mlp.shared_experts.up_proj", "I D", source="ffn.shared_experts.w3"),
        Tensor("mlp.shared_experts.down_proj", "D I", source="ffn.shared_experts.w2"),
    ),
    routers={
        HASH_MOE: (Tensor("mlp.gate.tid2eid", "V K", keep=True, suffix="", dtype="I64", source="ffn.gate.tid2eid"),),
        MOE: (Tensor("mlp.gate.e_score_correction_bias", "E", suffix="", dtype="F32", source="ffn.gate.bias"),),
    },
    expert_layouts=(
        (
            Experts("ffn.experts.{expert}.w1", "I D", ("gate",)),
            Experts("ffn.experts.{expert}.w3", "I D", ("up",)),
            Experts("ffn.experts.{expert}.w2", "D I", ("down",)),
        ),
        (  # stacked, in GGUF files
            Experts("ffn.experts.w1", "I D", ("gate",)),
            Experts("ffn.experts.w3", "I D", ("up",)),
            Experts("ffn.experts.w2", "D I", ("down",)),
        ),
    ),
    never_quantized=("embed", "head", "*.compressor.*"),
    last=(
        Tensor("hc_head.fn", "N ND", keep=True, suffix="", dtype="F32", source="hc_head_fn"),
        Tensor("hc_head.base", "N", suffix="", dtype="F32", source="hc_head_base"),
        Tensor("hc_head.scale", "1", suffix="", dtype="F32", source="hc_head_scale"),
        FINAL_NORM,
    ),
    embedding=Tensor("embed_tokens", "V D", source="embed"),
    head=Tensor("lm_head", "V D", source="head"),
    skipped={"mtp.": "multi-token prediction"},
)
