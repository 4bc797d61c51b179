"""`repack verify`: a sound container is sound, and damage anywhere is found and has the right name."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from formats.checksum import sha256, xxh3_64
from formats.container import CONVERTING_FILE, Container, open_container
from formats.errors import ChecksumError, FormatError, StreamingExpertsError
from formats.index import INDEX_FILE, FileChecksum, index_to_bytes
from repack.convert import convert, prepare
from repack.findings import MAX_DAMAGE, Verification
from repack.plan import Options
from repack.sources.base import Source
from repack.sources.folder import FolderSource
from repack.verify import verify_bytes, verify_container
from tests.containers import write_container
from tests.repack.damage import convert_mixed, flipped, write_at

FIXTURES = Path(__file__).resolve().parent.parent / "fixtures"


@pytest.fixture(scope="module")
def source() -> Source:
    return FolderSource(FIXTURES / "fused")


@pytest.fixture(scope="module")
def pristine(source: Source, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A converted checkpoint that no test changes for good."""
    folder = tmp_path_factory.mktemp("pristine") / "out"
    return convert_mixed(source, folder)


@pytest.fixture
def out(pristine: Path, tmp_path: Path) -> Path:
    """A converted checkpoint of the test's own."""
    return shutil.copytree(pristine, tmp_path / "out")


def only(result: Verification) -> str:
    assert result.num_damage == 1, [str(damage) for damage in result.damage]
    assert not result.sound
    return str(result.damage[0])


# ---- sound containers


@pytest.mark.parametrize("name", ["fused", "per_expert"])
@pytest.mark.parametrize("options", [Options(16, 64, 16), Options(8, 64, 4), Options(4, 32, 8)])
def test_what_convert_writes_is_sound_and_equals_its_source(tmp_path: Path, name: str, options: Options) -> None:
    source = FolderSource(FIXTURES / name)
    convert(prepare(source, options), tmp_path / "out")
    result = verify_container(tmp_path / "out", source)
    assert result.sound
    assert not result.damage
    assert not result.notes
    by_encoding = {comparison.encoding: comparison for comparison in result.comparisons}
    for encoding, comparison in by_encoding.items():
        assert comparison.exact == (not encoding.startswith("affine"))
        assert comparison.max_abs_error is not None
        assert comparison.relative_rms_error is not None
        assert (comparison.max_abs_error == 0) == (comparison.relative_rms_error == 0) == comparison.exact
    assert any(encoding.startswith("affine") for encoding in by_encoding) == (options.bits < 16)
    layout = open_container(tmp_path / "out").index.layout
    stored = sum(layer.num_experts * len(layer.record.parts) for _, layer in layout.moe_layers())
    assert sum(c.tensors for c in result.comparisons) == stored + len(layout.resident) + 1


def test_progress_adds_up_to_what_was_announced(pristine: Path, source: Source) -> None:
    done: list[int] = []
    verify_container(pristine, None, lambda nbytes, what: done.append(nbytes))
    assert sum(done) == verify_bytes(pristine)
    verify_container(pristine, source, lambda nbytes, what: done.append(nbytes))
    assert sum(done) == verify_bytes(pristine) + verify_bytes(pristine, source)


def test_a_container_with_every_kind_of_place_is_sound(tmp_path: Path) -> None:
    write_container(tmp_path)
    result = verify_container(tmp_path)
    assert result.sound
    assert result.files == 1 + 2 + 2 + 3


def test_errors_are_measured_as_defined(pristine: Path, source: Source) -> None:
    found = {c.encoding: c for c in verify_container(pristine, source).comparisons}
    layout = open_container(pristine).index.layout
    tensors = [t for t in layout.resident if t.encoding.id == "affine"]
    resident = np.fromfile(pristine / "resident.bin", np.uint8)
    reference = {}
    for name, shard in ((n, t.file) for n, t in source.tensors.items()):
        entry = source.tensors[name]
        raw = np.fromfile(FIXTURES / "fused" / shard, np.uint8, entry.nbytes, offset=entry.offset)
        if entry.dtype == "BF16":
            reference[name] = (raw.view("<u2").astype(np.uint32) << 16).view(np.float32).reshape(entry.shape)
    errors, values = [], []
    for tensor in tensors:
        (name,) = (n for n in reference if n.endswith(f"{tensor.name}.weight") and "mtp." not in n)
        views = {array.name: array.view(resident, tensor.offset) for array in tensor.arrays}
        errors.append(tensor.encoding.decode(views).ravel() - reference[name].ravel())
        values.append(reference[name].ravel())
    table = np.fromfile(pristine / "embedding.bin", np.uint8)[: layout.embedding.rows * layout.embedding.row_bytes]
    rows = layout.embedding.encoding.decode(layout.embedding.views(table.reshape(layout.embedding.rows, -1)))
    (embedding,) = (values for name, values in reference.items() if name.endswith("embed_tokens.weight"))
    errors.append((rows - embedding).ravel())
    values.append(embedding.ravel())
    error, value = (np.concatenate(parts).astype(np.float64) for parts in (errors, values))
    comparison = found["affine bits 8, group_size 64, scale_dtype bf16"]
    assert comparison.tensors == len(tensors) + 1
    assert comparison.weights == error.size
    assert comparison.max_abs_error == pytest.approx(np.abs(error).max())
    assert comparison.relative_rms_error == pytest.approx(np.sqrt((error**2).mean() / (value**2).mean()))


# ---- damage anywhere


def expected_place(opened: Container, name: str, offset: int) -> dict[str, object]:
    """What must be named for a damaged byte of a data file."""
    layout = opened.index.layout
    if name == "embedding.bin":
        row = offset // layout.embedding.row_bytes
        return {"row": row} if row < layout.embedding.rows else {"row": None}
    if name == "resident.bin":
        return {"tensor": next(t.name for t in layout.resident if offset < t.offset + t.nbytes)}
    for i, layer in layout.moe_layers():
        if layer.file == name:
            return {"layer": i, "expert": offset // layer.record.record_bytes}
    return {}


@settings(max_examples=150)
@given(data=st.data())
def test_any_flipped_byte_of_any_file_is_found_in_its_place(data: st.DataObject, pristine: Path) -> None:
    opened = open_container(pristine)
    names = sorted([INDEX_FILE, *opened.index.files, *opened.index.data_files])
    name = data.draw(st.sampled_from(names))
    offset = data.draw(st.integers(0, (pristine / name).stat().st_size - 1))
    with flipped(pristine / name, offset, data.draw(st.integers(1, 255))):
        if name == INDEX_FILE:
            with pytest.raises(StreamingExpertsError, match=INDEX_FILE):
                verify_container(pristine)
            return
        result = verify_container(pristine)
    assert not result.sound
    for damage in result.damage:
        assert damage.file == name
        assert expected_place(opened, name, offset).items() <= vars(damage).items()
        assert len(str(damage).splitlines()) == 1


def test_all_damage_is_found_in_one_go(out: Path) -> None:
    opened = open_container(out)
    record_bytes = opened.index.layout.layers[1].record.record_bytes if opened.index.layout.layers[1] else 0
    for name, offset in (
        ("config.json", 5),
        ("embedding.bin", 0),
        ("resident.bin", 0),
        ("experts/layer-000.bin", 0),
        ("experts/layer-001.bin", 0),
        ("experts/layer-001.bin", record_bytes),
    ):
        raw = (out / name).read_bytes()
        write_at(out / name, offset, bytes([raw[offset] ^ 1]))
    result = verify_container(out)
    assert result.num_damage == 6
    assert [(d.file, d.layer, d.expert, d.tensor, d.row) for d in result.damage] == [
        ("config.json", None, None, None, None),
        ("embedding.bin", None, None, None, 0),
        ("resident.bin", None, None, opened.index.layout.resident[0].name, None),
        ("experts/layer-000.bin", 0, 0, None, None),
        ("experts/layer-001.bin", 1, 0, None, None),
        ("experts/layer-001.bin", 1, 1, None, None),
    ]


def test_a_long_list_is_cut_but_counted(out: Path) -> None:
    embedding = open_container(out).index.layout.embedding
    (out / "embedding.bin").write_bytes(b"\1" * embedding.nbytes)
    result = verify_container(out)
    assert len(result.damage) == MAX_DAMAGE
    assert result.num_damage > embedding.rows


def test_padding_inside_a_record_names_part_and_array(tmp_path: Path) -> None:
    index = write_container(tmp_path)
    layer = index.layout.layers[0]
    assert layer is not None
    last = layer.record.parts[-1].arrays[-1]
    write_at(tmp_path / layer.file, layer.record.record_bytes + last.offset + last.nbytes, b"\1")
    result = verify_container(tmp_path)
    first = result.damage[0]
    assert (first.layer, first.expert, first.part, first.array) == (0, 1, "down", "linear_bias")
    assert "is not zero" in first.message
    assert "checksum is" in result.damage[1].message


def test_padding_that_a_bad_writer_has_signed_is_found(tmp_path: Path) -> None:
    index = write_container(tmp_path)
    tensor = index.layout.resident[0]
    end = tensor.arrays[-1].offset + tensor.arrays[-1].nbytes
    write_at(tmp_path / "resident.bin", tensor.offset + end, b"\1")
    content = np.fromfile(tmp_path / "resident.bin", np.uint8)[tensor.offset :][: tensor.nbytes]
    checksums = {**index.block_checksums, tensor.name: (xxh3_64(content),)}
    (tmp_path / INDEX_FILE).write_bytes(index_to_bytes(replace(index, block_checksums=checksums)))
    line = only(verify_container(tmp_path))
    assert (
        line == f"resident.bin: tensor {tensor.name}, array weight: padding between bytes {end} and 16384 is not zero"
    )


def test_padding_of_embedding_rows_and_after_them_is_checked(tmp_path: Path) -> None:
    index = write_container(tmp_path)
    embedding = index.layout.embedding
    write_at(tmp_path / "embedding.bin", 3 * embedding.row_bytes + embedding.checksum_offset + 8, b"\1")
    assert "row 3: padding between bytes" in only(verify_container(tmp_path))
    write_at(tmp_path / "embedding.bin", 3 * embedding.row_bytes + embedding.checksum_offset + 8, b"\0")
    write_at(tmp_path / "embedding.bin", embedding.nbytes - 1, b"\1")
    assert only(verify_container(tmp_path)) == "embedding.bin: padding after the last row is not zero"


def test_a_block_of_a_large_tensor_is_named_by_its_bytes(tmp_path: Path) -> None:
    index = write_container(tmp_path)
    tensor = index.layout.tensors["lm_head"]
    write_at(tmp_path / "resident.bin", tensor.offset + (2 << 20), b"\1\2\3\4")
    line = only(verify_container(tmp_path))
    assert line.startswith(f"resident.bin: tensor lm_head: bytes 2097152 to {tensor.nbytes} of it: checksum is")


def test_a_file_hash_that_is_wrong_alone_is_found(tmp_path: Path) -> None:
    index = write_container(tmp_path)
    hashes = {**index.data_files, "resident.bin": "0" * 64}
    (tmp_path / INDEX_FILE).write_bytes(index_to_bytes(replace(index, data_files=hashes)))
    assert f"resident.bin: has blake3 {index.data_files['resident.bin']}, expected 000" in only(
        verify_container(tmp_path)
    )


def test_a_container_from_before_blake3_has_sha256(tmp_path: Path) -> None:
    index = write_container(tmp_path)
    hashes = {name: sha256((tmp_path / name).read_bytes()) for name in index.data_files}
    older = replace(index, required_features=(), data_files=hashes)
    (tmp_path / INDEX_FILE).write_bytes(index_to_bytes(older))
    assert open_container(tmp_path).index == older
    assert verify_container(tmp_path).sound
    wrong = {**hashes, "resident.bin": "0" * 64}
    (tmp_path / INDEX_FILE).write_bytes(index_to_bytes(replace(older, data_files=wrong)))
    assert f"resident.bin: has sha256 {hashes['resident.bin']}, expected 000" in only(verify_container(tmp_path))


@pytest.mark.parametrize("name", ["tokenizer.json", "resident.bin", "experts/layer-003.bin"])
def test_missing_files_and_links_out_are_damage(tmp_path: Path, name: str) -> None:
    out = tmp_path / "out"
    write_container(out)
    (out / name).rename(tmp_path / "outside")
    assert only(verify_container(out)) == f"{name}: is missing or no file, but index.json names it"
    (out / name).symlink_to(tmp_path / "outside")
    assert f"{name}: leads out of the folder" in only(verify_container(out))


def test_a_cut_file_names_the_first_expert_that_is_cut(tmp_path: Path) -> None:
    index = write_container(tmp_path)
    layer = index.layout.layers[3]
    assert layer is not None
    os.truncate(tmp_path / layer.file, layer.nbytes - 1)
    result = verify_container(tmp_path)
    assert [str(damage) for damage in result.damage] == [
        f"experts/layer-003.bin: is {layer.nbytes - 1} bytes long, expected {layer.nbytes}",
        "experts/layer-003.bin: layer 3, expert 2: is cut off, with all that follows",
    ]


def test_a_cut_embedding_names_the_first_row_that_is_cut(tmp_path: Path) -> None:
    index = write_container(tmp_path)
    os.truncate(tmp_path / "embedding.bin", 10)
    lines = [str(damage) for damage in verify_container(tmp_path).damage]
    assert lines == [
        f"embedding.bin: is 10 bytes long, expected {index.layout.embedding.nbytes}",
        "embedding.bin: row 0: is cut off, with all that follows",
    ]


def test_a_file_that_is_too_long_is_damage(tmp_path: Path) -> None:
    write_container(tmp_path)
    with (tmp_path / "experts" / "layer-000.bin").open("ab") as file:
        file.write(bytes(16384))
    assert "experts/layer-000.bin: is " in only(verify_container(tmp_path))


def test_a_config_of_another_model_is_damage(out: Path) -> None:
    index = open_container(out).index
    config = json.loads((out / "config.json").read_bytes())
    (config.get("text_config") or config)["rms_norm_eps"] = 0.5
    raw = json.dumps(config).encode()
    (out / "config.json").write_bytes(raw)
    checksum = FileChecksum(len(raw), sha256(raw))
    files = {**index.files, "config.json": checksum}
    (out / INDEX_FILE).write_bytes(index_to_bytes(replace(index, files=files)))
    assert only(verify_container(out)) == "config.json: describes another model than index.json"


def test_files_that_the_index_does_not_name_are_notes(out: Path) -> None:
    for name in (CONVERTING_FILE, "experts/layer-000.bin.partial", "notes.txt"):
        (out / name).write_text("x")
    result = verify_container(out)
    assert result.sound
    assert [note.partition(":")[0] for note in result.notes] == [
        CONVERTING_FILE,
        "notes.txt",
        "experts/layer-000.bin.partial",
    ]


def test_a_damaged_index_is_refused_and_nothing_else_is_judged(out: Path) -> None:
    with flipped(out / INDEX_FILE, 1000), pytest.raises((ChecksumError, FormatError), match=INDEX_FILE):
        verify_container(out)
