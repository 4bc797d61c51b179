"""An append-only journal of what is finished, so that a stopped conversion goes on where it stood.

Each line is the XXH3-64 of a JSON text, a space, and that text. The first line names the conversion; a torn line
ends the journal, and what comes after it is cut off.
"""

import json
import os
from pathlib import Path
from types import TracebackType
from typing import Any

from formats.checksum import xxh3_64


class Journal:
    """The entries of a journal, and its file open for more. One writer at a time (OUT is locked)."""

    def __init__(self, path: Path, conversion: str) -> None:
        """Open or create; entries of another conversion are dropped. Raises OSError."""
        self.entries: list[dict[str, Any]] = []
        self._conversion = conversion
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
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

    def __enter__(self) -> "Journal":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._fd)


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
        entry = json.loads(line.partition(b" ")[2])
    except ValueError:
        return None
    return entry if isinstance(entry, dict) and _line(entry) == line else None
