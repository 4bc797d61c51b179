"""A checkpoint in a folder: safetensors shards, read by position, never mapped."""

import os
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

from formats.container import CONVERTING_FILE
from formats.dtypes import AnyArray
from formats.errors import FormatError, StorageError, UnsupportedError
from formats.fields import shown
from formats.index import INDEX_FILE
from formats.tensorfile import TensorEntry, read_header
from repack.direct import RangeFile
from repack.sources.base import Range, Shard, SourceTensor
from repack.sources.shards import SAFETENSORS_INDEX, SHARDS, collect_tensors, is_shard_name, read_weight_map

MAX_SMALL_FILE_BYTES = 1 << 28


class Stamp(NamedTuple):
    """What tells a file from a changed or replaced one without reading it."""

    nbytes: int
    mtime_ns: int
    inode: int

    @classmethod
    def of(cls, status: os.stat_result) -> "Stamp":
        return cls(status.st_size, status.st_mtime_ns, status.st_ino)


class FolderReader:
    """Reads shards of a folder, one open at a time; each is checked when it is opened and when it is left."""

    def __init__(self, folder: Path, stamps: Mapping[str, Stamp]) -> None:
        self._folder = folder
        self._stamps = stamps
        self._file: str | None = None
        self._shard: RangeFile | None = None

    def expect(
        self,
        units: Sequence[Sequence[Range]],
        spool: Path | None = None,
        waiting: Callable[[], None] | None = None,
    ) -> bool:
        """Files are read when they are asked for."""
        return False

    def finished(self, units: int) -> None:
        """Nothing is kept."""

    def read_into(self, file: str, offset: int, buffer: memoryview) -> None:
        if file != self._file:
            self._leave(check=True)
            self._enter(file)
        assert self._shard is not None
        done = 0
        while done < len(buffer):
            try:
                count = self._shard.read_into(offset + done, buffer[done:])
            except OSError as error:
                raise StorageError(f"{self._folder / file}: cannot be read: {error.strerror}") from None
            if count == 0:
                raise StorageError(f"{self._folder / file}: ends at byte {offset + done}: the file was cut")
            done += count

    def view(self, file: str, offset: int, nbytes: int) -> AnyArray | None:
        """Nothing is in memory before it is read."""
        return None

    def release(self) -> None:
        """Nothing was viewed."""

    @property
    def direct(self) -> bool:
        """Whether the file that is open is read past the page cache."""
        return self._shard is not None and self._shard.direct

    def __enter__(self) -> "FolderReader":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._leave(check=kind is None)

    def _enter(self, file: str) -> None:
        try:
            self._shard = RangeFile(self._folder / file)
        except OSError as error:
            raise StorageError(f"{self._folder / file}: cannot be read: {error.strerror}") from None
        self._file = file
        self._check()

    def _leave(self, check: bool) -> None:
        if self._shard is None:
            return
        try:
            if check:
                self._check()
        finally:
            self._shard.close()
            self._file = self._shard = None

    def _check(self) -> None:
        assert self._file is not None
        assert self._shard is not None
        check_stamp(self._folder / self._file, os.fstat(self._shard.fd), self._stamps[self._file])


class FolderSource:
    """A folder as a source (see repack.sources.base.Source). Opening reads and checks every header.

    Raises FormatError, UnsupportedError or StorageError, naming the file.
    """

    notes: Sequence[str] = ()

    def __init__(
        self,
        folder: Path,
        *,
        repository: str | None = None,
        revision: str | None = None,
        sha256: Mapping[str, str] | None = None,
    ) -> None:
        self.folder = folder
        self.repository = repository
        self.revision = revision
        self._stamps: dict[str, Stamp] = {}
        weight_map = self._weight_map()
        names = sorted(set(weight_map.values())) if weight_map is not None else self._unlisted()
        self._tensors = collect_tensors(((name, self._header(name)) for name in names), weight_map, folder)
        self._shards = tuple(
            Shard(name, stamp.nbytes, f"mtime {stamp.mtime_ns}" if revision is None else revision, stated)
            for name, stamp in self._stamps.items()
            for stated in [(sha256 or {}).get(name)]
        )

    @property
    def shards(self) -> Sequence[Shard]:
        return self._shards

    @property
    def tensors(self) -> Mapping[str, SourceTensor]:
        return self._tensors

    def reads_directly(self) -> bool:
        """Whether weights are read past the page cache, tried with a byte of the first shard. Raises StorageError."""
        with self.reader() as reader:
            reader.read_into(self.shards[0].name, 0, memoryview(bytearray(1)))
            return reader.direct

    def small_file(self, name: str) -> bytes | None:
        return read_small_file(self.folder / name)

    def reader(self) -> FolderReader:
        return FolderReader(self.folder, self._stamps)

    def check(self) -> None:
        for name, stamp in self._stamps.items():
            try:
                status = os.stat(self.folder / name)
            except OSError as error:
                raise StorageError(f"{self.folder / name}: cannot be read: {error.strerror}") from None
            check_stamp(self.folder / name, status, stamp)

    def _weight_map(self) -> dict[str, str] | None:
        """Shard by tensor as the checkpoint's index says, None without an index."""
        raw = self.small_file(SAFETENSORS_INDEX)
        if raw is None:
            return None
        return read_weight_map(raw, f"{self.folder / SAFETENSORS_INDEX}", lambda name: (self.folder / name).is_file())

    def _unlisted(self) -> Iterator[str]:
        """Shards of a folder without an index, by name."""
        names = sorted(path.name for path in self.folder.glob(SHARDS))
        for name in names:
            if not is_shard_name(name):
                raise FormatError(f"{self.folder}: holds {shown(name)}, expected a name that can be printed")
        if names:
            return iter(names)
        if (self.folder / INDEX_FILE).is_file() or (self.folder / CONVERTING_FILE).is_file():
            raise UnsupportedError(f"{self.folder}: is a container already, or one being made; expected a checkpoint")
        if gguf := min(self.folder.glob("*.gguf"), default=None):
            raise UnsupportedError(f"{self.folder}: holds no model*.safetensors; a GGUF file is given itself: {gguf}")
        for pattern, kind in (("*.bin", "PyTorch .bin"), ("*.pt*", "PyTorch")):
            if any(self.folder.glob(pattern)):
                raise UnsupportedError(
                    f"{self.folder}: holds {kind} files only, expected model*.safetensors; "
                    "convert them to safetensors first"
                )
        raise FormatError(f"{self.folder}: holds no model*.safetensors, so it is no checkpoint")

    def _header(self, name: str) -> dict[str, TensorEntry]:
        path = self.folder / name
        fd = open_file(path)
        try:
            self._stamps[name] = Stamp.of(os.fstat(fd))
            return read_header(fd, str(path))
        finally:
            os.close(fd)


def check_stamp(path: Path, status: os.stat_result, expected: Stamp) -> None:
    """Raises StorageError unless the file is still the one that the stamp was taken of."""
    found = Stamp.of(status)
    if found.nbytes != expected.nbytes:
        raise StorageError(
            f"{path}: is {found.nbytes} bytes long, it was {expected.nbytes}: changed during the conversion"
        )
    if found != expected:
        raise StorageError(f"{path}: was changed or replaced during the conversion")


def read_small_file(path: Path) -> bytes | None:
    """The content of a file that must fit into memory, None without one. Raises StorageError or FormatError."""
    if not path.exists():
        return None
    with open(open_file(path), "rb") as file:
        raw = file.read(MAX_SMALL_FILE_BYTES + 1)
    if len(raw) > MAX_SMALL_FILE_BYTES:
        raise FormatError(f"{path}: is longer than {MAX_SMALL_FILE_BYTES} bytes")
    return raw


def open_file(path: Path) -> int:
    """A file descriptor to read from. Raises StorageError, FormatError for a folder, a pipe or a device."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a pipe would wait for its writer for ever
    except OSError as error:
        raise StorageError(f"{path}: cannot be read: {error.strerror}") from None
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise FormatError(f"{path}: is no regular file")
    return fd
