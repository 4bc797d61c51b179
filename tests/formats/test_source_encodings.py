"""Source encodings bit for bit against other libraries (fixtures/*_encodings.npz), decoded and transcoded.

tests/fixtures/make_source_encodings.py and make_packaged_encodings.py name the library of each kind.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from formats.dtypes import AnyArray
from formats.encodings import encoding_label
from formats.encodings.sources import GGMLSource, GPTQSource, SourceEncoding, find_flaw
from formats.encodings.sources.base import GGML_BLOCKS
from repack.plan import SourceMatrix, SourcePlane
from repack.rows import RowBlock, RowReader
from repack.sources.base import Reader
from tests.repack.quantized import KINDS, source_encoding

FIXTURES = Path(__file__).parent.parent / "fixtures"
QUANTIZED = tuple(kind for kind in KINDS if kind != "bf16")


class Planes:
    """A reader of arrays in memory: a file is the name of a plane."""

    def __init__(self, planes: Mapping[str, AnyArray]) -> None:
        self.raw = {name: np.ascontiguousarray(array).tobytes() for name, array in planes.items()}

    def read_into(self, file: str, offset: int, buffer: memoryview) -> None:
        buffer[:] = self.raw[file][offset : offset + len(buffer)]

    def view(self, file: str, offset: int, nbytes: int) -> None:
        return None

    def release(self) -> None: ...

    def expect(self, *_: object) -> bool:
        return False

    def finished(self, units: int) -> None: ...

    def __enter__(self) -> "Reader":
        return self

    def __exit__(self, *_: object) -> None: ...


@pytest.fixture(scope="module")
def fixture() -> Mapping[str, AnyArray]:
    with np.load(FIXTURES / "source_encodings.npz") as first, np.load(FIXTURES / "packaged_encodings.npz") as second:
        return dict(first) | dict(second)


def of_kind(fixture: Mapping[str, AnyArray], kind: str) -> tuple[SourceEncoding, SourceMatrix, Planes, AnyArray]:
    """The encoding, its matrix, where its planes are read from, and the values that another library gives."""
    expected = fixture[f"{kind}/decoded"]
    rows, columns = expected.shape
    encoding = GGMLSource(kind) if kind in GGML_BLOCKS else source_encoding(kind, rows, columns)
    specs = encoding.planes(rows, columns)
    planes = tuple(SourcePlane(spec, spec.name, spec.name, spec.dtypes[0], 0) for spec in specs)
    reader = Planes({spec.name: fixture[f"{kind}/{spec.name}"] for spec in specs})
    return encoding, SourceMatrix(encoding, planes, rows, rows, columns), reader, expected


def values(array: Any) -> bytes:
    """The bits of float32 values; gguf knows no negative zero in MXFP4, so zeros are one."""
    return (array + np.float32(0)).tobytes()


@pytest.mark.parametrize("kind", [*QUANTIZED, *GGML_BLOCKS])
def test_a_source_decodes_and_transcodes_to_the_values_that_another_library_gives(
    fixture: Mapping[str, AnyArray], kind: str
) -> None:
    encoding, matrix, reader, expected = of_kind(fixture, kind)
    planes = RowReader(reader).read(matrix, 0, matrix.rows)
    assert find_flaw(encoding, encoding.planes(matrix.rows, matrix.columns), planes) is None
    assert values(encoding.decode(planes)) == values(expected)
    exact = encoding.exact(matrix.columns)
    arrays = encoding.transcode(planes)
    specs = exact.arrays(matrix.rows, matrix.columns)
    assert {spec.name: (spec.shape, spec.nbytes) for spec in specs} == {
        name: (array.shape, array.nbytes) for name, array in arrays.items()
    }
    assert exact.decode(arrays).tobytes() == encoding.decode(planes).tobytes(), encoding_label(exact)


@pytest.mark.parametrize("kind", QUANTIZED)
def test_any_rows_are_those_of_the_whole(fixture: Mapping[str, AnyArray], kind: str) -> None:
    encoding, matrix, reader, expected = of_kind(fixture, kind)
    packed = any(plane.spec.words for plane in matrix.planes)
    for some, rows in (
        (matrix, slice(0, 32)),
        *(() if packed else ((matrix.slice(7, 20), slice(7, 27)), (matrix.every(2, 1), slice(1, None, 2)))),
    ):
        planes = RowReader(reader).read(some, 0, min(some.rows, 32) if packed else some.rows)
        wanted = expected if not packed and some is matrix else expected[rows]
        assert values(encoding.decode(planes)) == values(wanted)
        assert values(encoding.exact(matrix.columns).decode(encoding.transcode(planes))) == values(wanted)


def test_act_order_is_refused_by_name(fixture: Mapping[str, AnyArray]) -> None:
    encoding, matrix, reader, _ = of_kind(fixture, "gptq")
    assert isinstance(encoding, GPTQSource)
    planes = RowReader(reader).read(matrix, 0, matrix.rows)
    planes["g_idx"] = planes["g_idx"][:, ::-1]
    flaw = find_flaw(encoding, encoding.planes(matrix.rows, matrix.columns), planes)
    assert flaw is not None
    assert (flaw.plane, flaw.found, flaw.expected) == ("g_idx", "group 1", "0: act-order (desc_act) is not supported")


@pytest.mark.parametrize("expected_rows", [32, 16])
def test_blocks_that_are_read_ahead_are_those_asked_for_in_whatever_order(
    fixture: Mapping[str, AnyArray], expected_rows: int
) -> None:
    _, matrix, reader, _ = of_kind(fixture, "fp8_block")
    starts = range(0, matrix.rows - matrix.rows % 32, 32)
    ahead = RowReader(reader)
    ahead.expect(RowBlock(matrix, first, expected_rows) for first in starts)
    for first in starts:
        planes = ahead.read(matrix, first, 32)
        alone = RowReader(reader).read(matrix, first, 32)
        assert {name: plane.tobytes() for name, plane in planes.items()} == {
            name: plane.tobytes() for name, plane in alone.items()
        }
    ahead.close()
