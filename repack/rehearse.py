"""A container of a model's true geometry with made-up weights, from its config.json alone.

It shows what a model needs and how fast it runs here before anything is downloaded; its text means nothing.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from formats.budget import human
from formats.checksum import xxh3_64
from formats.config import read_config
from formats.dtypes import AnyArray, Float32, from_float32, storage_dtype
from formats.encodings import FP8, MXFP4, NVFP4, Affine, Encoding, Plain, Symmetric, ZeroPoint
from formats.encodings.sources import ExpertIdsSource
from formats.errors import FormatError, RequestError
from formats.families import FAMILIES
from formats.index import REHEARSAL
from formats.layout import LayerLayout
from formats.quantization import read_quantization
from formats.record import RecordLayout
from repack.convert import Conversion, prepare
from repack.encode import EncodedRows, Weights
from repack.output import SMALL_FILES
from repack.plan import Options, SourceMatrix, Unit
from repack.published import published_tensors
from repack.sources.base import Reader, Shard, Source, SourceTensor
from repack.sources.folder import read_small_file
from repack.vocabulary import with_templates, with_tokenizer

POOL_BYTES = 1 << 24
BLOCK_BYTES = 1 << 22  # of codes, made at a time
GAIN = 0.1  # of matrices: small, so that what a token is decides where it is routed, in every layer
E2M1_STD, FP8_STD = 2.93, 1.46  # of random FP4 codes, and of the FP8 codes made up here
E4M3_ONE = 0x38


@dataclass(frozen=True)
class Geometry:
    """A source that has every tensor of a family and no bytes."""

    tensors: Mapping[str, SourceTensor]
    files: Mapping[str, bytes]
    repository: str | None = None
    revision: str | None = None
    shards: Sequence[Shard] = ()
    notes: Sequence[str] = ()

    @classmethod
    def of(cls, source: Source) -> "Geometry":
        """The geometry of a whole checkpoint, from its small files alone. Raises as read_config."""
        files = {name: raw for name in SMALL_FILES if (raw := source.small_file(name)) is not None}
        return geometry(files, f"{source.repository}: config.json")

    def small_file(self, name: str) -> bytes | None:
        return self.files.get(name)

    def reader(self) -> Reader:
        raise AssertionError("a rehearsal reads no source")

    def check(self) -> None:
        """Nothing can have changed."""


@dataclass(frozen=True)
class Rehearsal(Conversion):
    """A conversion whose weights are made up from a seed."""

    seed: int = 0

    def weights(self) -> Weights:
        return MadeUpWeights(self.seed)


def read_geometry(path: Path) -> Geometry:
    """The geometry that a config.json describes, or a folder with one (tokenizer files in it are used too).

    Raises StreamingExpertsError for a config that cannot be read or is not supported.
    """
    paths = {name: path / name for name in SMALL_FILES} if path.is_dir() else {"config.json": path}
    files = {name: raw for name, place in paths.items() if (raw := read_small_file(place)) is not None}
    return geometry(with_templates(with_tokenizer(files)), str(path))


def geometry(files: Mapping[str, bytes], where: str) -> Geometry:
    """The tensors of a model as they were published, from its small files. Raises as read_config and published."""
    if "config.json" not in files:
        raise FormatError(f"{where}: holds no config.json")
    config = read_config(files["config.json"], where)
    said = read_quantization(files["config.json"], where=where)
    tensors = {tensor.name: tensor for tensor in published_tensors(config, said)}
    return Geometry(tensors, files)


def prepare_rehearsal(source: Geometry, options: Options, seed: int, disk_bytes: int | None = None) -> Rehearsal:
    """Plan a rehearsal; within disk_bytes, layer files past them repeat earlier ones as hard links.

    Raises StreamingExpertsError for a config that is not supported or options that do not fit, RequestError for a
    disk_bytes that one layer file of each kind and the rest of the container do not fit into.
    """
    conversion = prepare(source, options)
    layout = conversion.plan.layout
    links = {} if disk_bytes is None else _links(conversion, disk_bytes)
    mark: dict[str, Any] = {"seed": seed}
    if links:
        repeated = {layer.file: layer.nbytes for _, layer in layout.moe_layers()}
        mark |= {"links": links, "distinct_bytes": layout.total_bytes - sum(repeated[name] for name in links)}
    return Rehearsal(source, conversion.plan, conversion.small_files, {REHEARSAL: mark}, links, seed)


def _links(conversion: Conversion, disk_bytes: int) -> dict[str, str]:
    """Which layer files repeat which: as many as fit are written, at least one of each kind, the others in turn."""
    kinds: dict[tuple[RecordLayout, int], list[LayerLayout]] = {}
    for _, layer in conversion.plan.layout.moe_layers():
        kinds.setdefault((layer.record, layer.num_experts), []).append(layer)
    left = disk_bytes - conversion.output_bytes
    left += sum(layer.nbytes for layers in kinds.values() for layer in layers[1:])
    if left < 0:
        raise RequestError(
            f"--disk is {human(disk_bytes)}, expected at least {human(disk_bytes - left)} for this model"
        )
    links = {}
    for layers in kinds.values():
        written = 1 + min(len(layers) - 1, left // layers[0].nbytes)
        left -= (written - 1) * layers[0].nbytes
        links.update({layer.file: layers[i % written].file for i, layer in enumerate(layers[written:])})
    return links


class MadeUpWeights:
    """Seeded random weights: uniform codes, constant scales; vectors are 0.5, which every norm can bear.

    A block is a piece of one random pool, XORed with a word of its own, so that no two records are the same.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def expect(self, units: Sequence[Unit], spool: Path, waiting: Callable[[], None]) -> None:
        """Nothing is read."""

    def finished(self, units: int) -> None:
        """Nothing is kept."""

    def encoded(self, unit: str, source: SourceMatrix, encoding: Encoding, first_row: int = 0) -> Iterator[EncodedRows]:
        rng = np.random.default_rng(int(xxh3_64(f"{self._seed} {unit} {source} {first_row}".encode()), 16))
        row_bytes = encoding.arrays(1, source.columns)[0].nbytes
        step = max(1, BLOCK_BYTES // row_bytes)
        for first in range(0, source.rows, step):
            rows = min(step, source.rows - first)
            arrays: dict[str, AnyArray]
            if isinstance(source.encoding, ExpertIdsSource):
                arrays = {"weight": _experts_of_tokens(rng, source.encoding.num_experts, rows, source.columns)}
            elif isinstance(encoding, Plain):
                arrays = {"weight": from_float32(self._normal(rng, source, rows), encoding.id)}
            else:
                arrays = self._codes(rng, source, encoding, rows)
            nbytes = source.bytes_of(first + rows) - source.bytes_of(first)
            yield EncodedRows(first_row + first, arrays, nbytes)

    def _codes(
        self, rng: np.random.Generator, source: SourceMatrix, encoding: Encoding, rows: int
    ) -> dict[str, AnyArray]:
        """Random codes, and constants for all other arrays."""
        codes, *others = encoding.arrays(rows, source.columns)
        words = -(-codes.nbytes // 8)
        start = int(rng.integers(len(self._pool) - words))
        word = rng.integers(2**64, dtype=np.uint64)
        made = np.bitwise_xor(self._pool[start : start + words], word, out=self._made[:words]).view(np.uint8)
        if isinstance(encoding, FP8):
            made &= np.uint8(0x87)  # 1 to 1.875 of either sign: never NaN
            made |= np.uint8(0x38)
        constants = _constants(encoding, _std(source))
        return {
            "codes": made[: codes.nbytes].view(storage_dtype(codes.dtype)).reshape(codes.shape),
            **{spec.name: np.full(spec.shape, constants[spec.name], storage_dtype(spec.dtype)) for spec in others},
        }

    def _normal(self, rng: np.random.Generator, source: SourceMatrix, rows: int) -> Float32:
        if source.rows == 1:
            return np.full((1, source.columns), 0.5, np.float32)
        return rng.standard_normal((rows, source.columns), np.float32) * np.float32(_std(source))

    def __enter__(self) -> "MadeUpWeights":
        self._pool = _random_words(self._seed)
        self._made = np.empty(POOL_BYTES // 8, np.uint64)  # codes, until the next are asked for
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        del self._pool, self._made


@lru_cache(maxsize=1)
def _random_words(seed: int) -> "np.ndarray[tuple[int], np.dtype[np.uint64]]":
    """POOL_BYTES, the same for all files: one pool stays in the processor's cache, one for each does not."""
    return np.random.Generator(np.random.SFC64(seed)).integers(2**64, size=POOL_BYTES // 8, dtype=np.uint64)


def _experts_of_tokens(rng: np.random.Generator, num_experts: int, tokens: int, k: int) -> Float32:
    """Distinct experts for each token, evenly spread from a random first one: [tokens, k]."""
    first = rng.integers(num_experts, size=(tokens, 1))
    return ((first + np.arange(k) * (num_experts // k)) % num_experts).astype(np.float32)


def _constants(encoding: Encoding, std: float) -> dict[str, Any]:
    """Bits of scales and the like with which random codes have this standard deviation."""
    match encoding:
        case Affine(bits, _, dtype):
            scale = std * math.sqrt(12) / (2**bits - 1)  # that of uniform codes 0..highest is highest / sqrt(12)
            bias = -scale * (2**bits - 1) / 2
            return {"scales": _bits(scale, dtype), "biases": _bits(bias, dtype)}
        case Symmetric(bits, _, dtype) | ZeroPoint(bits, _, dtype):
            return {"scales": _bits(std * math.sqrt(12) / 2**bits, dtype), "zeros": 1 << (bits - 1)}
        case MXFP4():
            return {"scales": 127 + round(math.log2(std / E2M1_STD))}
        case NVFP4(how):
            factor = std / E2M1_STD
            return {"scales": E4M3_ONE, "global": factor if how == "multiply" else 1 / factor}
        case FP8(_, dtype):
            return {"scales": _bits(std / FP8_STD, dtype)}
    raise AssertionError(f"no rehearsal is kept as {encoding.id}")


@cache
def _bits(value: float, dtype: str) -> Any:
    return from_float32(np.array([value], np.float32), dtype)[0]


_EMBEDDINGS = tuple(family.embedding.published for family in FAMILIES.values())
_ROUTERS = (".gate.weight", ".router.weight", ".router.layer.weight")


def _std(source: SourceMatrix) -> float:
    """Of the weights: the embedding and the router have outputs of about 1, all else stays below them."""
    if source.tensor.endswith(_EMBEDDINGS):
        return 1.0
    gain = 1.0 if source.tensor.endswith(_ROUTERS) else GAIN
    return gain / math.sqrt(source.columns)
