"""How fast the link and the encoder are, each by itself, so that a user sees which of them the other one waits for."""

import time
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

WINDOW_S = 10.0


class Traffic(NamedTuple):
    """What a remote source has done so far; `waited_s` is what all tasks together have waited for bytes."""

    received_bytes: int
    requests: int
    faults: dict[str, int]
    waited_s: float


class Rates:
    """Bytes per second: of the link lately, and of the encoder while it had bytes."""

    def __init__(self, traffic: Callable[[], Traffic], jobs: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._traffic, self._jobs, self._clock = traffic, jobs, clock
        self._begun = clock()
        first = traffic()
        self._first = first
        self._seen = deque([(self._begun, first.received_bytes)])

    def link(self) -> float:
        """Over the last WINDOW_S."""
        now, received = self._clock(), self._traffic().received_bytes
        self._seen.append((now, received))
        while len(self._seen) > 2 and now - self._seen[1][0] > WINDOW_S:
            self._seen.popleft()
        then, before = self._seen[0]
        return (received - before) / max(now - then, 1e-9)

    def overall_link(self) -> float:
        """Since the beginning."""
        elapsed = max(self._clock() - self._begun, 1e-9)
        return (self._traffic().received_bytes - self._first.received_bytes) / elapsed

    def encoder(self, done_bytes: int) -> float:
        """Of the tasks together, if none had to wait."""
        waited = (self._traffic().waited_s - self._first.waited_s) / self._jobs
        return done_bytes / max(self._clock() - self._begun - waited, 1e-9)

    def facts(self, done_bytes: int) -> dict[str, Any]:
        """What went over the network, and what went wrong on the way, as JSON."""
        traffic = self._traffic()
        return {
            "bytes": traffic.received_bytes,
            "requests": traffic.requests,
            "faults": traffic.faults,
            "link_bytes_per_s": self.overall_link(),
            "encoder_bytes_per_s": self.encoder(done_bytes),
        }
