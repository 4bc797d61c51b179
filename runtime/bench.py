"""What the disk and the memory of this machine allow, then what the engine reaches of it."""

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

import numpy as np

from formats import __version__
from formats.budget import three_digits, token_bytes
from formats.dtypes import AnyArray
from runtime.cache import ExpertKey
from runtime.engine import Engine

CEILING_S = 0.5  # how long each ceiling is measured


@dataclass(frozen=True)
class Measurement:
    """One figure: the median of its runs, and the spread."""

    name: str
    unit: str
    median: float
    low: float
    high: float
    runs: int


def run_bench(engine: Engine, *, prompt_tokens: int, new_tokens: int, runs: int) -> Iterator[str]:
    """Lines of a table as they are measured; the last line is one JSON object.

    The ceilings: experts in random order, read raw into one slot, one at a time; the resident weights,
    read by the fastest of two loops. The bound of a decode step is its bytes at those rates, one after the other.
    """
    need = token_bytes(engine.container.index.layout)
    disk = _repeat("disk ceiling", "GB/s", runs, lambda: _disk_rate(engine) / 1e9)
    yield _row(disk)
    memory = _repeat("memory ceiling", "GB/s", runs, lambda: _memory_rate(engine.resident) / 1e9)
    yield _row(memory)
    cold_s = need.expert_bytes / (disk.median * 1e9)
    warm_s = (need.expert_bytes + need.resident_bytes) / (memory.median * 1e9)
    prefill, decode, hits = _speeds(engine, prompt_tokens, new_tokens, runs)
    yield _row(prefill)
    yield _row(decode)
    bound = 1 / (cold_s * (1 - hits) + warm_s)
    share = decode.median / bound
    yield f"{'hit rate':18} {three_digits(100 * hits):>9} %"
    reached = f"reached {three_digits(100 * share)} % of it"
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
            "token_bytes": asdict(need),
            "measurements": [asdict(figure) for figure in (disk, memory, prefill, decode)],
            "hit_rate": hits,
            "decode_bound_tokens_per_s": bound,
            "share_of_bound": share,
            "stats": asdict(engine.stats),
            "bars": [],
        }
    )


def _speeds(engine: Engine, prompt_tokens: int, new_tokens: int, runs: int) -> tuple[Measurement, Measurement, float]:
    """Prefill and decode of random token ids after a prompt for warming up, and the hit rate of the decode steps."""
    rng = np.random.default_rng(0)
    prefill, decode, hits, misses = [], [], 0, 0
    engine.prefill(engine.new_session(), rng.integers(0, engine.config.vocab_size, prompt_tokens).tolist())
    for _ in range(runs):
        session = engine.new_session()
        began = time.perf_counter()
        engine.prefill(session, rng.integers(0, engine.config.vocab_size, prompt_tokens).tolist())
        prefill.append(prompt_tokens / (time.perf_counter() - began))
        before = engine.stats.cache_hits, engine.stats.cache_misses
        began = time.perf_counter()
        for token_id in rng.integers(0, engine.config.vocab_size, new_tokens).tolist():
            engine.step([(session, [token_id])])
        decode.append(new_tokens / (time.perf_counter() - began))
        hits += engine.stats.cache_hits - before[0]
        misses += engine.stats.cache_misses - before[1]
    return (
        _measurement("prefill", "tokens/s", prefill),
        _measurement("decode", "tokens/s", decode),
        hits / max(1, hits + misses),
    )


def _disk_rate(engine: Engine) -> float:
    """Bytes per second of whole records in random order."""
    store = engine.experts.store
    rng = np.random.default_rng(0)
    layers = [(i, layer.num_experts) for i, layer in engine.container.index.layout.moe_layers()]
    slot = store.new_slots(1)[0]
    nbytes, began = 0, time.perf_counter()
    while (seconds := time.perf_counter() - began) < CEILING_S:
        layer, num_experts = layers[rng.integers(len(layers))]
        nbytes += store.read_raw(ExpertKey(layer, int(rng.integers(num_experts))), slot)
    return nbytes / seconds


def _memory_rate(memory: AnyArray) -> float:
    words = memory.view(np.uint64)
    return max(_rate(words, words.sum), _rate(words, lambda: np.bitwise_or.reduce(words)))


def _rate(memory: AnyArray, loop: Callable[[], object]) -> float:
    passes, began = 0, time.perf_counter()
    while (seconds := time.perf_counter() - began) < CEILING_S / 2:
        loop()
        passes += 1
    return passes * memory.nbytes / seconds


def _repeat(name: str, unit: str, runs: int, measure: Callable[[], float]) -> Measurement:
    return _measurement(name, unit, [measure() for _ in range(runs)])


def _measurement(name: str, unit: str, values: list[float]) -> Measurement:
    return Measurement(name, unit, statistics.median(values), min(values), max(values), len(values))


def _row(figure: Measurement) -> str:
    spread = f"({three_digits(figure.low)} to {three_digits(figure.high)})"
    return f"{figure.name:18} {three_digits(figure.median):>9} {figure.unit:8} {spread}"
