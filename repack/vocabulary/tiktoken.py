"""tiktoken.model of Kimi -> tokenizer.json (source: tokenization_kimi.py of the checkpoints, and tiktoken's own BPE).

A line of the file is `base64-of-token rank`. tiktoken takes a piece whole if it is a token; else it joins, again and
again, the neighbours whose joint token has the lowest rank: the merges are the last pairs, by rank.
"""

import base64
import binascii
from collections.abc import Iterator
from typing import Any

from formats.byte_level import byte_level
from formats.errors import FormatError, UnsupportedError
from formats.fields import Fields, parse_json, shown
from repack.vocabulary.tokenizer_json import added_token, byte_level_bpe, last_pairs

CONFIG = "tokenizer_config.json"
TOKENIZER_CLASS = "TikTokenTokenizer"  # of Kimi: the only one whose pattern and special tokens are known here
NUM_SPECIAL_TOKENS = 256
MAX_TOKEN_BYTES = 1024
_CASED = r"\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]"
_CONTRACTION = "(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
KIMI_PATTERN = "|".join(
    (
        r"[\p{Han}]+",
        rf"[^\r\n\p{{L}}\p{{N}}]?[\p{{Lu}}\p{{Lt}}{_CASED}]*[\p{{Ll}}{_CASED}]+{_CONTRACTION}",
        rf"[^\r\n\p{{L}}\p{{N}}]?[\p{{Lu}}\p{{Lt}}{_CASED}]+[\p{{Ll}}{_CASED}]*{_CONTRACTION}",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)


def tiktoken_tokenizer(raw: bytes, config: bytes | None) -> bytes:
    """tokenizer.json of the ranks `raw` with the special tokens of tokenizer_config.json.

    Raises FormatError for a malformed file, UnsupportedError for another tokenizer class than Kimi's.
    """
    fields = Fields(parse_json(config, CONFIG) if config is not None else {}, CONFIG)
    kind = fields.string("tokenizer_class", "nothing")
    if kind != TOKENIZER_CLASS:
        raise UnsupportedError(
            f"{fields.name('tokenizer_class')} is {shown(kind)}, expected {TOKENIZER_CLASS} beside a tiktoken.model"
        )
    ranks = read_ranks(raw)
    vocabulary = {byte_level(token): rank for token, rank in ranks.items()}
    merges = [(byte_level(left), byte_level(right)) for left, right in last_pairs(ranks)]
    special = [added_token(i, content, True) for i, content in _special_tokens(fields, len(ranks))]
    return byte_level_bpe(
        vocabulary,
        merges,
        special,
        [KIMI_PATTERN],
        ignore_merges=True,
    )


def read_ranks(raw: bytes) -> dict[bytes, int]:
    """Tokens by rank, from 0 without a gap. Raises FormatError naming the line."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(raw.splitlines(), start=1):
        word, _, rank = line.partition(b" ")
        try:
            token = base64.b64decode(word, validate=True)
        except binascii.Error:
            token = b""
        if rank != b"%d" % len(ranks) or not 0 < len(token) <= MAX_TOKEN_BYTES or token in ranks:
            found, expected = shown(line.decode(errors="replace")), f"a new token in base64 and its rank {len(ranks)}"
            raise FormatError(f"tiktoken.model: line {number} is {found}, expected {expected}")
        ranks[token] = len(ranks)
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise FormatError(f"tiktoken.model: has no token for byte {missing[0]}, expected one for each of the 256")
    return ranks


def _special_tokens(config: Fields, first: int) -> Iterator[tuple[int, str]]:
    """(id, content) of the 256 ids after the ranks; ids that tokenizer_config.json does not name are reserved."""
    named: dict[str, Any] = config.mapping("added_tokens_decoder")
    for token_id in range(first, first + NUM_SPECIAL_TOKENS):
        entry = named.get(str(token_id))
        content = entry.get("content") if isinstance(entry, dict) else None
        if entry is not None and (not isinstance(content, str) or not content):
            raise FormatError(
                f"{config.name('added_tokens_decoder')}.{token_id} is {shown(entry)}, expected its content"
            )
        yield token_id, content or f"<|reserved_token_{token_id}|>"
