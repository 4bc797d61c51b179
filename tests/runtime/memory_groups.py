"""A memory group of the kernel (cgroup v1 or v2) with a limit, for a process of a test; page cache is charged to it."""

import contextlib
import os
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

SWAP_OFF = len(Path("/proc/swaps").read_text().splitlines()) < 2 if Path("/proc/swaps").exists() else False


class MemoryGroup:
    """A child of this process's own group."""

    def __init__(self, folder: Path, version: int) -> None:
        self._folder = folder
        self._version = version

    def run(self, words: Sequence[str], timeout_s: float = 100) -> subprocess.CompletedProcess[str]:
        """Run a command as a member from its first instruction on."""
        enter = f'echo $$ > "{self._folder}/cgroup.procs" && exec "$@"'
        return subprocess.run(
            ["sh", "-c", enter, "sh", *words], capture_output=True, text=True, check=False, timeout=timeout_s
        )

    @property
    def peak_bytes(self) -> int:
        """The most that was ever charged to it."""
        return int((self._folder / ("memory.max_usage_in_bytes" if self._version == 1 else "memory.peak")).read_text())

    @property
    def oom_kills(self) -> int:
        """How often the kernel killed a member because the limit was reached."""
        events = (self._folder / ("memory.oom_control" if self._version == 1 else "memory.events")).read_text()
        return int(next(line.split()[1] for line in events.splitlines() if line.startswith("oom_kill ")))


@contextlib.contextmanager
def memory_group(limit_bytes: int) -> Iterator[MemoryGroup]:
    """A group with that limit, removed afterwards. Raises OSError where none can be made."""
    parent, version = _own_group()
    folder = parent / f"streaming-experts-test-{os.getpid()}-{time.monotonic_ns()}"
    folder.mkdir()
    try:
        (folder / ("memory.limit_in_bytes" if version == 1 else "memory.max")).write_text(str(limit_bytes))
        yield MemoryGroup(folder, version)
    finally:
        _remove(folder)


def _own_group() -> tuple[Path, int]:
    """The folder of this process's memory group and the version of its tree."""
    root, lines = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup").read_text().splitlines()
    groups = {controllers: path.lstrip("/") for _, controllers, path in (line.split(":", 2) for line in lines)}
    for controllers, path in groups.items():
        if "memory" in controllers.split(","):
            return root / "memory" / path, 1
    return root / groups[""], 2


def _remove(folder: Path) -> None:
    """A dead member leaves its group a moment after it was waited for."""
    until = time.monotonic() + 5
    while (folder / "cgroup.procs").read_text() and time.monotonic() < until:
        time.sleep(0.01)
    folder.rmdir()


def can_make_groups() -> bool:
    """Whether this user may make a group with a limit here."""
    try:
        with memory_group(1 << 30) as group:
            return group.run(["true"]).returncode == 0
    except (OSError, KeyError, StopIteration):
        return False


def evict(folder: Path) -> None:
    """Drop a container's files from the page cache, so that a buffered read of them would be charged to its reader."""
    for path in folder.rglob("*"):
        if path.is_file():
            fd = os.open(path, os.O_RDONLY)
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(fd)
