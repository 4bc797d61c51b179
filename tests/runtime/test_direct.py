"""Reads past the page cache: proven, or a fallback that says so once and changes nothing else."""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from formats.dtypes import Float32
from formats.errors import StorageError
from runtime import Engine, direct
from runtime.direct import ALIGNMENT, DirectFile, aligned_bytes, proves_direct
from tests.runtime.helpers import PLENTY

PAGES = 4


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    path.write_bytes(np.random.default_rng(0).bytes(PAGES * ALIGNMENT))
    return path


@pytest.fixture
def no_o_direct(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system whose open refuses O_DIRECT."""
    if hasattr(os, "O_DIRECT"):
        monkeypatch.setattr(os, "open", refusing_o_direct(os.open))


def refusing_o_direct(real: Callable[..., int]) -> Callable[..., int]:
    def refuses(path: Any, flags: int, *args: Any, **options: Any) -> int:
        if flags & os.O_DIRECT:
            raise OSError(22, "Invalid argument")
        return real(path, flags, *args, **options)

    return refuses


@pytest.fixture
def pretends(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system that takes O_DIRECT and reads through the page cache all the same."""
    monkeypatch.setattr(direct, "_bytes_from_disk", lambda: 1000)


# ---- one file


def test_any_aligned_part_is_read_as_it_is(file: Path) -> None:
    content = file.read_bytes()
    buffer = aligned_bytes(2 * ALIGNMENT)
    with closing(DirectFile(file)) as opened:
        for page in range(PAGES - 1):
            opened.read_into(buffer, page * ALIGNMENT, "it")
            assert buffer.tobytes() == content[page * ALIGNMENT :][: 2 * ALIGNMENT]


def test_memory_for_reads_begins_on_a_page_and_is_zero() -> None:
    buffer = aligned_bytes(5000)
    assert buffer.shape == (5000,)
    assert buffer.ctypes.data % ALIGNMENT == 0
    assert not buffer.any()


def test_no_memory_at_all_can_be_asked_for() -> None:
    assert aligned_bytes(0).shape == (0,)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"gone: cannot be opened \(No such file or directory\)"):
        DirectFile(tmp_path / "gone")


def test_a_read_beyond_the_end_names_what_was_read(file: Path) -> None:
    with (
        closing(DirectFile(file)) as opened,
        pytest.raises(StorageError, match=r"file: layer 3 has 4096 bytes at 12288, expected 8192: it was cut"),
    ):
        opened.read_into(aligned_bytes(2 * ALIGNMENT), 3 * ALIGNMENT, "layer 3")


def test_a_file_system_without_o_direct_is_read_through_the_page_cache(file: Path, no_o_direct: None) -> None:
    buffer = aligned_bytes(ALIGNMENT)
    with closing(DirectFile(file)) as opened:
        assert not opened.direct
        opened.read_into(buffer, 0, "it")
    assert buffer.tobytes() == file.read_bytes()[:ALIGNMENT]


@pytest.mark.parametrize(("counted", "proven"), [(0, False), (ALIGNMENT, False), (2 * ALIGNMENT, True)])
def test_only_reads_that_the_kernel_counts_each_time_are_proven(
    file: Path, counted: int, proven: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = iter([1000, 1000 + counted])
    monkeypatch.setattr(direct, "_bytes_from_disk", lambda: next(counts))
    with closing(DirectFile(file)) as opened:
        opened.direct = True
        assert proves_direct(opened) == proven


def test_where_the_kernel_keeps_no_count_what_was_asked_for_is_believed(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(direct, "_bytes_from_disk", lambda: None)
    with closing(DirectFile(file)) as opened:
        assert proves_direct(opened) == opened.direct


# ---- a whole engine

WARNING = "O_DIRECT does not work on this file system: reads go through the page cache, slower"
PROMPT = list(range(100, 120))


@pytest.fixture(params=["no_o_direct", "pretends", "tmpfs"])
def buffered_container(request: pytest.FixtureRequest, demo4: Path) -> Iterator[Path]:
    """A container where reads cannot go past the page cache, for each reason that there is."""
    if request.param != "tmpfs":
        request.getfixturevalue(request.param)
        yield demo4
        return
    if not os.path.isdir("/dev/shm"):
        pytest.skip("/dev/shm: a file system in memory")
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        yield Path(shutil.copytree(demo4, Path(folder) / "out"))


def test_a_fallback_is_one_warning_and_a_field(buffered_container: Path) -> None:
    with Engine.open(buffered_container, ram_bytes=PLENTY) as engine:
        assert engine.warnings == [WARNING]
        assert engine.stats.read_mode == "buffered"


@pytest.fixture(scope="module")
def expected(demo4: Path) -> Float32:
    """Logits of PROMPT, before anything is made to fall back."""
    with Engine.open(demo4, ram_bytes=PLENTY) as engine:
        return engine.logits(PROMPT)


def test_a_fallback_gives_the_same_logits(expected: Float32, buffered_container: Path) -> None:
    with Engine.open(buffered_container, ram_bytes=PLENTY) as engine:
        assert np.array_equal(engine.logits(PROMPT), expected)
