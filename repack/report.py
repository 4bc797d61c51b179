"""What `repack inspect` and `--dry-run` say, as plain data; repack/tables.py makes text of it.

All sizes are bytes. Numbers of a layout come from the layout alone, so that a plan and a container print the same.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from formats.budget import DEFAULT_CHUNK_SIZE, DEFAULT_CTX_SIZE, bits_per_weight, memory_terms, token_bytes
from formats.checksum import xxh3_64
from formats.container import Container, open_container
from formats.dtypes import FLOAT_DTYPES, AnyArray, to_float32
from formats.encodings import Encoding, encoding_label
from formats.encodings.packing import unpack_codes
from formats.errors import ChecksumError, RequestError
from formats.index import INDEX_FILE, REHEARSAL, source_to_json
from formats.layout import LayerLayout, Layout
from formats.origins import Origin, Origins, read_origins
from formats.record import PAGE_BYTES, PART_NAMES, Part, PlacedArray, RecordLayout

TOKENIZER_FILE = "tokenizer.json"
BLOCK_VALUES = 1 << 20  # looked at at a time
# Classes of resident tensors by the beginning of their name in a layer; the first that fits.
CLASSES = (
    ("linear_attn.norm", "norms"),
    ("attn_hyper_connection", "hyper-connections"),
    ("mlp_hyper_connection", "hyper-connections"),
    ("hyper_connection_mixer", "hyper-connections"),
    ("ple.", "n-gram layer"),
    ("self_attn.q_norm", "norms"),
    ("self_attn.k_norm", "norms"),
    ("self_attn.q_a_norm", "norms"),
    ("self_attn.kv_norm", "norms"),
    ("self_attn.q_a_layernorm", "norms"),
    ("self_attn.kv_a_layernorm", "norms"),
    ("mamba.norm", "norms"),
    ("linear_attn.", "linear attention"),
    ("mamba.", "Mamba2"),
    ("self_attn.", "attention"),
    ("mlp.shared_expert", "shared expert"),
    ("mlp.routed_expert_", "latent of experts"),
    ("self_attention_res", "attention residuals"),
    ("mlp_res", "attention residuals"),
    ("output_attn_res", "attention residuals"),
    ("mlp.gate_proj", "dense layers"),
    ("mlp.up_proj", "dense layers"),
    ("mlp.down_proj", "dense layers"),
    ("mlp.gate", "router"),
    ("router.", "router"),
    ("input_layernorm", "norms"),
    ("post_attention_layernorm", "norms"),
    ("pre_feedforward_layernorm", "norms"),
    ("post_feedforward_layernorm", "norms"),
    ("norm", "norms"),
    ("attn_hc.", "residual streams"),
    ("ffn_hc.", "residual streams"),
    ("hc_head.", "residual streams"),
    ("lm_head", "lm_head"),
)


def inspect(folder: Path, threads: int = 1) -> dict[str, Any]:
    """A container: where it comes from, and all that describe_layout says. Raises as open_container."""
    index = open_container(folder).index
    tokenizer = index.files.get(TOKENIZER_FILE)
    origins = read_origins(index.extensions, INDEX_FILE)
    return {
        "written_by": index.written_by,
        "source": source_to_json(index.source),
        "rehearsal": index.extensions.get(REHEARSAL),
        "options": dict(index.options),
        "files": {name: file.nbytes for name, file in index.files.items()},
        **describe_layout(index.layout, tokenizer.nbytes if tokenizer else 0, threads, origins),
    }


def describe_layout(
    layout: Layout, tokenizer_json_bytes: int | None, threads: int = 1, origins: Origins | None = None
) -> dict[str, Any]:
    """Sizes of a container that exists or is only planned, what its parts were made of, and what running it takes.

    tokenizer_json_bytes as of memory_terms: None where it is not known.
    """
    ctx_size = min(DEFAULT_CTX_SIZE, layout.model.max_position_embeddings)
    terms = memory_terms(
        layout,
        tokenizer_json_bytes=tokenizer_json_bytes,
        ctx_size=ctx_size,
        chunk_size=DEFAULT_CHUNK_SIZE,
        threads=threads,
    )
    parts = [*_expert_parts(layout, origins), *_resident_parts(layout, origins), *_embedding_parts(layout, origins)]
    payload = sum(part["bytes"] for part in parts)
    return {
        "model": _model(layout),
        "parts": parts,
        "padding_bytes": layout.total_bytes - payload,
        "experts_file_bytes": layout.expert_bytes,
        "resident_file_bytes": layout.resident_bytes,
        "embedding_file_bytes": sum(table.nbytes for table in layout.embeddings),
        "total_bytes": layout.total_bytes,
        "bits_per_weight": 8 * layout.total_bytes / sum(part["weights"] for part in parts),
        "records": _records(layout),
        "per_token": asdict(token_bytes(layout)),
        "memory": {
            "ctx_size": ctx_size,
            "chunk_size": DEFAULT_CHUNK_SIZE,
            "threads": threads,
            "terms": asdict(terms),
            "floor_bytes": terms.floor_bytes,
            "all_experts_bytes": terms.floor_bytes - terms.min_slots_bytes + layout.expert_bytes,
        },
    }


def _model(layout: Layout) -> dict[str, Any]:
    model = layout.model
    experts = [(layer.num_experts, layer.record.num_weights) for _, layer in layout.moe_layers()]
    resident = sum(math.prod(tensor.shape) for tensor in layout.resident)
    every = resident + sum(table.rows * table.columns for table in layout.embeddings)
    return {
        "model_type": model.model_type,
        "num_hidden_layers": model.num_hidden_layers,
        "moe_layers": len(experts),
        "num_experts": model.num_experts,
        "top_k": model.top_k,
        "hidden_size": model.hidden_size,
        "moe_intermediate_size": model.moe_intermediate_size,
        "vocab_size": model.vocab_size,
        "max_position_embeddings": model.max_position_embeddings,
        "weights": every + sum(num * weights for num, weights in experts),
        "weights_per_token": resident + sum(min(model.top_k, num) * weights for num, weights in experts),
    }


# ---- parts of a layout


class _Entry(NamedTuple):
    """Tensors of a part: those of one name, encoding and origin are added up."""

    name: str
    encoding: Encoding
    origin: Origin | None
    tensors: int
    weights: int
    nbytes: int


def _part(entry: _Entry) -> dict[str, Any]:
    origin = {} if entry.origin is None else {"source": entry.origin.encoding, "exact": entry.origin.exact}
    return {
        "part": entry.name,
        **origin,
        "encoding": encoding_label(entry.encoding),
        "tensors": entry.tensors,
        "weights": entry.weights,
        "bytes": entry.nbytes,
        "bits_per_weight": bits_per_weight(entry.nbytes, (entry.weights,)),
    }


def _summed(entries: Iterable[_Entry]) -> list[dict[str, Any]]:
    sums: dict[tuple[str, Encoding, Origin | None], tuple[int, ...]] = {}
    for name, encoding, origin, *counts in entries:
        before = sums.get((name, encoding, origin), (0, 0, 0))
        sums[name, encoding, origin] = tuple(a + b for a, b in zip(before, counts, strict=True))
    return [_part(_Entry(*key, *counts)) for key, counts in sums.items()]


def _payload(arrays: Iterable[PlacedArray]) -> int:
    return sum(array.nbytes for array in arrays)


def _expert_parts(layout: Layout, origins: Origins | None) -> list[dict[str, Any]]:
    def entries() -> Iterator[_Entry]:
        for i, layer in layout.moe_layers():
            of_layer = origins.experts.get(i, ()) if origins is not None else ()
            for part, origin in zip_longest(layer.record.parts, of_layer[: len(layer.record.parts)]):
                num, weights = layer.num_experts, part.rows * part.columns
                nbytes = num * _payload(part.arrays)
                yield _Entry(f"experts {part.name}", part.encoding, origin, num, num * weights, nbytes)

    return sorted(_summed(entries()), key=lambda part: PART_NAMES.index(part["part"].split()[1]))


def _resident_parts(layout: Layout, origins: Origins | None) -> list[dict[str, Any]]:
    known = origins.resident if origins is not None else {}
    entries = (
        _Entry(
            _class(tensor.name),
            tensor.encoding,
            known.get(tensor.name),
            1,
            math.prod(tensor.shape),
            _payload(tensor.arrays),
        )
        for tensor in layout.resident
    )
    return sorted(_summed(entries), key=lambda part: -part["bytes"])


def _class(name: str) -> str:
    words = name.split(".", 2)
    local = words[2] if words[0] == "layers" and len(words) == 3 else name
    return next((title for beginning, title in CLASSES if local.startswith(beginning)), "other")


def _embedding_parts(layout: Layout, origins: Origins | None) -> Iterator[dict[str, Any]]:
    known = (origins.embedding, origins.ngrams) if origins is not None else (None, None)
    for table, origin in zip(layout.embeddings, known, strict=False):
        name, nbytes = table.file.removesuffix(".bin"), table.rows * _payload(table.arrays)
        yield _part(_Entry(name, table.encoding, origin, 1, table.rows * table.columns, nbytes))


def _records(layout: Layout) -> list[dict[str, Any]]:
    """Layers whose records are laid out alike, together."""
    groups: dict[tuple[RecordLayout, int], list[int]] = {}
    for i, layer in layout.moe_layers():
        groups.setdefault((layer.record, layer.num_experts), []).append(i)
    return [
        {
            "layers": layers,
            "num_experts": num_experts,
            "record_bytes": record.record_bytes,
            "pages": record.record_bytes // PAGE_BYTES,
            "padding_bytes": record.record_bytes - record.payload_bytes,
            "bits_per_weight": bits_per_weight(record.record_bytes, (record.num_weights,)),
        }
        for (record, num_experts), layers in groups.items()
    ]


# ---- one expert


def inspect_expert(folder: Path, layer: int, expert: int) -> dict[str, Any]:
    """One record, read and checked: its arrays, their ranges, and how often each code stands.

    Raises RequestError for a layer or expert that is not there, ChecksumError naming both, and as open_container.
    """
    container = open_container(folder)
    layout = _layer(container, layer)
    if not 0 <= expert < layout.num_experts:
        raise RequestError(f"--expert is {expert}, expected 0 to {layout.num_experts - 1}")
    nbytes = layout.record.record_bytes
    record = _read_record(container, layer, expert, layout)
    return {
        "layer": layer,
        "expert": expert,
        "file": layout.file,
        "offset": expert * nbytes,
        "record_bytes": nbytes,
        "pages": nbytes // PAGE_BYTES,
        "padding_bytes": nbytes - layout.record.payload_bytes,
        "checksum": container.index.record_checksums[layer][expert],
        "parts": [_describe_part(part, record) for part in layout.record.parts],
    }


def _layer(container: Container, layer: int) -> LayerLayout:
    layers = container.index.layout.layers
    if not 0 <= layer < len(layers):
        raise RequestError(f"--layer is {layer}, expected 0 to {len(layers) - 1}")
    layout = layers[layer]
    if layout is None:
        raise RequestError(f"--layer is {layer}, which is dense and has no experts")
    return layout


def _read_record(container: Container, layer: int, expert: int, layout: LayerLayout) -> AnyArray:
    """uint8 [record_bytes]."""
    path, nbytes = container.data_path(layout.file), layout.record.record_bytes
    record = np.fromfile(path, np.uint8, count=nbytes, offset=expert * nbytes)
    found, expected = xxh3_64(record), container.index.record_checksums[layer][expert]
    if found != expected:
        raise ChecksumError(
            f"{path}: layer {layer}, expert {expert}: checksum is {found}, {INDEX_FILE} says {expected}"
        )
    return record


def _describe_part(part: Part, record: AnyArray) -> dict[str, Any]:
    nbytes = _payload(part.arrays)
    result = {
        **_part(_Entry(part.name, part.encoding, None, 1, part.rows * part.columns, nbytes)),
        "rows": part.rows,
        "columns": part.columns,
        "arrays": [_describe_array(array, array.view(record)) for array in part.arrays],
    }
    arrays = part.views(record)
    if "codes" in arrays:
        result["codes"] = _count_codes(arrays["codes"], part.encoding.bits)
    return result


def _describe_array(array: PlacedArray, values: AnyArray) -> dict[str, Any]:
    result: dict[str, Any] = {
        "array": array.name,
        "dtype": array.dtype,
        "shape": list(array.shape),
        "offset": array.offset,
        "bytes": array.nbytes,
    }
    if array.dtype in FLOAT_DTYPES:
        blocks = [to_float32(block, array.dtype) for block in _row_blocks(values)]
        result["min"] = float(min(block.min() for block in blocks))
        result["max"] = float(max(block.max() for block in blocks))
    return result


def _count_codes(codes: AnyArray, bits: int) -> list[int]:
    """How often each code stands: [2 ** bits]."""
    counts = np.zeros(1 << bits, np.int64)
    for words in _row_blocks(codes):
        counts += np.bincount(unpack_codes(words, bits).ravel(), minlength=len(counts))
    return [int(count) for count in counts]


def _row_blocks(values: AnyArray) -> Iterator[AnyArray]:
    """Blocks of whole rows of an array, so that what is made of them stays small."""
    step = max(1, BLOCK_VALUES * len(values) // values.size)
    return (values[first : first + step] for first in range(0, len(values), step))
