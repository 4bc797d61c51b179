"""GGUF files of the tiny checkpoints, written as llama.cpp's converter writes them (proven by its recorded hashes)."""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from formats.dtypes import Float32, to_float32
from formats.encodings.sources.base import FLOATS, STORAGE
from repack.sources.folder import FolderSource
from repack.sources.gguf_models import ARCHITECTURES, OUTSIDE
from tests.fixtures.decoders_tiny import CASES
from tests.fixtures.recipe import write_checkpoint

FIXTURES = Path(__file__).parent / "fixtures"
Values = Mapping[str, Float32]


def _committed(name: str) -> Callable[[Path], Path]:
    return lambda folder: FIXTURES / name


def _case(name: str) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        case = CASES[name]
        if name == "qwen2_moe":  # the converter knows no dense layers of it
            case = replace(case, config=case.config | {"mlp_only_layers": [], "decoder_sparse_step": 1})
        write_checkpoint(folder, case.tensors(), case.config)
        return folder

    return write


CHECKPOINTS: Mapping[str, Callable[[Path], Path]] = {  # writes a checkpoint into a folder
    "qwen3_5_moe": _committed("fused"),
    "qwen3_moe": _committed("qwen3_moe"),
    **{name: _case(name) for name in ("qwen2_moe", "mixtral", "olmoe", "granitemoe", "glm4_moe", "minimax_m2")},
}


def recorded(name: str) -> dict[str, Any]:
    """What the converter made of a checkpoint (fixtures/record_gguf.py)."""
    content: dict[str, Any] = json.loads((FIXTURES / "gguf" / f"{name}.json").read_text())
    return content


def checkpoint_values(folder: Path) -> dict[str, Float32]:
    """Every tensor of a checkpoint of plain floats, by name."""
    source = FolderSource(folder)
    values = {}
    with source.reader() as reader:
        for tensor in source.tensors.values():
            raw = np.empty(tensor.nbytes, np.uint8)
            reader.read_into(tensor.file, tensor.offset, raw.data)
            bits = raw.view(STORAGE[tensor.dtype]).reshape(tensor.shape)
            values[tensor.name] = to_float32(bits, FLOATS[tensor.dtype])
    return values


def converted(folder: Path, architecture: str) -> dict[str, Float32]:
    """The checkpoint's tensors as the converter has them, multi-token prediction left out."""
    config = json.loads((folder / "config.json").read_text())
    config = config.get("text_config", config)
    values = {_short(name): value for name, value in checkpoint_values(folder).items()}
    values = _stacked(values, config["num_hidden_layers"])
    names = {hf: gguf_name for gguf_name, hf in ARCHITECTURES[architecture].layer.items()}
    result = {}
    for name, value in values.items():
        words = name.split(".", 2)
        if name.startswith("layers.") and int(words[1]) < config["num_hidden_layers"]:
            rest = names["input_layernorm.weight" if words[2] == "input_layernorm.weight" else words[2]]
            if words[2] == "post_attention_layernorm.weight":
                rest = "post_attention_norm.weight" if architecture in ("qwen35moe", "glm4moe") else "ffn_norm.weight"
            result[f"blk.{words[1]}.{rest}"] = _changed(words[2], value, architecture, config)
        for gguf_name, hf in OUTSIDE.items():
            if name == _short(hf):
                result[gguf_name] = _changed(name, value, architecture, config)
    return result


def _short(name: str) -> str:
    return name.removeprefix("model.").removeprefix("language_model.")


def _stacked(values: Values, num_layers: int) -> dict[str, Float32]:
    """Experts stacked part by part, under the names that the architectures' tables have."""
    result = dict(values)
    for i in range(num_layers):
        at = f"layers.{i}."
        experts = {name: value for name, value in values.items() if name.startswith(at) and "expert" in name}
        experts = {name: value for name, value in experts.items() if "shared_expert" not in name}
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


def _changed(name: str, value: Float32, architecture: str, config: Mapping[str, Any]) -> Float32:
    """What the converter does to values."""
    if architecture == "qwen35moe":
        if name.endswith("norm.weight") and not name.startswith("linear_attn."):
            value = value + np.float32(1)
        if name.endswith("A_log"):
            value = -np.exp(value)
        if name.startswith("linear_attn."):
            value = _tiled(name.removeprefix("linear_attn."), value, config)
    if architecture in ("llama", "granitemoe") and name.startswith(("self_attn.q_proj", "self_attn.k_proj")):
        heads = config["num_attention_heads" if "q_proj" in name else "num_key_value_heads"]
        value = value.reshape(heads, 2, -1, *value.shape[1:]).swapaxes(1, 2).reshape(value.shape)
    return np.ascontiguousarray(value, np.float32)


def _tiled(name: str, value: Float32, config: Mapping[str, Any]) -> Float32:
    """Value heads in turns instead of grouped by their key head."""
    keys, d = config["linear_num_key_heads"], config["linear_value_head_dim"]
    each = config["linear_num_value_heads"] // keys
    first = 2 * keys * config["linear_key_head_dim"]

    def turned(x: Float32, width: int) -> Float32:
        return x.reshape(keys, each, width, -1).swapaxes(0, 1).reshape(x.shape)

    if name == "conv1d.weight":
        value = value[:, 0]
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
    """A file by the gguf package; matrices of experts and projections in `kind`, all else in float32."""
    writer = gguf.GGUFWriter(path, metadata["general.architecture"])
    for key, value in metadata.items():
        if key != "general.architecture":
            _add(writer, key, value)
    for name, value in tensors.items():
        if kind == gguf.GGMLQuantizationType.F32 or value.ndim < 2 or not _is_quantized(name):
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
