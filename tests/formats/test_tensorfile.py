"""Headers of safetensors files: the library's own files are read, every lie is refused with its line."""

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.numpy import save

from formats.errors import FormatError, UnsupportedError
from formats.tensorfile import MAX_HEADER_BYTES, TensorEntry, header_bytes, parse_header, read_header
from tests.refusals import result_or_line


def write(path: Path, header: bytes | dict[str, Any], data: bytes = b"", length: int | None = None) -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + data)
    return path


def read(path: Path) -> dict[str, TensorEntry]:
    with path.open("rb") as file:
        return read_header(file.fileno(), path.name)


def tensor(dtype: str, shape: list[Any], start: int, stop: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


def test_a_file_of_the_library_is_read_as_it_was_written(tmp_path: Path) -> None:
    tensors: dict[str, np.ndarray[Any, np.dtype[Any]]] = {
        "b": np.arange(6, dtype=np.float32).reshape(2, 3),
        "a": np.arange(5, dtype=np.uint8),
        "empty": np.zeros((0, 4), np.float16),
        "scalar": np.array(7.0),
    }
    path = tmp_path / "model.safetensors"
    path.write_bytes(save(tensors, metadata={"format": "pt"}))
    raw, found = path.read_bytes(), read(path)
    assert found.keys() == tensors.keys()
    for name, entry in found.items():
        assert entry.shape == tensors[name].shape
        assert raw[entry.offset : entry.offset + entry.nbytes] == tensors[name].tobytes()


ONE = tensor("F32", [2], 0, 8)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ([], "header is \\[\\], expected an object"),
        ({"a": 3}, "a: is 3, expected an object"),
        ({"a": {}}, "a.dtype is missing"),
        ({"a": {**ONE, "x": 1}}, "a.x is unknown to this version"),
        ({"a": {**ONE, "shape": "2"}}, "a.shape is 2, expected a list"),
        ({"a": tensor("F32", [-2], 0, 8)}, "a.shape is \\[-2\\], expected a list of integers from 0"),
        ({"a": tensor("F32", [2.0], 0, 8)}, "a.shape is \\[2.0\\], expected a list of integers"),
        ({"a": tensor("F32", [2**60], 0, 8)}, "a.shape is .*, expected a list of integers"),
        ({"a": tensor("F32", [2**32, 2**32, 2**32], 0, 8)}, "expected a range of 316912650057057350374175801344"),
        ({"a": tensor("F32", [1] * 17, 0, 4)}, "a.shape has 17 axes, expected at most 16"),
        ({"a": tensor("F32", [2**52] * 5000, 0, 4)}, "a.shape has 5000 axes, expected at most 16"),
        ({"a": tensor("F32", [2], 0, 4)}, "data_offsets are \\[0, 4\\], expected a range of 8 bytes"),
        ({"a": tensor("F32", [2], 8, 0)}, "data_offsets are \\[8, 0\\], expected a range of 8 bytes"),
        ({"a": {**ONE, "data_offsets": [0]}}, "data_offsets are \\[0\\], expected a range of 8 bytes"),
        ({"a": tensor("F32", [2], -8, 0)}, "data_offsets is \\[-8, 0\\], expected a list of integers from 0"),
        ({"a": tensor("F32", [2], 4, 12)}, "a begins at byte .* and leaves a gap after the tensor before it"),
        ({"a": ONE, "b": tensor("F32", [2], 4, 12)}, "b begins at byte .* and overlaps the tensor before it"),
        ({"a": ONE, "b": ONE}, "overlaps"),
        ({"a": tensor("F32", [4], 0, 16)}, "is .* bytes long, its header says .*: the file was cut"),
        ({"a": tensor("F32", [2**40], 0, 2**42)}, "the file was cut"),
        ({"a": tensor("F32", [1], 0, 4)}, "it holds bytes that no tensor claims"),
        ({}, "it holds bytes that no tensor claims"),
        (b'{"a": 1, "a": 2}', "key a stands twice"),
        (b'{"a": {"dtype": "F32", "dtype": "F16"}}', "key dtype stands twice"),
        (b'{"a": NaN}', "holds NaN"),
        (b"{", "is not valid JSON"),
        (b"", "is not valid JSON"),
        (b"\xff\xfe", "is not valid JSON"),
        (b'{"a":' * 3000 + b"1" + b"}" * 3000, "nested deeper|is not valid JSON"),
    ],
)
def test_a_lying_header_is_refused_with_its_line(tmp_path: Path, header: Any, message: str) -> None:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path = write(tmp_path / "bad.safetensors", raw, bytes(8))
    with pytest.raises(FormatError, match=f"bad.safetensors: {message}|bad.safetensors: .*{message}") as caught:
        read(path)
    assert len(str(caught.value).splitlines()) == 1
    assert len(str(caught.value)) < 400


def test_an_unknown_dtype_is_refused_by_name(tmp_path: Path) -> None:
    path = write(tmp_path / "bad.safetensors", {"a": tensor("F4_E2M1", [2], 0, 1)}, b"\0")
    with pytest.raises(UnsupportedError, match=r"bad.safetensors: a.dtype is F4_E2M1, expected one of BOOL, U8"):
        read(path)


@pytest.mark.parametrize("size", [0, 1, 7])
def test_an_empty_or_tiny_file_is_refused(tmp_path: Path, size: int) -> None:
    path = tmp_path / "tiny.safetensors"
    path.write_bytes(bytes(size))
    with pytest.raises(FormatError, match=f"tiny.safetensors: is {size} bytes long, too short"):
        read(path)


def test_a_cut_file_is_refused(tmp_path: Path) -> None:
    whole = save({"a": np.zeros(100, np.float32)})
    path = tmp_path / "cut.safetensors"
    for size in (8, 20, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(FormatError, match=r"cut.safetensors: .*(but the file has|the file was cut)"):
            read(path)


def test_a_file_that_is_too_long_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "long.safetensors"
    path.write_bytes(save({"a": np.zeros(100, np.float32)}) + b"\0")
    with pytest.raises(FormatError, match="it holds bytes that no tensor claims"):
        read(path)


@pytest.mark.parametrize("length", [100, 2**40, 2**63, 2**64 - 1, MAX_HEADER_BYTES + 1])
def test_a_header_length_that_cannot_be_is_refused_before_it_is_used(tmp_path: Path, length: int) -> None:
    path = write(tmp_path / "bad.safetensors", b"{}", length=length)
    with pytest.raises(FormatError, match=f"bad.safetensors: header length is {length}"):
        read(path)


NAMES = st.sampled_from(["a", "b", "__metadata__", "\n", ""])
NUMBERS = st.integers(-4, 40) | st.integers() | st.none() | st.floats(allow_nan=False, allow_infinity=False)
ENTRIES = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "U8", "X", ""]) | st.none(),
        "shape": st.lists(NUMBERS, max_size=4),
        "data_offsets": st.lists(NUMBERS, max_size=3),
    },
    optional={"x": st.none()},
)
ALMOST_HEADERS = st.dictionaries(NAMES, ENTRIES | st.none(), max_size=4).map(lambda h: json.dumps(h).encode())


@given(st.binary(max_size=300) | ALMOST_HEADERS, st.integers(0, 400))
@example(b'{"a": {"dtype": "F32", "shape": [1e400], "data_offsets": [0, 4]}}', 80)
def test_any_header_gives_tensors_inside_the_file_or_one_line(header: bytes, data_bytes: int) -> None:
    file_bytes = 8 + len(header) + data_bytes
    entries, _ = result_or_line(parse_header, header, file_bytes, "x")
    if entries is None:
        return
    end = 8 + len(header)
    for entry in sorted(entries.values(), key=lambda entry: (entry.offset, entry.nbytes)):
        assert entry.offset == end
        end += entry.nbytes
    assert end == file_bytes


@given(st.binary(max_size=12), st.integers(0, 2**64))
def test_any_prefix_gives_a_length_inside_the_file_or_one_line(prefix: bytes, file_bytes: int) -> None:
    length, _ = result_or_line(header_bytes, prefix, file_bytes, "x")
    assert length is None or 0 <= length <= file_bytes - 8
