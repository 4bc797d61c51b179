"""Files read past the page cache: O_DIRECT on Linux (proven, not assumed), F_NOCACHE on macOS."""

import fcntl
import mmap
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from formats.dtypes import AnyArray
from formats.errors import StorageError
from formats.pages import anonymous_pages

TOUCH_BYTES = 1 << 26  # that a thread touches at a time
ALIGNMENT = 4096  # of offsets, lengths and memory; every disk's logical block divides it
_F_NOCACHE = 48  # macOS fcntl.h


def aligned_bytes(nbytes: int, *, touched: bool = False) -> AnyArray:
    """Zeroed uint8 [nbytes] that begins on a page: private memory, resident once touched, or from the beginning."""
    memory = np.frombuffer(anonymous_pages(nbytes), np.uint8)[:nbytes]
    if touched:
        with ThreadPoolExecutor() as threads:  # several touch several times as fast (docs/LEARNED.md 58)
            list(threads.map(lambda begin: _touch(memory[begin : begin + TOUCH_BYTES]), range(0, nbytes, TOUCH_BYTES)))
    return memory


def _touch(memory: AnyArray) -> None:
    memory[:: mmap.PAGESIZE].fill(0)


class DirectFile:
    """A file open for positioned reads; `direct` says whether they go past the page cache."""

    def __init__(self, path: Path, direct: bool = True) -> None:
        """Raises StorageError when the file cannot be opened."""
        self.path = path
        self.direct = direct
        try:
            self.fd = self._open(path)
        except OSError as error:
            raise StorageError(f"{path}: cannot be opened ({error.strerror})") from None

    def _open(self, path: Path) -> int:
        flags = os.O_RDONLY | os.O_CLOEXEC
        if self.direct and hasattr(os, "O_DIRECT"):
            try:
                return os.open(path, flags | os.O_DIRECT)
            except OSError:
                self.direct = False  # a file system without it, such as some network mounts
        fd = os.open(path, flags)
        if self.direct:
            self.direct = sys.platform == "darwin" and fcntl.fcntl(fd, _F_NOCACHE, 1) == 0
        return fd

    def read_into(self, buffer: AnyArray, offset: int, what: str) -> None:
        """Fill uint8 buffer from offset, all aligned. Raises StorageError naming `what` on failure or a short read."""
        try:
            done = os.preadv(self.fd, [buffer.data], offset)
        except OSError as error:
            raise self.unreadable(what, error.strerror or str(error)) from None
        if done != len(buffer):
            raise self.cut(what, done, offset, len(buffer))
        if not self.direct and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self.fd, offset, len(buffer), os.POSIX_FADV_DONTNEED)

    def unreadable(self, what: str, reason: str) -> StorageError:
        """The kernel refuses."""
        return StorageError(f"{self.path}: {what} cannot be read ({reason})")

    def cut(self, what: str, done: int, offset: int, nbytes: int) -> StorageError:
        """The file ends too early."""
        return StorageError(f"{self.path}: {what} has {done} bytes at {offset}, expected {nbytes}: it was cut")

    def close(self) -> None:
        os.close(self.fd)


def proves_direct(file: DirectFile) -> bool:
    """Whether reads of this file really reach the disk: reading one block twice is counted twice by the kernel.

    Where the kernel keeps no count (macOS), what was asked for is believed.
    """
    if not file.direct:
        return False
    before = _bytes_from_disk()
    if before is None:
        return True
    block = aligned_bytes(ALIGNMENT)
    for _ in range(2):
        file.read_into(block, 0, "its first block")
    after = _bytes_from_disk()
    return after is not None and after - before >= 2 * ALIGNMENT


def _bytes_from_disk() -> int | None:
    try:
        lines = Path("/proc/self/io").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) for line in lines if line.startswith("read_bytes:")), None)
