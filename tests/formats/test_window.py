"""Tokens that a layer with a window holds: enough for what it sees, never less for more, bounded for any context."""

import json
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from formats.budget import memory_terms
from formats.config import read_config
from formats.window import BLOCK, chunked_tokens, first_kept, forgets, held_tokens, in_lanes, room
from tests.containers import make_layout
from tests.formats.published import GPT_OSS_20B, LLAMA_4_SCOUT

windows, lengths = st.integers(1, 5000), st.integers(0, 200_000)


@given(window=windows, length=lengths)
def test_what_the_next_token_sees_is_kept_in_whole_blocks(window: int, length: int) -> None:
    first = first_kept(window, length)
    assert first % BLOCK == 0
    assert 0 <= first <= max(0, length - (window - 1))


@given(window=windows, length=lengths, tokens=st.integers(1, 5000))
def test_a_new_cache_has_room_for_what_is_kept_and_the_next_tokens(window: int, length: int, tokens: int) -> None:
    assert length - first_kept(window, length) + tokens <= room(window, tokens)


@given(window=windows, a=lengths, b=lengths, chunk=st.integers(1, 5000))
def test_a_longer_context_never_holds_fewer_tokens_and_some_day_no_more(
    window: int, a: int, b: int, chunk: int
) -> None:
    small, large = sorted((a, b))
    assert held_tokens(window, small, chunk) <= held_tokens(window, large, chunk)
    assert held_tokens(window, large, chunk) <= 2 * room(window, chunk)
    assert forgets(window, large, chunk) or held_tokens(window, large, chunk) == in_lanes(large)


def test_windows_of_gpt_oss_take_a_known_part_of_the_memory_of_a_long_context() -> None:
    model = read_config(json.dumps(GPT_OSS_20B).encode())
    layout = replace(make_layout(), model=model)
    terms = memory_terms(layout, tokenizer_json_bytes=0, ctx_size=131_072, chunk_size=512)
    per_token_and_layer = 2 * 8 * 64 * 4  # keys and values of 8 heads of 64 in float32
    assert terms.kv_bytes == per_token_and_layer * (12 * 131_072 + 12 * 2048)


@given(chunk=windows, a=lengths, b=lengths, step=st.integers(1, 5000))
def test_a_layer_in_chunks_holds_the_last_one_and_what_a_step_begins(chunk: int, a: int, b: int, step: int) -> None:
    small, large = sorted((a, b))
    assert chunked_tokens(chunk, small, step) <= chunked_tokens(chunk, large, step) <= 2 * in_lanes(chunk)
    assert chunked_tokens(chunk, min(small, chunk), step) == in_lanes(min(small, chunk))


def test_chunks_of_llama_4_take_a_known_part_of_the_memory_of_a_long_context() -> None:
    layout = replace(make_layout(), model=read_config(json.dumps(LLAMA_4_SCOUT).encode()))
    terms = memory_terms(layout, tokenizer_json_bytes=0, ctx_size=131_072, chunk_size=512)
    per_token_and_layer = 2 * 8 * 128 * 4  # keys and values of 8 heads of 128 in float32
    assert terms.kv_bytes == per_token_and_layer * (12 * 131_072 + 36 * (8192 + 512))
