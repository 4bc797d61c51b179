"""Writes one output file of a plan, sequentially, checksums on the way, resumable at every unit."""

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import xxhash

from formats.checksum import blocks, file_digest
from formats.errors import StorageError
from repack.direct import SequentialFile
from repack.encode import Weights, unit_blocks
from repack.journal import Journal
from repack.plan import FilePlan, Unit

PARTIAL, JOURNAL, FETCHED = ".partial", ".journal", ".fetched"
READ_BACK_BYTES = 1 << 20

# Source bytes that are done, and what is being worked on. May raise to stop the work, which can be resumed.
Progress = Callable[[int, str], None]


class FileResult(NamedTuple):
    """What the index says about a data file."""

    digest: str
    checksums: tuple[tuple[str, ...], ...]  # by unit
    resumed_bytes: int  # of source, that an earlier call had finished
    direct: bool  # past the page cache, if anything was written


@dataclass(frozen=True)
class FileTask:
    """One file to write: picklable, independent of all others, wherever it runs."""

    folder: Path
    plan: FilePlan
    weights: Weights
    conversion: str  # what the journal belongs to


def write_file(task: FileTask, progress: Progress | None = None) -> FileResult:
    """Write or complete a file and make it durable under its name.

    Raises StorageError (disk full, source changed) or FormatError (weights); the same call later goes on.
    """
    path = task.folder / task.plan.name
    progress = progress or _silent
    with storage_errors(path):
        path.parent.mkdir(exist_ok=True)
        waiting = partial(progress, 0, f"another writer has {task.plan.name}")
        with Journal(add_suffix(path, JOURNAL), task.conversion, waiting) as journal, task.weights as weights:
            progress(0, task.plan.name)  # it may stop the work before anything is touched
            digest = _finished(path, task.plan, journal)
            resumed_bytes, direct = task.plan.source_bytes, True
            if digest is None:
                digest, resumed_bytes, direct = _write(path, task.plan, weights, journal, progress)
                journal.append({"digest": digest, "bytes": task.plan.nbytes}, durable=True)
            else:
                progress(task.plan.source_bytes, task.plan.name)
            add_suffix(path, FETCHED).unlink(missing_ok=True)
            if not path.exists():
                if not journal.is_in_place():
                    raise StorageError(f"{path}: was begun anew by another conversion")
                os.rename(add_suffix(path, PARTIAL), path)
                sync_folder(path.parent)
            checksums = (tuple(entry["checksums"]) for entry in journal.entries if "checksums" in entry)
            return FileResult(digest, tuple(checksums), resumed_bytes, direct)


def _finished(path: Path, plan: FilePlan, journal: Journal) -> str | None:
    """The digest of a file that an earlier run finished, taken from its journal's last line.

    A program from before BLAKE3 left another one: its file becomes NAME.partial again, which is read back.
    """
    last = journal.entries[-1] if journal.entries else {}
    found = path if path.exists() else add_suffix(path, PARTIAL)
    if last.get("bytes") == plan.nbytes and found.exists() and found.stat().st_size == plan.nbytes:
        if "digest" in last:
            return str(last["digest"])
        os.rename(found, add_suffix(path, PARTIAL))
    return None


def _write(path: Path, plan: FilePlan, weights: Weights, journal: Journal, progress: Progress) -> tuple[str, int, bool]:
    """Write NAME.partial to its end: its digest, source bytes of what was there already, whether it went directly."""
    path.unlink(missing_ok=True)
    with SequentialFile(add_suffix(path, PARTIAL)) as file:
        kept = _keep(file, plan, journal, progress)
        units = plan.units[kept:]
        weights.expect(units, add_suffix(path, FETCHED), partial(progress, 0, "waiting for the hub"))
        for number, unit in enumerate(units, 1):
            checksums = _write_unit(file, unit, weights, progress)
            file.mark(partial(journal.append, {"checksums": checksums}))
            file.mark(partial(weights.finished, number))
        file.sync()
    return file.digest.hexdigest(), sum(unit.source_bytes for unit in plan.units[:kept]), file.direct


def _write_unit(file: SequentialFile, unit: Unit, weights: Weights, progress: Progress) -> list[str]:
    """Append a unit; returns its checksums."""
    hasher = BlockHasher(unit.block_bytes)
    for block, source_bytes in unit_blocks(weights, unit):
        data = block.data.cast("B")
        hasher.update(data)
        file.write(data)
        progress(source_bytes, unit.name)
    checksums = hasher.finish()
    assert hasher.nbytes == unit.nbytes
    return checksums


def _keep(file: SequentialFile, plan: FilePlan, journal: Journal, progress: Progress) -> int:
    """Read back what the journal has, and cut the file after the last unit that is as it says; how many these are."""
    kept = end = 0
    digest = file_digest()
    for unit, entry in zip(plan.units, journal.entries, strict=False):
        hasher = BlockHasher(unit.block_bytes)
        ahead = digest.copy()
        for offset, nbytes in blocks(unit.nbytes, READ_BACK_BYTES):
            data = file.read(end + offset, nbytes)
            ahead.update(data)
            hasher.update(data)
        if hasher.nbytes != unit.nbytes or hasher.finish() != entry.get("checksums"):
            break
        digest = ahead
        kept, end = kept + 1, end + unit.nbytes
        progress(unit.source_bytes, unit.name)
    journal.cut(kept)
    file.cut(end, digest)
    return kept


def _silent(nbytes: int, what: str) -> None:
    pass


class BlockHasher:
    """XXH3-64 of each block of a stream."""

    def __init__(self, block_bytes: int) -> None:
        self.nbytes = 0
        self._block_bytes = block_bytes
        self._hasher = xxhash.xxh3_64()
        self._checksums: list[str] = []

    def update(self, data: memoryview | bytes) -> None:
        data = memoryview(data)
        while data:
            piece = data[: self._block_bytes - self.nbytes % self._block_bytes]
            self._hasher.update(piece)
            self.nbytes += len(piece)
            data = data[len(piece) :]
            if self.nbytes % self._block_bytes == 0:
                self._close()

    def finish(self) -> list[str]:
        """The checksums, the last one of a shorter block perhaps."""
        if self.nbytes % self._block_bytes:
            self._close()
        return self._checksums

    def _close(self) -> None:
        self._checksums.append(self._hasher.hexdigest())
        self._hasher.reset()


# Of a place that cannot be written: the same command would fail again.
REFUSALS = frozenset({errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.ENAMETOOLONG})


@contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turn an OSError into one line, a StorageError, that names the file and says what to do, if anything helps."""
    try:
        yield
    except OSError as error:
        again = "" if error.errno in REFUSALS else "; what is finished is kept, the same command goes on"
        raise StorageError(f"{error.filename or path}: {error.strerror or error}{again}") from None


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable. Raises OSError."""
    fd = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def add_suffix(path: Path, suffix: str) -> Path:
    """NAME.bin -> NAME.bin.partial."""
    return path.with_name(path.name + suffix)
