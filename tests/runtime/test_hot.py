"""A warm start: what was used most is there from the beginning, and no result changes."""

import json
from pathlib import Path

import pytest

from formats.container import open_container
from formats.errors import FormatError
from runtime import Engine
from runtime.cache import ExpertKey
from runtime.hot import hot_path, load_hot, save_hot
from tests.runtime.helpers import PLENTY

PROMPT = list(range(100, 130))


def test_a_list_is_read_as_it_was_written(demo4: Path, tmp_path: Path) -> None:
    uses = [(ExpertKey(7, 39), 3.5), (ExpertKey(0, 0), 1.25)]
    save_hot(tmp_path / "list", uses)
    assert load_hot(tmp_path / "list", open_container(demo4).index.layout) == uses


@pytest.mark.parametrize("backend", ["numpy", "auto"])
def test_a_second_run_finds_its_experts_and_gives_the_same_ids(own4: Path, backend: str) -> None:
    with Engine.open(own4, ram_bytes=PLENTY, backend=backend, hot=True, lookahead="off") as engine:
        expected = engine.generate_ids(PROMPT, max_new_tokens=8, ignore_eos=True)
        assert (engine.stats.hot_loaded, engine.stats.hit_rate < 1) == (0, True)
        used = engine.stats.cache_misses
    assert hot_path(own4).parent == own4.parent
    with Engine.open(own4, ram_bytes=PLENTY, backend=backend, hot=True) as engine:
        assert engine.stats.hot_loaded == used
        assert engine.generate_ids(PROMPT, max_new_tokens=8, ignore_eos=True) == expected
        assert engine.stats.hit_rate == 1


def test_with_few_slots_the_hottest_are_loaded(own4: Path) -> None:
    with Engine.open(own4, ram_bytes=PLENTY) as engine:
        floor = engine.terms.floor_bytes
    save_hot(hot_path(own4), [(ExpertKey(3, expert), 40.0 - expert) for expert in range(40)])
    with Engine.open(own4, ram_bytes=floor, hot=True) as engine:
        assert engine.stats.hot_loaded == engine.stats.slots == 2
        assert [engine.experts.cache.holds(ExpertKey(3, expert)) for expert in range(3)] == [True, True, False]


def test_it_is_off_unless_asked_for(own4: Path) -> None:
    with Engine.open(own4, ram_bytes=PLENTY) as engine:
        engine.logits(PROMPT)
    assert not hot_path(own4).exists()


@pytest.mark.parametrize(
    ("experts", "message"),
    [
        ([[0, 40, 1]], r"experts holds \[0, 40, 1\]"),
        ([[9, 0, 1]], "of this model"),
        ([3], "holds 3"),
        ([[0, 1, 2], [0, 1, 1]], "names one twice"),
        ({}, "experts is {}, expected a list"),
    ],
)
def test_a_list_of_another_model_is_refused_by_its_name(own4: Path, experts: object, message: str) -> None:
    content = {"format": "streaming-experts hot experts", "version": 1, "experts": experts}
    hot_path(own4).write_text(json.dumps(content))
    with pytest.raises(FormatError, match=rf"own\.hot\.json: .*{message}"):
        Engine.open(own4, ram_bytes=PLENTY, hot=True)


@pytest.mark.parametrize("content", ["", "{", '{"format": "another"}', '{"experts": [[0, 40, 1]]}'])
def test_a_broken_list_says_how_to_get_on(own4: Path, content: str) -> None:
    hot_path(own4).write_text(content)
    with pytest.raises(FormatError, match=r"own\.hot\.json: .*; delete the file, or run without --hot$"):
        Engine.open(own4, ram_bytes=PLENTY, hot=True)
