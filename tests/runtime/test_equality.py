"""What never changes a bit of the result: memory, threads, readers, the state of the cache, the order of arrival."""

import random
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from formats.dtypes import AnyArray, Float32
from runtime import Engine
from runtime.cache import Held
from runtime.experts import Experts
from tests.runtime.helpers import PLENTY, floor_bytes, reference

CHUNK = 16  # of a prompt of 40 tokens: three chunks, the last one shorter
GREEDY = 3
DEFAULTS: dict[str, Any] = {"ram_bytes": PLENTY, "chunk_size": CHUNK}
Result = tuple[Float32, list[int]]


@pytest.fixture(scope="module", params=["demo4", "demo16"])
def container(request: pytest.FixtureRequest) -> Path:
    return Path(request.getfixturevalue(request.param))


def result(engine: Engine) -> Result:
    """Logits of the whole prompt and the greedy ids after it."""
    prompt = reference("demo/reference.npz")["prompt_ids"][:40].tolist()
    return engine.logits(prompt), engine.generate_ids(prompt, max_new_tokens=GREEDY, ignore_eos=True)


@pytest.fixture(scope="module", params=["numpy", "native"])
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def run(container: Path, **options: Any) -> Result:
    with Engine.open(container, **(DEFAULTS | options)) as engine:
        return result(engine)


def equal(a: Result, b: Result) -> bool:
    return np.array_equal(a[0], b[0]) and a[1] == b[1]


@pytest.fixture(scope="module")
def expected(container: Path, backend: str) -> Result:
    """With everything in the cache, one thread and one reader."""
    return run(container, threads=1, readers=1, backend=backend)


@pytest.mark.parametrize("spare", [0, 1 << 19, 1 << 22, 1 << 24])
def test_the_budget_changes_nothing(container: Path, expected: Result, backend: str, spare: int) -> None:
    floor = floor_bytes(container, chunk_size=CHUNK, backend=backend)
    assert equal(run(container, ram_bytes=floor + spare, backend=backend), expected)


@pytest.mark.parametrize("readers", [2, 8])
def test_the_number_of_readers_changes_nothing(container: Path, expected: Result, backend: str, readers: int) -> None:
    assert equal(run(container, readers=readers, backend=backend), expected)


@pytest.mark.parametrize("threads", [2, 3, 8])
def test_the_number_of_threads_changes_nothing(container: Path, expected: Result, backend: str, threads: int) -> None:
    assert equal(run(container, threads=threads, backend=backend), expected)


def test_a_warm_cache_changes_nothing(container: Path, expected: Result, backend: str) -> None:
    with Engine.open(container, **DEFAULTS, backend=backend) as engine:
        result(engine)
        misses = engine.stats.cache_misses
        assert equal(result(engine), expected)
        assert engine.stats.cache_misses == misses


def test_what_another_sequence_left_in_a_small_cache_changes_nothing(
    container: Path, expected: Result, backend: str
) -> None:
    floor = floor_bytes(container, chunk_size=CHUNK, backend=backend)
    with Engine.open(container, **(DEFAULTS | {"ram_bytes": floor, "backend": backend})) as engine:
        engine.logits(list(range(100, 140)))
        assert equal(result(engine), expected)


@pytest.mark.parametrize("order", ["reversed", "shuffled"])
def test_the_order_of_arrival_changes_nothing(
    container: Path, expected: Result, backend: str, order: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    get, waves, rng = Experts.get, Experts.waves, random.Random(0)

    def reorder(items: list[Any]) -> list[Any]:
        items.reverse() if order == "reversed" else rng.shuffle(items)
        return items

    def records(self: Experts, layer: int, expert_ids: Sequence[int]) -> Generator[tuple[int, AnyArray], None, None]:
        yield from reorder([(expert, record.copy()) for expert, record in get(self, layer, expert_ids)])

    def held(self: Experts, layer: int, expert_ids: Sequence[int]) -> Generator[list[Held], None, None]:
        for wave in waves(self, layer, expert_ids):
            yield reorder(list(wave))

    monkeypatch.setattr(Experts, "get", records)  # as NumPy takes them
    monkeypatch.setattr(Experts, "waves", held)  # as the kernels do
    assert equal(run(container, backend=backend), expected)


def test_reading_through_the_page_cache_changes_nothing(
    container: Path, expected: Result, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("runtime.store.proves_direct", lambda file: False)
    assert equal(run(container, backend=backend), expected)
