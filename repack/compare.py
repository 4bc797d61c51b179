"""A container against its source: every matrix decoded, and the source encoded again, in row blocks."""

import math
import os
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from formats.config import ModelConfig, read_config
from formats.container import Container
from formats.dtypes import AnyArray, Float32, storage_dtype
from formats.encodings import Affine, Encoding, Plain, encoding_label
from formats.errors import FormatError
from formats.fields import shown
from formats.layout import RESIDENT_FILE, EmbeddingLayout, LayerLayout, Layout
from formats.quantization import CONFIG_FILE, MODELOPT_FILE, Quantization, read_quantization
from formats.record import LINEAR_BIAS, PlacedArray
from repack.carriers import in_one_form
from repack.findings import Comparison, Damage, Findings
from repack.plan import Options, Plan, SourceMatrix, Unit
from repack.planner import make_plan
from repack.rows import RowReader
from repack.sources.base import Range, Source
from repack.writer import Progress

ROW_BLOCK_BYTES = 1 << 20  # of source
_AS_THEY_ARE = Options(bits=16, resident_bits=16)  # any group size would do: the encodings are the container's


# (fd, first row, rows) -> the arrays of these rows. Raises _CutError.
ReadRows = Callable[[int, int, int], dict[str, AnyArray]]


class _Matrix(NamedTuple):
    """A matrix of the container, and the one of the source that it was made from."""

    place: Damage
    encoding: Encoding
    source: SourceMatrix
    read: ReadRows


Sample = frozenset[tuple[int, int]]  # (layer, expert)


class _CutError(Exception):
    """The file ends before the matrix does."""


@dataclass
class _Tally:
    """The sums behind a Comparison."""

    tensors: int = 0
    weights: int = 0
    max_abs_error: float = 0.0
    square_error: float = 0.0
    square_source: float = 0.0
    exact: bool = True

    def add(self, stored: Float32, values: Float32) -> None:
        """A row block as it was decoded and as the source has it."""
        error = np.subtract(stored, values, dtype=np.float64)
        self.weights += values.size
        self.max_abs_error = float(np.maximum(self.max_abs_error, np.abs(error).max()))
        self.square_error += float(np.square(error).sum())
        self.square_source += float(np.square(values, dtype=np.float64).sum())
        self.exact = self.exact and not error.any()

    def result(self, source: str, encoding: Encoding) -> Comparison:
        ratio = self.square_error / self.square_source if self.square_source else self.square_error
        return Comparison(
            source=source,
            encoding=encoding_label(encoding),
            tensors=self.tensors,
            weights=self.weights,
            max_abs_error=_finite(self.max_abs_error),
            relative_rms_error=_finite(ratio**0.5),
            exact=self.exact,
        )


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def choose_experts(layout: Layout, count: int) -> Sample:
    """Some experts at random."""
    experts = [(i, expert) for i, layer in layout.moe_layers() for expert in range(layer.num_experts)]
    return frozenset(random.sample(experts, min(count, len(experts))))


def source_bytes(source: Source, layout: Layout, sample: Sample | None = None) -> int:
    """Bytes of the source that a comparison reads. Raises what reading config and headers of the source raises."""
    plan = make_plan(source.tensors, layout.model, _AS_THEY_ARE, _quantization(source))
    if sample is None:
        return plan.source_bytes
    return sum(_units(plan)[f"layer {i} expert {expert}"].source_bytes for i, expert in sample)


def compare_with_source(
    container: Container, source: Source, found: Findings, report: Progress, sample: Sample | None = None
) -> tuple[Comparison, ...]:
    """Compare every matrix, or those of a sample of experts; what is not exactly what the source gives is damage.

    Raises FormatError when the source is no checkpoint of this model, StorageError when it cannot be read.
    """
    layout = container.index.layout
    _check_config(source, layout.model)
    plan = make_plan(source.tensors, layout.model, _AS_THEY_ARE, _quantization(source))
    tallies: dict[tuple[str, Encoding], _Tally] = {}
    with source.reader() as reader, np.errstate(all="ignore"):  # a damaged scale may be anything
        readers = _Readers(RowReader(reader), RowReader(reader))
        reader.expect(_ranges(plan, sample))
        for file, matrices in _by_file(layout, plan, sample):
            try:
                fd = os.open(container.path(file), os.O_RDONLY | os.O_CLOEXEC)
            except (FormatError, OSError):
                continue  # reported when its checksums were taken
            try:
                for matrix in matrices:
                    tally = tallies.setdefault((matrix.source.encoding.label, matrix.encoding), _Tally())
                    _compare(fd, matrix, readers, tally, found, report)
            finally:
                os.close(fd)
    results = (tally.result(*key) for key, tally in tallies.items())
    return tuple(sorted(results, key=lambda result: (result.encoding, result.source)))


def _quantization(source: Source) -> Quantization | None:
    config = source.small_file(CONFIG_FILE)
    return read_quantization(config, source.small_file(MODELOPT_FILE)) if config is not None else None


def _check_config(source: Source, model: ModelConfig) -> None:
    raw = source.small_file("config.json")
    if raw is None:
        raise FormatError("config.json is missing from the source")
    _, config = in_one_form(source.tensors, read_config(raw, "the source's config.json"))
    for key, value in vars(config).items():
        if getattr(model, key) != value:
            raise FormatError(f"the source's {key} is {value}, but the container's is {getattr(model, key)}")


# ---- the matrices of a container


def _units(plan: Plan) -> dict[str, Unit]:
    return {unit.name: unit for file in plan.files() for unit in file.units}


def _ranges(plan: Plan, sample: Sample | None) -> list[list[Range]]:
    """What will be read, in the order of _by_file."""
    if sample is None:
        return [unit.ranges() for file in plan.files() for unit in file.units]
    units = _units(plan)
    return [units[f"layer {i} expert {expert}"].ranges() for i, expert in sorted(sample)]


def _by_file(layout: Layout, plan: Plan, sample: Sample | None) -> Iterator[tuple[str, Iterator[_Matrix]]]:
    """(file, its matrices), all that the container has, or those of the sample."""
    if sample is None:
        for table, (_, sources) in zip(layout.embeddings, plan.embeddings(), strict=True):
            yield table.file, _embedding_matrices(table, sources)
        yield RESIDENT_FILE, _resident_matrices(layout, plan)
    for i, layer in layout.moe_layers():
        chosen = range(layer.num_experts) if sample is None else sorted(e for in_layer, e in sample if in_layer == i)
        if chosen:
            yield layer.file, _expert_matrices(i, layer, plan, chosen)


def _embedding_matrices(layout: EmbeddingLayout, sources: Sequence[SourceMatrix]) -> Iterator[_Matrix]:
    begin = 0
    for source in sources:

        def read(fd: int, first: int, rows: int, begin: int = begin) -> dict[str, AnyArray]:
            raw = _read(fd, (begin + first) * layout.row_bytes, rows * layout.row_bytes)
            return layout.views(raw.reshape(rows, layout.row_bytes))

        yield _Matrix(Damage(layout.file, ""), layout.encoding, source, read)
        begin += source.rows


def _resident_matrices(layout: Layout, plan: Plan) -> Iterator[_Matrix]:
    planned = {
        tensor.name: (tensor, source) for tensor, source in zip(plan.layout.resident, plan.resident, strict=True)
    }
    for name in sorted(planned.keys() ^ layout.tensors.keys()):
        where = "container" if name in planned else "source"
        raise FormatError(f"resident tensor {shown(name)} is missing from the {where}")
    for tensor in layout.resident:
        origin, source = planned[tensor.name]
        if origin.shape != tensor.shape:
            raise FormatError(f"{tensor.name} has shape {list(tensor.shape)}, but {list(origin.shape)} in the source")
        place = Damage(RESIDENT_FILE, "", tensor=tensor.name)
        yield _Matrix(place, tensor.encoding, source, _row_reader(tensor.arrays, tensor.offset))


def _expert_matrices(i: int, layer: LayerLayout, plan: Plan, experts: Sequence[int]) -> Iterator[_Matrix]:
    for expert in experts:
        for part, source in zip(layer.record.parts, plan.experts[i][expert], strict=True):
            if (part.rows, part.columns) != (source.rows, source.columns):
                raise FormatError(
                    f"layer {i}, {part.name} is [{part.rows}, {part.columns}], "
                    f"but [{source.rows}, {source.columns}] in the source"
                )
            read = _row_reader(part.arrays, expert * layer.record.record_bytes)
            yield _Matrix(Damage(layer.file, "", i, expert, part.name), part.encoding, source, read)


def _row_reader(arrays: tuple[PlacedArray, ...], offset: int) -> ReadRows:
    """Reads rows of arrays that lie at byte `offset` of a file; rows are the first axis of each."""

    def read(fd: int, first: int, rows: int) -> dict[str, AnyArray]:
        result = {}
        for array in arrays:
            row_bytes = array.nbytes // array.shape[0]
            raw = _read(fd, offset + array.offset + first * row_bytes, rows * row_bytes)
            result[array.name] = raw.view(storage_dtype(array.dtype)).reshape(rows, *array.shape[1:])
        return result

    return read


def _read(fd: int, offset: int, nbytes: int) -> AnyArray:
    raw = os.pread(fd, nbytes, offset)
    if len(raw) < nbytes:
        raise _CutError
    return np.frombuffer(raw, np.uint8)


# ---- one matrix


def _compare(fd: int, matrix: _Matrix, reader: "_Readers", tally: _Tally, found: Findings, report: Progress) -> None:
    """Compare one matrix; its first difference is damage, the tally has all of them."""
    source, damaged = matrix.source, False
    tally.tensors += 1
    for first, rows in source.blocks(ROW_BLOCK_BYTES):
        planes = reader.weights.read(source, first, rows)
        values = source.encoding.decode(planes)
        try:
            arrays = matrix.read(fd, first, rows)
        except _CutError:
            return  # reported when the checksums were taken
        stored = matrix.encoding.decode(arrays)
        tally.add(stored, values)
        nbytes = source.bytes_of(first + rows) - source.bytes_of(first)
        expected = _expected(matrix, planes, values)
        if source.linear_bias is not None:
            bias = reader.biases.read(source.linear_bias, first, rows)["weight"]
            expected[LINEAR_BIAS] = bias.ravel()
            nbytes += source.linear_bias.bytes_of(first + rows) - source.linear_bias.bytes_of(first)
        report(nbytes, source.tensor)
        if damaged:
            continue
        damage = _difference(arrays, expected)
        if damage is None and source.origin(matrix.encoding).exact:  # then decoding by each must agree too
            damage = _difference({"values": stored}, {"values": values})
        if damage is not None:
            array, row = damage
            message = f"is not what {shown(source.tensor)} of the source gives in {encoding_label(matrix.encoding)}"
            found.add(replace(matrix.place, message=message, array=array, row=first + row))
            damaged = True


def _expected(matrix: _Matrix, planes: Mapping[str, AnyArray], values: Float32) -> dict[str, AnyArray]:
    """The arrays that planes of some rows, or the values that they mean, must have become."""
    source = matrix.source
    if matrix.encoding == source.encoding.exact(source.columns):
        return source.encoding.transcode(planes)
    if not isinstance(matrix.encoding, (Affine, Plain)):
        raise FormatError(
            f"{matrix.place.file} holds {encoding_label(matrix.encoding)}, which {shown(source.tensor)} of the source, "
            f"{source.encoding.label}, never becomes"
        )
    return matrix.encoding.encode(values)


def _difference(arrays: Mapping[str, AnyArray], expected: Mapping[str, AnyArray]) -> tuple[str, int] | None:
    """(array, row) of the first bits that differ."""
    for name, values in expected.items():
        bits = np.dtype(f"u{values.itemsize}")
        unequal = arrays[name].view(bits) != np.ascontiguousarray(values).view(bits)
        if unequal.any():
            return name, int(np.argwhere(unequal)[0][0])
    return None


class _Readers(NamedTuple):
    """Rows of weights and of biases, which are not held together."""

    weights: RowReader
    biases: RowReader
