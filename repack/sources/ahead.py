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

from formats.dtypes import AnyArray
from formats.errors import StorageError
from repack.sources.base import SPOOL_BYTES, Range
from repack.sources.remote import Remote, StoppedError
from repack.sources.spool import BLOCK_BYTES, Piece, Spool

SEGMENT_BYTES = 32 * BLOCK_BYTES  # per request at most; borders lie on its multiples, so they do not move in a resume
WINDOW_BYTES = 16 * SEGMENT_BYTES  # fetched and not yet used, of all tasks together
IDLE_S = 2.0  # a connection's thread ends when there was nothing to do for so long
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
        self.error: BaseException | None = None

    @property
    def end(self) -> int:
        return self.offset + self.nbytes


def cut_segments(units: Sequence[Sequence[Range]]) -> list[Segment]:
    """The segments of the units' ranges, in the order in which they are needed; ranges that touch share one."""
    segments: list[Segment] = []
    open_ends: dict[tuple[str, int], Segment] = {}
    for number, ranges in enumerate(units):
        for file, start, stop in _cells(ranges):
            segment = open_ends.pop((file, start), None) if start % SEGMENT_BYTES else None
            if segment is None:
                segments.append(segment := Segment(file, start))
            segment.nbytes += stop - start
            segment.last_unit = number
            open_ends[file, stop] = segment
    return segments


def _cells(ranges: Sequence[Range]) -> Iterator[tuple[str, int, int]]:
    """(file, start, stop) of the ranges, cut at multiples of SEGMENT_BYTES."""
    for file, offset, nbytes in ranges:
        start = offset
        while start < offset + nbytes:
            stop = min(offset + nbytes, start - start % SEGMENT_BYTES + SEGMENT_BYTES)
            yield file, start, stop
            start = stop


class Link:
    """Connections to a remote that take the most urgent segment first. Picklable: each process has its own."""

    def __init__(self, remote: Remote, connections: int, jobs: int) -> None:
        self.remote, self.connections, self.jobs = remote, connections, jobs
        self._begin()

    def _begin(self) -> None:
        self._changed = threading.Condition()
        self._waiting: list[tuple[int, int, Callable[[], None]]] = []  # a heap
        self._order = itertools.count()
        self._tasks = itertools.count()
        self._threads = self._idle = 0
        self.waited_s = 0.0  # for bytes, of all readers together

    def __getstate__(self) -> dict[str, Any]:
        return {"remote": self.remote, "connections": self.connections, "jobs": self.jobs}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._begin()

    def new_task(self) -> int:
        """A number that later tasks stand behind."""
        return next(self._tasks)

    def submit(self, task: int, fetch: Callable[[], None]) -> None:
        """Run `fetch` on a connection's thread; it must not raise."""
        with self._changed:
            heapq.heappush(self._waiting, (task, next(self._order), fetch))
            if self._idle < len(self._waiting) and self._threads < self.connections:
                self._threads += 1
                threading.Thread(target=self._work, name="connection", daemon=True).start()
            self._changed.notify()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._idle += 1
                there = self._changed.wait_for(lambda: self._waiting, IDLE_S)
                self._idle -= 1
                if not there:
                    self._threads -= 1
                    return
                fetch = heapq.heappop(self._waiting)[2]
            fetch()


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
        self._held_bytes = 0
        self._free: list[AnyArray] = []  # buffers to use again
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
                segment.used += count
                if segment.used >= segment.nbytes:
                    self._drop(segment)
                    self._fill_window()

    def _wait(self, segment: Segment, at: int) -> None:
        """Until a byte of it is there, or its error."""
        begun = time.monotonic()
        while segment.arrived <= at and segment.error is None:
            if not self._lock.wait(_WAIT_S):
                self._lock.release()  # what is told may take its time
                try:
                    self._waiting()
                finally:
                    self._lock.acquire()
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
        reused = self._free.pop() if large and self._free else None
        segment.buffer = np.empty(SEGMENT_BYTES if large else segment.nbytes, np.uint8) if reused is None else reused
        self._held_bytes += segment.nbytes
        self._link.submit(-1 if urgent else self._task, lambda: self._run(segment))

    def _drop(self, segment: Segment) -> None:
        """Take its buffer back."""
        if segment.buffer is not None:
            if len(segment.buffer) == SEGMENT_BYTES:  # first touch costs more than all else that happens to a byte here
                self._free.append(segment.buffer)
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
