"""What a conversion needs of a source, wherever it lies: tensors by name, and bytes of its files by range.

A `Source` is looked at once, when the plan is made. A `Reader` travels with each task, perhaps to another
process, so it is picklable and opens files when it is first asked.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Protocol

from formats.dtypes import AnyArray

SPOOL_BYTES = 1536 << 20  # what readers of all tasks may keep beside the output at most


@dataclass(frozen=True)
class Shard:
    """A file of weights; `identity` changes when the content may have, sha256 is what the hub states."""

    name: str
    nbytes: int
    identity: str
    sha256: str | None = None
    whole: bool = True  # on this machine, so that its SHA-256 can be taken; of others only ranges are read


class SourceTensor(NamedTuple):
    """A tensor of a source: dtype as the file names it, shape, and its absolute byte range in a shard."""

    name: str
    file: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    adjustment: str = ""  # of the values of plain floats: formats/encodings/sources/plain.py


class Range(NamedTuple):
    """Bytes of a shard."""

    file: str
    offset: int
    nbytes: int


class Reader(Protocol):
    """Positioned reads from the files of a source. Picklable; one thread at a time."""

    def expect(
        self,
        units: Sequence[Sequence[Range]],
        spool: Path | None = None,
        waiting: Callable[[], None] | None = None,
    ) -> bool:
        """What will be read, unit by unit, so that it can be fetched ahead; whether it will be.

        `spool` is a file that may hold what was fetched until `finished` says that it is in the output. `waiting` is
        called now and then while nothing comes, and may raise to stop the work.
        """

    def finished(self, units: int) -> None:
        """The first `units` units of `expect` are in the output."""

    def read_into(self, file: str, offset: int, buffer: memoryview) -> None:
        """Fill the buffer from byte `offset` on. Raises StorageError when the file was cut or changed."""

    def view(self, file: str, offset: int, nbytes: int) -> AnyArray | None:
        """The bytes where they lie in memory already, uint8, until `release`; None: they must be read into a buffer.

        Raises as read_into.
        """

    def release(self) -> None:
        """What was viewed is not needed any more."""

    def __enter__(self) -> "Reader": ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close what is open; after success, raise StorageError for a file that changed while it was read."""


class Source(Protocol):
    """A checkpoint: headers are read and checked, weights are not read yet."""

    @property
    def repository(self) -> str | None:
        """`org/name` on the hub, or None."""

    @property
    def revision(self) -> str | None:
        """The commit hash on the hub, or None."""

    @property
    def shards(self) -> Sequence[Shard]:
        """The files of weights, sorted by name."""

    @property
    def tensors(self) -> Mapping[str, SourceTensor]:
        """Every tensor of every shard by name."""

    @property
    def notes(self) -> Sequence[str]:
        """What had to be assumed of the checkpoint, a line each."""

    def small_file(self, name: str) -> bytes | None:
        """The content of config.json or the like, None without. Raises StorageError or FormatError."""

    def reader(self) -> Reader:
        """A reader of its own for one task."""

    def check(self) -> None:
        """Raise StorageError naming a shard that is no longer the one that was opened."""
