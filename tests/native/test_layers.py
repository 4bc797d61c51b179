"""Layers that need nothing of Python are computed in one call, and change nothing but the time that takes."""

from collections.abc import Iterator
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from formats.dtypes import Float32
from formats.errors import UnsupportedError
from repack.convert import convert, prepare
from repack.plan import Options
from repack.sources import open_local
from runtime import Engine
from runtime.backends import native
from runtime.backends.native_run import Run
from runtime.cache import ExpertKey, Held
from runtime.experts import Experts
from runtime.trace import Trace, read_trace

pytestmark = pytest.mark.skipif(not native.levels(), reason="the native kernels are not built")

IDS = np.random.default_rng(0).integers(3, 4000, 24).tolist()


@pytest.fixture(scope="module")
def demo4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("layers") / "out"
    convert(prepare(open_local("demo"), Options(4, 64, 4)), folder, hash_source=False)
    return folder


class Counted:
    """How often a native list of calls was run."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls = 0
        run = native.Context.run

        def counting(context: native.Context, calls: int, count: int) -> int:
            self.calls += 1
            return run(context, calls, count)

        monkeypatch.setattr(native.Context, "run", counting)


def each_alone(engine: Engine) -> list[Float32]:
    """Logits of IDS, one in each step."""
    session = engine.new_session()
    return [engine.step([(session, [token_id])])[0] for token_id in IDS]


def everything(folder: Path, trace: Path, slots: int) -> tuple[list[Float32], Trace, Any]:
    """Logits, what each layer was asked for, and what the cache and its policy have counted and hold."""
    with Engine.open(folder) as engine:
        floor, record = engine.terms.floor_bytes, engine.experts.store.record_bytes(0)
    options: dict[str, Any] = {"ram_bytes": floor + (slots - 2) * record, "trace": trace, "lookahead": "off"}
    with Engine.open(folder, backend="native", **options) as engine:
        assert engine.stats.slots == slots
        logits = each_alone(engine)
        cache, stats = engine.experts.cache, engine.stats
        held = [key for layer in range(8) for e in range(40) if cache.holds(key := ExpertKey(layer, e))]
        counted = stats.cache_hits, stats.cache_misses, stats.bytes_read, engine._policy.most_used(), held
    return logits, read_trace(trace), counted


@pytest.mark.parametrize("slots", [2, 3, 40, 150, 320])
def test_layers_that_pass_are_counted_and_traced_as_those_that_ask(
    demo4: Path, tmp_path: Path, slots: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = Counted(monkeypatch)
    found = everything(demo4, tmp_path / "passed", slots)
    few = counted.calls
    monkeypatch.setattr(Experts, "guessed", True)
    expected = everything(demo4, tmp_path / "asked", slots)
    assert counted.calls - few == len(IDS) * 9  # up to the first layer's experts, then one for each layer
    assert few < len(IDS) * 9 or slots <= 40  # so few hold no layer's experts together
    assert all(map(np.array_equal, found[0], expected[0]))
    assert found[1:] == expected[1:]


def test_a_step_is_one_call_where_all_experts_are_held(demo4: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Engine.open(demo4, backend="native", lookahead="off") as engine:
        logits = each_alone(engine)
        counted = Counted(monkeypatch)
        assert all(map(np.array_equal, each_alone(engine), logits))
        assert counted.calls == len(IDS)


def test_a_step_that_is_stopped_on_the_way_changes_no_session(demo4: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Engine.open(demo4, backend="native") as engine:
        logits = each_alone(engine)
        session = engine.new_session()
        for token_id in IDS[:-1]:
            engine.step([(session, [token_id])])
        with monkeypatch.context() as patched:
            patched.setattr(engine.experts, "resume", engine.experts.stop)
            with pytest.raises(CancelledError):
                engine.step([(session, IDS[-1:])])
        assert session.token_ids == IDS[:-1]
        assert np.array_equal(engine.step([(session, IDS[-1:])])[0], logits[-1])


def test_slots_that_kernels_see_are_those_of_the_cache(demo4: Path) -> None:
    with Engine.open(demo4) as engine:
        floor = engine.terms.floor_bytes
    with Engine.open(demo4, backend="native", ram_bytes=floor + (1 << 20)) as engine:
        each_alone(engine)
        cache, slots_of = engine.experts.cache, engine.experts.slots_of
        assert slots_of is not None
        slots = {ExpertKey(i, e): slot for i, row in enumerate(slots_of.tolist()) for e, slot in enumerate(row)}
        held = [Held(key, slot) for key, slot in slots.items() if slot >= 0]
        for key, _ in held:
            cache.lease(key.layer, [key.expert])
        assert held == sorted(cache.leased())
        assert len(held) + cache.free_slots == engine.stats.slots


# ---- the call that looks experts up


@pytest.fixture
def context() -> Iterator[native.Context]:
    with native.Context(1, "exact") as opened:
        yield opened


def found(context: native.Context, slots: list[int], ids: list[int]) -> tuple[int, list[list[int]]]:
    """How many of three calls were made of which the second looks up, and what it found."""
    run, arriving = Run(), np.full((len(ids), 3), -7)
    one, sum_of = np.ones(1, np.float32), np.zeros(1, np.float32)
    run.add("add_scaled", one, one, 1, sum_of)
    run.add("find", np.array(slots), len(slots), np.array(ids), len(ids), arriving)
    run.add("add_scaled", one, one, 1, sum_of)
    done = context.run(run.call(0), len(run))
    assert sum_of[0] == (2 if done == 3 else 1)
    return done, arriving.tolist()


def test_experts_are_found_in_the_order_of_their_choice(context: native.Context) -> None:
    assert found(context, [4, -1, 9, 0], [3, 0, 2]) == (3, [[0, 0, 1], [4, 1, 1], [9, 2, 1]])


def test_calls_end_before_an_expert_that_has_no_slot(context: native.Context) -> None:
    assert found(context, [4, -1, 9, 0], [3, 1, 2])[0] == 1


@pytest.mark.parametrize("expert", [-1, 4, 1 << 62])
def test_an_expert_that_is_none_is_refused(context: native.Context, expert: int) -> None:
    with pytest.raises(UnsupportedError):
        found(context, [4, -1, 9, 0], [expert])
