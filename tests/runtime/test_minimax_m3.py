"""MiniMax-M3: which blocks its indexer chooses, by definition, and the tensors of its checkpoint."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from formats.config import read_config
from formats.dtypes import Float32
from repack.convert import convert, prepare
from repack.plan import Options
from repack.published import published_tensors
from repack.sources import open_local
from runtime import Engine
from tests.fixtures.minimax_m3_tiny import CASES
from tests.fixtures.recipe import write_checkpoint
from tests.runtime.helpers import PLENTY

BLOCK, TOP_K, LOCAL = 4, 5, 2


@pytest.fixture(scope="module")
def container(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("minimax_m3")
    write_checkpoint(folder / "source", CASES["minimax_m3"].tensors(), CASES["minimax_m3"].config)
    convert(prepare(open_local(str(folder / "source")), Options(16, 64, 16)), folder / "out", hash_source=False)
    return folder / "out"


def chosen_by_definition(q: Float32, keys: Float32, head: int) -> list[set[int]]:
    """Tokens of the blocks that a head of q [T, H, d] chooses for each token, keys [T, d]; in float64."""
    result = []
    for i, token in enumerate(q[:, head].astype(np.float64)):
        scores = keys[: i + 1].astype(np.float64) @ token
        own = i // BLOCK
        best = {b: scores[b * BLOCK : (b + 1) * BLOCK].max() for b in range(own + 1)}
        best |= dict.fromkeys(range(max(0, own - LOCAL + 1), own + 1), np.inf)
        blocks = sorted(best, key=lambda b: -best[b])[:TOP_K]
        result.append({t for b in blocks for t in range(b * BLOCK, (b + 1) * BLOCK) if t <= i})
    return result


@pytest.mark.parametrize("backend", ["numpy", "native"])
@pytest.mark.parametrize("steps", [[50], [1] * 50, [3, 30, 17]])
def test_blocks_are_chosen_as_defined_however_a_sequence_is_cut(
    container: Path, backend: str, steps: Sequence[int]
) -> None:
    rng = np.random.default_rng(0)
    q, keys = rng.standard_normal((50, 3, 8), np.float32), rng.standard_normal((50, 8), np.float32)
    with Engine.open(container, ram_bytes=PLENTY, backend=backend) as engine:
        cache, position = engine.ops.new_index_cache(8), 0
        found: list[list[set[int]]] = [[], [], []]
        for tokens in steps:
            rows = slice(position, position + tokens)
            chosen, cache = engine.ops.select_blocks(q[rows], keys[rows], cache, BLOCK, TOP_K, LOCAL)
            for head in range(3):
                selection = engine.ops.block_tokens(chosen[head], position, BLOCK)
                seen = [row[: position + i + 1] for i, row in enumerate(selection)]  # the rest attention hides itself
                found[head] += [{int(t) for t in np.flatnonzero(row)} for row in seen]
            position += tokens
    assert found == [chosen_by_definition(q, keys, head) for head in range(3)]


def test_a_config_alone_tells_the_tensors_of_the_checkpoint() -> None:
    case = CASES["minimax_m3"]
    told = {
        tensor.name: tensor.shape for tensor in published_tensors(read_config(json.dumps(case.config).encode()), None)
    }
    stored = {name: tensor.shape for name, tensor in case.tensors().items()}
    assert told == {name: shape for name, shape in stored.items() if not name.startswith("vision_tower.")}
