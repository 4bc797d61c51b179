"""Engines on the reference backend, and every way to give one token ids."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from runtime import Engine
from tests.runtime.helpers import PLENTY, reference

PROMPT = reference("demo/reference.npz")["prompt_ids"][:12].tolist()
DEFAULTS: dict[str, Any] = {"ram_bytes": PLENTY, "backend": "numpy"}


def open_demo(path: Path, **options: Any) -> Engine:
    """With the reference backend; tests/native compares the kernels with it."""
    return Engine.open(path, **(DEFAULTS | options))


def joined(engine: Engine, **options: Any) -> str:
    return "".join(engine.generate("Once upon a time", **({"max_new_tokens": 8} | options)))


CALLS: dict[str, Callable[[Engine, list[int]], object]] = {
    "logits": lambda engine, ids: engine.logits(ids),
    "generate_ids": lambda engine, ids: engine.generate_ids(ids, max_new_tokens=1),
    "step": lambda engine, ids: engine.step([(engine.new_session(), ids)]),
}
every_call = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
