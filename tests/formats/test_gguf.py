"""GGUF headers: equal to what the gguf package reads, and refused when hostile."""

import math
import os
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf.constants import GGML_QUANT_SIZES

from formats.errors import FormatError, StreamingExpertsError, UnsupportedError
from formats.gguf import BLOCK_TYPES, MAX_ITEMS, GGUFHeader, read_gguf_header


def header_of(path: Path) -> GGUFHeader:
    with path.open("rb") as file:
        return read_gguf_header(lambda offset, n: os.pread(file.fileno(), n, offset), path.stat().st_size, "m.gguf")


def parse(raw: bytes) -> GGUFHeader:
    return read_gguf_header(lambda offset, n: raw[offset : offset + n], len(raw), "m.gguf")


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file by the gguf package: every kind of metadata value, and tensors of several types."""
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    writer = gguf.GGUFWriter(path, "qwen3moe")
    for name, value in (("uint8", 7), ("int8", -7), ("uint16", 700), ("int16", -700), ("uint32", 7 << 20)):
        getattr(writer, f"add_{name}")(f"a.{name}", value)
    writer.add_int32("a.int32", -(7 << 20))
    writer.add_uint64("a.uint64", 7 << 40)
    writer.add_int64("a.int64", -(7 << 40))
    writer.add_float32("a.float32", 0.1)
    writer.add_float64("a.float64", 0.1)
    writer.add_bool("a.bool", True)
    writer.add_string("a.string", "naïve ☃")
    writer.add_array("a.strings", ["one", "", "drei ☃"])
    writer.add_array("a.integers", [1, -2, 3])
    writer.add_array("a.floats", [0.5, -1.25])
    rng = np.random.default_rng(0)
    values = rng.standard_normal((3, 4, 256)).astype(np.float32)
    writer.add_tensor("plain", values)
    writer.add_tensor("half", values[0].astype(np.float16))
    for kind in (gguf.GGMLQuantizationType.Q4_0, gguf.GGMLQuantizationType.Q8_0, gguf.GGMLQuantizationType.BF16):
        writer.add_tensor(f"t.{kind.name}", gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_metadata_and_tensors_equal_those_that_the_gguf_package_reads(file: Path) -> None:
    header, reader = header_of(file), gguf.GGUFReader(file)
    expected = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    assert dict(header.metadata) == expected
    assert [
        (tensor.name, tensor.type, tensor.shape, tensor.offset, tensor.nbytes) for tensor in header.tensors.values()
    ] == [
        (tensor.name, tensor.tensor_type.name, tuple(tensor.shape.tolist()[::-1]), tensor.data_offset, tensor.n_bytes)
        for tensor in reader.tensors
    ]


def test_the_sizes_of_all_types_are_those_of_the_gguf_package() -> None:
    known = {int(kind): (kind.name, *sizes) for kind, sizes in GGML_QUANT_SIZES.items()}
    assert {number: known.get(number) for number in BLOCK_TYPES} == {n: tuple(t) for n, t in BLOCK_TYPES.items()}


def test_a_header_read_in_small_pieces_is_the_same(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = header_of(file)
    monkeypatch.setattr("formats.gguf._READ_BYTES", 1)
    assert header_of(file) == whole


def test_a_file_cut_anywhere_is_refused(file: Path) -> None:
    raw = file.read_bytes()
    for length in [*range(0, 900, 7), len(raw) - 1]:
        with pytest.raises(FormatError, match=r"^m\.gguf: "):
            parse(raw[:length])


def build(
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    num_tensors: int = 0,
    num_keys: int = 0,
    body: bytes = b"",
    data: bytes = b"",
) -> bytes:
    head = magic + struct.pack("<IQQ", version, num_tensors, num_keys) + body
    return head + b"\0" * (-len(head) % 32) + data


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def tensor(name: str = "t", shape: tuple[int, ...] = (32, 2), kind: int = 2, offset: int = 0) -> bytes:
    axes = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
    return text(name) + axes + struct.pack("<IQ", kind, offset)


def test_what_the_tests_build_is_read() -> None:
    header = parse(build(num_tensors=1, body=tensor(), data=bytes(36)))
    assert header.tensors["t"].shape == (2, 32)
    assert header.tensors["t"].nbytes == 36


@pytest.mark.parametrize(
    ("raw", "error", "message"),
    [
        (build(magic=b"GGML"), FormatError, "does not begin with GGUF"),
        (build(version=1), UnsupportedError, "version is 1, expected one of 2, 3"),
        (build(version=3 << 24), UnsupportedError, "big-endian"),
        (build(num_tensors=1 << 40), FormatError, f"tensor_count is {1 << 40}, expected at most"),
        (build(num_keys=1 << 63), FormatError, f"metadata_kv_count is {1 << 63}, expected at most"),
        (build(num_keys=1, body=struct.pack("<Q", 1 << 60)), FormatError, "length of a metadata key is"),
        (build(num_keys=1, body=text("k") + struct.pack("<I", 13)), FormatError, "k has value type 13"),
        (build(num_keys=1, body=text("k") + struct.pack("<IQ", 8, 1 << 50)), FormatError, "length of k is"),
        (
            build(num_keys=1, body=text("k") + struct.pack("<IIQ", 9, 4, MAX_ITEMS + 1)),
            FormatError,
            f"length of k is {MAX_ITEMS + 1}",
        ),
        (build(num_keys=1, body=text("k") + struct.pack("<IIQ", 9, 9, 1)), FormatError, "k has value type 9"),
        (build(num_keys=2, body=(text("k") + struct.pack("<IB", 0, 1)) * 2), FormatError, "key k stands twice"),
        (
            build(num_keys=1, body=text("general.alignment") + struct.pack("<II", 4, 48)),
            FormatError,
            "general.alignment is 48, expected a power of two",
        ),
        (build(num_tensors=1, body=tensor(shape=(1,) * 5)), FormatError, "number of axes of tensor t is 5"),
        (build(num_tensors=1, body=tensor(shape=(33, 2))), FormatError, "rows of 33, expected a multiple of 32"),
        (build(num_tensors=1, body=tensor(kind=99)), UnsupportedError, "tensor t has ggml type 99"),
        (build(num_tensors=1, body=tensor(offset=1), data=bytes(99)), FormatError, "offset 1, expected a multiple"),
        (build(num_tensors=1, body=tensor(offset=64), data=bytes(64)), FormatError, "the file was cut"),
        (build(num_tensors=2, body=tensor() * 2, data=bytes(99)), FormatError, "tensor t stands twice"),
        (build(num_tensors=2, body=tensor() + tensor("u"), data=bytes(99)), FormatError, "tensor u overlaps"),
        (build(num_tensors=1, body=struct.pack("<Q", 1) + b"\xff"), FormatError, "expected UTF-8"),
    ],
)
def test_a_hostile_header_is_refused_by_name(raw: bytes, error: type[StreamingExpertsError], message: str) -> None:
    with pytest.raises(error, match=r"^m\.gguf: ") as caught:
        parse(raw)
    assert message in str(caught.value)


def test_no_more_is_read_than_the_file_has_or_the_header_needs(file: Path) -> None:
    raw, asked = file.read_bytes(), []

    def read(offset: int, nbytes: int) -> bytes:
        asked.append(nbytes)
        return raw[offset : offset + nbytes]

    read_gguf_header(read, len(raw), "m.gguf")
    assert sum(asked) <= math.ceil(len(raw) / (1 << 20)) * (1 << 20)


def with_rope_freqs(folder: Path, values: np.ndarray) -> Path:
    path = folder / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama4")
    writer.add_tensor("rope_freqs.weight", values)
    writer.add_tensor("plain", np.ones(3, np.float32))
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        write()
    writer.close()
    return path


def test_what_slows_rotary_pairs_is_read_with_the_header(tmp_path: Path) -> None:
    header = header_of(with_rope_freqs(tmp_path, np.array([1, 1.5, 16], np.float32)))
    assert header.rope_factors == (1.0, 1.5, 16.0)
    assert list(header.tensors) == ["plain"]


@pytest.mark.parametrize(("shape", "dtype"), [((2, 3), np.float32), ((6,), np.float16), ((1 << 15,), np.float32)])
def test_what_slows_rotary_pairs_is_refused_where_it_is_no_small_vector(
    shape: tuple[int, ...], dtype: type, tmp_path: Path
) -> None:
    path = with_rope_freqs(tmp_path, np.ones(shape, dtype))
    with pytest.raises(FormatError, match=r"m.gguf: rope_freqs.weight is F.*, expected F32, a vector"):
        header_of(path)
