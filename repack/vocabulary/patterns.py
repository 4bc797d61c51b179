"""Regular expressions that cut text before byte-level BPE, by the name that GGUF files give them.

Source: tokenizer.json of the models, and llama.cpp's llama-vocab.cpp (tokenizer.ggml.pre), which spells out `(?i:...)`.
"""

from collections.abc import Mapping
from typing import NamedTuple

from repack.vocabulary.tiktoken import KIMI_PATTERN

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}{_TAIL}"
QWEN2 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{_TAIL}"
QWEN35 = (
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT4O = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTIONS}?|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTIONS}?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
DEEPSEEK3 = (
    r"\p{N}{1,3}",
    "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
    (
        r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
        r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
)


class PreTokenizer(NamedTuple):
    """How a model cuts text."""

    patterns: tuple[str, ...]  # one after another
    nfc: bool = False  # composes characters first
    ignore_merges: bool = False  # a piece that is a token is taken whole
    add_bos: bool = False  # unless the file says otherwise


PRE_TOKENIZERS: Mapping[str, PreTokenizer] = {
    "deepseek-v3": PreTokenizer(DEEPSEEK3),
    "gpt-2": PreTokenizer((GPT2,)),
    "olmo": PreTokenizer((GPT2,)),
    "dbrx": PreTokenizer((LLAMA3,)),
    "glm4": PreTokenizer((LLAMA3,)),
    "chatglm-bpe": PreTokenizer((LLAMA3,)),
    "gpt-4o": PreTokenizer((GPT4O,)),
    "minimax-m2": PreTokenizer((GPT4O,)),
    "llama4": PreTokenizer((GPT4O,)),
    "kimi-k2": PreTokenizer((KIMI_PATTERN,), ignore_merges=True),
    "llama-bpe": PreTokenizer((LLAMA3,), ignore_merges=True, add_bos=True),
    "qwen2": PreTokenizer((QWEN2,), nfc=True),
    "qwen35": PreTokenizer((QWEN35,), nfc=True),
    "refact": PreTokenizer((r"\p{N}", GPT2)),
    "starcoder": PreTokenizer((r"\p{N}", GPT2)),
}
