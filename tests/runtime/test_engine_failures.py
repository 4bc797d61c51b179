"""What a read, a computation or a key that fails in the middle of a step leaves behind."""

import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from formats.dtypes import Float32
from formats.errors import FormatError, StorageError
from runtime import Engine
from runtime.backends.numpy_ops import NumpyOps
from runtime.cache import ExpertKey
from runtime.store import ExpertStore
from tests.runtime.engines import PROMPT, every_call, open_demo
from tests.runtime.helpers import PLENTY, floor_bytes


@pytest.fixture(autouse=True)
def direct(monkeypatch: pytest.MonkeyPatch) -> None:
    """No warning of a temporary folder in memory: see test_direct.py."""
    monkeypatch.setattr("runtime.store.proves_direct", lambda file: True)


def poison(engine: Engine, tensor: str) -> None:
    """Set the first weight of a bf16 tensor to NaN, as if it was converted so."""
    offset = engine.container.index.layout.tensors[tensor].offset
    engine.resident[offset : offset + 2].view(np.uint16)[:] = 0x7FC0


@pytest.fixture(params=["read", "compute", "weights", "head"])
def failing(
    request: pytest.FixtureRequest, demo16: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[str, Callable[[Engine], None]]:
    """The name of a failure, and what brings it about in an engine that worked until then."""

    def read(engine: Engine) -> None:
        def fails(self: ExpertStore, key: ExpertKey, slot: object) -> None:
            raise StorageError(f"layer {key.layer} cannot be read")

        monkeypatch.setattr(ExpertStore, "read", fails)

    def compute(engine: Engine) -> None:
        route = NumpyOps.route

        def fails(self: NumpyOps, logits: Float32, *args: Any, **options: Any) -> Any:
            calls.append(1)
            if len(calls) == 6:  # in a layer in the middle: the layers before it have made their new states
                raise StorageError("the sixth router")
            return route(self, logits, *args, **options)

        calls: list[int] = []
        monkeypatch.setattr(NumpyOps, "route", fails)

    actions = {
        "read": read,
        "compute": compute,
        "weights": lambda engine: poison(engine, "layers.6.input_layernorm"),
        "head": lambda engine: poison(engine, "lm_head"),
    }
    return request.param, actions[request.param]


def test_a_step_that_fails_leaves_the_sessions_as_they_were(
    demo16: Path, failing: tuple[str, Callable[[Engine], None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    floor = floor_bytes(demo16)
    with open_demo(demo16) as engine:
        expected = engine.logits(PROMPT)[-1]
    with open_demo(demo16, ram_bytes=floor) as engine:
        sessions = [engine.new_session(), engine.new_session()]
        engine.step([(session, PROMPT[:-4]) for session in sessions])
        healthy = engine.resident.copy()
        failing[1](engine)
        with pytest.raises((StorageError, FormatError)):
            engine.step([(session, PROMPT[-4:]) for session in sessions])
        assert [session.token_ids for session in sessions] == [PROMPT[:-4]] * 2
        monkeypatch.undo()
        engine.resident[:] = healthy
        for session in sessions:
            (found,) = engine.step([(session, PROMPT[-4:])])
            # the same tokens in other steps: see test_reference.py
            assert np.abs(found - expected).max() < 1e-4


@pytest.mark.parametrize("tensor", ["layers.6.input_layernorm", "layers.3.mlp.gate", "lm_head"])
@every_call
def test_weights_that_are_no_numbers_are_an_error_and_never_text(
    demo16: Path, tensor: str, call: Callable[[Engine, list[int]], object]
) -> None:
    with open_demo(demo16) as engine:
        poison(engine, tensor)
        with pytest.raises(FormatError, match="logits are no finite numbers; are weights damaged"):
            call(engine, PROMPT)


def test_after_a_failed_read_the_engine_works_on(demo4: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_demo(demo4) as engine:
        expected = engine.logits(PROMPT)
    read = ExpertStore.read

    def fails_once(self: ExpertStore, key: ExpertKey, slot: Any) -> None:
        if key.layer == 5 and not failed:
            failed.append(key)
            raise StorageError("layer 5 cannot be read")
        read(self, key, slot)

    failed: list[ExpertKey] = []
    monkeypatch.setattr(ExpertStore, "read", fails_once)
    with open_demo(demo4, ram_bytes=floor_bytes(demo4)) as engine:
        with pytest.raises(StorageError, match="layer 5"):
            engine.logits(PROMPT)
        assert np.array_equal(engine.logits(PROMPT), expected)


@pytest.mark.parametrize("number", [1, 2, 7, 30])
def test_ctrl_c_in_the_middle_of_a_step_harms_neither_session_nor_cache(
    demo4: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    with open_demo(demo4) as engine:
        expected = engine.logits(PROMPT)
    read, reads = ExpertStore.read, iter(range(1, 1 << 30))

    def interrupting(self: ExpertStore, key: ExpertKey, slot: Any) -> None:
        if next(reads) == number:
            signal.pthread_kill(main_thread, signal.SIGINT)
        read(self, key, slot)

    main_thread = threading.get_ident()
    monkeypatch.setattr(ExpertStore, "read", interrupting)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with open_demo(demo4, ram_bytes=floor_bytes(demo4)) as engine:
            session = engine.new_session()
            with pytest.raises(KeyboardInterrupt):
                engine.step([(session, PROMPT)])
            assert session.token_ids == []
            assert np.array_equal(engine.logits(PROMPT), expected)
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_tensor_that_the_index_does_not_have_is_named(demo4: Path) -> None:
    with (
        Engine.open(demo4, ram_bytes=PLENTY) as engine,
        pytest.raises(FormatError, match=r"^index\.json: has no resident tensor layers\.0\.no_such, "),
    ):
        engine.ops.weight("layers.0.no_such")
