"""Conversion end to end: what is in the container is what the source encodes to, whatever the way it was made."""

import re
from concurrent.futures import ProcessPoolExecutor
from hashlib import sha256
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from blake3 import blake3

from formats.container import open_container
from formats.dtypes import Float32, to_float32
from formats.errors import FormatError, StorageError
from formats.record import decode_part
from repack import encode
from repack.convert import convert, prepare
from repack.plan import Options
from repack.sources import demo_folder
from repack.sources.folder import FolderSource
from tests.repack.checkpoints import PREFIX, SMALL, read_tree, shapes, write_random, write_shard

FIXTURES = Path(__file__).parent.parent / "fixtures"
DTYPES = {"BF16": ("bf16", "<u2"), "F16": ("f16", "<f2"), "F32": ("f32", "<f4")}


def tensor_of(source: FolderSource, name: str) -> Float32:
    """A tensor of the source as float32, read past the code under test."""
    tensor = source.tensors[name]
    raw = (source.folder / tensor.file).read_bytes()[tensor.offset :][: tensor.nbytes]
    dtype, storage = DTYPES[tensor.dtype]
    return to_float32(np.frombuffer(raw, storage).reshape(tensor.shape), dtype)


def run(folder: Path, out: Path, options: Options | None = None, **more: Any) -> dict[str, bytes]:
    convert(prepare(FolderSource(folder), options or Options()), out, **more)
    return read_tree(out)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random(tmp_path_factory.mktemp("source"), SMALL, shapes(SMALL), shards=2)


# ---- content


@pytest.mark.parametrize("options", [Options(4, 64, 8), Options(8, 32, 4), Options(16, 64, 16)], ids=str)
def test_every_matrix_is_what_the_source_encodes_to(tmp_path: Path, options: Options) -> None:
    source = FolderSource(demo_folder())
    convert(prepare(source, options), tmp_path / "out")
    container = open_container(tmp_path / "out")
    layout = container.index.layout

    def same(found: Float32, original: Float32, encoding: Any) -> bool:
        return np.array_equal(found, encoding.decode(encoding.encode(original)))

    for i, layer in layout.moe_layers():
        records = np.fromfile(container.data_path(layer.file), np.uint8).reshape(layer.num_experts, -1)
        gate_up = tensor_of(source, f"{PREFIX}layers.{i}.mlp.experts.gate_up_proj")
        down = tensor_of(source, f"{PREFIX}layers.{i}.mlp.experts.down_proj")
        for expert, record in enumerate(records):
            originals = (gate_up[expert, :64], gate_up[expert, 64:], down[expert])
            for part, original in zip(layer.record.parts, originals, strict=True):
                assert same(decode_part(part, record)[0], original, part.encoding)
    resident = np.fromfile(container.data_path("resident.bin"), np.uint8)
    for tensor in layout.resident:
        names = (f"{prefix}{tensor.name}{suffix}" for prefix in ("", PREFIX) for suffix in ("", ".weight"))
        original = tensor_of(source, next(name for name in names if name in source.tensors))
        arrays = {array.name: array.view(resident, tensor.offset) for array in tensor.arrays}
        assert same(tensor.encoding.decode(arrays), original.reshape(-1, original.shape[-1]), tensor.encoding)
    embedding = layout.embedding
    raw = np.fromfile(container.data_path("embedding.bin"), np.uint8)
    rows = raw[: embedding.rows * embedding.row_bytes].reshape(embedding.rows, -1)
    for n, row in enumerate(rows):
        embedding.check(n, row)
    original = tensor_of(source, f"{PREFIX}embed_tokens.weight")
    assert same(embedding.encoding.decode(embedding.views(rows)), original, embedding.encoding)


def test_small_files_are_copied_and_stated(tmp_path: Path) -> None:
    files = run(demo_folder(), tmp_path / "out")
    container = open_container(tmp_path / "out")
    assert container.small_files().keys() == {
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    for name, raw in container.small_files().items():
        assert raw == files[name] == (demo_folder() / name).read_bytes()


def test_checksums_of_the_index_are_those_of_the_files(tmp_path: Path, folder: Path) -> None:
    files = run(folder, tmp_path / "out")
    index = open_container(tmp_path / "out").index
    for name, digest in index.data_files.items():
        assert blake3(files[name]).hexdigest() == digest


def test_fused_and_per_expert_sources_give_the_same_records(tmp_path: Path) -> None:
    fused = run(FIXTURES / "fused", tmp_path / "fused")
    separate = run(FIXTURES / "per_expert", tmp_path / "per_expert")
    records = [name for name in fused if name.startswith("experts/")]
    assert records
    assert {name: fused[name] for name in records} == {name: separate[name] for name in records}


def test_a_tied_lm_head_is_written_from_the_embedding(tmp_path: Path) -> None:
    listing = shapes(SMALL)
    del listing["lm_head.weight"]
    folder = write_random(tmp_path / "source", SMALL, listing, tie_word_embeddings=True)
    run(folder, tmp_path / "out", Options(resident_bits=16))
    container = open_container(tmp_path / "out")
    tensor = container.index.layout.tensors["lm_head"]
    resident = np.fromfile(container.data_path("resident.bin"), np.uint8)
    found = tensor.encoding.decode({array.name: array.view(resident, tensor.offset) for array in tensor.arrays})
    assert np.array_equal(found, tensor_of(FolderSource(folder), f"{PREFIX}embed_tokens.weight"))


# ---- the same bytes, whatever the way


def test_the_number_of_jobs_does_not_change_a_byte(tmp_path: Path, folder: Path) -> None:
    assert run(folder, tmp_path / "one", jobs=1) == run(folder, tmp_path / "three", jobs=3)


@pytest.mark.parametrize("row_block_bytes", [1, 1000, 1 << 30])
def test_the_size_of_row_blocks_does_not_change_a_byte(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, row_block_bytes: int
) -> None:
    before = run(folder, tmp_path / "before")
    monkeypatch.setattr(encode, "ROW_BLOCK_BYTES", row_block_bytes)
    assert run(folder, tmp_path / "after", jobs=1) == before


def test_workers_in_other_processes_write_the_same_bytes(tmp_path: Path, folder: Path) -> None:
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as workers:
        elsewhere = run(folder, tmp_path / "elsewhere", executor=workers)
    assert elsewhere == run(folder, tmp_path / "here")


def test_place_and_time_of_the_source_are_not_in_the_container(tmp_path: Path) -> None:
    trees = []
    for name in ("first", "second"):
        folder = write_random(tmp_path / name, SMALL, shapes(SMALL))
        trees.append(run(folder, tmp_path / f"{name}-out"))
    assert trees[0] == trees[1]
    assert str(tmp_path).encode() not in trees[0]["index.json"]


# ---- what the index says of the source


def test_source_files_are_hashed_here(tmp_path: Path, folder: Path) -> None:
    run(folder, tmp_path / "out")
    source = open_container(tmp_path / "out").index.source
    assert (source.repository, source.revision) == (None, None)
    assert [(file.name, file.proof) for file in source.files] == [
        ("model-00001-of-00002.safetensors", "computed"),
        ("model-00002-of-00002.safetensors", "computed"),
    ]
    for file in source.files:
        raw = (folder / file.name).read_bytes()
        assert (file.nbytes, file.sha256) == (len(raw), sha256(raw).hexdigest())


def test_without_hashing_nothing_is_proven(tmp_path: Path, folder: Path) -> None:
    run(folder, tmp_path / "out", hash_source=False)
    files = open_container(tmp_path / "out").index.source.files
    assert {(file.sha256, file.proof) for file in files} == {(None, "none")}


def from_the_hub(folder: Path, sha256: dict[str, str]) -> FolderSource:
    return FolderSource(folder, repository="org/name", revision="0" * 40, sha256=sha256)


def test_what_the_hub_states_of_whole_files_is_checked(tmp_path: Path, folder: Path) -> None:
    name = "model-00001-of-00002.safetensors"
    right = sha256((folder / name).read_bytes()).hexdigest()
    convert(prepare(from_the_hub(folder, {name: right}), Options()), tmp_path / "out")
    found = open_container(tmp_path / "out").index.source
    assert (found.repository, found.revision) == ("org/name", "0" * 40)
    assert [file.proof for file in found.files] == ["computed", "computed"]
    with pytest.raises(FormatError, match=rf"{name}: has SHA-256 {right}, but the hub states aaaa"):
        convert(prepare(from_the_hub(folder, {name: "a" * 64}), Options()), tmp_path / "other")


def test_what_the_hub_states_and_nobody_checks_is_called_so(tmp_path: Path, folder: Path) -> None:
    source = from_the_hub(folder, {"model-00001-of-00002.safetensors": "a" * 64})
    convert(prepare(source, Options()), tmp_path / "out", hash_source=False)
    found = open_container(tmp_path / "out").index.source
    assert [(file.sha256, file.proof) for file in found.files] == [("a" * 64, "stated"), (None, "none")]


def test_a_shard_without_any_needed_tensor_is_no_source_file(tmp_path: Path) -> None:
    folder = write_random(tmp_path / "source", SMALL, shapes(SMALL))
    write_shard(folder / "model-mtp.safetensors", {"mtp.fc.weight": ("BF16", (4, 4))})
    run(folder, tmp_path / "out")
    assert [file.name for file in open_container(tmp_path / "out").index.source.files] == ["model.safetensors"]


# ---- refusals


def poison(folder: Path, name: str, row: int, column: int, bits: int) -> None:
    """Put 16 bits into a matrix of the source."""
    tensor = FolderSource(folder).tensors[name]
    with open(folder / tensor.file, "r+b") as file:
        file.seek(tensor.offset + 2 * (row * tensor.shape[-1] + column))
        file.write(bits.to_bytes(2, "little"))


@pytest.mark.parametrize(
    ("name", "row", "bits", "line"),
    [
        ("mlp.experts.gate_up_proj", 2 * 128 + 64 + 7, 0x7FC0, "holds nan (layer 0 expert 2, row 7, column 5)"),
        ("mlp.experts.down_proj", 4 * 64 + 63, 0xFF80, "holds -inf (layer 0 expert 4, row 63, column 5)"),
        ("mlp.gate.weight", 3, 0x7F81, "holds nan (layers.0.mlp.gate, row 3, column 5)"),
    ],
)
@pytest.mark.parametrize("bits_option", [4, 16])
def test_weights_that_are_not_finite_are_refused_with_their_place(
    tmp_path: Path, name: str, row: int, bits: int, line: str, bits_option: int
) -> None:
    folder = write_random(tmp_path / "source", SMALL, shapes(SMALL))
    poison(folder, f"{PREFIX}layers.0.{name}", row, 5, bits)
    with pytest.raises(FormatError, match=re.escape(f"model.safetensors: {PREFIX}layers.0.{name} {line}")):
        run(folder, tmp_path / "out", Options(bits=bits_option), jobs=1)


def test_a_nan_in_the_embedding_names_its_row(tmp_path: Path) -> None:
    folder = write_random(tmp_path / "source", SMALL, shapes(SMALL))
    poison(folder, f"{PREFIX}embed_tokens.weight", 77, 1, 0x7FC0)
    with pytest.raises(FormatError, match=re.escape("holds nan (embedding, row 77, column 1), expected finite")):
        run(folder, tmp_path / "out", jobs=1)


def test_a_checkpoint_without_a_config_is_refused(tmp_path: Path) -> None:
    folder = write_random(tmp_path / "source", SMALL, shapes(SMALL))
    (folder / "config.json").unlink()
    with pytest.raises(FormatError, match=r"config\.json is missing"):
        run(folder, tmp_path / "out")


def test_a_shard_that_changes_during_the_conversion_gives_no_index(tmp_path: Path) -> None:
    folder = write_random(tmp_path / "source", SMALL, shapes(SMALL))

    def touch(nbytes: int, what: str) -> None:
        (folder / "model.safetensors").touch()

    with pytest.raises(StorageError, match=r"model\.safetensors: was changed or replaced during the conversion"):
        run(folder, tmp_path / "out", progress=touch)
    assert not (tmp_path / "out/index.json").exists()


def test_progress_reports_every_byte_once(tmp_path: Path, folder: Path) -> None:
    conversion = prepare(FolderSource(folder), Options())
    seen: list[tuple[int, str]] = []
    convert(conversion, tmp_path / "out", progress=lambda nbytes, what: seen.append((nbytes, what)))
    assert sum(nbytes for nbytes, _ in seen) == conversion.work_bytes(hash_source=True)
    assert "layer 1 expert 4" in {what for _, what in seen}


def test_weights_too_large_for_a_group_are_refused(tmp_path: Path) -> None:
    folder = write_random(tmp_path / "source", SMALL, shapes(SMALL))
    name = f"{PREFIX}layers.0.mlp.experts.down_proj"
    poison(folder, name, 0, 0, 0x7F7F)  # the largest bf16 and its negative: their distance is no float32
    poison(folder, name, 0, 1, 0xFF7F)
    with pytest.raises(FormatError, match=re.escape(f"{name} has weights that are too large for affine bits 4")):
        run(folder, tmp_path / "out", jobs=1)
