"""GGUF files of the tiny checkpoints, written as llama.cpp's converter writes them (proven by its recorded hashes)."""

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np

from formats.dtypes import Float32, to_float32
from formats.encodings.sources.base import FLOATS, STORAGE
from repack.sources.folder import FolderSource
from repack.sources.gguf_models import ARCHITECTURES
from repack.sources.gguf_names import OUTSIDE
from tests.fixtures import decoders_tiny, deepseek_tiny, gemma_tiny, hybrids_tiny, llama4_tiny
from tests.fixtures.recipe import write_checkpoint

FIXTURES = Path(__file__).parent / "fixtures"
Values = Mapping[str, Any]  # float32, or uint8: blocks of MXFP4


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
            ("glm4_moe", "glm4moe"),
            ("minimax_m2", "minimax-m2"),
            ("gpt_oss_gguf", "gpt-oss"),
        )
    },
    "gemma4": _checkpoint("gemma4", gemma_tiny.CASES["gemma4"], "gemma4"),
    "llama4_gguf": _checkpoint("llama4", llama4_tiny.CASES["llama4_gguf"], "llama4_gguf"),
    "qwen3_next": _checkpoint("qwen3next", hybrids_tiny.CASES["qwen3_next"], "qwen3_next"),
    **{
        name: _checkpoint("deepseek2", deepseek_tiny.CASES[name], name)
        for name in ("deepseek_v3_gguf", "kimi_k2", "glm4_moe_lite")
    },
    "deepseek_v32_gguf": _checkpoint("deepseek32", deepseek_tiny.CASES["deepseek_v32_gguf"], "deepseek_v32_gguf"),
    "glm_moe_dsa": _checkpoint("glm-dsa", deepseek_tiny.CASES["glm_moe_dsa"], "glm_moe_dsa"),
}


def recorded(name: str) -> dict[str, Any]:
    """What the converter made of a checkpoint (fixtures/record_gguf.py)."""
    content: dict[str, Any] = json.loads((FIXTURES / "gguf" / f"{name}.json").read_text())
    return content


def checkpoint_values(folder: Path) -> dict[str, Float32]:
    """Every tensor of a checkpoint by name: floats as float32, bytes as they are."""
    source = FolderSource(folder)
    values = {}
    with source.reader() as reader:
        for tensor in source.tensors.values():
            raw = np.empty(tensor.nbytes, np.uint8)
            reader.read_into(tensor.file, tensor.offset, raw.data)
            bits = raw.view(STORAGE[tensor.dtype]).reshape(tensor.shape)
            values[tensor.name] = to_float32(bits, FLOATS[tensor.dtype]) if tensor.dtype in FLOATS else bits
    return values


AFTER_ATTENTION = ("qwen35moe", "qwen3next", "glm4moe", "gpt-oss", "gemma4")  # as they name the second norm of a layer


def converted(folder: Path, architecture: str) -> dict[str, Float32]:
    """The checkpoint's tensors as the converter has them, multi-token prediction left out."""
    config = json.loads((folder / "config.json").read_text())
    config = config.get("text_config", config)
    values = {_short(name): value for name, value in checkpoint_values(folder).items()}
    if architecture == "llama4":
        values = _of_llama4(values, config)
    elif architecture == "gemma4":
        values = _of_gemma4(values, config)
    else:
        values = _apart(_stacked(values, config["num_hidden_layers"]), architecture, config)
    names = {hf: gguf_name for gguf_name, hf in ARCHITECTURES[architecture].layer.items()}
    result = {}
    for name, value in values.items():
        words = name.split(".", 2)
        if name.endswith("rotary_emb.inv_freq"):
            continue
        if name.startswith("layers.") and int(words[1]) < config["num_hidden_layers"]:
            rest = names["input_layernorm.weight" if words[2] == "input_layernorm.weight" else words[2]]
            if words[2] == "post_attention_layernorm.weight":
                rest = "post_attention_norm.weight" if architecture in AFTER_ATTENTION else "ffn_norm.weight"
            result[f"blk.{words[1]}.{rest}"] = _changed(words[2], value, architecture, config)
        if name == "rope_freqs.weight":
            result[name] = value
        for gguf_name, hf in OUTSIDE.items():
            if name == _short(hf):
                result[gguf_name] = _changed(name, value, architecture, config)
    return result


def _short(name: str) -> str:
    return name.removeprefix("model.").removeprefix("language_model.").removeprefix("model.")


def _stacked(values: Values, num_layers: int) -> dict[str, Float32]:
    """Experts stacked part by part, under the names that the architectures' tables have."""
    result = dict(values)
    for i in range(num_layers):
        at = f"layers.{i}."
        experts = {name: value for name, value in values.items() if name.startswith(at) and "expert" in name}
        experts = {name: value for name, value in experts.items() if "shared_expert" not in name}
        if f"{at}mlp.experts.down_proj_blocks" in experts:  # gpt-oss, which has a name of its own for the part
            continue
        experts |= {name: value for name, value in values.items() if name.startswith(at) and "put_linear" in name}
        for part, stack in _parts(at, experts):
            result[f"{at}mlp.switch_mlp.{part}_proj.weight"] = stack
        for name in experts:
            del result[name]
    return result


def _parts(at: str, experts: Values) -> Iterator[tuple[str, Float32]]:
    fused = {name.removeprefix(at): value for name, value in experts.items()}
    for gate_up, down in (
        ("mlp.experts.gate_up_proj", "mlp.experts.down_proj"),
        ("block_sparse_moe.input_linear.weight", "block_sparse_moe.output_linear.weight"),
    ):
        if gate_up in fused:
            half = fused[gate_up].shape[1] // 2
            yield from (("gate", fused[gate_up][:, :half]), ("up", fused[gate_up][:, half:]), ("down", fused[down]))
            return
    for part, w in (("gate", "w1"), ("up", "w3"), ("down", "w2")):
        names = (f"mlp.experts.{{}}.{part}_proj.weight", f"block_sparse_moe.experts.{{}}.{w}.weight")
        name = next((name for name in names if name.format(0) in fused), None)
        if name is not None:
            count = sum(1 for key in fused if key.endswith(name.partition("{}")[2]))
            yield part, np.stack([fused[name.format(expert)] for expert in range(count)])


def _apart(values: Values, architecture: str, config: Mapping[str, Any]) -> dict[str, Float32]:
    """Projections that the converter splits."""
    result: dict[str, Float32] = {}
    for name, value in values.items():
        if name.endswith("kv_b_proj.weight"):
            per_head = value.reshape(config["num_attention_heads"], -1, value.shape[1])
            n = config["qk_nope_head_dim"]
            result[name.replace("kv_b_proj", "embed_q")] = per_head[:, :n].swapaxes(1, 2)
            result[name.replace("kv_b_proj", "unembed_out")] = per_head[:, n:]
        elif architecture == "qwen3next" and name.endswith("in_proj_qkvz.weight"):
            qkv, z = _ungrouped(value, config)
            result[name.replace("qkvz", "qkv")], result[name.replace("qkvz", "z")] = qkv, z
        elif architecture == "gpt-oss" and ".experts." in name:
            result |= _of_gpt_oss(name, value, values)
        else:
            result[name] = value
    return result


def _ungrouped(value: Float32, config: Mapping[str, Any]) -> tuple[Float32, Float32]:
    """Rows q, k, v, z of one key head after another -> all of q, k and v; all of z."""
    keys, dk = config["linear_num_key_heads"], config["linear_key_head_dim"]
    dv = config["linear_num_value_heads"] // keys * config["linear_value_head_dim"]
    parts = np.split(value.reshape(keys, -1, value.shape[1]), [dk, 2 * dk, 2 * dk + dv], axis=1)
    q, k, v, z = (part.reshape(-1, value.shape[1]) for part in parts)
    return np.concatenate([q, k, v]), z


def _of_gpt_oss(name: str, value: Any, values: Values) -> Iterator[tuple[str, Any]]:
    """Gate and up, in turns, apart; and blocks of MXFP4 with their scale before them, lower halves first."""
    if name.endswith("_scales"):
        return
    if name.endswith("_blocks"):
        scales = values[name.replace("_blocks", "_scales")]
        pairs = np.stack([value & 15, value >> 4], axis=-1).reshape(*value.shape[:-1], 32)
        blocks = pairs[..., :16] | pairs[..., 16:] << 4
        value = np.concatenate([scales[..., None], blocks], axis=-1).reshape(*value.shape[:2], -1)
    at, kind = name.rpartition("_")[0], "bias" if name.endswith("_bias") else "weight"
    if at.endswith("down_proj"):
        yield f"{at}.{kind}", value
    else:
        for nth, part in enumerate(("gate", "up")):
            yield f"{at.replace('gate_up', part)}.{kind}", np.ascontiguousarray(value[:, nth::2])


def _of_llama4(values: Values, config: Mapping[str, Any]) -> dict[str, Float32]:
    """Experts apart and rows first, and how much slower each pair of a head turns; nothing of what sees."""
    result: dict[str, Float32] = {"rope_freqs.weight": _llama3_factors(config)}
    for name, value in values.items():
        at, _, last = name.rpartition(".")
        rows = value.swapaxes(-1, 1) if value.ndim == 3 else value
        if last == "gate_up_proj":
            result[f"{at}.gate_proj.weight"], result[f"{at}.up_proj.weight"] = np.split(rows, 2, axis=1)
        elif last == "down_proj":
            result[f"{name}.weight"] = rows
        elif not name.startswith(("vision_model.", "multi_modal_projector.")):
            result[name] = value
    return result


def _of_gemma4(values: Values, config: Mapping[str, Any]) -> dict[str, Float32]:
    """Experts under the name of a module, and factors that hold most pairs of a wide head; nothing of what sees."""
    half = config["global_head_dim"] // 2
    turned = int(half * config["rope_parameters"]["full_attention"]["partial_rotary_factor"])
    factors = np.where(np.arange(half) < turned, 1, 1e30).astype(np.float32)
    result: dict[str, Float32] = {"rope_freqs.weight": factors}
    for name, value in values.items():
        if ".experts." in name:
            result[f"{name.replace('.experts.', '.experts.switch_glu.')}.weight"] = value
        elif not name.startswith(("vision_tower.", "embed_vision.")):
            result[name] = value
    return result


def _llama3_factors(config: Mapping[str, Any]) -> Float32:
    """By how much transformers' llama3 divides the angles of pairs."""
    scaling, half = config["rope_scaling"], config["head_dim"] // 2
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    wavelengths = 2 * np.pi * config["rope_theta"] ** (np.arange(half) / half)
    smooth = np.clip((scaling["original_max_position_embeddings"] / wavelengths - low) / (high - low), 0, 1)
    return (1 / ((1 - smooth) / scaling["factor"] + smooth)).astype(np.float32)


def _changed(name: str, value: Float32, architecture: str, config: Mapping[str, Any]) -> Float32:
    """What the converter does to values."""
    if architecture in ("qwen35moe", "qwen3next"):
        if name.endswith("norm.weight") and not name.startswith("linear_attn."):
            value = value + np.float32(1)
        if name.endswith("A_log"):
            value = -np.exp(value)
        if name == "linear_attn.conv1d.weight":
            value = value[:, 0]
        if name.startswith("linear_attn.") and architecture == "qwen35moe":
            value = _tiled(name.removeprefix("linear_attn."), value, config)
    if architecture in ("llama", "granitemoe") and name.startswith(("self_attn.q_proj", "self_attn.k_proj")):
        heads = config["num_attention_heads" if "q_proj" in name else "num_key_value_heads"]
        value = value.reshape(heads, 2, -1, *value.shape[1:]).swapaxes(1, 2).reshape(value.shape)
    return np.ascontiguousarray(value)


def _tiled(name: str, value: Float32, config: Mapping[str, Any]) -> Float32:
    """Value heads in turns instead of grouped by their key head."""
    keys, d = config["linear_num_key_heads"], config["linear_value_head_dim"]
    each = config["linear_num_value_heads"] // keys
    first = 2 * keys * config["linear_key_head_dim"]

    def turned(x: Float32, width: int) -> Float32:
        return x.reshape(keys, each, width, -1).swapaxes(0, 1).reshape(x.shape)

    if name in ("in_proj_qkv.weight", "conv1d.weight"):
        return np.concatenate([value[:first], turned(value[first:], d)])
    if name == "in_proj_z.weight":
        return turned(value, d)
    if name == "out_proj.weight":
        return np.ascontiguousarray(turned(np.ascontiguousarray(value.T), d).T)
    return value if name == "norm.weight" else turned(value, 1)


def write_gguf(
    path: Path,
    metadata: Mapping[str, Any],
    tensors: Values,
    kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
) -> Path:
    """A file by the gguf package; matrices of experts and projections in `kind`, all else as it is.

    Bytes are blocks of `kind`, or of MXFP4.
    """
    writer = gguf.GGUFWriter(path, metadata["general.architecture"])
    for key, value in metadata.items():
        if key != "general.architecture":
            _add(writer, key, value)
    for name, value in tensors.items():
        if value.dtype == np.uint8:
            blocks = gguf.GGMLQuantizationType.MXFP4 if kind == gguf.GGMLQuantizationType.F32 else kind
            writer.add_tensor(name, value, raw_dtype=blocks)
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
    else:
        writer.add_array(key, value)
