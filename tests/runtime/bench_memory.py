"""What a ceiling on memory costs: part of `make bench-store`, where memory groups can be made and swap is off.

A container of Qwen3-30B-A3B's geometry, cut to a few layers, runs with --ram for half of its experts: alone, within a
memory group of 1.05 times --ram, and within one of twice --ram whose peak is read. Runs take turns; page cache is
charged to the group, and emptied before. The last line is one JSON object.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from formats.bars import bar, report
from formats.budget import human
from formats.container import open_container
from runtime.bench_store import QWEN3_30B, repack
from tests.runtime.helpers import STREAM_RUN, floor_bytes
from tests.runtime.memory_groups import SWAP_OFF, can_make_groups, evict, memory_group

RUNS, THREADS, CHUNK = 5, 2, 128
MEASURED = ("prefill", "decode")


def speeds(stdout: str) -> dict[str, float]:
    """Tokens per second of `stream-run bench`."""
    return {entry["name"]: entry["median"] for entry in json.loads(stdout.splitlines()[-1])["measurements"]}


def run_free(words: Sequence[str], out: Path) -> dict[str, float]:
    """Without a limit."""
    evict(out)
    return speeds(subprocess.run(words, capture_output=True, text=True, check=True).stdout)


def run_within(words: Sequence[str], out: Path, limit_bytes: int) -> tuple[dict[str, float], int]:
    """(speeds, peak of the group in bytes)."""
    evict(out)
    with memory_group(limit_bytes) as group:
        done = group.run(words)
        if done.returncode != 0:
            raise SystemExit(f"within {human(limit_bytes)}: {done.stderr.strip()}")
        return speeds(done.stdout), group.peak_bytes


def main() -> None:
    """Measure; one JSON line on stdout."""
    parser = argparse.ArgumentParser(prog="tests.runtime.bench_memory", description=__doc__)
    parser.add_argument("--folder", type=Path, help="on the disk to measure (default: that of temporary files)")
    options = parser.parse_args()
    if not SWAP_OFF or not can_make_groups():
        raise SystemExit("memory groups cannot be made here, or swap is on: nothing measured")
    folder = Path(tempfile.mkdtemp(dir=options.folder, prefix="bench-memory-"))
    try:
        config, out = folder / "config.json", folder / "out"
        config.write_text(json.dumps(QWEN3_30B))
        repack("rehearse", config, out)
        layers = [layer for _, layer in open_container(out).index.layout.moe_layers()]
        experts = sum(layer.num_experts * layer.record.record_bytes for layer in layers)
        ram = floor_bytes(out, threads=THREADS, chunk_size=CHUNK) + experts // 2
        shape = [
            "-t",
            str(THREADS),
            "--chunk",
            str(CHUNK),
            "--prompt-tokens",
            "256",
            "--new-tokens",
            "48",
            "--runs",
            "1",
        ]
        words = [*STREAM_RUN, "bench", str(out), *shape, "--ram", str(ram)]
        kept: dict[str, list[float]] = {name: [] for name in MEASURED}
        peaks = []
        for _ in range(RUNS):
            free, (tight, _) = run_free(words, out), run_within(words, out, int(1.05 * ram))
            for name in MEASURED:
                kept[name].append(tight[name] / free[name])
            peaks.append(run_within(words, out, 2 * ram)[1] / ram)
        bars = [bar(f"{name} within 1.05 x --ram / without a limit", kept[name], 0.9) for name in MEASURED]
        bars.append(bar("peak with page cache / --ram, within twice as much", peaks, 1.05, at_most=True))
    finally:
        shutil.rmtree(folder)
    for found in bars:
        sys.stderr.write(f"{found}\n")
    sys.stdout.write(report(bars, {"settings": {"ram": ram, "threads": THREADS, "runs": RUNS}}) + "\n")


if __name__ == "__main__":
    main()
