"""Runs the files of a plan as independent tasks of an executor: threads here, or workers elsewhere."""

import hashlib
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future, as_completed, wait
from pathlib import Path
from typing import Any, NamedTuple

from formats.checksum import blocks
from formats.errors import FormatError
from repack.encode import Weights
from repack.journal import Journal
from repack.output import SOURCE_JOURNAL
from repack.plan import FilePlan
from repack.sources.base import Reader, Shard, Source
from repack.workers import write_on_worker
from repack.writer import FileResult, FileTask, Progress, storage_errors, write_file

HASH_BLOCK_BYTES = 1 << 20


class Tasks(NamedTuple):
    """What is to be done: files to write from weights, and shards to hash if they are whole."""

    source: Source
    weights: Callable[[], Weights]  # new ones for each file
    files: Sequence[FilePlan]
    shards: Sequence[Shard]


class Results(NamedTuple):
    """What was done: by data file, and SHA-256 by shard."""

    files: dict[str, FileResult]
    source_sha256: dict[str, str]


class _StoppedError(Exception):
    """Another task failed, or the user interrupted."""


class Watched:
    """The progress callback as threads see it: one call at a time, an exception once all shall stop."""

    def __init__(self, progress: Progress | None) -> None:
        self._progress = progress
        self._lock = threading.Lock()
        self._stopped = False

    def __call__(self, nbytes: int, what: str) -> None:
        with self._lock:
            if self._stopped:
                raise _StoppedError
            try:
                if self._progress is not None:
                    self._progress(nbytes, what)
            except BaseException:
                self._stopped = True
                raise

    def stop(self) -> None:
        self._stopped = True


def run_tasks(
    tasks: Tasks, executor: Executor, out: Path, conversion: str, watched: Watched, here: bool = True
) -> Results:
    """Run all tasks; the first failure stops the others and is raised.

    `here`: tasks run in this process and report to `watched`; else it is told of each that is finished.
    """
    files: dict[Future[Any], str] = {}  # -> FileResult
    hashes: dict[Future[Any], str] = {}  # -> SHA-256
    nbytes = {file.name: file.source_bytes for file in tasks.files} | {s.name: s.nbytes for s in tasks.shards}
    write, progress = (write_file, (watched,)) if here else (write_on_worker, ())
    shards = {shard.name: shard for shard in tasks.shards}
    with storage_errors(out), Journal(out / SOURCE_JOURNAL, conversion) as journal:
        sha256s = {entry["shard"]: entry["sha256"] for entry in journal.entries}
        try:
            for file in tasks.files:
                task = FileTask(out, file, tasks.weights(), conversion)
                files[executor.submit(write, task, *progress)] = file.name
            for shard in tasks.shards:
                if shard.name in sha256s:
                    watched(shard.nbytes, shard.name)
                elif shard.whole:
                    hashes[executor.submit(hash_shard, tasks.source.reader(), shard, *progress)] = shard.name
            for future in as_completed([*files, *hashes]):
                result = future.result()
                if future in hashes:
                    _check_sha256(shards[hashes[future]], result)
                    sha256s[hashes[future]] = result
                    journal.append({"shard": hashes[future], "sha256": result})
                if not here:
                    name = (files | hashes)[future]
                    watched(nbytes[name], name)
        except BaseException as error:
            watched.stop()
            begun = [future for future in (*files, *hashes) if not future.cancel()]
            wait(begun)
            causes = (future.exception() for future in begun)
            if isinstance(error, _StoppedError):  # what it was stopped for is told, not that it was stopped
                raise next(cause for cause in causes if cause and not isinstance(cause, _StoppedError)) from None
            raise
    wanted = {shard.name: sha256s[shard.name] for shard in tasks.shards if shard.name in sha256s}
    return Results({name: future.result() for future, name in files.items()}, wanted)


def _check_sha256(shard: Shard, found: str) -> None:
    """Raises FormatError for a file that is not what the hub says."""
    if shard.sha256 not in (None, found):
        raise FormatError(
            f"{shard.name}: has SHA-256 {found}, but the hub states {shard.sha256}; remove it, then it is fetched again"
        )


def hash_shard(reader: Reader, shard: Shard, progress: Progress | None = None) -> str:
    """SHA-256 of a whole shard. Raises StorageError."""
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(HASH_BLOCK_BYTES))
    with reader:
        for offset, nbytes in blocks(shard.nbytes, HASH_BLOCK_BYTES):
            reader.read_into(shard.name, offset, buffer[:nbytes])
            digest.update(buffer[:nbytes])
            if progress is not None:
                progress(nbytes, f"sha256 of {shard.name}")
    return digest.hexdigest()
