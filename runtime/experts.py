"""All that a backend sees of the disk: the records of one layer's experts, each leased while it is used."""

import threading
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import CancelledError
from contextlib import closing

from formats.dtypes import AnyArray
from runtime.cache import ExpertCache, ExpertKey, Held, Policy, Wave
from runtime.lookahead import Lookahead
from runtime.native_reader import NativeReader
from runtime.reader import Reader, ThreadReader
from runtime.store import ExpertStore
from runtime.trace import TraceWriter


class Experts:
    """The cache, its slots, and the reader that fills them."""

    def __init__(
        self,
        store: ExpertStore,
        num_slots: int,
        readers: int,
        policy: Policy | None = None,
        trace: TraceWriter | None = None,
        *,
        native: bool = False,
        lookahead: str = "off",
    ) -> None:
        """readers: how many reads may be under way at once. Raises UnsupportedError for native without the library."""
        self.lookahead = Lookahead(lookahead if native else "off")  # threads of Python do not know how to wait a turn
        self.store = store
        self.slots_of = store.new_table() if native else None  # that kernels read
        self.cache = ExpertCache(num_slots, policy, self.slots_of)
        self.stopping = threading.Event()
        self.early_reads = self.early_used = 0
        self._trace = trace
        self._slots = store.new_slots(num_slots)
        self.native = NativeReader(store, self._slots, readers) if native else None
        self.reader: Reader = self.native or ThreadReader(store, self._slots, readers)
        self._begun: tuple[int, Wave | None, Iterator[Wave]] | None = None
        self._early: dict[ExpertKey, int] = {}

    # ---- what a step asks for

    def begin(self, layer: int, expert_ids: Sequence[int]) -> None:
        """Lease distinct experts and begin all reads that they need and that slots are there for.

        The next `waves` or `get` must ask for the same ones; until then other work can be done.
        """
        if self._trace is not None:
            self._trace.add(layer, expert_ids)
        self._settle_early(layer, expert_ids)
        waves = self.cache.waves(layer, expert_ids)
        first = next(waves, None)
        self._begun = layer, first, waves
        if first is not None:
            self.reader.submit(first.reads)

    def waves(self, layer: int, expert_ids: Sequence[int]) -> Generator[list[Held], None, None]:
        """Yield the experts in parts (ExpertCache.waves), each leased until the next part is asked for.

        Their reads are under way and have not ended: ask the reader. A caller that stops early leaves nothing leased.
        Raises CancelledError after `stop`.
        """
        try:
            if self._begun is None:
                self.begin(layer, expert_ids)
            assert self._begun is not None
            begun, wave, rest = self._begun
            assert begun == layer
            while wave is not None:
                self.check_stopped()
                yield wave.experts
                wave = next(rest, None)
                if wave is not None:
                    self.reader.submit(wave.reads)
            self._begun = None
        finally:
            if self._begun is not None:
                self.abandon()

    def whole(self, layer: int, expert_ids: Sequence[int]) -> list[Held] | None:
        """All of the experts, as `waves` gives them, where they come in one part; leased until `finish` or `abandon`.

        Else None, and they are to be asked of `waves`. Raises CancelledError after `stop`.
        """
        if self._begun is None:
            self.begin(layer, expert_ids)
        assert self._begun is not None
        begun, wave, _ = self._begun
        assert begun == layer
        if wave is None or len(wave.experts) != len(expert_ids):
            return None
        self.check_stopped()
        return wave.experts

    def finish(self) -> None:
        """End the leases of `whole`, whose reads have ended."""
        assert self._begun is not None
        following = next(self._begun[2], None)  # asking for it ends the leases
        assert following is None
        self._begun = None

    @property
    def guessed(self) -> bool:
        """Whether what was read on a guess may still be on its way: then each layer must `begin`."""
        return bool(self._early)

    def passed(self, first: int, expert_ids: Sequence[Sequence[int]]) -> None:
        """Note that layers from `first` on were computed on slots of `slots_of`: as `begin`, `whole` and `finish`."""
        for layer, distinct in enumerate(expert_ids, first):
            if self._trace is not None:
                self._trace.add(layer, distinct)
            self.cache.used(layer, distinct)

    def get(self, layer: int, expert_ids: Sequence[int]) -> Generator[tuple[int, AnyArray], None, None]:
        """Yield (expert, its record as uint8 [record_bytes]) for distinct expert_ids, in any order.

        Cached ones come first while the others are being read. A record is valid until the next one is asked for.
        Raises ChecksumError or StorageError naming layer and expert, CancelledError after `stop`.
        """
        record_bytes = self.store.record_bytes(layer)
        with closing(self.waves(layer, expert_ids)) as waves:
            for wave in waves:
                left = list(wave)
                while left:
                    self.check_stopped()
                    key, slot = left.pop(self.reader.wait_any([slot for _, slot in left]))
                    self.reader.check(key, slot)
                    yield key.expert, self._slots[slot][:record_bytes]

    def load(self, keys: Iterable[ExpertKey]) -> int:
        """Read experts before anyone asks for them, in that order until no slot is free; how many. Counts nothing."""
        reads = []
        for key in keys:
            if self.cache.free_slots == 0 or (slot := self.cache.reserve(key)) is None:
                break
            reads.append(Held(key, slot))
        try:
            self.reader.submit(sorted(reads))
            for key, slot in reads:
                self.reader.wait_any([slot])
                self.reader.check(key, slot)
        finally:
            self.abandon()
        return len(reads)

    def abandon(self) -> None:
        """Give up what was begun: reads are taken back or waited for, and nothing stays leased."""
        self._begun = None
        self._early.clear()
        leased = self.cache.leased()
        self.reader.cancel([slot for _, slot in leased])
        for key, slot in leased:
            self._end_lease(key, slot)

    def _end_lease(self, key: ExpertKey, slot: int) -> None:
        """Of a slot that has no read under way."""
        if self.reader.holds(slot):
            self.cache.release(key)
        else:
            self.cache.discard(key)
            self.store.proven.discard(key)

    # ---- reads on a guess

    def look_ahead(self, layer: int, expert_ids: Sequence[int], most: int) -> None:
        """Begin to read up to `most` experts that a later layer may ask for, when nothing that is wanted waits."""
        assert self.native is not None
        reads: list[Held] = []
        most = min(most, self.cache.idle_slots // 2)
        for key in (ExpertKey(layer, expert) for expert in expert_ids):
            if len(reads) == most:
                break
            if not self.cache.holds(key) and (slot := self.cache.reserve(key)) is not None:
                reads.append(Held(key, slot))
        self._early.update(reads)
        self.early_reads += len(reads)
        self.native.submit(reads, early=True)

    def _settle_early(self, layer: int, expert_ids: Sequence[int]) -> None:
        """Of what was read on a guess, keep what is wanted now and take back what has not begun."""
        if not self._early:
            return
        assert self.native is not None
        wanted = {ExpertKey(layer, expert) for expert in expert_ids}
        right = {key: slot for key, slot in self._early.items() if key in wanted}
        wrong = {key: slot for key, slot in self._early.items() if key not in wanted}
        self.native.promote(list(right.values()))
        self.native.cancel(list(wrong.values()), wait=False)
        self.early_used += len(right)
        self._early = {key: slot for key, slot in wrong.items() if self.native.pending(slot)}
        for key, slot in wrong.items():
            if key not in self._early:
                self._end_lease(key, slot)

    # ---- the rest

    def stop(self) -> None:
        """End what is being computed at its next wait, from another thread, until `resume`."""
        self.stopping.set()
        if self.native is not None:
            self.native.stop(True)

    def resume(self) -> None:
        """Take `stop` back."""
        self.stopping.clear()
        if self.native is not None:
            self.native.stop(False)

    def check_stopped(self) -> None:
        """Raise CancelledError after `stop`."""
        if self.stopping.is_set():
            raise CancelledError

    def unused_slots(self) -> list[AnyArray]:
        """Memory of the slots that hold no expert; what is written there is not kept."""
        return [self._slots[slot] for slot in self.cache.unused()]

    @property
    def bytes_read(self) -> int:
        """Of experts, by either way to read."""
        return self.store.counters.nbytes + (self.native.counters.nbytes if self.native is not None else 0)

    @property
    def read_s(self) -> float:
        """Seconds during which at least one read was under way."""
        return self.store.counters.seconds + (self.native.counters.busy_ns / 1e9 if self.native is not None else 0.0)

    @property
    def wait_s(self) -> float:
        """Seconds during which native kernels had nothing to do but wait for reads."""
        return self.native.counters.wait_ns / 1e9 if self.native is not None else 0.0

    def close(self) -> None:
        """End the reader's threads; the store is its owner's to close."""
        self.reader.close()
