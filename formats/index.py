"""The index of a container as dataclasses, and its one canonical text (FORMAT.md, Index)."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from formats.checksum import BLAKE3, SHA256, xxh3_64
from formats.config import model_facts
from formats.encodings import encoding_to_json
from formats.layout import (
    BLOCK_BYTES,
    RESIDENT_FILE,
    EmbeddingLayout,
    LayerLayout,
    Layout,
    ResidentTensor,
)
from formats.record import ARRAY_ALIGNMENT, PAGE_BYTES, PlacedArray

INDEX_FILE = "index.json"
FORMAT_NAME = "streaming-experts"
FORMAT_VERSION = 1
REHEARSAL = "rehearsal"  # extension of a container whose weights are made up: {"seed": n}
NGRAMS = "ngrams"  # a required feature: an embedding of n-grams beside that of tokens
PROOFS = ("computed", "stated", "ranges", "none")  # what a source file's hash is worth, see FORMAT.md


@dataclass(frozen=True)
class SourceFile:
    """A file that the container was made from; sha256 is None exactly when proof is `none`."""

    name: str
    nbytes: int
    sha256: str | None
    proof: str


@dataclass(frozen=True)
class Source:
    """Where the weights came from; repository and revision only for a hub repository, never a local path."""

    repository: str | None
    revision: str | None
    files: tuple[SourceFile, ...]


@dataclass(frozen=True)
class FileChecksum:
    """Length and SHA-256 of a whole file."""

    nbytes: int
    sha256: str


@dataclass(frozen=True)
class Index:
    """All that index.json says. `options` and `extensions` are JSON objects that readers do not look into."""

    layout: Layout
    source: Source
    options: Mapping[str, Any]
    written_by: str
    files: Mapping[str, FileChecksum]  # small files by name
    data_files: Mapping[str, str]  # `data_hash` of resident, embedding and layer files by name
    record_checksums: Mapping[int, tuple[str, ...]]  # XXH3-64 per expert, by layer
    block_checksums: Mapping[str, tuple[str, ...]]  # XXH3-64 per 1 MiB block, by resident tensor
    required_features: tuple[str, ...] = ()
    extensions: Mapping[str, Any] = field(default_factory=dict)

    @property
    def data_hash(self) -> str:
        """The name of the hash of data files, and of its field."""
        return data_hash(self.required_features)


def data_hash(required_features: tuple[str, ...]) -> str:
    """The name of the hash of data files: containers from before `blake3` was a feature have SHA-256."""
    return BLAKE3 if BLAKE3 in required_features else SHA256


def index_to_bytes(index: Index) -> bytes:
    """The one canonical text of an index: sorted keys, indent 1, ASCII, its own checksum, a last newline."""
    content = _to_json(index)
    content["checksum"] = xxh3_64(canonical_json(content))
    return canonical_json(content)


def canonical_json(content: Any) -> bytes:
    """The bytes that a JSON value has in an index and under its checksum."""
    return json.dumps(content, sort_keys=True, indent=1, allow_nan=False).encode("ascii") + b"\n"


def _to_json(index: Index) -> dict[str, Any]:
    layout = index.layout
    ngrams = {} if layout.ngrams is None else {NGRAMS: _embedding_to_json(layout.ngrams, index)}
    return {
        **ngrams,
        "format": FORMAT_NAME,
        "format_version": FORMAT_VERSION,
        "required_features": list(index.required_features),
        "extensions": dict(index.extensions),
        "page_bytes": PAGE_BYTES,
        "array_alignment": ARRAY_ALIGNMENT,
        "written_by": index.written_by,
        "options": dict(index.options),
        "source": source_to_json(index.source),
        "model": model_facts(layout.model),
        "files": [
            {"name": name, "bytes": file.nbytes, "sha256": file.sha256} for name, file in sorted(index.files.items())
        ],
        "embedding": _embedding_to_json(layout.embedding, index),
        "resident": _resident_to_json(layout, index),
        "layers": [None if layer is None else _layer_to_json(layer, index, i) for i, layer in enumerate(layout.layers)],
    }


def source_to_json(source: Source) -> dict[str, Any]:
    """The index's form of a source."""
    return {
        "repository": source.repository,
        "revision": source.revision,
        "files": [
            {"name": file.name, "bytes": file.nbytes, "sha256": file.sha256, "proof": file.proof}
            for file in source.files
        ],
    }


def _embedding_to_json(embedding: EmbeddingLayout, index: Index) -> dict[str, Any]:
    return {
        "file": embedding.file,
        "bytes": embedding.nbytes,
        index.data_hash: index.data_files[embedding.file],
        "rows": embedding.rows,
        "columns": embedding.columns,
        "row_bytes": embedding.row_bytes,
        "encoding": encoding_to_json(embedding.encoding),
        "arrays": _arrays_to_json(embedding.arrays),
        "checksum_offset": embedding.checksum_offset,
    }


def _resident_to_json(layout: Layout, index: Index) -> dict[str, Any]:
    return {
        "file": RESIDENT_FILE,
        "bytes": layout.resident_bytes,
        index.data_hash: index.data_files[RESIDENT_FILE],
        "block_bytes": BLOCK_BYTES,
        "tensors": [_tensor_to_json(tensor, index) for tensor in layout.resident],
    }


def _tensor_to_json(tensor: ResidentTensor, index: Index) -> dict[str, Any]:
    return {
        "name": tensor.name,
        "shape": list(tensor.shape),
        "encoding": encoding_to_json(tensor.encoding),
        "offset": tensor.offset,
        "bytes": tensor.nbytes,
        "arrays": _arrays_to_json(tensor.arrays),
        "checksums": list(index.block_checksums[tensor.name]),
    }


def _layer_to_json(layer: LayerLayout, index: Index, i: int) -> dict[str, Any]:
    return {
        "file": layer.file,
        "bytes": layer.nbytes,
        index.data_hash: index.data_files[layer.file],
        "num_experts": layer.num_experts,
        "record_bytes": layer.record.record_bytes,
        "parts": [
            {
                "name": part.name,
                "rows": part.rows,
                "columns": part.columns,
                "encoding": encoding_to_json(part.encoding),
                "linear_bias": part.linear_bias,
                "arrays": _arrays_to_json(part.arrays),
            }
            for part in layer.record.parts
        ],
        "checksums": list(index.record_checksums[i]),
    }


def _arrays_to_json(arrays: tuple[PlacedArray, ...]) -> list[dict[str, Any]]:
    return [
        {"name": a.name, "dtype": a.dtype, "shape": list(a.shape), "offset": a.offset, "bytes": a.nbytes}
        for a in arrays
    ]
