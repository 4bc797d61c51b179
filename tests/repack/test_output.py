"""The output folder: whose it is, who may write it, and that nothing foreign is ever removed."""

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from formats.container import CONVERTING_FILE
from formats.errors import FormatError, RequestError, StorageError, StreamingExpertsError
from repack.convert import convert, prepare
from repack.journal import Journal
from repack.output import begun_revision, check_space, difference, locked
from repack.plan import Options
from repack.sources.folder import FolderSource
from repack.workers import Wanted
from tests.repack.checkpoints import SMALL, read_tree, shapes, write_random


@pytest.fixture
def source(tmp_path: Path) -> FolderSource:
    return FolderSource(write_random(tmp_path / "source", SMALL, shapes(SMALL)))


def run(source: FolderSource, out: Path, options: Options | None = None, **more: Any) -> bool:
    """Convert; whether the container was there already."""
    return convert(prepare(source, options or Options()), out, **more).already_there


def refusal(kind: type[StreamingExpertsError], line: str) -> "pytest.RaisesExc[StreamingExpertsError]":
    return pytest.raises(kind, match=re.escape(line))


class StopError(Exception):
    """What a callback raises to stop a conversion."""


def stop_at_once(nbytes: int, what: str) -> None:
    raise StopError(what)


def start(source: FolderSource, out: Path, options: Options | None = None) -> None:
    """Leave an unfinished conversion."""
    with pytest.raises(StopError):
        convert(prepare(source, options or Options()), out, jobs=1, progress=stop_at_once)
    assert (out / CONVERTING_FILE).exists()
    assert not (out / "index.json").exists()


def test_a_finished_container_holds_nothing_but_itself(source: FolderSource, tmp_path: Path) -> None:
    run(source, tmp_path / "out")
    assert sorted(read_tree(tmp_path / "out")) == [
        "config.json",
        "embedding.bin",
        "experts/layer-000.bin",
        "experts/layer-001.bin",
        "index.json",
        "resident.bin",
    ]


def test_the_same_command_again_finds_it_done(source: FolderSource, tmp_path: Path) -> None:
    assert not run(source, tmp_path / "out")
    index = tmp_path / "out/index.json"

    def written() -> tuple[int, int, int]:
        """Changes with every writing; the time of the last access, which is in stat, too, with reading."""
        status = index.stat()
        return status.st_ino, status.st_mtime_ns, status.st_ctime_ns

    before = written()
    assert run(source, tmp_path / "out")
    assert written() == before


def test_a_finished_container_of_other_options_is_kept_unless_forced(source: FolderSource, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(source, out)
    before = read_tree(out)
    with refusal(RequestError, f"{out}: holds a container with options bits 4, not 8; --force replaces it"):
        run(source, out, Options(bits=8))
    assert read_tree(out) == before
    assert not run(source, out, Options(bits=8), force=True)
    run(source, tmp_path / "fresh", Options(bits=8))
    assert read_tree(out) == read_tree(tmp_path / "fresh")


def test_a_finished_container_of_another_source_is_kept(source: FolderSource, tmp_path: Path) -> None:
    run(source, tmp_path / "out")
    text = SMALL | {"vocab_size": 100}
    other = FolderSource(write_random(tmp_path / "other", text, shapes(text)))
    with refusal(RequestError, "holds a container with source model.safetensors of"):
        run(other, tmp_path / "out")


def test_a_damaged_container_is_kept_unless_forced(source: FolderSource, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(source, out)
    os.truncate(out / "resident.bin", 100)
    with refusal(RequestError, "resident.bin: is 100 bytes long, expected "):
        run(source, out)
    assert not run(source, out, force=True)


def test_an_unfinished_conversion_names_the_option_that_differs(source: FolderSource, tmp_path: Path) -> None:
    out = tmp_path / "out"
    start(source, out)
    with refusal(RequestError, "was begun with options resident_bits 8, not 4; do the same again, or --force"):
        run(source, out, Options(resident_bits=4))
    assert not run(source, out, Options(resident_bits=4), force=True)


def test_an_unfinished_conversion_names_a_source_that_changed(source: FolderSource, tmp_path: Path) -> None:
    start(source, tmp_path / "out")
    os.utime(source.folder / "model.safetensors", ns=(1, 1))
    with refusal(RequestError, "was begun with source files model.safetensors "):
        run(FolderSource(source.folder), tmp_path / "out")


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("name", ["notes.txt", "experts/notes.txt", "resident.bin.bak", "other/x", "experts/layer-0"])
def test_a_folder_with_foreign_files_is_never_touched(
    source: FolderSource, tmp_path: Path, name: str, force: bool
) -> None:
    out = tmp_path / "out"
    run(source, out)
    (out / name).parent.mkdir(exist_ok=True)
    (out / name).write_text("mine")
    before = read_tree(out)
    with refusal(RequestError, f"{out}: holds {name.removesuffix('/x')}, which is no part of a container"):
        run(source, out, Options(bits=8), force=force)
    assert read_tree(out) == before


@pytest.mark.parametrize("force", [False, True])
def test_a_checkpoint_is_never_an_output(source: FolderSource, tmp_path: Path, force: bool) -> None:
    before = read_tree(source.folder)
    with refusal(RequestError, "holds model.safetensors, which is no part of a container"):
        run(source, source.folder, force=force)
    only_config = tmp_path / "only"
    only_config.mkdir()
    (only_config / "config.json").write_text("{}")
    with refusal(RequestError, "holds config.json but no container; choose an empty folder"):
        run(source, only_config, force=force)
    assert read_tree(source.folder) == before
    assert read_tree(only_config) == {"config.json": b"{}"}


@pytest.mark.parametrize("force", [False, True])
def test_an_index_that_is_not_ours_is_kept(source: FolderSource, tmp_path: Path, force: bool) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/index.json").write_text('{"format": "zarr"}')
    with refusal(RequestError, "holds index.json but no container"):
        run(source, tmp_path / "out", force=force)


def test_a_file_is_no_output(source: FolderSource, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("x")
    with refusal(RequestError, "out: is a file, expected a folder to write"):
        run(source, tmp_path / "out")


def test_a_link_to_nowhere_is_no_output(source: FolderSource, tmp_path: Path) -> None:
    (tmp_path / "out").symlink_to("nowhere")
    with refusal(RequestError, f"{tmp_path / 'out'}: is a link to nowhere, which is not there"):
        run(source, tmp_path / "out")


def test_an_empty_folder_and_a_deep_new_one_are_outputs(source: FolderSource, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert not run(source, tmp_path / "empty")
    assert not run(source, tmp_path / "a/b/c")


def test_two_converters_refuse_each_other(source: FolderSource, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with locked(out), refusal(StorageError, f"{out}: another conversion is writing it"):
        run(source, out)
    assert not run(source, out)


def test_a_lock_that_was_torn_at_the_start_begins_anew(source: FolderSource, tmp_path: Path) -> None:
    start(source, tmp_path / "out", Options(bits=8))
    (tmp_path / "out" / CONVERTING_FILE).write_bytes(b"")
    assert not run(source, tmp_path / "out")


HOSTILE = {"lists": b"[" * 100_000, "objects": b'{"a":' * 100_000, "an integer": b'{"a": ' + b"9" * 5000 + b"}"}


@pytest.mark.parametrize("raw", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_lock_that_no_conversion_wrote_is_one_line(source: FolderSource, tmp_path: Path, raw: bytes) -> None:
    out = tmp_path / "out"
    start(source, out)
    (out / CONVERTING_FILE).write_bytes(raw)
    before = read_tree(out)
    with refusal(FormatError, f"{out / CONVERTING_FILE}: is not valid JSON (") as refused:
        run(source, out)
    assert str(refused.value).endswith("); --force begins anew")
    assert read_tree(out) == before
    with refusal(FormatError, f"{out / CONVERTING_FILE}: is not valid JSON ("):
        Wanted(out, "0" * 16).look()
    assert begun_revision(out, "org/name") is None
    assert not run(source, out, force=True)


@pytest.mark.parametrize("raw", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_journal_that_no_conversion_wrote_ends_there(source: FolderSource, tmp_path: Path, raw: bytes) -> None:
    with Journal(tmp_path / "j", "a") as journal:
        journal.append({"n": 1})
    with open(tmp_path / "j", "ab") as file:
        file.write(b"0" * 16 + b" " + raw + b"\n")
    with Journal(tmp_path / "j", "a") as journal:
        assert journal.entries == [{"n": 1}]


def test_a_folder_that_cannot_be_made_is_one_line(source: FolderSource, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with refusal(StorageError, "Not a directory"):
        run(source, tmp_path / "file" / "out")


def test_a_read_only_folder_is_one_line(source: FolderSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.open

    def read_only(path: Any, flags: int, *more: Any, **others: Any) -> int:
        if flags & os.O_CREAT:
            raise OSError(30, "Read-only file system", str(path))
        return real(path, flags, *more, **others)

    (tmp_path / "out").mkdir()
    monkeypatch.setattr(os, "open", read_only)  # root may write anywhere, so modes alone would not do
    with refusal(StorageError, f"{CONVERTING_FILE}: Read-only file system"):
        run(source, tmp_path / "out")


# ---- room


class Usage(NamedTuple):
    total: int
    used: int
    free: int


def test_too_little_room_is_told_before_anything_is_written(
    source: FolderSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(1 << 40, 1 << 40, 1000))
    with refusal(StorageError, "more, but its disk has 1000 B free"):
        run(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_is_already_written_needs_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(1 << 40, 0, 1000))
    (tmp_path / "resident.bin.partial").write_bytes(bytes(5000))
    check_space(tmp_path, 6000)
    with refusal(StorageError, "needs 1001 B more"):
        check_space(tmp_path, 6001)


def test_a_hard_link_is_written_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    (out / "experts").mkdir(parents=True)
    (out / "experts" / "layer-000.bin").write_bytes(bytes(600))
    os.link(out / "experts" / "layer-000.bin", out / "experts" / "layer-001.bin")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(1 << 40, 0, 300))
    check_space(out, 900)
    with refusal(StorageError, "needs 301 B more"):
        check_space(out, 901)


def test_output_and_download_on_one_disk_are_added(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(1 << 40, 0, 1000))
    check_space(tmp_path / "out", 600, (tmp_path / "cache", 400))
    with refusal(StorageError, "needs 1001 B more"):
        check_space(tmp_path / "out", 600, (tmp_path / "cache", 401))


def test_the_estimate_of_the_output_holds(source: FolderSource, tmp_path: Path) -> None:
    conversion = prepare(source, Options())
    convert(conversion, tmp_path / "out")
    written = sum(map(len, read_tree(tmp_path / "out").values()))
    assert 0.8 * conversion.output_bytes < written <= conversion.output_bytes


def test_a_difference_names_the_innermost_key() -> None:
    assert difference({"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "c": 3}}) == "a c 2, not 3"
    assert difference({"a": 1}, {"a": 1, "b": {}}) == "b None, not {}"
    assert difference({"a": {}}, {"a": {}}) is None
    assert difference(json.loads("[]"), {"a": 1}) == "another description"
