"""How near the native kernels come to what memory and BLAS allow: `make bench-kernels`.

Every bar is a ratio of two times taken in turns, record by record or run by run, in one process; its value is the
median over the runs. The last line is one JSON object.
"""

import argparse
import itertools
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np
from threadpoolctl import threadpool_info, threadpool_limits

from formats.bars import Bar, bar, report
from formats.dtypes import AnyArray, Float32
from formats.encodings import (
    FP8,
    IQ4NL,
    MXFP4,
    NVFP4,
    Q2K,
    Q3K,
    Q4K,
    Q5K,
    Q6K,
    Affine,
    Encoding,
    Levels,
    Plain,
    Symmetric,
    ZeroPoint,
    encoding_label,
)
from formats.kernels import PRECISIONS
from formats.record import PART_NAMES, PartSpec, RecordLayout, decode_part, lay_out_record
from runtime.backends import abi, native
from runtime.backends.native_run import Run

ENCODING = Affine(4, 64, "bf16")
SHAPES = {"Qwen3.5-397B": (4096, 1024), "Kimi K2.5": (7168, 2048)}  # hidden_size, moe_intermediate_size
OTHER_ENCODINGS: tuple[Encoding, ...] = (
    Affine(3, 64, "bf16"), Affine(6, 64, "bf16"), Affine(8, 64, "bf16"), Plain("bf16"), Symmetric(4, 32, "bf16"),
    ZeroPoint(4, 128, "f16"), MXFP4(), NVFP4("multiply"), FP8(128, "f32"), Q4K(), Q5K(), Q6K(),
    Q2K(), Q3K(), IQ4NL(), Levels("iq4_xs"), Levels("iq3_xxs"), Levels("iq2_xxs"), Levels("iq2_xs"), Levels("iq1_s"),
)  # fmt: skip
EXPERTS_PER_CALL = 8
PREFILL_TOKENS = 64
SILU = abi.Activation(abi.SILU, 0.0, 0.0, 0)
DECODE_BARS = {"exact": (0.65, 0.60), "close": (0.65, 0.60), "fast": (0.80, 0.70)}  # with one thread, with two
PREFILL_BARS = {"exact": 0.60, "close": 0.60, "fast": 1.20}
NUMPY_BAR = 50.0
DISPATCH_US = 5.0
BLAS_VARIABLES = ("OPENBLAS_NUM_THREADS", "OPENBLAS_CORETYPE", "OPENBLAS_VERBOSE", "OMP_NUM_THREADS")


def seconds(work: Callable[[], object]) -> float:
    """How long work takes, once."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def record_layout(hidden_size: int, intermediate_size: int, encoding: Encoding) -> RecordLayout:
    """The record of one expert at that shape."""
    first, second = (intermediate_size, hidden_size), (hidden_size, intermediate_size)
    shapes = {"gate": first, "up": first, "down": second}
    return lay_out_record(PartSpec(name, *shapes[name], encoding) for name in PART_NAMES)


def random_records(layout: RecordLayout, total_bytes: int) -> AnyArray:
    """Distinct records of random codes and small scales, total_bytes or more and enough for one call."""
    count = max(EXPERTS_PER_CALL, -(-total_bytes // layout.record_bytes))
    records = np.empty((count, layout.record_bytes), np.uint8)
    rng = np.random.default_rng(0)
    noise = np.frombuffer(rng.bytes(layout.record_bytes), np.uint8)
    for i, record in enumerate(records):
        np.bitwise_xor(noise, np.uint8(i % 256), out=record)
        for part in layout.parts:
            for name, view in part.views(record).items():
                make_small(name, view, i)
    return records


def make_small(name: str, view: AnyArray, seed: int) -> None:
    """Turns random bits that stand for floats into small numbers; codes and packed integers stay."""
    if name == "weight" and view.dtype == np.uint16:
        np.bitwise_and(view, np.uint16(0x80FF), out=view)
        np.bitwise_or(view, np.uint16(0x3C00), out=view)  # 0.008 to 0.03: some processors take long for subnormals
    elif name == "codes" and view.dtype == np.uint8:
        np.bitwise_and(view, np.uint8(0xBF), out=view)
    elif view.dtype == np.uint16:  # bf16, about 0.008
        view[...] = (0xBD80 if name == "biases" else 0x3C00) + seed % 64
    elif view.dtype == np.uint8:
        view[...] = 0x38 if name != "zeros" else 8
    elif view.dtype.kind == "f":
        view[...] = 0.008 * (1 + seed % 64 / 64)


class Experts:
    """Experts of one shape in DRAM, taken in random order."""

    def __init__(self, shape: tuple[int, int], total_bytes: int, encoding: Encoding = ENCODING) -> None:
        self.hidden_size, self.intermediate_size = shape
        self.layout = record_layout(*shape, encoding)
        self.records = random_records(self.layout, total_bytes)
        self.native = native.expert_layout(self.layout, SILU)
        self._rng = np.random.default_rng(1)
        self.x = self._rng.standard_normal((1, self.hidden_size), np.float32)

    @property
    def gate_bytes(self) -> int:
        """Of a record's first part: a matrix on its own."""
        return self.layout.parts[1].arrays[0].offset

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
        outputs = np.empty((k, self.hidden_size), np.float32)
        context.experts(self.native, chosen, self.x, weights, outputs)
        return context.weighted_sum(outputs, weights)

    def resident(self, context: native.Context, records: Sequence[AnyArray]) -> None:
        """One token through the first matrix of each of these records, in one call, as a step has them."""
        run, y = Run(), np.empty((len(records), self.intermediate_size), np.float32)
        for record, row in zip(records, y, strict=True):
            run.add("se_linear", context.precision, self.native.gate, 1, record.ctypes.data, self.x, 1, row)
        context.run(run.call(0), len(run))

    def numpy(self, record: AnyArray) -> Float32:
        """One token through one expert, decoded by the reference."""
        gate, up, down = (decode_part(part, record)[0] for part in self.layout.parts)
        g = self.x @ gate.T
        return (g / (1 + np.exp(-g)) * (self.x @ up.T)) @ down.T


def in_turns(experts: Experts, jobs: dict[str, Callable[[list[AnyArray]], object]]) -> dict[str, float]:
    """Seconds that each job takes for one walk over all records.

    Jobs take turns from call to call, each on other records than the one before, so that a neighbour on the machine
    hurts all of them alike and no record is in a cache.
    """
    draws = list(experts.draws())
    spent = dict.fromkeys(jobs, 0.0)
    shift = max(1, len(draws) // len(jobs))
    for i in range(len(draws)):
        for place, (name, job) in enumerate(jobs.items()):
            spent[name] += seconds(partial(job, draws[(i + place * shift) % len(draws)]))
    return spent


def decode_bars(
    label: str, experts: Experts, threads: int, runs: int, level: str | None, *, resident: bool = False
) -> Iterator[Bar]:
    """Share of the memory's read rate that one token reaches: through whole experts, or one matrix after another."""
    contexts = {name: native.Context(threads, name, level) for name in PRECISIONS}
    jobs: dict[str, Callable[[list[AnyArray]], object]] = {
        name: partial(experts.resident if resident else experts.token, context) for name, context in contexts.items()
    }
    nbytes = experts.gate_bytes if resident else experts.layout.record_bytes
    reader = next(iter(contexts.values()))

    def read(loop: int, records: list[AnyArray]) -> None:
        reader.read(loop, [record[:nbytes] for record in records])

    for loop in range(abi.READ_LOOPS):
        jobs[f"read {loop}"] = partial(read, loop)
    walks = [in_turns(experts, jobs) for _ in range(runs)]
    for context in contexts.values():
        context.close()
    best = [min(walk[f"read {loop}"] for loop in range(abi.READ_LOOPS)) for walk in walks]
    total = len(experts.records) // EXPERTS_PER_CALL * EXPERTS_PER_CALL * nbytes
    sys.stderr.write(f"{label}, {threads} threads: read {total / statistics.median(best) / 1e9:.1f} GB/s\n")
    for name in contexts:
        ratios = [read / walk[name] for read, walk in zip(best, walks, strict=True)]
        yield bar(f"decode {label} {name} {threads}t / memory read", ratios, DECODE_BARS[name][threads - 1])


def numpy_bars(label: str, experts: Experts, runs: int, level: str | None) -> Iterator[Bar]:
    """How many times faster than the reference on one thread."""
    for name in PRECISIONS:
        with native.Context(1, name, level) as context, threadpool_limits(1, "blas"):
            records = itertools.cycle(experts.records)
            ratios = []
            for _ in range(runs):
                reference = seconds(partial(experts.numpy, next(records)))
                chosen = [next(records) for _ in range(EXPERTS_PER_CALL)]
                ratios.append(reference * EXPERTS_PER_CALL / seconds(partial(experts.token, context, chosen)))
        yield bar(f"decode {label} {name} 1t / NumPy", ratios, NUMPY_BAR)


def prefill_bars(label: str, experts: Experts, threads: int, runs: int, level: str | None) -> Iterator[Bar]:
    """Rate of one expert for PREFILL_TOKENS tokens over that of fp32 sgemm at the same three shapes."""
    hidden, intermediate = experts.hidden_size, experts.intermediate_size
    rng = np.random.default_rng(2)
    x, h = (rng.standard_normal((PREFILL_TOKENS, n), np.float32) for n in (hidden, intermediate))
    gate, up, down = (rng.standard_normal((part.rows, part.columns), np.float32) for part in experts.layout.parts)
    weights = np.ones((PREFILL_TOKENS, 1), np.float32)
    outputs = np.empty((PREFILL_TOKENS, hidden), np.float32)
    records = itertools.cycle(experts.records)
    for name in PRECISIONS:
        ratios = []
        with native.Context(threads, name, level) as context, threadpool_limits(threads, "blas"):
            for _ in range(3 * runs):
                chosen = [native.Chosen(next(records), np.arange(PREFILL_TOKENS))]
                blas = min(seconds(lambda: (x @ gate.T, x @ up.T, h @ down.T)) for _ in range(3))
                call = partial(context.experts, experts.native, chosen, x, weights, outputs)
                ratios.append(blas / min(seconds(call) for _ in range(3)))
        yield bar(f"prefill {label} {name} {threads}t / sgemm", ratios, PREFILL_BARS[name])


def dispatch_bar(runs: int, level: str | None) -> Bar:
    """Microseconds to wake two threads and wait for them, the call from Python included."""
    with native.Context(2, "exact", level) as context:
        times = [min(seconds(context.dispatch) for _ in range(200)) * 1e6 for _ in range(runs)]
    return bar("dispatch 2t, us at most", times, DISPATCH_US, at_most=True)


def all_bars(total_bytes: int, runs: int, level: str | None) -> Iterator[Bar]:
    """Every bar, one after another."""
    yield dispatch_bar(runs, level)
    for model, shape in SHAPES.items():
        experts = Experts(shape, total_bytes)
        for threads in (1, 2):
            yield from decode_bars(model, experts, threads, runs, level)
            yield from decode_bars(f"{model} resident", experts, threads, runs, level, resident=True)
            yield from prefill_bars(model, experts, threads, runs, level)
        yield from numpy_bars(model, experts, runs, level)
        del experts
    for encoding in OTHER_ENCODINGS:
        experts = Experts(SHAPES["Qwen3.5-397B"], total_bytes // 8, encoding)
        for threads in (1, 2):
            yield from decode_bars(encoding_label(encoding), experts, threads, runs, level)
        del experts


def main() -> None:
    """Measure everything; a table on stderr, one JSON line on stdout."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gib", type=float, default=4.0, help="distinct records of each shape")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--level", choices=native.levels(), help="instruction set; the best by default")
    options = parser.parse_args()
    bars: list[Bar] = []
    for found in all_bars(int(options.gib * (1 << 30)), options.runs, options.level):
        bars.append(found)
        mark = "" if found.ok else "  (missed)"
        sys.stderr.write(f"{found}{mark}\n")
    settings = {
        **vars(options),
        "levels": native.levels(),
        "blas": [info.get("architecture") for info in threadpool_info()],
        "encoding": encoding_label(ENCODING),
        "experts_per_call": EXPERTS_PER_CALL,
        "prefill_tokens": PREFILL_TOKENS,
        "blas_variables": {name: os.environ.get(name) for name in BLAS_VARIABLES},
    }
    sys.stdout.write(report(bars, {"settings": settings}) + "\n")


if __name__ == "__main__":
    main()
