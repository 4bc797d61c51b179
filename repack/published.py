"""The tensors of a published checkpoint from config.json alone: as its quantization_config says, else in bf16."""

import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from dataclasses import replace
from fnmatch import translate
from functools import cache
from typing import Any, NamedTuple

from formats.config import ModelConfig
from formats.encodings.sources import (
    AWQSource,
    FP8Source,
    GPTQSource,
    Int8Source,
    MXFP4Source,
    MXFP8Source,
    NVFP4Source,
    PackedSource,
)
from formats.encodings.sources.base import SourceEncoding, stored
from formats.encodings.sources.fp4 import BLOCKS, BYTES
from formats.encodings.sources.fp8 import PER_BLOCK, PER_CHANNEL, PER_TENSOR
from formats.errors import FormatError, UnsupportedError
from formats.families import FAMILIES
from formats.fields import shown
from formats.quantization import AWQ, COMPRESSED, FP8, GPTQ, MODELOPT, MXFP4, QUARK, Groups, Quantization
from repack.sources.base import SourceTensor

# What no quantizer touches, whether its config says so or not: embedding, head, routers, convolutions.
_NEVER = ("embed_tokens", "lm_head", ".gate.weight", ".router.", "conv1d", "weights_proj", "shared_expert_gate")


class Kept(NamedTuple):
    """How a matrix [rows, columns] is kept: its encoding, and the name of each plane's tensor."""

    encoding: SourceEncoding
    names: dict[str, str]  # {base} and {weight} stand for the module's names
    carrier: int = 0  # which of the dtypes that a plane may have


Keeper = Callable[[int, int], Kept]
_BESIDE = {"codes": "{weight}_packed", "scales": "{weight}_scale"}
_SCALED = {"weight": "{weight}", "scale": "{weight}_scale"}
_QUARK: dict[str, Keeper] = {
    "fp4 per_group": lambda rows, columns: Kept(MXFP4Source(BYTES), {"codes": "{weight}", "scales": "{weight}_scale"}),
    "fp8_e4m3 per_tensor": lambda rows, columns: Kept(FP8Source(PER_TENSOR, "f32", ()), _SCALED),
    "fp8_e4m3 per_channel": lambda rows, columns: Kept(FP8Source(PER_CHANNEL, "f32", (rows,)), _SCALED),
    "fp8_e4m3 per_block": lambda rows, columns: Kept(FP8Source(PER_BLOCK, "f32"), _SCALED),
}


def published_tensors(config: ModelConfig, said: Quantization | None) -> Iterator[SourceTensor]:
    """Every tensor of a whole checkpoint, without a file: in bf16, or as quantization_config says.

    Raises UnsupportedError for a method whose tensors only headers tell, such as MLX, FormatError for a pattern of
    modules that is none.
    """
    family = FAMILIES[config.model_type]
    keeper_of = _keepers(said)
    fp4_experts = said is not None and said.expert_dtype == "fp4"
    left_out = _Modules(family.never_quantized if said is None else (*family.never_quantized, *said.left_out), said)
    named = frozenset(said.modules.names) if said is not None and said.modules is not None else frozenset()
    only_experts = said is not None and said.method == MXFP4
    transposed = any(rule.transposed for rule in family.expert_layouts[0])
    of_rows = {f"layers.{i}.{part.published}" for i, part in family.ngram_shards(config)}  # whose rows are read alone
    for name, shape, dtype in family.checkpoint(config):
        base, suffix = (name.removesuffix(".weight"), ".weight") if name.endswith(".weight") else (name, "")
        experts = ".experts." in name
        may_be = dtype == "BF16" and (experts or not only_experts)
        chosen = name in of_rows or _is_chosen(name, base, shape, left_out, named)
        keep = keeper_of(base) if may_be and chosen else None
        if keep is None:
            yield _tensor(name, dtype, shape)
            continue
        rows, columns = reversed(shape[-2:]) if transposed and experts else shape[-2:]
        kept = _fp4_of_deepseek(rows, columns) if experts and fp4_experts else keep(rows, columns)
        if name in of_rows and said is not None and said.expert_dtype:
            kept = kept._replace(encoding=MXFP8Source(BYTES))
        for plane in kept.encoding.planes(rows, columns):
            stack = shape[:-2]
            yield _tensor(
                kept.names[plane.name].format(base=base, weight=base + suffix),
                plane.dtypes[kept.carrier],
                (*stack, *plane.shape),
            )


def _tensor(name: str, dtype: str, shape: tuple[int, ...]) -> SourceTensor:
    return SourceTensor(name, "made up", dtype, shape, 0, _nbytes(dtype, shape))


@cache
def _nbytes(dtype: str, shape: tuple[int, ...]) -> int:
    storage, held = stored(dtype, shape)
    return math.prod(held) * storage.itemsize


def _is_chosen(name: str, base: str, shape: Sequence[int], left_out: "_Modules", named: Set[str]) -> bool:
    """Whether a tensor is a matrix of a linear layer that the config does not leave out, or names."""
    if len(shape) < 2 or name.endswith("bias"):
        return False
    if ".experts." not in name and base not in named and any(word in name for word in _NEVER):
        return False
    return base not in left_out


class _Modules:
    """Those that entries of `ignore` or `modules_to_not_convert` mean: names, their first or last parts, globs or re:.

    Raises FormatError for a re: that is no regular expression.
    """

    def __init__(self, entries: Iterable[str], said: Quantization | None) -> None:
        names, self._matches = [], []
        for entry in entries:
            if not entry.startswith("re:") and "*" not in entry:
                names.append(entry)
                continue
            pattern = entry[3:] if entry.startswith("re:") else f"{translate(entry)}|{translate(f'{entry}.*')}"
            try:
                self._matches.append(re.compile(pattern).match)
            except re.error as error:
                where = said.where if said is not None else "config.json"
                raise FormatError(f"{where}: leaves out {shown(entry)}, no regular expression: {error}") from None

        self._first = tuple(f"{name}." for name in names)
        self._last = tuple(f".{name}" for name in names)

    def __contains__(self, module: str) -> bool:
        named = f"{module}.".startswith(self._first) or f".{module}".endswith(self._last)
        return named or any(match(module) for match in self._matches)


def _keepers(said: Quantization | None) -> Callable[[str], Keeper | None]:
    """How a module of this name is kept; None for one that is not quantized. Raises UnsupportedError."""
    if said is None:
        return lambda module: None
    if said.modules is None:
        keep = cache(_keeper(said))
        return lambda module: keep
    modules = said.modules

    @cache
    def keeper(groups: Groups | None) -> Keeper | None:
        if groups is None:
            return None
        bits, size = frozenset({groups.bits}), frozenset({groups.group_size})
        return cache(_keeper(replace(said, bits=bits, group_sizes=size)))

    return lambda module: keeper(modules.groups(module))


def _keeper(said: Quantization) -> Keeper:
    """How a method keeps matrices. Raises UnsupportedError."""
    if said.method == FP8 and said.expert_dtype:
        names = {"weight": "{weight}", "scale": "{base}.scale"}
        return lambda rows, columns: Kept(FP8Source(PER_BLOCK, "e8m0", block=said.block), names, -1)
    if said.method == FP8:
        scale = {"weight": "{weight}", "scale": "{weight}_scale_inv"}
        return lambda rows, columns: Kept(FP8Source(PER_BLOCK, "f32", block=said.block), scale)
    if said.method == MXFP4:
        return lambda rows, columns: Kept(MXFP4Source(BLOCKS), {"codes": "{base}_blocks", "scales": "{base}_scales"})
    if said.method == COMPRESSED:
        return _compressed(said, said.form)
    if said.method == MODELOPT and said.form == "NVFP4":
        names = {"codes": "{weight}", "scales": "{weight}_scale", "global": "{weight}_scale_2"}
        return lambda rows, columns: Kept(NVFP4Source("multiply", BYTES, ()), names)
    if said.method == MODELOPT and said.form == "MXFP8":
        return lambda rows, columns: Kept(MXFP8Source(BYTES), _SCALED)
    if said.method == MODELOPT and said.form == "FP8":
        return lambda rows, columns: Kept(FP8Source(PER_TENSOR, "f32", ()), _SCALED)
    if said.method == QUARK and said.form in _QUARK:
        return _QUARK[said.form]
    if said.method in (GPTQ, AWQ) and len(said.bits) == len(said.group_sizes) == 1:
        return _grouped(said)
    raise UnsupportedError(
        f"{said.where}: {said.quant_method} checkpoints differ in what only their headers tell; plan the repository or "
        "its folder instead"
    )


def _fp4_of_deepseek(rows: int, columns: int) -> Kept:
    return Kept(MXFP4Source(BYTES), {"codes": "{weight}", "scales": "{base}.scale"}, -1)


def _compressed(said: Quantization, form: str) -> Keeper:
    bits, size = max(said.bits, default=8), max(said.group_sizes, default=-1)
    symmetric = said.symmetric is not False
    if form == "pack-quantized":
        names = {plane: f"{{weight}}_{plane}" for plane in ("packed", "scale", "shape", "zero_point")}

        def packed(rows: int, columns: int) -> Kept:
            group_size = columns if size == -1 else size
            return Kept(PackedSource(bits, group_size, "bf16", (rows, columns), symmetric), names)

        return packed
    if form == "int-quantized":
        names = _SCALED | {"zero_point": "{weight}_zero_point"}

        def int8(rows: int, columns: int) -> Kept:
            group_size = columns if size == -1 else size
            return Kept(Int8Source(group_size, "bf16", (rows, columns // group_size), symmetric), names)

        return int8
    if form == "mxfp4-pack-quantized":
        return lambda rows, columns: Kept(MXFP4Source(BYTES), _BESIDE)
    if form == "mxfp8-quantized":
        return lambda rows, columns: Kept(MXFP8Source(BYTES), _SCALED)
    if form == "nvfp4-pack-quantized":
        names = {**_BESIDE, "global": "{weight}_global_scale"}
        return lambda rows, columns: Kept(NVFP4Source("divide", BYTES, (1,)), names)
    if form in ("float-quantized", "naive-quantized"):
        return lambda rows, columns: Kept(FP8Source(PER_CHANNEL, "bf16", (rows, 1)), _SCALED)
    raise UnsupportedError(f"{said.where}: {form} is more than one encoding; plan the repository or its folder instead")


def _grouped(said: Quantization) -> Keeper:
    (bits,), (size,) = said.bits, said.group_sizes
    symmetric, g_idx = said.symmetric is not False, said.modules is None

    def grouped(rows: int, columns: int) -> Kept:
        group_size = columns if size == -1 else size
        encoding: Any = (
            AWQSource(group_size, "f16", symmetric)
            if said.method == AWQ
            else GPTQSource(bits, group_size, "f16", symmetric, said.version, g_idx)
        )
        return Kept(encoding, {plane.name: f"{{base}}.{plane.name}" for plane in encoding.planes(rows, columns)})

    return grouped
