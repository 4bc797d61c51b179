"""Kills a conversion from a hub again and again, completes it, and says what was fetched twice.

`python -m tests.repack.hub_kills FOLDER WORK [KILLS] [BYTES_PER_S]` does it with a checkpoint of any size; the last
line is one JSON object. `kill_and_complete` is what a test does with a small one.
"""

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from repack.convert import convert, prepare
from repack.plan import Options
from repack.sources.folder import FolderSource
from tests.repack.hub_server import Hub, serve

COMMAND = (sys.executable, "-m", "repack.cli")


class Survived(NamedTuple):
    """What a conversion cost that was killed so often."""

    kills: int
    fetched_bytes: int  # by the hub's count, headers and what was lost on the way included
    needed_bytes: int
    peak_disk_bytes: int  # of the folder that is written
    output_bytes: int


def disk_bytes(folder: Path) -> int:
    """What the files of a folder take of the disk now."""
    return sum(_disk_bytes(path) for path in folder.rglob("*"))


def _disk_bytes(path: Path) -> int:
    try:
        return path.stat().st_blocks * 512
    except FileNotFoundError:
        return 0  # it was renamed meanwhile


class Watch(threading.Thread):
    """Notes the most that a folder takes."""

    def __init__(self, folder: Path) -> None:
        super().__init__(daemon=True)
        self.folder, self.peak_bytes, self.ended = folder, 0, threading.Event()

    def run(self) -> None:
        while not self.ended.wait(0.02):
            self.peak_bytes = max(self.peak_bytes, disk_bytes(self.folder))


def kill_and_complete(
    hub: Hub,
    out: Path,
    environment: Mapping[str, str],
    kills: int,
    seed: int = 0,
    command: tuple[str, ...] = COMMAND,
    options: tuple[str, ...] = (),
    say: Callable[[str], None] = lambda line: None,
) -> Survived:
    """Convert org/tiny, killed with SIGKILL each time when a random number of bytes more was sent."""
    needed, rng = prepare(FolderSource(hub.folder), Options()).plan.source_bytes, random.Random(seed)
    arguments = [*command, "convert", "org/tiny", str(out), *options]
    watch = Watch(out)
    watch.start()
    killed = 0
    while killed < kills:
        stop_at = hub.sent_bytes + rng.uniform(0.1, 0.9) * needed / (kills + 1)
        with subprocess.Popen(arguments, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
            while hub.sent_bytes < stop_at and process.poll() is None:
                time.sleep(0.001)
            if process.poll() is not None:
                assert process.stdout is not None
                raise AssertionError(f"ended after {killed} kills: {process.stdout.read().decode()}")
            process.send_signal(signal.SIGKILL)
            killed += 1
        say(f"kill {killed}: {hub.sent_bytes / needed:.3f} of what is needed was sent")
    last = subprocess.run(arguments, env=environment, capture_output=True, text=True, check=False)
    assert last.returncode == 0, last.stderr
    watch.ended.set()
    return Survived(killed, hub.sent_bytes, needed, watch.peak_bytes, disk_bytes(out))


def main() -> None:
    folder, work = Path(sys.argv[1]), Path(sys.argv[2])
    kills = int(sys.argv[3]) if len(sys.argv) > 3 else 20
    with serve(folder) as hub:
        hub.bytes_per_s = float(sys.argv[4]) if len(sys.argv) > 4 else 0.0
        environment = {
            **os.environ,
            "HF_ENDPOINT": hub.address,
            "HF_HOME": str(work / "cache"),
            "NO_PROXY": "127.0.0.1,localhost",
        }
        result = kill_and_complete(
            hub,
            work / "out",
            environment,
            kills,
            say=lambda line: print(line, file=sys.stderr),  # noqa: T201
        )
    convert(prepare(FolderSource(folder), Options()), work / "local", hash_source=False)
    equal = same_data(work / "out", work / "local")
    bars = {
        "fetched_over_needed": {"value": result.fetched_bytes / result.needed_bytes, "most": 1.05},
        "disk_over_output_bytes": {"value": result.peak_disk_bytes - result.output_bytes, "most": 2 << 30},
    }
    print(json.dumps({**result._asdict(), "equal": equal, "bars": bars}))  # noqa: T201
    sys.exit(0 if equal else 1)


def same_data(a: Path, b: Path) -> bool:
    """Whether two containers have the same data files."""
    names = [path.relative_to(b) for path in b.rglob("*.bin")]
    return all(same_bytes(a / name, b / name) for name in names)


def same_bytes(a: Path, b: Path) -> bool:
    with open(a, "rb") as first, open(b, "rb") as second:
        while True:
            pieces = first.read(1 << 20), second.read(1 << 20)
            if pieces[0] != pieces[1]:
                return False
            if not pieces[0]:
                return True


if __name__ == "__main__":
    main()
