"""A conversion that was stopped, however, is completed by the same call, to the same bytes, repeating nothing."""

import errno
import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from formats.container import CONVERTING_FILE, open_container
from formats.errors import FormatError, RequestError, StorageError
from repack import writer
from repack.convert import Outcome, convert, prepare
from repack.encode import Block, Weights, unit_blocks
from repack.journal import Journal
from repack.plan import Options, Unit
from repack.sources.folder import FolderSource
from tests.repack.checkpoints import SMALL, read_tree, shapes, write_random

ROOT = Path(__file__).parent.parent.parent
LAYER0, LAYER1 = "experts/layer-000.bin", "experts/layer-001.bin"


class StopError(Exception):
    """What a callback raises to stop a conversion."""


class StopAfter:
    """A progress callback that stops the work at its n-th call."""

    def __init__(self, calls: int) -> None:
        self.calls = calls

    def __call__(self, nbytes: int, what: str) -> None:
        self.calls -= 1
        if self.calls == 0:
            raise StopError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random(tmp_path_factory.mktemp("source"), SMALL, shapes(SMALL))


@pytest.fixture(scope="module")
def undisturbed(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    run(folder, out)
    return read_tree(out)


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the units that are encoded to their end, in order."""
    names: list[str] = []

    def noted(weights: Weights, unit: Unit) -> Iterator[Block]:
        yield from unit_blocks(weights, unit)
        names.append(unit.name)

    monkeypatch.setattr(writer, "unit_blocks", noted)
    return names


def run(folder: Path, out: Path, **more: Any) -> Outcome:
    return convert(prepare(FolderSource(folder), Options()), out, **{"jobs": 1, **more})


def stop(folder: Path, out: Path, calls: int) -> None:
    with pytest.raises(StopError):
        run(folder, out, progress=StopAfter(calls))


def stop_in_layer_1(folder: Path, out: Path, encoded: list[str]) -> None:
    """Stop when three experts of layer 1 are finished and a fourth is begun."""

    def progress(nbytes: int, what: str) -> None:
        if what == "layer 1 expert 3":
            raise StopError

    with pytest.raises(StopError):
        run(folder, out, progress=progress)
    assert encoded[-1] == "layer 1 expert 2"
    encoded.clear()


# ---- what is finished is not repeated


def test_stops_at_any_unit_end_in_the_same_bytes(folder: Path, tmp_path: Path, undisturbed: dict[str, bytes]) -> None:
    total: list[str] = []
    run(folder, tmp_path / "counted", progress=lambda nbytes, what: total.append(what))
    for calls in range(1, len(total), 5):
        out = tmp_path / str(calls)
        stop(folder, out, calls)
        run(folder, out)
        assert read_tree(out) == undisturbed


def test_many_stops_in_one_output_end_in_the_same_bytes(
    folder: Path, tmp_path: Path, undisturbed: dict[str, bytes], encoded: list[str]
) -> None:
    for calls in (3, 12, 30, 45, 60):
        stop(folder, tmp_path / "out", calls)
    run(folder, tmp_path / "out", jobs=3)
    assert read_tree(tmp_path / "out") == undisturbed
    assert len(encoded) == len(set(encoded))


def test_finished_records_are_not_encoded_again(
    folder: Path, tmp_path: Path, undisturbed: dict[str, bytes], encoded: list[str]
) -> None:
    stop_in_layer_1(folder, tmp_path / "out", encoded)
    outcome = run(folder, tmp_path / "out")
    assert encoded == ["layer 1 expert 3", "layer 1 expert 4"]
    assert outcome.resumed_bytes > 0
    assert read_tree(tmp_path / "out") == undisturbed


def test_finished_source_hashes_are_not_repeated(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    monkeypatch.setattr("repack.convert.publish", publish_all_but_the_index)
    with pytest.raises(StopError):
        run(folder, out)
    monkeypatch.undo()
    monkeypatch.setattr("repack.tasks.hash_shard", None)
    run(folder, out)
    assert open_container(out).index.source.files[0].proof == "computed"


def test_hashes_of_an_earlier_run_are_not_used_when_none_are_asked_for(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("repack.convert.publish", publish_all_but_the_index)
    with pytest.raises(StopError):
        run(folder, tmp_path / "out")
    monkeypatch.undo()
    run(folder, tmp_path / "out", hash_source=False)
    run(folder, tmp_path / "undisturbed", hash_source=False)
    assert read_tree(tmp_path / "out") == read_tree(tmp_path / "undisturbed")


@pytest.mark.parametrize("removed", range(6))
def test_a_death_after_the_index_repeats_nothing(
    folder: Path,
    tmp_path: Path,
    undisturbed: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
    removed: int,
) -> None:
    def die(out: Path) -> None:
        journals = sorted(out.rglob("*.journal"))
        assert len(journals) == 5
        for journal in journals[:removed]:
            journal.unlink()
        raise StopError

    out = tmp_path / "out"
    monkeypatch.setattr("repack.convert.finish", die)
    with pytest.raises(StopError):
        run(folder, out)
    monkeypatch.undo()
    before = stamps(out, undisturbed)
    assert run(folder, out).already_there
    assert stamps(out, undisturbed) == before
    assert read_tree(out) == undisturbed


def test_an_index_beside_a_file_that_was_cut_after_it_is_not_trusted(
    folder: Path, tmp_path: Path, undisturbed: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("repack.convert.finish", stop_at_once)
    with pytest.raises(StopError):
        run(folder, tmp_path / "out")
    monkeypatch.undo()
    os.truncate(tmp_path / "out" / LAYER0, 16384)
    assert not run(folder, tmp_path / "out").already_there
    assert read_tree(tmp_path / "out") == undisturbed


def stamps(out: Path, names: Iterable[str]) -> dict[str, tuple[int, int]]:
    return {name: ((out / name).stat().st_ino, (out / name).stat().st_mtime_ns) for name in names}


def stop_at_once(out: Path) -> None:
    raise StopError


def publish_all_but_the_index(out: Path, name: str, content: bytes) -> None:
    if name == "index.json":
        raise StopError
    (out / name).write_bytes(content)


def test_progress_after_a_stop_still_reports_every_byte_once(folder: Path, tmp_path: Path) -> None:
    stop(folder, tmp_path / "out", 40)
    seen: list[int] = []
    run(folder, tmp_path / "out", progress=lambda nbytes, what: seen.append(nbytes))
    assert sum(seen) == prepare(FolderSource(folder), Options()).work_bytes(hash_source=True)


# ---- what is damaged meanwhile is repeated


def test_a_finished_record_that_was_damaged_is_encoded_again(
    folder: Path, tmp_path: Path, undisturbed: dict[str, bytes], encoded: list[str]
) -> None:
    out = tmp_path / "out"
    stop_in_layer_1(folder, out, encoded)
    partial = out / f"{LAYER1}.partial"
    raw = bytearray(partial.read_bytes())
    raw[len(raw) // 3] ^= 1
    partial.write_bytes(raw)
    run(folder, out)
    assert encoded == [f"layer 1 expert {expert}" for expert in (1, 2, 3, 4)]
    assert read_tree(out) == undisturbed


@pytest.mark.parametrize("keep", [0, 1, 16384, 20000])
def test_a_partial_file_that_lost_its_end_is_completed(
    folder: Path, tmp_path: Path, undisturbed: dict[str, bytes], encoded: list[str], keep: int
) -> None:
    stop_in_layer_1(folder, tmp_path / "out", encoded)
    os.truncate(tmp_path / "out" / f"{LAYER1}.partial", keep)
    run(folder, tmp_path / "out")
    assert read_tree(tmp_path / "out") == undisturbed


def test_a_torn_journal_is_read_as_far_as_it_is_whole(
    folder: Path, tmp_path: Path, undisturbed: dict[str, bytes], encoded: list[str]
) -> None:
    stop_in_layer_1(folder, tmp_path / "out", encoded)
    journal = tmp_path / "out" / f"{LAYER1}.journal"
    journal.write_bytes(journal.read_bytes()[:-10])
    run(folder, tmp_path / "out")
    assert encoded == [f"layer 1 expert {expert}" for expert in (2, 3, 4)]
    assert read_tree(tmp_path / "out") == undisturbed


def test_a_finished_file_of_another_length_is_written_again(
    folder: Path, tmp_path: Path, undisturbed: dict[str, bytes], encoded: list[str]
) -> None:
    stop_in_layer_1(folder, tmp_path / "out", encoded)
    os.truncate(tmp_path / "out" / LAYER0, 16384)
    run(folder, tmp_path / "out")
    assert {"layer 0 expert 0", "layer 0 expert 4"} <= set(encoded)
    assert read_tree(tmp_path / "out") == undisturbed


def test_a_file_that_an_older_program_finished_is_read_back_and_not_encoded_again(
    folder: Path, tmp_path: Path, undisturbed: dict[str, bytes], encoded: list[str]
) -> None:
    stop_in_layer_1(folder, tmp_path / "out", encoded)
    name = tmp_path / "out" / f"{LAYER0}.journal"
    conversion = json.loads(name.read_bytes().split(b"\n")[0].partition(b" ")[2])["conversion"]
    with Journal(name, conversion) as journal:
        nbytes = journal.entries[-1]["bytes"]
        journal.cut(len(journal.entries) - 1)
        journal.append({"sha256": "0" * 64, "bytes": nbytes})  # as before BLAKE3
    run(folder, tmp_path / "out")
    assert encoded == [f"layer 1 expert {expert}" for expert in (3, 4)]
    assert read_tree(tmp_path / "out") == undisturbed


def test_a_weight_that_was_mended_after_a_refusal_begins_anew_only_by_force(folder: Path, tmp_path: Path) -> None:
    source = write_random(tmp_path / "source", SMALL, shapes(SMALL))
    tensor = FolderSource(source).tensors["lm_head.weight"]
    raw = bytearray((source / tensor.file).read_bytes())
    good = bytes(raw)
    raw[tensor.offset : tensor.offset + 2] = b"\xc0\x7f"
    (source / tensor.file).write_bytes(raw)
    with pytest.raises(FormatError, match="expected finite weights"):
        run(source, tmp_path / "out")
    (source / tensor.file).write_bytes(good)
    with pytest.raises(RequestError, match=r"was begun with source files model\.safetensors"):
        run(source, tmp_path / "out")
    run(source, tmp_path / "out", force=True)


# ---- a full disk


def test_a_full_disk_is_one_line_and_resumable(
    folder: Path, tmp_path: Path, undisturbed: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    real, room = os.pwrite, 75 * 4096

    def pwrite(fd: int, data: Any, offset: int) -> int:
        nonlocal room
        if room == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        written = real(fd, data[:room], offset)
        room -= written
        return written

    monkeypatch.setattr(os, "pwrite", pwrite)
    line = r"resident\.bin: No space left on device; what is finished is kept, the same command goes on"
    with pytest.raises(StorageError, match=line):
        run(folder, tmp_path / "out")
    monkeypatch.undo()
    run(folder, tmp_path / "out")
    assert read_tree(tmp_path / "out") == undisturbed


def command(*args: str) -> list[str]:
    """The command with row blocks so small that a conversion of the demo takes a while."""
    program = "from repack import cli, encode; encode.ROW_BLOCK_BYTES = 2048; cli.main()"
    return [sys.executable, "-c", program, "convert", "demo", *args]


def test_a_file_size_limit_is_one_line_and_resumable(tmp_path: Path) -> None:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))

    arguments = (str(tmp_path / "out"), "--jobs", "2")
    limited = subprocess.run(
        command(*arguments), cwd=ROOT, capture_output=True, text=True, preexec_fn=limit, check=False
    )
    assert limited.returncode == 1
    assert re.fullmatch(
        r"error: \S+\.bin: File too large; what is finished is kept, the same command goes on\n", limited.stderr
    )
    subprocess.run(command(*arguments), cwd=ROOT, capture_output=True, check=True)
    open_container(tmp_path / "out")


# ---- death


def test_death_in_any_call_that_changes_the_disk_is_survived(folder: Path, tmp_path: Path) -> None:
    program = [sys.executable, "-m", "tests.repack.crash_points", str(folder), str(tmp_path), "2"]
    result = subprocess.run(program, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) > 50


@pytest.mark.slow
def test_kills_at_random_moments_are_survived(tmp_path: Path) -> None:
    out, rng, kills = tmp_path / "out", random.Random(0), 0
    arguments = (str(out), "--jobs", "2", "--json")
    for _ in range(8):
        with subprocess.Popen(
            command(*arguments), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        ) as process:
            give_up = time.monotonic() + 30
            while not (out / CONVERTING_FILE).exists() and process.poll() is None and time.monotonic() < give_up:
                time.sleep(0.01)
            try:
                process.wait(rng.uniform(0.02, 0.5))
                break
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
                kills += 1
    last = subprocess.run(command(*arguments), cwd=ROOT, capture_output=True, check=True)
    subprocess.run(command(str(tmp_path / "undisturbed")), cwd=ROOT, capture_output=True, check=True)
    assert kills >= 3
    assert json.loads(last.stdout)["total_bytes"] == open_container(out).index.layout.total_bytes
    assert read_tree(out) == read_tree(tmp_path / "undisturbed")


@pytest.mark.usefixtures("interruptible")
def test_an_interrupt_exits_130_and_the_same_command_goes_on(tmp_path: Path) -> None:
    arguments = (str(tmp_path / "out"), "--jobs", "2", "--json")
    with subprocess.Popen(
        command(*arguments), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        give_up = time.monotonic() + 30
        while not (tmp_path / "out" / f"{LAYER0}.journal").exists() and time.monotonic() < give_up:
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=30)
    assert (process.returncode, output) == (130, "")
    assert errors.strip() == "interrupted; a conversion goes on with the same command"
    last = subprocess.run(command(*arguments), cwd=ROOT, capture_output=True, check=True)
    assert json.loads(last.stdout)["resumed_bytes"] > 0


# ---- the journal


def test_a_journal_keeps_its_entries(tmp_path: Path) -> None:
    with Journal(tmp_path / "j", "a") as journal:
        journal.append({"n": 1})
        journal.append({"n": 2}, durable=True)
    with Journal(tmp_path / "j", "a") as journal:
        assert journal.entries == [{"n": 1}, {"n": 2}]
        journal.cut(1)
        journal.append({"n": 3})
    with Journal(tmp_path / "j", "a") as journal:
        assert journal.entries == [{"n": 1}, {"n": 3}]


def test_a_journal_of_another_conversion_is_begun_anew(tmp_path: Path) -> None:
    with Journal(tmp_path / "j", "a") as journal:
        journal.append({"n": 1})
    with Journal(tmp_path / "j", "b") as journal:
        assert journal.entries == []
    with Journal(tmp_path / "j", "a") as journal:
        assert journal.entries == []


def test_a_journal_cut_or_changed_at_any_byte_gives_a_prefix(tmp_path: Path) -> None:
    path = tmp_path / "j"
    entries = [{"n": n} for n in range(3)]
    with Journal(path, "a") as journal:
        for entry in entries:
            journal.append(entry)
    raw = path.read_bytes()
    for i in range(len(raw)):
        for damaged in (raw[:i], raw[:i] + bytes([raw[i] ^ 1]) + raw[i + 1 :]):
            path.write_bytes(damaged)
            with Journal(path, "a") as journal:
                found = journal.entries
            assert found == entries[: len(found)]
            assert len(found) < 3
            with Journal(path, "a") as journal:
                assert journal.entries == found
