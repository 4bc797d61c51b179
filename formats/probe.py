"""A short look at this machine: how fast its disk gives records, and how fast its memory is read.

Imports nothing of ours, so that both commands may ask it. Takes about two seconds.
"""

import fcntl
import mmap
import os
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

PROBE_S = 0.6  # of each figure
FILE_BYTES = 1 << 29  # of the file that is written to be read, at least NUM_SLOTS records
NUM_SLOTS = 8  # buffers: the rate of a virtual disk depends on the pages it writes to
READS_IN_FLIGHT = 4
MEMORY_BYTES = 1 << 28  # read over and over, far more than any cache
_ALIGNMENT = 4096
_F_NOCACHE = 48  # macOS fcntl.h

Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Probe:
    """Bytes per second of records in random order from the disk, and of memory by all threads."""

    disk_bytes_per_s: float
    memory_bytes_per_s: float
    direct: bool  # whether the disk was read past the page cache
    threads: int


def probe(folder: Path, record_bytes: int, threads: int) -> Probe:
    """Measure the disk of a folder with reads of record_bytes, and the memory with so many threads.

    Writes a file of half a GiB into the folder (or its nearest parent that is there) and removes it. Raises OSError.
    """
    there = next(path for path in (folder, *folder.absolute().parents) if path.is_dir())
    disk, direct = _disk_rate(there, -(-record_bytes // _ALIGNMENT) * _ALIGNMENT)
    return Probe(disk, _memory_rate(threads), direct, threads)


def _disk_rate(folder: Path, record_bytes: int) -> tuple[float, bool]:
    count = max(NUM_SLOTS, FILE_BYTES // record_bytes)
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".probe-") as file:
        block = os.urandom(1 << 20)
        for _ in range(-(-count * record_bytes // len(block))):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        fd, direct = _open_direct(file.name)
        try:
            slots = [_pages(record_bytes) for _ in range(NUM_SLOTS)]
            order = np.random.default_rng(0).permutation(count).tolist()

            def read(nth: int) -> int:
                return os.preadv(fd, [slots[nth % NUM_SLOTS].data], order[nth % count] * record_bytes)

            return _rate(read, READS_IN_FLIGHT), direct
        finally:
            os.close(fd)


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
    """Bytes per second of work(0), work(1), ... by several threads for PROBE_S."""
    began = time.perf_counter()

    def take(thread: int) -> int:
        done, nth = 0, thread
        while time.perf_counter() - began < PROBE_S:
            done += work(nth)
            nth += threads
        return done

    with ThreadPoolExecutor(threads) as pool:
        nbytes = sum(pool.map(take, range(threads)))
    return nbytes / (time.perf_counter() - began)


def _pages(nbytes: int) -> Bytes:
    """Touched anonymous memory that begins on a page: uint8 [nbytes]."""
    memory = np.frombuffer(mmap.mmap(-1, nbytes), np.uint8)
    memory[::_ALIGNMENT] = 1
    return memory
