"""`stream-run plan`: terms, floor and recommendation, from the same arithmetic that a run refuses by."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from formats.budget import memory_terms
from formats.container import open_container
from runtime import Engine
from runtime.plan import memory_plan, plan_text
from tests.runtime.helpers import STREAM_RUN


def planned(out: Path, granted: int) -> dict[str, Any]:
    layout = open_container(out).index.layout
    return memory_plan(layout, memory_terms(layout, tokenizer_json_bytes=0, ctx_size=128, chunk_size=64), granted)


def test_no_more_is_recommended_than_all_experts_need(demo4: Path) -> None:
    plan = planned(demo4, 1 << 40)
    assert plan["recommended_ram_bytes"] == plan["all_experts_bytes"] < 1 << 30
    assert plan["slots"] == plan["experts"] == 320


def test_no_more_is_recommended_than_is_granted(demo4: Path) -> None:
    granted = planned(demo4, 0)["floor_bytes"] + (5 << 20)
    plan = planned(demo4, granted)
    assert plan["recommended_ram_bytes"] == granted
    assert 2 < plan["slots"] < 320


def test_what_does_not_fit_is_said_to(demo4: Path) -> None:
    plan = planned(demo4, 1 << 20)
    assert not plan["fits"]
    assert plan["recommended_ram_bytes"] == plan["floor_bytes"]
    assert "does not fit here" in plan_text(plan)


@pytest.mark.parametrize("as_json", [True, False])
def test_the_command_prints_every_term_and_a_ceiling_that_a_run_accepts(demo4: Path, as_json: bool) -> None:
    words = [*STREAM_RUN, "plan", str(demo4), "-t", "2", *(["--json"] if as_json else [])]
    done = subprocess.run(words, capture_output=True, text=True, check=True, timeout=60)
    if not as_json:
        assert [line.split()[0] for line in done.stdout.splitlines()[:3]] == ["base", "tokenizer", "resident"]
        return
    plan = json.loads(done.stdout)
    assert sum(plan["terms"].values()) == plan["floor_bytes"]
    with Engine.open(demo4, ram_bytes=plan["recommended_ram_bytes"], threads=2) as engine:
        assert engine.stats.slots == plan["slots"]
        assert engine.terms.floor_bytes == plan["floor_bytes"]
