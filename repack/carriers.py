"""What MLX's and GGUF files have in other parts than a publisher's: tensors are looked at anew, or the facts say so.

No byte moves: a tensor of several, one after another, becomes a view of each, and axes of a matrix are counted as one.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

from formats.config import (
    DeepseekV3Config,
    DeepseekV41Config,
    GraniteMoeHybridConfig,
    KimiK3Config,
    ModelConfig,
    MuseSparkConfig,
    NemotronHConfig,
)
from formats.encodings.sources.plain import MINUS_ONE
from formats.errors import FormatError, UnsupportedError
from formats.families import FAMILIES
from formats.quantization import Quantization
from repack.sources.base import SourceTensor

Tensors = Mapping[str, SourceTensor]
SPLIT_KV_B = ".embed_q.weight"
STACKED_MATRICES = (".embed_q.", ".unembed_out.", ".o_a_proj.")  # of heads, or of their groups
FUSED_RESIDUAL = "output_attn_res_score.weight"
CORRECTION_BIAS = ".mlp.gate.e_score_correction_bias"
FACTS_OF_TENSORS = ("kv_b_split", "attn_res_fused", "without_correction_bias", "residual_gate_split")
NORMS_AROUND_ZERO = ("layernorm.weight", "q_norm.weight", "k_norm.weight", "model.norm.weight")
VECTORS_OF_MAMBA2 = tuple(f".{at}.{name}" for at in ("mamba", "mixer") for name in ("A_log", "D", "norm.weight"))
STACK_OF_EXPERTS = re.compile(r"(.+\.mlp\.experts\.)(gate_up|down)_proj(?:_(weight_scale|weight_scale_2))?")
FACTORS_OF_STACKS = ".mlp.experts.gate_up_proj_weight_scale_2"
STACKED = {  # by MLX, rows after rows: module, the letters in its name that stand for its parts, and those
    ".self_attn.qkv_proj": ("qkv", ("q", "k", "v")),
    ".self_attn.qkv_conv": ("qkv", ("q", "k", "v")),
    ".self_attn.qkvg_proj": ("qkvg", ("q", "k", "v", "gate")),
}
EMBEDDING_BY_MLX = "model.embed_tokens.weight"  # of DeepSeek-V4.1, which is published without `model.`
MADE_GATE = ".add_attn_alpha"
TEMPERATURE_OF_MADE_GATES = 0.3  # whatever config.json says
NORMS_OF_MUSE_SPARK = (  # around zero; the last one is not
    ".input_layernorm.weight",
    ".pre_feedforward_layernorm.weight",
    ".post_feedforward_layernorm.weight",
    ".mlp.pre_expert_norm.weight",
    ".mlp.experts.post_expert_norm.weight",
)


def in_one_form(tensors: Tensors, config: ModelConfig) -> tuple[dict[str, SourceTensor], ModelConfig]:
    """The tensors as a family's table has them, and the facts with what is otherwise in these files.

    Raises FormatError for a tensor of several parts whose rows are not theirs, UnsupportedError for what MLX's files
    lack or made of another config.
    """
    if FAMILIES[config.model_type].norms_around_zero:
        tensors = without_added_ones(tensors)
    if isinstance(config, DeepseekV3Config) and any(name.endswith(SPLIT_KV_B) for name in tensors):
        config = replace(config, kv_b_split=True)
        tensors = without_head_axes(tensors)
    if isinstance(config, DeepseekV3Config) and config.post_mlp_norm:  # A.X-K1 is published without
        config = replace(config, without_correction_bias=not any(name.endswith(CORRECTION_BIAS) for name in tensors))
    if isinstance(config, GraniteMoeHybridConfig | NemotronHConfig):
        tensors = with_vectors_of_mamba2(tensors)
    if isinstance(config, MuseSparkConfig) and any(name.endswith(FACTORS_OF_STACKS) for name in tensors):
        tensors = with_experts_apart(tensors, config.num_experts)
    if isinstance(config, MuseSparkConfig) and any(name.endswith(MADE_GATE) for name in tensors):
        tensors = as_published_muse_spark(tensors, config)
        config = replace(config, residual_gate_split=True, rope_interleave=True)
    if isinstance(config, DeepseekV41Config) and EMBEDDING_BY_MLX in tensors:
        if config.ngram_layers:
            raise UnsupportedError(
                f"config.json: engram_layer_ids is {list(config.ngram_layers)}, but {tensors[EMBEDDING_BY_MLX].file} "
                "has the names of MLX, which knows no n-grams of deepseek_v41: expected a checkpoint in its "
                "publisher's names"
            )
        tensors = without_head_axes(tensors)
    if isinstance(config, KimiK3Config):
        config = replace(config, attn_res_fused=any(name.endswith(FUSED_RESIDUAL) for name in tensors))
        tensors = as_published_k3(tensors, config.linear_num_heads)
    return dict(tensors), config


def with_facts_of_tensors(config: ModelConfig, model: ModelConfig) -> ModelConfig:
    """The facts of a config.json, with those of a container's model that only its tensors told."""
    told = [key for key in FACTS_OF_TENSORS if hasattr(config, key) and hasattr(model, key)]
    if isinstance(model, MuseSparkConfig):
        told.append("rope_interleave")
    return replace(config, **{key: getattr(model, key) for key in told})


def without_added_ones(tensors: Tensors) -> dict[str, SourceTensor]:
    """Norms around zero, which MLX stores around one.

    It is told by its convolutions, [channels, kernel, 1], or where there are none by its name of a router's bias.
    """
    by_mlx = any(
        (name.endswith("conv1d.weight") and tensor.shape[-1:] == (1,)) or name.endswith(".mlp.gate.router_bias")
        for name, tensor in tensors.items()
    )
    if not by_mlx:
        return dict(tensors)
    return {
        name: tensor._replace(adjustment=MINUS_ONE) if name.endswith(NORMS_AROUND_ZERO) else tensor
        for name, tensor in tensors.items()
    }


def without_head_axes(tensors: Tensors) -> dict[str, SourceTensor]:
    """MLX's halves of kv_b_proj, [heads, rows, columns], and outputs by groups of heads, as matrices."""
    return {
        name: tensor._replace(shape=(tensor.shape[0] * tensor.shape[1], *tensor.shape[2:]))
        if len(tensor.shape) == 3 and any(stack in name for stack in STACKED_MATRICES)
        else tensor
        for name, tensor in tensors.items()
    }


def with_vectors_of_mamba2(tensors: Tensors) -> dict[str, SourceTensor]:
    """Numbers of heads, columns in GGUF files, and the norm, there by groups of heads, as vectors."""
    return {
        name: tensor._replace(shape=(math.prod(tensor.shape),)) if name.endswith(VECTORS_OF_MAMBA2) else tensor
        for name, tensor in tensors.items()
    }


def with_experts_apart(tensors: Tensors, num_experts: int) -> dict[str, SourceTensor]:
    """Stacks of ModelOpt, whose gate and up have a factor each, as matrices by themselves; those in bf16, too.

    A stack of other than num_experts, or of an odd number of rows, stays what it is. Raises FormatError for factors of
    another shape than [experts, 2], or [experts] of down.
    """
    result: dict[str, SourceTensor] = {}
    for name, tensor in tensors.items():
        stack = STACK_OF_EXPERTS.fullmatch(name)
        parts = ("down",) if stack is None or stack[2] == "down" else ("gate", "up")
        experts, rows, rest = (tensor.shape[:1], tensor.shape[1:2] or (1,), tensor.shape[2:])
        factors = (num_experts, 2) if len(parts) == 2 else (num_experts,)
        if stack is not None and stack[3] == "weight_scale_2" and tensor.shape != factors:
            raise FormatError(
                f"{tensor.file}: {name} has shape {list(tensor.shape)}, expected {list(factors)}: a factor for each "
                f"{' and '.join(parts)} of {num_experts} experts"
            )
        if stack is None or experts != (num_experts,) or rows[0] % len(parts):
            result[name] = tensor
            continue
        shape = () if stack[3] == "weight_scale_2" else (rows[0] // len(parts), *rest)
        each = tensor.nbytes // (num_experts * len(parts))
        for place in range(num_experts * len(parts)):
            expert, part = divmod(place, len(parts))
            own = f"{stack[1]}{expert}.{parts[part]}_proj.{stack[3] or 'weight'}"
            result[own] = tensor._replace(name=own, shape=shape, offset=tensor.offset + place * each, nbytes=each)
    return result


def said_of_parts(said: Quantization) -> Quantization:
    """MLX's config, with what it says of a module of three parts said of each."""
    more = {part: layer for path, layer in said.overrides.items() for part in _parts(path)}
    return replace(said, overrides=more)


def _parts(name: str) -> list[str]:
    """A name, or those of the parts that MLX has in one module: queries, keys and values, and of some gates."""
    stacked = next((module for module in STACKED if module in name), None)
    if stacked is None:
        return [name]
    letters, parts = STACKED[stacked]
    return [name.replace(stacked, stacked.replace(letters, part)) for part in parts]


def _apart(tensor: SourceTensor, shares: Sequence[int], tensors: Tensors) -> list[SourceTensor]:
    """The parts of a stack, rows after rows, each of so many shares of them; none stands by itself, too."""
    rows, *rest = tensor.shape or (0,)
    if rows % sum(shares):
        raise FormatError(
            f"{tensor.file}: {tensor.name} has shape {list(tensor.shape)}, expected rows of {len(shares)} parts, "
            f"{' to '.join(map(str, shares))}"
        )
    result, share, offset = [], rows // sum(shares), tensor.offset
    for name, number in zip(_parts(tensor.name), shares, strict=True):
        if name in tensors:
            raise FormatError(f"{tensors[name].file}: {name} is there, but {tensor.name} holds it, too: expected one")
        nbytes = tensor.nbytes // sum(shares) * number
        result.append(tensor._replace(name=name, shape=(share * number, *rest), offset=offset, nbytes=nbytes))
        offset += nbytes
    return result


def as_published_muse_spark(tensors: Tensors, config: MuseSparkConfig) -> dict[str, SourceTensor]:
    """Stacks of attention apart, and norms around zero, which MLX has around one.

    Raises UnsupportedError where its gates are of another temperature than the config's.
    """
    if config.residual_gate_temperature != TEMPERATURE_OF_MADE_GATES:
        raise UnsupportedError(
            f"config.json: residual_gate_temperature is {config.residual_gate_temperature}, but MLX makes gates of "
            f"{TEMPERATURE_OF_MADE_GATES}, expected that or a checkpoint in its publisher's names"
        )
    result: dict[str, SourceTensor] = {}
    queries, keys = config.num_attention_heads, config.num_key_value_heads
    for name, tensor in tensors.items():
        if ".self_attn.qkvg_proj." in name:
            result |= {part.name: part for part in _apart(tensor, (queries, keys, keys, queries), tensors)}
        elif name.endswith(NORMS_OF_MUSE_SPARK):
            result[name] = tensor._replace(adjustment=MINUS_ONE)
        else:
            result[name] = tensor
    return result


def as_published_k3(tensors: Tensors, heads: int) -> dict[str, SourceTensor]:
    """Stacks apart; A_log cut to [heads], as MLX's and GGUF files have it: published are zeros up to a head's width.

    And scores of attention residuals, vectors in GGUF files, as matrices of one row.
    """
    result = dict(tensors)
    for name, tensor in tensors.items():
        vector = len(tensor.shape) == 1
        if len(_parts(name)) == 3:
            del result[name]
            result |= {part.name: part for part in _apart(tensor, (1, 1, 1), tensors)}
        elif name.endswith("_res_score.weight") and vector:
            result[name] = tensor._replace(shape=(1, *tensor.shape))
        elif name.endswith(".self_attn.A_log") and vector and tensor.shape[0] > heads:
            result[name] = tensor._replace(shape=(heads,), nbytes=tensor.nbytes // tensor.shape[0] * heads)
    return result
