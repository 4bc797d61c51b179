"""Which encoding a checkpoint keeps a matrix in: from the names and dtypes of tensors found, and what its config says.

Tensors decide; the config must agree. Names are made of a module's `base` and of `weight`, its base with the suffix of
its plain tensor: `mlp.gate` and `mlp.gate.weight`, or twice `mlp.experts.gate_up_proj`.
"""

from collections.abc import Callable, Iterator, Mapping, MutableMapping, Set
from typing import NamedTuple

from formats.encodings.fp4 import MX_GROUP_SIZE, NV_GROUP_SIZE
from formats.encodings.fp8 import BLOCK, MX_BLOCK
from formats.encodings.sources import (
    AWQSource,
    ExpertIdsSource,
    FP8Source,
    GGMLSource,
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
from formats.encodings.sources.base import E8M0_DTYPES, FLOATS, GGML_BLOCKS
from formats.encodings.sources.expert_ids import INTEGERS
from formats.encodings.sources.fp4 import BLOCKS, BYTES, WORDS
from formats.encodings.sources.fp8 import PER_BLOCK, PER_CHANNEL, PER_TENSOR
from formats.errors import FormatError, UnsupportedError
from formats.quantization import AWQ, COMPRESSED, FP8, GPTQ, MLX, MODELOPT, MXFP4, QUARK, Quantization
from repack.sources.base import SourceTensor

# Tensors beside a quantized weight that say how activations were quantized, which is nothing to a runtime of its own.
ACTIVATION_SCALES = ("input_scale", "input_global_scale", "k_scale", "v_scale", "output_scale", "activation_scale")
MXFP8 = "mxfp8"  # a mode of MLX
OF_STACKED_EXPERTS = ("_proj_activation_scale", "_proj_input_scale")  # ends the names of theirs


class Module(NamedTuple):
    """A matrix that is looked for, and as many of them as are stacked on the first axis of its tensors."""

    base: str
    suffix: str
    rows: int
    columns: int
    shape: tuple[int, ...]  # of the plain tensor, as the family has it
    stacked: int = 0  # 0: one matrix, no such axis
    transposed: bool = False  # when plain
    num_experts: int = 0  # of a table of experts; 0 for weights

    @property
    def weight(self) -> str:
        return self.base + self.suffix

    def tell_tales(self) -> tuple[str, ...]:
        """Names of which one is there in whatever encoding the module is."""
        return self.weight, f"{self.weight}_packed", f"{self.base}.qweight", f"{self.base}_blocks"


class Found(NamedTuple):
    """How a module is kept: its encoding, and the tensor of each plane."""

    encoding: SourceEncoding
    planes: tuple[tuple[Plane, SourceTensor], ...]


def is_there(module: Module, tensors: Mapping[str, SourceTensor]) -> bool:
    """Whether any tensor of the module is in the checkpoint."""
    return any(name in tensors for name in module.tell_tales())


def take_module(module: Module, tensors: MutableMapping[str, SourceTensor], quantization: Quantization | None) -> Found:
    """The module's encoding; its tensors leave the table.

    Raises FormatError for a tensor that is missing, of another shape or dtype, or that the config contradicts, and
    UnsupportedError for what is not implemented; each names file, tensor, found and expected.
    """
    found = [name for name in module.tell_tales() if name in tensors]
    if not found:
        raise FormatError(f"{module.weight} is missing from the checkpoint, expected shape {list(module.shape)}")
    if len(found) > 1:
        raise FormatError(f"{tensors[found[0]].file}: {found[0]} stands twice, as {found[1]} as well")
    tensor = tensors[found[0]]
    look = _Look(module, tensors, quantization, tensor)
    encoding, names, methods = _LOOKS[_kind(module, tensor)](look)
    look.check_config(methods, encoding)
    planes = tuple((spec, look.plane(spec, names[spec.name])) for spec in encoding.planes(module.rows, module.columns))
    for name in names.values():
        del tensors[name]
    return Found(encoding, planes)


def take_alike(module: Module, found: Found, of: Module, tensors: MutableMapping[str, SourceTensor]) -> Found | None:
    """The module in the encoding of another that was found, if it has just such tensors; they leave the table then.

    None where it has not: take_module says why. What it has besides stays in the table.
    """
    planes = []
    for spec, tensor in found.planes:
        other = tensors.get(module.base + tensor.name[len(of.base) :])
        if other is None or _kept(other) != _kept(tensor):
            return None
        planes.append((spec, other))
    for _, other in planes:
        del tensors[other.name]
    return Found(found.encoding, tuple(planes))


def _kept(tensor: SourceTensor) -> tuple[str, tuple[int, ...], str]:
    return tensor.dtype, tensor.shape, tensor.adjustment


def _kind(module: Module, tensor: SourceTensor) -> str:
    """Which of _LOOKS tells the encoding, from a tell-tale name and its dtype."""
    if module.num_experts:
        return "expert ids"
    if tensor.name != module.weight:
        return tensor.name.removeprefix(module.base).removeprefix(module.suffix)
    if tensor.dtype in FLOATS:
        return "plain"
    if tensor.dtype in GGML_BLOCKS:
        return "ggml"
    if tensor.dtype in ("F8_E4M3", "U8", "I8", "U32"):
        return tensor.dtype
    known = ", ".join((*FLOATS, "F8_E4M3", "U8", "I8", "U32", *GGML_BLOCKS))
    raise UnsupportedError(f"{tensor.file}: {tensor.name} has dtype {tensor.dtype}, expected one of {known}")


Names = dict[str, str]  # of tensors by plane
Looked = tuple[SourceEncoding, Names, tuple[str, ...]]  # and the methods of a config that may write this


class _Look:
    """Finds and checks the tensors of one module."""

    def __init__(
        self,
        module: Module,
        tensors: Mapping[str, SourceTensor],
        quantization: Quantization | None,
        tensor: SourceTensor,
    ) -> None:
        self.module = module
        self.tensors = tensors
        self.quantization = quantization
        self.tensor = tensor  # the tell-tale one

    def first(self, *names: str) -> SourceTensor:
        """The first of these tensors that is there. Raises FormatError when none is: a quantized weight needs it."""
        for name in names:
            if name in self.tensors:
                return self.tensors[name]
        raise FormatError(
            f"{self.tensor.file}: {self.tensor.name} is {self.tensor.dtype}, but {' or '.join(names)} is missing"
        )

    def float_dtype(self, tensor: SourceTensor, *others: str) -> str:
        """The container's name of a float dtype, or e8m0 for one of the others. Raises FormatError."""
        if tensor.dtype in others:
            return "e8m0"
        if tensor.dtype not in FLOATS:
            expected = ", ".join((*FLOATS, *others))
            raise FormatError(f"{tensor.file}: {tensor.name} has dtype {tensor.dtype}, expected one of {expected}")
        return FLOATS[tensor.dtype]

    def groups(self, tensor: SourceTensor, axis: int, what: str) -> int:
        """The group size that the number of scales on an axis of a tensor means. Raises FormatError."""
        columns = self.module.columns
        axis += bool(self.module.stacked)
        count = tensor.shape[axis] if len(tensor.shape) == 2 + bool(self.module.stacked) else 0
        if count == 0 or columns % count:
            raise FormatError(
                f"{tensor.file}: {tensor.name} has shape {list(tensor.shape)}, expected {what} that divide the input "
                f"width {columns}"
            )
        return columns // count

    def width_bits(self, tensor: SourceTensor, axis: int) -> int:
        """Bits of a code from the words that the columns take on an axis. Raises FormatError."""
        axis += bool(self.module.stacked)
        words = tensor.shape[axis] if len(tensor.shape) == 2 + bool(self.module.stacked) else 0
        if words == 0 or words * 32 % self.module.columns:
            raise FormatError(
                f"{tensor.file}: {tensor.name} has shape {list(tensor.shape)}, expected words of {self.module.columns} "
                "codes of whole bits"
            )
        return words * 32 // self.module.columns

    def check_whole_words(self, bits: int) -> None:
        """Raises FormatError where the codes of a column do not fill words, as GPTQ and AWQ pack zero points."""
        if self.module.rows * bits % 32:
            raise FormatError(
                f"{self.tensor.file}: {self.tensor.name} is of {self.module.rows} rows, expected {bits} bits of each "
                "to fill words of 32"
            )

    def plane(self, spec: Plane, name: str) -> SourceTensor:
        """The tensor of a plane, of the dtype and shape that it must have. Raises FormatError."""
        tensor = self.first(name)
        if tensor.dtype not in spec.dtypes:
            raise FormatError(f"{tensor.file}: {name} has dtype {tensor.dtype}, expected {' or '.join(spec.dtypes)}")
        stack = (self.module.stacked,) if self.module.stacked else ()
        expected = (*stack, *spec.shape)
        if spec.name == "weight" and tensor.dtype in FLOATS:
            expected = self.module.shape  # more axes than a matrix has, for a convolution
        if tensor.shape != expected and (len(expected) < 3 or _without_ones(tensor.shape) != _without_ones(expected)):
            raise FormatError(f"{tensor.file}: {name} has shape {list(tensor.shape)}, expected {list(expected)}")
        return tensor

    def check_config(self, methods: tuple[str, ...], encoding: SourceEncoding) -> None:
        """Raises FormatError when the config says something else than the tensors."""
        said = self.quantization
        if not methods:
            return
        if said is None or said.method not in methods:
            found = "holds no quantization_config" if said is None else f"says {said.quant_method}"
            where = "config.json" if said is None else said.where
            raise FormatError(
                f"{where} {found}, but {self.tensor.file}: {self.tensor.name} is {encoding.label}, expected "
                f"{' or '.join(methods)}"
            )
        if isinstance(encoding, (PackedSource, Int8Source, GPTQSource, AWQSource)):
            self._agree("bits", encoding.bits, said.bits)
            sizes = {self.module.columns if size == -1 else size for size in said.group_sizes}
            self._agree("group_size", encoding.group_size, sizes)
        if said.method == MLX:
            self._check_mlx(said, encoding)

    def _agree(self, key: str, found: int, said: Set[int]) -> None:
        assert self.quantization is not None
        if said and found not in said:
            values = " or ".join(map(str, sorted(said)))
            raise FormatError(
                f"{self.quantization.where}: {key} is {values}, but {self.tensor.file}: {self.tensor.name} has {found}"
            )

    def _check_mlx(self, said: Quantization, encoding: SourceEncoding) -> None:
        layer = said.mlx_layer(self.module.base)
        found = {"bits": encoding.bits, "group_size": _group_size(encoding), "mode": _mode(encoding)}
        if layer is None:
            raise FormatError(f"{said.where}: {self.module.base} is false, but it is {encoding.label}")
        if self.module.base not in said.overrides and layer.mode == MXFP8 and isinstance(encoding, MXFP4Source):
            return  # DeepSeek's experts beside its FP8, both repacked: mlx-lm says the FP8 alone, and looks at tensors
        for key, value in found.items():
            if getattr(layer, key) != value:
                raise FormatError(
                    f"{said.where}: {key} of {self.module.base} is {getattr(layer, key)}, but "
                    f"{self.tensor.file}: {self.tensor.name} has {value}"
                )
        if layer.global_scale:
            self.first(f"{self.module.base}.global_scale")


def _without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(length for length in shape if length != 1)


def _group_size(encoding: SourceEncoding) -> int:
    if isinstance(encoding, (MLXAffineSource, MXFP8Source)):
        return encoding.group_size
    return MX_GROUP_SIZE if isinstance(encoding, MXFP4Source) else NV_GROUP_SIZE


def _mode(encoding: SourceEncoding) -> str:
    return "affine" if isinstance(encoding, MLXAffineSource) else encoding.label


# ---- one function per kind of tell-tale tensor


def _plain(look: _Look) -> Looked:
    module = look.module
    for name in (f"{module.weight}_scale_inv", f"{module.weight}_scale", f"{module.base}.scales"):
        if name in look.tensors:
            raise FormatError(
                f"{look.tensor.file}: {look.tensor.name} is {look.tensor.dtype}, but has scales as {name}"
            )
    encoding = PlainSource(FLOATS[look.tensor.dtype], module.transposed, look.tensor.adjustment)
    return encoding, {"weight": module.weight}, ()


def _expert_ids(look: _Look) -> Looked:
    tensor = look.tensor
    if tensor.dtype not in INTEGERS:
        raise FormatError(f"{tensor.file}: {tensor.name} has dtype {tensor.dtype}, expected {' or '.join(INTEGERS)}")
    return ExpertIdsSource(tensor.dtype, look.module.num_experts), {"weight": tensor.name}, ()


def _ggml(look: _Look) -> Looked:
    return GGMLSource(look.tensor.dtype), {"blocks": look.module.weight}, ()


def _fp8(look: _Look) -> Looked:
    module = look.module
    scale = look.first(f"{module.weight}_scale_inv", f"{module.weight}_scale", f"{module.base}.scale")
    shape = scale.shape[1:] if module.stacked else scale.shape
    block = look.quantization.block if look.quantization is not None else BLOCK
    if scale.dtype in E8M0_DTYPES and shape == (module.rows, module.columns // MX_BLOCK):
        said_by = (COMPRESSED, MODELOPT, FP8) if block == MX_BLOCK else (COMPRESSED, MODELOPT)
        return MXFP8Source(BYTES), {"weight": module.weight, "scale": scale.name}, said_by
    dtype = look.float_dtype(scale, "F8_E8M0")
    blocks = (-(-module.rows // block), -(-module.columns // block))
    transposed = module.transposed and look.tensor.shape[-2:] == (module.columns, module.rows)
    if transposed and module.rows != module.columns and shape == blocks[::-1]:
        encoding = FP8Source(PER_BLOCK, dtype, transposed=True, block=block)
    elif shape in ((), (1,), (1, 1)) and blocks != shape:
        encoding = FP8Source(PER_TENSOR, dtype, shape)
    elif shape in ((module.rows,), (module.rows, 1)) and blocks != shape:
        encoding = FP8Source(PER_CHANNEL, dtype, shape)
    elif shape == blocks:
        encoding = FP8Source(PER_BLOCK, dtype, block=block)
    else:
        raise FormatError(
            f"{scale.file}: {scale.name} has shape {list(scale.shape)}, expected {list(blocks)} for blocks of "
            f"{block} × {block}, {[module.rows, 1]} or []"
        )
    return encoding, {"weight": module.weight, "scale": scale.name}, (FP8, COMPRESSED, MODELOPT, QUARK)


def _packed(look: _Look) -> Looked:
    """compressed-tensors: integers in I32, FP4 in U8."""
    weight = look.module.weight
    scale = look.first(f"{weight}_scale")
    if look.tensor.dtype == "I32":
        zero_points = _zero_points(look)
        encoding: SourceEncoding = PackedSource(
            look.width_bits(look.tensor, 1),
            look.groups(scale, 1, "scales"),
            look.float_dtype(scale),
            (look.module.rows, look.module.columns),
            symmetric=not zero_points,
        )
        if encoding.bits not in (4, 8):
            raise UnsupportedError(
                f"{look.tensor.file}: {look.tensor.name} has {encoding.bits} bits, only 4 and 8 are implemented"
            )
        names = {"packed": look.tensor.name, "scale": scale.name, "shape": f"{weight}_shape"}
        return encoding, names | zero_points, (COMPRESSED,)
    names = {"codes": look.tensor.name, "scales": scale.name}
    if f"{weight}_global_scale" in look.tensors or scale.dtype == "F8_E4M3":
        factor = look.first(f"{weight}_global_scale")
        shape = factor.shape[1:] if look.module.stacked else factor.shape
        _one_number(factor, shape)
        return NVFP4Source("divide", BYTES, shape), {**names, "global": factor.name}, (COMPRESSED,)
    return MXFP4Source(BYTES), names, (COMPRESSED,)


def _int8(look: _Look) -> Looked:
    """compressed-tensors: integers in bytes."""
    module, zero_points = look.module, _zero_points(look)
    scale = look.first(f"{module.weight}_scale")
    shape = scale.shape[1:] if module.stacked else scale.shape
    of_rows = shape == (module.rows,) or not _without_ones(shape)
    size = module.columns if of_rows else look.groups(scale, 1, "scales")
    encoding = Int8Source(size, look.float_dtype(scale), shape, symmetric=not zero_points)
    return encoding, {"weight": module.weight, "scale": scale.name, **zero_points}, (COMPRESSED,)


def _zero_points(look: _Look) -> Names:
    """The tensor of compressed-tensors' zero points, if there is one. Raises FormatError where the config differs."""
    said, name = look.quantization, f"{look.module.weight}_zero_point"
    symmetric = None if said is None else said.symmetric
    if name not in look.tensors and symmetric is not False:
        return {}
    tensor = look.first(name)
    if said is not None and symmetric is True:
        raise FormatError(f"{said.where}: symmetric is true, but {tensor.file}: {name} is there")
    return {"zero_point": name}


def _blocks(look: _Look) -> Looked:
    """gpt-oss."""
    base = look.module.base
    return MXFP4Source(BLOCKS), {"codes": f"{base}_blocks", "scales": f"{base}_scales"}, (MXFP4,)


def _bytes(look: _Look) -> Looked:
    """U8: ModelOpt's NVFP4, or Quark's MXFP4. I8: DeepSeek-V4's FP4, or integers."""
    weight = look.module.weight
    if look.tensor.dtype == "I8":
        if f"{weight}_scale" in look.tensors:
            return _int8(look)
        return MXFP4Source(BYTES), {"codes": weight, "scales": f"{look.module.base}.scale"}, (FP8,)
    names = {"codes": weight, "scales": f"{weight}_scale"}
    if look.first(names["scales"]).dtype in E8M0_DTYPES:
        return MXFP4Source(BYTES), names, (QUARK,)
    factor = look.first(f"{weight}_scale_2")
    shape = factor.shape[1:] if look.module.stacked else factor.shape
    _one_number(factor, shape)
    names["global"] = factor.name
    return NVFP4Source("multiply", BYTES, shape), names, (MODELOPT,)


def _one_number(tensor: SourceTensor, shape: tuple[int, ...]) -> None:
    if _without_ones(shape):
        raise FormatError(f"{tensor.file}: {tensor.name} has shape {list(tensor.shape)}, expected one number")


def _words(look: _Look) -> Looked:
    """MLX."""
    base = look.module.base
    scales = look.first(f"{base}.scales")
    names = {"codes": look.module.weight, "scales": scales.name}
    if scales.dtype == "U8":
        size = look.groups(scales, 1, "scales")
        bits = look.width_bits(look.tensor, 1)
        if size == MX_GROUP_SIZE and bits == 4:
            return MXFP4Source(WORDS), names, (MLX,)
        if size == MX_BLOCK and bits == 8:
            return MXFP8Source(WORDS), {"weight": look.module.weight, "scale": scales.name}, (MLX,)
        if size == NV_GROUP_SIZE and bits == 4:
            return _nvfp4_of_mlx(look, names)
        raise UnsupportedError(
            f"{scales.file}: {scales.name} has dtype U8 and groups of {size} in {bits} bits, only mxfp4, mxfp8 "
            "(32) and nvfp4 (16) are implemented"
        )
    encoding = MLXAffineSource(
        look.width_bits(look.tensor, 1), look.groups(scales, 1, "scales"), look.float_dtype(scales)
    )
    return encoding, {**names, "biases": f"{base}.biases"}, (MLX,)


def _nvfp4_of_mlx(look: _Look, names: Names) -> Looked:
    """Without a factor, or with one for each of a stack."""
    name = f"{look.module.base}.global_scale"
    if name not in look.tensors:
        return NVFP4Source("multiply", WORDS, None), names, (MLX,)
    factor = look.tensors[name]
    shape = factor.shape[1:] if look.module.stacked else factor.shape
    _one_number(factor, shape)
    return NVFP4Source("multiply", WORDS, shape, largest=True), {**names, "global": name}, (MLX,)


def _qweight(look: _Look) -> Looked:
    """GPTQ, or AWQ, which only the config tells apart for certain."""
    base, said = look.module.base, look.quantization
    scales = look.first(f"{base}.scales")
    size, dtype = look.groups(scales, 0, "groups"), look.float_dtype(scales)
    names = {"qweight": look.tensor.name, "qzeros": f"{base}.qzeros", "scales": scales.name}
    if said is not None and said.method == AWQ:
        look.check_whole_words(4)
        return AWQSource(size, dtype, symmetric=said.symmetric is True), names, (AWQ,)
    g_idx = f"{base}.g_idx" in look.tensors
    symmetric, version = (True, 1) if said is None else (said.symmetric is not False, said.version)
    bits = look.width_bits(look.tensor, 0)
    if bits not in (2, 3, 4, 8):
        raise UnsupportedError(f"{look.tensor.file}: {look.tensor.name} has {bits} bits, expected 2, 3, 4 or 8")
    look.check_whole_words(bits)
    encoding = GPTQSource(bits, size, dtype, symmetric, version, g_idx)
    return encoding, names | ({"g_idx": f"{base}.g_idx"} if g_idx else {}), (GPTQ, AWQ)


_LOOKS: Mapping[str, Callable[[_Look], Looked]] = {
    "plain": _plain,
    "expert ids": _expert_ids,
    "ggml": _ggml,
    "F8_E4M3": _fp8,
    "_packed": _packed,
    "_blocks": _blocks,
    "U8": _bytes,
    "I8": _bytes,
    "U32": _words,
    ".qweight": _qweight,
}


def activation_scales(tensors: Mapping[str, SourceTensor]) -> Iterator[str]:
    """Names of tensors that say how activations or caches were quantized."""
    return (
        name for name in tensors if name.rpartition(".")[2] in ACTIVATION_SCALES or name.endswith(OF_STACKED_EXPERTS)
    )
