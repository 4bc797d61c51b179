"""From disk to memory, checked: one expert is one aligned read; resident weights and embedding rows likewise."""

import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from typing import NamedTuple

import numpy as np

from formats.budget import largest_record_bytes
from formats.checksum import blocks, xxh3_64
from formats.container import Container
from formats.dtypes import AnyArray
from formats.errors import ChecksumError, StorageError
from formats.layout import BLOCK_BYTES, RESIDENT_FILE, EmbeddingLayout, ResidentTensor
from runtime.cache import ExpertKey
from runtime.direct import ALIGNMENT, DirectFile, aligned_bytes, proves_direct

LOADERS = 4  # threads that read resident weights and touch their pages (docs/LEARNED.md 59), or a prompt's rows
MANY_ROWS = 64  # that a prompt reads of a table at once, and for which threads are worth their start


class ReadCounters:
    """Bytes read and the seconds during which at least one read was under way; safe for many threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._under_way = 0
        self._began = 0.0
        self.nbytes = 0
        self.seconds = 0.0

    def __enter__(self) -> None:
        with self._lock:
            if self._under_way == 0:
                self._began = time.perf_counter()
            self._under_way += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._under_way -= 1
            if self._under_way == 0:
                self.seconds += time.perf_counter() - self._began

    def add(self, nbytes: int) -> None:
        with self._lock:
            self.nbytes += nbytes


class RecordPlace(NamedTuple):
    """Where an expert lies on disk, and what it is."""

    fd: int
    offset: int
    nbytes: int
    checksum: str


class ExpertStore:
    """The layer files of a container. `read` may be called from many threads, each with its own slot."""

    def __init__(self, container: Container) -> None:
        """Opens every layer file. `direct` says whether reads were proven to go past the page cache."""
        self._layout = container.index.layout
        self._checksums = container.index.record_checksums
        self._files: dict[int, DirectFile] = {}
        self._record_bytes = {layer: layout.record.record_bytes for layer, layout in self._layout.moe_layers()}
        self.proven: set[ExpertKey] = set()  # whose checksum has been compared once
        self.counters = ReadCounters()
        self.direct = True
        with ExitStack() as opened:
            for layer, layout in self._layout.moe_layers():
                file = opened.enter_context(closing(DirectFile(container.data_path(layout.file), self.direct)))
                if not self._files and not proves_direct(file):
                    self.direct = file.direct = False
                self._files[layer] = file
            self._opened = opened.pop_all()

    def record_bytes(self, layer: int) -> int:
        """Bytes of one expert of the layer."""
        return self._record_bytes[layer]

    def place(self, key: ExpertKey) -> RecordPlace:
        """Where the expert's record lies."""
        nbytes = self.record_bytes(key.layer)
        return RecordPlace(
            self._files[key.layer].fd, key.expert * nbytes, nbytes, self._checksums[key.layer][key.expert]
        )

    def new_slots(self, num_slots: int) -> AnyArray:
        """uint8 [num_slots, bytes of the largest record]; each slot begins on a page and has all its pages."""
        record = largest_record_bytes(self._layout)
        return aligned_bytes(num_slots * record, touched=True).reshape(num_slots, record)

    def new_table(self) -> AnyArray:
        """int64 [layers, experts], -1 everywhere: the slot of each."""
        experts = max((layer.num_experts for _, layer in self._layout.moe_layers()), default=0)
        return np.full((len(self._layout.layers), experts), -1, np.int64)

    def read(self, key: ExpertKey, slot: AnyArray) -> None:
        """Read one expert into the start of slot: one read, checked the first time.

        Raises StorageError for a failed or short read, ChecksumError for wrong bytes, naming file, layer and expert.
        """
        nbytes = self.read_raw(key, slot)
        if key not in self.proven:
            found = xxh3_64(slot[:nbytes])
            if found != self._checksums[key.layer][key.expert]:
                raise self.wrong(key, found)
            self.proven.add(key)

    def read_raw(self, key: ExpertKey, slot: AnyArray) -> int:
        """The read alone, unchecked; returns its bytes. Raises StorageError."""
        nbytes = self.record_bytes(key.layer)
        with self.counters:
            self._files[key.layer].read_into(slot[:nbytes], key.expert * nbytes, _name(key))
        self.counters.add(nbytes)
        return nbytes

    def unreadable(self, key: ExpertKey, reason: str) -> StorageError:
        """What to raise when the kernel refuses to read an expert."""
        return self._files[key.layer].unreadable(_name(key), reason)

    def cut(self, key: ExpertKey, done: int) -> StorageError:
        """What to raise when an expert's read ends early."""
        nbytes = self.record_bytes(key.layer)
        return self._files[key.layer].cut(_name(key), done, key.expert * nbytes, nbytes)

    def wrong(self, key: ExpertKey, found: str) -> ChecksumError:
        """What to raise when an expert's bytes are not those that were written."""
        expected = self._checksums[key.layer][key.expert]
        return ChecksumError(f"{self._files[key.layer].path}: {_name(key)} has checksum {found}, expected {expected}")

    def close(self) -> None:
        """Close the layer files."""
        self._opened.close()


def _name(key: ExpertKey) -> str:
    return f"layer {key.layer} expert {key.expert}"


def load_resident(container: Container) -> AnyArray:
    """The resident file in anonymous memory, uint8 [resident_bytes], every block checked.

    Raises ChecksumError naming file, tensor and block, or StorageError.
    """
    layout, checksums = container.index.layout, container.index.block_checksums
    file = DirectFile(container.data_path(RESIDENT_FILE))
    memory = aligned_bytes(layout.resident_bytes)

    def load(tensor: ResidentTensor, block: int, start: int, length: int) -> None:
        offset = tensor.offset + start
        content = memory[offset : offset + length]
        file.read_into(content, offset, f"tensor {tensor.name}")
        expected, found = checksums[tensor.name][block], xxh3_64(content)
        if found != expected:
            raise ChecksumError(
                f"{file.path}: tensor {tensor.name} block {block} has checksum {found}, expected {expected}"
            )

    every = [(t, n, *place) for t in layout.resident for n, place in enumerate(blocks(t.nbytes, BLOCK_BYTES))]
    try:
        with ThreadPoolExecutor(LOADERS) as threads:
            list(threads.map(load, *zip(*every, strict=True)))
    finally:
        file.close()
    return memory


class _RowPlace(NamedTuple):
    """The aligned read that covers a row, and where in it the row begins."""

    offset: int
    nbytes: int
    skip: int


class EmbeddingRows:
    """An embedding, read row by row when a token needs it; every row proves itself."""

    def __init__(self, container: Container, layout: EmbeddingLayout) -> None:
        self.layout = layout
        self._file = DirectFile(container.data_path(layout.file))
        self._buffer = self._new_buffer()
        self.counters = ReadCounters()

    def read(self, numbers: Sequence[int]) -> AnyArray:
        """Raw rows of distinct numbers: uint8 [n, row_bytes]. Raises ChecksumError or StorageError."""
        rows = np.empty((len(numbers), self.layout.row_bytes), np.uint8)
        if len(numbers) < MANY_ROWS:
            self._read_into(rows, numbers, self._buffer)
            return rows
        share = -(-len(numbers) // LOADERS)

        def load(begin: int) -> None:
            part = slice(begin, begin + share)
            self._read_into(rows[part], numbers[part], self._new_buffer())

        with ThreadPoolExecutor(LOADERS) as threads:
            list(threads.map(load, range(0, len(numbers), share)))
        return rows

    def _new_buffer(self) -> AnyArray:
        return aligned_bytes(self.layout.row_bytes + 2 * ALIGNMENT)

    def _read_into(self, rows: AnyArray, numbers: Sequence[int], buffer: AnyArray) -> None:
        for row, number in zip(rows, numbers, strict=True):
            place = self._place(number)
            content = buffer[: place.nbytes]
            with self.counters:
                self._file.read_into(content, place.offset, f"row {number}")
            row[:] = content[place.skip : place.skip + self.layout.row_bytes]
            self.layout.check(number, row)

    def _place(self, number: int) -> _RowPlace:
        start = number * self.layout.row_bytes
        offset = start // ALIGNMENT * ALIGNMENT
        stop = -(-(start + self.layout.row_bytes) // ALIGNMENT) * ALIGNMENT
        return _RowPlace(offset, stop - offset, start - offset)

    def close(self) -> None:
        self._file.close()
