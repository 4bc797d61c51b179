"""Routing traces and what a cache makes of them."""

from pathlib import Path

import numpy as np
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from formats.errors import FormatError, StorageError
from runtime import Engine
from runtime.cache import LeastRecentlyUsed
from runtime.simulate import POLICIES, engine_policy, hit_rates, replay
from runtime.trace import Trace, read_trace, skewed_trace
from tests.runtime.helpers import PLENTY

SKEWS = {"24 % take 80 %": (0.24, 0.8), "10 % take 70 %": (0.1, 0.7)}
TRACES = st.lists(
    st.lists(st.lists(st.integers(0, 5), unique=True, min_size=1, max_size=3), min_size=2, max_size=2), max_size=40
).map(lambda steps: Trace((0, 1), (6, 6), steps))


@pytest.fixture(scope="module")
def recorded(demo4: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Trace, dict[int, float]]:
    """A trace of the demo, and the hit rates that engines of some budgets counted on the same tokens."""
    path = tmp_path_factory.mktemp("trace") / "trace.jsonl.zst"
    ids = np.random.default_rng(0).integers(3, 4000, 80).tolist()
    with Engine.open(demo4) as engine:
        floor, record = engine.terms.floor_bytes, engine.experts.store.record_bytes(0)
    counted: dict[int, float] = {}
    for slots in (32, 80, 160):
        # A guess may put out an expert that the simulator would keep: it knows nothing of guesses.
        with Engine.open(
            demo4, ram_bytes=floor + (slots - 2) * record, readers=1, trace=path, lookahead="off"
        ) as engine:
            assert engine.stats.slots == slots
            session = engine.new_session()
            for token_id in ids:
                engine.step([(session, [token_id])])
            counted[slots] = engine.stats.hit_rate
    return read_trace(path), counted


def test_a_trace_holds_every_step_and_layer(recorded: tuple[Trace, dict[int, float]]) -> None:
    trace, _ = recorded
    assert trace.layers == tuple(range(8))
    assert trace.num_experts == (40,) * 8
    assert len(trace.steps) == 80
    assert all(len(experts) == 4 for step in trace.steps for experts in step)


def test_the_simulator_counts_what_the_engine_counts(recorded: tuple[Trace, dict[int, float]]) -> None:
    trace, counted = recorded
    for slots, hit_rate in counted.items():
        assert replay(trace, slots, engine_policy(trace, slots)) == hit_rate


@pytest.mark.parametrize("skew", SKEWS.values(), ids=SKEWS)
@pytest.mark.parametrize("share", [0.1, 0.25, 0.5])
def test_the_default_policy_is_within_a_point_of_the_best(skew: tuple[float, float], share: float) -> None:
    trace = skewed_trace(hot_share=skew[0], hot_accesses=skew[1], seed=1)
    slots = int(share * sum(trace.num_experts))
    rates = hit_rates(trace, slots)
    assert replay(trace, slots, engine_policy(trace, slots)) >= max(rates.by_policy.values()) - 0.01


@pytest.mark.parametrize("skew", SKEWS.values(), ids=SKEWS)
def test_a_made_up_trace_has_the_skew_and_the_repeats_that_it_promises(skew: tuple[float, float]) -> None:
    trace = skewed_trace(hot_share=skew[0], hot_accesses=skew[1], seed=0, steps=60)
    uses = np.zeros((6, 128))
    for step in trace.steps:
        for place, experts in enumerate(step):
            uses[place, list(experts)] += 1
    hot = -np.sort(-uses, axis=1)[:, : round(skew[0] * 128)]
    assert abs(hot.sum() / uses.sum() - skew[1]) < 0.12  # drawing 8 different ones flattens the law a little
    pairs = zip(trace.steps, trace.steps[1:], strict=False)
    repeats = np.mean([len(set(a) & set(b)) / 8 for one, two in pairs for a, b in zip(one, two, strict=True)])
    assert 0.25 <= repeats <= 0.4


@given(trace=TRACES, slots=st.integers(1, 12))
def test_no_policy_beats_belady(trace: Trace, slots: int) -> None:
    rates = hit_rates(trace, slots)
    assert max(rates.by_policy.values()) <= rates.belady


@given(trace=TRACES)
def test_with_room_for_all_every_policy_misses_each_expert_once(trace: Trace) -> None:
    distinct = len({(place, e) for step in trace.steps for place, experts in enumerate(step) for e in experts})
    expected = 1 - distinct / trace.accesses if trace.accesses else 0
    for make in POLICIES.values():
        assert replay(trace, 12, make(trace, 12)) == pytest.approx(expected)


def test_plain_lru_below_one_tokens_working_set_hits_nothing() -> None:
    steps = [[[0, 1] for _ in range(4)] for _ in range(5)]
    assert replay(Trace((0, 1, 2, 3), (4,) * 4, steps), 6, LeastRecentlyUsed()) == 0


def write(path: Path, *lines: str) -> Path:
    path.write_bytes(zstandard.compress("".join(line + "\n" for line in lines).encode()))
    return path


HEADER = '{"format":"streaming-experts routing trace","version":1,"layers":[0],"num_experts":[4]}'


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (("{}",), "line 1.format is missing"),
        ((HEADER.replace(":1", ":2"),), "line 1.version is 2, expected 1"),
        ((HEADER, "[[1],[2]]"), "line 2: is no list of 1 layers"),
        ((HEADER, "[[0]]", "[[4]]"), "line 3: expected lists of expert ids below 4"),
        ((HEADER, "[[0"), "line 2: is not valid JSON"),
        ((HEADER, "[[1,1]]"), "line 2: names an expert twice"),
        ((HEADER.replace("[0]", "[0,0]").replace("[4]", "[4,4]"),), "line 1.layers is .*, expected distinct numbers"),
    ],
)
def test_a_bad_trace_is_refused_with_its_line(lines: tuple[str, ...], message: str, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=message):
        read_trace(write(tmp_path / "trace", *lines))


def test_a_cut_or_missing_trace_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "trace", HEADER, *["[[1]]"] * 1000)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(FormatError, match="trace"):
        read_trace(path)
    with pytest.raises(StorageError, match="missing"):
        read_trace(tmp_path / "missing")


def test_a_trace_that_cannot_be_written_is_one_error(demo4: Path) -> None:
    with Engine.open(demo4, ram_bytes=PLENTY, trace="/dev/full") as engine:
        engine.generate_ids([1, 2], max_new_tokens=2)
        with pytest.raises(StorageError, match=r"^/dev/full: cannot be written \(No space left on device\)$"):
            engine.close()
