"""Generated ids -> text that streams out: decoding token by token, and stop strings."""

import codecs
import re
from collections.abc import Sequence

from tokenizers import Tokenizer

from formats.byte_level import BYTE_OF
from formats.errors import RequestError
from formats.tokenizer import tokenizer_errors


class StreamDecoder:
    """Ids in, text out as soon as it is certain; all of it equals decode(all ids, skip_special_tokens=True).

    Work per token does not grow with what came before. A character split over tokens is held back until it is
    whole; bytes that are no UTF-8 become U+FFFD.
    """

    def __init__(self, tokenizer: Tokenizer, special_ids: frozenset[int], kinds: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self._special_ids = special_ids
        self._byte_level = list(kinds) == ["ByteLevel"]
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        # Otherwise: `before` is enough history to know that text has begun, `held` are bytes of characters.
        self._byte_fallback = "ByteFallback" in kinds
        self._before: list[int] = []
        self._held: list[int] = []

    def push(self, token_id: int) -> str:
        """The text that this token completes, often empty."""
        token = self._tokenizer.id_to_token(token_id)
        if token is None or token_id in self._special_ids:
            return ""
        if self._byte_level:
            return self._utf8.decode(_token_bytes(token))
        if self._byte_fallback and re.fullmatch("<0x[0-9A-Fa-f]{2}>", token):
            # One bad byte spoils its whole run (ByteFallback of tokenizers): certain when the run has ended.
            self._held.append(token_id)
            return ""
        return self._release(token_id)

    def finish(self) -> str:
        """The text still held back; a character that never became whole is U+FFFD."""
        return self._utf8.decode(b"", final=True) if self._byte_level else self._release()

    def _release(self, *token_ids: int) -> str:
        new = [*self._held, *token_ids]
        self._held = []
        known = self._decode(self._before)
        text = self._decode([*self._before, *new])[len(known) :]
        # Tokens that show nothing may be white space dropped at the beginning: keep them till text shows.
        self._before = new if text else [*self._before, *new]
        return text

    def _decode(self, ids: list[int]) -> str:
        with tokenizer_errors():
            return str(self._tokenizer.decode(ids, skip_special_tokens=True))


def _token_bytes(token: str) -> bytes:
    # As ByteLevel of tokenizers: a token with any other character is an added token and stands for itself.
    if all(character in BYTE_OF for character in token):
        return bytes(BYTE_OF[character] for character in token)
    return token.encode()


class StopStrings:
    """Ends a stream of text at the first stop string to become complete, however the text is cut."""

    def __init__(self, stops: Sequence[str]) -> None:
        """Raises RequestError for an empty stop string, which would stop everything."""
        if not all(stops):
            raise RequestError("stop: holds an empty string, expected text")
        self._stops = tuple(stops)
        self._held = ""

    def push(self, piece: str) -> tuple[str, bool]:
        """(text to show, whether a stop string was met); what could begin a stop string is held back."""
        text = self._held + piece
        found = [(start + len(stop), start) for stop in self._stops if (start := text.find(stop)) >= 0]
        if found:
            self._held = ""
            return text[: min(found)[1]], True
        held = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held], False

    def finish(self) -> str:
        """What was held back, once no more text comes."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop` without completing it."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
