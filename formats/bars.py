"""What every benchmark reports: ratios that were measured several times against what they should reach."""

import json
import os
import platform
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from formats import __version__


@dataclass(frozen=True)
class Bar:
    """The median of some runs, and what is asked for."""

    name: str
    value: float
    bar: float
    ok: bool
    runs: int
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.name:50} {self.value:6.2f} of {self.bar:.2f} ({self.low:.2f}-{self.high:.2f})"


def bar(name: str, ratios: Sequence[float], wanted: float, *, at_most: bool = False) -> Bar:
    """A bar over all runs: their median against the least, or the most, that is asked for."""
    value = statistics.median(ratios)
    ok = value <= wanted if at_most else value >= wanted
    return Bar(name, value, wanted, ok, len(ratios), min(ratios), max(ratios))


def report(bars: Sequence[Bar], settings: Mapping[str, Any]) -> str:
    """The last line of a benchmark: one JSON object of machine, settings and bars."""
    machine = {"processors": os.cpu_count(), "architecture": platform.machine(), "system": platform.system()}
    return json.dumps({"version": __version__, "machine": machine, **settings, "bars": [asdict(b) for b in bars]})
