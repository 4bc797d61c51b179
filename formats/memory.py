"""What this machine and its memory groups grant, and what this process has taken."""

import os
import resource
import sys
from collections.abc import Iterator
from pathlib import Path

PROC, GROUPS = Path("/proc"), Path("/sys/fs/cgroup")
SHARE_FOR_US = 0.8  # of what is free; the rest is left to other programs and the page cache


def default_ram_bytes(proc: Path = PROC, groups: Path = GROUPS) -> int:
    """A ceiling for this process: a share of the memory that is free now, within every memory group above us."""
    granted = [_free_bytes(proc), *_group_bytes(proc, groups)]
    return int(SHARE_FOR_US * min(granted))


def _free_bytes(proc: Path) -> int:
    """MemAvailable on Linux; elsewhere half of the physical memory."""
    available = _kilobytes(proc / "meminfo", "MemAvailable")
    if available is not None:
        return available
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def _group_bytes(proc: Path, groups: Path) -> Iterator[int]:
    """What is left under the limit of each control group (v1 and v2) that holds this process.

    Pages of files that nobody has touched lately count as free, for the kernel drops them first.
    """
    try:
        lines = (proc / "self" / "cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, group = line.split(":", 2)
        if controllers == "":
            root, limit, usage, idle = groups, "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            root, limit, usage = groups / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
            idle = "total_inactive_file"
        else:
            continue
        folder = root / group.lstrip("/")
        while folder == root or root in folder.parents:
            limit_bytes, usage_bytes = _number(folder / limit), _number(folder / usage)
            if limit_bytes is not None and usage_bytes is not None:
                idle_bytes = _field(folder / "memory.stat", idle) or 0
                yield max(0, limit_bytes - max(0, usage_bytes - idle_bytes))
            folder = folder.parent


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # no such group here, or "max": no limit
        return None


def _field(path: Path, name: str) -> int | None:
    """The first number after a name that begins a line, as the kernel lists them; None where there is none."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) for line in lines if line.startswith((f"{name} ", f"{name}:"))), None)


def _kilobytes(path: Path, name: str) -> int | None:
    number = _field(path, name)
    return None if number is None else number * 1024


def peak_memory_bytes(proc: Path = PROC) -> int:
    """The most memory this process has had resident."""
    peak = _kilobytes(proc / "self" / "status", "VmHWM")  # getrusage tells of the parent too, if that was larger
    if peak is not None:
        return peak
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
