"""A container's folder, opened safely: index, small files with SHA-256, data files of the right length."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from formats.checksum import sha256
from formats.errors import ChecksumError, FormatError
from formats.index import INDEX_FILE, Index
from formats.index_reader import MAX_INDEX_BYTES, index_from_bytes
from formats.layout import RESIDENT_FILE

CONVERTING_FILE = "converting.json"  # lies in a folder while a conversion is unfinished


@dataclass(frozen=True)
class Container:
    """An opened container; no file stays open."""

    folder: Path
    index: Index

    def path(self, name: str) -> Path:
        """The path of a file that the index names. Raises FormatError when it is missing or leads out."""
        return _inside(self.folder, name)

    def data_path(self, name: str) -> Path:
        """The path of a data file, its length checked. Raises FormatError."""
        path, expected = self.path(name), self.data_bytes[name]
        if path.stat().st_size != expected:
            raise FormatError(f"{path}: is {path.stat().st_size} bytes long, expected {expected}")
        return path

    @property
    def data_bytes(self) -> Mapping[str, int]:
        """Length of every data file by name."""
        layout = self.index.layout
        return {
            **{table.file: table.nbytes for table in layout.embeddings},
            RESIDENT_FILE: layout.resident_bytes,
            **{layer.file: layer.nbytes for _, layer in layout.moe_layers()},
        }

    def small_file(self, name: str) -> bytes:
        """The content of a small file. Raises FormatError or ChecksumError naming it."""
        path, expected = self.path(name), self.index.files[name]
        raw = _read(path, expected.nbytes + 1)
        if len(raw) != expected.nbytes:
            raise FormatError(f"{path}: is {path.stat().st_size} bytes long, expected {expected.nbytes}")
        if sha256(raw) != expected.sha256:
            raise ChecksumError(f"{path}: has SHA-256 {sha256(raw)}, expected {expected.sha256}")
        return raw

    def small_files(self) -> dict[str, bytes]:
        """All small files by name, checked."""
        return {name: self.small_file(name) for name in self.index.files}


def open_container(folder: Path) -> Container:
    """Open a container: index, lengths of all data files, presence of all small files.

    Raises FormatError (not a container, unfinished, damaged) or UnsupportedError, naming file and field.
    """
    container = read_container_index(folder)
    for name in container.data_bytes:
        container.data_path(name)
    for name in container.index.files:
        container.path(name)
    return container


def read_container_index(folder: Path) -> Container:
    """Open a container whose other files may be damaged: only the index is read. Raises as open_container."""
    if not folder.exists():
        raise FormatError(f"{folder}: no such folder")
    if not folder.is_dir():
        raise FormatError(f"{folder}: is not a folder")
    path = folder / INDEX_FILE
    if not path.is_file():
        if (folder / CONVERTING_FILE).is_file():
            raise FormatError(f"{folder}: its conversion is not finished; run the same `repack convert` again")
        hint = "; convert it first: `repack convert`" if (folder / "config.json").is_file() else ""
        raise FormatError(f"{folder}: holds no {INDEX_FILE}, so it is no container{hint}")
    _inside(folder, INDEX_FILE)
    return Container(folder, index_from_bytes(_read(path, MAX_INDEX_BYTES + 1), str(path)))


def _inside(folder: Path, name: str) -> Path:
    path = folder / name
    if not path.is_file():
        raise FormatError(f"{path}: is missing or no file, but {INDEX_FILE} names it")
    if folder.resolve() not in path.resolve().parents:
        raise FormatError(f"{path}: leads out of the folder, to {path.resolve()}")
    return path


def _read(path: Path, at_most: int) -> bytes:
    with open(os.open(path, os.O_RDONLY | os.O_CLOEXEC), "rb") as file:
        return file.read(at_most)
