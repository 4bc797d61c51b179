"""--ram is a ceiling that the kernel itself confirms: limits of real memory groups, page cache counted, no swap."""

import json
import subprocess
from pathlib import Path

import pytest

from tests.runtime.helpers import STREAM_RUN, floor_bytes
from tests.runtime.memory_groups import SWAP_OFF, can_make_groups, evict, memory_group

pytestmark = [
    pytest.mark.skipif(not SWAP_OFF, reason="memory groups: swap is on, so a limit does not show what is resident"),
    pytest.mark.skipif(not can_make_groups(), reason="memory groups: none can be made by this user"),
]

THREADS = 2


def words(out: Path, ram: int, backend: str) -> list[str]:
    """A prompt of several chunks and some tokens more."""
    text = " ".join(f"word{i}" for i in range(150))
    options = ("--raw", "-p", text, "-n", "24", "--ignore-eos", "--temp", "0", "--chunk", "128", "--json")
    return [*STREAM_RUN, str(out), *options, "-t", str(THREADS), "--backend", backend, "--ram", str(ram)]


def ceiling(out: Path) -> int:
    """The floor and room for a quarter of the experts or so."""
    return floor_bytes(out, threads=THREADS, chunk_size=128) + (20 << 20)


@pytest.mark.parametrize("backend", ["auto", "numpy"])
def test_with_twice_the_room_no_more_than_the_ceiling_is_used(demo16: Path, backend: str) -> None:
    ram = ceiling(demo16)
    evict(demo16)
    with memory_group(2 * ram) as group:
        done = group.run(words(demo16, ram, backend))
        assert done.returncode == 0, done.stderr
        assert group.peak_bytes <= 1.05 * ram
        assert json.loads(done.stdout)["bytes_read"] > 40 << 20  # weights did come from disk, and left no pages behind


@pytest.mark.parametrize("backend", ["auto", "numpy"])
def test_with_hardly_more_room_than_the_ceiling_the_text_is_the_same(demo16: Path, backend: str) -> None:
    ram = ceiling(demo16)
    free = subprocess.run(words(demo16, ram, backend), capture_output=True, text=True, check=True, timeout=100)
    evict(demo16)
    with memory_group(int(1.05 * ram)) as group:
        done = group.run(words(demo16, ram, backend))
        assert done.returncode == 0, done.stderr
        assert group.oom_kills == 0
    assert json.loads(done.stdout)["text"] == json.loads(free.stdout)["text"]
