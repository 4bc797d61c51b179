"""Files read and written past the page cache: O_DIRECT on Linux, F_NOCACHE on macOS.

A conversion touches every byte once, so caching it would only push out what others need, and dirty pages pile up
until the kernel lets every writer wait. Where the file system refuses, the same calls go through the cache.
"""

import errno
import fcntl
import os
import sys
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import TracebackType

import numpy as np

from formats.checksum import Digest, file_digest
from formats.pages import anonymous_pages

ALIGNMENT = 4096  # of offsets, lengths and memory; every disk's logical block divides it
READ_BYTES = 4 << 20
BUFFER_BYTES = 8 << 20  # of a write: shorter ones cost more per byte (LEARNED 65)
WRITE_BEHIND_BYTES = 16 << 20
_F_NOCACHE = 48  # macOS fcntl.h


def aligned_buffer(nbytes: int) -> memoryview:
    """Zeroed memory that begins on a page."""
    return memoryview(anonymous_pages(nbytes))[:nbytes]


def copy_bytes(to: memoryview, data: memoryview) -> None:
    """As to[:] = data, but other threads run meanwhile."""
    np.copyto(np.frombuffer(to, np.uint8), np.frombuffer(data, np.uint8))


def open_direct(path: Path, flags: int) -> tuple[int, bool]:
    """(file descriptor, whether it goes past the page cache). Raises OSError."""
    flags |= os.O_CLOEXEC
    if hasattr(os, "O_DIRECT"):
        try:
            return os.open(path, flags | os.O_DIRECT, 0o666), True
        except OSError as error:
            if error.errno != errno.EINVAL:  # what a file system without it says
                raise
    fd = os.open(path, flags, 0o666)
    return fd, sys.platform == "darwin" and fcntl.fcntl(fd, _F_NOCACHE, 1) == 0


def leave_direct(fd: int) -> None:
    """Let an open file go through the page cache from now on."""
    fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) & ~getattr(os, "O_DIRECT", 0))


def drop_from_cache(fd: int, offset: int, nbytes: int) -> None:
    """What was read or written is not needed again; dirty pages start on their way to the disk."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(fd, offset, nbytes, os.POSIX_FADV_DONTNEED)


class RangeFile:
    """A file read by byte ranges of any alignment; `direct` says whether past the page cache."""

    def __init__(self, path: Path) -> None:
        """Open. Raises OSError."""
        self.fd, self.direct = open_direct(path, os.O_RDONLY | os.O_NONBLOCK)  # a pipe would wait for its writer
        self._buffer = aligned_buffer(READ_BYTES + 2 * ALIGNMENT)

    def read_into(self, offset: int, buffer: memoryview) -> int:
        """Read up to len(buffer) bytes, at most READ_BYTES of them; 0 only at the end of the file. Raises OSError.

        Whole pages go straight into a buffer that lies in memory as the range does in the file, modulo ALIGNMENT.
        """
        first = offset - offset % ALIGNMENT
        wanted = min(len(buffer), READ_BYTES)
        length = -(-(offset + wanted - first) // ALIGNMENT) * ALIGNMENT
        skipped, whole = self._in_place(offset, buffer[:wanted])
        head = -(-skipped // ALIGNMENT) * ALIGNMENT
        pieces = [self._buffer[:head], buffer[skipped : skipped + whole], self._buffer[head : length - whole]]
        try:
            done = os.preadv(self.fd, [piece for piece in pieces if piece], first)
        except OSError as error:
            if error.errno != errno.EINVAL or not self.direct:
                raise
            leave_direct(self.fd)
            self.direct = False
            return self.read_into(offset, buffer)
        if not self.direct:
            drop_from_cache(self.fd, first, done)
        count = max(0, min(wanted, first + done - offset))
        before, after = min(skipped, count), max(0, count - skipped - whole)
        rest = head if whole else offset - first
        for place, start, nbytes in ((0, head - skipped, before), (count - after, rest, after)):
            copy_bytes(buffer[place : place + nbytes], self._buffer[start : start + nbytes])
        return count

    def _in_place(self, offset: int, buffer: memoryview) -> tuple[int, int]:
        """(bytes before its first whole page, bytes of its whole pages), 0 of these in a buffer that lies otherwise."""
        skipped = -offset % ALIGNMENT
        whole = (len(buffer) - skipped) // ALIGNMENT * ALIGNMENT
        if whole <= 0 or (np.frombuffer(buffer, np.uint8).ctypes.data + skipped) % ALIGNMENT:
            return 0, 0
        return skipped, whole

    def close(self) -> None:
        os.close(self.fd)


class SequentialFile:
    """A file written from front to back in whole pages; `direct` says whether past the page cache.

    A thread of its own writes one buffer while the caller fills and hashes the other.
    """

    def __init__(self, path: Path) -> None:
        """Open or create. Raises OSError."""
        self._fd, self.direct = open_direct(path, os.O_RDWR | os.O_CREAT)
        self._buffer, self._other = aligned_buffer(BUFFER_BYTES), aligned_buffer(BUFFER_BYTES)
        self._filled = self._marked = 0  # bytes of it, and how many of them the last mark is about
        self._marks: list[Callable[[], None]] = []  # of what is in it
        self._thread = ThreadPoolExecutor(1, "write")
        self._writing: tuple[Future[None], list[Callable[[], None]]] | None = None
        self._end = 0  # of what was written
        self.digest = file_digest()  # of that

    def read(self, offset: int, nbytes: int) -> memoryview:
        """Up to nbytes from an aligned offset on, fewer at the end of the file; valid until the next call."""
        done = os.preadv(self._fd, [self._buffer[: min(nbytes, BUFFER_BYTES)]], offset)
        return self._buffer[:done]

    def cut(self, end: int, digest: Digest) -> None:
        """The file ends at byte `end`, a multiple of ALIGNMENT, and is written from there on; its digest so far."""
        os.ftruncate(self._fd, end)
        self._end, self.digest = end, digest

    def write(self, data: memoryview) -> None:
        """Append; it stays here until the buffer is full. Raises OSError, of an earlier write too."""
        while data:
            piece = data[: BUFFER_BYTES - self._filled]
            copy_bytes(self._buffer[self._filled : self._filled + len(piece)], piece)
            self._filled += len(piece)
            data = data[len(piece) :]
            if self._filled == BUFFER_BYTES:
                self._hand_over()

    def mark(self, written: Callable[[], None]) -> None:
        """Have `written` called, by a later call, once the disk was given everything up to here. Raises as write.

        A disk that has nothing to do is given what there is: marks of a slow caller do not wait for a full buffer.
        """
        self._marks.append(written)
        self._marked = self._filled
        if self._writing is None or self._writing[0].done():
            self._hand_over()

    def sync(self) -> None:
        """Everything is durable, and all marks were called. Raises OSError."""
        self._flush()
        os.fsync(self._fd)

    def _flush(self) -> None:
        self._hand_over()
        self._settle()

    def _hand_over(self) -> None:
        """Let the thread have what was filled, a multiple of ALIGNMENT by now, once it has written the other buffer."""
        full = self._buffer[: self._filled]
        assert len(full) % ALIGNMENT == 0
        self.digest.update(full)
        self._settle()
        self._writing = self._thread.submit(self._write, full), self._marks
        self._buffer, self._other = self._other, self._buffer
        self._filled, self._marked, self._marks = 0, 0, []

    def _settle(self) -> None:
        """Wait until nothing is being written; a write that failed stays, and fails whatever comes after it."""
        if self._writing is not None:
            writing, marks = self._writing
            writing.result()
            self._writing = None
            for written in marks:
                written()

    def _write(self, left: memoryview) -> None:
        while left:
            try:
                done = os.pwrite(self._fd, left, self._end)
            except OSError as error:
                if error.errno != errno.EINVAL or not self.direct:
                    raise
                leave_direct(self._fd)  # refused only now, or a limit that is no multiple of a block is near
                self.direct = False
                continue
            if not self.direct:
                self._write_behind(self._end + done)
            self._end += done
            left = left[done:]

    def _write_behind(self, end: int) -> None:
        """Give the disk what was written, as often as WRITE_BEHIND_BYTES are full, and drop what it has taken."""
        full = end // WRITE_BEHIND_BYTES * WRITE_BEHIND_BYTES
        if self._end < full:
            still_going = full - 4 * WRITE_BEHIND_BYTES  # the last times
            first = max(0, min(self._end, still_going))
            drop_from_cache(self._fd, first, full - first)

    def __enter__(self) -> "SequentialFile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Whatever stopped the caller, what is marked is written; what is not marked is nothing whole."""
        if kind is not None:
            self._filled = self._marked
            with suppress(OSError):  # of an earlier write: it has been told, or there is worse
                self._flush()
        self._thread.shutdown(cancel_futures=True)
        os.close(self._fd)
