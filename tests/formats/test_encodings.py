"""Container encodings against their definition in FORMAT.md, element by element, and what they refuse."""

import struct
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from formats.dtypes import FLOAT_DTYPES, AnyArray, to_float32
from formats.encodings import (
    ENCODINGS,
    FP8,
    IQ4NL,
    MXFP4,
    NVFP4,
    Q2K,
    Q4K,
    Q6K,
    Affine,
    Encoding,
    Levels,
    Symmetric,
    ZeroPoint,
    encoding_from_json,
    encoding_label,
    encoding_to_json,
)
from formats.encodings.k_quants import pack_scales, unpack_scales
from formats.encodings.minifloat import E2M1, E4M3FN, E8M0, E8M0_MAX
from formats.encodings.packing import pack_codes, unpack_codes
from formats.errors import FormatError
from formats.fields import Fields
from tests.encodings import EVERY_ENCODING, random_arrays

COLUMNS = 256
IQ4 = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
LEVELS: Mapping[str, Callable[[int], float]] = {  # by code
    "iq4_xs": lambda code: IQ4[code],
    "iq3_s": lambda code: 2 * code - 15,
    "iq3_xxs": lambda code: (-1) ** (code >> 3) * (1, 3, 5, 7, 9, 11, 13, 15.5)[code & 7],
    "iq2_xxs": lambda code: (-1) ** (code >> 2) * (1, 3.125, 5.375, 0)[code & 3],
    "iq2_xs": lambda code: (-1) ** (code >> 2) * (1, 3.125, 5.375, 0)[code & 3],
    "iq1_s": lambda code: code - 1 + 0.125,
    "iq1_m": lambda code: 0 if code & 3 == 3 else (code & 3) - 1 + (-0.125 if code & 4 else 0.125),
}
F32 = np.float32


def stream(words: AnyArray, bits: int, j: int) -> int:
    """Integer j of a row of words: FORMAT.md, Codes."""
    number = int.from_bytes(words.tobytes(), "little")
    return number >> (bits * j) & ((1 << bits) - 1)


def e4m3(bits: int) -> Any:
    """The value of an FP8 by its definition."""
    exponent, mantissa = bits >> 3 & 15, bits & 7
    magnitude = mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
    return F32(-magnitude if bits & 0x80 else magnitude)


def e2m1(bits: int) -> Any:
    """The value of an FP4 by its definition: sign, 2 bits of exponent with bias 1, 1 of mantissa."""
    exponent, mantissa = bits >> 1 & 3, bits & 1
    magnitude = mantissa / 2 if exponent == 0 else (1 + mantissa / 2) * 2.0 ** (exponent - 1)
    return F32(-magnitude if bits & 8 else magnitude)


def by_definition(encoding: Encoding, row: Mapping[str, AnyArray], j: int) -> Any:
    """The float32 value of element j: FORMAT.md, Values. `row` has the arrays of one row, floats widened."""
    if "weight" in row:
        return row["weight"][j]
    code = int(row["codes"][j]) if isinstance(encoding, FP8) else stream(row["codes"], encoding.bits, j)
    if isinstance(encoding, Q4K):
        block, group = divmod(j, 256)[0], j % 256 // 32
        words = row["scales"][3 * block : 3 * block + 3]
        scale, low = stream(words, 6, group), stream(words, 6, 8 + group)
        return row["d"][block] * F32(scale) * F32(code) - row["dmin"][block] * F32(low)
    if isinstance(encoding, Q2K):
        both = int(row["scales"][j // 16])
        return row["d"][j // 256] * F32(both & 15) * F32(code) - row["dmin"][j // 256] * F32(both >> 4)
    if isinstance(encoding, Q6K):
        return row["d"][j // 256] * F32(row["scales"][j // 16]) * F32(code - {"q3_k": 4, "q6_k": 32}[encoding.id])
    if isinstance(encoding, Levels):
        return row["d"][j // 256] * F32(row["scales"][j // encoding.group_size]) * F32(LEVELS[encoding.id](code))
    if isinstance(encoding, IQ4NL):
        return row["scales"][j // 32] * F32(IQ4[code])
    group_size = {MXFP4: 32, NVFP4: 16}.get(type(encoding)) or encoding.parameters()["group_size"]
    scale = row["scales"][j // group_size]
    if isinstance(encoding, Affine):
        return F32(code) * scale + row["biases"][j // group_size]
    if isinstance(encoding, Symmetric):
        return F32(code - 2 ** (encoding.bits - 1)) * scale
    if isinstance(encoding, ZeroPoint):
        return F32(code - int(row["zeros"][j // group_size])) * scale
    if isinstance(encoding, MXFP4):
        return e2m1(code) * F32(2.0 ** (int(scale) - 127))
    if isinstance(encoding, NVFP4):
        factor = row["global"][0]
        return e2m1(code) * (
            e4m3(int(scale)) * factor if encoding.global_scale == "multiply" else e4m3(int(scale)) / factor
        )
    assert isinstance(encoding, FP8)
    return e4m3(code) * scale


@pytest.mark.parametrize("encoding", EVERY_ENCODING, ids=encoding_label)
def test_every_element_decodes_to_its_definition(encoding: Encoding) -> None:
    arrays = random_arrays(encoding, 3, COLUMNS, np.random.default_rng(1))
    floats = {spec.name: spec.dtype for spec in encoding.arrays(3, COLUMNS) if spec.dtype in FLOAT_DTYPES}
    widened = {name: to_float32(a, floats[name]) if name in floats else a for name, a in arrays.items()}
    found = encoding.decode(arrays)
    assert found.dtype == np.float32
    expected = [
        [by_definition(encoding, {name: a[row] for name, a in widened.items()}, j) for j in range(COLUMNS)]
        for row in range(3)
    ]
    assert found.tobytes() == np.array(expected, np.float32).tobytes()
    assert 0.1 < np.std(found) < 5


@pytest.mark.parametrize("encoding", EVERY_ENCODING, ids=encoding_label)
def test_any_rows_decode_as_they_do_among_all(encoding: Encoding) -> None:
    arrays = random_arrays(encoding, 5, COLUMNS, np.random.default_rng(2))
    some = encoding.decode({name: array[1:4] for name, array in arrays.items()})
    assert some.tobytes() == encoding.decode(arrays)[1:4].tobytes()


@pytest.mark.parametrize("encoding", EVERY_ENCODING, ids=encoding_label)
def test_an_encoding_survives_json(encoding: Encoding) -> None:
    assert encoding_from_json(Fields(encoding_to_json(encoding), "here")) == encoding


def test_every_id_is_tested() -> None:
    assert {encoding.id for encoding in EVERY_ENCODING} == ENCODINGS.keys()


@given(st.data(), st.integers(1, 8))
def test_codes_of_any_width_are_one_stream(data: st.DataObject, bits: int) -> None:
    codes = np.array(data.draw(st.lists(st.integers(0, 2**bits - 1), min_size=64, max_size=64)), np.uint8).reshape(
        2, 32
    )
    words = pack_codes(codes, bits)
    assert words.shape == (2, bits)
    assert [[stream(row, bits, j) for j in range(32)] for row in words] == codes.tolist()
    assert unpack_codes(words, bits).tolist() == codes.tolist()


def test_six_bit_scales_survive_packing() -> None:
    scales, mins = np.random.default_rng(3).integers(0, 64, (2, 2, 3, 8), np.uint8)
    found = unpack_scales(pack_scales(scales, mins))
    assert [array.tolist() for array in found] == [scales.tolist(), mins.tolist()]


def test_small_floats_have_the_values_of_their_definition() -> None:
    assert E2M1.tolist() == [e2m1(bits) for bits in range(16)]
    numbers = [bits for bits in range(256) if bits & 0x7F != 0x7F]
    assert [E4M3FN[bits] for bits in numbers] == [e4m3(bits) for bits in numbers]
    assert np.isnan(E4M3FN[[0x7F, 0xFF]]).all()
    assert E4M3FN[0x7E] == 448
    assert E8M0[127] == 1
    assert E8M0[:255].tolist() == [2.0 ** (bits - 127) for bits in range(255)]
    assert struct.pack("<f", E8M0[0]) == bytes([0, 0, 0x40, 0])  # a subnormal, not 0
    assert np.isnan(E8M0[255])
    with np.errstate(over="ignore"):
        assert np.isfinite(E2M1 * E8M0[E8M0_MAX]).all()
        assert not np.isfinite(E2M1 * E8M0[E8M0_MAX + 1]).all()


def test_the_last_fp8_group_may_be_shorter() -> None:
    encoding = FP8(128, "f32")
    assert [spec.shape for spec in encoding.arrays(2, 300)] == [(2, 300), (2, 3)]
    ones = np.full((2, 300), 0x38, np.uint8)
    found = encoding.decode({"codes": ones, "scales": np.array([[1, 2, 3], [4, 5, 6]], np.float32)})
    assert found.tolist() == [[1] * 128 + [2] * 128 + [3] * 44, [4] * 128 + [5] * 128 + [6] * 44]


@pytest.mark.parametrize(
    ("encoding", "columns", "message"),
    [
        (MXFP4(), 48, "input width 48 is not a multiple of group_size 32"),
        (NVFP4("multiply"), 40, "input width 40 is not a multiple of group_size 16"),
        (Symmetric(4, 100, "f16"), 200, "group_size is 100, expected 32, 64, 128 or the input width 200"),
        (ZeroPoint(3, 40, "f16"), 40, "input width 40 is not a multiple of 32"),
        (ZeroPoint(4, 20, "f16"), 20, "input width 20 is not a multiple of 32"),
        (Symmetric(8, 72, "bf16"), 72, "input width 72 is not a multiple of 32"),
        (FP8(64, "f32"), 256, "group_size is 64, expected 32, 128 or the input width 256"),
        (Q4K(), 128, "input width 128 is not a multiple of group_size 256"),
        (Q6K(), 384, "input width 384 is not a multiple of group_size 256"),
    ],
    ids=str,
)
def test_a_width_that_does_not_fit_is_refused(encoding: Encoding, columns: int, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        encoding.arrays(1, columns)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"id": "symmetric", "bits": 6, "group_size": 32, "scale_dtype": "f16"}, "bits is 6, expected one of 4, 5, 8"),
        ({"id": "zero_point", "bits": 5, "group_size": 32, "scale_dtype": "f16"}, "expected one of 2, 3, 4, 8"),
        ({"id": "symmetric", "bits": 4, "group_size": 0, "scale_dtype": "f16"}, "group_size is 0, expected an integer"),
        ({"id": "fp8", "group_size": 128, "scale_dtype": "u8"}, "scale_dtype is u8, expected one of bf16, f16, f32"),
        ({"id": "nvfp4"}, "global is missing"),
        ({"id": "nvfp4", "global": "add"}, "global is add, expected one of multiply, divide"),
        ({"id": "mxfp4", "group_size": 32}, "group_size is unknown to this version"),
    ],
)
def test_a_wrong_parameter_is_refused_by_name(content: dict[str, Any], message: str) -> None:
    with pytest.raises(FormatError, match=message):
        encoding_from_json(Fields(content, "here"))
