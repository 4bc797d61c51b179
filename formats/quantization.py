"""quantization_config of a checkpoint: what it says of the encodings of its tensors, wherever it stands.

Tensors decide how a weight is kept; this says what they cannot (bits of an override, which GPTQ version, that groups
are in order), and that both agree. Values that no source encoding implements are refused by name.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from formats.errors import FormatError, UnsupportedError
from formats.fields import Fields, parse_config, parse_json, shown

CONFIG_FILE = "config.json"
MODELOPT_FILE = "hf_quant_config.json"  # where ModelOpt writes it besides, or instead
FP8, COMPRESSED, MODELOPT, MXFP4, GPTQ, AWQ, AUTO_ROUND, QUARK, MLX = (
    "fp8",
    "compressed-tensors",
    "modelopt",
    "mxfp4",
    "gptq",
    "awq",
    "auto-round",
    "quark",
    "mlx",
)
COMPRESSED_FORMATS = (
    "pack-quantized",
    "int-quantized",
    "float-quantized",
    "naive-quantized",
    "mxfp4-pack-quantized",
    "mxfp8-quantized",
    "nvfp4-pack-quantized",
    "mixed-precision",
)
MODELOPT_ALGORITHMS = ("NVFP4", "FP8", "FP8_PB_WO", "FP8_PER_CHANNEL_PER_TOKEN", "MXFP8", "MIXED_PRECISION")
MLX_MODES = {"affine": (4, 64), "mxfp4": (4, 32), "mxfp8": (8, 32), "nvfp4": (4, 16)}  # bits, group_size by default
# Whose tensors AutoRound writes, by packing_format, and whether zero points are stored less 1, as GPTQ's version 1 has
# them (its qlinear_torch_zp) or as they are (its qlinear_torch).
AUTO_ROUND_PACKINGS = {
    "auto_round:auto_gptq": (GPTQ, 1),
    "auto_round:gptq": (GPTQ, 1),
    "auto_round": (GPTQ, 2),
    "auto_round:gptqmodel": (GPTQ, 2),
    "auto_round:auto_awq": (AWQ, 1),
    "auto_round:awq": (AWQ, 1),
    "auto_round:llm_compressor": (COMPRESSED, 1),
}
AUTO_ROUND_FLOATS = {  # data_type of llm_compressor
    "mx_fp": "mxfp4-pack-quantized",
    "mx_fp_rceil": "mxfp4-pack-quantized",
    "nv_fp": "nvfp4-pack-quantized",
    "nv_fp4_with_static_gs": "nvfp4-pack-quantized",
}
Implemented = Mapping[str, tuple[Any, ...]]  # values by key; the first: also by default
QUARK_WEIGHTS: Mapping[str, Implemented] = {  # by dtype: what else is said of a weight
    "fp4": {"qscheme": ("per_group",), "group_size": (32,), "scale_format": ("e8m0",), "ch_axis": (-1, 1)},
    "fp8_e4m3": {
        "qscheme": ("per_tensor", "per_channel", "per_block"),
        "ch_axis": (0, None),
        "block_size": ([128, 128], None),
        "symmetric": (True, None),
    },
}
UNQUANTIZED = 16  # bits from which on a module is left as it is


@dataclass(frozen=True)
class Quantization:
    """What the config says; None and empty where a method says nothing of it."""

    method: str  # whose tensors these are
    where: str  # for messages
    bits: frozenset[int] = frozenset()  # that occur; none: not said
    group_sizes: frozenset[int] = frozenset()  # that occur, -1 for whole rows; none: not said
    symmetric: bool | None = True  # GPTQ, AWQ, compressed-tensors; None: some are, some are not
    version: int = 1  # of GPTQ's files
    overrides: Mapping[str, "MLXLayer | None"] = field(default_factory=dict)  # MLX, by module; None: not quantized
    default: "MLXLayer | None" = None  # MLX
    form: str = ""  # `format` of compressed-tensors, quant_algo of ModelOpt, dtype and qscheme of Quark if they are one
    left_out: tuple[str, ...] = ()  # patterns of modules that are not quantized
    block: int = 128  # FP8: rows, and columns, that share a scale
    expert_dtype: str = ""  # DeepSeek-V4: experts in fp4 or fp8
    written_as: str = ""  # quant_method, where that is another's
    modules: "Modules | None" = None  # AutoRound

    @property
    def quant_method(self) -> str:
        """What the config calls it, for messages."""
        return self.written_as or self.method

    def mlx_layer(self, module: str) -> "MLXLayer | None":
        """What MLX's config says of a module."""
        return self.overrides.get(module, self.default)


class Groups(NamedTuple):
    """How AutoRound keeps a module."""

    bits: int
    group_size: int  # -1 for whole rows


@dataclass(frozen=True)
class Modules:
    """What AutoRound says of modules: by name, else by the first pattern that is found in it, as vLLM reads it."""

    default: Groups | None
    names: Mapping[str, Groups | None]  # None: not quantized
    patterns: tuple[tuple["re.Pattern[str]", Groups | None], ...]
    blocks: tuple[str, ...]  # whose modules are quantized; none: all

    def groups(self, module: str) -> Groups | None:
        """How a module is kept; None for one that is not quantized."""
        if module in self.names:
            return self.names[module]
        for pattern, groups in self.patterns:
            if pattern.search(module):
                return groups
        inside = not self.blocks or module.startswith(tuple(f"{block}." for block in self.blocks))
        return self.default if inside else None


@dataclass(frozen=True)
class MLXLayer:
    """Parameters of an MLX module."""

    bits: int
    group_size: int
    mode: str
    global_scale: bool = False  # beside the scales of nvfp4


def read_quantization(config: bytes, modelopt: bytes | None = None, where: str = CONFIG_FILE) -> Quantization | None:
    """What config.json (and hf_quant_config.json) say; None for a checkpoint of plain floats.

    Raises FormatError for wrong values, UnsupportedError for a method or value that is not implemented.
    """
    outer = Fields(parse_config(config, where), where)
    for fields in (outer, *([outer.object("text_config")] if "text_config" in outer else ())):
        if "quantization_config" in fields and "quant_method" in (said := fields.object("quantization_config")):
            found = _read_method(said)
            for source in (said, fields):  # of DeepSeek-V4.1, of V4; left over where others have quantized it anew
                if found.method == FP8 and "expert_dtype" in source:
                    return replace(found, expert_dtype=_only(source, "expert_dtype", ("fp4", "fp8")))
            return found
        for key in ("quantization", "quantization_config"):  # MLX writes both, the same
            if key in fields:
                return _read_mlx(fields.object(key))
    if modelopt is not None:
        return _read_modelopt(Fields(parse_json(modelopt, MODELOPT_FILE), MODELOPT_FILE).object("quantization"))
    return None


def _read_method(fields: Fields) -> Quantization:
    method = fields.string("quant_method")
    readers = {
        FP8: _read_fp8,
        COMPRESSED: _read_compressed,
        MODELOPT: _read_modelopt,
        MXFP4: lambda fields: Quantization(MXFP4, fields.where),
        GPTQ: _read_gptq,
        AWQ: _read_awq,
        AUTO_ROUND: _read_auto_round,
        QUARK: _read_quark,
    }
    if method not in readers:
        raise UnsupportedError(f"{fields.name('quant_method')} is {shown(method)}, supported are {', '.join(readers)}")
    if method == MODELOPT and "quantization" in fields:  # as its own file has it (Hunyuan 4)
        nested = fields.object("quantization")
        for key in ("quant_algo", "ignore", "exclude_modules"):
            if key in fields and fields.raw(key) != nested.raw(key, None):
                raise UnsupportedError(f"{fields.name(key)} differs from {nested.name(key)}, expected the same")
        fields = nested
    return replace(readers[method](fields), left_out=_left_out(fields))


def _left_out(fields: Fields) -> tuple[str, ...]:
    """Modules that are not quantized, under whichever name a method lists them."""
    for key in ("modules_to_not_convert", "ignore", "ignored_layers", "exclude_modules", "exclude"):
        if isinstance(found := fields.raw(key, None), list):
            return tuple(str(entry) for entry in found)
    return ()


def _read_fp8(fields: Fields) -> Quantization:
    _only(fields, "fmt", ("e4m3", "float8_e4m3fn"), "e4m3")
    block = fields.raw("weight_block_size", [128, 128])
    if block not in ([128, 128], [32, 32]):
        expected = "only [128, 128] and [32, 32] are implemented"
        raise UnsupportedError(f"{fields.name('weight_block_size')} is {shown(block)}, {expected}")
    return Quantization(FP8, fields.where, block=int(block[0]))


def _read_compressed(fields: Fields) -> Quantization:
    _only(fields, "format", COMPRESSED_FORMATS)
    groups = fields.object("config_groups")
    bits, sizes, symmetric = set(), set(), set()
    for name in fields.mapping("config_groups"):
        group = groups.object(name)
        if "weights" not in group:
            continue
        weights = group.object("weights")
        bits.add(weights.integer("num_bits"))
        sizes.add(weights.integer("group_size", -1, default=-1))
        if weights.string("type", "int") == "int":
            symmetric.add(weights.boolean("symmetric", True))
        _only(weights, "actorder", ("static", "weight", None), None)
    if "transform_config" in fields:
        _check_transforms(fields.object("transform_config"))
    return Quantization(
        COMPRESSED,
        fields.where,
        frozenset(bits),
        frozenset(sizes),
        symmetric.pop() if len(symmetric) == 1 else None,
        form=fields.string("format"),
    )


def _check_transforms(fields: Fields) -> None:
    """Rotations that are not in the weights already. Raises UnsupportedError."""
    for name in fields.mapping("config_groups") if "config_groups" in fields else ():
        for apply in fields.object("config_groups").object(name).objects("apply"):
            _only(apply, "location", ("weight_input", "weight_output"))


def _read_modelopt(fields: Fields) -> Quantization:
    _only(fields, "quant_algo", MODELOPT_ALGORITHMS)
    return Quantization(MODELOPT, fields.where, form=fields.string("quant_algo"))


def _read_gptq(fields: Fields) -> Quantization:
    bits, size = fields.integer("bits"), fields.integer("group_size", -1)
    if fields.boolean("desc_act", False) and size != -1:
        raise UnsupportedError(f"{fields.name('desc_act')} is true: GPTQ with act-order is not supported")
    key = "checkpoint_format" if "checkpoint_format" in fields else "format"  # as GPTQModel calls it by now
    layout = _only(fields, key, ("gptq", "gptq_v2"), "gptq")
    symmetric = fields.boolean("sym", True)
    all_bits, sizes = {bits}, {size}
    for rule, change in fields.mapping("dynamic").items() if "dynamic" in fields else ():
        if not rule.startswith("-:"):  # which leaves modules unquantized, as their tensors tell
            override = Fields(change, fields.name(f"dynamic.{shown(rule)}"))
            _only(override, "sym", (symmetric,), symmetric)
            _only(override, "desc_act", (False,), False)
            all_bits.add(override.integer("bits", default=bits))
            sizes.add(override.integer("group_size", -1, default=size))
    return Quantization(
        GPTQ, fields.where, frozenset(all_bits), frozenset(sizes), symmetric, version=2 if layout == "gptq_v2" else 1
    )


def _read_awq(fields: Fields) -> Quantization:
    _only(fields, "version" if "version" in fields else "format", ("gemm", "GEMM"), "gemm")
    symmetric = not fields.boolean("zero_point", True)  # zero points are there all the same, each 8
    bits = _only(fields, "bits", (4,))
    sizes = frozenset({fields.integer("group_size", -1)})
    return Quantization(AWQ, fields.where, frozenset({bits}), sizes, symmetric)


def _read_auto_round(fields: Fields) -> Quantization:
    packing = _only(fields, "packing_format", tuple(AUTO_ROUND_PACKINGS), "auto_round:auto_gptq")
    method, version = AUTO_ROUND_PACKINGS[packing]
    for key in ("rotation_config", "spinquant_config"):  # rotations of what a module reads
        _only(fields, key, (None,), None)
    default = _auto_round_groups(fields, fields, method)
    names: dict[str, Groups | None] = {}
    patterns: list[tuple[re.Pattern[str], Groups | None]] = []
    extra = fields.object("extra_config") if "extra_config" in fields else Fields({}, fields.where)
    for key, said in extra.entries():
        groups = _auto_round_groups(Fields(said, extra.name(shown(key))), fields, method)
        if set(key).isdisjoint("*+?^$()[]{}|\\"):
            names[key] = groups
        else:
            patterns.append((_pattern(extra, key), groups))
    modules = Modules(default, names, tuple(patterns), tuple(_auto_round_blocks(fields)))
    said_of_any = [groups for groups in (default, *names.values(), *(groups for _, groups in patterns)) if groups]
    return Quantization(
        method,
        fields.where,
        frozenset(groups.bits for groups in said_of_any),
        frozenset(groups.group_size for groups in said_of_any),
        fields.boolean("sym", True),
        version,
        form=AUTO_ROUND_FLOATS.get(fields.string("data_type", ""), "") if method == COMPRESSED else "",
        written_as=AUTO_ROUND,
        modules=modules,
    )


def _auto_round_groups(said: Fields, outer: Fields, method: str) -> Groups | None:
    """What is said of a module, or of all; what is not said of it is as it is said of all."""
    bits = said.integer("bits", 1, default=outer.integer("bits", 1))
    if bits >= UNQUANTIZED:
        return None
    _only(said, "sym", (outer.boolean("sym", True),), outer.boolean("sym", True))
    _only(said, "super_bits", (None,), None)
    if method == COMPRESSED:
        _only(said, "data_type", tuple(AUTO_ROUND_FLOATS), outer.raw("data_type"))
        _only(said, "bits", (4,), bits)
    else:
        _only(said, "data_type", ("int",), outer.raw("data_type", "int"))
        _only(said, "act_bits", (16, 32), outer.raw("act_bits", 16))
        _only(said, "bits", (4,) if method == AWQ else (2, 3, 4, 8), bits)
    return Groups(bits, said.integer("group_size", -1, default=outer.integer("group_size", -1)))


def _auto_round_blocks(fields: Fields) -> Iterator[str]:
    """block_name_to_quantize: names separated by commas, or lists of them."""
    said = fields.raw("block_name_to_quantize", [])
    left = said.split(",") if isinstance(said, str) else [said]
    while left:
        name = left.pop(0)
        if isinstance(name, list):
            left[:0] = name
        elif isinstance(name, str):
            yield from filter(None, [name.strip()])
        else:
            raise fields.wrong("block_name_to_quantize", "names of blocks")


def _read_quark(fields: Fields) -> Quantization:
    if "export" in fields:
        _only(fields.object("export"), "weight_format", ("real_quantized",), "real_quantized")
    algorithms = fields.raw("algo_config", [])
    for algorithm in algorithms if isinstance(algorithms, list) else [algorithms]:
        name = Fields(algorithm, fields.name("algo_config")).string("name", "")
        if name in ("rotation", "quarot"):  # of what a module reads, unless it is in the weights already
            raise UnsupportedError(f"{fields.name('algo_config')} is {name}, which is not implemented")
    said = [fields.object("global_quant_config")]
    for key in ("layer_quant_config", "layer_type_quant_config"):
        modules = fields.object(key) if key in fields else Fields({}, fields.where)
        said += [Fields(value, modules.name(shown(module))) for module, value in modules.entries() if value]
    forms = {_quark_weight(one) for one in said}
    return Quantization(QUARK, fields.where, form=forms.pop() if len(forms) == 1 else "")


def _quark_weight(fields: Fields) -> str:
    """`fp8_e4m3 per_channel` of what a module says of its weight; none where that is not quantized."""
    if not fields.raw("weight", {}):
        return ""
    weight = fields.object("weight")
    dtype = _only(weight, "dtype", tuple(QUARK_WEIGHTS))
    _only(weight, "is_dynamic", (False,), False)
    for key, implemented in QUARK_WEIGHTS[dtype].items():
        _only(weight, key, implemented, implemented[0])
    return f"{dtype} {weight.string('qscheme')}"


def _pattern(fields: Fields, text: str) -> "re.Pattern[str]":
    try:
        return re.compile(text)
    except re.error as error:
        raise FormatError(f"{fields.name(shown(text))} is no regular expression: {error}") from None


def _read_mlx(fields: Fields) -> Quantization:
    return Quantization(MLX, fields.where, overrides=dict(_mlx_overrides(fields)), default=_mlx_layer(fields))


def _mlx_overrides(fields: Fields) -> Iterator[tuple[str, MLXLayer | None]]:
    for path, value in fields.entries():
        if isinstance(value, dict):
            yield path, _mlx_layer(Fields(value, fields.name(path)))
        elif value is False:
            yield path, None
        elif path not in ("bits", "group_size", "mode"):
            expected = "an object or false: what is said of a module"
            if value is not True:
                raise FormatError(f"{fields.name(path)} is {shown(value)}, expected {expected}")


def _mlx_layer(fields: Fields) -> MLXLayer:
    """What a module's own says nothing of is MLX's default, and not what all modules have."""
    mode = _only(fields, "mode", tuple(MLX_MODES), "affine")
    bits, size = MLX_MODES[mode]
    return MLXLayer(
        fields.integer("bits", default=bits),
        fields.integer("group_size", default=size),
        mode,
        fields.boolean("global_scale", default=False),
    )


_NO_DEFAULT: Any = object()


def _only(fields: Fields, key: str, implemented: tuple[Any, ...], default: Any = _NO_DEFAULT) -> Any:
    """The value of a key, which must be one of those implemented. Raises UnsupportedError."""
    value = fields.raw(key) if default is _NO_DEFAULT else fields.raw(key, default)
    if value not in implemented:
        known = ", ".join(map(str, implemented))
        raise UnsupportedError(f"{fields.name(key)} is {shown(value)}, only {known} is implemented")
    return value
