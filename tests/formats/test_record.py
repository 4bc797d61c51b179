"""Records, resident tensors and embedding rows: alignment, order, no overlap, whole pages."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from formats.checksum import blocks, num_blocks
from formats.dtypes import to_float32
from formats.encodings import Affine, Encoding, Plain
from formats.errors import ChecksumError, FormatError
from formats.layout import lay_out_embedding, matrix_shape, place_resident
from formats.record import (
    ARRAY_ALIGNMENT,
    LINEAR_BIAS,
    PAGE_BYTES,
    PART_NAMES,
    PartSpec,
    PlacedArray,
    align,
    decode_part,
    lay_out_record,
    padding_ranges,
)
from tests.encodings import random_arrays

PLAIN = st.sampled_from([Plain("bf16"), Plain("f16"), Plain("f32")])
AFFINE = st.builds(Affine, st.sampled_from((4, 8)), st.sampled_from((32, 64, 128)), st.sampled_from(("bf16", "f16")))
ENCODINGS: st.SearchStrategy[Encoding] = st.one_of(PLAIN, AFFINE)
BIASES = st.sampled_from([None, "bf16", "f16", "f32"])


@st.composite
def part_specs(draw: st.DrawFn, max_rows: int = 300) -> list[PartSpec]:
    return [
        PartSpec(name, draw(st.integers(1, max_rows)), 128 * draw(st.integers(1, 4)), draw(ENCODINGS), draw(BIASES))
        for name in PART_NAMES
    ]


def check_places(arrays: list[PlacedArray], total: int, alignment: int) -> None:
    """Aligned, in order, apart, inside; padding covers exactly what is left."""
    end = 0
    for array in arrays:
        assert array.offset % alignment == 0
        assert end <= array.offset < end + alignment
        end = array.offset + array.nbytes
    assert end <= total
    padding = padding_ranges(arrays, total)
    assert all(start < stop for start, stop in padding)
    covered = [False] * total
    for start, stop in [*padding, *((a.offset, a.offset + a.nbytes) for a in arrays)]:
        assert not any(covered[start:stop])
        covered[start:stop] = [True] * (stop - start)
    assert all(covered)


@given(part_specs(max_rows=20))
def test_arrays_of_a_record_are_aligned_in_order_and_apart(specs: list[PartSpec]) -> None:
    record = lay_out_record(specs)
    assert [part.name for part in record.parts] == list(PART_NAMES)
    check_places([array for part in record.parts for array in part.arrays], record.record_bytes, ARRAY_ALIGNMENT)


@given(part_specs())
def test_a_record_is_the_least_number_of_pages(specs: list[PartSpec]) -> None:
    record = lay_out_record(specs)
    last = record.parts[-1].arrays[-1]
    assert record.record_bytes % PAGE_BYTES == 0
    assert 0 <= record.record_bytes - (last.offset + last.nbytes) < PAGE_BYTES


@given(part_specs())
def test_payload_and_weights_are_sums_over_the_parts(specs: list[PartSpec]) -> None:
    record = lay_out_record(specs)
    assert record.num_weights == sum(spec.rows * spec.columns for spec in specs)
    padding = padding_ranges([a for part in record.parts for a in part.arrays], record.record_bytes)
    assert record.payload_bytes == record.record_bytes - sum(stop - start for start, stop in padding)


def test_an_expert_of_qwen3_5_397b_is_432_pages() -> None:
    encoding = Affine(4, 64, "bf16")
    shapes = {"gate": (1024, 4096), "up": (1024, 4096), "down": (4096, 1024)}
    record = lay_out_record(PartSpec(name, *shape, encoding) for name, shape in shapes.items())
    assert record.record_bytes == record.payload_bytes == 7_077_888 == 432 * PAGE_BYTES


def test_a_width_that_does_not_fit_is_refused() -> None:
    with pytest.raises(FormatError, match="input width 100"):
        lay_out_record([PartSpec("gate", 4, 100, Affine(4, 32, "bf16"))])


@given(part_specs(max_rows=8), st.integers(0, 3), st.integers(0, 2**32 - 1))
def test_what_is_written_into_a_record_is_decoded_from_it(specs: list[PartSpec], place: int, seed: int) -> None:
    rng, record = np.random.default_rng(seed), lay_out_record(specs)
    first = place * PAGE_BYTES
    buffer = np.zeros(first + record.record_bytes, np.uint8)
    for part in record.parts:
        encoded = random_arrays(part.encoding, part.rows, part.columns, rng)
        views = part.views(buffer, first)
        assert set(views) == set(encoded) | ({LINEAR_BIAS} if part.linear_bias else set())
        for name, values in encoded.items():
            views[name][:] = values
        if part.linear_bias:
            views[LINEAR_BIAS][:] = 1  # bits of the smallest number but one
        matrix, bias = decode_part(part, buffer[first:])
        np.testing.assert_array_equal(matrix, part.encoding.decode(encoded))
        if part.linear_bias:
            assert bias is not None
            np.testing.assert_array_equal(bias, to_float32(views[LINEAR_BIAS], part.linear_bias))
        else:
            assert bias is None


@given(st.lists(st.integers(1, 6), min_size=1, max_size=4), ENCODINGS, st.integers(0, 5))
def test_a_resident_tensor_takes_whole_pages_from_where_it_is_put(
    axes: list[int], encoding: Encoding, page: int
) -> None:
    shape = (*axes[:-1], 128 * axes[-1])
    tensor = place_resident("name", shape, encoding, page * PAGE_BYTES)
    assert tensor.offset == page * PAGE_BYTES
    assert tensor.nbytes % PAGE_BYTES == 0
    check_places(list(tensor.arrays), tensor.nbytes, ARRAY_ALIGNMENT)
    rows, columns = matrix_shape(shape)
    assert columns == shape[-1]
    assert rows * columns == np.prod(shape)
    assert all(array.shape[0] == rows for array in tensor.arrays)


@given(st.integers(1, 50), st.integers(1, 4), ENCODINGS)
def test_an_embedding_row_holds_its_arrays_and_its_checksum(rows: int, width: int, encoding: Encoding) -> None:
    embedding = lay_out_embedding(rows, 128 * width, encoding)
    checksum = PlacedArray("checksum", "u32", (2,), embedding.checksum_offset)
    check_places([*embedding.arrays, checksum], embedding.row_bytes, 8)
    assert embedding.row_bytes % ARRAY_ALIGNMENT == 0
    assert embedding.nbytes == align(rows * embedding.row_bytes, PAGE_BYTES)


@given(st.integers(0, 1000), st.integers(0, 127), st.integers(0, 7))
def test_a_sealed_row_is_refused_at_another_place_or_with_any_bit_flipped(row: int, byte: int, bit: int) -> None:
    embedding = lay_out_embedding(1000, 128, Affine(8, 32, "bf16"))
    raw = np.random.default_rng(row).integers(0, 256, (1, embedding.row_bytes), np.uint8)
    embedding.seal(row, raw)
    embedding.check(row, raw[0])
    with pytest.raises(ChecksumError, match=f"row {row + 1} has checksum"):
        embedding.check(row + 1, raw[0])
    raw[0, byte] ^= 1 << bit
    with pytest.raises(ChecksumError, match=f"embedding.bin: row {row} has checksum"):
        embedding.check(row, raw[0])


@pytest.mark.parametrize("rows", [0, 1, 3])
@pytest.mark.parametrize("encoding", [Plain("bf16"), Plain("f32"), Affine(4, 64, "f16")])
def test_rows_of_the_embedding_are_seen_as_one_matrix(rows: int, encoding: Encoding) -> None:
    embedding = lay_out_embedding(10, 128, encoding)
    raw = np.zeros((rows, embedding.row_bytes), np.uint8)
    raw[:, 0] = range(rows)
    for array in embedding.arrays:
        found = embedding.views(raw)[array.name]
        assert found.shape == (rows, *array.shape[1:])
        assert [row.tobytes() for row in found] == [array.view(row).tobytes() for row in raw]
    assert encoding.decode(embedding.views(raw)).shape == (rows, 128)


@given(st.integers(0, 100), st.integers(1, 40))
def test_blocks_cover_a_file(total: int, block: int) -> None:
    found = list(blocks(total, block))
    assert [byte for offset, length in found for byte in range(offset, offset + length)] == list(range(total))
    assert num_blocks(total, block) == len(found)
