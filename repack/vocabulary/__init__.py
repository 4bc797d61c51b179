"""Vocabularies: made a tokenizer.json where they come without, so that the runtime knows one format; checked."""

from collections.abc import Mapping

from repack.vocabulary.templates import with_templates
from repack.vocabulary.tiktoken import tiktoken_tokenizer

__all__ = ["has_tokenizer", "with_templates", "with_tokenizer"]

TOKENIZER, TIKTOKEN = "tokenizer.json", "tiktoken.model"


def with_tokenizer(files: Mapping[str, bytes]) -> dict[str, bytes]:
    """A checkpoint's small files, tiktoken.model replaced by a tokenizer.json that gives the same ids.

    Raises FormatError or UnsupportedError for a file that cannot be replaced exactly.
    """
    result = {name: raw for name, raw in files.items() if name != TIKTOKEN}
    if TIKTOKEN in files and TOKENIZER not in files:
        result[TOKENIZER] = tiktoken_tokenizer(files[TIKTOKEN], files.get("tokenizer_config.json"))
    return result


def has_tokenizer(files: Mapping[str, bytes]) -> bool:
    """Whether the small files of a container let text in and out, checked as the runtime will read them.

    Raises FormatError or UnsupportedError for a tokenizer.json that the runtime would refuse.
    """
    if TOKENIZER not in files:
        return False
    from formats.tokenizer import read_tokenizer  # slow to import

    read_tokenizer(files[TOKENIZER])
    return True
