"""From source bytes to container bytes, in row blocks; held are a block and a part's scales and biases."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Protocol

import numpy as np

from formats import native
from formats.dtypes import FLOAT_DTYPES, AnyArray, storage_dtype
from formats.encodings import Affine, Encoding, Plain, encoding_label
from formats.encodings.sources import GGMLSource, PlainSource, find_flaw
from formats.errors import FormatError
from formats.record import LINEAR_BIAS, PlacedArray
from formats.transcode import transcode
from repack.direct import ALIGNMENT
from repack.plan import EmbeddingUnit, PlacedMatrix, RecordUnit, SourceMatrix, Unit
from repack.rows import RowBlock, RowReader
from repack.sources.base import Reader

ROW_BLOCK_BYTES = (4 << 20) - ALIGNMENT  # of source: one read, long enough for the disk (LEARNED 15), into huge pages
# Bits of the exponent: all set means infinity or NaN.
_EXPONENT: Mapping[str, np.uint16 | np.uint32] = {
    "bf16": np.uint16(0x7F80),
    "f16": np.uint16(0x7C00),
    "f32": np.uint32(0x7F800000),
}

Block = tuple[AnyArray, int]  # bytes to write next, and source bytes that went into them


class EncodedRows(NamedTuple):
    """Some rows of a matrix as its encoding stores them."""

    first_row: int
    arrays: Mapping[str, AnyArray]
    source_bytes: int


class Weights(Protocol):
    """Where encoded rows come from. Picklable; one thread at a time."""

    def expect(self, units: Sequence[Unit], spool: Path, waiting: Callable[[], None]) -> None:
        """The units that will be encoded, in this order; for spool and waiting see Reader.expect."""

    def finished(self, units: int) -> None:
        """The first `units` units of `expect` are in the output."""

    def encoded(self, unit: str, source: SourceMatrix, encoding: Encoding, first_row: int = 0) -> Iterator[EncodedRows]:
        """All rows of a matrix in row blocks, each valid until the next is asked for.

        `first_row` is the number of its first one, `unit` is for messages. Raises FormatError for weights that are not
        finite, StorageError for a source that fails.
        """

    def __enter__(self) -> "Weights": ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def row_blocks(units: Sequence[Unit]) -> Iterator[RowBlock]:
    """What is read for the units, in the order in which they are encoded."""
    for unit in units:
        sources = unit.sources if isinstance(unit, EmbeddingUnit) else [matrix.source for matrix in unit.matrices]
        for source in sources:
            for matrix in (source.linear_bias, source):
                if matrix is not None:
                    for first, rows in matrix.blocks(ROW_BLOCK_BYTES):
                        yield RowBlock(matrix, first, rows)


def unit_blocks(weights: Weights, unit: Unit) -> Iterator[Block]:
    """The bytes of a unit in order; each block is to be used before the next is asked for.

    Raises as Weights.encoded.
    """
    return _embedding_blocks(weights, unit) if isinstance(unit, EmbeddingUnit) else _record_blocks(weights, unit)


def _record_blocks(weights: Weights, unit: RecordUnit) -> Iterator[Block]:
    end = 0
    for matrix in unit.matrices:
        for array, block, source_bytes in _matrix_blocks(weights, unit.name, matrix):
            if array.offset > end:
                yield _zeros(array.offset - end), 0
            yield block, source_bytes
            end = max(end, array.offset) + block.nbytes
    if unit.nbytes > end:
        yield _zeros(unit.nbytes - end), 0


def _matrix_blocks(weights: Weights, unit: str, matrix: PlacedMatrix) -> Iterator[tuple[PlacedArray, AnyArray, int]]:
    """(its array, block, source bytes): the first array as it is encoded, then those that were held."""
    first, *others = matrix.arrays
    held = {spec.name: np.empty(spec.shape, storage_dtype(spec.dtype)) for spec in others}
    if matrix.source.linear_bias is not None:
        bias = matrix.source.linear_bias
        for row, arrays, nbytes in weights.encoded(unit, bias, bias.encoding.exact(1)):
            block = arrays["weight"].ravel()
            held[LINEAR_BIAS][row : row + len(block)] = block
            yield first, block[:0], nbytes
    for row, arrays, nbytes in weights.encoded(unit, matrix.source, matrix.encoding):
        block = np.ascontiguousarray(arrays[first.name])
        for name in arrays.keys() & held.keys():
            held[name][row : row + len(block)] = arrays[name]
        yield first, block, nbytes
    for spec in others:
        yield spec, held.pop(spec.name), 0


def _embedding_blocks(weights: Weights, unit: EmbeddingUnit) -> Iterator[Block]:
    layout, written = unit.layout, 0
    for source in unit.sources:
        first_row = unit.first_row + written // layout.row_bytes
        for row, arrays, nbytes in weights.encoded(unit.name, source, layout.encoding, first_row):
            rows = len(arrays[layout.arrays[0].name])
            raw = np.zeros((rows, layout.row_bytes), np.uint8)
            for array in layout.arrays:
                content = np.ascontiguousarray(arrays[array.name]).view(np.uint8).reshape(rows, array.nbytes)
                raw[:, array.offset : array.offset + array.nbytes] = content
            layout.seal(row, raw)
            written += raw.nbytes
            yield raw, nbytes
    if unit.nbytes > written:
        yield _zeros(unit.nbytes - written), 0


class SourceWeights:
    """The weights of a source, encoded: moved as they are where the encoding is theirs, else decoded and rounded."""

    def __init__(self, reader: Reader) -> None:
        self._reader = reader

    def expect(self, units: Sequence[Unit], spool: Path, waiting: Callable[[], None]) -> None:
        if not self._reader.expect([unit.ranges() for unit in units], spool, waiting):
            self._rows.expect(row_blocks(units))

    def finished(self, units: int) -> None:
        self._reader.finished(units)

    def encoded(self, unit: str, source: SourceMatrix, encoding: Encoding, first_row: int = 0) -> Iterator[EncodedRows]:
        exact = encoding == source.encoding.exact(source.columns)
        for first, rows in source.blocks(ROW_BLOCK_BYTES):
            planes = self._rows.read(source, first, rows)
            nbytes = source.bytes_of(first + rows) - source.bytes_of(first)
            row = first_row + first
            encoded = _native_plain(source, encoding, planes) or _native_blocks(source, planes, exact)
            if encoded is not None:
                yield EncodedRows(row, encoded, nbytes)
                continue
            _check(unit, source, planes, row)
            if exact:
                yield EncodedRows(row, transcode(source.encoding, planes) or source.encoding.transcode(planes), nbytes)
                continue
            assert isinstance(encoding, (Affine, Plain))
            with np.errstate(over="ignore", invalid="ignore"):
                values = np.ascontiguousarray(source.encoding.decode(planes))
                arrays = _native_arrays(encoding, values, "f32") or encoding.encode(values)
            for spec in encoding.arrays(rows, source.columns):
                if spec.dtype in FLOAT_DTYPES and not _is_finite(arrays[spec.name], spec.dtype).all():
                    raise FormatError(
                        f"{source.file}: {source.tensor} has weights that are too large for {encoding_label(encoding)} "
                        f"({unit}, rows {row} to {row + rows - 1})"
                    )
            yield EncodedRows(row, arrays, nbytes)

    def __enter__(self) -> "SourceWeights":
        self._reader.__enter__()
        self._rows = RowReader(self._reader)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._rows.close()
        self._reader.__exit__(kind, error, trace)


def encoder_name() -> str:
    """What encodes affine weights here: `native (avx2)`, or `NumPy`."""
    levels = native.encoder_levels()
    return f"native ({levels[0]})" if levels else "NumPy"


def _native_arrays(encoding: Encoding, bits: AnyArray, dtype: str) -> Mapping[str, AnyArray] | None:
    """The arrays by the native encoder; None where it has none, or for weights that a refusal is due to."""
    if isinstance(encoding, Affine) and encoding.bits in native.ENCODED_BITS and native.encoder_levels():
        return native.encode_affine(encoding, bits, dtype)
    return None


def _native_plain(
    source: SourceMatrix, encoding: Encoding, planes: Mapping[str, AnyArray]
) -> Mapping[str, AnyArray] | None:
    """Plain floats by the native encoder, without widening them first."""
    if isinstance(source.encoding, PlainSource):
        weight = planes["weight"]
        if weight.flags.c_contiguous:
            return _native_arrays(encoding, weight, source.encoding.dtype)
    return None


def _native_blocks(source: SourceMatrix, planes: Mapping[str, AnyArray], exact: bool) -> Mapping[str, AnyArray] | None:
    """ggml's blocks as they are, checked on the way; None for those that a refusal is due to."""
    return transcode(source.encoding, planes) if exact and isinstance(source.encoding, GGMLSource) else None


def _check(unit: str, source: SourceMatrix, planes: Mapping[str, AnyArray], first_row: int) -> None:
    """Raises FormatError for content that no weight or scale may have."""
    flaw = find_flaw(source.encoding, tuple(plane.spec for plane in source.planes), planes)
    if flaw is not None:
        plane = next(plane for plane in source.planes if plane.spec.name == flaw.plane)
        raise FormatError(
            f"{plane.file}: {plane.tensor} holds {flaw.found} ({unit}, row {first_row + flaw.row}, "
            f"column {flaw.column}), expected {flaw.expected}"
        )


def _is_finite(bits: AnyArray, dtype: str) -> "np.ndarray[tuple[int, ...], np.dtype[np.bool_]]":
    """Which elements are finite, from their bits."""
    mask = _EXPONENT[dtype]
    return (bits.view(mask.dtype) & mask) != mask


def _zeros(nbytes: int) -> AnyArray:
    return np.zeros(nbytes, np.uint8)
