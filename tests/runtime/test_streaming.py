"""Streams of ids -> text, and stop strings."""

import json
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders

from formats.errors import FormatError, RequestError, UnsupportedError
from formats.tokenizer import tokenizer_errors
from runtime.streaming import StopStrings, StreamDecoder
from runtime.text import Text
from tests.runtime.texts import DEMO_TEXT, FILES, SENTENCEPIECE, added, decode, demo_with, plain_ids, stream

IM_START, IM_END = 1, 2


@given(st.lists(st.integers(0, 4200), max_size=60))
def test_a_stream_of_any_ids_adds_up_to_their_decoding(ids: list[int]) -> None:
    assert "".join(stream(DEMO_TEXT, ids)) == decode(DEMO_TEXT, ids)


@given(st.lists(st.integers(0, 255) | st.sampled_from([0xF0, 0x9F, 0x98, 0x80, 0xE2, 0x82]), max_size=30))
def test_a_stream_of_any_bytes_adds_up_to_their_decoding(values: list[int]) -> None:
    ids = [BYTE_IDS[value] for value in values]
    assert "".join(stream(DEMO_TEXT, ids)) == decode(DEMO_TEXT, ids) == bytes(values).decode(errors="replace")


def byte_ids() -> list[int]:
    """The id of each byte's token in the demo's vocabulary."""
    shown = {decode(DEMO_TEXT, [i]): i for i in range(3, 4096)}
    del shown["\ufffd"]
    characters = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    names = {b: chr(b) for b in characters}
    names |= {b: chr(256 + i) for i, b in enumerate(b for b in range(256) if b not in characters)}
    ids = [DEMO_TEXT._tokenizer.token_to_id(names[b]) for b in range(256)]
    assert all(shown.get(chr(b)) == ids[b] for b in range(0x20, 0x7F))
    return [i for i in ids if i is not None]


BYTE_IDS = byte_ids()


@given(st.text(max_size=30))
def test_a_stream_of_text_never_shows_half_a_character(content: str) -> None:
    ids = plain_ids(content)
    pieces = stream(DEMO_TEXT, ids)
    assert pieces[-1] == ""  # whole text leaves nothing to say at the end
    shown = "".join(pieces)
    assert shown == decode(DEMO_TEXT, ids)
    assert shown.count("\ufffd") == content.count("\ufffd")


def test_a_character_appears_with_its_last_byte() -> None:
    assert stream(DEMO_TEXT, [BYTE_IDS[b] for b in "é!".encode()]) == ["", "é", "!", ""]


def test_a_cut_character_at_the_end_is_one_replacement_character() -> None:
    assert stream(DEMO_TEXT, [BYTE_IDS[b] for b in "日".encode()[:2]]) == ["", "", "\ufffd"]


def test_control_tokens_and_unknown_ids_show_nothing() -> None:
    assert stream(DEMO_TEXT, [IM_START, 10**6, *plain_ids("a"), IM_END]) == ["", "", "a", "", ""]


@given(st.lists(st.integers(0, 4099), max_size=20))
def test_added_tokens_that_are_not_special_are_shown(ids: list[int]) -> None:
    assert "".join(stream(ODD_TOKENS, ids)) == decode(ODD_TOKENS, ids)


ODD_TOKENS = demo_with(
    tokens=(
        added(4096, "<think>", special=False),
        added(4097, "é x", special=False),  # the space is no character of the byte alphabet, so this is UTF-8
        added(4098, "né", special=False),  # each character is one of it, so this is read as bytes
    )
)


@given(st.lists(st.integers(0, SENTENCEPIECE._tokenizer.get_vocab_size()), max_size=30))
@example([259, 259, 260])
def test_a_stream_of_any_sentencepiece_ids_adds_up_to_their_decoding(ids: list[int]) -> None:
    assert "".join(stream(SENTENCEPIECE, ids)) == decode(SENTENCEPIECE, ids)


class CountingTokenizer:
    """A tokenizer that notes how many ids each decode is given."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.lengths: list[int] = []

    def id_to_token(self, token_id: int) -> Any:
        return self.tokenizer.id_to_token(token_id)

    def decode(self, ids: list[int], skip_special_tokens: bool) -> Any:
        self.lengths.append(len(ids))
        return self.tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)


def test_a_long_stream_decodes_only_a_short_window() -> None:
    counting: Any = CountingTokenizer(SENTENCEPIECE._tokenizer)
    decoder = StreamDecoder(counting, SENTENCEPIECE.special_ids, SENTENCEPIECE._decoder_kinds)
    for i in range(500):
        decoder.push(259 + i % 10)
    assert max(counting.lengths) <= 3


@pytest.mark.parametrize(
    "decoder", [None, decoders.WordPiece(), decoders.Sequence([decoders.Fuse(), decoders.Strip(" ", 0, 1)])]
)
def test_a_decoder_that_cannot_stream_is_refused(decoder: Any) -> None:
    tokenizer = json.loads(FILES["tokenizer.json"])
    tokenizer["decoder"] = decoder and json.loads(decoder.__getstate__())
    with pytest.raises(UnsupportedError, match=r"^tokenizer\.json: decoder "):
        Text.from_files(FILES | {"tokenizer.json": json.dumps(tokenizer).encode()})


def test_a_panic_of_the_tokenizers_library_is_one_line() -> None:
    def panic() -> None:
        # Strip of tokenizers 0.23 counts from the end of an empty text.
        with tokenizer_errors():
            decoders.Sequence([decoders.Fuse(), decoders.Strip(" ", 0, 1)]).decode([""])

    with pytest.raises(FormatError, match=r"^tokenizer\.json: is no working tokenizer \(index out of bounds"):
        panic()


# Stop strings


def stopped(stops: list[str], pieces: list[str]) -> tuple[str, bool]:
    matcher = StopStrings(stops)
    shown = ""
    for piece in pieces:
        text, stop = matcher.push(piece)
        shown += text
        if stop:
            assert matcher.finish() == ""
            return shown, True
    return shown + matcher.finish(), False


LETTERS = st.text("ab", max_size=12)


@given(st.lists(st.text("ab", min_size=1, max_size=4), max_size=3), st.lists(LETTERS, max_size=6))
def test_text_ends_before_the_first_stop_string_however_it_is_cut(stops: list[str], pieces: list[str]) -> None:
    whole = "".join(pieces)
    ends = [end for end in range(len(whole) + 1) if any(whole[:end].endswith(stop) for stop in stops)]
    if ends:
        longest = max(len(stop) for stop in stops if whole[: ends[0]].endswith(stop))
        expected = whole[: ends[0] - longest], True
    else:
        expected = whole, False
    assert stopped(stops, pieces) == expected
    assert stopped(stops, list(whole)) == expected


def test_what_could_begin_a_stop_string_is_held_back() -> None:
    matcher = StopStrings(["</s>", "###"])
    assert matcher.push("one #") == ("one ", False)
    assert matcher.push("# two <") == ("## two ", False)
    assert matcher.push("/s> three") == ("", True)


def test_without_stop_strings_text_passes_at_once() -> None:
    assert StopStrings([]).push("a") == ("a", False)


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(RequestError, match="stop: holds an empty string"):
        StopStrings(["a", ""])
