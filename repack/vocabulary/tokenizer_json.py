"""tokenizer.json, the format of the tokenizers library, from its parts."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

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
        model={
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": ignore_merges,
            "vocab": dict(vocabulary),
            "merges": [list(pair) for pair in merges],
        },
        added_tokens=added_tokens,
        normalizer=normalizer,
        pre_tokenizer=splits(patterns),
        post_processor=post_processor,
        decoder=BYTE_LEVEL,
    )


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
