"""What the machine grants, read from trees that look like the kernel's; and that a run keeps to its ceiling."""

import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from formats.memory import SHARE_FOR_US, default_ram_bytes, granted_processors, peak_memory_bytes
from tests.runtime.helpers import FIXTURES, floor_bytes

GIB = 1 << 30
UNLIMITED_V1 = 9223372036854771712


class Machine:
    """/proc and /sys/fs/cgroup of a machine with 64 GiB free, until groups are added."""

    def __init__(self, folder: Path) -> None:
        self.proc, self.groups = folder / "proc", folder / "cgroup"
        (self.proc / "self").mkdir(parents=True)
        self.groups.mkdir()
        self.free(64 * GIB)

    def free(self, nbytes: int) -> None:
        (self.proc / "meminfo").write_text(f"MemTotal: 1 kB\nMemAvailable:   {nbytes // 1024} kB\nBuffers: 2 kB\n")

    def process_in(self, *lines: str) -> None:
        (self.proc / "self" / "cgroup").write_text("".join(f"{line}\n" for line in lines))

    def v2(self, group: str, limit: int | str, usage: int, inactive_file: int = 0) -> None:
        self._group(self.groups / group, {"memory.max": limit, "memory.current": usage}, "inactive_file", inactive_file)

    def v1(self, group: str, limit: int, usage: int, inactive_file: int = 0) -> None:
        files = {"memory.limit_in_bytes": limit, "memory.usage_in_bytes": usage}
        self._group(self.groups / "memory" / group, files, "total_inactive_file", inactive_file)

    def _group(self, folder: Path, files: Mapping[str, int | str], idle: str, inactive_file: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for name, value in files.items():
            (folder / name).write_text(f"{value}\n")
        (folder / "memory.stat").write_text(f"anon 1\n{idle} {inactive_file}\nslab 3\n")

    def v2_time(self, group: str, quota: str) -> None:
        folder = self.groups / group
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "cpu.max").write_text(f"{quota}\n")

    def v1_time(self, group: str, quota_us: int, period_us: int) -> None:
        folder = self.groups / "cpu" / group
        folder.mkdir(parents=True)
        (folder / "cpu.cfs_quota_us").write_text(f"{quota_us}\n")
        (folder / "cpu.cfs_period_us").write_text(f"{period_us}\n")

    def processors(self) -> int:
        return granted_processors(self.proc, self.groups)

    def grants(self, nbytes: int) -> bool:
        """Whether a share of so many bytes is what a run takes by default."""
        return default_ram_bytes(self.proc, self.groups) == int(SHARE_FOR_US * nbytes)


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


@pytest.fixture
def eight(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight processors that this process is bound to."""
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)), raising=False)


@pytest.mark.usefixtures("eight")
def test_processors_are_those_that_a_process_is_bound_to(machine: Machine) -> None:
    assert machine.processors() == 8


@pytest.mark.usefixtures("eight")
@pytest.mark.parametrize(
    ("quota", "expected"),
    [("max 100000", 8), ("200000 100000", 2), ("150000 100000", 2), ("5000 100000", 1), ("9900000 100000", 8)],
)
def test_a_group_of_version_2_limits_processors(machine: Machine, quota: str, expected: int) -> None:
    machine.process_in("0::/user.slice/job")
    machine.v2_time("user.slice/job", quota)
    assert machine.processors() == expected


@pytest.mark.usefixtures("eight")
@pytest.mark.parametrize(("own", "parent"), [("300000 100000", "max 100000"), ("max 100000", "300000 100000")])
def test_the_smallest_time_of_a_group_and_its_ancestors_wins(machine: Machine, own: str, parent: str) -> None:
    machine.process_in("0::/user.slice/job")
    machine.v2_time("user.slice/job", own)
    machine.v2_time("user.slice", parent)
    assert machine.processors() == 3


@pytest.mark.usefixtures("eight")
@pytest.mark.parametrize(("quota_us", "expected"), [(-1, 8), (250000, 3)])
def test_a_group_of_version_1_limits_processors(machine: Machine, quota_us: int, expected: int) -> None:
    machine.process_in("5:cpu,cpuacct:/job", "4:memory:/", "0::/")
    machine.v1_time("job", quota_us, 100000)
    assert machine.processors() == expected


def test_without_groups_it_is_a_share_of_what_is_available(machine: Machine) -> None:
    assert machine.grants(64 * GIB)


def test_a_group_of_version_2_limits(machine: Machine) -> None:
    machine.process_in("0::/user.slice/job")
    machine.v2("user.slice/job", 4 * GIB, GIB)
    assert machine.grants(3 * GIB)


def test_a_group_of_version_1_limits(machine: Machine) -> None:
    machine.process_in("5:cpu,cpuacct:/", "4:memory:/user.slice/job", "0::/")
    machine.v1("user.slice/job", 4 * GIB, GIB)
    assert machine.grants(3 * GIB)


def test_a_controller_named_beside_others_counts(machine: Machine) -> None:
    machine.process_in("4:blkio,memory:/job")
    machine.v1("job", 2 * GIB, 0)
    assert machine.grants(2 * GIB)


@pytest.mark.parametrize(("own", "parent", "root"), [(2, 9, 9), (9, 2, 9), (9, 9, 2)])
def test_the_smallest_of_a_group_and_its_ancestors_wins(machine: Machine, own: int, parent: int, root: int) -> None:
    machine.process_in("0::/user.slice/job")
    machine.v2("user.slice/job", own * GIB, 0)
    machine.v2("user.slice", parent * GIB, 0)
    machine.v2(".", root * GIB, 0)
    assert machine.grants(2 * GIB)


def test_what_others_use_in_an_ancestor_counts(machine: Machine) -> None:
    machine.process_in("0::/user.slice/job")
    machine.v2("user.slice/job", 4 * GIB, 0)
    machine.v2("user.slice", 4 * GIB, 3 * GIB)
    assert machine.grants(GIB)


def test_a_group_without_a_limit_does_not_limit(machine: Machine) -> None:
    machine.process_in("4:memory:/job", "0::/job")
    machine.v2("job", "max", GIB)
    machine.v1("job", UNLIMITED_V1, GIB)
    assert machine.grants(64 * GIB)


def test_a_group_whose_folder_is_not_shown_inside_a_container_is_its_root(machine: Machine) -> None:
    machine.process_in("4:memory:/docker/0123")
    machine.v1(".", 2 * GIB, 0)
    assert machine.grants(2 * GIB)


def test_files_in_the_page_cache_that_nobody_uses_count_as_free(machine: Machine) -> None:
    machine.process_in("0::/job")
    machine.v2("job", 4 * GIB, 3 * GIB, inactive_file=2 * GIB)
    assert machine.grants(3 * GIB)
    machine.process_in("4:memory:/job")
    machine.v1("job", 4 * GIB, 4 * GIB, inactive_file=GIB)
    assert machine.grants(GIB)


def test_a_group_that_is_full_grants_nothing(machine: Machine) -> None:
    machine.process_in("0::/job")
    machine.v2("job", GIB, 2 * GIB)
    assert machine.grants(0)


def test_less_free_memory_than_a_group_allows_wins(machine: Machine) -> None:
    machine.free(GIB)
    machine.process_in("0::/job")
    machine.v2("job", 4 * GIB, 0)
    assert machine.grants(GIB)


def test_a_machine_that_lists_nothing_grants_a_share_of_half_its_memory(tmp_path: Path) -> None:
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert default_ram_bytes(tmp_path, tmp_path) == int(SHARE_FOR_US * (whole // 2))


def test_this_machine_grants_something() -> None:
    assert default_ram_bytes() > 0


# ---- what was taken


def test_the_peak_is_the_high_water_mark_of_the_kernel(machine: Machine) -> None:
    (machine.proc / "self" / "status").write_text("Name:\tx\nVmHWM:\t  2048 kB\nVmRSS:\t  1024 kB\n")
    assert peak_memory_bytes(machine.proc) == 2048 * 1024


def test_the_peak_of_this_process_is_between_a_mebibyte_and_all_memory() -> None:
    assert 1 << 20 < peak_memory_bytes() < os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the kernel tells only what getrusage tells")
def test_the_peak_of_a_process_is_not_that_of_its_parent() -> None:
    words = "from formats.memory import peak_memory_bytes; print(peak_memory_bytes())"
    large = (
        f"x = bytes(200 << 20); import subprocess, sys; subprocess.run([sys.executable, '-c', {words!r}], check=True)"
    )
    done = subprocess.run([sys.executable, "-c", large], capture_output=True, text=True, check=True, timeout=60)
    assert int(done.stdout) < 100 << 20


# ---- a run keeps to its ceiling

RUN = """
import sys
from runtime.cli import main
from formats.memory import peak_memory_bytes
main()
sys.stderr.write(f"peak {peak_memory_bytes()}")
"""


def peak_of(*words: str | Path) -> int:
    """Peak memory of a process that runs `stream-run` with these words."""
    done = subprocess.run(
        [sys.executable, "-c", RUN, *map(str, words)], capture_output=True, text=True, check=True, timeout=100
    )
    match = re.search(r"peak (\d+)$", done.stderr)
    assert match is not None
    return int(match[1])


@pytest.fixture(scope="module")
def long_prompt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text of about 2,000 tokens of the demo's, as much as its context holds."""
    path = tmp_path_factory.mktemp("prompt") / "prompt"
    path.write_text((FIXTURES / "demo" / "validation.txt").read_text()[:7400])
    return path


@pytest.mark.parametrize(("name", "backend"), [("demo4", "numpy"), ("demo16", "numpy"), ("demo4", "auto")])
def test_a_long_prompt_in_large_chunks_stays_under_the_floor(
    name: str, backend: str, long_prompt: Path, request: pytest.FixtureRequest
) -> None:
    out = request.getfixturevalue(name)
    floor = floor_bytes(out, threads=2, chunk_size=512)
    words: list[str | Path] = [
        "--raw",
        "-f",
        long_prompt,
        "-n",
        "4",
        "--ignore-eos",
        "-t",
        "2",
        "--chunk",
        "512",
        "--backend",
        backend,
    ]
    peak = peak_of(out, *words, "--ram", str(floor))
    assert peak <= floor
    assert floor <= 1.5 * peak  # the terms are estimates, but no fiction: measured 1.28


def test_a_short_prompt_stays_under_the_floor(demo4: Path) -> None:
    floor = floor_bytes(demo4, threads=1, chunk_size=1)
    assert peak_of(demo4, "-p", "Once", "-n", "4", "-t", "1", "--chunk", "1", "--ram", str(floor)) <= floor


def test_a_cache_stays_within_the_ceiling(demo16: Path, long_prompt: Path) -> None:
    ram = floor_bytes(demo16, threads=2) + (16 << 20)
    assert peak_of(demo16, "--raw", "-f", long_prompt, "-n", "4", "-t", "2", "--ram", str(ram)) <= ram


def test_perplexity_stays_under_the_floor(demo4: Path, long_prompt: Path) -> None:
    floor = floor_bytes(demo4, threads=2)
    assert peak_of("perplexity", demo4, long_prompt, "-t", "2", "--ram", str(floor)) <= floor
