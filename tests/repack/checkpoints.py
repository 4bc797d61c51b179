"""Checkpoints for the tests of repack: names and shapes as Qwen3.5 publishes them, written sparse or with content."""

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from repack.sources.base import SourceTensor

Shapes = dict[str, tuple[str, tuple[int, ...]]]  # (safetensors dtype, shape) by name
ITEM_BYTES = {
    **dict.fromkeys(("BF16", "F16"), 2),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("U8", "I8", "F8_E4M3", "F8_E8M0"), 1),
}
PREFIX = "model.language_model."

# A model of one MiB that has everything: both kinds of layers, and widths that groups of 32 and 64 divide.
SMALL: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "layer_types": ["linear_attention", "full_attention"],
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 128,
    "num_experts": 5,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 64,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_conv_kernel_dim": 4,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25},
}

# The geometry of Qwen3.5-397B-A17B.
QWEN3_5_397B: dict[str, Any] = SMALL | {
    "vocab_size": 248320,
    "hidden_size": 4096,
    "num_hidden_layers": 60,
    "layer_types": (["linear_attention"] * 3 + ["full_attention"]) * 15,
    "num_attention_heads": 32,
    "num_key_value_heads": 2,
    "head_dim": 256,
    "max_position_embeddings": 262144,
    "num_experts": 512,
    "num_experts_per_tok": 10,
    "moe_intermediate_size": 1024,
    "shared_expert_intermediate_size": 1024,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 64,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000000.0, "partial_rotary_factor": 0.25},
}


def config_json(text: Mapping[str, Any], **outer: Any) -> bytes:
    """config.json around a text_config."""
    text_config = {"model_type": "qwen3_5_moe_text", **text}
    return json.dumps({"model_type": "qwen3_5_moe", "text_config": text_config, **outer}).encode()


def shapes(c: Mapping[str, Any], *, fused: bool = True, dtype: str = "BF16", prefix: str = PREFIX) -> Shapes:
    """Every tensor of a checkpoint of this text_config."""
    listing = {name: (dtype, shape) for name, shape in _names(c, prefix, fused)}
    return listing | {
        name: ("F32", shape)
        for name, (_, shape) in listing.items()
        if name.endswith(("A_log", "linear_attn.norm.weight"))
    }


def _names(c: Mapping[str, Any], prefix: str, fused: bool) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, inner, shared = c["hidden_size"], c["moe_intermediate_size"], c["shared_expert_intermediate_size"]
    heads, head_dim = c["num_attention_heads"], c["head_dim"]
    keys = c["linear_num_key_heads"] * c["linear_key_head_dim"]
    value_heads, value_dim = c["linear_num_value_heads"], c["linear_value_head_dim"]
    values = value_heads * value_dim
    yield "lm_head.weight", (c["vocab_size"], hidden)
    yield f"{prefix}embed_tokens.weight", (c["vocab_size"], hidden)
    yield f"{prefix}norm.weight", (hidden,)
    for i, layer_type in enumerate(c["layer_types"]):
        at = f"{prefix}layers.{i}"
        yield f"{at}.input_layernorm.weight", (hidden,)
        yield f"{at}.post_attention_layernorm.weight", (hidden,)
        if layer_type == "linear_attention":
            yield f"{at}.linear_attn.in_proj_qkv.weight", (2 * keys + values, hidden)
            yield f"{at}.linear_attn.in_proj_z.weight", (values, hidden)
            yield f"{at}.linear_attn.in_proj_a.weight", (value_heads, hidden)
            yield f"{at}.linear_attn.in_proj_b.weight", (value_heads, hidden)
            yield f"{at}.linear_attn.conv1d.weight", (2 * keys + values, 1, c["linear_conv_kernel_dim"])
            yield f"{at}.linear_attn.A_log", (value_heads,)
            yield f"{at}.linear_attn.dt_bias", (value_heads,)
            yield f"{at}.linear_attn.norm.weight", (value_dim,)
            yield f"{at}.linear_attn.out_proj.weight", (hidden, values)
        else:
            yield f"{at}.self_attn.q_proj.weight", (2 * heads * head_dim, hidden)
            yield f"{at}.self_attn.k_proj.weight", (c["num_key_value_heads"] * head_dim, hidden)
            yield f"{at}.self_attn.v_proj.weight", (c["num_key_value_heads"] * head_dim, hidden)
            yield f"{at}.self_attn.o_proj.weight", (hidden, heads * head_dim)
            yield f"{at}.self_attn.q_norm.weight", (head_dim,)
            yield f"{at}.self_attn.k_norm.weight", (head_dim,)
        yield f"{at}.mlp.gate.weight", (c["num_experts"], hidden)
        yield f"{at}.mlp.shared_expert.gate_proj.weight", (shared, hidden)
        yield f"{at}.mlp.shared_expert.up_proj.weight", (shared, hidden)
        yield f"{at}.mlp.shared_expert.down_proj.weight", (hidden, shared)
        yield f"{at}.mlp.shared_expert_gate.weight", (1, hidden)
        if fused:
            yield f"{at}.mlp.experts.gate_up_proj", (c["num_experts"], 2 * inner, hidden)
            yield f"{at}.mlp.experts.down_proj", (c["num_experts"], hidden, inner)
            continue
        for e in range(c["num_experts"]):
            yield f"{at}.mlp.experts.{e}.gate_proj.weight", (inner, hidden)
            yield f"{at}.mlp.experts.{e}.up_proj.weight", (inner, hidden)
            yield f"{at}.mlp.experts.{e}.down_proj.weight", (hidden, inner)


def source_tensors(listing: Shapes, file: str = "model.safetensors") -> dict[str, SourceTensor]:
    """What a source of one shard says about these tensors; nothing is written."""
    entries = safetensors_header(listing)
    return {
        name: SourceTensor(name, file, dtype, shape, entries[name]["data_offsets"][0], _nbytes(dtype, shape))
        for name, (dtype, shape) in listing.items()
    }


def safetensors_header(listing: Shapes) -> dict[str, Any]:
    """The header of a file that holds the tensors in this order."""
    header, end = {}, 0
    for name, (dtype, shape) in listing.items():
        nbytes = _nbytes(dtype, shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + nbytes]}
        end += nbytes
    return header


def _nbytes(dtype: str, shape: tuple[int, ...]) -> int:
    return ITEM_BYTES[dtype] * math.prod(shape)


def write_shard(path: Path, listing: Shapes, content: npt.NDArray[np.uint8] | None = None) -> None:
    """Write a safetensors file: sparse, so all zeros, unless there is content."""
    header = safetensors_header(listing)
    raw = json.dumps(header).encode()
    total = max((entry["data_offsets"][1] for entry in header.values()), default=0)
    with open(path, "wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        if content is None:
            file.truncate(8 + len(raw) + total)
        else:
            assert content.nbytes == total
            file.write(content.data)


def write_sparse(folder: Path, text: Mapping[str, Any], listing: Shapes, **outer: Any) -> Path:
    """A checkpoint of zeros in one sparse shard."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_bytes(config_json(text, **outer))
    write_shard(folder / "model.safetensors", listing)
    return folder


def write_random(
    folder: Path, text: Mapping[str, Any], listing: Shapes, *, shards: int = 1, seed: int = 0, **outer: Any
) -> Path:
    """A checkpoint of seeded weights, with an index when there are several shards."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_bytes(config_json(text, **outer))
    rng = np.random.default_rng(seed)
    names = list(listing)
    weight_map: dict[str, str] = {}
    for n in range(shards):
        name = "model.safetensors" if shards == 1 else f"model-{n + 1:05d}-of-{shards:05d}.safetensors"
        part = {tensor: listing[tensor] for tensor in names[n::shards]}
        write_shard(folder / name, part, np.concatenate([random_bits(rng, *spec) for spec in part.values()]))
        weight_map |= dict.fromkeys(part, name)
    if shards > 1:
        index = json.dumps({"metadata": {}, "weight_map": weight_map})
        (folder / "model.safetensors.index.json").write_text(index)
    return folder


def random_bits(rng: np.random.Generator, dtype: str, shape: tuple[int, ...]) -> npt.NDArray[np.uint8]:
    """The bytes of seeded weights of a float dtype."""
    values = rng.standard_normal(math.prod(shape), np.float32) * np.float32(0.1)
    if dtype == "BF16":
        return (values.view(np.uint32) >> 16).astype("<u2").view(np.uint8)
    return values.astype({"F16": "<f2", "F32": "<f4"}[dtype]).view(np.uint8)


def read_tree(folder: Path) -> dict[str, bytes]:
    """The content of every file below a folder."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
