"""A short look at this machine: how fast its disk gives records, its memory is read, and Python gets on.

Imports nothing of ours, so that both commands may ask it. Takes about seven seconds, most of them
for writing its file and touching pages.
"""

import fcntl
import mmap
import os
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

READS_IN_FLIGHT = 2  # of the engine's decode step (docs/LEARNED.md 39)
DISK_S, MEMORY_S = 2.0, 0.5  # that each is measured for
FILE_BYTES = 1 << 29  # of the file that is written to be read, at least one burst
SLOT_BYTES = 3 << 30  # of buffers at most: the rate of a virtual disk depends on the pages it writes to
MEMORY_BYTES = 1 << 28  # read over and over, far more than any cache
CALLS = 2000
TOUCH_BYTES = 1 << 26  # that a thread touches at a time
_ALIGNMENT = 4096
_F_NOCACHE = 48  # macOS fcntl.h

Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Probe:
    """Of this machine. n records asked for at once, and waited for, take read_wait_s + n * record / disk rate."""

    record_bytes: int
    disk_bytes_per_s: float
    read_wait_s: float
    direct: bool  # whether the disk was read past the page cache
    memory_bytes_per_s: float  # by all threads
    call_s: float  # of a small NumPy operation, which is Python's pace
    threads: int


def probe(folder: Path, record_bytes: int, reads_at_once: int, threads: int, slot_bytes: int = SLOT_BYTES) -> Probe:
    """Measure the disk of a folder as the engine reads it, and the memory with so many threads.

    The engine asks for up to reads_at_once records, waits for all, and computes. Reads into slot_bytes of memory, up to
    SLOT_BYTES. Writes a file of half a GiB into the folder (or its nearest parent that is there) and removes it. Raises
    OSError.
    """
    there = next(path for path in (folder, *folder.absolute().parents) if path.is_dir())
    record_bytes = -(-record_bytes // _ALIGNMENT) * _ALIGNMENT
    burst = max(2, reads_at_once)
    num_slots = max(burst, min(slot_bytes, SLOT_BYTES) // record_bytes)
    rate, wait_s, direct = _disk(there, record_bytes, burst, num_slots)
    return Probe(record_bytes, rate, wait_s, direct, _memory_rate(threads), _call_s(), threads)


def _disk(folder: Path, record_bytes: int, burst: int, num_slots: int) -> tuple[float, float, bool]:
    """(bytes per second, seconds that a burst of reads takes besides, whether past the page cache).

    Bursts of all sizes up to `burst` in turn, from random places into slots in random order; a line through them.
    """
    count = max(burst, FILE_BYTES // record_bytes)
    slots = _pages(num_slots * record_bytes).reshape(-1, record_bytes)
    rng = np.random.default_rng(0)
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".probe-") as file:
        block = os.urandom(1 << 20)
        for _ in range(-(-count * record_bytes // len(block))):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        fd, direct = _open_direct(file.name)
        spent: list[tuple[int, float]] = []

        def read(place: tuple[int, int]) -> None:
            slot, record = place
            assert os.preadv(fd, [slots[slot].data], record * record_bytes) == record_bytes

        try:
            with ThreadPoolExecutor(READS_IN_FLIGHT) as threads:
                end = time.perf_counter() + DISK_S
                while time.perf_counter() < end or len(spent) < 2 * burst:
                    size = 1 + len(spent) % burst
                    places = list(
                        zip(
                            rng.choice(len(slots), size, replace=False).tolist(),
                            rng.choice(count, size, replace=False).tolist(),
                            strict=True,
                        )
                    )
                    began = time.perf_counter()
                    list(threads.map(read, places))
                    spent.append((size, time.perf_counter() - began))
        finally:
            os.close(fd)
    return *_line(spent, record_bytes), direct


def _line(spent: list[tuple[int, float]], record_bytes: int) -> tuple[float, float]:
    """(bytes per second, seconds before them): the line through (records, seconds) that is least far from all."""
    sizes, seconds = np.array(spent).T
    slope, start = np.polyfit(sizes, seconds, 1)
    if start < 0 or slope <= 0:  # noise: a line through zero
        slope, start = seconds.sum() / sizes.sum(), 0.0
    return float(record_bytes / slope), float(start)


def _open_direct(name: str) -> tuple[int, bool]:
    """(file descriptor, whether it passes by the page cache); the cache is emptied where it does not."""
    flags = os.O_RDONLY | os.O_CLOEXEC
    if hasattr(os, "O_DIRECT"):
        try:
            return os.open(name, flags | os.O_DIRECT), True
        except OSError:
            pass  # a file system without it, such as some network mounts
    fd = os.open(name, flags)
    if sys.platform == "darwin":
        return fd, fcntl.fcntl(fd, _F_NOCACHE, 1) == 0
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    return fd, False


def _memory_rate(threads: int) -> float:
    words = _pages(MEMORY_BYTES).view(np.uint64)
    pieces = np.array_split(words, 4 * threads)

    def read(nth: int) -> int:
        piece = pieces[nth % len(pieces)]
        np.bitwise_or.reduce(piece)
        return piece.nbytes

    return _rate(read, threads)


def _rate(work: Callable[[int], int], threads: int) -> float:
    """Bytes per second of work(0), work(1), ... by several threads for MEMORY_S."""
    began = time.perf_counter()

    def take(thread: int) -> int:
        done, nth = 0, thread
        while time.perf_counter() - began < MEMORY_S:
            done += work(nth)
            nth += threads
        return done

    with ThreadPoolExecutor(threads) as pool:
        nbytes = sum(pool.map(take, range(threads)))
    return nbytes / (time.perf_counter() - began)


def _call_s() -> float:
    """The best of some rounds: what interrupts it is not Python."""
    a, b = np.ones((1, 64), np.float32), np.ones(64, np.float32)
    rounds = []
    for _ in range(5):
        began = time.perf_counter()
        for _ in range(CALLS // 5):
            a.reshape(8, 8)[1:] + b[:8]
        rounds.append((time.perf_counter() - began) / (CALLS // 5))
    return min(rounds)


def _pages(nbytes: int) -> Bytes:
    """Touched memory that begins on a page: uint8 [nbytes]. As formats/pages.py has it, which is not imported here."""
    pages = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel without them
            pages.madvise(mmap.MADV_HUGEPAGE)
    memory = np.frombuffer(pages, np.uint8)

    def touch(begin: int) -> None:
        memory[begin : begin + TOUCH_BYTES : _ALIGNMENT].fill(1)

    with ThreadPoolExecutor() as threads:
        list(threads.map(touch, range(0, nbytes, TOUCH_BYTES)))
    return memory
