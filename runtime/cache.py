"""Which experts lie in which slot, and which leaves when another needs one. No I/O, no threads."""

from collections import OrderedDict
from collections.abc import Collection, Mapping
from typing import NamedTuple, Protocol

import numpy as np

HALF_LIFE_STEPS = 30  # of a use, in steps of the model (docs/LEARNED.md 7)


class ExpertKey(NamedTuple):
    """Names an expert; never the file that holds it."""

    layer: int
    expert: int


class Policy(Protocol):
    """Told of every use and of who is held; asked who leaves."""

    def used(self, key: ExpertKey) -> None:
        """An expert was asked for, held or not."""

    def added(self, key: ExpertKey) -> None:
        """An expert has a slot now."""

    def removed(self, key: ExpertKey) -> None:
        """An expert has lost its slot."""

    def victim(self, layer: int, leased: Collection[ExpertKey]) -> ExpertKey | None:
        """Who leaves for an expert of `layer`; None when all that are held are leased."""


class LeastRecentlyUsed:
    """One pool for all layers."""

    def __init__(self) -> None:
        self._held: OrderedDict[ExpertKey, None] = OrderedDict()  # least recently used first

    def used(self, key: ExpertKey) -> None:
        if key in self._held:
            self._held.move_to_end(key)

    def added(self, key: ExpertKey) -> None:
        self._held[key] = None

    def removed(self, key: ExpertKey) -> None:
        del self._held[key]

    def victim(self, layer: int, leased: Collection[ExpertKey]) -> ExpertKey | None:
        return next((key for key in self._held if key not in leased), None)


class DecayedFrequency:
    """A pool per layer; who has the lowest count of uses leaves, and a use counts half after a half-life.

    Counts survive eviction. Between recency and frequency: LRFU, Lee et al., IEEE Trans. Computers 50 (2001).
    Slots are shared out by the number of experts; a layer below its share takes from the one furthest above its own.
    """

    def __init__(self, num_slots: int, num_experts: Mapping[int, int], half_life: float) -> None:
        """num_experts by layer; half_life in uses of any one layer."""
        every = sum(num_experts.values())
        self._share = {layer: num_slots * number // every for layer, number in num_experts.items()}
        self._half_life = half_life
        self._uses = dict.fromkeys(num_experts, 0)
        self._held_count = dict.fromkeys(num_experts, 0)
        self._held = {layer: np.zeros(number, np.bool_) for layer, number in num_experts.items()}
        # log2 of the count that an expert would have, had no time passed since the beginning.
        self._score = {layer: np.full(number, -np.inf) for layer, number in num_experts.items()}

    def used(self, key: ExpertKey) -> None:
        self._uses[key.layer] += 1
        score = self._score[key.layer]
        score[key.expert] = np.logaddexp2(score[key.expert], self._uses[key.layer] / self._half_life)

    def added(self, key: ExpertKey) -> None:
        self._held[key.layer][key.expert] = True
        self._held_count[key.layer] += 1

    def removed(self, key: ExpertKey) -> None:
        self._held[key.layer][key.expert] = False
        self._held_count[key.layer] -= 1

    def victim(self, layer: int, leased: Collection[ExpertKey]) -> ExpertKey | None:
        above = {other: count - self._share[other] for other, count in self._held_count.items()}
        others = sorted(above, key=lambda other: -above[other])
        for candidate in [layer, *others] if above[layer] >= 0 else others:
            score = np.where(self._held[candidate], self._score[candidate], np.inf)
            score[[key.expert for key in leased if key.layer == candidate]] = np.inf
            expert = int(score.argmin())
            if score[expert] < np.inf:
                return ExpertKey(candidate, expert)
        return None


def default_policy(num_slots: int, num_experts: Mapping[int, int], top_k: int) -> DecayedFrequency:
    """The policy of the engine (docs/LEARNED.md 7)."""
    return DecayedFrequency(num_slots, num_experts, HALF_LIFE_STEPS * top_k)


class ExpertCache:
    """Slots 0..num_slots-1 and the experts in them. A slot in use (leased) is never given to another expert."""

    def __init__(self, num_slots: int, policy: Policy | None = None) -> None:
        """The policy is LeastRecentlyUsed unless another is given."""
        self._policy = policy or LeastRecentlyUsed()
        self._free = list(range(num_slots - 1, -1, -1))
        self._slots: dict[ExpertKey, int] = {}
        self._leased: set[ExpertKey] = set()
        self.hits = 0
        self.misses = 0

    def lease(self, key: ExpertKey) -> int | None:
        """The slot that holds key, leased to the caller until `release`; None when it must be read."""
        self._policy.used(key)
        slot = self._slots.get(key)
        if slot is None:
            self.misses += 1
            return None
        self.hits += 1
        self._leased.add(key)
        return slot

    def reserve(self, key: ExpertKey) -> int | None:
        """A slot for key to be read into, leased; another expert leaves if it must. None when all are leased."""
        if self._free:
            slot = self._free.pop()
        else:
            victim = self._policy.victim(key.layer, self._leased)
            if victim is None:
                return None
            slot = self._slots.pop(victim)
            self._policy.removed(victim)
        self._slots[key] = slot
        self._policy.added(key)
        self._leased.add(key)
        return slot

    def release(self, key: ExpertKey) -> None:
        """End the lease; the expert stays until its slot is needed."""
        self._leased.remove(key)

    def discard(self, key: ExpertKey) -> None:
        """End the lease of a slot whose read failed: it holds nothing."""
        self._leased.remove(key)
        self._policy.removed(key)
        self._free.append(self._slots.pop(key))
