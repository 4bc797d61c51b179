"""The place of every byte of a container, as data: what a plan makes, an index states and budgets count."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from formats.checksum import xxh3_64
from formats.config import ModelConfig
from formats.dtypes import AnyArray, storage_dtype
from formats.encodings import ArraySpec, Encoding
from formats.errors import ChecksumError
from formats.record import ARRAY_ALIGNMENT, PAGE_BYTES, PlacedArray, RecordLayout, align, place

RESIDENT_FILE = "resident.bin"
EMBEDDING_FILE = "embedding.bin"
NGRAM_FILE = "ngrams.bin"
BLOCK_BYTES = 1 << 20  # of a resident tensor, per checksum
_ROW_CHECKSUM_BYTES = 8
_ROW_ALIGNMENT = {EMBEDDING_FILE: ARRAY_ALIGNMENT, NGRAM_FILE: _ROW_CHECKSUM_BYTES}  # n-grams have short rows, and many


def layer_file(layer: int) -> str:
    """The file that holds a layer's experts."""
    return f"experts/layer-{layer:03d}.bin"


@dataclass(frozen=True)
class LayerLayout:
    """A layer's file of equal records: expert e at byte e * record_bytes."""

    file: str
    num_experts: int
    record: RecordLayout

    @property
    def nbytes(self) -> int:
        return self.num_experts * self.record.record_bytes


@dataclass(frozen=True)
class ResidentTensor:
    """A tensor that stays in memory: at `offset` of the resident file, `nbytes` long with its padding."""

    name: str
    shape: tuple[int, ...]
    encoding: Encoding
    offset: int
    nbytes: int
    arrays: tuple[PlacedArray, ...]


@dataclass(frozen=True)
class EmbeddingLayout:
    """An embedding of tokens or of n-grams, row by row: each row holds its own arrays and, last, its checksum.

    The checksum is XXH3-64, little-endian, of the row's bytes before it, seeded with the row number, so that
    a row is one short read that proves itself.
    """

    rows: int
    columns: int
    encoding: Encoding
    row_bytes: int
    arrays: tuple[PlacedArray, ...]  # of one row, as a matrix [1, columns]
    checksum_offset: int
    file: str = EMBEDDING_FILE

    @property
    def nbytes(self) -> int:
        """Bytes of the file, padded to whole pages."""
        return align(self.rows * self.row_bytes, PAGE_BYTES)

    def views(self, rows: AnyArray) -> dict[str, AnyArray]:
        """The arrays [n, ...] of n rows held in a uint8 array [n, row_bytes]; no copy."""
        return {
            array.name: rows[:, array.offset : array.offset + array.nbytes].view(storage_dtype(array.dtype))
            for array in self.arrays  # each [1, m] in a row, so [n, m] here
        }

    def check(self, row: int, raw: AnyArray) -> None:
        """Raises ChecksumError unless raw, uint8 [row_bytes], is the row of that number."""
        stored = int.from_bytes(raw[self.checksum_offset :][:_ROW_CHECKSUM_BYTES].tobytes(), "little")
        found = xxh3_64(raw[: self.checksum_offset], seed=row)
        if stored != int(found, 16):
            raise ChecksumError(f"{self.file}: row {row} has checksum {found}, expected {stored:016x}")

    def seal(self, first_row: int, raw: AnyArray) -> None:
        """Write the checksum of every row of raw, uint8 [n, row_bytes], in place."""
        for row, content in enumerate(raw, first_row):
            checksum = int(xxh3_64(content[: self.checksum_offset], seed=row), 16)
            content[self.checksum_offset :][:_ROW_CHECKSUM_BYTES] = np.frombuffer(
                checksum.to_bytes(_ROW_CHECKSUM_BYTES, "little"), np.uint8
            )


@dataclass(frozen=True)
class Layout:
    """The whole container: facts of the model, a layer file or None (dense) per layer, the rest."""

    model: ModelConfig
    layers: tuple[LayerLayout | None, ...]
    resident: tuple[ResidentTensor, ...]
    embedding: EmbeddingLayout
    ngrams: EmbeddingLayout | None = None  # of a model that has an embedding of n-grams

    @property
    def embeddings(self) -> tuple[EmbeddingLayout, ...]:
        """What is read row by row."""
        return (self.embedding,) if self.ngrams is None else (self.embedding, self.ngrams)

    @property
    def resident_bytes(self) -> int:
        """Bytes of the resident file."""
        return sum(tensor.nbytes for tensor in self.resident)

    @property
    def expert_bytes(self) -> int:
        """Bytes of all layer files."""
        return sum(layer.nbytes for layer in self.layers if layer is not None)

    @property
    def total_bytes(self) -> int:
        """Bytes of all data files; index and small files not counted."""
        return self.expert_bytes + self.resident_bytes + sum(table.nbytes for table in self.embeddings)

    def moe_layers(self) -> Iterator[tuple[int, LayerLayout]]:
        """(layer, its layout) of the layers that have experts."""
        return ((i, layer) for i, layer in enumerate(self.layers) if layer is not None)

    @cached_property
    def tensors(self) -> dict[str, ResidentTensor]:
        """Resident tensors by name."""
        return {tensor.name: tensor for tensor in self.resident}


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """A tensor's shape as the matrix [rows, columns] that encodings know; its last axis is the input axis."""
    columns = shape[-1] if shape else 1
    rows = 1
    for length in shape[:-1]:
        rows *= length
    return rows, columns


def place_resident(name: str, shape: tuple[int, ...], encoding: Encoding, offset: int) -> ResidentTensor:
    """Place a resident tensor at a page-aligned offset. Raises FormatError when the encoding does not fit."""
    arrays = place(encoding.arrays(*matrix_shape(shape)))
    nbytes = align(arrays[-1].offset + arrays[-1].nbytes, PAGE_BYTES)
    return ResidentTensor(name, shape, encoding, offset, nbytes, arrays)


def lay_out_embedding(rows: int, columns: int, encoding: Encoding, file: str = EMBEDDING_FILE) -> EmbeddingLayout:
    """Place one row's arrays on 8-byte boundaries, then its checksum; rows start on 64-byte boundaries (n-grams: 8)."""
    specs: tuple[ArraySpec, ...] = encoding.arrays(1, columns)
    arrays = place(specs, alignment=_ROW_CHECKSUM_BYTES)
    checksum_offset = align(arrays[-1].offset + arrays[-1].nbytes, _ROW_CHECKSUM_BYTES)
    row_bytes = align(checksum_offset + _ROW_CHECKSUM_BYTES, _ROW_ALIGNMENT[file])
    return EmbeddingLayout(rows, columns, encoding, row_bytes, arrays, checksum_offset, file)
