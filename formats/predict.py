"""Tokens per second before anything is written: bytes per token over what the machine was measured to give.

The model of a decode step, in seconds (docs/ARCHITECTURE.md, Prediction):

    resident bytes / kernel rate  +  layers x LAYER_S  +  max(missed bytes / disk rate, chosen bytes / kernel rate)

The last term is overlap: experts in memory are computed while the others are read. The kernel rate is KERNEL_SHARE
of the rate at which memory can be read.
"""

from dataclasses import dataclass
from itertools import pairwise

from formats.budget import MemoryTerms, token_bytes
from formats.layout import Layout
from formats.probe import Probe

KERNEL_SHARE = 0.6  # of the memory's read rate (`make bench-kernels`)
LAYER_S = 2e-4  # of a layer that is neither reading nor a product
HIT_RATES = (0.0, 0.5, 0.75)
# (share of the experts cached, hit rate) where a tenth of the experts takes most of the use: docs/LEARNED.md 7.
SKEWED_HITS = ((0.0, 0.0), (0.1, 0.53), (0.25, 0.72), (0.5, 0.84), (1.0, 1.0))


@dataclass(frozen=True)
class Outlook:
    """Decode speed with so much RAM: from routing that spreads evenly to routing as skewed as published."""

    ram_bytes: int
    slots: int
    hit_rates: tuple[float, float]
    tokens_per_s: tuple[float, float]


def tokens_per_s(layout: Layout, probe: Probe, hit_rate: float) -> float:
    """Predicted decode speed of one sequence when hit_rate of the chosen experts are in memory."""
    need = token_bytes(layout)
    kernel_rate = KERNEL_SHARE * probe.memory_bytes_per_s
    reading_s = (1 - hit_rate) * need.expert_bytes / probe.disk_bytes_per_s
    fixed_s = need.resident_bytes / kernel_rate + LAYER_S * len(layout.layers)
    return 1 / (fixed_s + max(reading_s, need.expert_bytes / kernel_rate))


def outlook(layout: Layout, probe: Probe, terms: MemoryTerms, ram_bytes: int) -> Outlook:
    """What ram_bytes give. Raises RequestError below the floor, naming each term."""
    slots = terms.slots(layout, ram_bytes)
    cached = slots / sum(layer.num_experts for _, layer in layout.moe_layers())
    hits = (cached, _interpolated(cached))
    return Outlook(ram_bytes, slots, hits, (tokens_per_s(layout, probe, hits[0]), tokens_per_s(layout, probe, hits[1])))


def _interpolated(cached: float) -> float:
    for (x0, y0), (x1, y1) in pairwise(SKEWED_HITS):
        if cached <= x1:
            return y0 + (y1 - y0) * (cached - x0) / (x1 - x0)
    return 1.0
