"""safetensors headers, read from hostile bytes: every number is checked before it is used."""

import math
import os
from typing import NamedTuple

from formats.errors import FormatError, UnsupportedError
from formats.fields import Fields, parse_json, shown

MAX_HEADER_BYTES = 100_000_000  # the safetensors library's own limit
MAX_AXES = 16
_LENGTH_BYTES = 8
# Bytes per element of every dtype that published checkpoints use, so that tensors we skip are checked too.
_ITEM_BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64"), 8),
}


class TensorEntry(NamedTuple):
    """A tensor in a safetensors file: dtype as the file names it, shape, and absolute byte range."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


def header_bytes(prefix: bytes, file_bytes: int, where: str) -> int:
    """Length of the JSON header from a file's first 8 bytes. Raises FormatError when it cannot be true."""
    if len(prefix) < _LENGTH_BYTES or file_bytes < _LENGTH_BYTES:
        raise FormatError(f"{where}: is {file_bytes} bytes long, too short for a safetensors file")
    length = int.from_bytes(prefix[:_LENGTH_BYTES], "little")
    if length > MAX_HEADER_BYTES:
        raise FormatError(f"{where}: header length is {length}, expected at most {MAX_HEADER_BYTES}")
    if _LENGTH_BYTES + length > file_bytes:
        raise FormatError(f"{where}: header length is {length}, but the file has {file_bytes} bytes")
    return length


def parse_header(header: bytes, file_bytes: int, where: str) -> dict[str, TensorEntry]:
    """Tensors by name, in file order. The data must follow without gap or overlap up to the file's end.

    Raises FormatError (and UnsupportedError for an unknown dtype) naming file, tensor, found and expected.
    """
    listing = parse_json(header, where)
    if not isinstance(listing, dict):
        raise FormatError(f"{where}: header is {shown(listing)}, expected an object")
    first = _LENGTH_BYTES + len(header)
    entries = [
        _entry(name, Fields(value, f"{where}: {shown(name)}"), first)
        for name, value in listing.items()
        if name != "__metadata__"
    ]
    entries.sort(key=lambda entry: (entry.offset, entry.nbytes))
    end = first
    for entry in entries:
        if entry.offset != end:
            problem = "overlaps" if entry.offset < end else "leaves a gap after"
            raise FormatError(
                f"{where}: {shown(entry.name)} begins at byte {entry.offset} and {problem} the tensor before "
                f"it, expected byte {end}"
            )
        end += entry.nbytes
    if end != file_bytes:
        problem = "the file was cut" if end > file_bytes else "it holds bytes that no tensor claims"
        raise FormatError(f"{where}: is {file_bytes} bytes long, its header says {end}: {problem}")
    return {entry.name: entry for entry in entries}


def _entry(name: str, fields: Fields, first: int) -> TensorEntry:
    dtype = fields.string("dtype")
    if dtype not in _ITEM_BYTES:
        raise UnsupportedError(f"{fields.name('dtype')} is {shown(dtype)}, expected one of {', '.join(_ITEM_BYTES)}")
    shape = tuple(fields.integers("shape"))
    if len(shape) > MAX_AXES:
        raise FormatError(f"{fields.name('shape')} has {len(shape)} axes, expected at most {MAX_AXES}")
    offsets = fields.integers("data_offsets")
    fields.close()
    expected = math.prod(shape) * _ITEM_BYTES[dtype]
    if len(offsets) != 2 or offsets[1] - offsets[0] != expected:
        raise FormatError(
            f"{fields.where}: data_offsets are {shown(offsets)}, expected a range of {shown(expected)} bytes "
            f"for shape {shown(list(shape))} of {dtype}"
        )
    return TensorEntry(name, dtype, shape, first + offsets[0], expected)


def read_header(fd: int, where: str) -> dict[str, TensorEntry]:
    """Read and check the header of an open safetensors file. Raises FormatError."""
    size = os.fstat(fd).st_size
    length = header_bytes(os.pread(fd, _LENGTH_BYTES, 0), size, where)
    header = os.pread(fd, length, _LENGTH_BYTES)
    if len(header) != length:
        raise FormatError(f"{where}: header has {len(header)} bytes, expected {length}: the file was cut")
    return parse_header(header, size, where)
