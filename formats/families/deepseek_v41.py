"""DeepSeek-V4.1: compressed attention whose entries layers share, several residual streams, embeddings of n-grams."""

from collections.abc import Iterator, Mapping

from formats.config import COMPRESSED_SPARSE_ATTENTION, SLIDING_ATTENTION, DeepseekV41Config
from formats.families.deepseek_v4 import ATTENTION, DEEPSEEK_V4, INDEX_QUERIES, attention_dims
from formats.families.shared import SWITCH_MLP, hyper_connection
from formats.family import FINAL_NORM, Family, Tensor


def _dims(config: DeepseekV41Config) -> Mapping[str, int]:
    engrams, streams = config.engrams, config.hc_mult
    tables = {} if engrams is None else {f"ngrams{i}": rows for i, rows in enumerate(engrams.table_rows)}
    return {
        **attention_dims(config),
        **tables,
        "ngram": engrams.head_dim if engrams else 0,
        "n": engrams.rows_per_token * engrams.head_dim if engrams else 0,
        "(N+1)D": (streams + 1) * config.hidden_size,
    }


def _tables(config: DeepseekV41Config) -> Iterator[tuple[int, Tensor]]:
    """One for each of their layers."""
    for i, layer in enumerate(config.ngram_layers):
        yield layer, Tensor("engram.embed", f"ngrams{i} ngram")


def _makes_entries(config: DeepseekV41Config, layer: int) -> bool:
    return config.is_kv_source(layer)


def _pools(config: DeepseekV41Config, layer: int) -> bool:
    return config.is_kv_source(layer) and config.compress_ratios[layer] > 1


def _chooses(config: DeepseekV41Config, layer: int) -> bool:
    return config.is_index_source(layer)


_ENTRIES = (
    Tensor("self_attn.compressor.kv_proj", "h D", source="attn.compressor.wkv", where=_makes_entries),
    Tensor("self_attn.compressor.gate_proj", "h D", source="attn.compressor.wgate", where=_pools),
    Tensor("self_attn.compressor.kv_norm", "h", source="attn.compressor.norm", where=_makes_entries),
    *(tensor._replace(where=_chooses) for tensor in INDEX_QUERIES),
    Tensor("self_attn.indexer.k_proj", "x h", source="attn.indexer.wk", where=_makes_entries),
    Tensor("self_attn.indexer.k_norm", "x", source="attn.indexer.k_norm", where=_makes_entries),
)


def _and_by_mlx(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """mlx-lm has the names of containers."""
    return tuple(tensor._replace(also=tensor.name) for tensor in tensors)


_PUBLISHED, _ = DEEPSEEK_V4.expert_layouts
_SWITCH_MLP = tuple(rule._replace(name=rule.name.replace("switch_mlp", "experts.switch_mlp")) for rule in SWITCH_MLP)
_ATTENTION = _and_by_mlx(ATTENTION)
_EMBEDDING, _HEAD = _and_by_mlx((DEEPSEEK_V4.embedding, DEEPSEEK_V4.head))

DEEPSEEK_V41 = Family(
    prefixes=("", "model."),  # as published, by MLX
    dims=_dims,
    ngrams=(
        Tensor("engram.wkv", "(N+1)D n"),
        Tensor("engram.q_weight", "N D", keep=True, suffix=""),
        Tensor("engram.k_weight", "N D", keep=True, suffix=""),
    ),
    ngram_shards=_tables,
    before_mixer=_and_by_mlx((*hyper_connection("attn"), Tensor("input_layernorm", "D", source="attn_norm"))),
    mixers={SLIDING_ATTENTION: _ATTENTION, COMPRESSED_SPARSE_ATTENTION: _ATTENTION + _and_by_mlx(_ENTRIES)},
    after_mixer=_and_by_mlx(DEEPSEEK_V4.after_mixer),
    moe=_and_by_mlx(
        (
            *DEEPSEEK_V4.moe,
            Tensor("mlp.gate.e_score_correction_bias", "E", suffix="", dtype="F32", source="ffn.gate.bias"),
        )
    ),
    expert_layouts=(_PUBLISHED, _SWITCH_MLP),
    never_quantized=("embed", "head", "*.compressor.*", "*.indexer.wk", "*.engram.?_weight"),
    last=(FINAL_NORM,),
    embedding=_EMBEDDING,
    head=_HEAD,
    skipped={
        "mtp.": "multi-token prediction",
        "vision.": "the vision tower",
        "aligner.": "the vision tower",
        "image_": "the vision tower",
    },
    skipped_ends={".ffn.gate.bias_vl": "biases of experts for images"},
)
