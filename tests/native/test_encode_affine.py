"""The native affine encoder: at every level the bits of mlx.core.quantize (fixtures/affine.npz) and of NumPy."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from formats import native
from formats.dtypes import FLOAT_DTYPES, AnyArray, storage_dtype, to_float32
from formats.encodings import Affine
from formats.errors import UnsupportedError
from repack.convert import convert, prepare
from repack.encode import encoder_name
from repack.plan import Options
from repack.sources.folder import FolderSource
from tests.repack.checkpoints import SMALL, read_tree, shapes, write_random

pytestmark = pytest.mark.skipif(not native.encoder_levels(), reason="the native kernels are not built")

FIXTURE = Path(__file__).parent.parent / "fixtures" / "affine.npz"
LEVELS = native.encoder_levels()
GROUP_SIZES = (32, 64, 128)
settings_of = st.builds(
    Affine, st.sampled_from(native.ENCODED_BITS), st.sampled_from(GROUP_SIZES), st.sampled_from(("bf16", "f16"))
)


@pytest.fixture(scope="module")
def mlx() -> Mapping[str, AnyArray]:
    with np.load(FIXTURE) as file:
        return dict(file)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("bits", native.ENCODED_BITS)
@pytest.mark.parametrize("dtype", ["bf16", "f16"])
def test_it_gives_the_bits_that_mlx_gives(
    mlx: Mapping[str, AnyArray], dtype: str, bits: int, group_size: int, level: str
) -> None:
    values = mlx[f"{dtype}_input"].view(storage_dtype(dtype))
    encoded = native.encode_affine(Affine(bits, group_size, dtype), values, dtype, level)
    assert encoded is not None
    for name, found in encoded.items():
        expected = mlx[f"{dtype}_b{bits}_g{group_size}_{name}"]
        unequal = (found.view(expected.dtype) != expected).any(axis=1)
        assert not unequal.any(), f"{name} of rows {mlx['row_names'][unequal]}"


def is_finite(arrays: Mapping[str, AnyArray], dtype: str) -> bool:
    return all(np.isfinite(to_float32(arrays[name], dtype)).all() for name in ("scales", "biases"))


@given(
    encoding=settings_of,
    dtype=st.sampled_from(FLOAT_DTYPES),
    shape=st.tuples(st.integers(1, 9), st.integers(1, 5)),
    exponents=st.tuples(st.integers(0, 254), st.integers(0, 60)),
    seed=st.integers(0, 2**32 - 1),
)
def test_it_gives_the_bits_that_numpy_gives_at_any_magnitude(
    encoding: Affine, dtype: str, shape: tuple[int, int], exponents: tuple[int, int], seed: int
) -> None:
    """Random bits whose exponents begin at the first of `exponents` and spread over the second."""
    rng = np.random.default_rng(seed)
    size = (shape[0], shape[1] * encoding.group_size)
    bits = rng.integers(2**32, size=size, dtype=np.uint32)
    exponent = np.minimum(exponents[0] + rng.integers(exponents[1] + 1, size=size, dtype=np.uint32), 254)
    wide: Any = (bits & np.uint32(0x807FFFFF)) | exponent << np.uint32(23)
    values = (wide >> 16).astype(np.uint16) if dtype == "bf16" else wide.view(np.float32)
    if dtype == "f16":
        values = np.clip(values, -65504, 65504).astype(np.float16)
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        expected = encoding.encode(to_float32(values, dtype))
    for level in LEVELS:
        found = native.encode_affine(encoding, values, dtype, level)
        assert (found is None) == (not is_finite(expected, encoding.scale_dtype))
        for name, array in (found or {}).items():
            assert (array.view(np.uint8) == expected[name].view(np.uint8)).all()


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_every_pattern_of_a_weight_that_is_not_finite_is_found(dtype: str, level: str) -> None:
    every = np.arange(1 << 16, dtype=np.uint16)
    values: Any = (every.astype(np.uint32) << 16).view(np.float32) if dtype == "f32" else every
    values = values.view(storage_dtype(dtype))
    finite = np.isfinite(to_float32(values, dtype))
    row = np.zeros((1, 64), storage_dtype(dtype))
    for value in values[~finite][::37]:
        row[0, 63] = value
        assert native.encode_affine(Affine(8, 32, "bf16"), row, dtype, level) is None
    whole = native.encode_affine(Affine(8, 32, "bf16"), np.where(finite, values, 0).astype(values.dtype)[None], dtype)
    assert whole is not None


def test_a_conversion_has_the_same_bytes_without_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_random(tmp_path / "source", SMALL, shapes(SMALL))
    assert encoder_name() == f"native ({LEVELS[0]})"
    convert(prepare(FolderSource(source), Options()), tmp_path / "native")
    monkeypatch.setattr(native, "encoder_levels", lambda: ())
    assert encoder_name() == "NumPy"
    convert(prepare(FolderSource(source), Options()), tmp_path / "numpy")
    assert read_tree(tmp_path / "native") == read_tree(tmp_path / "numpy")


def test_a_library_of_another_machine_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = tmp_path / "runtime" / "native"
    folder.mkdir(parents=True)
    (folder / native.LIBRARY_NAMES[0]).write_bytes(b"no library")
    monkeypatch.setattr(native, "__file__", str(tmp_path / "formats" / "native.py"))
    with pytest.raises(UnsupportedError, match=r"libse_native.so: cannot be loaded \(.*\); build it again"):
        native.load_library.__wrapped__()
