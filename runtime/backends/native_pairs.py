"""Who chose which expert, as kernels take it."""

from functools import lru_cache
from typing import NamedTuple

import numpy as np

from formats.dtypes import AnyArray


class ByExpert(NamedTuple):
    """Who chose which expert."""

    places: dict[int, tuple[int, int]]  # of each expert, ascending: where in pairs it begins, and how many they are
    pairs: AnyArray  # token * k + place, int64 [T * k], sorted by expert
    idle: bool  # whether some chose experts that give back what they read; these pairs are the last


def by_expert(expert_ids: AnyArray, num_experts: int) -> ByExpert:
    """Of ids [T, k] in a layer of so many experts; those from there on compute nothing."""
    flat = expert_ids.reshape(-1)
    pairs = flat.argsort(kind="stable")
    ranked = flat[pairs]
    real = int(ranked.searchsorted(num_experts))
    if len(expert_ids) == 1:  # a token's experts are distinct: no need to look for equals, at every layer of every step
        return ByExpert({expert: (i, 1) for i, expert in enumerate(ranked[:real].tolist())}, pairs, real < len(pairs))
    distinct, starts, counts = np.unique(ranked[:real], return_index=True, return_counts=True)
    places = zip(starts.tolist(), counts.tolist(), strict=True)
    return ByExpert(dict(zip(distinct.tolist(), places, strict=True)), pairs, real < len(pairs))


@lru_cache(maxsize=16)
def pairs_of_one(tokens: int) -> tuple[AnyArray, int]:
    """The pairs of an expert that every token chose and no other one, and where they lie."""
    pairs = np.arange(tokens)
    return pairs, pairs.ctypes.data
