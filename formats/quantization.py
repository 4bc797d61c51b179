"""quantization_config of a checkpoint: what it says of the encodings of its tensors, wherever it stands.

Tensors decide how a weight is kept; this says what they cannot (bits of an override, which GPTQ version, that groups
are in order), and that both agree. Values that no source encoding implements are refused by name.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from formats.errors import FormatError, UnsupportedError
from formats.fields import Fields, parse_config, parse_json, shown

CONFIG_FILE = "config.json"
MODELOPT_FILE = "hf_quant_config.json"  # where ModelOpt writes it besides, or instead
FP8, COMPRESSED, MODELOPT, MXFP4, GPTQ, AWQ, MLX = (
    "fp8",
    "compressed-tensors",
    "modelopt",
    "mxfp4",
    "gptq",
    "awq",
    "mlx",
)
COMPRESSED_FORMATS = (
    "pack-quantized",
    "float-quantized",
    "naive-quantized",
    "mxfp4-pack-quantized",
    "nvfp4-pack-quantized",
    "mixed-precision",
)
MODELOPT_ALGORITHMS = ("NVFP4", "FP8", "FP8_PB_WO", "FP8_PER_CHANNEL_PER_TOKEN", "MIXED_PRECISION")
MLX_MODES = ("affine", "mxfp4", "nvfp4")


@dataclass(frozen=True)
class Quantization:
    """What the config says; None and empty where a method says nothing of it."""

    method: str
    where: str  # for messages
    bits: frozenset[int] = frozenset()  # that occur; none: not said
    group_sizes: frozenset[int] = frozenset()  # that occur, -1 for whole rows; none: not said
    symmetric: bool = True  # GPTQ
    version: int = 1  # of GPTQ's files
    overrides: Mapping[str, "MLXLayer | None"] = field(default_factory=dict)  # MLX, by module; None: not quantized
    default: "MLXLayer | None" = None  # MLX
    form: str = ""  # `format` of compressed-tensors, quant_algo of ModelOpt
    left_out: tuple[str, ...] = ()  # patterns of modules that are not quantized
    expert_dtype: str = ""  # DeepSeek-V4: experts in fp4 or fp8

    def mlx_layer(self, module: str) -> "MLXLayer | None":
        """What MLX's config says of a module."""
        return self.overrides.get(module, self.default)


@dataclass(frozen=True)
class MLXLayer:
    """Parameters of an MLX module."""

    bits: int
    group_size: int
    mode: str


def read_quantization(config: bytes, modelopt: bytes | None = None, where: str = CONFIG_FILE) -> Quantization | None:
    """What config.json (and hf_quant_config.json) say; None for a checkpoint of plain floats.

    Raises FormatError for wrong values, UnsupportedError for a method or value that is not implemented.
    """
    outer = Fields(parse_config(config, where), where)
    for fields in (outer, *([outer.object("text_config")] if "text_config" in outer else ())):
        if "quantization_config" in fields and "quant_method" in (said := fields.object("quantization_config")):
            found = _read_method(said)
            for source in (said, fields):  # of DeepSeek-V4.1, of V4
                if "expert_dtype" in source:
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
    }
    if method not in readers:
        raise UnsupportedError(f"{fields.name('quant_method')} is {shown(method)}, supported are {', '.join(readers)}")
    return replace(readers[method](fields), left_out=_left_out(fields))


def _left_out(fields: Fields) -> tuple[str, ...]:
    """Modules that are not quantized, under whichever name a method lists them."""
    for key in ("modules_to_not_convert", "ignore", "ignored_layers", "exclude_modules"):
        if isinstance(found := fields.raw(key, None), list):
            return tuple(str(entry) for entry in found)
    return ()


def _read_fp8(fields: Fields) -> Quantization:
    _only(fields, "fmt", ("e4m3", "float8_e4m3fn"), "e4m3")
    block = fields.raw("weight_block_size", [128, 128])
    if block != [128, 128]:
        raise UnsupportedError(f"{fields.name('weight_block_size')} is {shown(block)}, only [128, 128] is implemented")
    return Quantization(FP8, fields.where)


def _read_compressed(fields: Fields) -> Quantization:
    _only(fields, "format", COMPRESSED_FORMATS)
    groups = fields.object("config_groups")
    bits, sizes = set(), set()
    for name in fields.mapping("config_groups"):
        group = groups.object(name)
        if "weights" not in group:
            continue
        weights = group.object("weights")
        bits.add(weights.integer("num_bits"))
        sizes.add(weights.integer("group_size", -1, default=-1))
        if weights.string("type", "int") == "int":
            _only(weights, "symmetric", (True,), True)
        _only(weights, "actorder", ("static", "weight", None), None)
    if "transform_config" in fields:
        _check_transforms(fields.object("transform_config"))
    return Quantization(COMPRESSED, fields.where, frozenset(bits), frozenset(sizes), form=fields.string("format"))


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
    _only(fields, "zero_point", (True,), True)
    bits = _only(fields, "bits", (4,))
    return Quantization(AWQ, fields.where, frozenset({bits}), frozenset({fields.integer("group_size", -1)}))


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
    mode = _only(fields, "mode", MLX_MODES, "affine")
    size = {"affine": 64, "mxfp4": 32, "nvfp4": 16}[mode]
    return MLXLayer(fields.integer("bits", default=4), fields.integer("group_size", default=size), mode)


_NO_DEFAULT: Any = object()


def _only(fields: Fields, key: str, implemented: tuple[Any, ...], default: Any = _NO_DEFAULT) -> Any:
    """The value of a key, which must be one of those implemented. Raises UnsupportedError."""
    value = fields.raw(key) if default is _NO_DEFAULT else fields.raw(key, default)
    if value not in implemented:
        known = ", ".join(map(str, implemented))
        raise UnsupportedError(f"{fields.name(key)} is {shown(value)}, only {known} is implemented")
    return value
