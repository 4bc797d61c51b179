"""Element types against struct and an independent statement of rounding."""

import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from formats.dtypes import DTYPES, from_float32, storage_dtype, to_float32
from formats.errors import UnsupportedError

FLOATS = st.floats(width=32, allow_nan=False)


def float32(*values: float) -> "np.ndarray[tuple[int], np.dtype[np.float32]]":
    return np.array(values, np.float32)


def bf16_to_float(bits: int) -> float:
    """The value of bfloat16 bits by definition: they are the upper half of a float32."""
    value: float = struct.unpack("<f", struct.pack("<I", bits << 16))[0]
    return value


@given(st.integers(0, 0xFFFF))
def test_bf16_bits_mean_the_upper_half_of_a_float32(bits: int) -> None:
    found = to_float32(np.array([bits], np.uint16), "bf16")[0]
    assert found == bf16_to_float(bits) or (np.isnan(found) and np.isnan(bf16_to_float(bits)))


def test_every_bf16_survives_a_round_trip() -> None:
    every = np.arange(1 << 16, dtype=np.uint16)
    values = to_float32(every, "bf16")
    numbers = ~np.isnan(values)
    np.testing.assert_array_equal(from_float32(values, "bf16")[numbers], every[numbers])


@given(FLOATS)
def test_a_float_is_rounded_to_the_nearest_bf16_and_a_tie_to_the_even_one(value: float) -> None:
    found = int(from_float32(float32(value), "bf16")[0])
    upper: int = struct.unpack("<I", struct.pack("<f", value))[0] >> 16
    neighbours = [bits for bits in (upper, upper + 1) if bits & 0x7FFF <= 0x7F80]
    # Beyond the largest finite value the next step counts as 2**128, as IEEE 754 rounds.
    distances = {
        bits: abs(value - (np.copysign(2.0**128, value) if bits & 0x7FFF == 0x7F80 else bf16_to_float(bits)))
        if not np.isinf(value)
        else float(bits != upper)
        for bits in neighbours
    }
    nearest = min(distances.values())
    candidates = [bits for bits, distance in distances.items() if distance == nearest]
    assert found == (candidates[0] if len(candidates) == 1 else next(b for b in candidates if b % 2 == 0))


@pytest.mark.parametrize("dtype", ["bf16", "f16", "f32"])
@pytest.mark.parametrize("bits", [0x7FC00000, 0x7F800001, 0xFFC00000, 0xFFFFFFFF, 0x7FFFFFFF])
def test_nan_stays_nan(dtype: str, bits: int) -> None:
    nan = np.array([bits], np.uint32).view(np.float32)
    assert np.isnan(to_float32(from_float32(nan, dtype), dtype)).all()


@given(st.floats(width=16, allow_nan=False))
def test_a_half_float_is_exact(value: float) -> None:
    assert to_float32(from_float32(float32(value), "f16"), "f16")[0] == value


@given(FLOATS)
def test_float32_is_kept_as_it_is(value: float) -> None:
    assert from_float32(float32(value), "f32").tobytes() == struct.pack("<f", value)


@pytest.mark.parametrize("shape", [(0,), (3,), (2, 3), (2, 0, 4)])
@pytest.mark.parametrize("dtype", ["bf16", "f16", "f32"])
def test_shapes_are_kept(dtype: str, shape: tuple[int, ...]) -> None:
    stored = from_float32(np.zeros(shape, np.float32), dtype)
    assert stored.shape == to_float32(stored, dtype).shape == shape
    assert stored.dtype == storage_dtype(dtype)


def test_all_storage_is_little_endian() -> None:
    one = {"bf16": "803f", "f16": "003c", "f32": "0000803f"}
    assert {dtype: from_float32(float32(1.0), dtype).tobytes().hex() for dtype in one} == one
    assert all(dtype.newbyteorder("<") == dtype for dtype in DTYPES.values())


def test_an_unknown_dtype_is_refused_by_name() -> None:
    for refused in (
        lambda: storage_dtype("f8"),
        lambda: to_float32(np.zeros(1, np.uint32), "u32"),
        lambda: from_float32(float32(0.0), "u32"),
    ):
        with pytest.raises(UnsupportedError, match=r"dtype is '(f8|u32)', expected one of bf16, f16, f32"):
            refused()
