"""Routing traces: which experts each step asked for, layer by layer, as zstandard-compressed JSON lines.

The first line is a header, each later one a step: for every layer that has experts, the distinct ids in the order
in which they were asked for.
"""

import io
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np
import zstandard

from formats.errors import FormatError, StorageError
from formats.fields import Fields, parse_json
from formats.layout import Layout

FORMAT = "streaming-experts routing trace"
MAX_LINE_BYTES = 1 << 24


@dataclass(frozen=True)
class Trace:
    """Steps of one run; `layers` are the numbers of those that have experts."""

    layers: tuple[int, ...]
    num_experts: tuple[int, ...]  # by layer
    steps: Sequence[Sequence[Sequence[int]]]  # [steps][layers][experts of the step]

    @property
    def accesses(self) -> int:
        """How often any expert was asked for."""
        return sum(len(experts) for step in self.steps for experts in step)


class TraceWriter:
    """Writes a trace while a model runs. Raises StorageError when the file cannot be written."""

    def __init__(self, path: Path, layout: Layout) -> None:
        moe_layers = list(layout.moe_layers())
        self._places = {layer: place for place, (layer, _) in enumerate(moe_layers)}
        self._step: list[list[int]] = [[] for _ in moe_layers]
        self._path = path
        with self._storage_errors():
            self._file = zstandard.open(path, "wt", encoding="utf-8")
        header = {
            "format": FORMAT,
            "version": 1,
            "layers": [layer for layer, _ in moe_layers],
            "num_experts": [layer_layout.num_experts for _, layer_layout in moe_layers],
        }
        self._write(header)

    def add(self, layer: int, experts: Sequence[int]) -> None:
        """Note the distinct experts that a step asked one layer for; the last layer ends the step."""
        place = self._places[layer]
        self._step[place] = list(experts)
        if place + 1 == len(self._step):
            self._write(self._step)
            self._step = [[] for _ in self._step]

    def _write(self, line: object) -> None:
        with self._storage_errors():
            self._file.write(json.dumps(line, separators=(",", ":")) + "\n")

    def close(self) -> None:
        """Write the rest. Raises StorageError."""
        with self._storage_errors():
            self._file.close()

    @contextmanager
    def _storage_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise StorageError(f"{self._path}: cannot be written ({error.strerror})") from None

    def __enter__(self) -> "TraceWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_trace(path: Path) -> Trace:
    """Read a trace. Raises FormatError naming file, line and field, StorageError when it cannot be opened."""
    try:
        with open(path, "rb") as file, zstandard.ZstdDecompressor().stream_reader(file) as stream:
            lines = _lines(io.BufferedReader(stream), path)
            header = Fields(parse_json(next(lines, b""), f"{path}: line 1"), f"{path}: line 1")
            for key, found, expected in (
                ("format", header.string("format"), FORMAT),
                ("version", header.integer("version"), 1),
            ):
                if found != expected:
                    raise header.wrong(key, str(expected))
            layers = tuple(header.integers("layers", 0, 2**20))
            num_experts = tuple(header.integers("num_experts", 1, 2**20))
            header.close()
            if len(set(layers)) != len(layers):
                raise header.wrong("layers", "distinct numbers")
            if len(layers) != len(num_experts) or not layers:
                raise header.wrong("num_experts", f"{len(layers)} numbers, one per layer")
            steps = [_step(line, f"{path}: line {i}", num_experts) for i, line in enumerate(lines, 2)]
    except OSError as error:
        raise StorageError(f"{path}: cannot be read ({error.strerror})") from None
    except zstandard.ZstdError as error:
        raise FormatError(f"{path}: is no whole zstandard file ({error})") from None
    return Trace(layers, num_experts, steps)


def _lines(stream: io.BufferedReader, path: Path) -> Iterator[bytes]:
    while line := stream.readline(MAX_LINE_BYTES):
        if not line.endswith(b"\n"):
            raise FormatError(f"{path}: has a line that is cut or longer than {MAX_LINE_BYTES} bytes")
        yield line


def _step(line: bytes, where: str, num_experts: Sequence[int]) -> list[list[int]]:
    step = parse_json(line, where)
    if not isinstance(step, list) or len(step) != len(num_experts):
        raise FormatError(f"{where}: is no list of {len(num_experts)} layers")
    for experts, number in zip(step, num_experts, strict=True):
        if not isinstance(experts, list) or not all(type(e) is int and 0 <= e < number for e in experts):
            raise FormatError(f"{where}: expected lists of expert ids below {number}")
        if len(set(experts)) != len(experts):
            raise FormatError(f"{where}: names an expert twice, expected distinct ones")
    return step


def skewed_trace(
    *,
    hot_share: float,
    hot_accesses: float,
    seed: int,
    num_layers: int = 6,
    num_experts: int = 128,
    top_k: int = 8,
    steps: int = 600,
) -> Trace:
    """A made-up trace with the skew published for large models.

    The hottest `hot_share` of a layer's experts take `hot_accesses` of its accesses (a power law), about a third of a
    token's experts repeat from the token before, and popularity drifts over a few hundred tokens.
    """
    rng = np.random.default_rng(seed)
    popularity = np.log(_power_law(num_experts, hot_share, hot_accesses))
    ranks = [rng.permutation(num_experts) for _ in range(num_layers)]
    before: list[list[int]] = [[] for _ in range(num_layers)]
    trace = []
    for _ in range(steps):
        for layer in range(num_layers):
            if rng.random() < num_experts / 600:  # two experts change places, so that in 300 steps half have moved
                a, b = rng.integers(num_experts, size=2)
                ranks[layer][[a, b]] = ranks[layer][[b, a]]
            kept = [e for e in before[layer] if rng.random() < 0.02]
            # The top-k of these are a draw without putting back (the Gumbel trick).
            keys = popularity[ranks[layer]] + rng.gumbel(size=num_experts)
            keys[kept] = np.inf
            before[layer] = sorted(np.argsort(-keys)[:top_k].tolist())
        trace.append(list(before))
    return Trace(tuple(range(num_layers)), (num_experts,) * num_layers, trace)


def _power_law(number: int, share: float, mass: float) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """Probabilities rank^-a [number] of which the first `share` make up `mass`; a by bisection."""
    low, high = 0.0, 8.0
    for _ in range(50):
        exponent = (low + high) / 2
        p = np.arange(1, number + 1, dtype=np.float64) ** -exponent
        p /= p.sum()
        if p[: round(share * number)].sum() < mass:
            low = exponent
        else:
            high = exponent
    return p
