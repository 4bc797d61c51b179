"""The tensors of a checkpoint as llama.cpp's converter makes them, written anew; its recorded hashes prove it."""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from formats.dtypes import Float32, to_float32
from formats.encodings.sources.base import FLOATS, STORAGE
from repack.sources.folder import FolderSource
from repack.sources.gguf_models import ARCHITECTURES

Values = Mapping[str, Any]  # float32, or uint8: blocks of MXFP4


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


KIMI, LING, LFM2, STEP = ("kimi-linear", "kimi-k3"), "bailingmoe3", "lfm2moe", "step35"
MINIMAX_M3 = "minimax-m3"
MAMBA2 = GRANITE_4, NEMOTRON = "granitehybrid", "nemotron_h_moe"
TURNED = ("llama", "granitemoe", *MAMBA2)  # rotary pairs side by side
AFTER_ATTENTION = (
    "qwen35moe",
    "qwen3next",
    "glm4moe",
    "gpt-oss",
    "gemma4",
    "afmoe",
)  # as they name the second norm of a layer


def converted(folder: Path, architecture: str) -> dict[str, Float32]:
    """The checkpoint's tensors as the converter has them, multi-token prediction left out."""
    config = json.loads((folder / "config.json").read_text())
    config = config.get("text_config", config)
    values = {_short(name): value for name, value in checkpoint_values(folder).items()}
    if architecture == "qwen3vlmoe":
        values = _of_qwen3_vl(values)
    elif architecture == "llama4":
        values = _of_llama4(values, config)
    elif architecture == "gemma4":
        values = _of_gemma4(values, config)
    elif architecture == "deepseek4":
        values = _of_deepseek4(values, config)
    elif architecture == NEMOTRON:
        values = _of_nemotron(values, config)
    elif architecture == STEP:
        values |= {"rope_freqs.weight": _step_factors(config)}
    elif architecture == "qwen4exp":
        values = _of_qwen4(_stacked(values, config["num_hidden_layers"]), config)
    else:
        values = {_by_mlx(name): value for name, value in values.items()} if architecture in KIMI else values
        values = _of_kimi_k3(values, config) if architecture == "kimi-k3" else values
        if architecture == LING:  # one name for the last projection of two kinds of attention
            values = {name.replace("attention.o_proj", "attention.dense"): value for name, value in values.items()}
        values = _named_parts(values) if architecture == LFM2 else values
        values = _apart(_stacked(values, config["num_hidden_layers"]), architecture, config)
        if architecture == "mistral4":  # gate and up stay in one tensor
            values = _gate_up_in_one(values)
        if architecture == MINIMAX_M3:
            values = {name.replace("mlp.switch", "block_sparse_moe.switch"): value for name, value in values.items()}
        if architecture == LFM2:
            values = {name.replace(".mlp.", ".feed_forward."): value for name, value in values.items()}
    names = {hf: gguf_name for gguf_name, hf in ARCHITECTURES[architecture].layer.items()}
    outside = {_short(hf): gguf_name for gguf_name, hf in ARCHITECTURES[architecture].outside.items()}
    result = {}
    for name, value in values.items():
        words = name.split(".", 2)
        if name.endswith("rotary_emb.inv_freq"):
            continue
        if name in outside:
            result[outside[name]] = _changed(name, value, architecture, config)
        elif name.startswith("layers.") and int(words[1]) < config["num_hidden_layers"]:
            rest = names[words[2]]
            if (
                architecture == "kimi-k3"
                and rest == "attn_gate.weight"
                and f"layers.{words[1]}.self_attn.A_log" in values
            ):
                rest = "ssm_g.weight"  # two names for the gates of two kinds of layers
            if architecture == LING and rest == "attn_gate.weight" and f"layers.{words[1]}.attention.A_log" in values:
                rest = "ssm_g_a.weight"
            if words[2] == "post_attention_layernorm.weight":
                rest = "post_attention_norm.weight" if architecture in AFTER_ATTENTION else "ffn_norm.weight"
            result[f"blk.{words[1]}.{rest}"] = _changed(words[2], value, architecture, config)
        elif name == "rope_freqs.weight":
            result[name] = value
    return result


def _short(name: str) -> str:
    return name.removeprefix("backbone.").removeprefix("model.").removeprefix("language_model.").removeprefix("model.")


def _by_mlx(name: str) -> str:
    """Kimi's names beside the experts, as the architectures' tables have them."""
    if ".block_sparse_moe.experts." in name:
        return name
    return name.replace(".block_sparse_moe.gate.e_score", ".mlp.e_score").replace(".block_sparse_moe.", ".mlp.")


def _gate_up_in_one(values: Values) -> dict[str, Float32]:
    """Experts' gate and up as one stack."""
    result = dict(values)
    for name in [name for name in values if name.endswith("switch_mlp.gate_proj.weight")]:
        parts = [result.pop(name), result.pop(name.replace("gate_proj", "up_proj"))]
        result[name.replace("gate_proj", "gate_up_proj")] = np.concatenate(parts, axis=1)
    return result


def _named_parts(values: Values) -> dict[str, Float32]:
    """LFM2's feed-forwards under the names that most families give them."""
    parts = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
    result: dict[str, Float32] = {}
    for name, value in values.items():
        at, _, rest = name.partition(".feed_forward.")
        result[f"{at}.mlp." + ".".join(parts.get(word, word) for word in rest.split(".")) if rest else name] = value
    return result


def _stacked(values: Values, num_layers: int) -> dict[str, Float32]:
    """Experts stacked part by part, under the names that the architectures' tables have."""
    result = dict(values)
    for i in range(num_layers):
        at = f"layers.{i}."
        experts = {name: value for name, value in values.items() if name.startswith(at) and "expert" in name}
        beside = re.compile("(shared|routed)_expert|expert_bias|e_score")
        experts = {name: value for name, value in experts.items() if not beside.search(name)}
        if f"{at}mlp.experts.down_proj_blocks" in experts:  # gpt-oss, which has a name of its own for the part
            continue
        experts |= {
            name: value for name, value in values.items() if name.startswith(f"{at}block") and "put_linear" in name
        }
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
        elif name.endswith("shared_mlp.input_linear.weight"):
            halves = np.split(value, 2)
            for part, rows in zip(("gate", "up"), halves, strict=True):
                result[name.replace("shared_mlp.input_linear", f"mlp.shared_expert.{part}_proj")] = rows
        elif name.endswith("shared_mlp.output_linear.weight"):
            result[name.replace("shared_mlp.output_linear", "mlp.shared_expert.down_proj")] = value
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
        rows = value.shape[0] * value.shape[1]
        value = _mxfp4(value.reshape(rows, -1), scales.reshape(rows, -1)).reshape(*value.shape[:2], -1)
    at, kind = name.rpartition("_")[0], "bias" if name.endswith("_bias") else "weight"
    if at.endswith("down_proj"):
        yield f"{at}.{kind}", value
    else:
        for nth, part in enumerate(("gate", "up")):
            yield f"{at.replace('gate_up', part)}.{kind}", np.ascontiguousarray(value[:, nth::2])


def _of_qwen3_vl(values: Values) -> dict[str, Float32]:
    """Experts apart and rows first; nothing of what sees."""
    result: dict[str, Float32] = {}
    for name, value in values.items():
        at, _, last = name.rpartition(".")
        rows = value.swapaxes(-1, 1) if value.ndim == 3 else value
        stack = at.replace(".experts", ".switch_mlp")
        if last == "gate_up_proj":
            result[f"{stack}.gate_proj.weight"], result[f"{stack}.up_proj.weight"] = np.split(rows, 2, axis=1)
        elif last == "down_proj":
            result[f"{stack}.down_proj.weight"] = rows
        elif not name.startswith("visual."):
            result[name] = value
    return result


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


def _of_deepseek4(values: Values, config: Mapping[str, Any]) -> dict[str, Any]:
    """Experts stacked as blocks of MXFP4, tables of experts in 32 bits; nothing of multi-token prediction."""
    result: dict[str, Any] = {}
    for name, value in values.items():
        at, _, rest = name.partition(".ffn.experts.")
        if rest.startswith("0.") and rest.endswith(".weight"):
            stem = f"{at}.ffn.experts.{{}}.{rest[2:].removesuffix('.weight')}"
            each = [stem.format(expert) for expert in range(config["n_routed_experts"])]
            blocks = [_mxfp4(values[f"{expert}.weight"].view(np.uint8), values[f"{expert}.scale"]) for expert in each]
            result[f"{stem.replace('{}.', '')}.weight"] = np.stack(blocks)
        elif not rest and not name.startswith("mtp."):
            result[name] = value.astype("<i4") if name.endswith("tid2eid") else value
    return result


def _of_kimi_k3(values: Values, config: Mapping[str, Any]) -> dict[str, Any]:
    """Norm and projection of attention residuals as their product, A_log of heads alone, MXFP4 in ggml's blocks."""
    result: dict[str, Any] = {}
    for name, value in values.items():
        if name.endswith("res_norm.weight"):
            at = name.removesuffix("_norm.weight")
            result[f"{at}_score.weight"] = value * values[f"{at}_proj.weight"][0]
        elif name.endswith("A_log"):
            result[name] = value[: config["linear_attn_config"]["num_heads"]]
        elif name.endswith("weight_packed"):
            result[name.removesuffix("_packed")] = _mxfp4(value, values[name.replace("_packed", "_scale")])
        elif not name.startswith(("vision_tower.", "mm_projector.")) and not name.endswith(
            ("res_proj.weight", "_scale")
        ):
            result[name] = value
    return result


def _of_nemotron(values: Values, config: Mapping[str, Any]) -> dict[str, Float32]:
    """Experts stacked, under MLX's names; nothing of multi-token prediction."""
    result = {name: value for name, value in values.items() if ".experts." not in name and not name.startswith("mtp.")}
    for name in values:
        at, _, rest = name.partition(".experts.0.")
        if rest and not name.startswith("mtp."):
            stack = [values[f"{at}.experts.{expert}.{rest}"] for expert in range(config["n_routed_experts"])]
            mlx = {"up_proj.weight": "fc1.weight", "down_proj.weight": "fc2.weight"}[rest]
            result[f"{at}.switch_mlp.{mlx}"] = np.stack(stack)
    return result


def _of_qwen4(values: Values, config: Mapping[str, Any]) -> dict[str, Float32]:
    """The indexer's projection apart, the table of n-grams as one tensor, and nothing of its hashes."""
    result: dict[str, Float32] = {}
    queries = config["indexer_n_heads"] * config["indexer_head_dim"]
    shards: list[Float32] = []
    for name, value in values.items():
        if ".ple_embedding." not in name and name.endswith("index_qk_proj.weight"):
            for part, rows in (("q", value[:queries]), ("k", value[queries:])):
                result[name.replace("index_qk_proj", f"index_{part}_proj")] = rows
        elif ".ngram_embedding.shard_" in name:
            shards.append(values[f"{name.rpartition('shard_')[0]}shard_{len(shards)}.weight"])
        elif ".ple_embedding." not in name:
            result[name] = value
    at = f"layers.{config['ple_layer_ids'][0] - 1}.ple.ple_embedding.ngram_embedding"
    return result | {f"{at}.shard_0.weight": np.concatenate(shards)}


def _mxfp4(packed: npt.NDArray[np.uint8], scales: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """[rows, columns / 2] with the lower of two codes first, scales [rows, groups of 32] -> ggml's blocks."""
    pairs = packed.reshape(*scales.shape, 16)
    codes = np.stack([pairs & 15, pairs >> 4], axis=-1).reshape(*scales.shape, 32)
    blocks = codes[..., :16] | codes[..., 16:] << 4
    return np.concatenate([scales[..., None], blocks], axis=-1).reshape(len(packed), -1)


def _llama3_factors(config: Mapping[str, Any]) -> Float32:
    """By how much transformers' llama3 divides the angles of pairs."""
    scaling, half = config["rope_scaling"], config["head_dim"] // 2
    return _factors(scaling, config["rope_theta"], half)


def _step_factors(config: Mapping[str, Any]) -> Float32:
    """Of Step 3.5: of the half of a head that turns in its first layer, then ones."""
    half = config["head_dim"] // 4
    factors = _factors(config["rope_scaling"], config["rope_theta"][0], half)
    return np.concatenate([factors, np.ones(half, np.float32)])


def _factors(scaling: Mapping[str, Any], theta: float, half: int) -> Float32:
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    wavelengths = 2 * np.pi * theta ** (np.arange(half) / half)
    smooth = np.clip((scaling["original_max_position_embeddings"] / wavelengths - low) / (high - low), 0, 1)
    return (1 / ((1 - smooth) / scaling["factor"] + smooth)).astype(np.float32)


def _changed(name: str, value: Float32, architecture: str, config: Mapping[str, Any]) -> Float32:
    """What the converter does to values."""
    if architecture in ("qwen35moe", "qwen3next", "qwen4exp"):
        if "norm" in name.split(".")[-2] and not name.startswith("linear_attn."):
            value = value + np.float32(1)
        if name.endswith("A_log"):
            value = -np.exp(value)
        if name in ("linear_attn.conv1d.weight", "ple.conv1d.weight"):
            value = value[:, 0]
        if name.startswith("linear_attn.") and architecture != "qwen3next":
            value = _tiled(name.removeprefix("linear_attn."), value, config)
    if architecture in (STEP, MINIMAX_M3) and name.endswith("norm.weight"):
        value = value + np.float32(1)
    if architecture == LFM2 and name == "conv.conv.weight":
        value = value[:, 0]
    if config["model_type"] == "sarvam_moe" and name.endswith("expert_bias"):
        value = value - value.mean()
    if architecture in KIMI and name.endswith("A_log"):
        value = -np.exp(value)
    if architecture == LING and name.endswith("A_log"):
        value = np.exp(value).reshape(-1, 1)
    if architecture in (*KIMI, LING) and "_conv1d." in name:
        value = value.reshape(1, -1, 1, value.shape[-1])
    if architecture in MAMBA2:
        value = _of_mamba2(name.partition(".")[2], value, config)
    if architecture in TURNED and name.partition(".")[2].startswith(("q_proj", "k_proj")):
        heads = config["num_attention_heads" if "q_proj" in name else "num_key_value_heads"]
        value = value.reshape(heads, 2, -1, *value.shape[1:]).swapaxes(1, 2).reshape(value.shape)
    return np.ascontiguousarray(value)


def _of_mamba2(name: str, value: Float32, config: Mapping[str, Any]) -> Float32:
    """Numbers of heads as columns, the norm by groups of heads."""
    if name in ("A_log", "D"):
        return (-np.exp(value) if name == "A_log" else value).reshape(-1, 1)
    if name == "norm.weight":
        return value.reshape(config.get("mamba_n_groups", config.get("n_groups")), -1)
    return value[:, 0] if name == "conv1d.weight" else value


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
