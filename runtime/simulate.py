"""What a cache of a given size would have hit on a recorded trace, under each policy and at best."""

import heapq
import math
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import NamedTuple

from runtime.cache import DecayedFrequency, ExpertCache, ExpertKey, LeastRecentlyUsed, Policy, default_policy
from runtime.trace import Trace

Access = tuple[int, int]  # place of the layer in the trace, expert


class HitRates(NamedTuple):
    """Shares of all accesses that are hits. The last two know the future: no online policy can be asked for them."""

    by_policy: Mapping[str, float]
    most_used: float  # the experts that the whole trace uses most, held from the beginning
    belady: float  # the one that is needed latest leaves; the upper bound

    def table(self) -> dict[str, float]:
        """All of them by name."""
        known = {"static optimum (most used of the whole trace)": self.most_used, "Belady's bound": self.belady}
        return {**self.by_policy, **known}


def hit_rates(trace: Trace, num_slots: int) -> HitRates:
    """Replay a trace from an empty cache under each policy, and the two that know the future."""
    by_policy = {name: replay(trace, num_slots, make(trace, num_slots)) for name, make in POLICIES.items()}
    return HitRates(by_policy, _most_used(trace, num_slots), _belady(trace, num_slots))


def replay(trace: Trace, num_slots: int, policy: Policy) -> float:
    """The hit rate of the engine's own cache, asked as the engine asks it."""
    cache = ExpertCache(num_slots, policy)
    for step in trace.steps:
        for layer, experts in zip(trace.layers, step, strict=True):
            for _ in cache.waves(layer, experts):
                pass
    return cache.hits / max(1, cache.hits + cache.misses)


def _per_layer(half_life_steps: float) -> Callable[[Trace, int], Policy]:
    def make(trace: Trace, num_slots: int) -> Policy:
        by_layer = dict(zip(trace.layers, trace.num_experts, strict=True))
        return DecayedFrequency(num_slots, by_layer, half_life_steps * max(1.0, experts_per_step(trace)))

    return make


class OnePool:
    """All layers share the slots under a policy that is made for one layer."""

    def __init__(self, trace: Trace, num_slots: int, half_life_steps: float) -> None:
        self._first = dict(zip(trace.layers, accumulate((0, *trace.num_experts)), strict=False))
        self._layers = [
            layer for layer, number in zip(trace.layers, trace.num_experts, strict=True) for _ in range(number)
        ]
        half_life = half_life_steps * max(1.0, trace.accesses / max(1, len(trace.steps)))
        self._policy = DecayedFrequency(num_slots, {0: sum(trace.num_experts)}, half_life)

    def _key(self, key: ExpertKey) -> ExpertKey:
        return ExpertKey(0, self._first[key.layer] + key.expert)

    def used(self, layer: int, experts: Sequence[int]) -> None:
        self._policy.used(0, [self._first[layer] + expert for expert in experts])

    def added(self, key: ExpertKey) -> None:
        self._policy.added(self._key(key))

    def removed(self, key: ExpertKey) -> None:
        self._policy.removed(self._key(key))

    def victim(self, layer: int, leased: Collection[ExpertKey]) -> ExpertKey | None:
        found = self._policy.victim(0, [self._key(key) for key in leased])
        if found is None:
            return None
        layer = self._layers[found.expert]
        return ExpertKey(layer, found.expert - self._first[layer])


def _one_pool(half_life_steps: float) -> Callable[[Trace, int], Policy]:
    return lambda trace, num_slots: OnePool(trace, num_slots, half_life_steps)


def engine_policy(trace: Trace, num_slots: int) -> Policy:
    """What the engine would use for a model with the layers of the trace."""
    return default_policy(num_slots, dict(zip(trace.layers, trace.num_experts, strict=True)))


POLICIES: Mapping[str, Callable[[Trace, int], Policy]] = {
    "recent frequency, one pool (the engine's)": engine_policy,
    "LRU, one pool": lambda trace, num_slots: LeastRecentlyUsed(),
    "LRU, per layer": _per_layer(1 / 8),
    "decayed frequency, one pool, 30 steps": _one_pool(30),
    "decayed frequency, per layer, 10 steps": _per_layer(10),
    "decayed frequency, per layer, 30 steps": _per_layer(30),
    "decayed frequency, per layer, 60 steps": _per_layer(60),
    "decayed frequency, per layer, 120 steps": _per_layer(120),
    "LFU with ghost counters, one pool": _one_pool(math.inf),
    "LFU with ghost counters, per layer": _per_layer(math.inf),
}


def experts_per_step(trace: Trace) -> float:
    """Experts that a step asks a layer for, on average."""
    return trace.accesses / max(1, len(trace.steps) * len(trace.layers))


def _accesses(trace: Trace) -> Iterator[Access]:
    for step in trace.steps:
        for place, experts in enumerate(step):
            for expert in experts:
                yield place, expert


def _most_used(trace: Trace, num_slots: int) -> float:
    uses = Counter(_accesses(trace))
    return sum(count for _, count in uses.most_common(num_slots)) / max(1, trace.accesses)


def _belady(trace: Trace, num_slots: int) -> float:
    """Belady's MIN, which also may leave an expert out of the cache altogether."""
    accesses = list(_accesses(trace))
    next_use = [0] * len(accesses)
    later: dict[Access, int] = {}
    for i in range(len(accesses) - 1, -1, -1):
        next_use[i] = later.get(accesses[i], len(accesses))
        later[accesses[i]] = i
    held: dict[Access, int] = {}  # -> its next use
    latest: list[tuple[int, Access]] = []  # heap of (-next use, access); entries that held contradicts are stale
    hits = 0
    for i, access in enumerate(accesses):
        hits += access in held
        if access not in held and len(held) >= num_slots:
            while held.get(latest[0][1]) != -latest[0][0]:
                heapq.heappop(latest)
            if -latest[0][0] <= next_use[i]:
                continue  # it is needed later than all that are held
            del held[heapq.heappop(latest)[1]]
        held[access] = next_use[i]
        heapq.heappush(latest, (-next_use[i], access))
    return hits / max(1, len(accesses))
