"""Tasks in other processes, perhaps on other machines: they share OUT with the conversion that sent them, no more.

A worker may be thought dead and go on, or the conversion may end or be killed while a worker writes. So each task
looks at OUT before it touches anything, and now and then afterwards: the conversion is alive as long as it holds the
lock on its file there.
"""

import os
import time
from pathlib import Path

from formats import __version__
from formats.container import CONVERTING_FILE
from formats.errors import StorageError
from formats.fields import parse_json
from formats.index import INDEX_FILE
from repack.journal import is_locked
from repack.output import fingerprint_id
from repack.writer import FileResult, FileTask, write_file

LOOK_S = 1.0


def version() -> str:
    """Of this program where the task runs."""
    return __version__


def write_on_worker(task: FileTask) -> FileResult:
    """Write or complete a file for a conversion in another process. Raises as write_file, and when it is over."""
    return write_file(task, Wanted(task.folder, task.conversion))


class Wanted:
    """A progress callback that raises StorageError once nobody wants the work: see `look`."""

    def __init__(self, out: Path, conversion: str) -> None:
        self._out, self._conversion = out, conversion
        self._next = 0.0

    def __call__(self, nbytes: int, what: str) -> None:
        """Looks every LOOK_S, and whenever no bytes are reported: at the start and while waiting."""
        now = time.monotonic()
        if nbytes == 0 or now >= self._next:
            self._next = now + LOOK_S
            self.look()

    def look(self) -> None:
        """Raises StorageError unless the conversion still runs here: its file is there, is its own, and is locked."""
        path = self._out / CONVERTING_FILE
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            raise StorageError(
                f"{self._out}: no conversion is running here; all workers need the same folder at this path"
            ) from None
        with open(fd, "rb") as file:
            if fingerprint_id(parse_json(file.read(), str(path))) != self._conversion:
                raise StorageError(f"{self._out}: another conversion is writing it")
            locked = is_locked(fd)
        if not locked or (self._out / INDEX_FILE).exists():
            raise StorageError(f"{self._out}: the conversion has ended")
