"""How near the native kernels come to what memory and BLAS allow: `make bench-kernels`.

Every bar is a ratio of two times taken in turns, record by record or run by run, in one process; its value is the
median over the runs. The last line is one JSON object.
"""

import itertools
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial

import numpy as np
from threadpoolctl import threadpool_info, threadpool_limits

from formats import __version__
from formats.dtypes import AnyArray, Float32
from formats.encodings import Affine
from formats.record import PART_NAMES, PartSpec, RecordLayout, lay_out_record
from runtime.backends import native

ENCODING = Affine(4, 64, "bf16")
SHAPES = {"Qwen3.5-397B": (4096, 1024), "Kimi K2.5": (7168, 2048)}  # hidden_size, moe_intermediate_size
EXPERTS_PER_CALL = 8
PREFILL_TOKENS = 64
SILU = native.Activation(native.SILU, 0.0, 0.0, 0)
DECODE_BARS = {("fast", 1): 0.80, ("exact", 1): 0.65, ("fast", 2): 0.70, ("exact", 2): 0.60}
PREFILL_BARS = {"exact": 0.60, "fast": 1.20}
NUMPY_BAR = 50.0


@dataclass(frozen=True)
class Bar:
    """A ratio that was measured several times, and what it should reach."""

    name: str
    value: float
    bar: float
    ok: bool
    runs: int
    low: float
    high: float


def bar(name: str, ratios: Sequence[float], least: float) -> Bar:
    """The median of the runs against the least that is asked for."""
    value = statistics.median(ratios)
    return Bar(name, value, least, value >= least, len(ratios), min(ratios), max(ratios))


def seconds(work: Callable[[], object]) -> float:
    """How long work takes, once."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def record_layout(hidden_size: int, intermediate_size: int) -> RecordLayout:
    """The record of one expert at that shape."""
    first, second = (intermediate_size, hidden_size), (hidden_size, intermediate_size)
    shapes = {"gate": first, "up": first, "down": second}
    return lay_out_record(PartSpec(name, *shapes[name], ENCODING) for name in PART_NAMES)


def random_records(layout: RecordLayout, total_bytes: int) -> AnyArray:
    """Distinct records with random codes and small scales: uint8 [n, record_bytes], at least total_bytes in all."""
    count = -(-total_bytes // layout.record_bytes)
    records = np.empty((count, layout.record_bytes), np.uint8)
    rng = np.random.default_rng(0)
    noise = np.frombuffer(rng.bytes(layout.record_bytes), np.uint8)
    for i, record in enumerate(records):
        np.bitwise_xor(noise, np.uint8(i % 256), out=record)
        for part in layout.parts:
            arrays = part.views(record)
            arrays["scales"][...] = 0x3C00 + i % 64  # about 0.008
            arrays["biases"][...] = 0xBD80
    return records


class Experts:
    """Experts of one shape in DRAM, taken in random order."""

    def __init__(self, hidden_size: int, intermediate_size: int, total_bytes: int) -> None:
        self.layout = record_layout(hidden_size, intermediate_size)
        self.records = random_records(self.layout, total_bytes)
        self._native = native.expert_layout(self.layout, SILU)
        self._hidden_size = hidden_size
        self._rng = np.random.default_rng(1)
        self._x = self._rng.standard_normal((1, hidden_size), np.float32)

    def draws(self) -> Iterator[list[AnyArray]]:
        """EXPERTS_PER_CALL records at a time, each once, in random order."""
        order = self._rng.permutation(len(self.records))
        for i in range(0, len(order) - EXPERTS_PER_CALL + 1, EXPERTS_PER_CALL):
            yield [self.records[j] for j in order[i : i + EXPERTS_PER_CALL]]

    def token(self, context: native.Context, records: Sequence[AnyArray]) -> Float32:
        """One token through these experts."""
        k = len(records)
        chosen = [native.Chosen(record, np.array([i])) for i, record in enumerate(records)]
        weights = np.full((1, k), 1 / k, np.float32)
        outputs = np.empty((k, self._hidden_size), np.float32)
        context.experts(self._native, chosen, self._x, weights, outputs)
        return context.weighted_sum(outputs, weights)


def decode_run(experts: Experts, contexts: dict[str, native.Context]) -> dict[str, float]:
    """Seconds of one walk over all records: by each precision, and by the best of the read loops.

    Kernels and loops take turns from call to call, each on other records than the one before, so that a neighbour on
    the machine hurts all of them alike and no record is in a cache.
    """
    draws = list(experts.draws())
    jobs: dict[str, Callable[[list[AnyArray]], object]] = {}
    for name, context in contexts.items():
        jobs[name] = partial(experts.token, context)
    reader = next(iter(contexts.values()))
    for loop in range(native.READ_LOOPS):
        jobs[f"read {loop}"] = partial(reader.read, loop)
    spent = dict.fromkeys(jobs, 0.0)
    shift = max(1, len(draws) // len(jobs))
    for i in range(len(draws)):
        for place, (name, job) in enumerate(jobs.items()):
            records = draws[(i + place * shift) % len(draws)]
            spent[name] += seconds(partial(job, records))
    reads = [spent.pop(f"read {loop}") for loop in range(native.READ_LOOPS)]
    return {**spent, "read": min(reads), "bytes": float(len(draws) * EXPERTS_PER_CALL * experts.layout.record_bytes)}


def decode_bars(model: str, experts: Experts, threads: int, runs: int, level: str | None) -> Iterator[Bar]:
    """Share of the memory's read rate that a token's experts reach."""
    contexts = {name: native.Context(threads, name, level) for name in native.PRECISIONS}
    ratios: dict[str, list[float]] = {name: [] for name in contexts}
    rates: list[float] = []
    for _ in range(runs):
        spent = decode_run(experts, contexts)
        rates.append(spent["bytes"] / spent["read"] / 1e9)
        for name in contexts:
            ratios[name].append(spent["read"] / spent[name])
    for context in contexts.values():
        context.close()
    sys.stderr.write(f"{model}, {threads} threads: read {statistics.median(rates):.1f} GB/s\n")
    for name, values in ratios.items():
        yield bar(f"decode {model} {name} {threads}t / memory read", values, DECODE_BARS[name, threads])


def prefill_bars(model: str, experts: Experts, threads: int, runs: int, level: str | None) -> Iterator[Bar]:
    """Rate of one expert for PREFILL_TOKENS tokens over that of fp32 sgemm at the same three shapes."""
    part = experts.layout.parts[0]
    hidden, intermediate = part.columns, part.rows
    rng = np.random.default_rng(2)
    x = rng.standard_normal((PREFILL_TOKENS, hidden), np.float32)
    h = rng.standard_normal((PREFILL_TOKENS, intermediate), np.float32)
    up, down = (
        rng.standard_normal((intermediate, hidden), np.float32),
        rng.standard_normal((hidden, intermediate), np.float32),
    )
    gate = up.copy()
    weights = np.ones((PREFILL_TOKENS, 1), np.float32)
    outputs = np.empty((PREFILL_TOKENS, hidden), np.float32)
    layout = native.expert_layout(experts.layout, SILU)
    records = itertools.cycle(experts.records)
    for name in native.PRECISIONS:
        ratios = []
        with native.Context(threads, name, level) as context, threadpool_limits(threads, "blas"):
            for _ in range(3 * runs):
                chosen = [native.Chosen(next(records), np.arange(PREFILL_TOKENS))]
                blas = min(seconds(lambda: (x @ gate.T, x @ up.T, h @ down.T)) for _ in range(3))
                ours = min(seconds(partial(context.experts, layout, chosen, x, weights, outputs)) for _ in range(3))
                ratios.append(blas / ours)
        yield bar(f"prefill {model} {name} {threads}t / sgemm", ratios, PREFILL_BARS[name])


def main() -> None:
    """Measure everything; a table on stderr, one JSON line on stdout."""
    total_bytes, runs, level = 4 << 30, 5, None
    bars: list[Bar] = []
    for model, shape in SHAPES.items():
        experts = Experts(*shape, total_bytes)
        for threads in (1, 2):
            for found in itertools.chain(
                decode_bars(model, experts, threads, runs, level), prefill_bars(model, experts, threads, runs, level)
            ):
                bars.append(found)
                sys.stderr.write(
                    f"{found.name:50} {found.value:6.2f} of {found.bar:.2f} ({found.low:.2f}-{found.high:.2f})\n"
                )
        del experts
    sys.stdout.write(
        json.dumps(
            {
                "version": __version__,
                "machine": {
                    "processors": os.cpu_count(),
                    "architecture": platform.machine(),
                    "levels": native.levels(),
                },
                "blas": [info.get("architecture") for info in threadpool_info()],
                "bars": [asdict(found) for found in bars],
            }
        )
        + "\n"
    )


if __name__ == "__main__":
    main()
