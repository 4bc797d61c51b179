"""XXH3-64, BLAKE3 and SHA-256 as lower-case hexadecimal text."""

import hashlib
from collections.abc import Iterator
from typing import Protocol

import xxhash
from blake3 import blake3

from formats.dtypes import AnyArray

Buffer = bytes | bytearray | memoryview | AnyArray
BLAKE3, SHA256 = "blake3", "sha256"


class Digest(Protocol):
    """A hash of what it was given so far."""

    def update(self, data: memoryview, /) -> object: ...
    def copy(self) -> "Digest": ...
    def hexdigest(self) -> str: ...


def file_digest(name: str = BLAKE3) -> Digest:
    """Of a whole data file, 64 hexadecimal digits: BLAKE3, or SHA-256, which older files have.

    BLAKE3 takes a seventh of its time on processors without instructions for SHA-256.
    """
    return hashlib.sha256() if name == SHA256 else blake3()


def xxh3_64(data: Buffer, seed: int = 0) -> str:
    """XXH3-64 of the bytes, 16 hexadecimal digits."""
    return xxhash.xxh3_64_hexdigest(data, seed)  # type: ignore[arg-type]  # NumPy arrays are buffers


def sha256(data: bytes) -> str:
    """SHA-256 of the bytes, 64 hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def num_blocks(total: int, block: int) -> int:
    """How many blocks cover `total`."""
    return -(-total // block)


def blocks(total: int, block: int) -> Iterator[tuple[int, int]]:
    """(offset, length) of consecutive blocks that cover `total`, the last one shorter."""
    for offset in range(0, total, block):
        yield offset, min(block, total - offset)
