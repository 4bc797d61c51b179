"""What sessions and steps of every family hold in memory is what the budget says of it."""

import tracemalloc
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from formats.dtypes import AnyArray
from repack.convert import convert, prepare
from repack.plan import Options
from repack.sources import open_local
from runtime import Engine
from runtime.backends import native_latent, numpy_latent, numpy_ops
from runtime.backends.native_ops import NativeOps
from runtime.session import Session
from tests.fixtures import deepseek_tiny
from tests.fixtures.recipe import write_checkpoint
from tests.runtime.helpers import PLENTY
from tests.runtime.test_decoders import CASES

STORED = ("awq", "fp8", "gguf", "gptq", "gptq_v2", "gptq_zero", "int4", "mlx", "mxfp4", "nvfp4")  # the same states
FAMILIES = {name: case for name, case in (CASES | deepseek_tiny.CASES).items() if not name.endswith(STORED)}
CHUNK = 48
STEPS = (3, *(CHUNK,) * 9, 1, 1)  # 3 tokens first, so that a chunk ends as many before the end of a block of 4
BACKENDS = pytest.mark.parametrize("backend", ["native", "numpy"])


@pytest.fixture(scope="module", params=FAMILIES)
def container(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    write_checkpoint(folder / "source", FAMILIES[request.param].tensors(), FAMILIES[request.param].config)
    convert(prepare(open_local(str(folder / "source")), Options(16, 64, 16)), folder / "out", hash_source=False)
    return folder / "out"


# ---- states


def arrays(state: Any) -> Iterator[AnyArray]:
    """The arrays that own the memory of states."""
    if isinstance(state, np.ndarray):
        yield state if state.base is None else state.base
    elif isinstance(state, (tuple, list)):
        for part in state:
            yield from arrays(part)
    elif is_dataclass(state):
        yield from arrays([getattr(state, field.name) for field in fields(state)])


def held_bytes(*states: Any) -> int:
    return sum(array.nbytes for array in {id(array): array for array in arrays(states)}.values())


def most_held(engine: Engine, steps: tuple[int, ...]) -> int:
    """Bytes of the states before and after any of the steps, which are there together until it ends."""
    session, most = Session([], engine.steps.model.new_states()), 0
    for tokens in steps:
        before = session.states
        engine.steps.advance(session, some_ids(tokens), last=True)
        most = max(most, held_bytes(before, session.states))
    return most


def some_ids(tokens: int) -> list[int]:
    return [5 + i % 7 for i in range(tokens)]


@pytest.mark.parametrize("ctx_size", [40, 1000])  # caches with a window hold all of the shorter one
@BACKENDS
def test_states_take_what_the_budget_says(container: Path, backend: str, ctx_size: int) -> None:
    options: dict[str, Any] = {"backend": backend, "ctx_size": ctx_size, "chunk_size": CHUNK}
    with Engine.open(container, ram_bytes=PLENTY, **options) as engine:
        most = most_held(engine, STEPS if ctx_size > sum(STEPS) else (3, 24, 1))
        said = engine.terms.kv_bytes + engine.terms.state_bytes
    if backend == "native":
        assert most == said
    else:  # which rounds nothing up to what kernels take at a time: 12 values of MiMo's heads to 16, 40 tokens to 48
        assert 0.6 * said < most <= said


# ---- activations


def step_bytes(container: Path, backend: str, tokens: int) -> tuple[int, int]:
    """(arrays alive at once in a step of so many tokens and the kernels' scratch, what the budget says of them)."""
    options: dict[str, Any] = {"backend": backend, "precision": "exact", "ctx_size": 1000, "chunk_size": tokens}
    with Engine.open(container, ram_bytes=PLENTY, **options) as engine:
        session, ops = engine.new_session(), engine.ops
        engine.steps.advance(session, some_ids(tokens))  # makes what later steps find
        tracemalloc.start()
        engine.steps.advance(session, some_ids(tokens))
        _, found = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        if isinstance(ops, NativeOps):
            found += ops._context.scratch_bytes + ops._outputs.nbytes  # kept between steps
        return found, engine.terms.scratch_bytes


@BACKENDS
def test_a_token_more_in_a_chunk_takes_no_more_than_the_budget_says(
    container: Path, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slopes: what does not grow with a chunk is large beside such models."""
    for module in (numpy_ops, numpy_latent, native_latent):
        monkeypatch.setattr(module, "SCORES_BYTES", 1 << 12)  # which these contexts do not reach
    (less, said_less), (more, said_more) = (step_bytes(container, backend, tokens) for tokens in (128, 384))
    found, said = (more - less) / 256, (said_more - said_less) / 256
    assert found <= said
    if backend == "native":  # which takes more, and which the terms are made for
        assert said <= 2.5 * found
