"""What streaming from a hub costs: over a conversion from the folder itself, in bytes, disk and memory, and in kills.

`make bench-convert` runs it after the local bars. The hub is a process of its own on loopback, so it shares the
processors with the conversion. The last line is one JSON object.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from formats.bars import bar, report
from repack.convert import convert, default_jobs, prepare
from repack.encode import encoder_name
from repack.plan import Options
from repack.sources.base import Source
from repack.sources.folder import FolderSource
from tests.repack.checkpoints import SMALL, shapes, write_random
from tests.repack.hub_kills import Watch, disk_bytes, kill_and_complete, same_data
from tests.repack.hub_server import serve

RUNS = 5
# 2.4 GB of bf16: experts of Qwen3-30B-A3B's size.
GEOMETRY = SMALL | {
    "vocab_size": 8192,
    "hidden_size": 2048,
    "num_experts": 124,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
    "shared_expert_intermediate_size": 768,
}
SPOOL_ALLOWANCE_BYTES = 2 << 30
BARS = {"speed": 0.85, "fetched": 1.05}


class Run(NamedTuple):
    """One conversion."""

    seconds: float
    peak_disk_bytes: int
    output_bytes: int


def convert_once(source: Source, out: Path) -> Run:
    """A conversion into a new folder, durable at its end."""
    conversion = prepare(source, Options())
    watch = Watch(out)
    watch.start()
    began = time.perf_counter()
    convert(conversion, out, jobs=default_jobs(), hash_source=False)
    seconds = time.perf_counter() - began
    watch.ended.set()
    watch.join()
    return Run(seconds, watch.peak_bytes, disk_bytes(out))


def main() -> None:
    """Measure; the rates on stderr, one JSON line on stdout."""
    parser = argparse.ArgumentParser(prog="tests.repack.bench_hub", description=__doc__)
    parser.add_argument("--folder", type=Path, help="on the disk to measure (default: that of temporary files)")
    parser.add_argument("--source", type=Path, help="a checkpoint to convert (default: 2.4 GB of random weights)")
    parser.add_argument("--kills", type=int, default=20, help="of one conversion, at random moments")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        work = Path(name)
        source = options.source or write_random(work / "source", GEOMETRY, shapes(GEOMETRY), shards=4)
        measure(source, work, options.kills)


def measure(folder: Path, work: Path, kills: int) -> None:
    command = [sys.executable, "-m", "tests.repack.hub_server", str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        address = server.stdout.readline().strip()
        environment = {"HF_ENDPOINT": address, "HF_HOME": str(work / "cache"), "NO_PROXY": "127.0.0.1,localhost"}
        os.environ.update(environment)
        from repack.sources.hub import Access, HubSource  # reads the environment when it is imported
        from repack.sources.hub_api import list_repository

        listing = list_repository("org/tiny", None)
        needed = prepare(FolderSource(folder), Options()).plan.source_bytes
        locals_, hubs, fetched = [], [], []
        for n in range(RUNS):
            locals_.append(convert_once(FolderSource(folder), work / "local"))
            source = HubSource(listing, Access(jobs=default_jobs()))
            hubs.append(convert_once(source, work / "hub"))
            fetched.append(source.traffic().received_bytes / needed)
            assert same_data(work / "hub", work / "local"), "the bytes differ"
            rates = [needed / run[-1].seconds / 1e9 for run in (locals_, hubs)]
            sys.stderr.write(f"run {n + 1}: {rates[0]:.2f} GB/s from the folder, {rates[1]:.2f} from the hub\n")
            shutil.rmtree(work / "hub")
            if n + 1 < RUNS:
                shutil.rmtree(work / "local")
        server.communicate()
    bars = [
        bar("loopback / folder", [a.seconds / b.seconds for a, b in zip(locals_, hubs, strict=True)], BARS["speed"]),
        bar("needed / fetched", [1 / ratio for ratio in fetched], 1 / BARS["fetched"]),
    ]
    settings = {
        "encoder": encoder_name(),
        "jobs": default_jobs(),
        "needed_bytes": needed,
        "disk_beyond_output_bytes": max(run.peak_disk_bytes - run.output_bytes for run in hubs),
    }
    with serve(folder) as hub:
        killed = kill_and_complete(hub, work / "killed", {**os.environ, "HF_ENDPOINT": hub.address}, kills)
    assert same_data(work / "killed", work / "local"), "the bytes differ after kills"
    bars.append(bar("needed / fetched with kills", [killed.needed_bytes / killed.fetched_bytes], 1 / BARS["fetched"]))
    beyond = killed.peak_disk_bytes - killed.output_bytes
    bars.append(bar("disk allowance / used", [SPOOL_ALLOWANCE_BYTES / max(beyond, 1)], 1.0))
    settings |= {
        "kills": killed.kills,
        "disk_beyond_output_bytes_with_kills": beyond,
    }
    for found in bars:
        sys.stderr.write(f"{found}\n")
    sys.stdout.write(report(bars, settings) + "\n")


if __name__ == "__main__":
    main()
