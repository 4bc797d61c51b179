"""`repack verify --source`: what differs from the checkpoint is found, and samples of experts are compared."""

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from blake3 import blake3

from formats.checksum import xxh3_64
from formats.container import open_container
from formats.errors import FormatError
from formats.index import INDEX_FILE, index_to_bytes
from repack.compare import choose_experts
from repack.convert import convert, prepare
from repack.plan import Options
from repack.sources.base import Source
from repack.sources.folder import FolderSource
from repack.verify import verify_bytes, verify_container
from tests.fixtures import deepseek_tiny, deepseek_v41_tiny, muse_spark_tiny
from tests.fixtures.recipe import TinyCheckpoint, write_checkpoint
from tests.repack.checkpoints import SMALL, shapes, write_random
from tests.repack.damage import convert_mixed, flipped, write_at

AS_IT_ARRIVES = Options(16, 64, 16)
FIXTURES = Path(__file__).resolve().parent.parent / "fixtures"


@pytest.fixture(scope="module")
def source() -> Source:
    return FolderSource(FIXTURES / "fused")


@pytest.fixture
def out(source: Source, tmp_path: Path) -> Path:
    return convert_mixed(source, tmp_path / "out")


def test_with_a_source_the_part_and_the_row_are_known(out: Path, source: Source) -> None:
    layer = open_container(out).index.layout.layers[1]
    assert layer is not None
    for part in layer.record.parts:
        for array in part.arrays:
            row_bytes = array.nbytes // array.shape[0]
            with flipped(out / layer.file, 2 * layer.record.record_bytes + array.offset + 5 * row_bytes, 1):
                result = verify_container(out, source)
            assert result.num_damage == 2
            found = result.damage[1]
            assert (found.layer, found.expert, found.part, found.array, found.row) == (1, 2, part.name, array.name, 5)
            assert "of the source gives in affine bits 4" in found.message


@pytest.mark.parametrize(
    ("case", "options"),
    [
        (deepseek_tiny.CASES["deepseek_v3_mlx"], Options(4, 32, 8)),
        *((case, AS_IT_ARRIVES) for name, case in deepseek_v41_tiny.CASES.items() if "mlx" in name),
        *((case, AS_IT_ARRIVES) for name, case in muse_spark_tiny.CASES.items() if "mlx" in name),
    ],
)
def test_a_checkpoint_of_mlx_in_other_parts_is_its_containers_source(
    case: TinyCheckpoint, options: Options, tmp_path: Path
) -> None:
    write_checkpoint(tmp_path / "source", case.tensors(), case.config)
    source = FolderSource(tmp_path / "source")
    convert(prepare(source, options), tmp_path / "out")
    result = verify_container(tmp_path / "out", source)
    assert result.sound
    assert options != AS_IT_ARRIVES or {found.exact for found in result.comparisons} == {True}


def test_wrong_weights_with_right_checksums_are_found(out: Path, source: Source) -> None:
    """A converter with a bug signs what it writes; only the source can tell."""
    index = open_container(out).index
    layer = index.layout.layers[0]
    assert layer is not None
    records = np.fromfile(out / layer.file, np.uint8).reshape(layer.num_experts, -1)
    records[[0, 1]] = records[[1, 0]]
    records.tofile(out / layer.file)
    checksums = tuple(xxh3_64(record) for record in records)
    hashes = {**index.data_files, layer.file: blake3(records.tobytes()).hexdigest()}
    changed = replace(index, data_files=hashes, record_checksums={**index.record_checksums, 0: checksums})
    (out / INDEX_FILE).write_bytes(index_to_bytes(changed))
    assert verify_container(out).sound
    result = verify_container(out, source)
    assert [(d.layer, d.expert, d.part) for d in result.damage] == [
        (0, expert, part) for expert in (0, 1) for part in ("gate", "up", "down")
    ]


def test_a_plain_tensor_must_be_exactly_equal(tmp_path: Path, source: Source) -> None:
    convert(prepare(source, Options(16, 64, 16)), tmp_path / "out")
    layout = open_container(tmp_path / "out").index.layout
    tensor = layout.tensors["norm"]
    with flipped(tmp_path / "out" / "resident.bin", tensor.offset + tensor.arrays[0].offset, 1):
        result = verify_container(tmp_path / "out", source)
    assert [damage.tensor for damage in result.damage] == ["norm", "norm"]
    assert [c.exact for c in result.comparisons if c.encoding == "bf16"] == [False]


def test_a_scale_that_is_not_finite_is_damage_and_no_number(out: Path, source: Source) -> None:
    layer = open_container(out).index.layout.layers[0]
    assert layer is not None
    scales = layer.record.parts[0].arrays[1]
    write_at(out / layer.file, scales.offset, b"\x80\x7f")
    result = verify_container(out, source)
    assert result.damage[1].array == "scales"
    comparison = next(c for c in result.comparisons if c.encoding.startswith("affine bits 4"))
    assert comparison.max_abs_error is None
    assert comparison.relative_rms_error is None


def test_a_missing_or_cut_file_is_reported_once(out: Path, source: Source) -> None:
    (out / "experts" / "layer-000.bin").unlink()
    os.truncate(out / "resident.bin", 16384)
    lines = [str(damage) for damage in verify_container(out, source).damage]
    assert len(lines) == 3
    assert sum("layer-000.bin" in line for line in lines) == 1


def test_another_model_as_source_is_refused(out: Path) -> None:
    demo = Path(__file__).resolve().parents[2] / "repack" / "demo"
    with pytest.raises(FormatError, match=r"the source's .* is .*, but the container's is"):
        verify_container(out, FolderSource(demo))


# ---- samples of experts


def test_a_sample_of_experts_is_compared_and_nothing_else(tmp_path: Path) -> None:
    folder = write_random(tmp_path / "source", SMALL, shapes(SMALL))
    convert(prepare(FolderSource(folder), Options()), tmp_path / "out")
    source = FolderSource(folder)
    layout = open_container(tmp_path / "out").index.layout
    sample = choose_experts(layout, 3)
    assert len(sample) == 3
    seen: list[int] = []
    result = verify_container(tmp_path / "out", source, lambda nbytes, what: seen.append(nbytes), sample)
    assert result.sound
    assert [(found.tensors, found.exact) for found in result.comparisons] == [(9, False)]
    assert sum(seen) == verify_bytes(tmp_path / "out", source, sample)
    assert choose_experts(layout, 1000) == frozenset((i, e) for i in range(2) for e in range(5))
