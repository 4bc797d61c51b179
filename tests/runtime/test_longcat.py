"""LongCat-Flash: experts that give back what they read, and the tensors of its checkpoint."""

import json
from pathlib import Path

import numpy as np
import pytest

from formats.config import read_config
from repack.convert import convert, prepare
from repack.plan import Options
from repack.published import published_tensors
from repack.sources import open_local
from runtime import Engine
from tests.fixtures.longcat_tiny import CASES
from tests.fixtures.recipe import write_checkpoint
from tests.runtime.helpers import PLENTY

REAL = 8  # experts of a layer


@pytest.fixture(scope="module")
def container(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("longcat")
    write_checkpoint(folder / "source", CASES["longcat_flash"].tensors(), CASES["longcat_flash"].config)
    convert(prepare(open_local(str(folder / "source")), Options(16, 64, 16)), folder / "out", hash_source=False)
    return folder / "out"


@pytest.mark.parametrize("backend", ["numpy", "native"])
@pytest.mark.parametrize("ids", [[[3, 9, 0]], [[10, 11, 12]], [[3, 9, 0], [13, 12, 11], [1, 2, 3]], [[8, 9, 10]] * 2])
def test_ids_behind_the_experts_give_back_what_they_read(container: Path, backend: str, ids: list[list[int]]) -> None:
    """As many real experts by token as there are, none at all included; only those are read."""
    rng = np.random.default_rng(0)
    expert_ids = np.array(ids)
    x = rng.standard_normal((len(ids), 64), np.float32)
    weights = rng.random(expert_ids.shape, np.float32)
    alone = np.zeros_like(x)
    with Engine.open(container, ram_bytes=PLENTY, backend=backend, precision="exact") as engine:
        found = engine.ops.experts(0, x, expert_ids, weights)
        asked = engine.experts.cache.hits + engine.experts.cache.misses
        for token, chosen in enumerate(ids):
            for place, expert in enumerate(chosen):
                one = x[token : token + 1]
                if expert < REAL:
                    one = engine.ops.experts(0, one, np.array([[expert]]), np.ones((1, 1), np.float32))
                alone[token] += weights[token, place] * one[0]
    assert found == pytest.approx(alone, abs=1e-5)
    assert asked == len({expert for chosen in ids for expert in chosen if expert < REAL})


def test_a_config_alone_tells_the_tensors_of_the_checkpoint() -> None:
    case = CASES["longcat_flash"]
    told = {
        tensor.name: tensor.shape for tensor in published_tensors(read_config(json.dumps(case.config).encode()), None)
    }
    stored = {name: tensor.shape for name, tensor in case.tensors().items()}
    assert told == {name: shape for name, shape in stored.items() if not name.startswith("model.mtp.")}
