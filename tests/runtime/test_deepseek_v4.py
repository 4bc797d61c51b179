"""What DeepSeek-V4 remembers of a sequence: nothing of it hangs on how a sequence came, and all of it is counted.

Its logits are compared with transformers in test_decoders.py.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from formats.dtypes import Float32
from formats.errors import FormatError, StorageError
from repack.convert import convert, prepare
from repack.plan import Options
from repack.sources import open_local
from runtime import Engine
from runtime.backends.numpy_ops import NumpyOps
from tests.fixtures.deepseek_v4_tiny import CASES
from tests.fixtures.recipe import Stored, write_checkpoint
from tests.runtime.helpers import PLENTY, reference

NAME = "deepseek_v4"
LONG = 3000  # tokens: windows forget, and there are several blocks of entries
PROMPT = reference(f"decoders/{NAME}.npz")["prompt_ids"].tolist()


@pytest.fixture(scope="module")
def container(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(NAME)
    case = CASES[NAME]
    write_checkpoint(folder / "source", case.tensors(), case.config | {"max_position_embeddings": 2 * LONG})
    convert(prepare(open_local(str(folder / "source")), Options(16, 64, 16)), folder / "out", hash_source=False)
    return folder / "out"


@pytest.fixture(params=["numpy", "native"])
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def opened(container: Path, backend: str, **options: Any) -> Engine:
    return Engine.open(container, ram_bytes=PLENTY, backend=backend, **options)


@pytest.mark.parametrize("layer", [1, 4])
def test_a_step_that_fails_leaves_the_sessions_as_they_were(
    container: Path, backend: str, layer: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened(container, backend) as engine:
        expected = engine.logits(PROMPT)[-1]
        sessions = [engine.new_session(), engine.new_session()]
        engine.step([(session, PROMPT[:-13]) for session in sessions])
        experts = type(engine.ops).experts

        def fails(self: NumpyOps, at: int, *args: Any) -> Float32:
            if at == layer:
                raise StorageError("the experts")
            return experts(self, at, *args)

        with monkeypatch.context() as patch:
            patch.setattr(type(engine.ops), "experts", fails)
            for ids in (PROMPT[-13:], [7], [3, 1, 4, 1, 5, 9, 2, 6]):
                with pytest.raises(StorageError):
                    engine.step([(session, ids) for session in sessions])
        for session in sessions:
            (found,) = engine.step([(session, PROMPT[-13:])])
            assert np.abs(found - expected).max() < 1e-4


def test_sessions_that_share_a_step_are_as_alone(container: Path, backend: str) -> None:
    with opened(container, backend) as engine:
        alone = [engine.logits(PROMPT[:n])[-1] for n in (9, 30, 48)]
        sessions = [engine.new_session() for _ in alone]
        engine.step([(session, PROMPT[:n]) for session, n in zip(sessions, (2, 7, 31), strict=True)])
        found = engine.step(
            [(session, PROMPT[a:b]) for session, a, b in zip(sessions, (2, 7, 31), (9, 30, 48), strict=True)]
        )
    for one, other in zip(found, alone, strict=True):
        assert np.array_equal(one, other) if backend == "native" else np.abs(one - other).max() < 1e-4


def test_no_chunk_size_changes_a_bit_of_a_long_sequence(container: Path) -> None:
    ids = np.random.default_rng(0).integers(0, 256, LONG).tolist()
    found = []
    for chunk_size, threads in ((LONG, 2), (517, 1), (64, 2)):
        with opened(container, "native", ctx_size=LONG, chunk_size=chunk_size, threads=threads) as engine:
            session = engine.new_session()
            logits = engine.prefill(session, ids[:-1])
            found.append(np.stack([logits, *engine.step([(session, ids[-1:])])]))
            forgot = [state.cache.first for state in session.states]
    assert min(forgot) > 0
    assert all(np.array_equal(logits, found[0]) for logits in found)
    with opened(container, "numpy", ctx_size=LONG, chunk_size=1000) as engine:
        assert np.abs(engine.prefill(engine.new_session(), ids) - found[0][1]).max() < 1e-3


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([2, 8, 1], r"holds 8 \(.*row 5, column 1\), expected distinct experts from 0 to 7 in a row"),
        ([-1, 0, 1], r"holds -1 \(.*row 5, column 0\)"),
        ([4, 2, 4], r"holds 4 \(.*row 5, column 2\)"),
    ],
)
def test_a_table_that_chooses_no_experts_is_not_converted(tmp_path: Path, row: list[int], message: str) -> None:
    tensors = CASES[NAME].tensors()
    name = "layers.1.ffn.gate.tid2eid"
    table = tensors[name].data.copy()
    table[5] = row
    tensors[name] = tensors[name]._replace(data=table)
    write_checkpoint(tmp_path / "source", tensors, CASES[NAME].config)
    conversion = prepare(open_local(str(tmp_path / "source")), Options(16, 64, 16))
    with pytest.raises(FormatError, match=f"{name} {message}"):
        convert(conversion, tmp_path / "out", hash_source=False)


@pytest.mark.parametrize("dtype", ["I32", "F32"])
def test_a_table_of_experts_holds_whole_numbers(tmp_path: Path, dtype: str) -> None:
    tensors = CASES[NAME].tensors()
    for name in [name for name in tensors if name.endswith("tid2eid")]:
        data = tensors[name].data.astype("<i4" if dtype == "I32" else "<f4")
        tensors[name] = Stored(dtype, data.shape, data)
    write_checkpoint(tmp_path / "source", tensors, CASES[NAME].config)
    if dtype == "F32":
        with pytest.raises(FormatError, match="tid2eid has dtype F32, expected I32 or I64"):
            prepare(open_local(str(tmp_path / "source")), Options(16, 64, 16))
        return
    convert(prepare(open_local(str(tmp_path / "source")), Options(16, 64, 16)), tmp_path / "out", hash_source=False)
    expected = reference(f"decoders/{NAME}.npz")
    with opened(tmp_path / "out", "numpy") as engine:
        assert np.abs(engine.logits(PROMPT) - expected["logits"]).max() < 5e-4
