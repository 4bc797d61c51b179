"""Reads a container back: every checksum, every byte of structure, all padding; then, if asked, its source."""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import xxhash

from formats.checksum import Digest, blocks, file_digest
from formats.config import read_config
from formats.container import Container, read_container_index
from formats.dtypes import AnyArray
from formats.errors import ChecksumError, FormatError, StreamingExpertsError
from formats.index import INDEX_FILE
from formats.layout import BLOCK_BYTES, RESIDENT_FILE, EmbeddingLayout
from formats.record import PlacedArray, is_zero, padding_ranges
from repack.carriers import with_facts_of_tensors
from repack.compare import Sample, compare_with_source, source_bytes
from repack.findings import Damage, Findings, Verification
from repack.sources.base import Source
from repack.writer import Progress

READ_BYTES = 4 << 20
MAX_NOTES = 20


class _Padding(NamedTuple):
    """Bytes of a unit that must be zero, and the array that they follow."""

    start: int
    stop: int
    part: str | None
    array: str


class _Unit(NamedTuple):
    """A record or a resident tensor: bytes with a checksum for each block."""

    place: Damage  # with what is known before anything is read
    nbytes: int
    block_bytes: int
    checksums: Sequence[str]
    paddings: Sequence[_Padding]


class _CutError(Exception):
    """The file ends before what the index says; the place is reported already."""


def verify_bytes(folder: Path, source: Source | None = None, sample: Sample | None = None) -> int:
    """Bytes that verify_container will report to its callback. Raises as it does for a bad index."""
    layout = read_container_index(folder).index.layout
    return layout.total_bytes + (source_bytes(source, layout, sample) if source is not None else 0)


def verify_container(
    folder: Path, source: Source | None = None, progress: Progress | None = None, sample: Sample | None = None
) -> Verification:
    """Check every byte of a container, and with a source the values of every tensor, or those of a sample of experts.

    Damage is collected, not raised. Raises FormatError or UnsupportedError when the index itself is not sound, as
    then nothing else can be judged, and what the source raises.
    """
    container = read_container_index(folder)
    index, found, report = container.index, Findings(folder), progress or _no_progress
    for name in index.files:
        _check_small_file(container, name, found)
    for table in index.layout.embeddings:
        _check_data_file(container, table.file, partial(_check_rows, table, found, report), found)
    checks: list[tuple[str, Iterable[_Unit]]] = [(RESIDENT_FILE, _resident_units(container))]
    checks += [(layer.file, _records(container, i)) for i, layer in index.layout.moe_layers()]
    for name, units in checks:
        _check_data_file(container, name, partial(_check_units, units, found, report), found)
    return found.result(
        files=1 + len(index.files) + len(index.data_files),
        total_bytes=index.layout.total_bytes,
        notes=list(_notes(container)),
        comparisons=compare_with_source(container, source, found, report, sample) if source is not None else (),
    )


def _no_progress(nbytes: int, what: str) -> None:
    pass


def _check_small_file(container: Container, name: str, found: Findings) -> None:
    try:
        raw = container.small_file(name)
        model = container.index.layout.model
        if name == "config.json" and with_facts_of_tensors(read_config(raw), model) != model:
            found.add(Damage(name, f"describes another model than {INDEX_FILE}"))
    except (StreamingExpertsError, OSError) as error:
        found.add_error(name, error)


# ---- one data file


class _DataFile:
    """A data file, read once from its first byte to its last; every byte goes through its digest."""

    def __init__(self, path: Path, digest: Digest) -> None:
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._buffer = np.empty(READ_BYTES, np.uint8)
        self._digest = digest

    def __enter__(self) -> "_DataFile":
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)

    def read(self, nbytes: int) -> AnyArray:
        """The next bytes, uint8 [nbytes], up to READ_BYTES; the next read overwrites them."""
        piece = self._buffer[:nbytes]
        done = 0
        while done < nbytes:
            count = os.readv(self._fd, [piece[done:].data])
            if not count:
                raise _CutError
            done += count
        self._digest.update(piece.data)
        return piece

    def hexdigest(self) -> str:
        return self._digest.hexdigest()


def _check_data_file(container: Container, name: str, check: Callable[[_DataFile], None], found: Findings) -> None:
    """Run `check` over a file, whatever its length; then its digest, if nothing else has shown the damage."""
    index = container.index
    before, expected = found.count, container.data_bytes[name]
    try:
        path = container.path(name)
        if path.stat().st_size != expected:
            found.add(Damage(name, f"is {path.stat().st_size} bytes long, expected {expected}"))
        with _DataFile(path, file_digest(index.data_hash)) as file:
            check(file)
            if found.count == before and file.hexdigest() != index.data_files[name]:
                stated = index.data_files[name]
                found.add(Damage(name, f"has {index.data_hash} {file.hexdigest()}, expected {stated}"))
    except _CutError:
        assert found.count > before
    except (FormatError, OSError) as error:
        found.add_error(name, error)


# ---- records and resident tensors


def _records(container: Container, i: int) -> Iterator[_Unit]:
    layer = container.index.layout.layers[i]
    assert layer is not None
    nbytes, arrays = layer.record.record_bytes, [(p.name, a) for p in layer.record.parts for a in p.arrays]
    paddings = _paddings(arrays, nbytes)
    for expert, checksum in enumerate(container.index.record_checksums[i]):
        yield _Unit(Damage(layer.file, "", i, expert), nbytes, nbytes, (checksum,), paddings)


def _resident_units(container: Container) -> Iterator[_Unit]:
    for tensor in container.index.layout.resident:
        paddings = _paddings([(None, array) for array in tensor.arrays], tensor.nbytes)
        checksums = container.index.block_checksums[tensor.name]
        place = Damage(RESIDENT_FILE, "", tensor=tensor.name)
        yield _Unit(place, tensor.nbytes, BLOCK_BYTES, checksums, paddings)


def _paddings(arrays: Sequence[tuple[str | None, PlacedArray]], nbytes: int) -> list[_Padding]:
    paddings = []
    for start, stop in padding_ranges([array for _, array in arrays], nbytes):
        part, array = max((entry for entry in arrays if entry[1].offset < start), key=lambda e: e[1].offset)
        paddings.append(_Padding(start, stop, part, array.name))
    return paddings


def _check_units(units: Iterable[_Unit], found: Findings, report: Progress, file: _DataFile) -> None:
    unit = None
    try:
        for unit in units:
            _check_unit(unit, found, report, file)
    except _CutError:
        assert unit is not None
        found.add(replace(unit.place, message="is cut off, with all that follows"))
        raise


def _check_unit(unit: _Unit, found: Findings, report: Progress, file: _DataFile) -> None:
    for (first, length), expected in zip(blocks(unit.nbytes, unit.block_bytes), unit.checksums, strict=True):
        hasher = xxhash.xxh3_64()
        for start, nbytes in blocks(length, READ_BYTES):
            piece = file.read(nbytes)
            hasher.update(piece.data)
            _check_paddings(unit, first + start, piece, found)
            report(nbytes, unit.place.file)
        if hasher.hexdigest() != expected:
            where = "" if length == unit.nbytes else f"bytes {first} to {first + length} of it: "
            message = f"{where}checksum is {hasher.hexdigest()}, expected {expected}"
            found.add(replace(unit.place, message=message))


def _check_paddings(unit: _Unit, first: int, piece: AnyArray, found: Findings) -> None:
    """Padding inside a piece that begins at byte `first` of the unit."""
    for padding in unit.paddings:
        start, stop = max(padding.start, first), min(padding.stop, first + len(piece))
        if start < stop and not is_zero(piece[start - first : stop - first]):
            message = f"padding between bytes {padding.start} and {padding.stop} is not zero"
            found.add(replace(unit.place, message=message, part=padding.part, array=padding.array))


# ---- embedding


def _check_rows(embedding: EmbeddingLayout, found: Findings, report: Progress, file: _DataFile) -> None:
    checksum = PlacedArray("checksum", "u32", (2,), embedding.checksum_offset)
    paddings = padding_ranges((*embedding.arrays, checksum), embedding.row_bytes)
    row = 0
    try:
        for _, nbytes in blocks(embedding.rows * embedding.row_bytes, _whole(embedding.row_bytes)):
            rows = file.read(nbytes).reshape(-1, embedding.row_bytes)
            for start, stop in paddings:
                for bad in np.flatnonzero(rows[:, start:stop].any(axis=1)):
                    message = f"padding between bytes {start} and {stop} of the row is not zero"
                    found.add(Damage(embedding.file, message, row=row + int(bad)))
            for raw in rows:
                _check_row(embedding, row, raw, found)
                row += 1
            report(nbytes, embedding.file)
        tail = file.read(embedding.nbytes - embedding.rows * embedding.row_bytes)
        if not is_zero(tail):
            found.add(Damage(embedding.file, "padding after the last row is not zero"))
        report(len(tail), embedding.file)
    except _CutError:
        found.add(Damage(embedding.file, "is cut off, with all that follows", row=row))
        raise


def _check_row(embedding: EmbeddingLayout, row: int, raw: AnyArray, found: Findings) -> None:
    try:
        embedding.check(row, raw)
    except ChecksumError as error:
        message = str(error).removeprefix(f"{embedding.file}: row {row} has ")
        found.add(Damage(embedding.file, message, row=row))


def _whole(row_bytes: int) -> int:
    """As many bytes of whole rows as one read takes."""
    return max(1, READ_BYTES // row_bytes) * row_bytes


# ---- the folder


def _notes(container: Container) -> Iterator[str]:
    """Files that the index does not name: harmless, but perhaps not meant to be there."""
    named = {INDEX_FILE, *container.index.files, *container.index.data_files}
    others = []
    for folder, subfolders, files in os.walk(container.folder):
        subfolders.sort()
        paths = (Path(folder, name).relative_to(container.folder).as_posix() for name in files)
        others += sorted(path for path in paths if path not in named)
    yield from (f"{name}: is not named by {INDEX_FILE}, and no part of the container" for name in others[:MAX_NOTES])
    if len(others) > MAX_NOTES:
        yield f"{len(others) - MAX_NOTES} more files are not named by {INDEX_FILE}"
