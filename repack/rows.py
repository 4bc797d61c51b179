"""Rows of source matrices: planes of a row block, rows first, whatever order the files have."""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import NamedTuple

import numpy as np

from formats.dtypes import AnyArray
from formats.encodings.sources import GPTQSource, stored
from formats.encodings.sources.base import ALL_ROWS, PACKED_ROWS
from formats.errors import FormatError
from repack.direct import ALIGNMENT, aligned_buffer
from repack.plan import Plan, SourceMatrix, SourcePlane
from repack.sources.base import Reader, Source

AHEAD = 2  # row blocks read before they are asked for: the disk is not to wait for an encoder (LEARNED 65)


class RowBlock(NamedTuple):
    """Some rows of a matrix, which are read at once."""

    matrix: SourceMatrix
    first: int
    rows: int


class RowReader:
    """Reads row blocks, the next ones on a thread of its own if it was told what comes.

    What is read alone is read into buffers that take turns: planes are valid until the next block is asked for. A plane
    whose rows do not follow each other in the file (stored columns first, gate and up in turns, one scale for many
    rows) is read whole and held while matrices that follow each other share it: of one expert, at most.
    """

    def __init__(self, reader: Reader) -> None:
        self._reader = reader
        self._buffers: deque[dict[str, AnyArray]] = deque({} for _ in range(AHEAD + 1))  # the first was read into last
        self._held: dict[tuple[str, int], AnyArray] = {}  # by file and offset
        self._thread = ThreadPoolExecutor(1, "read")
        self._coming: Iterator[RowBlock] = iter(())
        self._ahead: deque[tuple[RowBlock, Future[dict[str, AnyArray]]]] = deque()

    def expect(self, blocks: Iterator[RowBlock]) -> None:
        """What will be read; what is asked for otherwise is read then, and no more is read ahead."""
        self._coming = blocks
        for _ in range(AHEAD):
            self._read_ahead()

    def read(self, matrix: SourceMatrix, first: int, rows: int) -> dict[str, AnyArray]:
        """The planes of rows `first` and up of a matrix, by name. Raises StorageError."""
        block = RowBlock(matrix, first, rows)
        if not self._ahead or self._ahead[0][0] != block:
            wait([reading for _, reading in self._ahead])
            self._ahead.clear()
            return self._read(block)
        _, reading = self._ahead.popleft()
        planes = reading.result()
        self._read_ahead()
        return planes

    def close(self) -> None:
        """Wait for what is being read."""
        self._thread.shutdown(cancel_futures=True)

    def _read_ahead(self) -> None:
        coming = next(self._coming, None)
        if coming is not None:
            self._ahead.append((coming, self._thread.submit(self._read, coming)))

    def _read(self, block: RowBlock) -> dict[str, AnyArray]:
        self._buffers.rotate(1)
        self._reader.release()
        used = {(plane.file, plane.offset) for plane in block.matrix.planes}
        self._held = {key: array for key, array in self._held.items() if key in used}
        return {plane.spec.name: self._plane(block, plane) for plane in block.matrix.planes}

    def _plane(self, block: RowBlock, plane: SourcePlane) -> AnyArray:
        matrix, first, rows = block
        start, spec = matrix.first + first * matrix.step, plane.spec
        if plane.is_streamed and matrix.step == 1:
            return self._read_rows(plane, start, rows)
        whole = self._whole(plane)
        if spec.axis is ALL_ROWS:
            return whole.reshape(1, -1)
        if spec.words:
            assert (matrix.step, start % PACKED_ROWS) == (1, 0), "a word is never cut"
            some = slice(start // PACKED_ROWS * spec.words, -(-(start + rows) // PACKED_ROWS) * spec.words)
        else:
            some = slice(start, start + rows * matrix.step, matrix.step)
        which = some if spec.each == 1 else (start + np.arange(rows) * matrix.step) // spec.each
        if spec.axis == 1:  # its columns are copied together first: strides of a whole tensor miss every cache
            return np.ascontiguousarray(whole[:, which]).T
        return whole[which]

    def _read_rows(self, plane: SourcePlane, start: int, rows: int) -> AnyArray:
        dtype, (_, *shape) = stored(plane.dtype, plane.spec.shape)
        row_bytes = int(np.prod(shape)) * dtype.itemsize
        offset, nbytes = plane.offset + start * row_bytes, rows * row_bytes
        raw = self._reader.view(plane.file, offset, nbytes)
        if raw is None or raw.ctypes.data % dtype.itemsize:
            buffer = self._buffers[0].get(plane.spec.name)
            if buffer is None or buffer.nbytes < nbytes + ALIGNMENT:
                buffer = np.frombuffer(aligned_buffer(nbytes + ALIGNMENT), np.uint8)
                self._buffers[0][plane.spec.name] = buffer
            phase = offset % ALIGNMENT if offset % 8 == 0 else 0  # as in the file: whole pages are read without a copy
            raw = buffer[phase : phase + nbytes]
            self._reader.read_into(plane.file, offset, raw.data)
        return raw.view(dtype).reshape(rows, *shape)

    def _whole(self, plane: SourcePlane) -> AnyArray:
        key = plane.file, plane.offset
        if key not in self._held:
            dtype, shape = stored(plane.dtype, plane.spec.shape)
            array = np.empty(shape, dtype)
            self._reader.read_into(plane.file, plane.offset, array.reshape(-1).data.cast("B"))
            self._held[key] = array
        return self._held[key]


def refuse_act_order(source: Source, plan: Plan) -> None:
    """Raises FormatError when GPTQ's first experts have their groups out of order, before anything is written.

    Where only others have, their conversion finds it: to read all would take one small read per matrix.
    """
    named = [
        (matrix.encoding, plane)
        for layer in plan.experts.values()
        for matrix in layer[0]
        for plane in matrix.planes
        if isinstance(matrix.encoding, GPTQSource) and plane.spec.name == "g_idx"
    ]
    if not named:
        return
    with source.reader() as reader:
        for encoding, plane in named:
            dtype, shape = stored(plane.dtype, plane.spec.shape)
            g_idx = np.empty(shape, dtype)
            reader.read_into(plane.file, plane.offset, g_idx.data.cast("B"))
            flaw = encoding.order_flaw(g_idx)
            if flaw is not None:
                raise FormatError(
                    f"{plane.file}: {plane.tensor} holds {flaw.found} (row 0, column {flaw.column}), "
                    f"expected {flaw.expected}"
                )
