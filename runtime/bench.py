"""What the disk and the memory of this machine allow, then what the engine reaches of it."""

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass

import numpy as np

from formats import __version__
from formats.budget import human, three_digits, token_bytes
from formats.dtypes import AnyArray
from formats.probe import READS_IN_FLIGHT
from runtime.cache import ExpertKey
from runtime.engine import Engine

CEILING_S = 0.5  # how long each ceiling is measured
MEMORY_BYTES = 1 << 28  # at least, to be more than any cache
Progress = Callable[[str], None]  # what begins now


@dataclass(frozen=True)
class Measurement:
    """One figure: the median of its runs, and the spread."""

    name: str
    unit: str
    median: float
    low: float
    high: float
    runs: int


def run_bench(
    engine: Engine, *, prompt_tokens: int, new_tokens: int, runs: int, progress: Progress = lambda what: None
) -> Iterator[str]:
    """Lines of a table as they are measured; the last line is one JSON object.

    The ceilings: experts in random order, read raw into slots, as many at a time as a step reads; the resident
    weights, read by the engine's threads in the faster of two loops. The bound of a decode step is the resident bytes
    at that rate, and then the larger of what its missing experts take to read and what all of them take from memory.
    Resident weights below MEMORY_BYTES may lie in a cache: then there is neither a ceiling of memory nor a bound.
    `progress` hears what begins, num_steps times.
    """
    disk = _repeat("disk ceiling", "GB/s", runs, lambda: _disk_rate(engine) / 1e9, progress)
    yield _row(disk)
    memory = None
    if engine.resident.nbytes >= MEMORY_BYTES:
        memory = _repeat(
            "memory ceiling", "GB/s", runs, lambda: _memory_rate(engine.resident, engine.threads) / 1e9, progress
        )
        yield _row(memory)
    else:
        size = human(engine.resident.nbytes)
        yield f"{'memory ceiling':18} not measured: {size} of resident weights may lie in the processor's caches"
    prefill, decode, hits = _speeds(engine, prompt_tokens, new_tokens, runs, progress)
    yield _row(prefill)
    yield _row(decode)
    yield f"{'hit rate':18} {three_digits(100 * hits):>9} %"
    bound = _bound(engine, disk, memory, hits) if memory else None
    if bound is not None:
        reached = f"reached {three_digits(100 * decode.median / bound)} % of it"
        yield f"{'decode bound':18} {three_digits(bound):>9} tokens/s at this hit rate; {reached}"
    yield json.dumps(
        {
            "version": __version__,
            "machine": {
                "processors": os.cpu_count(),
                "architecture": platform.machine(),
                "system": platform.system(),
            },
            "settings": {"prompt_tokens": prompt_tokens, "new_tokens": new_tokens, "runs": runs},
            "token_bytes": asdict(token_bytes(engine.container.index.layout)),
            "measurements": [asdict(figure) for figure in (disk, memory, prefill, decode) if figure],
            "hit_rate": hits,
            "decode_bound_tokens_per_s": bound,
            "share_of_bound": decode.median / bound if bound is not None else None,
            "stats": asdict(engine.stats),
            "bars": [],
        }
    )


def num_steps(engine: Engine, new_tokens: int, runs: int) -> int:
    """How often run_bench tells its progress: ceilings, prompts (one more to warm up) and new tokens."""
    ceilings = 2 if engine.resident.nbytes >= MEMORY_BYTES else 1
    return ceilings * runs + runs + 1 + runs * new_tokens


def _bound(engine: Engine, disk: Measurement, memory: Measurement, hits: float) -> float:
    """Tokens per second of a decode step whose bytes come at the rates of the ceilings."""
    need = token_bytes(engine.container.index.layout)
    resident_s, experts_s = (nbytes / (memory.median * 1e9) for nbytes in (need.resident_bytes, need.expert_bytes))
    reads_s = need.expert_bytes * (1 - hits) / (disk.median * 1e9)
    return 1 / (resident_s + max(reads_s, experts_s))


def _speeds(
    engine: Engine, prompt_tokens: int, new_tokens: int, runs: int, progress: Progress
) -> tuple[Measurement, Measurement, float]:
    """Prefill and decode of random token ids with warm caches, and the hit rate of the decode steps.

    Warm is what a prompt has run through and no slot is free of: what fits is in memory, whether or not the prompt
    had a use for it.
    """
    rng = np.random.default_rng(0)
    prefill, decode, hits, misses = [], [], 0, 0
    progress("warming up")
    engine.prefill(engine.new_session(), rng.integers(0, engine.config.vocab_size, prompt_tokens).tolist())
    layers = engine.container.index.layout.moe_layers()
    every = (ExpertKey(i, expert) for i, layer in layers for expert in range(layer.num_experts))
    engine.experts.load(key for key in every if not engine.experts.cache.holds(key))
    for _ in range(runs):
        session = engine.new_session()
        progress("prefill")
        began = time.perf_counter()
        engine.prefill(session, rng.integers(0, engine.config.vocab_size, prompt_tokens).tolist())
        prefill.append(prompt_tokens / (time.perf_counter() - began))
        before = engine.stats.cache_hits, engine.stats.cache_misses
        spent = 0.0
        for token_id in rng.integers(0, engine.config.vocab_size, new_tokens).tolist():
            progress("decode")
            began = time.perf_counter()
            engine.step([(session, [token_id])])
            spent += time.perf_counter() - began
        decode.append(new_tokens / spent)
        hits += engine.stats.cache_hits - before[0]
        misses += engine.stats.cache_misses - before[1]
    return (
        _measurement("prefill", "tokens/s", prefill),
        _measurement("decode", "tokens/s", decode),
        hits / max(1, hits + misses),
    )


def _disk_rate(engine: Engine) -> float:
    """Bytes per second of whole records in random order."""
    store, layout = engine.experts.store, engine.container.index.layout
    layers = [(i, layer.num_experts) for i, layer in layout.moe_layers()]
    slots = engine.experts.unused_slots()  # the rate of a disk may depend on the pages
    if len(slots) < READS_IN_FLIGHT:  # hot experts took them
        slots = list(store.new_slots(READS_IN_FLIGHT))
    began = time.perf_counter()

    def read(thread: int) -> int:
        rng, nbytes = np.random.default_rng(thread), 0
        while time.perf_counter() - began < CEILING_S:
            layer, num_experts = layers[rng.integers(len(layers))]
            slot = slots[thread::READS_IN_FLIGHT][rng.integers(len(slots) // READS_IN_FLIGHT)]
            nbytes += store.read_raw(ExpertKey(layer, int(rng.integers(num_experts))), slot)
        return nbytes

    return _by_threads(read, READS_IN_FLIGHT)


def _memory_rate(memory: AnyArray, threads: int) -> float:
    parts = np.array_split(memory.view(np.uint64), threads)
    return max(_loop_rate(parts, np.sum), _loop_rate(parts, np.bitwise_or.reduce))


def _loop_rate(parts: Sequence[AnyArray], loop: Callable[[AnyArray], object]) -> float:
    began = time.perf_counter()

    def read(thread: int) -> int:
        nbytes = 0
        while time.perf_counter() - began < CEILING_S / 2:
            loop(parts[thread])
            nbytes += parts[thread].nbytes
        return nbytes

    return _by_threads(read, len(parts))


def _by_threads(work: Callable[[int], int], threads: int) -> float:
    """Bytes per second of all threads, each of which says how many it got."""
    began = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        nbytes = sum(pool.map(work, range(threads)))
    return nbytes / (time.perf_counter() - began)


def _repeat(name: str, unit: str, runs: int, measure: Callable[[], float], progress: Progress) -> Measurement:
    values = []
    for _ in range(runs):
        progress(name)
        values.append(measure())
    return _measurement(name, unit, values)


def _measurement(name: str, unit: str, values: list[float]) -> Measurement:
    return Measurement(name, unit, statistics.median(values), min(values), max(values), len(values))


def _row(figure: Measurement) -> str:
    spread = f"({three_digits(figure.low)} to {three_digits(figure.high)})"
    return f"{figure.name:18} {three_digits(figure.median):>9} {figure.unit:8} {spread}"
