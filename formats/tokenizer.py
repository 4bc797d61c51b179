"""tokenizer.json as the tokenizers library reads it, checked: it comes from outside."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tokenizers import Tokenizer

from formats.errors import FormatError, UnsupportedError
from formats.fields import shown

# Decoders that treat each token by itself, apart from white space at the very beginning.
STREAMABLE = {"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"}


def read_tokenizer(raw: bytes) -> Tokenizer:
    """The tokenizer in the bytes of a tokenizer.json, whose text can stream.

    Raises FormatError for what is no tokenizer, UnsupportedError for one whose decoder cannot stream.
    """
    with tokenizer_errors():
        tokenizer = Tokenizer.from_str(raw.decode())
    decoder_kinds(tokenizer)
    return tokenizer


@contextmanager
def tokenizer_errors() -> Iterator[None]:
    """Errors and Rust panics of the tokenizers library come from what tokenizer.json holds."""
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise FormatError(f"tokenizer.json: is no working tokenizer ({shown(str(error))})") from None


def decoder_kinds(tokenizer: Tokenizer) -> list[str]:
    """The types of the decoder's steps. Raises UnsupportedError for one that needs text still to come."""
    decoder = tokenizer.decoder
    state: dict[str, Any] = json.loads(decoder.__getstate__()) if decoder is not None else {"type": None}
    steps: list[dict[str, Any]] = state["decoders"] if state["type"] == "Sequence" else [state]
    kinds = [step["type"] for step in steps]
    if kinds != ["ByteLevel"] and not STREAMABLE.issuperset(kinds):
        raise UnsupportedError(f"tokenizer.json: decoder is {kinds}, expected ByteLevel or of {sorted(STREAMABLE)}")
    if any(step.get("stop") for step in steps):
        raise UnsupportedError("tokenizer.json: decoder Strip takes from the end, which a stream cannot know")
    return kinds
