"""The cache of experts: who lies in which slot, and who leaves."""

from typing import Any

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import Bundle as KeyBundle
from hypothesis.stateful import RuleBasedStateMachine, consumes, initialize, invariant, rule

from runtime.cache import ExpertCache, ExpertKey

A, B, C, D = (ExpertKey(0, i) for i in range(4))


def lease(cache: ExpertCache, key: ExpertKey) -> int | None:
    """The slot of one expert, None for a miss."""
    found, missing = cache.lease(key.layer, [key.expert])
    assert [held.key for held in found] + missing == [key]
    return found[0].slot if found else None


def fill(cache: ExpertCache, *keys: ExpertKey) -> None:
    """Read experts one after another, as if each was used and released."""
    for key in keys:
        assert cache.reserve(key) is not None
        cache.release(key)


def held(cache: ExpertCache, *keys: ExpertKey) -> list[ExpertKey]:
    """Which of the keys are cached; counts hits and misses, renews nothing that a test looks at later."""
    found = [key for key in keys if lease(cache, key) is not None]
    for key in found:
        cache.release(key)
    return found


def test_an_expert_that_was_never_read_is_a_miss() -> None:
    cache = ExpertCache(2)
    assert lease(cache, A) is None
    assert (cache.hits, cache.misses) == (0, 1)


def test_an_expert_that_was_read_is_a_hit_in_its_slot() -> None:
    cache = ExpertCache(2)
    slot = cache.reserve(A)
    cache.release(A)
    assert lease(cache, A) == slot
    assert (cache.hits, cache.misses) == (1, 0)


def test_the_same_expert_of_another_layer_is_another_expert() -> None:
    cache = ExpertCache(2)
    fill(cache, ExpertKey(0, 7))
    assert lease(cache, ExpertKey(1, 7)) is None


def test_the_least_recently_read_expert_leaves_first() -> None:
    cache = ExpertCache(2)
    fill(cache, A, B, C)
    assert held(cache, A, B, C) == [B, C]


def test_a_hit_makes_an_expert_recent() -> None:
    cache = ExpertCache(2)
    fill(cache, A, B)
    assert held(cache, A) == [A]
    fill(cache, C)
    assert held(cache, A, B, C) == [A, C]


def test_a_leased_expert_never_leaves() -> None:
    cache = ExpertCache(2)
    fill(cache, A, B)
    lease(cache, A)
    cache.reserve(C)
    cache.release(C)
    assert held(cache, B, C) == [C]
    assert lease(cache, A) is not None


def test_an_expert_that_is_being_read_never_leaves() -> None:
    cache = ExpertCache(1)
    cache.reserve(A)
    assert cache.reserve(B) is None


def test_there_is_no_slot_while_all_are_leased_and_one_after_a_release() -> None:
    cache = ExpertCache(2)
    slot, _ = cache.reserve(A), cache.reserve(B)
    assert cache.reserve(C) is None
    cache.release(A)
    assert cache.reserve(C) == slot


def test_a_refused_reservation_evicts_nobody() -> None:
    cache = ExpertCache(1)
    cache.reserve(A)
    cache.reserve(B)
    cache.release(A)
    assert lease(cache, A) is not None


def test_a_discarded_expert_is_a_miss_and_its_slot_is_free() -> None:
    cache = ExpertCache(1)
    slot = cache.reserve(A)
    cache.discard(A)
    assert lease(cache, A) is None
    assert cache.reserve(B) == slot


def test_a_cache_without_slots_holds_nothing() -> None:
    cache = ExpertCache(0)
    assert lease(cache, A) is None
    assert cache.reserve(A) is None


def test_releasing_what_is_not_leased_is_a_bug_that_shows() -> None:
    cache = ExpertCache(1)
    with pytest.raises(KeyError):
        cache.release(A)


class AgainstALog(RuleBasedStateMachine):
    """The cache beside a naive model: a list of uses, searched from the end each time."""

    leased = KeyBundle("leased")
    keys = st.builds(ExpertKey, st.integers(0, 1), st.integers(0, 5))

    @initialize(num_slots=st.integers(0, 5))
    def begin(self, num_slots: int) -> None:
        self.num_slots = num_slots
        self.cache = ExpertCache(num_slots)
        self.slots: dict[ExpertKey, int] = {}
        self.uses: list[ExpertKey] = []
        self.in_use: set[ExpertKey] = set()
        self.hits = self.misses = 0

    @rule(target=leased, key=keys)
    def look_up(self, key: ExpertKey) -> Any:
        if key in self.in_use:
            return None
        slot = lease(self.cache, key)
        assert slot == self.slots.get(key)
        if slot is None:
            self.misses += 1
            return self._read(key)
        self.hits += 1
        self.uses.append(key)
        self.in_use.add(key)
        return key

    def _read(self, key: ExpertKey) -> ExpertKey | None:
        slot = self.cache.reserve(key)
        if len(self.slots) == self.num_slots:
            idle = [other for other in self.slots if other not in self.in_use]
            if not idle:
                assert slot is None
                return None
            oldest = min(idle, key=lambda other: len(self.uses) - self.uses[::-1].index(other))
            assert slot == self.slots.pop(oldest)
        assert slot is not None
        assert slot not in self.slots.values()
        self.slots[key] = slot
        self.uses.append(key)
        self.in_use.add(key)
        return key

    @rule(key=consumes(leased))
    def release(self, key: ExpertKey | None) -> None:
        if key is not None:
            self.cache.release(key)
            self.in_use.remove(key)

    @rule(key=consumes(leased))
    def discard(self, key: ExpertKey | None) -> None:
        if key is not None:
            self.cache.discard(key)
            self.in_use.remove(key)
            del self.slots[key]

    @invariant()
    def slots_are_distinct_and_counters_are_true(self) -> None:
        if hasattr(self, "cache"):
            assert set(self.slots.values()) <= set(range(self.num_slots))
            assert (self.cache.hits, self.cache.misses) == (self.hits, self.misses)


TestAgainstALog = AgainstALog.TestCase
