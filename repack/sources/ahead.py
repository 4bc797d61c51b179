"""Reads ahead of a task: segments of the coming ranges, fetched over several connections, held until they are used.

The first task has the right of way, so that with a slow link one layer is finished after another. A task reads ahead
no further than its window, so neither memory nor disk grows when encoding is slower than the link.
"""

import heapq
import itertools
import threading
import time
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from formats.checksum import blocks
from formats.dtypes import AnyArray
from formats.errors import StorageError
from repack.sources.base import SPOOL_BYTES, Range
from repack.sources.remote import Remote, StoppedError
from repack.sources.spool import BLOCK_BYTES, Piece, Spool

SEGMENT_BYTES = 32 * BLOCK_BYTES  # per request at most
WINDOW_BYTES = 16 * SEGMENT_BYTES  # fetched and not yet used, of all tasks together
# Requests are few at a time while they are answered as fast as this: the processors are busy then, and more threads
# would only take turns; a slower answer has waited for the link, where more requests bring more (docs/LEARNED.md 71).
FEW_REQUESTS = 2
PROMPT_S, PROMPT_BYTES_PER_S = 0.02, 100e6
IDLE_S = 2.0  # a connection's thread ends when there was nothing to do for so long
_ITEM_BYTES = 8  # the widest that a plane is made of
_WAIT_S = 0.25


class Segment:
    """A range that is fetched with one request if nothing breaks; its reader's lock guards what changes."""

    def __init__(self, file: str, offset: int) -> None:
        self.file, self.offset = file, offset
        self.nbytes = 0
        self.last_unit = 0  # the last one that needs it
        self.pieces: Sequence[Piece] = ()
        self.slots: list[int] = []  # in the spool
        self.buffer: AnyArray | None = None
        self.arrived = self.used = 0  # bytes
        self.awaited: int | None = None  # the byte that its reader waits for
        self.error: BaseException | None = None

    @property
    def end(self) -> int:
        return self.offset + self.nbytes


def cut_segments(units: Sequence[Sequence[Range]]) -> list[Segment]:
    """The segments of the units' ranges, in the order in which they are needed.

    Small ranges that touch share one and are whole in it; large ones are cut.
    """
    segments: list[Segment] = []
    open_ends: dict[tuple[str, int], Segment] = {}
    for number, ranges in enumerate(units):
        for file, offset, nbytes in ranges:
            for start, length in blocks(nbytes, SEGMENT_BYTES):
                segment = open_ends.pop((file, offset + start), None)
                if segment is None or segment.nbytes + length > SEGMENT_BYTES:
                    segments.append(segment := Segment(file, offset + start))
                segment.nbytes += length
                segment.last_unit = number
                open_ends[file, segment.end] = segment
    return segments


class Link:
    """Connections to a remote that take the most urgent segment first. Picklable: each process has its own."""

    def __init__(self, remote: Remote, connections: int, jobs: int) -> None:
        self.remote, self.connections, self.jobs = remote, connections, jobs
        self._begin()

    def _begin(self) -> None:
        self._changed = threading.Condition()
        self._waiting: list[tuple[int, int, int, Callable[[], None]]] = []  # a heap
        self._order = itertools.count()
        self._tasks = itertools.count()
        self._threads = self._active = 0
        self._most_active = min(FEW_REQUESTS, self.connections)
        self._buffers: list[AnyArray] = []  # to use again: first touch costs more than all else that happens to a byte
        self.waited_s = 0.0  # for bytes, of all readers together

    def __getstate__(self) -> dict[str, Any]:
        return {"remote": self.remote, "connections": self.connections, "jobs": self.jobs}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._begin()

    def new_task(self) -> int:
        """A number that later tasks stand behind."""
        return next(self._tasks)

    def buffer(self) -> AnyArray:
        """Memory for a large segment: uint8 [SEGMENT_BYTES]."""
        with self._changed:
            return self._buffers.pop() if self._buffers else np.empty(SEGMENT_BYTES, np.uint8)

    def take_back(self, buffer: AnyArray) -> None:
        """Nobody uses it any more."""
        with self._changed:
            self._buffers.append(buffer)

    def submit(self, task: int, nbytes: int, fetch: Callable[[], None]) -> None:
        """Run `fetch`, which brings nbytes, on a connection's thread; it must not raise."""
        with self._changed:
            heapq.heappush(self._waiting, (task, next(self._order), nbytes, fetch))
            self._wake()

    def _wake(self) -> None:
        """Let one more thread fetch, if it may."""
        if self._can_begin() and self._threads == self._active:
            self._threads += 1
            threading.Thread(target=self._work, name="connection", daemon=True).start()
        self._changed.notify()

    def _can_begin(self) -> bool:
        return bool(self._waiting) and self._active < self._most_active

    def _work(self) -> None:
        while True:
            with self._changed:
                if not self._changed.wait_for(self._can_begin, IDLE_S):
                    self._threads -= 1
                    return
                *_, nbytes, fetch = heapq.heappop(self._waiting)
                self._active += 1
            began = time.monotonic()
            fetch()
            prompt = time.monotonic() - began <= PROMPT_S + nbytes / PROMPT_BYTES_PER_S
            with self._changed:
                self._active -= 1
                self._most_active += -1 if prompt else 1
                self._most_active = max(min(FEW_REQUESTS, self.connections), min(self._most_active, self.connections))
                self._wake()


class RemoteReader:
    """Reads from a remote, ahead of what it is asked for (see repack.sources.base.Reader)."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._units: Sequence[Sequence[Range]] = ()

    def __getstate__(self) -> dict[str, Any]:
        return {"_link": self._link, "_units": ()}

    def __enter__(self) -> "RemoteReader":
        self._lock = threading.Condition()
        self._stopped = threading.Event()
        self._task = self._link.new_task()
        self._spool: Spool | None = None
        self._segments: dict[str, list[Segment]] = {}  # by file, sorted by offset
        self._planned: deque[Segment] = deque()  # not yet asked for
        self._begun: deque[Segment] = deque()  # asked for, until their last unit is finished
        self._viewed: list[tuple[Segment, int]] = []  # and how many of its bytes
        self._held_bytes = 0
        self._waiting: Callable[[], None] = _nothing
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopped.set()
        if self._spool is not None:
            self._spool.close()

    # ---- what is coming

    def expect(
        self,
        units: Sequence[Sequence[Range]],
        spool: Path | None = None,
        waiting: Callable[[], None] | None = None,
    ) -> bool:
        """Begin to fetch what the units will read, in this order."""
        self._waiting = waiting or _nothing
        segments = cut_segments(units)
        if spool is not None and segments:
            files = sorted({segment.file for segment in segments})
            self._spool = Spool(spool, files, SPOOL_BYTES // max(4, self._link.jobs))
        for segment in segments:
            if self._spool is None:
                segment.pieces = [Piece(segment.offset, segment.end, None)]
            else:
                segment.pieces = list(self._spool.pieces(segment.file, segment.offset, segment.end))
                segment.slots = [self._spool.adopt(piece.block) for piece in segment.pieces if piece.block]
            self._segments.setdefault(segment.file, []).append(segment)
        for in_file in self._segments.values():
            in_file.sort(key=lambda segment: segment.offset)
        if self._spool is not None:
            self._spool.drop_unwanted()
        self._planned = deque(segments)
        with self._lock:
            self._fill_window()
        return True

    def finished(self, units: int) -> None:
        """The first `units` units are in the output: what only they need may be forgotten."""
        with self._lock:
            kept: deque[Segment] = deque()
            for segment in self._begun:
                if segment.last_unit >= units or segment.arrived < segment.nbytes:
                    kept.append(segment)
                    continue
                self._drop(segment)
                if self._spool is not None:
                    self._spool.release(segment.slots)
                segment.slots = []
            self._begun = kept
            self._fill_window()

    # ---- reading

    def read_into(self, file: str, offset: int, buffer: memoryview) -> None:
        done = 0
        while done < len(buffer):
            with self._lock:
                segment = self._find(file, offset + done, len(buffer) - done)
                at = offset + done - segment.offset
                if segment.arrived <= at and segment.error is None:
                    self._wait(segment, at)
                if segment.error is not None:
                    raise segment.error
                count = min(segment.arrived - at, len(buffer) - done)
                content = segment.buffer
            assert content is not None
            np.copyto(np.frombuffer(buffer[done : done + count], np.uint8), content[at : at + count])
            done += count
            with self._lock:
                self._use(segment, count)

    def view(self, file: str, offset: int, nbytes: int) -> AnyArray | None:
        with self._lock:
            segment = self._find(file, offset, nbytes)
            at = offset - segment.offset
            if at % _ITEM_BYTES or at + nbytes > segment.nbytes:
                return None
            self._wait(segment, at + nbytes - 1)
            if segment.error is not None:
                raise segment.error
            self._viewed.append((segment, nbytes))
            assert segment.buffer is not None
            return segment.buffer[at : at + nbytes]

    def release(self) -> None:
        with self._lock:
            for segment, nbytes in self._viewed:
                self._use(segment, nbytes)
            self._viewed.clear()

    def _use(self, segment: Segment, nbytes: int) -> None:
        segment.used += nbytes
        if segment.used >= segment.nbytes:
            self._drop(segment)
            self._fill_window()

    def _wait(self, segment: Segment, at: int) -> None:
        """Until a byte of it is there, or its error."""
        begun = time.monotonic()
        segment.awaited = at
        while segment.arrived <= at and segment.error is None:
            if not self._lock.wait(_WAIT_S):
                self._lock.release()  # what is told may take its time
                try:
                    self._waiting()
                finally:
                    self._lock.acquire()
        segment.awaited = None
        self._link.waited_s += time.monotonic() - begun

    def _find(self, file: str, offset: int, nbytes: int) -> Segment:
        """The segment that holds a byte; one that was not expected, or not yet, is asked for at once."""
        in_file = self._segments.setdefault(file, [])
        i = bisect_right(in_file, offset, key=lambda segment: segment.offset)
        segment = in_file[i - 1] if i and offset < in_file[i - 1].end else None
        if segment is None or segment.used >= segment.nbytes:
            segment = Segment(file, offset)
            segment.nbytes = nbytes
            segment.pieces = [Piece(offset, offset + nbytes, None)]
            self._ask(segment, urgent=True)
        elif segment.buffer is None and segment.error is None:
            self._planned.remove(segment)
            self._begun.append(segment)
            self._ask(segment, urgent=True)
        return segment

    def _fill_window(self) -> None:
        window = max(2 * SEGMENT_BYTES, WINDOW_BYTES // self._link.jobs)
        while self._planned and self._held_bytes + self._planned[0].nbytes <= window:
            segment = self._planned.popleft()
            self._begun.append(segment)
            self._ask(segment)

    def _ask(self, segment: Segment, urgent: bool = False) -> None:
        large = SEGMENT_BYTES // 2 < segment.nbytes <= SEGMENT_BYTES  # small ones are many: they get what they need
        segment.buffer = self._link.buffer() if large else np.empty(segment.nbytes, np.uint8)
        self._held_bytes += segment.nbytes
        self._link.submit(-1 if urgent else self._task, segment.nbytes, lambda: self._run(segment))

    def _drop(self, segment: Segment) -> None:
        """Take its buffer back."""
        if segment.buffer is not None:
            if len(segment.buffer) == SEGMENT_BYTES:
                self._link.take_back(segment.buffer)
            self._held_bytes -= segment.nbytes
            segment.buffer = None

    # ---- on a connection's thread

    def _run(self, segment: Segment) -> None:
        try:
            self._fetch(segment)
        except BaseException as error:
            with self._lock:
                segment.error = error
                self._lock.notify_all()

    def _fetch(self, segment: Segment) -> None:
        content = segment.buffer
        assert content is not None
        data = content.data
        for start, stop, block in segment.pieces:
            if self._stopped.is_set():
                raise StoppedError
            piece = data[start - segment.offset : stop - segment.offset]
            if block is not None and self._spool is not None:
                if not self._spool.read(block, start, piece):
                    raise StorageError("the fetched bytes beside the output were cut")
                self._advance(segment, stop)
            else:
                self._fetch_piece(segment, start, piece)

    def _fetch_piece(self, segment: Segment, start: int, piece: memoryview) -> None:
        kept = 0  # bytes of the piece that are in the spool

        def arrived(done: int) -> None:
            nonlocal kept
            for first, end in _blocks(start + kept, start + done, whole=done < len(piece)):
                if self._spool is not None:
                    slot = self._spool.put(segment.file, first, piece[first - start : end - start])
                    if slot is not None:
                        segment.slots.append(slot)
                kept = end - start
                self._advance(segment, end)

        self._link.remote.fetch(segment.file, start, piece, arrived, self._stopped)

    def _advance(self, segment: Segment, end: int) -> None:
        with self._lock:
            segment.arrived = end - segment.offset
            if segment.awaited is not None and segment.arrived > segment.awaited:
                self._lock.notify_all()


def _blocks(start: int, stop: int, whole: bool) -> Iterator[tuple[int, int]]:
    """(start, stop) of what lies between, cut at multiples of BLOCK_BYTES; `whole`: without an unfinished last one."""
    while start < stop:
        end = min(stop, start - start % BLOCK_BYTES + BLOCK_BYTES)
        if whole and end % BLOCK_BYTES:
            return
        yield start, end
        start = end


def _nothing() -> None:
    pass
