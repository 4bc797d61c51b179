"""How near predicted tokens/s come to measured ones: two geometries at two budgets each.

`make bench-convert` runs it last. Rehearsals of true geometry are made in FOLDER and removed afterwards (20 GiB; fewer
with --disk). Their routing is even, so the prediction for even routing is the one compared. As a user has it, the plan
comes before the run: the machine is measured so many times, then the model is opened and decodes as often. (A probe
beside an engine gets the pages that the engine did not take, and the rate of a virtual disk depends on them.) A value
is the median over rounds of the smaller of the two speeds over the larger. The last line is one JSON object.
"""

import argparse
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from formats.bars import Bar, bar, report
from formats.budget import UNIT_BYTES
from formats.container import open_container
from formats.predict import measure, outlook
from repack.convert import convert
from repack.known_models import known_geometry
from repack.options import Size
from repack.plan import Options
from repack.rehearse import prepare_rehearsal
from runtime.cache import ExpertKey
from runtime.engine import Engine
from runtime.needs import memory_needs

BUDGETS_GIB = {"Qwen/Qwen3-30B-A3B": (4, 6), "Qwen/Qwen3.5-35B-A3B": (4, 8)}
ROUNDS, WARM_STEPS, STEPS = 5, 4, 12
LEAST = 0.8  # within 25 %


def decode(engine: Engine) -> float:
    """Tokens/s of random tokens, one after another."""
    rng, session = np.random.default_rng(), engine.new_session()
    ids = rng.integers(0, engine.config.vocab_size, WARM_STEPS + STEPS).tolist()
    for nth, token_id in enumerate(ids):
        if nth == WARM_STEPS:
            began = time.perf_counter()
        engine.step([(session, [token_id])])
    return STEPS / (time.perf_counter() - began)


def fill(engine: Engine) -> None:
    """Until the cache is full: what follows is its steady state, in which every checksum has been compared."""
    layers = engine.container.index.layout.moe_layers()
    engine.experts.store.proven.update(ExpertKey(i, e) for i, layer in layers for e in range(layer.num_experts))
    session, rng = engine.new_session(), np.random.default_rng()
    while engine.experts.cache.free_slots and len(session.token_ids) < 100:
        engine.step([(session, [int(rng.integers(engine.config.vocab_size))])])


def compare(folder: Path, model: str, budgets: Sequence[int], rounds: int) -> tuple[list[Bar], list[dict[str, Any]]]:
    """The bars of one container."""
    layout = open_container(folder).index.layout
    terms, _, _, threads = memory_needs(open_container(folder), None, None, None)
    bars, facts = [], []
    for gib in budgets:
        ram = gib * UNIT_BYTES["GiB"]
        machines = [measure(layout, folder.parent, threads) for _ in range(rounds)]
        ratios, speeds = [], []
        with Engine.open(folder, ram_bytes=ram) as engine:
            fill(engine)
            for machine in machines:
                predicted = outlook(layout, machine, terms, ram)
                measured = decode(engine)
                even = predicted.tokens_per_s[0]
                ratios.append(min(even / measured, measured / even))
                speeds.append((even, measured))
                disk = machine.probe.disk_bytes_per_s / 1e9
                sys.stderr.write(
                    f"{model}, {gib} GiB: predicted {even:.2f}, measured {measured:.2f}; {disk:.2f} GB/s\n"
                )
        bars.append(bar(f"{model}, {gib} GiB: predicted and measured speed, less / more", ratios, LEAST))
        even, measured = (statistics.median(column) for column in zip(*speeds, strict=True))
        hits = predicted.hit_rates[0]
        facts.append({"model": model, "ram_gib": gib, "hit_rate": hits, "predicted": even, "measured": measured})
    return bars, facts


def main() -> None:
    """Measure; the speeds on stderr, one JSON line on stdout."""
    parser = argparse.ArgumentParser(prog="tests.repack.bench_predict", description=__doc__)
    parser.add_argument("--folder", type=Path, help="on the disk to measure (default: that of temporary files)")
    parser.add_argument("--disk", default="10GiB", help="of a rehearsal; layer files past it are hard links")
    parser.add_argument("--model", choices=BUDGETS_GIB, help="only this one")
    parser.add_argument("--ram", type=int, help="GiB; only this budget")
    parser.add_argument("--container", type=Path, help="a rehearsal of --model that is there already")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    options = parser.parse_args()
    bars, facts = [], []
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="bench-predict-") as name:
        for model in [options.model] if options.model else BUDGETS_GIB:
            out = options.container or Path(name) / "out"
            if options.container is None:
                disk_bytes = Size().convert(options.disk, None, None)
                convert(prepare_rehearsal(known_geometry(model), Options(), 0, disk_bytes), out)
            found = compare(out, model, [options.ram] if options.ram else BUDGETS_GIB[model], options.rounds)
            bars += found[0]
            facts += found[1]
            if options.container is None:
                shutil.rmtree(out)
    for found_bar in bars:
        sys.stderr.write(f"{found_bar}\n")
    sys.stdout.write(report(bars, {"predictions": facts}) + "\n")


if __name__ == "__main__":
    main()
