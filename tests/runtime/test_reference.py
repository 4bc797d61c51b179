"""The numbers of transformers: logits, greedy ids, routing and losses, however the tokens are cut into steps."""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from formats.dtypes import AnyArray, Float32
from runtime import Engine
from runtime.backends.native import levels
from runtime.backends.native_ops import NativeOps
from runtime.backends.numpy_ops import NumpyOps
from runtime.engine import BACKENDS
from runtime.perplexity import measure
from tests.runtime.helpers import FIXTURES, PLENTY, reference

# float32 sums in another order: measured 2e-5 on the demo, 4e-5 on the tiny model. Logits have
# a standard deviation of 2 to 3, so anything but rounding shows at once.
LOGITS_TOLERANCE = 1e-4
# The same arithmetic with other numbers of rows in each product: measured 4e-5.
STEPS_TOLERANCE = 1e-4

TINY = ("fused16", "per_expert16")


@pytest.fixture(params=TINY)
def tiny(request: pytest.FixtureRequest) -> Path:
    return Path(request.getfixturevalue(request.param))


@pytest.fixture(params=[name for name in BACKENDS if name != "native" or levels()])
def open_engine(request: pytest.FixtureRequest) -> Callable[..., Engine]:
    """Engine.open with each backend; the native one in its exact precision."""
    return partial(Engine.open, ram_bytes=PLENTY, backend=request.param, precision="exact")


def close(found: Float32, expected: Float32, tolerance: float) -> bool:
    return found.shape == expected.shape and float(np.abs(found - expected).max()) <= tolerance


# ---- another implementation


def test_the_logits_of_the_demo_are_those_of_transformers(demo16: Path, open_engine: Callable[..., Engine]) -> None:
    expected = reference("demo/reference.npz")
    with open_engine(demo16) as engine:
        found = engine.logits(expected["prompt_ids"].tolist())
    assert found.dtype == np.float32
    assert close(found, expected["logits"], LOGITS_TOLERANCE)


def test_the_demo_continues_greedily_as_transformers_does(demo16: Path, open_engine: Callable[..., Engine]) -> None:
    expected = reference("demo/reference.npz")
    with open_engine(demo16) as engine:
        found = engine.generate_ids(expected["prompt_ids"].tolist(), max_new_tokens=32, ignore_eos=True)
    assert found == expected["greedy_ids"].tolist()


@pytest.mark.parametrize("windows", [[0, 1, 2], [39]], ids=["whole windows", "the short last one"])
def test_the_losses_of_windows_of_held_out_text_are_those_of_transformers(
    demo16: Path, windows: list[int], open_engine: Callable[..., Engine]
) -> None:
    expected = reference("demo/reference.npz")
    text = (FIXTURES / "demo" / "validation.txt").read_text(encoding="utf-8")
    with open_engine(demo16) as engine:
        ids = engine.text.encode(text[:120_000])[:20_000]
        assert ids[:512] == expected["validation_first_ids"].tolist()
        for i in windows:
            quality = measure(engine, ids[512 * i : 512 * (i + 1)], window=512, stride=512)
            assert quality.tokens == expected["nll_window_counts"][i]
            # 511 predictions, each off by less than 1e-4 and not all to the same side: measured 4e-4 at most
            assert quality.nll * quality.tokens == pytest.approx(expected["nll_window_sums"][i], abs=0.01)


def test_the_logits_of_the_tiny_model_are_those_of_transformers(tiny: Path, open_engine: Callable[..., Engine]) -> None:
    expected = reference("reference.npz")
    with open_engine(tiny) as engine:
        found = engine.logits(expected["prompt_ids"].tolist())
    assert close(found, expected["logits"], LOGITS_TOLERANCE)


def test_the_tiny_model_continues_greedily_as_transformers_does(tiny: Path, open_engine: Callable[..., Engine]) -> None:
    expected = reference("reference.npz")
    with open_engine(tiny) as engine:
        found = engine.generate_ids(expected["prompt_ids"].tolist(), max_new_tokens=16, ignore_eos=True)
    assert found == expected["greedy_ids"].tolist()


@pytest.fixture
def routed(tiny: Path, monkeypatch: pytest.MonkeyPatch, open_engine: Callable[..., Engine]) -> tuple[AnyArray, Float32]:
    """Expert ids and routing weights [layers, T, top_k] of the tiny model on its prompt."""
    seen: list[tuple[AnyArray, Float32]] = []

    def watch(ops: type[NumpyOps]) -> None:
        experts = ops.experts

        def watched(self: NumpyOps, layer: int, x: Float32, expert_ids: AnyArray, weights: Float32) -> Float32:
            seen.append((expert_ids, weights))
            return experts(self, layer, x, expert_ids, weights)

        monkeypatch.setattr(ops, "experts", watched)

    watch(NumpyOps)
    watch(NativeOps)
    with open_engine(tiny) as engine:
        engine.logits(reference("reference.npz")["prompt_ids"].tolist())
    ids, weights = zip(*seen, strict=True)
    return np.stack(ids), np.stack(weights)


def test_tokens_go_to_the_experts_of_transformers_in_its_order(routed: tuple[AnyArray, Float32]) -> None:
    assert np.array_equal(routed[0], reference("reference.npz")["expert_ids"])


def test_the_routing_weights_are_those_of_transformers(routed: tuple[AnyArray, Float32]) -> None:
    expected = reference("reference.npz")["routing_weights"]
    assert close(routed[1], expected, 1e-5)  # probabilities: a router logit off by 1e-5 moves them by less


# ---- one sequence, cut into steps in many ways

CUTS: dict[str, Sequence[int]] = {
    "one by one": range(65),
    "threes": range(0, 67, 3),
    "sevens": range(0, 71, 7),
    "sixteens": range(0, 65, 16),
    "a prompt, then one by one": [0, *range(40, 65)],
}


@pytest.mark.parametrize("cuts", CUTS.values(), ids=CUTS.keys())
def test_every_cut_into_steps_gives_the_logits_of_the_whole(
    demo16: Path, cuts: Sequence[int], open_engine: Callable[..., Engine]
) -> None:
    expected = reference("demo/reference.npz")
    ids = expected["prompt_ids"].tolist()
    with open_engine(demo16) as engine:
        session = engine.new_session()
        for start, stop in pairwise(min(cut, len(ids)) for cut in cuts):
            if start < stop:
                (logits,) = engine.step([(session, ids[start:stop])])
                assert close(logits, expected["logits"][stop - 1], STEPS_TOLERANCE)
        assert session.token_ids == ids


@pytest.mark.parametrize("chunk_size", [1, 3, 7, 16, 64])
def test_every_chunk_size_gives_the_logits_of_the_whole(
    tiny: Path, chunk_size: int, open_engine: Callable[..., Engine]
) -> None:
    expected = reference("reference.npz")
    with open_engine(tiny, chunk_size=chunk_size) as engine:
        found = engine.logits(expected["prompt_ids"].tolist())
    assert close(found, expected["logits"], STEPS_TOLERANCE)


def test_a_prompt_longer_than_a_chunk_ends_in_the_same_logits(demo16: Path, open_engine: Callable[..., Engine]) -> None:
    ids = reference("demo/reference.npz")["validation_first_ids"].tolist()
    with open_engine(demo16) as whole, open_engine(demo16, chunk_size=100) as cut:
        assert close(cut.prefill(cut.new_session(), ids), whole.prefill(whole.new_session(), ids), STEPS_TOLERANCE)


# ---- several sequences at once


def test_sessions_stepped_together_equal_each_alone(demo16: Path, open_engine: Callable[..., Engine]) -> None:
    ids = reference("demo/reference.npz")["prompt_ids"].tolist()
    first_ids, next_ids = [ids[:30], ids[7:20], ids[40:41]], [ids[30:33], ids[20:21], ids[41:60]]
    with open_engine(demo16) as engine:
        alone = []
        for first, following in zip(first_ids, next_ids, strict=True):
            session = engine.new_session()
            alone.append([engine.step([(session, first)])[0], engine.step([(session, following)])[0]])
        sessions = [engine.new_session() for _ in first_ids]
        together = [engine.step(list(zip(sessions, batch, strict=True))) for batch in (first_ids, next_ids)]
    for i, expected in enumerate(alone):
        assert all(close(together[step][i], expected[step], STEPS_TOLERANCE) for step in (0, 1))


def test_sessions_stepped_together_share_each_read_of_an_expert(
    demo16: Path, open_engine: Callable[..., Engine]
) -> None:
    ids = reference("demo/reference.npz")["prompt_ids"].tolist()
    with open_engine(demo16) as engine:
        engine.step([(engine.new_session(), ids) for _ in range(3)])
        together = engine.stats.cache_misses + engine.stats.cache_hits
    with open_engine(demo16) as engine:
        engine.step([(engine.new_session(), ids)])
        assert engine.stats.cache_misses + engine.stats.cache_hits == together


def test_sessions_can_take_turns(tiny: Path, open_engine: Callable[..., Engine]) -> None:
    expected = reference("reference.npz")
    ids = expected["prompt_ids"].tolist()
    with open_engine(tiny) as engine:
        a, b = engine.new_session(), engine.new_session()
        engine.step([(a, ids[:10])])
        engine.step([(b, ids[5:20])])
        (logits,) = engine.step([(a, ids[10:20])])
    assert close(logits, expected["logits"][19], STEPS_TOLERANCE)
