"""Containers to be damaged, and ways to do it."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from repack.convert import convert, prepare
from repack.plan import Options
from repack.sources.base import Source


def convert_mixed(source: Source, folder: Path) -> Path:
    """A container whose experts and resident tensors have different encodings."""
    convert(prepare(source, Options(bits=4, group_size=32, resident_bits=8)), folder)
    return folder


@contextmanager
def flipped(path: Path, offset: int, mask: int = 0xFF) -> Iterator[None]:
    """A file with some bits of one byte flipped."""
    byte = path.read_bytes()[offset]
    write_at(path, offset, bytes([byte ^ mask]))
    try:
        yield
    finally:
        write_at(path, offset, bytes([byte]))


def write_at(path: Path, offset: int, raw: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(raw)
