"""index.json -> Index: every field is checked, what is unknown is refused by name (FORMAT.md, Refusals)."""

import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from formats.checksum import BLAKE3, num_blocks, xxh3_64
from formats.config import ModelConfig, read_model_facts
from formats.dtypes import DTYPES, FLOAT_DTYPES
from formats.encodings import ArraySpec, Encoding, encoding_from_json, encoding_to_json
from formats.errors import ChecksumError, FormatError, UnsupportedError
from formats.expected import check_layout
from formats.fields import Fields, parse_json, shown
from formats.index import (
    FORMAT_NAME,
    FORMAT_VERSION,
    INDEX_FILE,
    NGRAMS,
    PROOFS,
    FileChecksum,
    Index,
    Source,
    SourceFile,
    canonical_json,
    data_hash,
)
from formats.layout import (
    BLOCK_BYTES,
    EMBEDDING_FILE,
    NGRAM_FILE,
    RESIDENT_FILE,
    EmbeddingLayout,
    LayerLayout,
    Layout,
    ResidentTensor,
    lay_out_embedding,
    layer_file,
    matrix_shape,
)
from formats.record import (
    ARRAY_ALIGNMENT,
    LINEAR_BIAS,
    PAGE_BYTES,
    Part,
    PlacedArray,
    RecordLayout,
)

MAX_INDEX_BYTES = 1 << 28
MAX_BYTES = 1 << 50  # of any file or offset
MAX_LENGTH = 1 << 31  # of any axis
MAX_AXES = 4
FEATURES = (BLAKE3, NGRAMS)  # names in required_features that this version knows
_SMALL_FILE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,99}")


class _Embedding(NamedTuple):
    layout: EmbeddingLayout
    digest: str


class _Resident(NamedTuple):
    tensors: tuple[ResidentTensor, ...]
    digest: str
    checksums: dict[str, tuple[str, ...]]  # by tensor


class _Layer(NamedTuple):
    layout: LayerLayout
    digest: str
    checksums: tuple[str, ...]


def index_from_bytes(raw: bytes, where: str = INDEX_FILE) -> Index:
    """Read and validate an index.

    Raises FormatError for anything malformed, ChecksumError when it is not the bytes that were written,
    UnsupportedError for a version, feature or encoding of a later version. All name file and field.
    """
    if len(raw) > MAX_INDEX_BYTES:
        raise FormatError(f"{where}: is {len(raw)} bytes long, expected at most {MAX_INDEX_BYTES}")
    content = parse_json(raw, where)
    root = Fields(content, where)
    _expect(root, "format", FORMAT_NAME)
    version = root.integer("format_version")
    if version != FORMAT_VERSION:
        raise UnsupportedError(f"{root.name('format_version')} is {version}, expected {FORMAT_VERSION}")
    features = tuple(root.strings("required_features"))
    for feature in features:
        if feature not in FEATURES:
            raise UnsupportedError(f"{root.name('required_features')} holds {shown(feature)}, unknown to this version")
    stated = root.hexadecimal("checksum", 16)
    found = xxh3_64(canonical_json({key: value for key, value in content.items() if key != "checksum"}))
    if stated != found:
        raise ChecksumError(f"{root.name('checksum')} is {stated}, but the content gives {found}: it was changed")
    if canonical_json(content) != raw:
        raise ChecksumError(f"{where}: is not in the canonical form of its content: it was changed")
    return _read_index(root, features)


def _read_index(root: Fields, features: tuple[str, ...]) -> Index:
    _expect(root, "page_bytes", PAGE_BYTES)
    _expect(root, "array_alignment", ARRAY_ALIGNMENT)
    model = read_model_facts(root.object("model"))
    hash_name = data_hash(features)
    embedding = _read_embedding(
        root.object("embedding"), hash_name, EMBEDDING_FILE, model.vocab_size, model.hidden_size
    )
    tables = [embedding]
    if (NGRAMS in features) != (model.ngram_table is not None):
        raise FormatError(
            f"{root.name('required_features')} is {list(features)}, expected {NGRAMS} exactly for models that have them"
        )
    if model.ngram_table is not None:
        tables.append(_read_embedding(root.object(NGRAMS), hash_name, NGRAM_FILE, *model.ngram_table))
    resident = _read_resident(root.object("resident"), hash_name)
    layers = _read_layers(root, hash_name, model)
    present = {i: layer for i, layer in enumerate(layers) if layer is not None}
    index = Index(
        layout=Layout(
            model,
            tuple(None if layer is None else layer.layout for layer in layers),
            resident.tensors,
            *(table.layout for table in tables),
        ),
        source=_read_source(root.object("source")),
        options=root.mapping("options"),
        written_by=root.label("written_by"),
        files=dict(_read_files(root)),
        data_files={
            **{table.layout.file: table.digest for table in tables},
            RESIDENT_FILE: resident.digest,
            **{layer.layout.file: layer.digest for layer in present.values()},
        },
        record_checksums={i: layer.checksums for i, layer in present.items()},
        block_checksums=resident.checksums,
        required_features=features,
        extensions=root.mapping("extensions"),
    )
    root.close()
    check_layout(index.layout, root.where)
    return index


def _read_source(fields: Fields) -> Source:
    source = Source(
        repository=fields.nullable("repository", fields.label),
        revision=fields.nullable("revision", fields.label),
        files=tuple(_read_source_file(entry) for entry in fields.objects("files")),
    )
    fields.close()
    return source


def _read_source_file(fields: Fields) -> SourceFile:
    name, nbytes = fields.label("name"), fields.integer("bytes", 0, MAX_BYTES)
    proof = fields.string("proof")
    if proof not in PROOFS:
        raise fields.wrong("proof", f"one of {', '.join(PROOFS)}")
    sha256 = fields.nullable("sha256", lambda key: fields.hexadecimal(key, 64))
    if (sha256 is None) != (proof == "none"):
        raise fields.wrong("sha256", f"null exactly when proof is none, and proof is {proof}")
    fields.close()
    return SourceFile(name, nbytes, sha256, proof)


def _read_files(root: Fields) -> Iterator[tuple[str, FileChecksum]]:
    seen = {INDEX_FILE, EMBEDDING_FILE, NGRAM_FILE, RESIDENT_FILE}
    for entry in root.objects("files"):
        name = entry.string("name")
        if not _SMALL_FILE.fullmatch(name) or name in seen:
            raise entry.wrong("name", "the name of a file in this folder, once")
        seen.add(name)
        yield name, FileChecksum(entry.integer("bytes", 0, MAX_INDEX_BYTES), entry.hexadecimal("sha256", 64))
        entry.close()


def _read_embedding(fields: Fields, hash_name: str, file: str, rows: int, columns: int) -> _Embedding:
    _expect(fields, "rows", rows)
    _expect(fields, "columns", columns)
    encoding = encoding_from_json(fields.object("encoding"))
    arrays = _read_arrays(fields)
    _encoding_arrays(fields, encoding, 1, columns)
    layout = lay_out_embedding(rows, columns, encoding, file)
    if arrays != layout.arrays:
        raise FormatError(
            f"{fields.name('arrays')} are not those of one row in {encoding_to_json(encoding)}, as FORMAT.md "
            "places them"
        )
    _expect(fields, "checksum_offset", layout.checksum_offset)
    _expect(fields, "row_bytes", layout.row_bytes)
    _expect(fields, "file", file)
    _expect(fields, "bytes", layout.nbytes)
    stated = fields.hexadecimal(hash_name, 64)
    fields.close()
    return _Embedding(layout, stated)


def _read_resident(fields: Fields, hash_name: str) -> _Resident:
    _expect(fields, "file", RESIDENT_FILE)
    _expect(fields, "block_bytes", BLOCK_BYTES)
    tensors: list[ResidentTensor] = []
    checksums: dict[str, tuple[str, ...]] = {}
    end = 0
    for entry in fields.objects("tensors"):
        tensor = _read_tensor(entry, end)
        if tensor.name in checksums:
            raise entry.wrong("name", "a name that no other tensor has")
        checksums[tensor.name] = entry.hexadecimals("checksums", 16, num_blocks(tensor.nbytes, BLOCK_BYTES))
        entry.close()
        tensors.append(tensor)
        end += tensor.nbytes
    _expect(fields, "bytes", end)
    stated = fields.hexadecimal(hash_name, 64)
    fields.close()
    return _Resident(tuple(tensors), stated, checksums)


def _read_tensor(fields: Fields, offset: int) -> ResidentTensor:
    name, shape = fields.label("name"), _read_shape(fields)
    encoding = encoding_from_json(fields.object("encoding"))
    _expect(fields, "offset", offset)
    nbytes = fields.integer("bytes", PAGE_BYTES, MAX_BYTES)
    if nbytes % PAGE_BYTES:
        raise fields.wrong("bytes", f"a multiple of {PAGE_BYTES}")
    arrays = _read_arrays(fields)
    _check_arrays(fields, arrays, _encoding_arrays(fields, encoding, *matrix_shape(shape)), nbytes)
    return ResidentTensor(name, shape, encoding, offset, nbytes, arrays)


def _read_layers(root: Fields, hash_name: str, model: ModelConfig) -> list[_Layer | None]:
    entries = root.items("layers")
    if len(entries) != model.num_hidden_layers:
        raise FormatError(f"{root.name('layers')} has {len(entries)} entries, expected {model.num_hidden_layers}")
    return [
        None if entry is None else _read_layer(Fields(entry, f"{root.name('layers')}[{i}]"), hash_name, i, model)
        for i, entry in enumerate(entries)
    ]


def _read_layer(fields: Fields, hash_name: str, i: int, model: ModelConfig) -> _Layer:
    _expect(fields, "file", layer_file(i))
    _expect(fields, "num_experts", model.num_experts)
    record_bytes = fields.integer("record_bytes", PAGE_BYTES, MAX_BYTES)
    if record_bytes % PAGE_BYTES:
        raise fields.wrong("record_bytes", f"a multiple of {PAGE_BYTES}")
    _expect(fields, "bytes", model.num_experts * record_bytes)
    entries = fields.items("parts")
    if len(entries) != len(model.expert_parts):
        raise FormatError(f"{fields.name('parts')} has {len(entries)} entries, expected {len(model.expert_parts)}")
    parts: list[Part] = []
    end = 0
    for entry, name in zip(fields.objects("parts"), model.expert_parts, strict=True):
        parts.append(_read_part(entry, name, end, record_bytes))
        end = parts[-1].arrays[-1].offset + parts[-1].arrays[-1].nbytes
    stated = fields.hexadecimal(hash_name, 64)
    checksums = fields.hexadecimals("checksums", 16, model.num_experts)
    fields.close()
    return _Layer(
        LayerLayout(layer_file(i), model.num_experts, RecordLayout(record_bytes, tuple(parts))),
        stated,
        checksums,
    )


def _read_part(fields: Fields, name: str, start: int, record_bytes: int) -> Part:
    _expect(fields, "name", name)
    rows, columns = fields.integer("rows", 1, MAX_LENGTH), fields.integer("columns", 1, MAX_LENGTH)
    encoding = encoding_from_json(fields.object("encoding"))
    expected = list(_encoding_arrays(fields, encoding, rows, columns))
    linear_bias = fields.nullable("linear_bias", fields.string)
    if linear_bias is not None:
        if linear_bias not in FLOAT_DTYPES:
            raise fields.wrong("linear_bias", f"null or one of {', '.join(FLOAT_DTYPES)}")
        expected.append(ArraySpec(LINEAR_BIAS, linear_bias, (rows,)))
    arrays = _read_arrays(fields)
    _check_arrays(fields, arrays, expected, record_bytes, start)
    fields.close()
    return Part(name, rows, columns, encoding, linear_bias, arrays)


def _read_arrays(fields: Fields) -> tuple[PlacedArray, ...]:
    arrays = []
    for entry in fields.objects("arrays"):
        placed = PlacedArray(
            entry.string("name"),
            _read_dtype(entry),
            _read_shape(entry),
            entry.integer("offset", 0, MAX_BYTES),
        )
        _expect(entry, "bytes", placed.nbytes)
        entry.close()
        arrays.append(placed)
    return tuple(arrays)


def _read_dtype(fields: Fields) -> str:
    dtype = fields.string("dtype")
    if dtype not in DTYPES:
        raise UnsupportedError(f"{fields.name('dtype')} is {shown(dtype)}, expected one of {', '.join(DTYPES)}")
    return dtype


def _read_shape(fields: Fields) -> tuple[int, ...]:
    shape = tuple(fields.integers("shape", 1, MAX_LENGTH))
    if not 1 <= len(shape) <= MAX_AXES:
        raise fields.wrong("shape", f"1 to {MAX_AXES} axes")
    return shape


def _encoding_arrays(fields: Fields, encoding: Encoding, rows: int, columns: int) -> tuple[ArraySpec, ...]:
    try:
        return encoding.arrays(rows, columns)
    except FormatError as error:
        raise FormatError(f"{fields.name('encoding')}: {error}") from None


def _check_arrays(
    fields: Fields, arrays: Sequence[PlacedArray], expected: Sequence[ArraySpec], total: int, end: int = 0
) -> None:
    """Arrays are those of the encoding, aligned, in order, and lie between bytes `end` and `total`."""
    if [tuple(spec) for spec in expected] != [(a.name, a.dtype, a.shape) for a in arrays]:
        wanted = ", ".join(f"{spec.name} {spec.dtype} {list(spec.shape)}" for spec in expected)
        raise FormatError(f"{fields.name('arrays')} are not those of the encoding, expected {wanted}")
    for array in arrays:
        if array.offset % ARRAY_ALIGNMENT or array.offset < end or array.offset + array.nbytes > total:
            raise FormatError(
                f"{fields.name('arrays')}: {array.name} has offset {array.offset}, expected a multiple of "
                f"{ARRAY_ALIGNMENT} from {end} to {total - array.nbytes}"
            )
        end = array.offset + array.nbytes


def _expect(fields: Fields, key: str, value: str | int) -> None:
    found: Any = fields.string(key) if isinstance(value, str) else fields.integer(key, 0, MAX_BYTES)
    if found != value:
        raise fields.wrong(key, repr(value) if isinstance(value, int) else value)
