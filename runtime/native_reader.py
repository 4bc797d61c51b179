"""Reads by the threads of runtime/native/reader.c: no byte and no wait passes through Python."""

import ctypes
import os
from collections.abc import Sequence
from ctypes import POINTER, byref, c_int32, c_int64, c_uint64, c_void_p
from functools import cache

import numpy as np

from formats.dtypes import AnyArray
from formats.errors import UnsupportedError
from runtime.backends.abi import load_library
from runtime.cache import ExpertKey, Held
from runtime.store import ExpertStore

FULL, FAILED, SHORT, WRONG = 3, 4, 5, 6  # enum se_slot_state
CHECK, BUFFERED, EARLY = 1, 2, 4  # enum se_fetch_flags
PENDING = (1, 2)
BYTES_IN_FLIGHT = 100 << 20  # four reads of the largest experts (docs/LEARNED.md 39); beyond it two


class Fetch(ctypes.Structure):
    """se_fetch: one read into the start of a slot."""

    _fields_ = (
        ("slot", c_int64),
        ("offset", c_int64),
        ("nbytes", c_int64),
        ("checksum", c_uint64),
        ("fd", c_int32),
        ("flags", c_int32),
    )


class Counters(ctypes.Structure):
    """se_reader_counters."""

    _fields_ = (("nbytes", c_int64), ("busy_ns", c_int64), ("wait_ns", c_int64))


@cache
def _library() -> ctypes.CDLL:
    """The native library with the reader's signatures. Raises UnsupportedError when it was not built."""
    library = load_library()
    if library is None:
        raise UnsupportedError("the native kernels were not built, expected libse_native beside runtime/native")
    assert (ctypes.sizeof(Fetch), ctypes.sizeof(Counters)) == (40, 24)  # static_assert of reader.h
    reader, slots = c_void_p, c_void_p
    for name, restype, argtypes in (
        ("se_reader_open", c_void_p, (c_void_p, c_int64, c_int64, c_int64, c_int64)),
        ("se_reader_close", None, (reader,)),
        ("se_reader_submit", c_int32, (reader, POINTER(Fetch), c_int64)),
        ("se_reader_promote", None, (reader, slots, c_int64)),
        ("se_reader_cancel", None, (reader, slots, c_int64, c_int32)),
        ("se_reader_wait_any", c_int64, (reader, slots, c_int64)),
        ("se_reader_state", c_int32, (reader, c_int64, POINTER(c_int64))),
        ("se_reader_stop", None, (reader, c_int32)),
        ("se_reader_count", None, (reader, POINTER(Counters))),
        ("se_xxh3", c_uint64, (c_void_p, c_int64)),
    ):
        function = getattr(library, name)
        function.restype, function.argtypes = restype, argtypes
    return library


class NativeReader:
    """A Reader (runtime/reader.py) whose handle kernels take too, to compute on slots as they fill."""

    name = "native threads"

    def __init__(self, store: ExpertStore, slots: AnyArray, readers: int) -> None:
        """Raises UnsupportedError without the library, or when threads cannot be started."""
        self._store = store
        self._slots = slots  # the threads write there: it must live as long as they do
        self._library = _library()
        self.handle = self._library.se_reader_open(
            slots.ctypes.data, slots.shape[1], len(slots), readers, BYTES_IN_FLIGHT
        )
        self._last = Counters()
        if not self.handle:
            raise UnsupportedError(f"{readers} reader threads cannot be started")

    def submit(self, reads: Sequence[Held], early: bool = False) -> None:
        if not reads:
            return
        flags = (0 if self._store.direct else BUFFERED) | (EARLY if early else 0)
        fetches = (Fetch * len(reads))(*(self._fetch(key, slot, flags) for key, slot in reads))
        status = self._library.se_reader_submit(self.handle, fetches, len(reads))
        assert status == 0, "a slot is read into while it is in use"

    def _fetch(self, key: ExpertKey, slot: int, flags: int) -> Fetch:
        """One read. An expert is checked the first time; a read that goes wrong is no longer proven."""
        fd, offset, nbytes, checksum = self._store.place(key)
        if key in self._store.proven:
            return Fetch(slot, offset, nbytes, 0, fd, flags)
        self._store.proven.add(key)
        return Fetch(slot, offset, nbytes, int(checksum, 16), fd, flags | CHECK)

    def promote(self, slots: Sequence[int]) -> None:
        """Early reads that are wanted after all."""
        self._library.se_reader_promote(self.handle, *_addresses(slots))

    def wait_any(self, slots: Sequence[int]) -> int:
        return int(self._library.se_reader_wait_any(self.handle, *_addresses(slots)))

    def cancel(self, slots: Sequence[int], wait: bool = True) -> None:
        """With wait False, reads that have begun go on."""
        self._library.se_reader_cancel(self.handle, *_addresses(slots), wait)

    def holds(self, slot: int) -> bool:
        return self._state(slot)[0] == FULL

    def pending(self, slot: int) -> bool:
        """Whether a read into the slot is queued or under way."""
        return self._state(slot)[0] in PENDING

    def check(self, key: ExpertKey, slot: int) -> None:
        state, detail = self._state(slot)
        if state == FAILED:
            raise self._store.unreadable(key, os.strerror(detail))
        if state == SHORT:
            raise self._store.cut(key, detail)
        if state == WRONG:
            raise self._store.wrong(key, f"{detail % 2**64:016x}")

    def _state(self, slot: int) -> tuple[int, int]:
        detail = c_int64()
        return self._library.se_reader_state(self.handle, slot, byref(detail)), detail.value

    def stop(self, stop: bool) -> None:
        """End computations that wait for reads, until it is taken back; from any thread."""
        if self.handle:
            self._library.se_reader_stop(self.handle, stop)

    @property
    def counters(self) -> Counters:
        """Bytes and nanoseconds so far."""
        if self.handle:
            self._last = Counters()
            self._library.se_reader_count(self.handle, byref(self._last))
        return self._last

    def close(self) -> None:
        self._last = self.counters
        handle, self.handle = self.handle, None
        self._library.se_reader_close(handle)


def _addresses(slots: Sequence[int]) -> tuple[ctypes.Array[c_int64], int]:
    return (c_int64 * len(slots))(*slots), len(slots)


def xxh3(data: AnyArray) -> int:
    """XXH3-64 of more than 240 bytes, as the reader threads compute it."""
    assert data.nbytes > 240
    data = np.ascontiguousarray(data)
    return int(_library().se_xxh3(data.ctypes.data, data.nbytes))
