"""The plan of a conversion as data: the place and the origin of every byte (repack/planner.py makes it)."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from formats.dtypes import storage_dtype
from formats.encodings import Encoding
from formats.layout import (
    BLOCK_BYTES,
    EMBEDDING_FILE,
    RESIDENT_FILE,
    EmbeddingLayout,
    LayerLayout,
    Layout,
)
from formats.record import PlacedArray

EMBEDDING_UNIT_BYTES = 8 << 20  # of source, per journal entry


@dataclass(frozen=True)
class Options:
    """What the user chooses; 16 bits means as they arrive, and then the group size means nothing."""

    bits: int = 4
    group_size: int = 64
    resident_bits: int = 8

    def facts(self) -> dict[str, Any]:
        """The index's form."""
        group_size = self.group_size if self.bits < 16 else None
        return {"bits": self.bits, "group_size": group_size, "resident_bits": self.resident_bits}


class SourceMatrix(NamedTuple):
    """A matrix [rows, columns] of a source: whole rows of a tensor, from byte `offset` of a shard."""

    tensor: str
    file: str
    dtype: str  # a name of formats.dtypes
    offset: int
    rows: int
    columns: int

    @property
    def row_bytes(self) -> int:
        return self.columns * storage_dtype(self.dtype).itemsize

    @property
    def nbytes(self) -> int:
        return self.rows * self.row_bytes

    def slice(self, first: int, rows: int) -> "SourceMatrix":
        """Some of its rows."""
        return self._replace(offset=self.offset + first * self.row_bytes, rows=rows)


class PlacedMatrix(NamedTuple):
    """A matrix, how to encode it, and where its arrays go in a record or resident tensor."""

    source: SourceMatrix
    encoding: Encoding
    arrays: tuple[PlacedArray, ...]


@dataclass(frozen=True)
class RecordUnit:
    """An expert's record or a resident tensor. A unit is what a resumed conversion keeps or repeats."""

    name: str
    nbytes: int
    block_bytes: int  # of output, per checksum
    matrices: tuple[PlacedMatrix, ...]

    @property
    def source_bytes(self) -> int:
        return sum(matrix.source.nbytes for matrix in self.matrices)


@dataclass(frozen=True)
class EmbeddingUnit:
    """Some rows of the embedding, each with its checksum; the last unit ends with the file's padding."""

    name: str
    nbytes: int
    block_bytes: int
    first_row: int
    source: SourceMatrix
    layout: EmbeddingLayout

    @property
    def source_bytes(self) -> int:
        return self.source.nbytes


Unit = RecordUnit | EmbeddingUnit


@dataclass(frozen=True)
class FilePlan:
    """One output file, written from its first unit to its last."""

    name: str
    nbytes: int
    units: tuple[Unit, ...]

    @property
    def source_bytes(self) -> int:
        return sum(unit.source_bytes for unit in self.units)


@dataclass(frozen=True)
class Skipped:
    """Tensors that a text model does not need."""

    what: str
    tensors: int
    nbytes: int


@dataclass(frozen=True)
class Plan:
    """A container's layout, and the source of every matrix in it."""

    layout: Layout
    options: Options
    experts: Mapping[int, tuple[tuple[SourceMatrix, ...], ...]]  # by layer: [num_experts][part]
    resident: tuple[SourceMatrix, ...]  # of layout.resident
    embedding: SourceMatrix
    skipped: tuple[Skipped, ...]

    def files(self) -> Iterator[FilePlan]:
        """The files to write, each independent of the others; the long single ones first."""
        yield FilePlan(EMBEDDING_FILE, self.layout.embedding.nbytes, tuple(self._embedding_units()))
        yield FilePlan(RESIDENT_FILE, self.layout.resident_bytes, tuple(self._resident_units()))
        for i, layer in self.layout.moe_layers():
            yield FilePlan(layer.file, layer.nbytes, tuple(self._records(i, layer)))

    @property
    def source_bytes(self) -> int:
        """Bytes of the source that the plan reads."""
        experts = (matrix for layer in self.experts.values() for expert in layer for matrix in expert)
        return sum(matrix.nbytes for matrix in (*experts, *self.resident, self.embedding))

    def source_files(self) -> list[str]:
        """The shards that the plan reads, sorted."""
        return sorted(
            {matrix.file for layer in self.experts.values() for expert in layer for matrix in expert}
            | {matrix.file for matrix in self.resident}
            | {self.embedding.file}
        )

    def _records(self, i: int, layer: LayerLayout) -> Iterator[RecordUnit]:
        nbytes = layer.record.record_bytes
        for expert, matrices in enumerate(self.experts[i]):
            placed = tuple(
                PlacedMatrix(matrix, part.encoding, part.arrays)
                for part, matrix in zip(layer.record.parts, matrices, strict=True)
            )
            yield RecordUnit(f"layer {i} expert {expert}", nbytes, nbytes, placed)

    def _resident_units(self) -> Iterator[RecordUnit]:
        for tensor, matrix in zip(self.layout.resident, self.resident, strict=True):
            placed = PlacedMatrix(matrix, tensor.encoding, tensor.arrays)
            yield RecordUnit(tensor.name, tensor.nbytes, BLOCK_BYTES, (placed,))

    def _embedding_units(self) -> Iterator[EmbeddingUnit]:
        layout = self.layout.embedding
        step = max(1, EMBEDDING_UNIT_BYTES // self.embedding.row_bytes)
        for first in range(0, layout.rows, step):
            rows = min(step, layout.rows - first)
            last = first + rows == layout.rows
            nbytes = (layout.nbytes if last else (first + rows) * layout.row_bytes) - first * layout.row_bytes
            yield EmbeddingUnit("embedding", nbytes, nbytes, first, self.embedding.slice(first, rows), layout)
