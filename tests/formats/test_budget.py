"""The arithmetic of memory: more of anything never needs less, and the terms are the whole."""

from dataclasses import asdict, replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from formats.budget import (
    MIN_SLOTS,
    MemoryTerms,
    bits_per_weight,
    human,
    largest_record_bytes,
    memory_terms,
    three_digits,
    token_bytes,
)
from formats.config import ModelConfig
from formats.encodings import Affine, Encoding, Plain
from formats.errors import RequestError
from formats.layout import LayerLayout, Layout, lay_out_embedding, layer_file, place_resident
from formats.record import PartSpec, lay_out_record
from tests.containers import HYBRID

COUNTS = st.integers(1, 1 << 20)


def layout_of(model: ModelConfig, encoding: Encoding) -> Layout:
    """A layout of the model with one resident matrix."""
    D, F = model.hidden_size, model.moe_intermediate_size
    shapes = {"gate": (F, D), "up": (F, D), "down": (D, F)}
    record = lay_out_record(PartSpec(name, *shape, encoding) for name, shape in shapes.items())
    layers = tuple(LayerLayout(layer_file(i), model.num_experts, record) for i in range(model.num_hidden_layers))
    head = place_resident("lm_head", (model.vocab_size, D), encoding, 0)
    return Layout(model, layers, (head,), lay_out_embedding(model.vocab_size, D, encoding))


LAYOUT = layout_of(HYBRID, Affine(4, 64, "bf16"))


def terms(layout: Layout = LAYOUT, ctx: int = 512, chunk: int = 64, threads: int = 2) -> MemoryTerms:
    return memory_terms(layout, tokenizer_json_bytes=1000, ctx_size=ctx, chunk_size=chunk, threads=threads)


def grows(less: MemoryTerms, more: MemoryTerms) -> bool:
    """Whether no term shrinks."""
    return all(a <= b for a, b in zip(asdict(less).values(), asdict(more).values(), strict=True))


def test_the_floor_is_the_sum_of_its_terms() -> None:
    assert terms().floor_bytes == sum(asdict(terms()).values())
    assert all(n > 0 for n in asdict(terms()).values())


@given(COUNTS, COUNTS)
def test_a_longer_context_never_needs_less(a: int, b: int) -> None:
    assert grows(terms(ctx=min(a, b)), terms(ctx=max(a, b)))


@given(COUNTS, COUNTS)
def test_a_longer_chunk_never_needs_less(a: int, b: int) -> None:
    assert grows(terms(chunk=min(a, b)), terms(chunk=max(a, b)))


@given(st.integers(1, 256), st.integers(1, 256))
def test_more_threads_never_need_less(a: int, b: int) -> None:
    assert grows(terms(threads=min(a, b)), terms(threads=max(a, b)))


SIZES = ["vocab_size", "num_experts", "moe_intermediate_size", "num_attention_heads", "linear_num_value_heads"]


@pytest.mark.parametrize("key", SIZES)
def test_a_larger_model_never_needs_less(key: str) -> None:
    larger = replace(HYBRID, **{key: 4 * getattr(HYBRID, key)})
    encoding = Affine(4, 64, "bf16")
    assert grows(terms(layout_of(HYBRID, encoding)), terms(layout_of(larger, encoding)))


def test_more_bits_never_need_less() -> None:
    encodings: list[Encoding] = [Affine(4, 64, "bf16"), Affine(8, 64, "bf16"), Plain("bf16"), Plain("f32")]
    needs = [terms(layout_of(HYBRID, encoding)) for encoding in encodings]
    assert all(grows(a, b) for a, b in pairwise(needs))


@given(st.integers(0, 1 << 30), st.integers(0, 1 << 30))
def test_more_memory_never_holds_fewer_experts_and_never_too_many(a: int, b: int) -> None:
    need, record = terms(), largest_record_bytes(LAYOUT)
    slots = [need.slots(LAYOUT, need.floor_bytes + spare) for spare in sorted((a, b))]
    every = HYBRID.num_experts * HYBRID.num_hidden_layers
    assert MIN_SLOTS <= slots[0] <= slots[1] <= every
    for count, spare in zip(slots, sorted((a, b)), strict=True):
        assert (count - MIN_SLOTS) * record <= spare
        assert count == every or (count + 1 - MIN_SLOTS) * record > spare


def test_too_little_memory_is_refused_with_the_floor_and_its_terms() -> None:
    need = terms()
    with pytest.raises(RequestError) as caught:
        need.slots(LAYOUT, need.floor_bytes - 1)
    message = str(caught.value)
    assert f"needs {human(need.floor_bytes)}" in message
    for name, nbytes in asdict(need).items():
        assert f"{name.removesuffix('_bytes')} {human(nbytes)}" in message


def test_bytes_per_token_are_those_of_the_chosen_experts_and_of_all_that_is_resident() -> None:
    record = largest_record_bytes(LAYOUT)
    found = token_bytes(LAYOUT)
    assert found.expert_bytes == HYBRID.num_hidden_layers * HYBRID.top_k * record
    assert found.resident_bytes == LAYOUT.resident_bytes
    assert found.embedding_bytes == LAYOUT.embedding.row_bytes


def test_a_model_without_experts_needs_no_slots() -> None:
    dense = replace(LAYOUT, layers=(None,) * HYBRID.num_hidden_layers)
    need = terms(dense)
    assert need.min_slots_bytes == largest_record_bytes(dense) == token_bytes(dense).expert_bytes == 0
    assert need.slots(dense, need.floor_bytes) == 0


def test_bits_per_weight_of_four_bits_in_groups_of_64_are_four_and_a_half() -> None:
    (part, *_) = LAYOUT.layers[0].record.parts if LAYOUT.layers[0] else ()
    assert bits_per_weight(sum(a.nbytes for a in part.arrays), (part.rows, part.columns)) == 4.5


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.00 KiB"),
        (72 * 1024, "72.0 KiB"),
        (7_077_888, "6.75 MiB"),
        (10 * 2**20 - 1, "10.0 MiB"),
        (100 * 2**20, "100 MiB"),
        (2**30, "1.00 GiB"),
        (200 * 2**30, "200 GiB"),
        (2000 * 2**30, "2000 GiB"),
    ],
)
def test_bytes_are_shown_in_three_significant_digits(nbytes: int, text: str) -> None:
    assert human(nbytes) == text


@given(st.floats(1e-9, 1e9))
def test_three_digits_are_within_half_of_the_last(value: float) -> None:
    text = three_digits(value)
    assert "e" not in text
    assert float(text) == pytest.approx(value, rel=0.0051)
    digits = text.replace(".", "").lstrip("0")
    assert len(digits) == 3 or value >= 999.5
