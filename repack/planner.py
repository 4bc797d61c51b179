"""Makes the plan, pure: headers, config and options -> the place and the origin of every byte."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from formats.config import ModelConfig
from formats.encodings import Affine, Encoding, Plain, encoding_label
from formats.encodings.base import GROUP_SIZES
from formats.encodings.sources import PlainSource
from formats.encodings.sources.expert_ids import INTEGERS
from formats.errors import FormatError, RequestError, UnsupportedError
from formats.families import FAMILIES
from formats.family import LM_HEAD, NGRAM_SCALE, Experts, Tensor, head_prefix
from formats.fields import shown
from formats.layout import (
    EMBEDDING_FILE,
    NGRAM_FILE,
    EmbeddingLayout,
    LayerLayout,
    Layout,
    ResidentTensor,
    lay_out_embedding,
    layer_file,
    place_resident,
)
from formats.quantization import MLX, Quantization
from formats.record import PartSpec, lay_out_record
from repack.carriers import in_one_form, said_of_parts
from repack.detect import Found, Module, activation_scales, is_there, take_alike, take_module
from repack.plan import Options, Plan, Skipped, SourceMatrix, SourcePlane
from repack.sources.base import SourceTensor

RESIDENT_GROUP_SIZES = (64, 32)  # the first that divides a tensor's width


def make_plan(
    tensors: Mapping[str, SourceTensor],
    config: ModelConfig,
    options: Options,
    quantization: Quantization | None = None,
) -> Plan:
    """Give every tensor a place.

    Raises FormatError for a tensor that is missing, unknown or of another shape, or that the quantization config
    contradicts, UnsupportedError for an encoding, RequestError for an option that does not fit; each names the tensor,
    found and expected.
    """
    _check_options(options)
    if quantization is not None and quantization.method == MLX and not FAMILIES[config.model_type].mlx:
        raise UnsupportedError(
            f"{quantization.where}: {config.model_type} as MLX quantizes it is not implemented, expected a checkpoint "
            "in its publisher's names, or GGUF"
        )
    return _Planner(tensors, config, options, quantization).plan()


def with_resident_bits(plan: Plan, bits: int) -> Plan:
    """The same plan with other --resident-bits. Raises RequestError where the model's widths forbid them."""
    options = replace(plan.options, resident_bits=bits)
    _check_options(options)
    tables = {table.file: _lay_out_table(table.file, sources, options) for table, sources in plan.embeddings()}
    layout = replace(
        plan.layout,
        resident=_lay_out_resident(plan.layout.model, plan.resident, options),
        embedding=tables[EMBEDDING_FILE],
        ngrams=tables.get(NGRAM_FILE),
    )
    return replace(plan, layout=layout, options=options)


def _check_options(options: Options) -> None:
    if options.requantize and (options.bits == 16 or options.resident_bits == 16):
        raise RequestError("--requantize rounds to fewer bits, expected --bits and --resident-bits of 4 or 8")


class _Planner:
    """Takes tensors out of the source's table until none is left that has no role."""

    def __init__(
        self,
        tensors: Mapping[str, SourceTensor],
        config: ModelConfig,
        options: Options,
        quantization: Quantization | None,
    ) -> None:
        self.family = FAMILIES[config.model_type]
        self.left, self.config = in_one_form(tensors, config)
        self.options = options
        self.quantization = quantization and said_of_parts(quantization)
        self.prefix = next(
            (at for at in self.family.prefixes if is_there(self.module(at, self.family.embedding), self.left)),
            self.family.prefixes[0],
        )
        self.quantized = 0  # matrices that arrived so
        self.wholes: dict[str, SourceMatrix] = {}  # modules that several tensors are rows of

    def plan(self) -> Plan:
        config, options = self.config, self.options
        embedding = self.take(self.prefix, self.family.embedding)
        resident = [self.take(self.before(tensor) + at, tensor) for at, tensor in self.family.resident(config)]
        layers: list[LayerLayout | None] = [None] * config.num_hidden_layers
        experts = {}
        for i in filter(config.has_experts, range(len(layers))):
            layers[i], experts[i] = self.expert_layer(i)
        resident.append(self.head(embedding))
        ngrams = self.ngrams()
        skipped = tuple(self.skip())
        if self.quantization is not None and not self.quantized:
            raise FormatError(
                f"{self.quantization.where} says {self.quantization.quant_method}, but every tensor is of plain floats"
            )
        layout = Layout(
            config,
            tuple(layers),
            _lay_out_resident(config, resident, options),
            _lay_out_table(EMBEDDING_FILE, (embedding,), options),
            _lay_out_table(NGRAM_FILE, ngrams, options) if ngrams else None,
        )
        return Plan(layout, options, experts, tuple(resident), embedding, skipped, ngrams)

    def ngrams(self) -> tuple[SourceMatrix, ...]:
        """The parts that an embedding of n-grams comes in; of a model without one, none."""
        if self.config.ngram_table is None:
            return ()
        parts = [(f"{self.prefix}layers.{i}.", part) for i, part in self.family.ngram_shards(self.config)]
        for i in self.config.ngram_layers:
            at = f"{self.prefix}layers.{i}."
            if (scale := self.left.pop(at + NGRAM_SCALE, None)) is not None:
                for part in (part for place, part in parts if place == at):
                    name = f"{at}{part.published}_scale"
                    self.left[name] = scale._replace(name=name)
        shards = tuple(self.take(at, part) for at, part in parts)
        for shard in shards:
            if shard.encoding != shards[0].encoding:
                raise UnsupportedError(
                    f"{shard.file}: {shard.tensor} is {shard.encoding.label}, expected {shards[0].encoding.label} as "
                    f"{shards[0].tensor} is"
                )
        return shards

    def before(self, tensor: Tensor) -> str:
        """What stands before the names of a layer, or of a tensor of none."""
        return head_prefix(self.prefix) if tensor in self.family.of_head else self.prefix

    def shape(self, tensor: Tensor | Experts) -> tuple[int, ...]:
        return self.family.shape(tensor.shape, self.config)

    def head(self, embedding: SourceMatrix) -> SourceMatrix:
        """The head; where it is tied, the embedding, unless it is stored itself, as transformers has it."""
        at, head = head_prefix(self.prefix), self.family.head
        if self.config.tie_word_embeddings and not is_there(self.module(at, head), self.left):
            return embedding
        return self.take(at, head)

    def take(self, at: str, tensor: Tensor) -> SourceMatrix:
        """A resident tensor's matrix, which may be some of a module's rows."""
        module = self.module(at, tensor)
        if module.base != at + tensor.base or tensor.parts == 1:
            return self.matrix(module, take_module(module, self.left, self.quantization))
        rows = module.rows
        module = module._replace(rows=rows * tensor.parts, shape=(rows * tensor.parts, *module.shape[1:]))
        if module.base not in self.wholes:
            self.wholes[module.base] = self.matrix(module, take_module(module, self.left, self.quantization))
        return _whole_words(self.wholes[module.base].slice(tensor.part * rows, rows))

    def module(self, at: str, tensor: Tensor) -> Module:
        """Where a resident tensor is; a vector is one row, and only the last axis of others are columns."""
        shape = self.shape(tensor)
        module = Module(
            at + tensor.base,
            tensor.suffix,
            math.prod(shape[:-1]),
            shape[-1],
            shape[::-1] if tensor.transposed else shape,
            transposed=tensor.transposed,
            num_experts=self.config.num_experts if tensor.dtype in INTEGERS else 0,
        )
        others = (module._replace(base=at + name) for name in tensor.also.split())
        return next((other for other in others if is_there(other, self.left)), module)

    def matrix(self, module: Module, found: Found, expert: int = 0) -> SourceMatrix:
        """The matrix of a module, or of one expert of a stacked one."""
        self.quantized += found.encoding.quantized
        each = module.stacked or 1  # matrices in a tensor
        planes = tuple(
            SourcePlane(spec, tensor.name, tensor.file, tensor.dtype, tensor.offset + expert * (tensor.nbytes // each))
            for spec, tensor in found.planes
        )
        return SourceMatrix(found.encoding, planes, module.rows, module.rows, module.columns)

    def expert_layer(self, i: int) -> tuple[LayerLayout, tuple[tuple[SourceMatrix, ...], ...]]:
        """A layer's file, and the source of each part of each expert."""
        num_experts, names = self.config.num_experts, self.config.expert_parts
        by_part: dict[str, list[SourceMatrix]] = {name: [] for name in names}
        for rule in self.expert_layout(i):
            for part, matrices in self.expert_matrices(i, rule):
                by_part[part] += matrices
        specs = []
        for name in names:
            first = by_part[name][0]
            for matrix in by_part[name]:
                if matrix.encoding != first.encoding:
                    raise UnsupportedError(
                        f"{matrix.file}: {matrix.tensor} is {matrix.encoding.label}, expected {first.encoding.label} "
                        f"as {first.tensor} is"
                    )
            bias = first.linear_bias and first.linear_bias.encoding.exact(1).id
            specs.append(PartSpec(name, first.rows, first.columns, _expert_encoding(first, self.options), bias))
        layer = LayerLayout(layer_file(i), num_experts, lay_out_record(specs))
        return layer, tuple(zip(*(by_part[name] for name in names), strict=True))

    def expert_layout(self, i: int) -> tuple[Experts, ...]:
        """The family's layout whose first module is there; exactly one must be."""
        layouts = self.family.expert_layouts
        first = [self.expert_module(i, layout[0], 0) for layout in layouts]
        found = [at for at, module in enumerate(first) if is_there(module, self.left)]
        if len(found) > 1:
            names = " and ".join(first[at].weight for at in found)
            raise FormatError(f"layer {i} has its experts twice, as {names}")
        return layouts[found[0]] if found else layouts[0]

    def expert_module(self, i: int, rule: Experts, expert: int) -> Module:
        """Where the matrix of an expert is, or of all where they are stacked."""
        rows, columns = self.shape(rule)
        stacked = 0 if "{expert}" in rule.name else self.config.num_experts
        base = self.expert_base(i, rule, expert)
        there = self.left.get(base + rule.suffix)
        rows_first = rule.either and there is not None and there.shape[-2:] == (rows, columns)
        transposed = rule.transposed and not rows_first
        plain = (columns, rows) if transposed else (rows, columns)
        shape = (stacked, *plain) if stacked else plain
        return Module(base, rule.suffix, rows, columns, shape, stacked, transposed)

    def expert_base(self, i: int, rule: Experts, expert: int) -> str:
        return f"{self.prefix}layers.{i}.{rule.name.format(expert=expert)}"

    def expert_matrices(self, i: int, rule: Experts) -> Iterator[tuple[str, list[SourceMatrix]]]:
        """(part, its matrix of every expert) for each part that a module of this rule holds."""
        wholes = list(self.whole_matrices(i, rule))
        if len(rule.parts) == 1:
            yield rule.parts[0], wholes
            return
        rows = wholes[0].rows // len(rule.parts)
        for nth, part in enumerate(rule.parts):
            if rule.interleaved:
                yield part, [_whole_words(whole.every(len(rule.parts), nth)) for whole in wholes]
            else:
                yield part, [_whole_words(whole.slice(nth * rows, rows)) for whole in wholes]

    def whole_matrices(self, i: int, rule: Experts) -> Iterator[SourceMatrix]:
        """What a rule's module holds of every expert; the first says how they are kept, as a rule all alike."""
        first = module = self.expert_module(i, rule, 0)
        first_found = found = take_module(first, self.left, self.quantization)
        bias = self.bias_of(first, rule)
        said_by_module = self.quantization is not None and self.quantization.overrides
        for expert in range(self.config.num_experts):
            at = expert if first.stacked else 0
            if expert > 0 and not first.stacked:
                module = first._replace(base=self.expert_base(i, rule, expert))
                alike = None if said_by_module else take_alike(module, first_found, first, self.left)
                found = alike or take_module(module, self.left, self.quantization)
                bias = self.bias_of(module, rule)
            whole = self.matrix(module, found, at)
            if bias is not None:
                whole = whole._replace(linear_bias=self.matrix(module._replace(columns=1), bias, at))
            yield whole

    def bias_of(self, module: Module, rule: Experts) -> Found | None:
        """The bias of a projection, as a matrix of one column."""
        if not rule.bias:
            return None
        shape = (module.stacked, module.rows) if module.stacked else (module.rows,)
        bias = Module(module.base + rule.bias, "", module.rows, 1, shape, module.stacked)
        found = take_module(bias, self.left, self.quantization)
        if not isinstance(found.encoding, PlainSource):
            raise UnsupportedError(f"{bias.base} is {found.encoding.label}, expected plain floats")
        return found

    def skip(self) -> Iterator[Skipped]:
        """Account for all tensors that are left. Raises FormatError for one that nobody knows."""
        reasons: dict[str, list[SourceTensor]] = {}
        scales = set(activation_scales(self.left))
        for name, tensor in self.left.items():
            known = self.family.skip_reason(name, self.prefix, self.config)
            if known is None and name in scales:
                known = "scales of quantized activations"
            if known is None:
                raise FormatError(
                    f"{tensor.file}: {shown(name)} has no place in {self.config.model_type} with "
                    f"{self.config.num_hidden_layers} layers and {self.config.num_experts} experts"
                )
            reasons.setdefault(known, []).append(tensor)
        for what, tensors in sorted(reasons.items()):
            yield Skipped(what, len(tensors), sum(tensor.nbytes for tensor in tensors))


def _whole_words(matrix: SourceMatrix) -> SourceMatrix:
    """Some rows of a module. Raises UnsupportedError where they cut the words of rows that are packed together."""
    if matrix.whole_rows > 1 and (matrix.step > 1 or matrix.first % matrix.whole_rows):
        which = f"from {matrix.first}" if matrix.step == 1 else f"every {matrix.step}th from {matrix.first}"
        raise UnsupportedError(
            f"{matrix.file}: {matrix.tensor} is {matrix.encoding.label}, expected an encoding whose rows can be taken "
            f"apart: of {matrix.stored_rows} rows {matrix.rows} are wanted, {which}"
        )
    return matrix


# ---- encodings


def _lay_out_resident(
    config: ModelConfig, matrices: Sequence[SourceMatrix], options: Options
) -> tuple[ResidentTensor, ...]:
    """The resident tensors, one after another; their matrices are in the family's order, the head last."""
    family, end = FAMILIES[config.model_type], 0
    tensors = [*((at + tensor.name, tensor) for at, tensor in family.resident(config)), (LM_HEAD.name, LM_HEAD)]
    placed = []
    for (name, tensor), matrix in zip(tensors, matrices, strict=True):
        shape = family.stored_shape(tensor, config)
        encoding = _resident_encoding(matrix, options, keep=tensor.keep or len(shape) == 1)
        placed.append(place_resident(name, shape, encoding, end))
        end += placed[-1].nbytes
    return tuple(placed)


def _lay_out_table(file: str, parts: Sequence[SourceMatrix], options: Options) -> EmbeddingLayout:
    """A file of rows that come in parts of the same width and encoding, one after another."""
    rows = sum(part.rows for part in parts)
    return lay_out_embedding(rows, parts[0].columns, _resident_encoding(parts[0], options), file)


def _resident_encoding(matrix: SourceMatrix, options: Options, keep: bool = False) -> Encoding:
    """`keep`: small and sensitive, so never rounded, and plain floats when all is done."""
    if keep:
        return Plain("f32") if matrix.encoding.quantized else _exact(matrix)
    bits = options.resident_bits
    if not _is_rounded(matrix, bits, options):
        return _exact(matrix)
    fitting = [size for size in RESIDENT_GROUP_SIZES if matrix.columns % size == 0]
    if not fitting:
        raise RequestError(
            f"{matrix.tensor}: input width {matrix.columns} is not a multiple of "
            f"{' or '.join(map(str, RESIDENT_GROUP_SIZES))}; keep it as it is with --resident-bits 16"
        )
    return _affine(matrix, bits, fitting[0])


def _expert_encoding(matrix: SourceMatrix, options: Options) -> Encoding:
    bits, group_size = options.bits, options.group_size
    if not _is_rounded(matrix, bits, options):
        return _exact(matrix)
    if matrix.columns % group_size:
        fitting = [str(size) for size in GROUP_SIZES if matrix.columns % size == 0]
        hint = f"--group-size {' or '.join(fitting)}" if fitting else "--bits 16, as no group size fits"
        raise RequestError(
            f"{matrix.tensor}: input width {matrix.columns} is not a multiple of "
            f"--group-size {group_size}, expected {hint}"
        )
    return _affine(matrix, bits, group_size)


def _is_rounded(matrix: SourceMatrix, bits: int, options: Options) -> bool:
    """Whether a matrix is rounded to affine of so many bits: floats and FP8 to fewer, others only on request."""
    source = matrix.encoding
    if source.rounded_by_default:
        return bits < min(16, source.bits)  # 16 bits are as they arrive
    return options.requantize and bits <= source.bits


def _exact(matrix: SourceMatrix) -> Encoding:
    """The encoding that keeps it to the bit. Raises UnsupportedError where its sizes have none."""
    encoding = matrix.encoding.exact(matrix.columns)
    try:
        encoding.arrays(1, matrix.columns)
    except FormatError as error:
        raise UnsupportedError(
            f"{matrix.file}: {matrix.tensor} is {matrix.encoding.label}, which {encoding_label(encoding)} cannot hold "
            f"({error}); --requantize rounds it"
        ) from None
    return encoding


def _affine(matrix: SourceMatrix, bits: int, group_size: int) -> Encoding:
    return Affine(bits, group_size, "f16" if matrix.encoding.exact(matrix.columns) == Plain("f16") else "bf16")
