"""Which experts lie in which slot, and which leaves when another needs one. No I/O, no threads."""

from collections import OrderedDict, deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any, NamedTuple, Protocol

import numpy as np

from formats.dtypes import AnyArray, Float64

MOST_WEIGHT = 2.0**500
HALF_LIFE_STEPS = 35  # of a use, in steps of the model, where there are few slots
HALF_LIFE_OF_ALL = 85  # the same where there is one for every expert: who leaves then is known by longer counts
RECENT_USES = 5.0  # that having been chosen in the latest step is worth


class ExpertKey(NamedTuple):
    """Names an expert; never the file that holds it."""

    layer: int
    expert: int


class Held(NamedTuple):
    """An expert and its slot, leased."""

    key: ExpertKey
    slot: int


class Wave(NamedTuple):
    """Experts of a layer that are computed together, and reads to begin before that: theirs and of later waves."""

    experts: list[Held]
    reads: list[Held]


class Policy(Protocol):
    """Told of every use and of who is held; asked who leaves."""

    def used(self, layer: int, experts: Sequence[int]) -> None:
        """A layer's next step asks for these distinct experts, held or not."""

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

    def used(self, layer: int, experts: Sequence[int]) -> None:
        for key in (ExpertKey(layer, expert) for expert in experts):
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
        self._growth = 2 ** (1 / half_life)
        self._weight = dict.fromkeys(
            num_experts, 1.0
        )  # of the layer's next use: it grows, instead of all counts decaying
        self._held_count = dict.fromkeys(num_experts, 0)
        self._held = {layer: np.zeros(number, np.bool_) for layer, number in num_experts.items()}
        self._score = {layer: np.zeros(number) for layer, number in num_experts.items()}

    def used(self, layer: int, experts: Sequence[int]) -> None:
        for expert in experts:
            self._score[layer][expert] += self._weight[layer]
            self._weight[layer] *= self._growth
            if self._weight[layer] > MOST_WEIGHT:
                self._score[layer] /= MOST_WEIGHT
                self._weight[layer] /= MOST_WEIGHT

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


class RecentFrequency:
    """One pool for all layers: who has the lowest value leaves. Uses count half after a half-life and survive eviction.

    What a layer's latest step used counts RECENT_USES more, for a part of it comes again, and every expert that a
    layer holds beyond its share counts one use less for all of that layer's. Values are computed once for all that
    leave for a layer's step, and kept up with what each of them changes (docs/LEARNED.md 54).
    """

    def __init__(self, num_slots: int, num_experts: Mapping[int, int]) -> None:
        """num_experts by layer."""
        self._keys = [ExpertKey(layer, expert) for layer, number in num_experts.items() for expert in range(number)]
        ends = accumulate(num_experts.values())
        self._of_layer = {
            layer: slice(end - number, end) for (layer, number), end in zip(num_experts.items(), ends, strict=True)
        }
        self._above = {layer: -num_slots * number / len(self._keys) for layer, number in num_experts.items()}
        share = min(1.0, num_slots / len(self._keys))
        half_life_steps = HALF_LIFE_STEPS + share * (HALF_LIFE_OF_ALL - HALF_LIFE_STEPS)
        self._growth = 2 ** (1 / (half_life_steps * len(num_experts)))
        self._weight = 1.0  # of the next use: it grows, so that no count need shrink
        self._uses = np.zeros(len(self._keys))  # in weights of their time
        self._extra = np.zeros(len(self._keys))  # in uses of now
        # some at a time they are changed one by one, which costs less than to call NumPy (docs/LEARNED.md 66)
        self._uses_at: Any = self._uses.data
        self._extra_at: Any = self._extra.data
        self._absent = np.full(len(self._keys), np.inf)  # zero for those that are held
        self._latest: dict[int, list[int]] = {layer: [] for layer in num_experts}  # places of what the last step used
        self._values: Float64 | None = None  # of those that may leave for the step of the layer that asked last

    def _place(self, key: ExpertKey) -> int:
        return int(self._of_layer[key.layer].start) + key.expert

    def used(self, layer: int, experts: Sequence[int]) -> None:
        self._weight *= self._growth
        if self._weight > MOST_WEIGHT:
            self._uses /= MOST_WEIGHT
            self._weight /= MOST_WEIGHT
        uses, extra, weight, first = self._uses_at, self._extra_at, self._weight, self._of_layer[layer].start
        for place in self._latest[layer]:
            extra[place] -= RECENT_USES
        self._latest[layer] = places = [first + expert for expert in experts]
        for place in places:
            extra[place] += RECENT_USES
            uses[place] += weight
        self._values = None

    def added(self, key: ExpertKey) -> None:
        self._absent[self._place(key)] = 0.0
        self._hold(key.layer, 1)

    def removed(self, key: ExpertKey) -> None:
        self._absent[self._place(key)] = np.inf
        self._hold(key.layer, -1)

    def _hold(self, layer: int, more: int) -> None:
        before = max(0.0, self._above[layer])
        self._above[layer] += more
        change = max(0.0, self._above[layer]) - before
        if change:
            self._extra[self._of_layer[layer]] -= change
            if self._values is not None:
                self._values[self._of_layer[layer]] -= self._weight * change

    def most_used(self) -> list[tuple[ExpertKey, float]]:
        """Experts that were used at all, with their decayed counts, most used first."""
        counts = self._uses / self._weight
        order = np.argsort(-counts, kind="stable")[: np.count_nonzero(counts)]
        return [(self._keys[place], float(counts[place])) for place in order]

    def expect(self, key: ExpertKey, uses: float) -> None:
        """Count uses of an earlier run."""
        self._uses[self._place(key)] += uses * self._weight

    def victim(self, layer: int, leased: Collection[ExpertKey]) -> ExpertKey | None:
        for known in (self._values, None):
            values = known
            if values is None:
                values = self._weight * self._extra + self._uses + self._absent
                for key in leased:
                    values[self._place(key)] = np.inf
                self._values = values
            place = int(values.argmin())
            if values[place] < np.inf:
                values[place] = np.inf
                return self._keys[place]
        return None


def default_policy(num_slots: int, num_experts: Mapping[int, int]) -> RecentFrequency:
    """The policy of the engine (docs/LEARNED.md 22)."""
    return RecentFrequency(num_slots, num_experts)


class ExpertCache:
    """Slots 0..num_slots-1 and the experts in them. A slot in use (leased) is never given to another expert."""

    def __init__(self, num_slots: int, policy: Policy | None = None, slots_of: AnyArray | None = None) -> None:
        """The policy is LeastRecentlyUsed unless another is given.

        slots_of, int64 [layers, experts]: is kept up for those who cannot ask, a slot or -1.
        """
        self._slots_of: Any = slots_of.data if slots_of is not None else None
        self._policy = policy or LeastRecentlyUsed()
        self._free = list(range(num_slots - 1, -1, -1))
        self._held: dict[tuple[int, int], Held] = {}  # by key
        self._leased: set[ExpertKey] = set()
        self.hits = 0
        self.misses = 0

    def lease(self, layer: int, experts: Sequence[int]) -> tuple[list[Held], list[ExpertKey]]:
        """Distinct experts of a layer: those that have a slot, leased to the caller until `release`; those to be read.

        One that is leased already is on its way, read on a guess: a miss all the same, for it had to be read.
        """
        self._policy.used(layer, experts)
        found, missing = [], []
        before = len(self._leased)
        for expert in experts:
            held = self._held.get((layer, expert))
            if held is None:
                missing.append(ExpertKey(layer, expert))
                continue
            found.append(held)
            self._leased.add(held.key)
        hits = len(self._leased) - before
        self.hits += hits
        self.misses += len(experts) - hits
        return found, missing

    def used(self, layer: int, experts: Sequence[int]) -> None:
        """Distinct experts of a layer were used in their slots, none of them leased: as `lease` and `release`."""
        self._policy.used(layer, experts)
        self.hits += len(experts)

    def reserve(self, key: ExpertKey) -> int | None:
        """A slot for key to be read into, leased; another expert leaves if it must. None when all are leased."""
        if self._free:
            slot = self._free.pop()
        else:
            victim = self._policy.victim(key.layer, self._leased)
            if victim is None:
                return None
            slot = self._held.pop(victim).slot
            self._policy.removed(victim)
            self._note(victim, -1)
        self._held[key] = Held(key, slot)
        self._note(key, slot)
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
        self._free.append(self._held.pop(key).slot)
        self._note(key, -1)

    def _note(self, key: ExpertKey, slot: int) -> None:
        if self._slots_of is not None:
            self._slots_of[key] = slot

    def holds(self, key: ExpertKey) -> bool:
        """Whether key has a slot; counts nothing."""
        return key in self._held

    def leased(self) -> list[Held]:
        """All experts in use."""
        return [self._held[key] for key in self._leased]

    @property
    def free_slots(self) -> int:
        """Slots that hold no expert."""
        return len(self._free)

    def unused(self) -> list[int]:
        """Which they are."""
        return list(self._free)

    @property
    def idle_slots(self) -> int:
        """Slots that no one uses now."""
        return len(self._free) + len(self._held) - len(self._leased)

    def waves(self, layer: int, experts: Sequence[int]) -> Iterator[Wave]:
        """Lease distinct experts of a layer, first those at hand, then the others; all at once if slots suffice.

        The leases of a wave end when the next one is asked for. Otherwise each wave takes half of what is being read,
        so that the disk works on the other half meanwhile. No expert of the layer leaves for another one of it before
        it was used. Who is held and who leaves depends on nothing but the experts asked for.
        """
        ready, missing = self.lease(layer, experts)
        misses, coming = deque(missing), deque[Held]()
        while ready or misses or coming:
            reads = []
            while misses and (slot := self.reserve(misses[0])) is not None:
                reads.append(Held(misses.popleft(), slot))
            coming.extend(reads)
            share = (len(coming) + 1) // 2 if misses else len(coming)
            wave = [*ready, *(coming.popleft() for _ in range(share))]
            if not wave:
                raise RuntimeError("all slots are leased by others, expected one that is free or idle")
            yield Wave(wave, reads)
            self._leased.difference_update([key for key, _ in wave])
            ready = []
