"""Which operations of a run the native backend leaves to NumPy, seen as they are called."""

from pathlib import Path
from typing import Any

import pytest

from formats.config.base import (
    INDEXER_CHOICE,
    MEAN_NORMS,
    NGRAM_GATES,
    POSITION_SCALES,
    ROUNDING,
    SPARSEMIXER_CHOICE,
    STREAM_GATES,
)
from runtime import Engine
from runtime.backends.base import Ops
from runtime.backends.native_ops import NativeOps
from tests.runtime.helpers import PLENTY

# What stores, joins and finds, weighs element by element, or is of weights alone.
SMALL = (
    *("weight", "values", "zeros", "concatenate", "embed", "embed_ngrams"),
    *("new_index_cache", "new_open_window", "add_entries", "compress", "block_tokens"),
    *("clip", "scale_streams", "residual_gate"),
)
NAMED = {
    "layer_norm": MEAN_NORMS,
    "root_gate": NGRAM_GATES,
    "rounded": ROUNDING,
    "scale_by_position": POSITION_SCALES,
    "select_among": INDEXER_CHOICE,
    "select_blocks": INDEXER_CHOICE,
    "select_candidates": INDEXER_CHOICE,
    "stream_gates": STREAM_GATES,
}
# Of operations that are native, but for these.
FUNCTIONS = {
    "runtime.backends.native_latent.choose_tokens": INDEXER_CHOICE,
    "runtime.backends.native_rows.choose_by_sparsemixer": SPARSEMIXER_CHOICE,
}


def called(container: Path, prompt: list[int], monkeypatch: pytest.MonkeyPatch) -> tuple[set[str], Engine]:
    """The parts that NumPy computed of a prompt and two tokens after it, and the engine, closed again."""
    seen: set[str] = set()

    def watched(part: str, function: Any) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            seen.add(part)
            return function(*args, **options)

        return call

    with Engine.open(container, ram_bytes=PLENTY, backend="native", lookahead="off") as engine:
        ops = engine.steps.model.ops
        for name in (name for name in vars(Ops) if callable(getattr(Ops, name)) and not name.startswith("_")):
            if ".numpy_" in getattr(NativeOps, name).__module__ and name not in SMALL:
                monkeypatch.setattr(ops, name, watched(NAMED[name], getattr(ops, name)))
        for path, part in FUNCTIONS.items():
            monkeypatch.setattr(path, watched(part, _function(path)))
        engine.generate_ids(prompt, max_new_tokens=2, ignore_eos=True)
    return seen, engine


def _function(path: str) -> Any:
    module, _, name = path.rpartition(".")
    return getattr(__import__(module, fromlist=[name]), name)


def check_that_they_are_named(container: Path, prompt: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """What was called is what the model's facts name, and one warning says it, or none."""
    seen, engine = called(container, prompt, monkeypatch)
    parts = engine.config.numpy_parts
    assert set(parts) == seen
    said = [warning for warning in engine.warnings if "NumPy" in warning]
    assert said == ([f"NumPy computes beside the native kernels: {', '.join(parts)}"] if parts else [])
