"""A checkpoint in a folder: found, checked, read by position, and refused by name when it is not sound."""

import json
import os
import pickle
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from formats.errors import FormatError, RequestError, StorageError, StreamingExpertsError, UnsupportedError
from repack.sources import is_repository, open_local
from repack.sources.base import Reader
from repack.sources.folder import FolderSource
from repack.sources.shards import SAFETENSORS_INDEX
from tests.repack.checkpoints import SMALL, shapes, write_random, write_shard

SHARD1, SHARD2 = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
HEAD = "lm_head.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_random(tmp_path / "source", SMALL, shapes(SMALL), shards=2)


def refusal(kind: type[StreamingExpertsError], line: str) -> "pytest.RaisesExc[StreamingExpertsError]":
    return pytest.raises(kind, match=re.escape(line))


def read(source: FolderSource, name: str, reader: Reader | None = None) -> bytes:
    tensor = source.tensors[name]
    buffer = bytearray(tensor.nbytes)
    with reader or source.reader() as opened:
        opened.read_into(tensor.file, tensor.offset, memoryview(buffer))
    return bytes(buffer)


def edit_weight_map(folder: Path, **changes: object) -> None:
    path = folder / SAFETENSORS_INDEX
    listing = json.loads(path.read_text())
    listing["weight_map"] |= changes
    path.write_text(json.dumps(listing))


def test_tensors_of_all_shards_are_found_and_read(folder: Path) -> None:
    source = FolderSource(folder)
    assert source.tensors.keys() == shapes(SMALL).keys()
    assert [shard.name for shard in source.shards] == [SHARD1, SHARD2]
    raw = read(source, HEAD)
    tensor = source.tensors[HEAD]
    assert raw == (folder / tensor.file).read_bytes()[tensor.offset : tensor.offset + tensor.nbytes]


def test_without_an_index_all_model_shards_are_read(folder: Path) -> None:
    (folder / SAFETENSORS_INDEX).unlink()
    assert FolderSource(folder).tensors.keys() == shapes(SMALL).keys()


def test_shards_may_be_symbolic_links(folder: Path, tmp_path: Path) -> None:
    before = read(FolderSource(folder), HEAD)
    (folder / SHARD1).rename(tmp_path / "blob")
    (folder / SHARD1).symlink_to(tmp_path / "blob")
    source = FolderSource(folder)
    assert read(source, HEAD) == before
    source.check()


def test_a_reader_travels_to_another_process(folder: Path) -> None:
    source = FolderSource(folder)
    assert read(source, HEAD, pickle.loads(pickle.dumps(source.reader()))) == read(source, HEAD)


def test_a_missing_shard_is_named(folder: Path) -> None:
    (folder / SHARD2).unlink()
    with refusal(FormatError, f"{SAFETENSORS_INDEX}: weight_map names {SHARD2}, which is missing"):
        FolderSource(folder)


def test_a_tensor_that_is_not_in_its_shard_is_named(folder: Path) -> None:
    edit_weight_map(folder, absent=SHARD1)
    with refusal(FormatError, f"weight_map puts absent into {SHARD1}, which does not hold it"):
        FolderSource(folder)


def test_a_tensor_of_another_shard_is_named(folder: Path) -> None:
    edit_weight_map(folder, **{HEAD: SHARD2})
    with refusal(FormatError, f"weight_map puts {HEAD} into {SHARD2}, which does not hold it"):
        FolderSource(folder)


@pytest.mark.parametrize(
    "name", ["../evil.safetensors", "/etc/passwd", "a/b.safetensors", ".hidden", "", 7, None, "x" * 256, "\x1b[2J"]
)
def test_a_shard_outside_the_folder_is_refused(folder: Path, name: object) -> None:
    edit_weight_map(folder, evil=name)
    with refusal(FormatError, "weight_map puts evil into"):
        FolderSource(folder)


@pytest.mark.parametrize("content", ["[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', "{", '{"weight_map": 1}'])
def test_an_index_that_is_none_is_refused(folder: Path, content: str) -> None:
    (folder / SAFETENSORS_INDEX).write_text(content)
    with refusal(FormatError, SAFETENSORS_INDEX):
        FolderSource(folder)


def test_a_shard_that_no_terminal_can_show_is_refused(folder: Path) -> None:
    (folder / SAFETENSORS_INDEX).unlink()
    (folder / SHARD1).rename(folder / "model\x1b[2J.safetensors")
    with refusal(FormatError, "holds 'model\\x1b[2J.safetensors', expected a name that can be printed"):
        FolderSource(folder)


def test_a_tensor_in_two_shards_is_refused(folder: Path) -> None:
    (folder / SAFETENSORS_INDEX).unlink()
    write_shard(folder / "model-extra.safetensors", {HEAD: ("BF16", (1,))})
    with refusal(FormatError, f"model-extra.safetensors: {HEAD} stands in {SHARD1} as well"):
        FolderSource(folder)


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_a_cut_shard_is_refused_when_it_is_opened(folder: Path, keep: int) -> None:
    raw = (folder / SHARD2).read_bytes()
    (folder / SHARD2).write_bytes(raw[:keep])
    with refusal(FormatError, f"{SHARD2}: "):
        FolderSource(folder)


def test_a_shard_that_is_cut_later_is_named(folder: Path) -> None:
    source = FolderSource(folder)
    os.truncate(folder / SHARD1, 5000)
    with refusal(StorageError, f"{SHARD1}: is 5000 bytes long, it was "):
        read(source, HEAD)
    with refusal(StorageError, f"{SHARD1}: is 5000 bytes long, it was "):
        source.check()


def test_a_shard_that_is_cut_between_two_reads_is_named(folder: Path) -> None:
    source = FolderSource(folder)
    tensor = source.tensors[HEAD]
    with refusal(StorageError, f"{SHARD1}: ends at byte "), source.reader() as reader:
        reader.read_into(tensor.file, tensor.offset, memoryview(bytearray(10)))
        os.truncate(folder / SHARD1, tensor.offset + 20)
        reader.read_into(tensor.file, tensor.offset, memoryview(bytearray(tensor.nbytes)))


def test_a_shard_that_is_changed_while_it_is_read_is_named(folder: Path) -> None:
    source = FolderSource(folder)
    tensor = source.tensors[HEAD]
    with refusal(StorageError, f"{SHARD1}: was changed or replaced"), source.reader() as reader:
        reader.read_into(tensor.file, tensor.offset, memoryview(bytearray(10)))
        os.utime(folder / SHARD1, ns=(1, 1))


def test_a_shard_that_is_replaced_by_its_like_is_named(folder: Path) -> None:
    source = FolderSource(folder)
    copy = folder / "copy"
    copy.write_bytes((folder / SHARD1).read_bytes())
    status = (folder / SHARD1).stat()
    os.utime(copy, ns=(status.st_atime_ns, status.st_mtime_ns))
    copy.rename(folder / SHARD1)
    with refusal(StorageError, f"{SHARD1}: was changed or replaced"):
        source.check()


def test_a_shard_that_vanishes_is_named(folder: Path) -> None:
    source = FolderSource(folder)
    (folder / SHARD1).unlink()
    with refusal(StorageError, f"{SHARD1}: cannot be read: No such file"):
        read(source, HEAD)
    with refusal(StorageError, f"{SHARD1}: cannot be read: No such file"):
        source.check()


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("pytorch_model.bin", "holds PyTorch .bin files only, expected model*.safetensors"),
        ("consolidated.00.pth", "holds PyTorch files only, expected model*.safetensors"),
        ("x.gguf", "a GGUF file is given itself: {}/x.gguf"),
        ("index.json", "is a container already, or one being made"),
        ("converting.json", "is a container already, or one being made"),
    ],
)
def test_a_folder_without_safetensors_says_what_it_holds(tmp_path: Path, name: str, said: str) -> None:
    (tmp_path / name).write_bytes(b"")
    with refusal(UnsupportedError, said.format(tmp_path)):
        FolderSource(tmp_path)


@pytest.mark.parametrize("name", [SHARD1, SAFETENSORS_INDEX, "config.json"])
@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo])
def test_a_folder_or_pipe_in_place_of_a_file_is_refused(folder: Path, name: str, make: Callable[[Path], None]) -> None:
    (folder / SAFETENSORS_INDEX).unlink()  # which names no shard that is no file
    (folder / name).unlink(missing_ok=True)
    make(folder / name)
    with refusal(FormatError, f"{name}: is no regular file"):
        FolderSource(folder).small_file(name)


def test_a_container_is_no_checkpoint_to_convert(tmp_path: Path) -> None:
    for name in ("resident.bin", "embedding.bin", "index.json"):
        (tmp_path / name).write_bytes(b"")
    with refusal(UnsupportedError, "is a container already"):
        FolderSource(tmp_path)


def test_an_empty_folder_is_no_checkpoint(tmp_path: Path) -> None:
    with refusal(FormatError, "holds no model*.safetensors, so it is no checkpoint"):
        FolderSource(tmp_path)


# ---- how SOURCE names one


def test_demo_is_the_embedded_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert "lm_head.weight" in open_local("demo").tensors
    (tmp_path / "demo").mkdir()
    assert "lm_head.weight" in open_local("demo").tensors
    with refusal(FormatError, "demo: holds no model*.safetensors"):
        open_local("./demo")


def test_org_and_name_is_a_repository_unless_it_is_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert is_repository("Qwen/Qwen3.5-397B-A17B")
    for name in ("demo", "name", "a/b/c", "/a/b", "./a", "../a", "a/", "~/model"):
        assert not is_repository(name)
    Path("Qwen/Qwen3.5-397B-A17B").mkdir(parents=True)
    assert not is_repository("Qwen/Qwen3.5-397B-A17B")


def test_a_name_that_is_neither_is_refused(tmp_path: Path) -> None:
    with refusal(RequestError, "absent: no such file or folder, and a repository on the hub is named org/name"):
        open_local("absent")
    with refusal(RequestError, "org/absent: is no folder; a repository is not fetched for this"):
        open_local("org/absent")
    (tmp_path / "x.bin").write_bytes(b"")
    with refusal(UnsupportedError, "x.bin: is a file, expected one of .gguf or a folder"):
        open_local(str(tmp_path / "x.bin"))
