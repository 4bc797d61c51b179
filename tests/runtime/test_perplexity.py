"""Which predictions are scored, and that the measures are what their names say."""

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from formats.errors import FormatError, RequestError
from runtime import Engine
from runtime.perplexity import measure, windows
from tests.runtime.helpers import PLENTY, reference

IDS = reference("demo/reference.npz")["validation_first_ids"][:70].tolist()


def scored(count: int, window: int, stride: int) -> list[int]:
    """Positions whose token is predicted and scored, window after window."""
    return [target for ids, skip in windows(range(count), window, stride) for target in list(ids)[1 + skip :]]


@given(st.integers(2, 300), st.integers(2, 40), st.data())
def test_every_token_but_the_first_of_each_window_is_scored_once(count: int, window: int, data: st.DataObject) -> None:
    stride = data.draw(st.integers(1, window))
    firsts = range(0, count, window) if stride == window else [0]
    assert scored(count, window, stride) == [i for i in range(count) if i not in firsts]


@given(st.integers(2, 300), st.integers(2, 40), st.data())
def test_a_window_is_as_long_as_it_may_be(count: int, window: int, data: st.DataObject) -> None:
    stride = data.draw(st.integers(1, window))
    found = list(windows(range(count), window, stride))
    assert all(len(ids) == window for ids, _ in found[:-1])
    assert all(ids[0] == i * stride for i, (ids, _) in enumerate(found))
    assert all(0 <= skip < len(ids) - 1 for ids, skip in found)


@given(st.integers(2, 300), st.integers(2, 40), st.data())
def test_what_an_overlapping_window_scores_has_context_before_it(count: int, window: int, data: st.DataObject) -> None:
    stride = data.draw(st.integers(1, window - 1))
    for _, skip in list(windows(range(count), window, stride))[1:]:
        assert skip + 1 >= window - stride


def by_hand(engine: Engine, ids: list[int]) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """Log probabilities of every next token of one window."""
    logits = engine.logits(ids)[:-1].astype(np.float64)
    log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    return np.array([row[target] for row, target in zip(log_p, ids[1:], strict=True)])


def test_nll_is_the_mean_over_the_predictions_of_each_window(demo4: Path) -> None:
    with Engine.open(demo4, ram_bytes=PLENTY) as engine:
        found = measure(engine, IDS, window=32, stride=32)
        expected = np.concatenate([by_hand(engine, IDS[i : i + 32]) for i in (0, 32, 64)])
    assert found.tokens == len(expected) == 67
    assert found.nll == pytest.approx(-expected.mean(), rel=1e-12)  # the same logits, both in float64
    assert found.perplexity == pytest.approx(math.exp(-expected.mean()), rel=1e-12)


def test_an_overlapping_window_scores_only_what_is_new(demo4: Path) -> None:
    with Engine.open(demo4, ram_bytes=PLENTY) as engine:
        found = measure(engine, IDS[:48], window=32, stride=16)
        expected = np.concatenate([by_hand(engine, IDS[:32]), by_hand(engine, IDS[16:48])[15:]])
    assert found.tokens == len(expected) == 47
    assert found.nll == pytest.approx(-expected.mean(), rel=1e-12)


def test_divergence_is_that_of_this_from_the_reference(demo4: Path, demo16: Path) -> None:
    with Engine.open(demo4, ram_bytes=PLENTY) as engine, Engine.open(demo16, ram_bytes=PLENTY) as other:
        found = measure(engine, IDS, window=70, stride=70, reference=other)
        x, y = (e.logits(IDS)[:-1].astype(np.float64) for e in (engine, other))
        p, q = (np.exp(z) / np.exp(z).sum(axis=1, keepdims=True) for z in (x, y))
        kl = (q * np.log(q / p)).sum(axis=1)
        expected_nll = -by_hand(other, IDS).mean()
    assert found.kl_mean == pytest.approx(kl.mean(), rel=1e-9)
    assert found.kl_p99 == pytest.approx(np.percentile(kl, 99), rel=1e-9)
    assert found.top1_agreement == (x.argmax(axis=1) == y.argmax(axis=1)).mean()
    assert found.reference_perplexity == pytest.approx(math.exp(expected_nll), rel=1e-9)


@pytest.mark.parametrize("factor", [1e5, np.inf])
def test_logits_without_a_perplexity_are_one_line(demo4: Path, factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    with Engine.open(demo4, ram_bytes=PLENTY) as engine:
        absurd = engine.logits(IDS) * np.float32(factor)
        monkeypatch.setattr(engine, "logits_in_chunks", lambda ids: [absurd])
        with pytest.raises(FormatError, match=r"its logits give (\d\S+|nan) nats per token, which has no perplexity"):
            measure(engine, IDS, window=70, stride=70)


def test_the_reference_may_compute_in_other_chunks(demo4: Path) -> None:
    with (
        Engine.open(demo4, ram_bytes=PLENTY) as engine,
        Engine.open(demo4, ram_bytes=PLENTY, chunk_size=9) as other,
    ):
        found = measure(engine, IDS, window=70, stride=70, reference=other)
    assert found.kl_mean == pytest.approx(0, abs=1e-6)  # the same model, logits within 1e-4
    assert found.top1_agreement == 1


def test_progress_is_told_of_every_scored_token(demo4: Path) -> None:
    told: list[int] = []
    with Engine.open(demo4, ram_bytes=PLENTY) as engine:
        found = measure(engine, IDS, window=32, stride=20, progress=told.append)
    assert sum(told) == found.tokens


def test_a_text_of_one_token_is_refused(demo4: Path) -> None:
    with Engine.open(demo4, ram_bytes=PLENTY) as engine, pytest.raises(RequestError, match="has 1 tokens"):
        measure(engine, IDS[:1], window=32, stride=32)
