"""Reads under way: what Experts wants of whoever carries them out, and threads of Python that do."""

from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Protocol

from formats.dtypes import AnyArray
from runtime.cache import ExpertKey, Held
from runtime.store import ExpertStore


class Reader(Protocol):
    """Fills slots, several at a time, each by one read."""

    name: str

    def submit(self, reads: Sequence[Held]) -> None:
        """Begin reads, in that order; their slots are the reader's until they have ended."""

    def wait_any(self, slots: Sequence[int]) -> int:
        """Wait until one of the slots has no read under way; its place among them, the first if there are several."""

    def cancel(self, slots: Sequence[int]) -> None:
        """Take back reads that have not begun and wait for the others: none of these slots is read into afterwards."""

    def holds(self, slot: int) -> bool:
        """Whether the last read into the slot has ended well."""

    def check(self, key: ExpertKey, slot: int) -> None:
        """Raise what went wrong with the last read into the slot: StorageError or ChecksumError."""

    def close(self) -> None:
        """End all threads."""


class ThreadReader:
    """Threads of Python: for the NumPy backend, and wherever there is no native library."""

    name = "Python threads"

    def __init__(self, store: ExpertStore, slots: AnyArray, readers: int) -> None:
        self._store = store
        self._slots = slots
        self._reads: dict[int, Future[None]] = {}  # the last into each slot
        self._pool = ThreadPoolExecutor(readers, thread_name_prefix="reader")

    def submit(self, reads: Sequence[Held]) -> None:
        for key, slot in reads:
            assert slot not in self._reads or self._reads[slot].done()
            self._reads[slot] = self._pool.submit(self._store.read, key, self._slots[slot])

    def wait_any(self, slots: Sequence[int]) -> int:
        reads = [self._reads[slot] for slot in slots]
        wait(reads, return_when=FIRST_COMPLETED)
        return next(place for place, read in enumerate(reads) if read.done())

    def cancel(self, slots: Sequence[int]) -> None:
        reads = [self._reads[slot] for slot in slots]
        wait([read for read in reads if not read.cancel()])

    def holds(self, slot: int) -> bool:
        read = self._reads[slot]
        return not read.cancelled() and read.exception() is None

    def check(self, key: ExpertKey, slot: int) -> None:
        self._reads[slot].result()

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)
