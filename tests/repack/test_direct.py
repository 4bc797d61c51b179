"""Files of a conversion go past the page cache, or say that they do not; the bytes are the same either way."""

import ctypes
import fcntl
import mmap
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from blake3 import blake3

from repack import direct
from repack.convert import Outcome, convert, prepare
from repack.direct import ALIGNMENT, BUFFER_BYTES, RangeFile, SequentialFile, aligned_buffer
from repack.plan import Options
from repack.sources.folder import FolderSource
from tests.repack.checkpoints import SMALL, read_tree, shapes, write_random

needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="O_DIRECT and mincore are Linux's")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random(tmp_path_factory.mktemp("source"), SMALL, shapes(SMALL))


@pytest.fixture(scope="module")
def expected(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("expected") / "out"
    run(folder, out)
    return read_tree(out)


@pytest.fixture
def no_o_direct(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system whose open refuses O_DIRECT."""
    real = os.open

    def refuses(path: Any, flags: int, *args: Any, **options: Any) -> int:
        if flags & os.O_DIRECT:
            raise OSError(22, "Invalid argument")
        return real(path, flags, *args, **options)

    if hasattr(os, "O_DIRECT"):
        monkeypatch.setattr(os, "open", refuses)


@pytest.fixture
def memory_folder() -> Iterator[Path]:
    """A folder on a file system in memory, which has no O_DIRECT in older kernels."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as name:
        yield Path(name)


def refusing_direct_files(real: Callable[..., int]) -> Callable[..., int]:
    def refuses(fd: int, *args: Any) -> int:
        if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT:
            raise OSError(22, "Invalid argument")
        return real(fd, *args)

    return refuses


def run(folder: Path, out: Path) -> Outcome:
    return convert(prepare(FolderSource(folder), Options()), out, jobs=1)


def cached_pages(path: Path) -> int:
    """Pages of a file that the page cache holds: mincore of a mapping that nobody touched."""
    nbytes = path.stat().st_size
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long)
    libc.mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)
    libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
    with open(path, "rb") as file:
        address = libc.mmap(None, nbytes, mmap.PROT_READ, mmap.MAP_SHARED, file.fileno(), 0)
    present = np.zeros(-(-nbytes // mmap.PAGESIZE), np.uint8)
    assert libc.mincore(address, nbytes, present.ctypes.data) == 0
    libc.munmap(address, nbytes)
    return int((present & 1).sum())


# ---- whole conversions


@needs_linux
def test_a_conversion_leaves_nothing_of_its_files_in_the_page_cache(tmp_path: Path) -> None:
    source = write_random(tmp_path / "source", SMALL, shapes(SMALL))
    shard = source / "model.safetensors"
    with open(shard, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    assert run(source, tmp_path / "out").direct_writes
    assert FolderSource(source).reads_directly()
    for path in (tmp_path / "out").rglob("*.bin"):
        assert cached_pages(path) == 0
    assert cached_pages(shard) < shard.stat().st_size / mmap.PAGESIZE  # its header, read ahead


def test_without_direct_writes_the_bytes_are_the_same_and_the_outcome_says_so(
    folder: Path, tmp_path: Path, expected: dict[str, bytes], no_o_direct: None
) -> None:
    assert run(folder, tmp_path / "out").direct_writes == (sys.platform == "darwin")
    assert FolderSource(folder).reads_directly() == (sys.platform == "darwin")
    assert read_tree(tmp_path / "out") == expected


def test_a_file_system_in_memory_will_do(folder: Path, memory_folder: Path, expected: dict[str, bytes]) -> None:
    run(folder, memory_folder / "out")
    assert read_tree(memory_folder / "out") == expected


@needs_linux
def test_calls_that_are_refused_only_later_go_through_the_cache(
    folder: Path, tmp_path: Path, expected: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As some network file systems do: open takes O_DIRECT, reads and writes do not."""
    for name in ("pwrite", "preadv"):
        monkeypatch.setattr(os, name, refusing_direct_files(getattr(os, name)))
    assert not FolderSource(folder).reads_directly()
    assert not run(folder, tmp_path / "out").direct_writes
    assert read_tree(tmp_path / "out") == expected


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="os.posix_fadvise is missing: not on macOS")
def test_what_is_written_through_the_cache_goes_to_the_disk_on_the_way(
    folder: Path, tmp_path: Path, expected: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, no_o_direct: None
) -> None:
    """Each byte is handed over once it is written; nothing beyond the end of the file is."""
    handed: dict[str, int] = {}  # bytes from the start, by file

    def posix_fadvise(fd: int, offset: int, length: int, advice: int) -> None:
        name = os.readlink(f"/proc/self/fd/{fd}")
        if name.endswith(".partial"):
            assert advice == os.POSIX_FADV_DONTNEED
            assert offset <= handed.get(name, 0) < offset + length <= os.fstat(fd).st_size
            handed[name] = offset + length

    monkeypatch.setattr(direct, "WRITE_BEHIND_BYTES", 4096)
    monkeypatch.setattr(os, "posix_fadvise", posix_fadvise)
    run(folder, tmp_path / "out")
    data = {name: len(raw) for name, raw in expected.items() if name.endswith(".bin")}
    assert {name.removesuffix(".partial"): end for name, end in handed.items()} == {
        str(tmp_path / "out" / name): nbytes for name, nbytes in data.items()
    }
    assert read_tree(tmp_path / "out") == expected


# ---- one file


@pytest.mark.parametrize("direct_files", [True, False])
@pytest.mark.parametrize(("offset", "nbytes"), [(0, 1), (7, 5000), (4096, 4096), (4095, 2), (0, 10_000), (9_990, 100)])
def test_any_range_is_read_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, offset: int, nbytes: int, direct_files: bool
) -> None:
    content = np.random.default_rng(0).bytes(10_000)
    (tmp_path / "file").write_bytes(content)
    if not direct_files:
        monkeypatch.delattr(os, "O_DIRECT", raising=False)
    with closing(RangeFile(tmp_path / "file")) as file:
        buffer = bytearray(nbytes)
        expected = content[offset : offset + nbytes]
        assert file.read_into(offset, memoryview(buffer)) == len(expected)
        assert buffer[: len(expected)] == expected
        assert file.read_into(10_000, memoryview(buffer)) == 0


@pytest.mark.parametrize("direct_files", [True, False])
@pytest.mark.parametrize("phase", [0, 8, 4088])
@pytest.mark.parametrize(("page", "nbytes"), [(0, 4096), (0, 9_000), (1, 8_192), (1, 12_000), (2, 5), (2, 20_000)])
def test_whole_pages_are_read_in_place_and_the_rest_beside_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, page: int, nbytes: int, phase: int, direct_files: bool
) -> None:
    content = np.random.default_rng(0).bytes(21_000)
    (tmp_path / "file").write_bytes(content)
    if not direct_files:
        monkeypatch.delattr(os, "O_DIRECT", raising=False)
    memory = aligned_buffer(8 * ALIGNMENT)
    memory[:] = b"-" * len(memory)
    with closing(RangeFile(tmp_path / "file")) as file:
        offset = page * ALIGNMENT + phase
        expected = content[offset : offset + nbytes]
        assert file.read_into(offset, memory[phase : phase + nbytes]) == len(expected)
    assert bytes(memory[phase : phase + len(expected)]) == expected
    assert set(memory[:phase]) | set(memory[phase + nbytes :]) == set(b"-")


def test_a_write_that_failed_is_told_and_what_should_follow_it_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    done: list[str] = []
    monkeypatch.setattr(os, "pwrite", full)
    with SequentialFile(tmp_path / "file") as file:
        file.write(memoryview(b"a" * ALIGNMENT))
        file.mark(lambda: done.append("first"))
        for _ in range(2):
            with pytest.raises(OSError, match="No space"):
                file.write(memoryview(b"a" * 2 * BUFFER_BYTES))
        with pytest.raises(OSError, match="No space"):
            file.sync()
    assert done == []


def test_a_mark_is_called_in_its_order_once_all_before_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "file"
    done: list[str] = []
    with SequentialFile(path) as file:
        for number in range(1, 5):
            file.write(memoryview(b"a" * (BUFFER_BYTES // 2 + ALIGNMENT)))

            def written(end: int = number * (BUFFER_BYTES // 2 + ALIGNMENT)) -> None:
                assert path.stat().st_size >= end
                done.append(f"{end}")

            file.mark(written)
        assert len(done) < 4
        file.sync()
    assert done == [str(number * (BUFFER_BYTES // 2 + ALIGNMENT)) for number in range(1, 5)]


@pytest.mark.parametrize("sizes", [[ALIGNMENT], [100, 3996], [BUFFER_BYTES + 5, ALIGNMENT - 5], [3 * BUFFER_BYTES]])
def test_pieces_of_any_size_are_written_one_after_another(tmp_path: Path, sizes: list[int]) -> None:
    content = np.random.default_rng(0).bytes(sum(sizes))
    with SequentialFile(tmp_path / "file") as file:
        start = 0
        for nbytes in sizes:
            file.write(memoryview(content)[start : start + nbytes])
            start += nbytes
        file.sync()
        assert file.digest.hexdigest() == blake3(content).hexdigest()
    assert (tmp_path / "file").read_bytes() == content


def test_a_file_that_is_cut_goes_on_there(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"a" * 3 * ALIGNMENT + b"b")
    with SequentialFile(tmp_path / "file") as file:
        assert bytes(file.read(2 * ALIGNMENT, 2 * ALIGNMENT)) == b"a" * ALIGNMENT + b"b"
        assert len(file.read(4 * ALIGNMENT, ALIGNMENT)) == 0
        file.cut(ALIGNMENT, blake3(b"a" * ALIGNMENT))
        file.write(memoryview(b"c" * ALIGNMENT))
        file.sync()
        assert file.digest.hexdigest() == blake3(b"a" * ALIGNMENT + b"c" * ALIGNMENT).hexdigest()
    assert (tmp_path / "file").read_bytes() == b"a" * ALIGNMENT + b"c" * ALIGNMENT
