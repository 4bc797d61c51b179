"""Tensors of matrices in every published encoding, and the quantization_config that goes with them.

    tensors = in_kind(listing, "fp8_block", lambda name: "_proj" in name, rng)  # Shapes of a plain checkpoint
    folder = write_tensors(tmp_path / "source", config, tensors, CONFIGS["fp8_block"])

Weights are random codes; scales are such that values are small.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from formats.encodings.sources import (
    STORAGE,
    AWQSource,
    FP8Source,
    GPTQSource,
    Int8Source,
    MLXAffineSource,
    MXFP4Source,
    MXFP8Source,
    NVFP4Source,
    PackedSource,
    PlainSource,
    Plane,
    SourceEncoding,
)
from formats.encodings.sources.fp4 import BLOCKS, BYTES, WORDS
from formats.encodings.sources.fp8 import PER_BLOCK, PER_CHANNEL, PER_TENSOR
from tests.repack.checkpoints import Shapes, random_bits, write_shard

Array = npt.NDArray[Any]
Tensors = dict[str, tuple[str, Array]]  # (safetensors dtype, bits) by name

# How each kind names the tensor of a plane, from the module's base and the name of its plain tensor.
_NAMES: Mapping[str, Mapping[str, str]] = {
    "bf16": {"weight": "{weight}"},
    "fp8_block": {"weight": "{weight}", "scale": "{weight}_scale_inv"},
    "fp8_block_bf16": {"weight": "{weight}", "scale": "{weight}_scale_inv"},
    "fp8_e8m0": {"weight": "{weight}", "scale": "{base}.scale"},
    "fp8_channel": {"weight": "{weight}", "scale": "{weight}_scale"},
    "fp8_tensor": {"weight": "{weight}", "scale": "{weight}_scale"},
    "int4": {"packed": "{weight}_packed", "scale": "{weight}_scale", "shape": "{weight}_shape"},
    "int8_channel": {"packed": "{weight}_packed", "scale": "{weight}_scale", "shape": "{weight}_shape"},
    "mxfp4_blocks": {"codes": "{base}_blocks", "scales": "{base}_scales"},
    "mxfp4_packed": {"codes": "{weight}_packed", "scales": "{weight}_scale"},
    "mxfp4_i8": {"codes": "{weight}", "scales": "{base}.scale"},
    "nvfp4_modelopt": {"codes": "{weight}", "scales": "{weight}_scale", "global": "{weight}_scale_2"},
    "nvfp4_packed": {"codes": "{weight}_packed", "scales": "{weight}_scale", "global": "{weight}_global_scale"},
    "mlx_mxfp4": {"codes": "{weight}", "scales": "{base}.scales"},
    "mlx_nvfp4": {"codes": "{weight}", "scales": "{base}.scales"},
    **{
        f"mlx{bits}": {"codes": "{weight}", "scales": "{base}.scales", "biases": "{base}.biases"}
        for bits in (2, 3, 4, 5, 6, 8)
    },
    **{
        kind: {plane: f"{{base}}.{plane}" for plane in ("qweight", "qzeros", "scales", "g_idx")}
        for kind in ("gptq", "gptq_zero", "gptq_v2", "gptq8", "gptq3", "gptq2")
    },
    "awq": {plane: f"{{base}}.{plane}" for plane in ("qweight", "qzeros", "scales")},
    **{
        kind: {plane: f"{{base}}.{plane}" for plane in ("qweight", "qzeros", "scales")}
        for kind in (
            "auto_round",
            "auto_round3",
            "auto_round8",
            "auto_round_gptq",
            "auto_round_gptq2",
            "auto_round_awq",
            "auto_round_awq_sym",
        )
    },
    "auto_round_mxfp4": {"codes": "{weight}_packed", "scales": "{weight}_scale"},
    "auto_round_nvfp4": {"codes": "{weight}_packed", "scales": "{weight}_scale", "global": "{weight}_global_scale"},
    **{
        kind: {plane: f"{{weight}}_{plane}" for plane in ("packed", "scale", "shape", "zero_point")}
        for kind in ("int4_zero", "int8_zero")
    },
    **{
        kind: {"weight": "{weight}", "scale": "{weight}_scale", "zero_point": "{weight}_zero_point"}
        for kind in ("int8_bytes", "int8_bytes_zero", "int8_bytes_group", "int8_bytes_tensor")
    },
    "quark_mxfp4": {"codes": "{weight}", "scales": "{weight}_scale"},
    **{
        kind: {"weight": "{weight}", "scale": "{weight}_scale"}
        for kind in ("fp8_quark_tensor", "fp8_quark_channel", "fp8_quark_block", "fp8_mx", "fp8_mx_modelopt")
    },
    "fp8_mx_mlx": {"weight": "{weight}", "scale": "{base}.scales"},
    "mlx_nvfp4_factor": {"codes": "{weight}", "scales": "{base}.scales", "global": "{base}.global_scale"},
}
KINDS = tuple(_NAMES)
PACKAGED = KINDS[KINDS.index("auto_round") :]  # of tests/fixtures/make_packaged_encodings.py


def _compressed(form: str, **weights: Any) -> dict[str, Any]:
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    return {"quant_method": "compressed-tensors", "format": form, "config_groups": groups}


def _gptq(bits: int, sym: bool, checkpoint_format: str = "gptq") -> dict[str, Any]:
    return {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": 32,
        "sym": sym,
        "desc_act": False,
        "checkpoint_format": checkpoint_format,
    }


def _auto_round(bits: int, sym: bool, packing_format: str, **more: Any) -> dict[str, Any]:
    said = {"bits": bits, "group_size": 32, "sym": sym, "data_type": "int", "packing_format": packing_format}
    return {"quant_method": "auto-round", "autoround_version": "0.12.3", "iters": 0, **said, **more}


def _quark(**weight: Any) -> dict[str, Any]:
    return {
        "quant_method": "quark",
        "global_quant_config": {"weight": {"is_dynamic": False, **weight}, "input_tensors": None, "bias": None},
        "layer_quant_config": {},
        "exclude": ["lm_head"],
        "algo_config": None,
        "export": {"kv_cache_group": [], "pack_method": "reorder", "weight_format": "real_quantized"},
    }


_AUTO_ROUND_FLOATS = {"act_bits": 4, "act_dynamic": True, "act_sym": True}
_FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
# What goes into config.json as quantization_config, or, where it says no quant_method, as MLX's quantization.
CONFIGS: Mapping[str, dict[str, Any] | None] = {
    "bf16": None,
    **dict.fromkeys(("fp8_block", "fp8_block_bf16", "fp8_e8m0", "mxfp4_i8"), _FP8),
    "fp8_channel": _compressed("float-quantized", num_bits=8, type="float", strategy="channel"),
    "fp8_tensor": {"quant_method": "modelopt", "quant_algo": "FP8"},
    "int4": _compressed("pack-quantized", num_bits=4, type="int", group_size=32, symmetric=True, actorder=None),
    "int8_channel": _compressed("pack-quantized", num_bits=8, type="int", strategy="channel", symmetric=True),
    "mxfp4_blocks": {"quant_method": "mxfp4"},
    "mxfp4_packed": _compressed("mxfp4-pack-quantized", num_bits=4, type="float", group_size=32, symmetric=True),
    "nvfp4_modelopt": {"quant_method": "modelopt", "quant_algo": "NVFP4"},
    "nvfp4_packed": _compressed("nvfp4-pack-quantized", num_bits=4, type="float", group_size=16, symmetric=True),
    "mlx_mxfp4": {"mode": "mxfp4", "bits": 4, "group_size": 32},
    "mlx_nvfp4": {"mode": "nvfp4", "bits": 4, "group_size": 16},
    **{f"mlx{bits}": {"bits": bits, "group_size": 32, "mode": "affine"} for bits in (2, 3, 4, 5, 6, 8)},
    "gptq": _gptq(4, True),
    "gptq_zero": _gptq(4, False),
    "gptq_v2": _gptq(4, False, "gptq_v2"),
    "gptq8": _gptq(8, True),
    "gptq3": _gptq(3, False),
    "gptq2": _gptq(2, False),
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True},
    "auto_round": _auto_round(4, False, "auto_round"),
    "auto_round3": _auto_round(3, False, "auto_round"),
    "auto_round8": _auto_round(8, True, "auto_round"),
    "auto_round_gptq": _auto_round(4, True, "auto_round:auto_gptq"),
    "auto_round_gptq2": _auto_round(2, False, "auto_round:auto_gptq"),
    "auto_round_awq": _auto_round(4, False, "auto_round:auto_awq"),
    "auto_round_awq_sym": _auto_round(4, True, "auto_round:auto_awq"),
    "auto_round_mxfp4": _auto_round(4, True, "auto_round:llm_compressor", data_type="mx_fp", **_AUTO_ROUND_FLOATS),
    "auto_round_nvfp4": _auto_round(
        4, True, "auto_round:llm_compressor", data_type="nv_fp", **_AUTO_ROUND_FLOATS | {"group_size": 16}
    ),
    "int4_zero": _compressed("pack-quantized", num_bits=4, type="int", group_size=32, symmetric=False),
    "int8_zero": _compressed("pack-quantized", num_bits=8, type="int", strategy="channel", symmetric=False),
    "int8_bytes": _compressed("int-quantized", num_bits=8, type="int", strategy="channel", symmetric=True),
    "int8_bytes_zero": _compressed("int-quantized", num_bits=8, type="int", strategy="channel", symmetric=False),
    "int8_bytes_group": _compressed("int-quantized", num_bits=8, type="int", group_size=32, symmetric=True),
    "int8_bytes_tensor": _compressed("int-quantized", num_bits=8, type="int", strategy="tensor", symmetric=True),
    "quark_mxfp4": _quark(dtype="fp4", qscheme="per_group", group_size=32, ch_axis=-1, scale_format="e8m0"),
    "fp8_quark_tensor": _quark(dtype="fp8_e4m3", qscheme="per_tensor", ch_axis=None, symmetric=True),
    "fp8_quark_channel": _quark(dtype="fp8_e4m3", qscheme="per_channel", ch_axis=0, symmetric=True),
    "fp8_quark_block": _quark(dtype="fp8_e4m3", qscheme="per_block", block_size=[128, 128], symmetric=True),
    "fp8_mx": _compressed("mxfp8-quantized", num_bits=8, type="float", group_size=32, symmetric=True),
    "fp8_mx_modelopt": {"quant_method": "modelopt", "quant_algo": "MXFP8"},
    "fp8_mx_mlx": {"mode": "mxfp8", "bits": 8, "group_size": 32},
    "mlx_nvfp4_factor": {"mode": "nvfp4", "bits": 4, "group_size": 16},
}


def source_encoding(kind: str, rows: int, columns: int) -> SourceEncoding:
    """The source encoding that a kind is, for a matrix [rows, columns]."""
    if kind.startswith("mlx") and kind[3:].isdigit():
        return MLXAffineSource(int(kind[3:]), 32, "bf16")
    found: dict[str, SourceEncoding] = {
        "bf16": PlainSource("bf16"),
        "fp8_block": FP8Source(PER_BLOCK, "f32"),
        "fp8_block_bf16": FP8Source(PER_BLOCK, "bf16"),
        "fp8_e8m0": FP8Source(PER_BLOCK, "e8m0"),
        "fp8_channel": FP8Source(PER_CHANNEL, "bf16", (rows, 1)),
        "fp8_tensor": FP8Source(PER_TENSOR, "f32", ()),
        "int4": PackedSource(4, 32, "bf16", (rows, columns)),
        "int8_channel": PackedSource(8, columns, "bf16", (rows, columns)),
        "mxfp4_blocks": MXFP4Source(BLOCKS),
        "mxfp4_packed": MXFP4Source(BYTES),
        "mxfp4_i8": MXFP4Source(BYTES),
        "nvfp4_modelopt": NVFP4Source("multiply", BYTES, ()),
        "nvfp4_packed": NVFP4Source("divide", BYTES, (1,)),
        "mlx_mxfp4": MXFP4Source(WORDS),
        "mlx_nvfp4": NVFP4Source("multiply", WORDS, None),
        "gptq": GPTQSource(4, 32, "f16", True, 1, True),
        "gptq_zero": GPTQSource(4, 32, "f16", False, 1, True),
        "gptq_v2": GPTQSource(4, 32, "f16", False, 2, True),
        "gptq8": GPTQSource(8, 32, "f16", True, 1, True),
        "gptq3": GPTQSource(3, 32, "f16", False, 1, True),
        "gptq2": GPTQSource(2, 32, "f16", False, 1, True),
        "awq": AWQSource(32, "f16"),
        "auto_round": GPTQSource(4, 32, "f16", False, 2, False),
        "auto_round3": GPTQSource(3, 32, "f16", False, 2, False),
        "auto_round8": GPTQSource(8, 32, "f16", True, 2, False),
        "auto_round_gptq": GPTQSource(4, 32, "f16", True, 1, False),
        "auto_round_gptq2": GPTQSource(2, 32, "f16", False, 1, False),
        "auto_round_awq": AWQSource(32, "f16"),
        "auto_round_awq_sym": AWQSource(32, "f16", symmetric=True),
        "auto_round_mxfp4": MXFP4Source(BYTES),
        "auto_round_nvfp4": NVFP4Source("divide", BYTES, (1,)),
        "int4_zero": PackedSource(4, 32, "bf16", (rows, columns), symmetric=False),
        "int8_zero": PackedSource(8, columns, "bf16", (rows, columns), symmetric=False),
        "int8_bytes": Int8Source(columns, "bf16", (rows, 1)),
        "int8_bytes_zero": Int8Source(columns, "bf16", (rows, 1), symmetric=False),
        "int8_bytes_group": Int8Source(32, "f32", (rows, columns // 32)),
        "int8_bytes_tensor": Int8Source(columns, "bf16", (1,)),
        "quark_mxfp4": MXFP4Source(BYTES),
        "fp8_quark_tensor": FP8Source(PER_TENSOR, "f32", ()),
        "fp8_quark_channel": FP8Source(PER_CHANNEL, "f32", (rows,)),
        "fp8_quark_block": FP8Source(PER_BLOCK, "f32"),
        "fp8_mx": MXFP8Source(BYTES),
        "fp8_mx_modelopt": MXFP8Source(BYTES),
        "fp8_mx_mlx": MXFP8Source(WORDS),
        "mlx_nvfp4_factor": NVFP4Source("multiply", WORDS, (), largest=True),
    }
    return found[kind]


def in_encoding(
    kind: str,
    base: str,
    rows: int,
    columns: int,
    rng: np.random.Generator,
    *,
    suffix: str = ".weight",
    stacked: int = 0,
) -> Tensors:
    """The tensors of a module; `stacked` of them on a first axis, if not 0."""
    encoding = source_encoding(kind, rows, columns)
    tensors: Tensors = {}
    for spec in encoding.planes(rows, columns):
        name = _NAMES[kind][spec.name].format(base=base, weight=base + suffix)
        several = [_random(kind, encoding, spec, rng, rows, columns) for _ in range(max(1, stacked))]
        dtype = {"mxfp4_i8": "I8", "fp8_e8m0": "F8_E8M0"}.get(kind, spec.dtypes[0]) if len(spec.dtypes) > 1 else ""
        if kind == "mxfp4_i8" and spec.name == "scales":
            dtype = "F8_E8M0"
        if kind.startswith("mlx_nvfp4") and spec.name == "scales":
            dtype = "U8"
        tensors[name] = (dtype or spec.dtypes[0], np.stack(several) if stacked else several[0])
    return tensors


def _random(
    kind: str, encoding: SourceEncoding, spec: Plane, rng: np.random.Generator, rows: int, columns: int
) -> Array:
    """The bits of a plane."""
    shape, dtype = spec.shape, spec.dtypes[0]
    if spec.name == "shape":
        return np.array([rows, columns], np.int32)
    if spec.name == "g_idx":
        assert isinstance(encoding, GPTQSource)
        return (np.arange(columns) // encoding.group_size).astype(np.int32)
    if spec.name == "qzeros" and isinstance(encoding, GPTQSource) and encoding.symmetric:
        middle = (1 << encoding.bits - 1) - (encoding.version == 1)
        return np.full(shape, sum(middle << at for at in range(0, 32, encoding.bits)), np.uint32)
    if kind == "auto_round_awq_sym" and spec.name == "qzeros":
        return np.full(shape, 0x88888888, np.uint32)
    if kind == "auto_round_gptq2" and spec.name == "qzeros":  # no field is 3, which AutoRound has no zero point for
        words = rng.integers(0, 1 << 32, shape, np.uint32)
        return words ^ (words & words >> 1 & 0x55555555)
    if spec.kind == "e8m0":
        return rng.integers(118, 124, shape, np.uint8)
    if spec.kind == "e4m3" and spec.name == "scales":
        return rng.integers(0x28, 0x38, shape, np.uint8)
    if isinstance(encoding, MXFP8Source) and spec.name == "weight":
        codes = rng.integers(0, 0x60, (rows, columns), np.uint8) | rng.choice(
            np.array([0, 0x80], np.uint8), (rows, columns)
        )
        return codes.view(STORAGE[dtype])
    if spec.kind == "e4m3":
        return rng.integers(0, 0x60, shape, np.uint8) | rng.choice(np.array([0, 0x80], np.uint8), shape)
    if dtype in ("U8", "I8"):
        return rng.integers(0, 256, shape, np.uint8)
    if dtype in ("I32", "U32"):
        return rng.integers(0, 1 << 32, shape, np.uint32)
    scale = 0.1 if spec.name == "weight" else 1.0 if spec.name in ("global", "biases") else 1.0 / (1 << encoding.bits)
    if kind == "auto_round_nvfp4" and spec.name == "global":
        return np.full(shape, 8, np.float32)  # AutoRound divides codes by it, not scales: a power of two is one result
    if kind == "nvfp4_packed" and spec.name == "global":
        scale = 8.0
    values = (rng.uniform(0.5, 1.5, shape) * scale).astype(np.float32)
    if spec.name in ("weight", "biases"):
        values *= rng.choice(np.array([-1, 1], np.float32), shape)
    if dtype == "BF16":
        return (values.view(np.uint32) >> 16).astype("<u2")
    return values.astype({"F16": "<f2", "F32": "<f4"}[dtype])


def _e4m3(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    """Small numbers, and their negatives."""
    return rng.integers(0, 0x60, shape, np.uint8) | rng.choice(np.array([0, 0x80], np.uint8), shape)


def in_kind(listing: Shapes, kind: str, chosen: Callable[[str], bool], rng: np.random.Generator) -> Tensors:
    """Tensors of a checkpoint: matrices whose names are chosen in a kind, stacked ones too, all others plain."""
    tensors: Tensors = {}
    for name, (dtype, shape) in listing.items():
        if chosen(name):
            base, suffix = (name.removesuffix(".weight"), ".weight") if name.endswith(".weight") else (name, "")
            stacked = shape[0] if len(shape) == 3 else 0
            tensors |= in_encoding(kind, base, shape[-2], shape[-1], rng, suffix=suffix, stacked=stacked)
        else:
            tensors[name] = (dtype, random_bits(rng, dtype, shape).view(STORAGE[dtype]).reshape(shape))
    return tensors


def write_tensors(
    folder: Path, config: Mapping[str, Any], tensors: Tensors, quantization: Mapping[str, Any] | None
) -> Path:
    """A checkpoint of these tensors in one shard."""
    folder.mkdir(exist_ok=True)
    said = {}
    if quantization is not None:
        said = {"quantization_config" if "quant_method" in quantization else "quantization": quantization}
    (folder / "config.json").write_text(json.dumps({**config, **said}))
    listing = {name: (dtype, array.shape) for name, (dtype, array) in tensors.items()}
    content = [np.ascontiguousarray(array).reshape(-1).view(np.uint8) for _, array in tensors.values()]
    write_shard(folder / "model.safetensors", listing, np.concatenate(content))
    return folder
