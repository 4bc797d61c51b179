"""An append-only journal of what is finished, so that a stopped conversion goes on where it stood.

Each line is the XXH3-64 of a JSON text, a space, and that text. The first line names the conversion; a torn line
ends the journal, and what comes after it is cut off.
"""

import fcntl
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from formats.checksum import xxh3_64
from formats.errors import FormatError
from formats.fields import parse_json

_POLL_S = 0.1


class Journal:
    """The entries of a journal, and its file open for more; it is locked, so there is one writer at a time."""

    def __init__(self, path: Path, conversion: str, waiting: Callable[[], None] | None = None) -> None:
        """Open or create; entries of another conversion are dropped. Raises OSError.

        While another writer has it, as a worker that was thought dead, this waits; `waiting` may raise to end that.
        """
        self.entries: list[dict[str, Any]] = []
        self._conversion = conversion
        self._path = path
        while (fd := open_locked(path, os.O_RDWR | os.O_CREAT | os.O_APPEND)) is None:
            if waiting is not None:
                waiting()
            time.sleep(_POLL_S)
        self._fd = fd
        try:
            with open(self._fd, "rb", closefd=False) as file:
                lines = file.readlines()
            if lines[:1] == [_line({"conversion": conversion})]:
                for line in lines[1:]:
                    entry = _parse(line)
                    if entry is None:
                        break
                    self.entries.append(entry)
                self.cut(len(self.entries))
            else:
                os.ftruncate(self._fd, 0)
                write_all(self._fd, _line({"conversion": conversion}))
        except BaseException:
            os.close(self._fd)
            raise

    def append(self, entry: dict[str, Any], durable: bool = False) -> None:
        """Add one entry; durable waits until it has reached the disk. Raises OSError."""
        write_all(self._fd, _line(entry))
        self.entries.append(entry)
        if durable:
            os.fsync(self._fd)

    def cut(self, kept: int) -> None:
        """Forget all entries but the first `kept`. Raises OSError."""
        del self.entries[kept:]
        lines = [{"conversion": self._conversion}, *self.entries]
        os.ftruncate(self._fd, sum(len(_line(entry)) for entry in lines))

    def is_in_place(self) -> bool:
        """Whether the file is still the one of that name: it is not when OUT was begun anew. Raises OSError."""
        return is_same_file(self._fd, self._path)

    def __enter__(self) -> "Journal":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._fd)


def open_locked(path: Path, flags: int) -> int | None:
    """A descriptor of the file with an exclusive lock, None while somebody else has one. Raises OSError.

    Who only looks whether there is one (`is_locked`) holds a shared lock for that moment, and is waited for.
    """
    while True:
        fd = os.open(path, flags | os.O_CLOEXEC, 0o666)
        try:
            if not try_lock(fd, fcntl.LOCK_EX):
                if not try_lock(fd, fcntl.LOCK_SH):
                    os.close(fd)
                    return None
            elif is_same_file(fd, path):
                return fd
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)  # somebody looked, or it was removed between our open and our lock


def is_locked(fd: int) -> bool:
    """Whether another descriptor of the file has an exclusive lock; `fd` is to be closed after. Raises OSError."""
    return not try_lock(fd, fcntl.LOCK_SH)


def try_lock(fd: int, kind: int) -> bool:
    """Whether the lock could be had at once. Raises OSError."""
    try:
        fcntl.flock(fd, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def is_same_file(fd: int, path: Path) -> bool:
    """Whether the path still names the open file. Raises OSError."""
    try:
        return os.path.samestat(os.fstat(fd), os.stat(path))
    except FileNotFoundError:
        return False


def write_all(fd: int, data: bytes | memoryview) -> None:
    """Write everything. Raises OSError."""
    left = memoryview(data)
    while left:
        left = left[os.write(fd, left) :]


def _line(entry: dict[str, Any]) -> bytes:
    text = json.dumps(entry, sort_keys=True).encode()
    return b"%s %s\n" % (xxh3_64(text).encode(), text)


def _parse(line: bytes) -> dict[str, Any] | None:
    """The entry of a line that is exactly as it was written, else None."""
    try:
        entry = parse_json(line.partition(b" ")[2], "a line")
    except FormatError:
        return None
    return entry if isinstance(entry, dict) and _line(entry) == line else None
