"""Positions by LongRoPE: the context of a run decides which factors they turn by, once, and users are told."""

from pathlib import Path

import numpy as np
import pytest

from formats.container import open_container
from repack.convert import convert, prepare
from repack.plan import Options
from repack.sources import open_local
from runtime import Engine
from runtime.plan import position_factors
from tests.fixtures.phimoe_tiny import CASES
from tests.fixtures.recipe import write_checkpoint
from tests.runtime.helpers import PLENTY, reference

ORIGINAL = 4096
LONGER = "positions turn by long_factor, as --ctx-size 4097 is beyond original_max_position_embeddings 4096"


@pytest.fixture(scope="module")
def phimoe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("phimoe")
    write_checkpoint(folder / "source", CASES["phimoe"].tensors(), CASES["phimoe"].config)
    convert(prepare(open_local(str(folder / "source")), Options(16, 64, 16)), folder / "out", hash_source=False)
    return folder / "out"


@pytest.mark.parametrize("backend", ["numpy", "native"])
def test_a_longer_context_turns_short_prompts_otherwise_and_says_so(phimoe: Path, backend: str) -> None:
    expected = reference("decoders/phimoe.npz")
    errors = {}
    for ctx_size in (64, ORIGINAL, ORIGINAL + 1):
        with Engine.open(phimoe, ram_bytes=PLENTY, backend=backend, ctx_size=ctx_size) as engine:
            logits = engine.logits(expected["prompt_ids"].tolist())
            assert any(warning.startswith(LONGER) for warning in engine.warnings) == (ctx_size > ORIGINAL)
        errors[ctx_size] = np.abs(logits - expected["logits"]).max()
    assert max(errors[64], errors[ORIGINAL]) < 5e-4
    assert errors[ORIGINAL + 1] > 0.1


def test_the_plan_says_which_factors_a_context_means(phimoe: Path) -> None:
    model = open_container(phimoe).index.layout.model
    within = position_factors(model, ORIGINAL)
    assert within == "short_factor, as --ctx-size 4096 is within original_max_position_embeddings 4096"
    assert f"positions turn by {position_factors(model, ORIGINAL + 1)}" == LONGER


def test_a_model_without_longrope_has_no_such_line(demo4: Path) -> None:
    assert position_factors(open_container(demo4).index.layout.model, 64) is None
