"""Qwen3.8-Flash-Next: the layers of Qwen3.5 MoE between streams that are mixed, an indexer, an embedding of n-grams."""

from collections.abc import Iterator, Mapping

from formats.config import FULL_ATTENTION, INDEXED_ATTENTION, LINEAR_ATTENTION, Qwen4ExpConfig
from formats.families.qwen3_5 import QWEN3_5_MOE
from formats.family import NGRAM_SHARD, Family, Tensor


def _qwen4_dims(config: Qwen4ExpConfig) -> Mapping[str, int]:
    ngrams = config.ngrams
    heads, x = config.indexer_n_heads, config.indexer_head_dim
    return {
        **QWEN3_5_MOE.dims(config),
        "s": config.hc_count,
        "sD": config.hc_width,
        "R": config.hc_lowrank,
        "x": x,
        "X": heads * x,
        "X+x": (heads + 1) * x,
        "n": ngrams.embed_dim if ngrams else 0,
        "nk": ngrams.conv_kernel_size if ngrams else 0,
        "ngrams": ngrams.rows // ngrams.shards if ngrams else 0,
        "ngram": ngrams.columns if ngrams else 0,
    }


def _mixture(name: str) -> tuple[Tensor, ...]:
    """What makes one stream of several."""
    return (
        Tensor(f"{name}.hc_norm", "sD"),
        Tensor(f"{name}.input_mix_weight_down", "R sD"),
        Tensor(f"{name}.input_mix_weight_up", "sD R"),
    )


def _hyper_connection(name: str) -> tuple[Tensor, ...]:
    return (*_mixture(name), Tensor(f"{name}.block_inject_weight", "s sD", keep=True))


def _shards(config: Qwen4ExpConfig) -> Iterator[tuple[int, Tensor]]:
    """Parts of equal length that the embedding of n-grams is published in."""
    for layer in config.ngram_layers:
        for shard in range(config.ngrams.shards if config.ngrams else 0):
            yield layer, Tensor(NGRAM_SHARD.format(shard), "ngrams ngram")


QWEN4_EXP = Family(
    prefixes=("model.language_model.", "model."),
    dims=_qwen4_dims,
    norms_around_zero=True,
    mlx=False,
    ngrams=(
        Tensor("ple.key_proj", "sD n"),
        Tensor("ple.value_proj", "D n"),
        Tensor("ple.norm_key", "sD"),
        Tensor("ple.norm_query", "sD"),
        Tensor("ple.norm_conv", "sD"),
        Tensor("ple.conv1d", "sD 1 nk", keep=True),
    ),
    ngram_shards=_shards,
    before_mixer=_hyper_connection("attn_hyper_connection"),
    mixers={
        LINEAR_ATTENTION: QWEN3_5_MOE.mixers[LINEAR_ATTENTION],
        INDEXED_ATTENTION: (
            *QWEN3_5_MOE.mixers[FULL_ATTENTION],
            Tensor("self_attn.indexer.index_qk_proj", "X+x D", when=lambda config: not config.indexer_qk_split),
            Tensor("self_attn.indexer.index_q_proj", "X D", when=lambda config: config.indexer_qk_split),
            Tensor("self_attn.indexer.index_k_proj", "x D", when=lambda config: config.indexer_qk_split),
            Tensor("self_attn.indexer.q_layernorm", "x"),
            Tensor("self_attn.indexer.k_layernorm", "x"),
        ),
    },
    after_mixer=_hyper_connection("mlp_hyper_connection"),
    moe=QWEN3_5_MOE.moe,
    expert_layouts=QWEN3_5_MOE.expert_layouts,
    last=_mixture("hyper_connection_mixer"),
    skipped={"model.visual.": "the vision tower", "mtp.": "multi-token prediction"},
)
