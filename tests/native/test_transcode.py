"""Exact transcodes in C: every array, to the bit, is what NumPy's definition gives; and what is refused is named."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from formats import native, transcode
from formats.encodings.sources import AWQSource, GGMLSource, SourceEncoding
from formats.encodings.sources.base import GGML_BLOCKS, Bits
from formats.errors import FormatError
from repack.encode import SourceWeights
from repack.plan import SourceMatrix, SourcePlane
from tests.formats.test_source_encodings import Planes

pytestmark = pytest.mark.skipif(native.load_library() is None, reason="the native kernels are not built")

SCALES = {  # f16 numbers of a block
    "Q4_1": (0, 2), "Q5_1": (0, 2), "Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,),
    "IQ1_M": (),
}  # fmt: skip


def random_blocks(kind: str, rows: int, blocks: int, seed: int) -> Bits:
    """Any bits but scales that are not finite."""
    nbytes = GGML_BLOCKS[kind][1]
    raw = np.random.default_rng(seed).integers(0, 256, (rows, blocks, nbytes), np.uint8)
    if kind == "MXFP4":
        raw[..., 0] = np.minimum(raw[..., 0], 0xFC)
    else:
        for at in SCALES.get(kind, (0,)):
            raw[..., at + 1] &= 0xBF  # the highest bit of the exponent
    if kind == "IQ1_M":  # of the number of which each of four words holds 4 bits
        raw[..., 55] &= 0xBF
    return raw.reshape(rows, -1)


def assert_equal(encoding: SourceEncoding, planes: dict[str, Bits]) -> None:
    found, expected = transcode.transcode(encoding, planes), encoding.transcode(planes)
    assert found is not None
    assert list(found) == list(expected)
    for name, array in expected.items():
        assert found[name].dtype == array.dtype, name
        assert found[name].shape == array.shape, name
        assert np.ascontiguousarray(found[name]).tobytes() == np.ascontiguousarray(array).tobytes(), name


@pytest.mark.parametrize("kind", transcode.BLOCK_TYPES)
@given(rows=st.integers(1, 5), blocks=st.integers(1, 4), seed=st.integers(0, 2**32))
def test_blocks_become_what_numpy_makes_of_them(kind: str, rows: int, blocks: int, seed: int) -> None:
    assert_equal(GGMLSource(kind), {"blocks": random_blocks(kind, rows, blocks, seed)})


@given(words=st.integers(1, 40), groups=st.integers(1, 3), size=st.sampled_from((32, 128)), seed=st.integers(0, 2**32))
def test_words_of_awq_become_what_numpy_makes_of_them(words: int, groups: int, size: int, seed: int) -> None:
    rng = np.random.default_rng(seed)

    def any_words(columns: int) -> Bits:  # columns first in the file
        return rng.integers(0, 2**32, (columns, words), np.uint32).T

    scales = rng.standard_normal((groups, 8 * words)).astype(np.float16).T
    planes = {"qweight": any_words(groups * size), "qzeros": any_words(groups), "scales": scales}
    assert_equal(AWQSource(size, "f16"), planes)


def matrix(kind: str, blocks: Bits) -> tuple[SourceMatrix, Planes]:
    encoding, rows = GGMLSource(kind), len(blocks)
    columns = blocks.shape[1] // GGML_BLOCKS[kind][1] * GGML_BLOCKS[kind][0]
    (spec,) = encoding.planes(rows, columns)
    return SourceMatrix(encoding, (SourcePlane(spec, "w", "blocks", kind, 0),), rows, rows, columns), Planes(
        {"blocks": blocks}
    )


@pytest.mark.parametrize("kind", transcode.BLOCK_TYPES)
def test_a_scale_that_no_container_may_hold_is_found_and_named(kind: str) -> None:
    infinite = [{at: 0x00, at + 1: 0x7C} for at in SCALES.get(kind, (0,))]  # bytes by place
    infinite = {"MXFP4": [{0: 0xFF}], "IQ1_M": [{49: 0, 51: 0, 53: 0xC0, 55: 0x70}]}.get(kind, infinite)
    for places in infinite:
        blocks = random_blocks(kind, 3, 2, 1)
        for place, byte in places.items():
            blocks.reshape(3, 2, -1)[2, 1, place] = byte
        assert transcode.transcode(GGMLSource(kind), {"blocks": blocks}) is None
        source, planes = matrix(kind, blocks)
        with SourceWeights(planes) as weights, pytest.raises(FormatError, match=r"w holds .* row 2, .*, expected"):
            list(weights.encoded("layer 0", source, source.encoding.exact(source.columns)))


@pytest.mark.parametrize("kind", transcode.BLOCK_TYPES)
def test_a_conversion_gives_the_same_without_the_library(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    source, planes = matrix(kind, random_blocks(kind, 7, 3, 5))

    def arrays() -> dict[str, bytes]:
        with SourceWeights(planes) as weights:
            (rows,) = weights.encoded("layer 0", source, source.encoding.exact(source.columns))
        return {name: np.ascontiguousarray(array).tobytes() for name, array in rows.arrays.items()}

    found = arrays()
    monkeypatch.setattr(transcode, "_library", lambda: None)
    assert found == arrays()
