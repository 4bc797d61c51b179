"""Makes the plan, pure: headers, config and options -> the place and the origin of every byte."""

import math
from collections.abc import Iterator, Mapping

from formats.config import ModelConfig
from formats.dtypes import DTYPES, FLOAT_DTYPES
from formats.encodings import Affine, Encoding, Plain
from formats.encodings.base import GROUP_SIZES
from formats.errors import FormatError, RequestError, UnsupportedError
from formats.fields import shown
from formats.layout import (
    LayerLayout,
    Layout,
    ResidentTensor,
    lay_out_embedding,
    layer_file,
    place_resident,
)
from formats.record import PART_NAMES, PartSpec, lay_out_record
from repack.families import EMBEDDING, FAMILIES, FINAL_NORM, LM_HEAD, Experts, Tensor, head_prefix
from repack.plan import Options, Plan, Skipped, SourceMatrix
from repack.sources.base import SourceTensor

RESIDENT_GROUP_SIZES = (64, 32)  # the first that divides a tensor's width
_SOURCE_DTYPES = {DTYPES[name].safetensors_name: name for name in FLOAT_DTYPES}


def make_plan(tensors: Mapping[str, SourceTensor], config: ModelConfig, options: Options) -> Plan:
    """Give every tensor a place.

    Raises FormatError for a tensor that is missing, unknown or of another shape, UnsupportedError for a dtype,
    RequestError for a group size that does not divide a width; each names the tensor, found and expected.
    """
    return _Planner(tensors, config, options).plan()


class _Planner:
    """Takes tensors out of the source's table until none is left that has no role."""

    def __init__(self, tensors: Mapping[str, SourceTensor], config: ModelConfig, options: Options) -> None:
        self.left = dict(tensors)
        self.config = config
        self.options = options
        self.family = FAMILIES[config.model_type]
        self.prefix = next(
            (p for p in self.family.prefixes if _source_name(p, EMBEDDING) in tensors),
            self.family.prefixes[0],
        )
        self.resident: list[ResidentTensor] = []
        self.matrices: list[SourceMatrix] = []
        self.end = 0  # of the resident file

    def plan(self) -> Plan:
        embedding = self.take(_source_name(self.prefix, EMBEDDING), self.shape(EMBEDDING))
        layers: list[LayerLayout | None] = []
        experts = {}
        for i in range(self.config.num_hidden_layers):
            for tensor in self.family.layer_tensors(self.config, i):
                name = f"layers.{i}.{tensor.name}"
                self.add_resident(name, tensor, self.take(f"{self.prefix}{name}{tensor.suffix}", self.shape(tensor)))
            layers.append(None)
            if self.config.has_experts(i):
                layers[i], experts[i] = self.expert_layer(i)
        self.add_resident(
            FINAL_NORM.name,
            FINAL_NORM,
            self.take(_source_name(self.prefix, FINAL_NORM), self.shape(FINAL_NORM)),
        )
        tied = self.config.tie_word_embeddings
        head = embedding if tied else self.take(_source_name(head_prefix(self.prefix), LM_HEAD), self.shape(LM_HEAD))
        self.add_resident(LM_HEAD.name, LM_HEAD, head)
        matrix = _matrix(embedding)
        encoding = self.resident_encoding(matrix)
        layout = lay_out_embedding(matrix.rows, matrix.columns, encoding)
        skipped = tuple(self.skip(tied))
        return Plan(
            Layout(self.config, tuple(layers), tuple(self.resident), layout),
            self.options,
            experts,
            tuple(self.matrices),
            matrix,
            skipped,
        )

    def shape(self, tensor: Tensor | Experts) -> tuple[int, ...]:
        return self.family.shape(tensor.shape, self.config)

    def take(self, name: str, shape: tuple[int, ...]) -> SourceTensor:
        """The tensor of that name, which must have that shape."""
        tensor = self.left.pop(name, None)
        if tensor is None:
            raise FormatError(f"{name} is missing from the checkpoint, expected shape {list(shape)}")
        if tensor.shape != shape:
            raise FormatError(f"{tensor.file}: {name} has shape {list(tensor.shape)}, expected {list(shape)}")
        if tensor.dtype not in _SOURCE_DTYPES:
            raise UnsupportedError(
                f"{tensor.file}: {name} has dtype {tensor.dtype}, expected one of {', '.join(_SOURCE_DTYPES)}"
            )
        return tensor

    def add_resident(self, name: str, tensor: Tensor, source: SourceTensor) -> None:
        """Place a resident tensor at the end of the file."""
        matrix = _matrix(source)
        keep = tensor.keep or len(source.shape) == 1
        encoding = Plain(matrix.dtype) if keep else self.resident_encoding(matrix)
        placed = place_resident(name, _stored_shape(source.shape), encoding, self.end)
        self.end += placed.nbytes
        self.resident.append(placed)
        self.matrices.append(matrix)

    def resident_encoding(self, matrix: SourceMatrix) -> Encoding:
        fitting = [size for size in RESIDENT_GROUP_SIZES if matrix.columns % size == 0]
        if self.options.resident_bits < 16 and not fitting:
            raise RequestError(
                f"{matrix.tensor}: input width {matrix.columns} is not a multiple of "
                f"{' or '.join(map(str, RESIDENT_GROUP_SIZES))}; keep it as it is with --resident-bits 16"
            )
        return _encoding(matrix, self.options.resident_bits, fitting[0] if fitting else 0)

    def expert_layer(self, i: int) -> tuple[LayerLayout, tuple[tuple[SourceMatrix, ...], ...]]:
        """A layer's file, and the source of each part of each expert."""
        num_experts = self.config.num_experts
        by_part: dict[str, list[SourceMatrix]] = {name: [] for name in PART_NAMES}
        for rule in self.expert_layout(i):
            for part, matrices in self.expert_matrices(i, rule):
                by_part[part] += matrices
        specs = []
        for name in PART_NAMES:
            first = by_part[name][0]
            for matrix in by_part[name]:
                if matrix.dtype != first.dtype:
                    raise UnsupportedError(
                        f"{matrix.file}: {matrix.tensor} has dtype {matrix.dtype}, expected {first.dtype} "
                        f"as {first.tensor} has"
                    )
            specs.append(PartSpec(name, first.rows, first.columns, self.expert_encoding(first)))
        layer = LayerLayout(layer_file(i), num_experts, lay_out_record(specs))
        return layer, tuple(zip(*(by_part[name] for name in PART_NAMES), strict=True))

    def expert_layout(self, i: int) -> tuple[Experts, ...]:
        """The family's layout whose first tensor is there; exactly one must be."""
        at = f"{self.prefix}layers.{i}."
        layouts = self.family.expert_layouts
        found = [layout for layout in layouts if at + layout[0].name.format(expert=0) in self.left]
        if len(found) > 1:
            names = " and ".join(at + layout[0].name.format(expert=0) for layout in found)
            raise FormatError(f"layer {i} has its experts twice, as {names}")
        return found[0] if found else layouts[0]

    def expert_matrices(self, i: int, rule: Experts) -> Iterator[tuple[str, list[SourceMatrix]]]:
        """(part, its matrix of every expert) for each part that a tensor of this rule holds."""
        at, shape = f"{self.prefix}layers.{i}.", self.shape(rule)
        num_experts, rows = self.config.num_experts, shape[0] // len(rule.parts)
        if "{expert}" in rule.name:
            names = [at + rule.name.format(expert=expert) for expert in range(num_experts)]
            wholes = [_matrix(self.take(name, shape)) for name in names]
        else:
            stacked = _matrix(self.take(at + rule.name, (num_experts, *shape)))
            wholes = [stacked.slice(expert * shape[0], shape[0]) for expert in range(num_experts)]
        for nth, part in enumerate(rule.parts):
            yield part, [whole.slice(nth * rows, rows) for whole in wholes]

    def expert_encoding(self, matrix: SourceMatrix) -> Encoding:
        group_size = self.options.group_size
        if self.options.bits < 16 and matrix.columns % group_size:
            fitting = [str(size) for size in GROUP_SIZES if matrix.columns % size == 0]
            hint = f"--group-size {' or '.join(fitting)}" if fitting else "--bits 16, as no group size fits"
            raise RequestError(
                f"{matrix.tensor}: input width {matrix.columns} is not a multiple of "
                f"--group-size {group_size}, expected {hint}"
            )
        return _encoding(matrix, self.options.bits, group_size)

    def skip(self, tied: bool) -> Iterator[Skipped]:
        """Account for all tensors that are left. Raises FormatError for one that nobody knows."""
        reasons: dict[str, list[SourceTensor]] = {}
        for name, tensor in self.left.items():
            known = self.family.skip_reason(name, self.prefix, self.config)
            if known is None and tied and name == _source_name(head_prefix(self.prefix), LM_HEAD):
                known = "lm_head, which is tied to the embedding"
            if known is None:
                raise FormatError(
                    f"{tensor.file}: {shown(name)} has no place in {self.config.model_type} with "
                    f"{self.config.num_hidden_layers} layers and {self.config.num_experts} experts"
                )
            reasons.setdefault(known, []).append(tensor)
        for what, tensors in sorted(reasons.items()):
            yield Skipped(what, len(tensors), sum(tensor.nbytes for tensor in tensors))


def _source_name(prefix: str, tensor: Tensor) -> str:
    return f"{prefix}{tensor.name}{tensor.suffix}"


def _matrix(tensor: SourceTensor) -> SourceMatrix:
    columns = tensor.shape[-1]
    rows = math.prod(tensor.shape[:-1])
    return SourceMatrix(tensor.name, tensor.file, _SOURCE_DTYPES[tensor.dtype], tensor.offset, rows, columns)


def _stored_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A convolution's [channels, 1, kernel] is stored as [channels, kernel]."""
    return (shape[0], *(length for length in shape[1:-1] if length != 1), shape[-1]) if len(shape) > 2 else shape


def _encoding(matrix: SourceMatrix, bits: int, group_size: int) -> Encoding:
    if bits == 16:
        return Plain(matrix.dtype)
    return Affine(bits, group_size, "f16" if matrix.dtype == "f16" else "bf16")
