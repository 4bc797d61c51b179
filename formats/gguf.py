"""GGUF headers, versions 2 and 3, read from hostile bytes: every count and length is checked before it is used.

Source: ggml's docs/gguf.md. The bytes come through a callable, so that a header can be read from a file or over
byte ranges of a remote one; about as much is asked for as the header is long.
"""

import math
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from formats.errors import FormatError, UnsupportedError
from formats.fields import shown

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_HEADER_BYTES = 1 << 28
MAX_METADATA = 1 << 16  # keys
MAX_TENSORS = 1 << 20
MAX_KEY_BYTES = 1 << 16
MAX_STRING_BYTES = 1 << 24
MAX_ITEMS = 1 << 24  # of an array
MAX_AXES = 4
MAX_ALIGNMENT = 1 << 16
DEFAULT_ALIGNMENT = 32
_READ_BYTES = 1 << 20
ROPE_FREQS = "rope_freqs.weight"

ReadAt = Callable[[int, int], bytes]  # (offset, most bytes) -> bytes, fewer only at the end of the file


class BlockType(NamedTuple):
    """A ggml type: weights and bytes of a block; 1 weight for plain numbers."""

    name: str
    weights: int
    nbytes: int


# By ggml's number. Types that nothing here decodes are listed too, so that skipped tensors are checked.
BLOCK_TYPES: Mapping[int, BlockType] = {
    0: BlockType("F32", 1, 4),
    1: BlockType("F16", 1, 2),
    2: BlockType("Q4_0", 32, 18),
    3: BlockType("Q4_1", 32, 20),
    6: BlockType("Q5_0", 32, 22),
    7: BlockType("Q5_1", 32, 24),
    8: BlockType("Q8_0", 32, 34),
    9: BlockType("Q8_1", 32, 40),
    10: BlockType("Q2_K", 256, 84),
    11: BlockType("Q3_K", 256, 110),
    12: BlockType("Q4_K", 256, 144),
    13: BlockType("Q5_K", 256, 176),
    14: BlockType("Q6_K", 256, 210),
    15: BlockType("Q8_K", 256, 292),
    16: BlockType("IQ2_XXS", 256, 66),
    17: BlockType("IQ2_XS", 256, 74),
    18: BlockType("IQ3_XXS", 256, 98),
    19: BlockType("IQ1_S", 256, 50),
    20: BlockType("IQ4_NL", 32, 18),
    21: BlockType("IQ3_S", 256, 110),
    22: BlockType("IQ2_S", 256, 82),
    23: BlockType("IQ4_XS", 256, 136),
    24: BlockType("I8", 1, 1),
    25: BlockType("I16", 1, 2),
    26: BlockType("I32", 1, 4),
    27: BlockType("I64", 1, 8),
    28: BlockType("F64", 1, 8),
    29: BlockType("IQ1_M", 256, 56),
    30: BlockType("BF16", 1, 2),
    34: BlockType("TQ1_0", 256, 54),
    35: BlockType("TQ2_0", 256, 66),
    39: BlockType("MXFP4", 32, 17),
    40: BlockType("NVFP4", 64, 36),
}

_STRING, _ARRAY = 8, 9
# struct codes of the plain value types, by GGUF's number.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}


@dataclass(frozen=True)
class GGUFTensor:
    """A tensor: ggml type by name, shape with the input axis last (the file has it first), absolute byte range."""

    name: str
    type: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True)
class GGUFHeader:
    """Metadata by key (numbers, strings, booleans, lists of them) and tensors by name, in file order."""

    metadata: Mapping[str, Any]
    tensors: Mapping[str, GGUFTensor]
    rope_factors: tuple[float, ...] | None = None  # of the tensor ROPE_FREQS, which is a parameter rather than a weight


def read_gguf_header(read: ReadAt, file_bytes: int, where: str) -> GGUFHeader:
    """Read and check the header of a GGUF file of file_bytes.

    Raises FormatError (UnsupportedError for another version, big-endian bytes or an unknown tensor type) naming the
    file, the key or tensor, what was found and what is expected.
    """
    cursor = _Cursor(read, file_bytes, where)
    if cursor.take(4, "its magic") != MAGIC:
        raise FormatError(f"{where}: does not begin with GGUF, so it is no GGUF file")
    version = cursor.number("I", "its version")
    if version & 0xFFFF == 0:
        raise UnsupportedError(f"{where}: is big-endian, expected little-endian")
    if version not in VERSIONS:
        raise UnsupportedError(f"{where}: GGUF version is {version}, expected one of {', '.join(map(str, VERSIONS))}")
    num_tensors = cursor.count("Q", "tensor_count", MAX_TENSORS)
    num_keys = cursor.count("Q", "metadata_kv_count", MAX_METADATA)
    metadata: dict[str, Any] = {}
    for _ in range(num_keys):
        key = cursor.string("a metadata key", MAX_KEY_BYTES)
        if key in metadata:
            raise FormatError(f"{where}: key {shown(key)} stands twice")
        metadata[key] = cursor.value(shown(key))
    infos = [_tensor_info(cursor) for _ in range(num_tensors)]
    alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    if type(alignment) is not int or not 0 < alignment <= MAX_ALIGNMENT or alignment & (alignment - 1):
        raise FormatError(
            f"{where}: general.alignment is {shown(alignment)}, expected a power of two up to {MAX_ALIGNMENT}"
        )
    tensors = _placed(infos, -(-cursor.offset // alignment) * alignment, alignment, cursor)
    factors = _rope_factors(read, tensors.pop(ROPE_FREQS), where) if ROPE_FREQS in tensors else None
    return GGUFHeader(metadata, tensors, factors)


def _rope_factors(read: ReadAt, tensor: GGUFTensor, where: str) -> tuple[float, ...]:
    if tensor.type != "F32" or len(tensor.shape) != 1 or tensor.nbytes > MAX_KEY_BYTES:
        found = f"{tensor.type} {list(tensor.shape)}"
        raise FormatError(f"{where}: {ROPE_FREQS} is {found}, expected F32, a vector of at most {MAX_KEY_BYTES} bytes")
    return struct.unpack(f"<{tensor.shape[0]}f", read(tensor.offset, tensor.nbytes))


def _tensor_info(cursor: "_Cursor") -> GGUFTensor:
    """A tensor whose offset still counts from the first byte of data."""
    name = cursor.string("a tensor name", MAX_KEY_BYTES)
    what = f"tensor {shown(name)}"
    num_axes = cursor.count("I", f"number of axes of {what}", MAX_AXES)
    shape = tuple(cursor.count("Q", f"an axis of {what}", 1 << 40) for _ in range(num_axes))[::-1]
    kind = cursor.number("I", f"type of {what}")
    offset = cursor.number("Q", f"offset of {what}")
    block = BLOCK_TYPES.get(kind)
    if block is None:
        raise UnsupportedError(f"{cursor.where}: {what} has ggml type {kind}, which is not known to this version")
    columns = shape[-1] if shape else 1
    if columns % block.weights:
        raise FormatError(
            f"{cursor.where}: {what} has rows of {columns}, expected a multiple of {block.weights} for {block.name}"
        )
    return GGUFTensor(name, block.name, shape, offset, math.prod(shape) // block.weights * block.nbytes)


def _placed(infos: list[GGUFTensor], first: int, alignment: int, cursor: "_Cursor") -> dict[str, GGUFTensor]:
    """Absolute offsets. The data of tensors must be aligned, lie inside the file and not overlap."""
    tensors: dict[str, GGUFTensor] = {}
    for info in infos:
        if info.name in tensors:
            raise FormatError(f"{cursor.where}: tensor {shown(info.name)} stands twice")
        if info.offset % alignment:
            raise FormatError(
                f"{cursor.where}: tensor {shown(info.name)} has offset {info.offset}, "
                f"expected a multiple of {alignment}"
            )
        tensors[info.name] = GGUFTensor(info.name, info.type, info.shape, first + info.offset, info.nbytes)
    end = first
    for tensor in sorted(tensors.values(), key=lambda tensor: (tensor.offset, tensor.nbytes)):
        if tensor.offset < end:
            raise FormatError(f"{cursor.where}: tensor {shown(tensor.name)} overlaps the one before it")
        end = tensor.offset + tensor.nbytes
        if end > cursor.file_bytes:
            raise FormatError(
                f"{cursor.where}: is {cursor.file_bytes} bytes long, but tensor {shown(tensor.name)} ends at byte "
                f"{end}: the file was cut"
            )
    return tensors


class _Cursor:
    """Reads forward through a header; every getter names what it was reading when the bytes are wrong."""

    def __init__(self, read: ReadAt, file_bytes: int, where: str) -> None:
        self._read = read
        self._buffer = b""
        self._start = 0  # of the buffer in the file
        self.offset = 0
        self.file_bytes = file_bytes
        self.where = where

    def take(self, nbytes: int, what: str) -> bytes:
        """The next bytes. Raises FormatError at the end of the file or beyond the largest header."""
        end = self.offset + nbytes
        if end > self.file_bytes:
            raise FormatError(f"{self.where}: ends at byte {self.file_bytes} inside {what}: the file was cut")
        if end > MAX_HEADER_BYTES:
            raise FormatError(f"{self.where}: {what} ends at byte {end}, expected a header of up to {MAX_HEADER_BYTES}")
        if end > self._start + len(self._buffer):
            self._buffer = self._buffer[self.offset - self._start :]
            self._start = self.offset
            missing = end - self._start - len(self._buffer)
            self._buffer += self._read(self._start + len(self._buffer), max(missing, _READ_BYTES))
            if end > self._start + len(self._buffer):
                raise FormatError(f"{self.where}: cannot be read up to byte {end}: the file was cut")
        first = self.offset - self._start
        self.offset = end
        return self._buffer[first : first + nbytes]

    def number(self, code: str, what: str) -> Any:
        """A number of that struct code."""
        return struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}"), what))[0]

    def count(self, code: str, what: str, most: int) -> int:
        """An unsigned number that is going to be used as a size."""
        number: int = self.number(code, what)
        if number > most:
            raise FormatError(f"{self.where}: {what} is {number}, expected at most {most}")
        return number

    def string(self, what: str, most: int) -> str:
        """A length and UTF-8 bytes."""
        raw = self.take(self.count("Q", f"length of {what}", most), what)
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            raise FormatError(f"{self.where}: {what} is {shown(raw[:40])}, expected UTF-8") from None

    def value(self, key: str) -> Any:
        """A metadata value: a number, a string, true or false, or a list of one of these."""
        kind = self.number("I", f"type of {key}")
        if kind == _ARRAY:
            return self._array(self.number("I", f"type of the items of {key}"), key)
        return self._item(kind, key)

    def _item(self, kind: int, key: str) -> Any:
        if kind == _STRING:
            return self.string(key, MAX_STRING_BYTES)
        return self.number(self._code(kind, key), key)

    def _array(self, kind: int, key: str) -> list[Any]:
        length = self.count("Q", f"length of {key}", MAX_ITEMS)
        if kind == _STRING:
            return [self.string(f"an item of {key}", MAX_STRING_BYTES) for _ in range(length)]
        items = f"<{length}{self._code(kind, key)}"
        return list(struct.unpack(items, self.take(struct.calcsize(items), key)))

    def _code(self, kind: int, key: str) -> str:
        if kind not in _SCALARS:
            raise FormatError(f"{self.where}: {key} has value type {kind}, which GGUF does not have")
        return _SCALARS[kind]
