"""All that a backend sees of the disk: the records of one layer's experts, each leased while it is used."""

import threading
from collections import deque
from collections.abc import Generator, Sequence
from concurrent.futures import FIRST_COMPLETED, CancelledError, Future, ThreadPoolExecutor, wait

from formats.dtypes import AnyArray
from runtime.cache import ExpertCache, ExpertKey, Policy
from runtime.store import ExpertStore
from runtime.trace import TraceWriter


class Experts:
    """The cache and the store behind it, with a bounded number of reads in flight."""

    def __init__(
        self,
        store: ExpertStore,
        num_slots: int,
        readers: int,
        policy: Policy | None = None,
        trace: TraceWriter | None = None,
    ) -> None:
        self.store = store
        self.cache = ExpertCache(num_slots, policy)
        self._trace = trace
        self._slots = store.new_slots(num_slots)
        self._readers = readers
        self.stopping = threading.Event()  # set by another thread, to end `get` at the next expert
        self._pool = ThreadPoolExecutor(readers, thread_name_prefix="reader")

    def get(self, layer: int, expert_ids: Sequence[int]) -> Generator[tuple[int, AnyArray], None, None]:
        """Yield (expert, its record as uint8 [record_bytes]) for distinct expert_ids, in any order.

        Cached ones come first while the others are being read. A record is valid until the next one is asked for.
        No expert of the step leaves the cache for another one of it, unless there are fewer slots than experts.
        Raises ChecksumError or StorageError naming layer and expert, CancelledError when `stopping` is set.
        """
        if self._trace is not None:
            self._trace.add(layer, expert_ids)
        hits: deque[tuple[ExpertKey, int]] = deque()
        misses: deque[ExpertKey] = deque()
        reads: dict[Future[None], tuple[ExpertKey, int]] = {}
        used: deque[ExpertKey] = deque()
        for expert in expert_ids:
            key = ExpertKey(layer, expert)
            slot = self.cache.lease(key)
            if slot is None:
                misses.append(key)
            else:
                hits.append((key, slot))
        try:
            while hits or misses or reads:
                if self.stopping.is_set():
                    raise CancelledError
                self._start_reads(misses, reads, used)
                if hits:
                    key, slot = hits.popleft()
                else:
                    key, slot = self._next_read(reads)
                try:
                    yield key.expert, self._record(layer, slot)
                finally:
                    used.append(key)
        finally:
            for key in (*used, *(key for key, _ in hits)):
                self.cache.release(key)
            wait(reads)
            for future, (key, _) in reads.items():
                (self.cache.discard if future.exception() else self.cache.release)(key)

    def _start_reads(
        self,
        misses: deque[ExpertKey],
        reads: dict[Future[None], tuple[ExpertKey, int]],
        used: deque[ExpertKey],
    ) -> None:
        while misses and len(reads) < self._readers:
            slot = self.cache.reserve(misses[0])
            if slot is None:
                if not used:
                    return
                self.cache.release(used.popleft())
                continue
            key = misses.popleft()
            reads[self._pool.submit(self.store.read, key, self._slots[slot])] = key, slot

    def _next_read(self, reads: dict[Future[None], tuple[ExpertKey, int]]) -> tuple[ExpertKey, int]:
        future = next(iter(wait(reads, return_when=FIRST_COMPLETED).done))
        key, slot = reads.pop(future)
        error = future.exception()
        if error is not None:
            self.cache.discard(key)
            raise error
        return key, slot

    def _record(self, layer: int, slot: int) -> AnyArray:
        return self._slots[slot][: self.store.record_bytes(layer)]

    def close(self) -> None:
        """End the reader threads; the store is its owner's to close."""
        self._pool.shutdown(cancel_futures=True)
