"""Bytes that were fetched and are not yet in the output, kept on disk so that a killed conversion need not ask again.

A file of slots, each for one block of a source file, and a table of what they hold. Nothing waits for the disk: a kill
loses no page, and what a loss of power tears is noticed, as every block has its XXH3-64 in the table.
"""

import os
import struct
import threading
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from formats.checksum import xxh3_64
from repack.journal import write_all

BLOCK_BYTES = 256 << 10
_HEAD = struct.Struct("<16s16xQQ16x")  # XXH3-64 of whose spool it is, block bytes, slots
_ENTRY = struct.Struct("<16sQQI12x16s")  # XXH3-64 of the block, offset, bytes, number of the file, XXH3-64 of these
_PAGE_BYTES = 4096


class Block(NamedTuple):
    """Bytes of a source file that the spool holds."""

    offset: int
    nbytes: int
    slot: int


class Piece(NamedTuple):
    """Part of a range: from byte `start` to `stop` of a file, in the spool or not."""

    start: int
    stop: int
    block: Block | None


class Spool:
    """The fetched bytes of one task. Any thread may call; a full spool keeps nothing more until some is released."""

    def __init__(self, path: Path, files: Sequence[str], capacity_bytes: int) -> None:
        """Open or create; blocks of an earlier run are there again if they are whole. Raises OSError."""
        self._path = path
        self._files = {name: number for number, name in enumerate(files)}
        self._slots = max(1, capacity_bytes // BLOCK_BYTES)
        self._data_offset = -(-(_HEAD.size + self._slots * _ENTRY.size) // _PAGE_BYTES) * _PAGE_BYTES
        self._lock = threading.Lock()
        self._writing, self._closed = 0, False
        self._held: dict[int, list[Block]] = {}  # by file, sorted by offset
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            head = _HEAD.pack(xxh3_64("\0".join(files).encode()).encode(), BLOCK_BYTES, self._slots)
            if os.pread(self._fd, _HEAD.size, 0) == head:
                self._load()
            else:
                os.ftruncate(self._fd, 0)
                write_all(self._fd, head)
                os.ftruncate(self._fd, self._data_offset)
        except BaseException:
            os.close(self._fd)
            raise
        self._uses = {block.slot: 0 for blocks in self._held.values() for block in blocks}
        self._free = [slot for slot in reversed(range(self._slots)) if slot not in self._uses]

    def _load(self) -> None:
        table = os.pread(self._fd, self._slots * _ENTRY.size, _HEAD.size)
        for slot in range(len(table) // _ENTRY.size):
            raw = table[slot * _ENTRY.size : (slot + 1) * _ENTRY.size]
            checksum, offset, nbytes, number, own = _ENTRY.unpack(raw)
            if own != xxh3_64(raw[:-16]).encode() or nbytes > BLOCK_BYTES or number >= len(self._files):
                continue
            data = os.pread(self._fd, nbytes, self._place(slot))
            if len(data) == nbytes and xxh3_64(data).encode() == checksum:
                self._held.setdefault(number, []).append(Block(offset, nbytes, slot))
        for blocks in self._held.values():
            blocks.sort()

    def _place(self, slot: int) -> int:
        return self._data_offset + slot * BLOCK_BYTES

    def put(self, file: str, offset: int, data: memoryview) -> int | None:
        """Keep up to BLOCK_BYTES of a file; the slot, or None when there is no room. Raises OSError."""
        with self._lock:
            if self._closed or not self._free:
                return None
            slot = self._free.pop()
            self._uses[slot] = 1
            self._writing += 1
        try:
            self._write(slot, self._files[file], offset, data)
        finally:
            with self._lock:
                self._writing -= 1
                self._close_if_idle()
        return slot

    def _write(self, slot: int, number: int, offset: int, data: memoryview) -> None:
        place, done = self._place(slot), 0
        while done < len(data):
            done += os.pwrite(self._fd, data[done:], place + done)
        fields = _ENTRY.pack(xxh3_64(data).encode(), offset, len(data), number, b"")[:-16]
        os.pwrite(self._fd, fields + xxh3_64(fields).encode(), _HEAD.size + slot * _ENTRY.size)

    def pieces(self, file: str, start: int, stop: int) -> Iterator[Piece]:
        """A range as it lies in what an earlier run left: in order, without gaps."""
        blocks = self._held.get(self._files[file], [])
        i = max(0, bisect_right(blocks, start, key=lambda block: block.offset) - 1)
        while start < stop:
            while i < len(blocks) and blocks[i].offset + blocks[i].nbytes <= start:
                i += 1
            block = blocks[i] if i < len(blocks) and blocks[i].offset < stop else None
            if block is None or block.offset > start:
                yield Piece(start, block.offset if block else stop, None)
                start = block.offset if block else stop
            else:
                end = min(stop, block.offset + block.nbytes)
                yield Piece(start, end, block)
                start = end

    def read(self, block: Block, offset: int, buffer: memoryview) -> bool:
        """Fill the buffer from byte `offset` of the file on, which lies in the block. Raises OSError."""
        place, done = self._place(block.slot) + offset - block.offset, 0
        while done < len(buffer):
            count = os.preadv(self._fd, [buffer[done:]], place + done)
            if not count:
                return False
            done += count
        return True

    def adopt(self, block: Block) -> int:
        """Somebody wants a block of an earlier run; returns its slot, to be released once more."""
        with self._lock:
            self._uses[block.slot] += 1
        return block.slot

    def release(self, slots: Sequence[int]) -> None:
        """These blocks are in the output, or nobody wants them: their room is for others."""
        with self._lock:
            for slot in slots:
                self._uses[slot] -= 1
                if not self._uses[slot]:
                    self._free.append(slot)

    def drop_unwanted(self) -> None:
        """Make room of the blocks of an earlier run that nobody has adopted."""
        with self._lock:
            self._free += [slot for slot, uses in self._uses.items() if not uses and slot not in self._free]

    def close(self) -> None:
        """Leave the file for the next run; a block that is being written is still completed."""
        with self._lock:
            self._closed = True
            self._close_if_idle()

    def _close_if_idle(self) -> None:
        if self._closed and not self._writing:
            os.close(self._fd)
