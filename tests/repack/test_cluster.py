"""Many machines: a conversion on a real Dask cluster of worker processes, and workers that nobody wants any more."""

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from formats.container import CONVERTING_FILE
from formats.errors import RequestError, StorageError
from repack import workers
from repack.cli import cli
from repack.cluster import connect
from repack.convert import Conversion, convert, prepare
from repack.output import begin, fingerprint_id, locked
from repack.plan import FilePlan, Options
from repack.sources.folder import FolderSource
from repack.workers import Wanted, write_on_worker
from repack.writer import FileTask, write_file
from tests.repack.checkpoints import SMALL, read_tree, shapes, write_random
from tests.repack.hub_server import serve
from tests.repack.slow_folder import SlowFolder
from tests.repack.test_hub import Client

LAYERS = 4
MODEL = SMALL | {"num_hidden_layers": LAYERS, "layer_types": ["linear_attention", "full_attention"] * (LAYERS // 2)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random(tmp_path_factory.mktemp("source"), MODEL, shapes(MODEL))


@pytest.fixture(scope="module")
def local(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What a conversion without a cluster writes."""
    out = tmp_path_factory.mktemp("local") / "out"
    convert(prepare(FolderSource(folder), Options()), out)
    return read_tree(out)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Two worker processes of one thread each."""
    distributed: Any = import_module("distributed")
    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, processes=True, dashboard_address=":0", silence_logs=50
    ) as running:
        yield running


def wait_for(what: Any, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end
        time.sleep(0.02)


# ---- on a cluster


def test_a_worker_that_is_killed_while_it_writes_changes_no_byte(
    cluster: Any, folder: Path, tmp_path: Path, local: dict[str, bytes]
) -> None:
    source, out, killed = SlowFolder(folder), tmp_path / "out", []
    conversion = prepare(source, Options())

    def is_in_the_middle(file: FilePlan) -> bool:
        """With a unit finished, and two at least to come."""
        journal = out / f"{file.name}.journal"
        written = len(journal.read_bytes().splitlines()) - 1 if journal.exists() else 0
        return 1 <= written <= len(file.units) - 2

    def kill() -> None:
        """Once both workers are in the middle of a file each."""
        wait_for(lambda: sum(map(is_in_the_middle, conversion.files)) == 2)
        killed.append(next(iter(source.reads())))
        os.kill(killed[0], signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    finished: list[str] = []
    with connect(cluster.scheduler_address) as running:
        assert (running.workers, running.threads) == (2, 2)
        outcome = convert(
            conversion,
            out,
            executor=running.executor,
            progress=lambda nbytes, what: finished.append(what),
        )
    killer.join()
    assert killed
    assert outcome.resumed_bytes > 0, "its file was continued"
    assert len(finished) == len(set(finished)) == LAYERS + 3  # embedding, resident, and the shard's hash
    assert read_tree(out) == local


def test_the_command_works_on_a_cluster(
    cluster: Any, folder: Path, tmp_path: Path, local: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)  # workers are elsewhere
    out = os.path.relpath(tmp_path / "out")
    done = CliRunner().invoke(cli, ["convert", ".", out, "--scheduler", cluster.scheduler_address, "--json"])
    assert done.exit_code == 0, done.output
    assert "2 workers with 2 threads" in done.stderr
    assert json.loads(done.stdout)["read_bytes"] > 0
    assert read_tree(tmp_path / "out") == local


def test_workers_fetch_from_a_hub_themselves(
    folder: Path, tmp_path: Path, local: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    distributed: Any = import_module("distributed")
    with serve(folder) as hub:
        client = Client(hub, tmp_path / "cache", tmp_path / "out")
        for name, value in (("HF_ENDPOINT", hub.address), ("HF_HOME", str(client.cache)), ("NO_PROXY", "*")):
            monkeypatch.setenv(name, value)  # workers inherit it
        with distributed.LocalCluster(
            n_workers=2, threads_per_worker=1, processes=True, dashboard_address=":0", silence_logs=50
        ) as running:
            result = client.convert("--scheduler", running.scheduler_address, "--json")
        assert result.returncode == 0, result.stderr
        assert "2 workers with 2 threads" in result.stderr
        headers = min(65536, (folder / "model.safetensors").stat().st_size)
        assert hub.sent_bytes == client.needed() + headers
    data = {name: raw for name, raw in read_tree(client.out).items() if name.endswith(".bin")}
    assert data == {name: raw for name, raw in local.items() if name.endswith(".bin")}


def test_a_conversion_on_a_cluster_that_is_interrupted_goes_on(
    cluster: Any, folder: Path, tmp_path: Path, local: dict[str, bytes]
) -> None:
    source, out = SlowFolder(folder), tmp_path / "out"

    def interrupt(nbytes: int, what: str) -> None:
        raise KeyboardInterrupt

    with connect(cluster.scheduler_address) as running, pytest.raises(KeyboardInterrupt):
        convert(prepare(source, Options()), out, executor=running.executor, progress=interrupt)
    assert not (out / "index.json").exists()
    outcome = convert(prepare(FolderSource(folder), Options()), out)
    assert outcome.resumed_bytes > 0
    assert read_tree(out) == local
    before = source.reads()
    time.sleep(0.5)
    assert source.reads() == before, "no worker goes on with it"


def test_an_error_on_a_worker_is_told_as_here(cluster: Any, folder: Path, tmp_path: Path) -> None:
    conversion = prepare(FolderSource(folder), Options())
    gone = replace(conversion, source=FolderSource(folder))
    (folder / "model.safetensors").touch()
    with connect(cluster.scheduler_address) as running, pytest.raises(StorageError, match="was changed or replaced"):
        convert(gone, tmp_path / "out", executor=running.executor)


def test_a_worker_of_another_version_is_refused(cluster: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("repack.cluster.__version__", "0.0.1")
    with pytest.raises(RequestError, match=r"worker tcp://.* has .*, expected streaming-experts 0\.0\.1"):
        connect(cluster.scheduler_address).__enter__()


def test_without_dask_the_extra_is_named(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "distributed", None)
    done = CliRunner().invoke(cli, ["convert", str(folder), str(tmp_path / "out"), "--scheduler", "tcp://localhost:1"])
    assert isinstance(done.exception, RequestError)
    assert str(done.exception) == "--scheduler needs Dask: pip install 'streaming-experts[dask]'"


@pytest.mark.parametrize("address", ["tcp://127.0.0.1:9", "nonsense://host:1", "host:port"])
def test_an_address_that_nobody_answers_is_one_line(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("repack.cluster.CONNECT_S", 0.3)
    with pytest.raises(RequestError, match=rf"^--scheduler {address}: no Dask scheduler answers there: .*$"):
        connect(address).__enter__()


def test_jobs_are_for_this_machine(folder: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(
        cli, ["convert", str(folder), str(tmp_path / "out"), "--scheduler", "tcp://localhost:1", "--jobs", "2"]
    )
    assert done.exit_code == 2
    assert "--jobs is for work on this machine" in done.stderr


# ---- workers that nobody waits for


def begun(conversion: Conversion, out: Path) -> list[FileTask]:
    """The tasks of a conversion that holds OUT's lock."""
    begin(out, conversion.fingerprint(), force=False)
    identity = fingerprint_id(conversion.fingerprint())
    return [FileTask(out, file, conversion.weights(), identity) for file in conversion.files]


def test_a_second_writer_of_a_file_waits_for_the_first(folder: Path, tmp_path: Path) -> None:
    conversion = prepare(FolderSource(folder), Options())
    first_is_in, go_on, seen = threading.Event(), threading.Event(), []

    def hold(nbytes: int, what: str) -> None:
        if nbytes:
            first_is_in.set()
            assert go_on.wait(60)

    def wait(nbytes: int, what: str) -> None:
        seen.append(what)
        go_on.set()

    with locked(tmp_path / "out"):
        task = begun(conversion, tmp_path / "out")[0]
        first = threading.Thread(target=write_file, args=(task, hold))
        first.start()
        assert first_is_in.wait(60)
        result = write_file(task, wait)
        first.join()
    assert seen[0] == f"another writer has {task.plan.name}"
    assert result.resumed_bytes == task.plan.source_bytes, "it had nothing left to do"


def test_a_worker_stops_when_the_conversion_has_ended(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "LOOK_S", 0.0)
    conversion, out = prepare(FolderSource(folder), Options()), tmp_path / "out"
    with pytest.raises(StorageError, match="all workers need the same folder"):
        write_on_worker(FileTask(tmp_path, conversion.files[0], conversion.weights(), ""))
    with locked(out):
        task, *others = begun(conversion, out)
        write_on_worker(task)
        with pytest.raises(StorageError, match="another conversion is writing it"):
            write_on_worker(replace(task, conversion="another"))
    with pytest.raises(StorageError, match="the conversion has ended"):
        write_on_worker(others[0])
    assert not list(out.rglob("*.partial"))


def test_workers_that_look_are_in_nobodys_way(folder: Path, tmp_path: Path) -> None:
    conversion, out = prepare(FolderSource(folder), Options()), tmp_path / "out"
    with locked(out):
        begun(conversion, out)
    late, over = Wanted(out, fingerprint_id(conversion.fingerprint())), threading.Event()

    def keep_looking() -> int:
        looks = 0
        while not over.is_set():
            with suppress(StorageError):
                late.look()
            looks += 1
        return looks

    with ThreadPoolExecutor(2) as pool:
        lookers = [pool.submit(keep_looking) for _ in range(2)]
        try:
            for _ in range(1000):
                with locked(out):
                    pass
        finally:
            over.set()
    assert all(looker.result() for looker in lookers)
    with locked(out), pytest.raises(StorageError, match="another conversion is writing it"):
        locked(out).__enter__()


def test_a_late_worker_touches_nothing_of_a_finished_container(
    folder: Path, tmp_path: Path, local: dict[str, bytes]
) -> None:
    conversion, out = prepare(FolderSource(folder), Options()), tmp_path / "out"
    convert(conversion, out)
    (out / CONVERTING_FILE).write_text(json.dumps(conversion.fingerprint()))  # as if its end were not seen yet
    with locked(out):
        identity = fingerprint_id(conversion.fingerprint())
        with pytest.raises(StorageError, match="the conversion has ended"):
            write_on_worker(FileTask(out, conversion.files[0], conversion.weights(), identity))
    assert {name: raw for name, raw in read_tree(out).items() if name in local} == local


def test_a_writer_does_not_finish_what_was_begun_anew(folder: Path, tmp_path: Path) -> None:
    conversion, out = prepare(FolderSource(folder), Options()), tmp_path / "out"

    def begin_anew(nbytes: int, what: str) -> None:
        if nbytes:
            begin(out, conversion.fingerprint(), force=True)

    with locked(out):
        task = begun(conversion, out)[0]
        with pytest.raises(StorageError, match="was begun anew by another conversion"):
            write_file(task, begin_anew)
    assert not (out / task.plan.name).exists()
