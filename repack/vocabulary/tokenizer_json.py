"""tokenizer.json, the format of the tokenizers library, from its parts."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, AnyStr

BYTE_LEVEL: dict[str, Any] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}


def added_token(token_id: int, content: str, special: bool) -> dict[str, Any]:
    """A token that is found in text before anything else."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"id": token_id, "content": content, "special": special, **flags}


def splits(patterns: Sequence[str]) -> dict[str, Any]:
    """A pre-tokenizer that cuts text by one regular expression after another, then spells bytes."""
    steps = [
        {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        for pattern in patterns
    ]
    return {"type": "Sequence", "pretokenizers": [*steps, BYTE_LEVEL]}


def byte_level_bpe(
    vocabulary: Mapping[str, int],
    merges: Sequence[tuple[str, str]],
    added_tokens: Sequence[Mapping[str, Any]],
    patterns: Sequence[str],
    *,
    normalizer: Mapping[str, Any] | None = None,
    post_processor: Mapping[str, Any] | None = None,
    ignore_merges: bool = False,
) -> bytes:
    """A byte-level BPE. With ignore_merges a piece that is a token is taken whole, whatever the merges say."""
    return tokenizer_json(
        model=bpe_model(vocabulary, merges, ignore_merges=ignore_merges),
        added_tokens=added_tokens,
        normalizer=normalizer,
        pre_tokenizer=splits(patterns),
        post_processor=post_processor,
        decoder=BYTE_LEVEL,
    )


def bpe_model(
    vocabulary: Mapping[str, int],
    merges: Sequence[tuple[str, str]],
    *,
    unk_token: str | None = None,
    fuse_unk: bool = False,
    byte_fallback: bool = False,
    ignore_merges: bool = False,
) -> dict[str, Any]:
    """The model of a tokenizer: tokens by id, and pairs in the order in which they are joined."""
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": unk_token,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": fuse_unk,
        "byte_fallback": byte_fallback,
        "ignore_merges": ignore_merges,
        "vocab": dict(vocabulary),
        "merges": [list(pair) for pair in merges],
    }


def tokenizer_json(
    *,
    model: Mapping[str, Any],
    added_tokens: Sequence[Mapping[str, Any]],
    normalizer: Mapping[str, Any] | None,
    pre_tokenizer: Mapping[str, Any] | None,
    post_processor: Mapping[str, Any] | None,
    decoder: Mapping[str, Any],
) -> bytes:
    """The file; the same parts give the same bytes."""
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": list(added_tokens),
        "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": post_processor,
        "decoder": decoder,
        "model": model,
    }
    return json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode()


def last_pairs(ranks: Mapping[AnyStr, int]) -> Iterator[tuple[AnyStr, AnyStr]]:
    """The pair that makes each token, in the order of ranks (that of the mapping); a token that no pair makes has none.

    For an encoder that joins, again and again, the neighbours whose joint token has the lowest rank. Whatever stands
    around a token that it reaches, it joined the same pairs within it, as nothing inside was joined across its ends;
    so one last pair per token says all.
    """
    for token, rank in ranks.items():
        parts = [token[i : i + 1] for i in range(len(token))]
        while len(parts) > 2:
            joined = [ranks.get(parts[i] + parts[i + 1], rank) for i in range(len(parts) - 1)]
            lowest = min(joined)
            if lowest >= rank:
                break
            i = joined.index(lowest)
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        if len(parts) == 2:
            yield parts[0], parts[1]
