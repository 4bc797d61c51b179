"""GGUF files of the tiny checkpoints: which there are, what llama.cpp's converter recorded of them, and a writer."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np

from tests.fixtures import (
    bailing_tiny,
    cohere_tiny,
    decoders_tiny,
    deepseek_tiny,
    deepseek_v4_tiny,
    gemma_tiny,
    granite_tiny,
    hybrids_tiny,
    kimi_k3_tiny,
    kimi_linear_tiny,
    llama4_tiny,
    mimo_tiny,
    minimax_m3_tiny,
    nemotron_tiny,
    plain_tiny,
    qwen4_tiny,
    step_tiny,
    vision_tiny,
)
from tests.fixtures.recipe import write_checkpoint
from tests.llama_cpp import Values

FIXTURES = Path(__file__).parent / "fixtures"


class Checkpoint(NamedTuple):
    """A tiny checkpoint that the converter takes."""

    architecture: str  # of the GGUF file
    write: Callable[[Path], Path]  # into a folder; where it lies
    reference: str  # what transformers makes of it


def _committed(name: str) -> Callable[[Path], Path]:
    return lambda folder: FIXTURES / name


def _case(case: Any) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:  # one shard: the converter relies on the order of gpt-oss' tensors
        write_checkpoint(folder, case.tensors(), case.config, shards=1)
        return folder

    return write


def _checkpoint(architecture: str, case: Any, name: str) -> Checkpoint:
    return Checkpoint(architecture, _case(case), f"decoders/{name}.npz")


CHECKPOINTS: Mapping[str, Checkpoint] = {
    "qwen3_5_moe": Checkpoint("qwen35moe", _committed("fused"), "reference.npz"),
    "qwen3_moe": Checkpoint("qwen3moe", _committed("qwen3_moe"), "qwen3_moe/reference.npz"),
    **{
        name: _checkpoint(architecture, decoders_tiny.CASES[name], name)
        for name, architecture in (
            ("qwen2_moe_gguf", "qwen2moe"),
            ("mixtral", "llama"),
            ("olmoe_gguf", "olmoe"),
            ("granitemoe", "granitemoe"),
            ("dots1_gguf", "dots1"),
            ("ernie4_5_moe", "ernie4_5-moe"),
            ("exaone_moe", "exaone-moe"),
            ("glm4_moe", "glm4moe"),
            ("hunyuan_v1_moe_gguf", "hunyuan-moe"),
            ("hy_v3", "hy_v3"),
            ("minimax_m2", "minimax-m2"),
            ("gpt_oss_gguf", "gpt-oss"),
            ("solar_open", "glm4moe"),
        )
    },
    "afmoe": _checkpoint("afmoe", plain_tiny.CASES["afmoe"], "afmoe"),
    "laguna_gguf": _checkpoint("laguna", plain_tiny.CASES["laguna_gguf"], "laguna_gguf"),
    "lfm2_moe": _checkpoint("lfm2moe", plain_tiny.CASES["lfm2_moe"], "lfm2_moe"),
    "bailing_moe": _checkpoint("bailingmoe2", plain_tiny.CASES["bailing_moe"], "bailing_moe"),
    "sarvam_moe": _checkpoint("bailingmoe2", plain_tiny.CASES["sarvam_moe"], "sarvam_moe"),
    "bailing_hybrid": _checkpoint("bailingmoe3", bailing_tiny.CASES["bailing_hybrid"], "bailing_hybrid"),
    "cohere2_moe": _checkpoint("cohere2moe", cohere_tiny.CASES["cohere2_moe"], "cohere2_moe"),
    "granitemoeshared": _checkpoint("granitemoe", granite_tiny.CASES["granitemoeshared"], "granitemoeshared"),
    "granitemoehybrid": _checkpoint("granitehybrid", granite_tiny.CASES["granitemoehybrid"], "granitemoehybrid"),
    **{
        name: _checkpoint("nemotron_h_moe", nemotron_tiny.CASES[name], name)
        for name in ("nemotron_h_gguf", "nemotron_h_super_gguf")
    },
    "gemma4": _checkpoint("gemma4", gemma_tiny.CASES["gemma4"], "gemma4"),
    "deepseek_v4_gguf": _checkpoint("deepseek4", deepseek_v4_tiny.CASES["deepseek_v4_gguf"], "deepseek_v4_gguf"),
    "kimi_k3_mxfp4": _checkpoint("kimi-k3", kimi_k3_tiny.CASES["kimi_k3_mxfp4"], "kimi_k3_mxfp4"),
    "kimi_linear_gguf": _checkpoint("kimi-linear", kimi_linear_tiny.CASES["kimi_linear_gguf"], "kimi_linear_gguf"),
    "llama4_gguf": _checkpoint("llama4", llama4_tiny.CASES["llama4_gguf"], "llama4_gguf"),
    "minimax_m3_gguf": _checkpoint("minimax-m3", minimax_m3_tiny.CASES["minimax_m3_gguf"], "minimax_m3_gguf"),
    "mimo_v2_flash": _checkpoint("mimo2", mimo_tiny.CASES["mimo_v2_flash"], "mimo_v2_flash"),
    "qwen4_exp_gguf": _checkpoint("qwen4exp", qwen4_tiny.CASES["qwen4_exp_gguf"], "qwen4_exp_gguf"),
    "step3p5": _checkpoint("step35", step_tiny.CASES["step3p5"], "step3p5"),
    "glm4v_moe": _checkpoint("glm4moe", vision_tiny.CASES["glm4v_moe"], "glm4v_moe"),
    "qwen3_vl_moe": _checkpoint("qwen3vlmoe", vision_tiny.CASES["qwen3_vl_moe"], "qwen3_vl_moe"),
    "qwen3_next": _checkpoint("qwen3next", hybrids_tiny.CASES["qwen3_next"], "qwen3_next"),
    **{
        name: _checkpoint("deepseek2", deepseek_tiny.CASES[name], name)
        for name in ("deepseek_v2", "deepseek_v2_groups", "deepseek_v3_gguf", "kimi_k2", "glm4_moe_lite")
    },
    "mistral4_gguf": _checkpoint("mistral4", deepseek_tiny.CASES["mistral4_gguf"], "mistral4_gguf"),
    "deepseek_v32_gguf": _checkpoint("deepseek32", deepseek_tiny.CASES["deepseek_v32_gguf"], "deepseek_v32_gguf"),
    "glm_moe_dsa": _checkpoint("glm-dsa", deepseek_tiny.CASES["glm_moe_dsa"], "glm_moe_dsa"),
}


def recorded(name: str) -> dict[str, Any]:
    """What the converter made of a checkpoint (fixtures/record_gguf.py)."""
    content: dict[str, Any] = json.loads((FIXTURES / "gguf" / f"{name}.json").read_text())
    return content


def write_gguf(
    path: Path,
    metadata: Mapping[str, Any],
    tensors: Values,
    kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    kinds: Mapping[str, gguf.GGMLQuantizationType] | None = None,
) -> Path:
    """A file by the gguf package; matrices of experts and projections in `kind`, all else as it is.

    Bytes are blocks of what `kinds` says by name, else of `kind`, or of MXFP4.
    """
    writer = gguf.GGUFWriter(path, metadata["general.architecture"])
    for key, value in metadata.items():
        if key != "general.architecture":
            _add(writer, key, value)
    for name, value in tensors.items():
        if value.dtype == np.uint8:
            blocks = gguf.GGMLQuantizationType.MXFP4 if kind == gguf.GGMLQuantizationType.F32 else kind
            writer.add_tensor(name, value, raw_dtype=(kinds or {}).get(name, blocks))
        elif kind == gguf.GGMLQuantizationType.F32 or value.ndim < 2 or not _is_quantized(name):
            writer.add_tensor(name, value)
        else:
            writer.add_tensor(name, gguf.quants.quantize(value, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _is_quantized(name: str) -> bool:
    """As llama-quantize: not routers, nor a convolution."""
    return "ffn_gate_inp" not in name and "conv1d" not in name and "ssm_alpha" not in name and "ssm_beta" not in name


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    elif any(type(entry) is int and entry >= 2**31 for entry in value):
        array, wide = gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.UINT64
        writer.add_key_value(key, value, array, wide)
    else:
        writer.add_array(key, value)
