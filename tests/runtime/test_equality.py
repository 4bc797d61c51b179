"""What never changes a bit of the result: memory, threads, readers, the state of the cache, the order of arrival."""

import random
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from formats.dtypes import AnyArray, Float32
from runtime import Engine
from runtime.experts import Experts
from tests.runtime.helpers import PLENTY, floor_bytes, reference

CHUNK = 16  # of a prompt of 40 tokens: three chunks, the last one shorter
GREEDY = 3
DEFAULTS: dict[str, Any] = {"ram_bytes": PLENTY, "chunk_size": CHUNK, "backend": "numpy"}
Result = tuple[Float32, list[int]]


@pytest.fixture(scope="module", params=["demo4", "demo16"])
def container(request: pytest.FixtureRequest) -> Path:
    return Path(request.getfixturevalue(request.param))


def result(engine: Engine) -> Result:
    """Logits of the whole prompt and the greedy ids after it."""
    prompt = reference("demo/reference.npz")["prompt_ids"][:40].tolist()
    return engine.logits(prompt), engine.generate_ids(prompt, max_new_tokens=GREEDY, ignore_eos=True)


def run(container: Path, **options: Any) -> Result:
    with Engine.open(container, **(DEFAULTS | options)) as engine:
        return result(engine)


def equal(a: Result, b: Result) -> bool:
    return np.array_equal(a[0], b[0]) and a[1] == b[1]


@pytest.fixture(scope="module")
def expected(container: Path) -> Result:
    """With everything in the cache, one thread and one reader."""
    return run(container, threads=1, readers=1)


@pytest.mark.parametrize("spare", [0, 1 << 19, 1 << 22, 1 << 24])
def test_the_budget_changes_nothing(container: Path, expected: Result, spare: int) -> None:
    floor = floor_bytes(container, chunk_size=CHUNK)
    assert equal(run(container, ram_bytes=floor + spare), expected)


@pytest.mark.parametrize("readers", [2, 8])
def test_the_number_of_readers_changes_nothing(container: Path, expected: Result, readers: int) -> None:
    assert equal(run(container, readers=readers), expected)


@pytest.mark.parametrize("threads", [2, 3, 8])
def test_the_number_of_threads_changes_nothing(container: Path, expected: Result, threads: int) -> None:
    assert equal(run(container, threads=threads), expected)


def test_a_warm_cache_changes_nothing(container: Path, expected: Result) -> None:
    with Engine.open(container, **DEFAULTS) as engine:
        result(engine)
        misses = engine.stats.cache_misses
        assert equal(result(engine), expected)
        assert engine.stats.cache_misses == misses


def test_what_another_sequence_left_in_a_small_cache_changes_nothing(container: Path, expected: Result) -> None:
    floor = floor_bytes(container, chunk_size=CHUNK)
    with Engine.open(container, **(DEFAULTS | {"ram_bytes": floor})) as engine:
        engine.logits(list(range(100, 140)))
        assert equal(result(engine), expected)


@pytest.mark.parametrize("order", ["reversed", "shuffled"])
def test_the_order_of_arrival_changes_nothing(
    container: Path, expected: Result, order: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    get, rng = Experts.get, random.Random(0)

    def reordered(self: Experts, layer: int, expert_ids: Sequence[int]) -> Generator[tuple[int, AnyArray], None, None]:
        records = [(expert, record.copy()) for expert, record in get(self, layer, expert_ids)]
        records.reverse() if order == "reversed" else rng.shuffle(records)
        yield from records

    monkeypatch.setattr(Experts, "get", reordered)
    assert equal(run(container), expected)


def test_reading_through_the_page_cache_changes_nothing(
    container: Path, expected: Result, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("runtime.store.proves_direct", lambda file: False)
    assert equal(run(container), expected)
