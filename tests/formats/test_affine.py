"""The affine encoding against its definition, and bit for bit against mlx.core.quantize (fixtures/affine.npz)."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from formats.dtypes import AnyArray, to_float32
from formats.encodings import Affine, encoding_from_json, encoding_to_json
from formats.encodings.packing import unpack_codes
from formats.errors import FormatError, UnsupportedError
from formats.fields import Fields

FIXTURE = Path(__file__).parent.parent / "fixtures" / "affine.npz"
ENCODINGS = st.builds(Affine, st.sampled_from((4, 8)), st.sampled_from((32, 64, 128)), st.sampled_from(("bf16", "f16")))


@pytest.fixture(scope="module")
def mlx() -> Mapping[str, AnyArray]:
    with np.load(FIXTURE) as file:
        return dict(file)


def source(mlx: Mapping[str, AnyArray], dtype: str) -> Any:
    return to_float32(mlx[f"{dtype}_input"].view("<f2") if dtype == "f16" else mlx[f"{dtype}_input"], dtype)


@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", ["bf16", "f16"])
def test_encoding_gives_the_bits_that_mlx_gives(
    mlx: Mapping[str, AnyArray], dtype: str, bits: int, group_size: int
) -> None:
    encoded = Affine(bits, group_size, dtype).encode(source(mlx, dtype))
    names = mlx["row_names"]
    for name, found in encoded.items():
        expected = mlx[f"{dtype}_b{bits}_g{group_size}_{name}"]
        unequal = (found.view(expected.dtype) != expected).any(axis=1)
        assert not unequal.any(), f"{name} of rows {names[unequal]}"


@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", ["bf16", "f16"])
def test_decoding_gives_what_mlx_gives_within_one_rounding(
    mlx: Mapping[str, AnyArray], dtype: str, bits: int, group_size: int
) -> None:
    key = f"{dtype}_b{bits}_g{group_size}_"
    storage = "<u2" if dtype == "bf16" else "<f2"
    stored = {
        "codes": mlx[key + "codes"],
        "scales": mlx[key + "scales"].view(storage),
        "biases": mlx[key + "biases"].view(storage),
    }
    found = Affine(bits, group_size, dtype).decode(stored)
    # MLX computes in dtype: product and sum are each rounded to it, relative to the largest value that occurs.
    codes_times_scale = (2**bits - 1) * np.abs(to_float32(stored["scales"], dtype))
    largest = np.maximum(codes_times_scale, np.abs(to_float32(stored["biases"], dtype)))
    step = 2.0**-8 if dtype == "bf16" else 2.0**-11
    smallest = 0.0 if dtype == "bf16" else 2.0**-24
    bound = np.repeat(2 * step * largest + 2 * smallest, group_size, axis=1)
    dequantized = mlx[key + "dequantized"].view(np.float32)
    # A product beyond 65504 is infinite in f16, where float32 goes on: those rows have no second opinion.
    overflows = dtype == "f16" and np.repeat(codes_times_scale > 65504, group_size, axis=1)
    assert (np.isfinite(dequantized) | overflows).all()
    with np.errstate(invalid="ignore"):
        assert ((np.abs(found - dequantized) <= bound) | ~np.isfinite(dequantized)).all()


def codes_by_definition(encoding: Affine, words: AnyArray) -> list[list[int]]:
    """FORMAT.md: element j of a row in bits (j * bits) mod 32 and up of word j * bits div 32."""
    mask, per_word = (1 << encoding.bits) - 1, 32 // encoding.bits
    return [[(int(word) >> (encoding.bits * j)) & mask for word in row for j in range(per_word)] for row in words]


@given(st.data(), ENCODINGS)
def test_codes_are_packed_as_defined(data: st.DataObject, encoding: Affine) -> None:
    words = data.draw(arrays(np.dtype("<u4"), (2, encoding.bits), elements=st.integers(0, 2**32 - 1)))
    assert unpack_codes(words, encoding.bits).tolist() == codes_by_definition(encoding, words)


def values_of(columns: int) -> st.SearchStrategy[Any]:
    numbers = st.floats(-100, 100, width=16)  # exact in f16, and in float32 sums of a few of them
    return arrays(np.float32, (2, columns), elements=numbers)


@given(st.data(), ENCODINGS)
def test_a_decoded_value_is_code_times_scale_plus_bias(data: st.DataObject, encoding: Affine) -> None:
    stored = encoding.encode(data.draw(values_of(128)))
    codes = np.array(codes_by_definition(encoding, stored["codes"]), np.float32)
    scales = to_float32(stored["scales"], encoding.scale_dtype).repeat(encoding.group_size, axis=1)
    biases = to_float32(stored["biases"], encoding.scale_dtype).repeat(encoding.group_size, axis=1)
    np.testing.assert_array_equal(encoding.decode(stored), codes * scales + biases)


@given(st.data(), ENCODINGS)
def test_rows_are_encoded_independently(data: st.DataObject, encoding: Affine) -> None:
    values = data.draw(values_of(128))
    whole, halves = encoding.encode(values), [encoding.encode(values[:1]), encoding.encode(values[1:])]
    for name, array in whole.items():
        np.testing.assert_array_equal(array, np.concatenate([half[name] for half in halves]))


@given(st.data(), ENCODINGS)
def test_arrays_are_what_the_encoding_announces(data: st.DataObject, encoding: Affine) -> None:
    stored = encoding.encode(data.draw(values_of(128)))
    specs = encoding.arrays(2, 128)
    assert [spec.name for spec in specs] == list(stored)
    assert [spec.shape for spec in specs] == [array.shape for array in stored.values()]
    assert [spec.nbytes for spec in specs] == [array.nbytes for array in stored.values()]


@given(st.data(), st.sampled_from((4, 8)), st.sampled_from((32, 64, 128)))
def test_a_value_is_at_most_one_step_away(data: st.DataObject, bits: int, group_size: int) -> None:
    encoding = Affine(bits, group_size, "bf16")
    values = data.draw(values_of(128))
    groups = values.reshape(2, -1, group_size)
    step = (groups.max(axis=2) - groups.min(axis=2)) / (2**bits - 1)
    # One side of the range may be cut by up to a step, as the larger edge is met exactly; and scale and bias are
    # rounded to bf16: 2**-8 of code * scale and of bias, each at most twice the largest magnitude of the group.
    largest = np.abs(groups).max(axis=2)
    bound = (1.01 * step + 2.0**-6 * largest + 1e-4)[..., None]
    assert (np.abs(encoding.decode(encoding.encode(values)).reshape(groups.shape) - groups) <= bound).all()


def test_a_width_that_the_group_does_not_divide_is_refused_with_the_sizes_that_fit() -> None:
    with pytest.raises(FormatError, match="96 is not a multiple of group_size 64, expected a group_size of 32"):
        Affine(4, 64, "bf16").arrays(1, 96)
    with pytest.raises(FormatError, match="no supported size fits"):
        Affine(4, 64, "bf16").encode(np.zeros((1, 40), np.float32))


@given(ENCODINGS)
def test_an_encoding_survives_json(encoding: Affine) -> None:
    assert encoding_from_json(Fields(encoding_to_json(encoding), "here")) == encoding


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 7}, "bits is 7, expected one of 2, 3, 4, 5, 6, 8"),
        ({"bits": True}, "bits is True, expected an integer"),
        ({"bits": None}, "bits is missing"),
        ({"group_size": 16}, "group_size is 16, expected one of 32, 64, 128"),
        ({"scale_dtype": "u8"}, "scale_dtype is u8, expected one of bf16, f16, f32"),
        ({"mode": "x"}, "mode is unknown to this version"),
    ],
)
def test_a_wrong_parameter_is_refused_by_name(change: dict[str, Any], message: str) -> None:
    content = {**encoding_to_json(Affine(4, 64, "bf16")), **change}
    with pytest.raises(FormatError, match=message):
        encoding_from_json(Fields(content, "here"))


def test_an_unknown_encoding_is_refused_by_name() -> None:
    with pytest.raises(UnsupportedError, match="id is trellis, expected one of affine, bf16, f16, f32"):
        encoding_from_json(Fields({"id": "trellis"}, "here"))
