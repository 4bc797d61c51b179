"""Small containers made through formats alone: every kind of place in them, random finite weights."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from blake3 import blake3

from formats.checksum import BLAKE3, blocks, sha256, xxh3_64
from formats.config import DecoderConfig, Qwen3_5MoeConfig
from formats.dtypes import AnyArray, from_float32
from formats.encodings import Affine, Encoding, Plain
from formats.errors import FormatError
from formats.families import FAMILIES
from formats.family import LM_HEAD
from formats.index import INDEX_FILE, FileChecksum, Index, Source, SourceFile, canonical_json, index_to_bytes
from formats.layout import (
    BLOCK_BYTES,
    EMBEDDING_FILE,
    RESIDENT_FILE,
    LayerLayout,
    Layout,
    ResidentTensor,
    lay_out_embedding,
    layer_file,
    matrix_shape,
    place_resident,
)
from formats.record import LINEAR_BIAS, PartSpec, PlacedArray, lay_out_record
from tests.encodings import EVERY_ENCODING, random_arrays

HYBRID = Qwen3_5MoeConfig(
    model_type="qwen3_5_moe",
    vocab_size=100,
    hidden_size=128,
    num_hidden_layers=4,
    max_position_embeddings=512,
    rms_norm_eps=1e-6,
    tie_word_embeddings=False,
    layer_types=("linear_attention", "linear_attention", "linear_attention", "full_attention"),
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=32,
    rotary_dim=8,
    rope_theta=10000.0,
    rope_scaling=None,
    num_experts=3,
    top_k=2,
    moe_intermediate_size=64,
    shared_expert_intermediate_size=64,
    linear_num_key_heads=1,
    linear_num_value_heads=2,
    linear_key_head_dim=16,
    linear_value_head_dim=16,
    linear_value_heads_tiled=False,
    linear_conv_kernel_dim=4,
    linear_in_proj_grouped=False,
    linear_in_proj_ba_grouped=False,
)
MODEL = DecoderConfig(
    model_type="gpt_oss",
    vocab_size=2100,
    hidden_size=256,
    num_hidden_layers=5,
    max_position_embeddings=512,
    rms_norm_eps=1e-6,
    tie_word_embeddings=False,
    layer_types=("full_attention",) * 5,
    num_attention_heads=8,
    num_key_value_heads=2,
    head_dim=32,
    rotary_dim=32,
    rope_theta=10000.0,
    rope_scaling=None,
    num_experts=3,
    top_k=2,
    moe_intermediate_size=64,
    attention_multiplier=0.2,
    mlp_layer_types=("sparse", "sparse", "dense", "sparse", "dense"),
    intermediate_size=256,
)
AFFINE4 = Affine(4, 64, "bf16")
AFFINE8 = Affine(8, 32, "f16")
# Of gate, up and down by layer; None is a dense layer.
EXPERTS: tuple[tuple[Encoding, Encoding, Encoding] | None, ...] = (
    (AFFINE4, AFFINE4, AFFINE4),
    (Plain("bf16"), AFFINE8, Affine(4, 32, "bf16")),
    None,
    (Plain("f32"), Plain("f16"), Plain("bf16")),
    None,
)


def make_layout() -> Layout:
    """A layout with a dense layer, biases, a tensor of more than one block, and every kind of encoding."""
    D, F = MODEL.hidden_size, MODEL.moe_intermediate_size
    layers: list[LayerLayout | None] = []
    for i, encodings in enumerate(EXPERTS):
        if encodings is None:
            layers.append(None)
            continue
        shapes = {"gate": (F, D), "up": (F, D), "down": (D, F)}
        parts = zip(shapes.items(), encodings, strict=True)
        specs = [PartSpec(name, *shape, encoding, "bf16") for (name, shape), encoding in parts]
        layers.append(LayerLayout(layer_file(i), MODEL.num_experts, lay_out_record(specs)))
    table = lay_out_embedding(MODEL.vocab_size, MODEL.hidden_size, AFFINE4)
    return Layout(MODEL, tuple(layers), tuple(_resident()), table)


def _resident() -> Iterator[ResidentTensor]:
    """Each in the next encoding that it can have and no other has; the last ones in f32."""
    family, end = FAMILIES[MODEL.model_type], 0
    left = sorted(EVERY_ENCODING, key=lambda encoding: _fits(encoding, MODEL.hidden_size))  # wider ones first
    for at, tensor in (*family.resident(MODEL), ("", LM_HEAD)):
        shape = family.stored_shape(tensor, MODEL)
        encoding = next((encoding for encoding in left if _fits(encoding, shape[-1])), Plain("f32"))
        if encoding in left:
            left.remove(encoding)
        yield place_resident(at + tensor.name, shape, encoding, end)
        end += place_resident(at + tensor.name, shape, encoding, end).nbytes
    assert not left


def _fits(encoding: Encoding, columns: int) -> bool:
    try:
        return bool(encoding.arrays(1, columns))
    except FormatError:
        return False


def write_container(folder: Path, layout: Layout | None = None, **changes: Any) -> Index:
    """Write a container; `changes` replace fields of its index."""
    layout, rng = layout or make_layout(), np.random.default_rng(0)
    (folder / "experts").mkdir(parents=True, exist_ok=True)
    files, records, residents = {}, {}, {}
    files[EMBEDDING_FILE] = _write(folder, EMBEDDING_FILE, _embedding(layout, rng))
    resident = np.zeros(layout.resident_bytes, np.uint8)
    for tensor in layout.resident:
        content = resident[tensor.offset :][: tensor.nbytes]
        _fill(content, tensor.arrays, tensor.encoding, matrix_shape(tensor.shape), rng)
        residents[tensor.name] = tuple(
            xxh3_64(content[first : first + n]) for first, n in blocks(tensor.nbytes, BLOCK_BYTES)
        )
    files[RESIDENT_FILE] = _write(folder, RESIDENT_FILE, resident)
    for i, layer in layout.moe_layers():
        content = np.zeros((layer.num_experts, layer.record.record_bytes), np.uint8)
        for record in content:
            for part in layer.record.parts:
                _fill(record, part.arrays, part.encoding, (part.rows, part.columns), rng)
        records[i] = tuple(xxh3_64(record) for record in content)
        files[layer.file] = _write(folder, layer.file, content)
    small = {"generation_config.json": b'{"eos_token_id": 0}', "tokenizer.json": b"{}" * 50}
    for name, raw in small.items():
        (folder / name).write_bytes(raw)
    index = Index(
        layout=layout,
        source=Source("org/name", "0123abcd", (SourceFile("model.safetensors", 10, "0" * 64, "stated"),)),
        options={"bits": 4},
        written_by="a test",
        files={name: FileChecksum(len(raw), sha256(raw)) for name, raw in small.items()},
        data_files=files,
        record_checksums=records,
        block_checksums=residents,
        required_features=(BLAKE3,),
    )
    index = replace(index, **changes)
    (folder / INDEX_FILE).write_bytes(index_to_bytes(index))
    return index


def signed(content: dict[str, Any]) -> bytes:
    """The canonical bytes of a changed index with a checksum that is right: what a malicious writer makes."""
    rest = {key: value for key, value in content.items() if key != "checksum"}
    return canonical_json({**rest, "checksum": xxh3_64(canonical_json(rest))})


def _write(folder: Path, name: str, content: AnyArray) -> str:
    (folder / name).write_bytes(content.tobytes())
    return blake3(content.tobytes()).hexdigest()


def _values(shape: tuple[int, int], rng: np.random.Generator) -> "np.ndarray[Any, np.dtype[np.float32]]":
    return rng.standard_normal(shape, np.float32)


def _fill(
    buffer: AnyArray,
    arrays: Sequence[PlacedArray],
    encoding: Encoding,
    shape: tuple[int, int],
    rng: np.random.Generator,
) -> None:
    encoded = random_arrays(encoding, *shape, rng)
    for array in arrays:
        if array.name == LINEAR_BIAS:
            array.view(buffer)[:] = from_float32(_values((1, shape[0]), rng)[0], array.dtype)
        else:
            array.view(buffer)[:] = encoded[array.name]


def _embedding(layout: Layout, rng: np.random.Generator) -> AnyArray:
    embedding = layout.embedding
    content = np.zeros(embedding.nbytes, np.uint8)
    rows = content[: embedding.rows * embedding.row_bytes].reshape(embedding.rows, embedding.row_bytes)
    encoded = random_arrays(embedding.encoding, embedding.rows, embedding.columns, rng)
    for array in embedding.arrays:
        raw = np.ascontiguousarray(encoded[array.name]).view(np.uint8).reshape(embedding.rows, array.nbytes)
        rows[:, array.offset : array.offset + array.nbytes] = raw
    embedding.seal(0, rows)
    return content
