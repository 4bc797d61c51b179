"""Experts.get: every expert once, whatever fails; leases and slots are whole afterwards."""

import threading
from collections.abc import Iterator
from concurrent.futures import CancelledError
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from formats.container import open_container
from formats.dtypes import AnyArray
from formats.errors import StorageError
from runtime.cache import ExpertKey
from runtime.experts import Experts
from runtime.store import ExpertStore

LAYER = 3
EVERY = list(range(40))


class Watched(ExpertStore):
    """A store whose reads can fail, and that sees which slots are being filled."""

    def __init__(self, folder: Path) -> None:
        super().__init__(open_container(folder))
        self.failing: set[int] = set()
        self.in_use: set[int] = set()  # addresses of slots that are being read or were handed out
        self.most_at_once = 0
        self.under_way = 0
        self.lock = threading.Lock()
        self.barrier: threading.Barrier | None = None

    def read(self, key: ExpertKey, slot: AnyArray) -> None:
        with self.lock:
            assert slot.ctypes.data not in self.in_use, "a slot is read into while it is in use"
            self.in_use.add(slot.ctypes.data)
            self.under_way += 1
            self.most_at_once = max(self.most_at_once, self.under_way)
        try:
            if self.barrier is not None:
                self.barrier.wait()
            if key.expert in self.failing:
                raise StorageError(f"layer {key.layer} expert {key.expert} cannot be read")
            super().read(key, slot)
        finally:
            with self.lock:
                self.under_way -= 1
                self.in_use.remove(slot.ctypes.data)


@pytest.fixture
def store(demo4: Path) -> Iterator[Watched]:
    with closing(Watched(demo4)) as opened:
        yield opened


def experts(store: ExpertStore, num_slots: int, readers: int = 4) -> "closing[Experts]":
    return closing(Experts(store, num_slots, readers))


def read_alone(store: ExpertStore, expert: int) -> AnyArray:
    slot = store.new_slots(1)[0]
    store.read(ExpertKey(LAYER, expert), slot)
    return slot[: store.record_bytes(LAYER)]


def all_slots_can_be_leased(found: Experts, num_slots: int) -> bool:
    """Whether no lease is left: every slot can be reserved for a new expert."""
    keys = [ExpertKey(99, i) for i in range(num_slots)]
    slots = [found.cache.reserve(key) for key in keys]
    for key in keys:
        found.cache.discard(key)
    return sorted(slot for slot in slots if slot is not None) == list(range(num_slots))


@pytest.mark.parametrize("num_slots", [1, 2, 3, 39, 40, 100])
@pytest.mark.parametrize("readers", [1, 4])
def test_every_expert_comes_once_with_its_record(store: Watched, num_slots: int, readers: int) -> None:
    with experts(store, num_slots, readers) as found:
        records = {expert: record.copy() for expert, record in found.get(LAYER, EVERY)}
        assert all_slots_can_be_leased(found, num_slots)
    assert sorted(records) == EVERY
    assert all(np.array_equal(record, read_alone(store, expert)) for expert, record in records.items())


def test_a_second_time_nothing_is_read(store: Watched) -> None:
    with experts(store, 40) as found:
        list(found.get(LAYER, EVERY))
        nbytes = store.counters.nbytes
        list(found.get(LAYER, EVERY))
    assert store.counters.nbytes == nbytes == 40 * store.record_bytes(LAYER)


def test_cached_experts_come_before_those_that_must_be_read(store: Watched) -> None:
    with experts(store, 10) as found:
        list(found.get(LAYER, [5, 6]))
        order = [expert for expert, _ in found.get(LAYER, [1, 2, 5, 3, 6])]
    assert order[:2] == [5, 6]


def test_reads_are_in_flight_together(store: Watched) -> None:
    store.barrier = threading.Barrier(3, timeout=30)  # no read ends before three have begun
    with experts(store, 40, readers=3) as found:
        assert len(list(found.get(LAYER, EVERY[:39]))) == 39


def test_no_more_reads_are_in_flight_than_there_are_readers(store: Watched) -> None:
    with experts(store, 40, readers=3) as found:
        list(found.get(LAYER, EVERY))
    assert store.most_at_once <= 3


def test_a_slot_is_never_filled_while_its_record_is_in_use(store: Watched) -> None:
    with experts(store, 3) as found:
        for _ in range(3):
            for expert, record in found.get(LAYER, EVERY):
                address = record.ctypes.data
                with store.lock:
                    assert address not in store.in_use
                    store.in_use.add(address)
                expected = read_alone(store, expert)
                assert np.array_equal(record, expected)
                with store.lock:
                    store.in_use.remove(address)


def test_a_failed_read_is_an_error_of_that_expert(store: Watched) -> None:
    store.failing = {17}
    with experts(store, 8) as found, pytest.raises(StorageError, match="layer 3 expert 17"):
        list(found.get(LAYER, EVERY))


@pytest.mark.parametrize("failing", [{0}, {17}, {39}, {0, 1, 2, 3}, set(EVERY)])
@pytest.mark.parametrize("num_slots", [2, 8, 40])
def test_after_a_failed_read_nothing_is_leased(store: Watched, failing: set[int], num_slots: int) -> None:
    store.failing = failing
    with experts(store, num_slots) as found:
        with pytest.raises(StorageError):
            list(found.get(LAYER, EVERY))
        assert all_slots_can_be_leased(found, num_slots)


def test_after_a_failed_read_the_next_call_works(store: Watched) -> None:
    store.failing = {17, 18}
    with experts(store, 8) as found:
        with pytest.raises(StorageError):
            list(found.get(LAYER, EVERY))
        store.failing = set()
        records = {expert: record.copy() for expert, record in found.get(LAYER, EVERY)}
    assert all(np.array_equal(record, read_alone(store, expert)) for expert, record in records.items())


@pytest.mark.parametrize("taken", [0, 1, 5, 40])
def test_a_caller_that_stops_early_leaves_nothing_leased(store: Watched, taken: int) -> None:
    with experts(store, 8) as found:
        list(found.get(LAYER, [3, 4]))
        records = found.get(LAYER, EVERY)
        for _ in range(taken):
            next(records)
        records.close()
        assert all_slots_can_be_leased(found, 8)


def test_a_caller_that_fails_leaves_nothing_leased(store: Watched) -> None:
    with experts(store, 8) as found:
        with pytest.raises(ZeroDivisionError), closing(found.get(LAYER, EVERY)) as records:
            [1 // (expert - expert) for expert, _ in records]
        assert all_slots_can_be_leased(found, 8)


def test_stopping_ends_at_the_next_expert_and_leaves_nothing_leased(store: Watched) -> None:
    with experts(store, 8) as found:
        records = found.get(LAYER, EVERY)
        next(records)
        found.stopping.set()
        with pytest.raises(CancelledError):
            next(records)
        assert all_slots_can_be_leased(found, 8)


def test_closing_ends_the_reader_threads(store: Watched) -> None:
    with experts(store, 4) as found:
        list(found.get(LAYER, EVERY))
        assert any(thread.name.startswith("reader") for thread in threading.enumerate())
    assert not any(thread.name.startswith("reader") for thread in threading.enumerate())
