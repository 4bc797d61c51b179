"""The plan of a conversion as data: the place and the origin of every byte (repack/planner.py makes it)."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple

from formats.encodings import Encoding, Plain
from formats.encodings.sources import GGMLSource, Plane, SourceEncoding, stored
from formats.encodings.sources.base import EACH_ROW, PACKED_ROWS
from formats.layout import (
    BLOCK_BYTES,
    RESIDENT_FILE,
    EmbeddingLayout,
    LayerLayout,
    Layout,
)
from formats.origins import Origin, Origins
from formats.record import PlacedArray
from repack.sources.base import Range

EMBEDDING_UNIT_BYTES = 8 << 20  # of source, per journal entry
UNIT_ALIGNMENT = 4096  # of the bytes of units but the last, as files past the page cache are written


@dataclass(frozen=True)
class Options:
    """What the user chooses; 16 bits means as they arrive, and then the group size means nothing."""

    bits: int = 4
    group_size: int = 64
    resident_bits: int = 8
    requantize: bool = False  # whether weights that arrive quantized are rounded once more

    def facts(self) -> dict[str, Any]:
        """The index's form."""
        group_size = self.group_size if self.bits < 16 else None
        return {
            "bits": self.bits,
            "group_size": group_size,
            "resident_bits": self.resident_bits,
            "requantize": self.requantize,
        }


class SourcePlane(NamedTuple):
    """A tensor of a matrix, or the slice of a stacked one that is this matrix's, from byte `offset` of a shard."""

    spec: Plane
    tensor: str
    file: str
    dtype: str  # as the file names it
    offset: int

    @property
    def nbytes(self) -> int:
        dtype, shape = stored(self.dtype, self.spec.shape)
        return math.prod(shape) * dtype.itemsize

    @property
    def is_streamed(self) -> bool:
        """Whether rows lie one after another in the file, so that some of them can be read alone."""
        return self.spec.axis == EACH_ROW and self.spec.each == 1 and not self.spec.words


class SourceMatrix(NamedTuple):
    """A matrix [rows, columns] of a source: rows `first`, `first + step`... of what its planes hold."""

    encoding: SourceEncoding
    planes: tuple[SourcePlane, ...]
    stored_rows: int  # of the planes
    rows: int
    columns: int
    first: int = 0
    step: int = 1  # 2 where the rows of gate and up take turns
    linear_bias: "SourceMatrix | None" = None  # of the projection: a matrix of one column, rows chosen alike

    @property
    def tensor(self) -> str:
        """The name of its main tensor, for messages."""
        return self.planes[0].tensor

    @property
    def file(self) -> str:
        return self.planes[0].file

    def files(self) -> set[str]:
        """The shards that hold it."""
        files = {plane.file for plane in self.planes}
        return files if self.linear_bias is None else files | self.linear_bias.files()

    @property
    def row_bytes(self) -> int:
        """Of the source, about."""
        return max(1, sum(plane.nbytes for plane in self.planes) // self.stored_rows)

    @property
    def whole_rows(self) -> int:
        """Rows of which a multiple can be taken alone: those that are packed together."""
        return PACKED_ROWS if any(plane.spec.words for plane in self.planes) else 1

    @property
    def nbytes(self) -> int:
        """Its share of the bytes of its planes."""
        return self.bytes_of(self.rows)

    def bytes_of(self, rows: int) -> int:
        """The share of the first `rows` rows: what a reader of them reports as progress."""
        return sum(plane.nbytes for plane in self.planes) * rows // self.stored_rows

    def origin(self, encoding: Encoding) -> Origin:
        """What the index says of it, stored in an encoding."""
        decoded = self.encoding.quantized and encoding == Plain("f32")
        return Origin(self.encoding.label, decoded or encoding == self.encoding.exact(self.columns))

    def slice(self, first: int, rows: int) -> "SourceMatrix":
        """Some of its rows, in order."""
        bias = self.linear_bias and self.linear_bias.slice(first, rows)
        return self._replace(first=self.first + first * self.step, rows=rows, linear_bias=bias)

    def every(self, step: int, nth: int) -> "SourceMatrix":
        """Every step-th row, from the nth on."""
        bias = self.linear_bias and self.linear_bias.every(step, nth)
        first = self.first + nth * self.step
        return self._replace(first=first, rows=self.rows // step, step=self.step * step, linear_bias=bias)

    def blocks(self, nbytes: int) -> Iterator[tuple[int, int]]:
        """(first row, rows) of row blocks of about so many bytes, which no packed word crosses."""
        step = max(1, nbytes // self.row_bytes // self.whole_rows) * self.whole_rows
        return ((first, min(step, self.rows - first)) for first in range(0, self.rows, step))

    def ranges(self) -> Iterator[Range]:
        """What is read for it; a plane that is not streamed is read whole."""
        for plane in self.planes:
            if plane.is_streamed and self.step == 1:
                row_bytes = plane.nbytes // self.stored_rows
                yield Range(plane.file, plane.offset + self.first * row_bytes, self.rows * row_bytes)
            else:
                yield Range(plane.file, plane.offset, plane.nbytes)
        if self.linear_bias is not None:
            yield from self.linear_bias.ranges()


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
        return sum(_with_bias(matrix.source) for matrix in self.matrices)

    def ranges(self) -> list[Range]:
        """What is read of the source, in the order of reading."""
        found = (part for matrix in self.matrices for part in matrix.source.ranges())
        return list(dict.fromkeys(found))  # gate and up may share a plane that is read whole


@dataclass(frozen=True)
class EmbeddingUnit:
    """Some rows of the embedding, each with its checksum; the last unit ends with the file's padding."""

    name: str
    nbytes: int
    block_bytes: int
    first_row: int
    sources: tuple[SourceMatrix, ...]  # one after another
    layout: EmbeddingLayout

    @property
    def source_bytes(self) -> int:
        return sum(source.nbytes for source in self.sources)

    def ranges(self) -> list[Range]:
        """What is read of the source, in the order of reading."""
        return [part for source in self.sources for part in source.ranges()]


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
    ngrams: tuple[SourceMatrix, ...] = ()  # of layout.ngrams, one after another

    def origins(self) -> Origins:
        """In which encoding each tensor arrives, and whether it is kept to the bit."""
        layout = self.layout
        return Origins(
            self.embedding.origin(layout.embedding.encoding),
            {t.name: m.origin(t.encoding) for t, m in zip(layout.resident, self.resident, strict=True)},
            {
                i: tuple(m.origin(p.encoding) for p, m in zip(layer.record.parts, self.experts[i][0], strict=True))
                for i, layer in layout.moe_layers()
            },
            self.ngrams[0].origin(layout.ngrams.encoding) if layout.ngrams is not None else None,
        )

    def grown(self) -> list[GGMLSource]:
        """The ggml types that are kept to the bit in more bits than they were published in."""
        kept = [(self.embedding, self.layout.embedding.encoding)]
        kept += [(m, t.encoding) for t, m in zip(self.layout.resident, self.resident, strict=True)]
        for i, layer in self.layout.moe_layers():
            kept += [(m, p.encoding) for p, m in zip(layer.record.parts, self.experts[i][0], strict=True)]
        types = {
            matrix.encoding
            for matrix, encoding in kept
            if isinstance(matrix.encoding, GGMLSource) and encoding == matrix.encoding.exact(matrix.columns)
        }
        return sorted((t for t in types if t.kept_bits > t.published_bits), key=lambda t: t.type)

    def files(self) -> Iterator[FilePlan]:
        """The files to write, each independent of the others; the long single ones first."""
        for table, sources in self.embeddings():
            yield FilePlan(table.file, table.nbytes, tuple(_embedding_units(table, sources)))
        yield FilePlan(RESIDENT_FILE, self.layout.resident_bytes, tuple(self._resident_units()))
        for i, layer in self.layout.moe_layers():
            yield FilePlan(layer.file, layer.nbytes, tuple(self._records(i, layer)))

    def embeddings(self) -> Iterator[tuple[EmbeddingLayout, tuple[SourceMatrix, ...]]]:
        """What is stored row by row, and the matrices that hold its rows."""
        yield self.layout.embedding, (self.embedding,)
        if self.layout.ngrams is not None:
            yield self.layout.ngrams, self.ngrams

    @property
    def source_bytes(self) -> int:
        """Bytes of the source that the plan reads."""
        experts = sum(len(layer) * sum(map(_with_bias, layer[0])) for layer in self.experts.values())  # all alike
        return experts + sum(map(_with_bias, (*self.resident, self.embedding, *self.ngrams)))

    def source_files(self) -> list[str]:
        """The shards that the plan reads, sorted."""
        experts = (matrix for layer in self.experts.values() for expert in layer for matrix in expert)
        every = chain(experts, self.resident, (self.embedding,), self.ngrams)
        return sorted({file for matrix in every for file in matrix.files()})

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


def _embedding_units(layout: EmbeddingLayout, sources: tuple[SourceMatrix, ...]) -> Iterator[EmbeddingUnit]:
    name = layout.file.removesuffix(".bin")
    multiple = UNIT_ALIGNMENT // math.gcd(layout.row_bytes, UNIT_ALIGNMENT)  # of rows
    multiple = math.lcm(multiple, sources[0].whole_rows)
    step = max(1, EMBEDDING_UNIT_BYTES // sources[0].row_bytes // multiple) * multiple
    for first in range(0, layout.rows, step):
        stop = min(first + step, layout.rows)
        nbytes = (layout.nbytes if stop == layout.rows else stop * layout.row_bytes) - first * layout.row_bytes
        yield EmbeddingUnit(name, nbytes, nbytes, first, tuple(_rows_of(sources, first, stop)), layout)


def _rows_of(sources: tuple[SourceMatrix, ...], first: int, stop: int) -> Iterator[SourceMatrix]:
    """Rows of matrices that follow each other."""
    begin = 0
    for source in sources:
        start, end = max(first - begin, 0), min(stop - begin, source.rows)
        if start < end:
            yield source.slice(start, end - start)
        begin += source.rows


def _with_bias(matrix: SourceMatrix) -> int:
    return matrix.nbytes + (matrix.linear_bias.nbytes if matrix.linear_bias else 0)
