"""What this machine and its control groups grant, and what this process has taken."""

import math
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


def granted_processors(proc: Path = PROC, groups: Path = GROUPS) -> int:
    """Processors that this process may use: those it is bound to, within the time of every CPU group above us.

    Threads wait for one another: a processor taken from one of them costs more than another thread gains.
    """
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([bound, *_group_processors(proc, groups)]))


def _group_processors(proc: Path, groups: Path) -> Iterator[int]:
    """Processors that the CPU time of each control group (v1 and v2) that holds this process is worth, rounded up."""
    for unified, folder in _groups_above(proc, groups, "cpu"):
        if unified:
            quota, _, period = _text(folder / "cpu.max").partition(" ")
        else:
            quota, period = _text(folder / "cpu.cfs_quota_us"), _text(folder / "cpu.cfs_period_us")
        if quota.isdigit() and period.isdigit() and int(period) > 0:  # else "max", -1, or no such group here
            yield math.ceil(int(quota) / int(period))


def _group_bytes(proc: Path, groups: Path) -> Iterator[int]:
    """What is left under the limit of each control group (v1 and v2) that holds this process.

    Pages of files that nobody has touched lately count as free, for the kernel drops them first.
    """
    for unified, folder in _groups_above(proc, groups, "memory"):
        if unified:
            limit, usage, idle = "memory.max", "memory.current", "inactive_file"
        else:
            limit, usage, idle = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
        limit_bytes, usage_bytes = _number(folder / limit), _number(folder / usage)
        if limit_bytes is not None and usage_bytes is not None:
            idle_bytes = _field(folder / "memory.stat", idle) or 0
            yield max(0, limit_bytes - max(0, usage_bytes - idle_bytes))


def _groups_above(proc: Path, groups: Path, controller: str) -> Iterator[tuple[bool, Path]]:
    """(whether of version 2, its folder) of each control group of a controller that holds this process."""
    for line in _text(proc / "self" / "cgroup").splitlines():
        _, controllers, group = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        root = groups / controller if controllers else groups
        folder = root / group.lstrip("/")
        while folder == root or root in folder.parents:
            yield not controllers, folder
            folder = folder.parent


def _text(path: Path) -> str:
    """What a file says, without the end of its line; nothing where it is not."""
    try:
        return path.read_text().strip()
    except OSError:
        return ""


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
