"""GGUF files of Qwen3.8-Flash-Next (source: llama.cpp's conversion/qwen4exp.py and src/models/qwen4exp.cpp)."""

from itertools import accumulate

from formats.config.qwen4_exp import MAX_HEADS, MAX_ROWS, MAX_SIZE, NGrams
from formats.encodings.sources.plain import MINUS_ONE
from formats.errors import FormatError, UnsupportedError
from formats.fields import shown
from repack.sources.gguf_keys import Config, Keys, linear_attention_config

NGRAM_TABLE = "per_layer_token_embd.weight"
SEED = 1234  # of the published model: no key says it, but what follows from it
_MIXTURE = (("norm", "hc_norm"), ("down", "input_mix_weight_down"), ("up", "input_mix_weight_up"))

OUTSIDE_QWEN4 = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output.weight": "lm_head.weight",
    **{f"output_hc_{gguf}.weight": f"model.hyper_connection_mixer.{name}.weight" for gguf, name in _MIXTURE},
    NGRAM_TABLE: "model.layers.1.ple.ple_embedding.ngram_embedding.shard_0.weight",
}
QWEN4 = {
    **{
        f"hc_{gguf}_{part}.weight": f"{half}_hyper_connection.{name}.weight"
        for gguf, half in (("attn", "attn"), ("ffn", "mlp"))
        for part, name in (*_MIXTURE, ("inject", "block_inject_weight"))
    },
    "indexer.q_proj.weight": "self_attn.indexer.index_q_proj.weight",
    "indexer.k_proj.weight": "self_attn.indexer.index_k_proj.weight",
    "indexer.q_norm.weight": "self_attn.indexer.q_layernorm.weight",
    "indexer.k_norm.weight": "self_attn.indexer.k_layernorm.weight",
    "ple_key.weight": "ple.key_proj.weight",
    "ple_value.weight": "ple.value_proj.weight",
    "ple_conv1d.weight": "ple.conv1d.weight",
    **{f"ple_norm_{part}.weight": f"ple.norm_{part}.weight" for part in ("key", "query", "conv")},
}
ZERO_CENTRED_QWEN4 = {name: MINUS_ONE for name in (*QWEN4, *OUTSIDE_QWEN4) if "norm" in name}


def qwen4_config(keys: Keys) -> Config:
    """Qwen3.8-Flash-Next, whose gate of gated DeltaNet no key says: it is the published sigmoid."""
    config = linear_attention_config(keys, "qwen4_exp_text")
    ratios = set(keys.items("attention.compress_ratios", int, keys.layers, more=True)) - {0}
    if len(ratios) != 1:
        raise UnsupportedError(
            f"{keys.where}: {keys.architecture}.attention.compress_ratios has {shown(sorted(ratios))}, only one ratio "
            "beside 0 is implemented"
        )
    return (
        config
        | {
            "linear_value_head_order": "tiled",
            "indexer_qk_split": True,
            "output_gate_type": "sigmoid",
            "hc_count": keys["hyper_connection.count"],
            "hc_lowrank": keys["hyper_connection.low_rank"],
            "indexer_n_heads": keys["attention.indexer.head_count"],
            "indexer_head_dim": keys["attention.indexer.key_length"],
            "indexer_budget": keys["attention.indexer.top_k"],
            "indexer_compress_ratio": ratios.pop(),
        }
        | _ngrams(keys)
    )


def _ngrams(keys: Keys) -> Config:
    """The embedding of n-grams, whose table is one tensor; its rows and hashes must follow from the other numbers."""
    if keys.get("ple.layers") is None:
        return {"ple_layer_ids": []}
    if (layers := keys.get("ple.layers")) != [1]:
        raise UnsupportedError(
            f"{keys.where}: {keys.architecture}.ple.layers is {shown(layers)}, only [1] is implemented"
        )
    size, heads = keys.size("ple.ngram_size"), keys.size("ple.heads_per_ngram")
    count = (size - 1) * heads
    sizes = keys.items("ple.head_vocab_sizes", int, count)
    rows, columns = keys.shape(NGRAM_TABLE)
    bounded = 1 < size <= MAX_SIZE and 0 < heads <= MAX_HEADS and 0 < count * sizes[0] <= sum(sizes) <= rows <= MAX_ROWS
    if not bounded:  # before primes are looked for
        raise FormatError(
            f"{keys.where}: {keys.architecture}.ple.head_vocab_sizes is {shown(sizes)}, expected rows of "
            f"{NGRAM_TABLE}, which has {rows}"
        )
    ngrams = NGrams(
        layer_id=2,
        size=size,
        heads=heads,
        embed_dim=count * columns,
        conv_kernel_size=keys["ple.conv_kernel"],
        vocab_size_base=sizes[0],
        divisor=rows,
        shards=1,
        seed=SEED,
        eos_token_id=keys["ple.eos_token_id"],
    )
    expected = {
        "ple.head_vocab_sizes": list(ngrams.head_rows),
        "ple.head_offsets": [0, *accumulate(ngrams.head_rows)][:count],
        "ple.layer_multipliers": list(ngrams.multipliers(keys.shape("token_embd.weight")[0])),
    }
    for key, numbers in expected.items():
        if (found := keys.get(key)) != numbers:
            raise UnsupportedError(
                f"{keys.where}: {keys.architecture}.{key} is {shown(found)}, only {shown(numbers)} is implemented"
            )
    return {
        "ple_layer_ids": [ngrams.layer_id],
        "ngram_size": size,
        "heads_per_ngram": heads,
        "ple_embed_dim": ngrams.embed_dim,
        "ple_conv_kernel_size": ngrams.conv_kernel_size,
        "ngram_vocab_size_base": ngrams.vocab_size_base,
        "make_ngram_vocab_size_divisible_by": ngrams.divisor,
        "split_ngram_parts": ngrams.shards,
        "seed": SEED,
        "eos_token_id": ngrams.eos_token_id,
    }
