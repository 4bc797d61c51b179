"""Tokens per second before anything is written: a model of one decode step, from what a short probe measured.

docs/PREDICTION.md tells the model in words, and how near it came. For a layer of which m of the k chosen experts are
not in memory:

    layer's own matrices at the kernels' rate  +  its recurrent state at the memory's  +  Python between kernels
    +  max(k experts at the kernels' rate, read(m) + the last experts at the kernels' rate)

where read(m) = read_wait + m records / disk rate, as the probe found by reading the way the engine does.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from formats.budget import VALUE_BYTES, MemoryTerms, largest_record_bytes
from formats.config.base import LINEAR_ATTENTION
from formats.encodings import Encoding
from formats.kernels import product_rate
from formats.layout import LayerLayout, Layout, matrix_shape
from formats.memory import default_ram_bytes
from formats.probe import READS_IN_FLIGHT, Probe, probe
from formats.record import Part

# What lies between kernels, in small NumPy operations of the probe: of a layer, of one that misses, and of a read
# (docs/LEARNED.md 48, 55).
LAYER_CALLS, LINEAR_LAYER_CALLS, MISS_CALLS, READ_CALLS = 240, 450, 240, 25
HIT_RATES = (0.0, 0.5, 0.75)
# (share of the experts cached, hit rate) where a tenth of the experts takes most of the use: docs/LEARNED.md 7.
SKEWED_HITS = ((0.0, 0.0), (0.1, 0.53), (0.25, 0.72), (0.5, 0.84), (1.0, 1.0))
MOST_WEIGHTS = 1 << 24  # of a matrix that a kernel is measured with


@dataclass(frozen=True)
class Machine:
    """What was measured for one layout; kernels in bytes of weights per second."""

    probe: Probe
    resident: Mapping[Encoding, float]  # of its largest matrix
    experts: Mapping[tuple[Encoding, int, int], float]  # short rows are slower

    def facts(self) -> dict[str, Any]:
        """As JSON."""
        resident = [_kernel(encoding, rate) for encoding, rate in self.resident.items()]
        experts = [
            {"rows": rows, "columns": columns, **_kernel(encoding, rate)}
            for (encoding, rows, columns), rate in self.experts.items()
        ]
        return {**asdict(self.probe), "kernels": {"resident": resident, "experts": experts}}


@dataclass(frozen=True)
class Outlook:
    """Decode speed with so much RAM: from routing that spreads evenly to routing as skewed as published."""

    ram_bytes: int
    slots: int
    hit_rates: tuple[float, float]
    tokens_per_s: tuple[float, float]


def measure(layout: Layout, folder: Path, threads: int) -> Machine:
    """Measure the disk of a folder with the layout's records, and the kernels with its matrices. Raises OSError."""
    shapes: dict[Encoding, tuple[int, int]] = {}
    for tensor in sorted(layout.resident, key=lambda tensor: tensor.nbytes):
        rows, columns = matrix_shape(tensor.shape)
        shapes[tensor.encoding] = (min(rows, max(1, MOST_WEIGHTS // columns)), columns)
    specs = {part_spec(part) for _, layer in layout.moe_layers() for part in layer.record.parts}
    record_bytes = max(1, largest_record_bytes(layout))
    return Machine(
        probe(folder, record_bytes, layout.model.top_k, threads, default_ram_bytes() // 2),
        {encoding: product_rate(encoding, *shape, threads) for encoding, shape in shapes.items()},
        {spec: product_rate(*spec, threads) for spec in specs},
    )


def tokens_per_s(layout: Layout, machine: Machine, hit_rate: float) -> float:
    """Predicted decode speed of one sequence when hit_rate of the chosen experts are in memory."""
    seconds = sum(tensor.nbytes / machine.resident[tensor.encoding] for tensor in layout.resident)
    seconds += 2 * VALUE_BYTES * layout.model.state_values / machine.probe.memory_bytes_per_s  # read and written
    for kind, layer in zip(layout.model.layer_types, layout.layers, strict=True):
        calls = LINEAR_LAYER_CALLS if kind == LINEAR_ATTENTION else LAYER_CALLS
        seconds += calls * machine.probe.call_s
        if layer is not None:
            seconds += _experts_s(layer, min(layout.model.top_k, layer.num_experts), machine, hit_rate)
    return 1 / seconds


def _experts_s(layer: LayerLayout, k: int, machine: Machine, hit_rate: float) -> float:
    """Of a layer's chosen experts: those in memory are computed while the others are read."""
    disk, record = machine.probe, layer.record
    one_s = sum(sum(a.nbytes for a in part.arrays) / machine.experts[part_spec(part)] for part in record.parts)
    misses = k * (1 - hit_rate)
    some = 1 - hit_rate**k  # how often a layer misses at all
    reading_s = some * disk.read_wait_s + misses * record.record_bytes / disk.disk_bytes_per_s
    last_s = min(misses, READS_IN_FLIGHT) * one_s  # those that arrive together, at the end
    return max(k * one_s, reading_s + last_s) + (some * MISS_CALLS + misses * READ_CALLS) * disk.call_s


def _kernel(encoding: Encoding, rate: float) -> dict[str, Any]:
    return {"encoding": encoding.id, **encoding.parameters(), "bytes_per_s": rate}


def part_spec(part: Part) -> tuple[Encoding, int, int]:
    """What the speed of a product depends on."""
    return part.encoding, part.rows, part.columns


def outlook(layout: Layout, machine: Machine, terms: MemoryTerms, ram_bytes: int) -> Outlook:
    """What ram_bytes give. Raises RequestError below the floor, naming each term."""
    slots = terms.slots(layout, ram_bytes)
    cached = slots / sum(layer.num_experts for _, layer in layout.moe_layers())
    hits = (cached, _interpolated(cached))
    low, high = (tokens_per_s(layout, machine, hit_rate) for hit_rate in hits)
    return Outlook(ram_bytes, slots, hits, (low, high))


def _interpolated(cached: float) -> float:
    for (x0, y0), (x1, y1) in pairwise(SKEWED_HITS):
        if cached <= x1:
            return y0 + (y1 - y0) * (cached - x0) / (x1 - x0)
    return 1.0
