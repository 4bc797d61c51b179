"""Mistral Large 4, GLM-5.3-Flash, Hunyuan 4: sequences that share steps, what layers remember, published tensors."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from formats.config import read_config
from formats.errors import FormatError
from formats.quantization import read_quantization
from repack.convert import convert, prepare
from repack.plan import Options
from repack.published import published_tensors
from repack.sources import open_local
from runtime import Engine
from tests.fixtures import glm5_next_tiny, hy_v4_tiny, mistral_large4_tiny
from tests.fixtures.recipe import write_checkpoint
from tests.fixtures.stored import as_bf16
from tests.runtime.helpers import PLENTY

CASES: dict[str, Any] = {**mistral_large4_tiny.CASES, **glm5_next_tiny.CASES, **hy_v4_tiny.CASES}
STRANGERS = ("vision_encoder.", "pre_mm_projector_norm.", "mtp_dspark.", *hy_v4_tiny.BESIDE)


@pytest.fixture(scope="module", params=CASES)
def container(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, case = tmp_path_factory.mktemp(request.param), CASES[request.param]
    write_checkpoint(folder / "source", case.tensors(), case.config)
    convert(prepare(open_local(str(folder / "source")), Options(16, 64, 16)), folder / "out", hash_source=False)
    return folder / "out"


def test_sequences_that_share_steps_give_what_each_gives_alone(container: Path) -> None:
    prompts = [[(7 * i + 3 * s) % 256 for i in range(length)] for s, length in enumerate((29, 5, 17))]
    with Engine.open(container, ram_bytes=PLENTY, backend="native") as engine:
        alone = [engine.new_session() for _ in prompts]
        together = [engine.new_session() for _ in prompts]
        for cut in (slice(0, 3), slice(3, 4), slice(4, None)):
            apart = [engine.steps.step([(session, ids[cut])])[0] for session, ids in zip(alone, prompts, strict=True)]
            at_once = engine.steps.step([(session, ids[cut]) for session, ids in zip(together, prompts, strict=True)])
            assert np.array_equal(np.stack(apart), at_once)


def test_layers_that_share_latents_remember_none(tmp_path: Path) -> None:
    case = CASES["mistral_large4"]
    write_checkpoint(tmp_path / "source", case.tensors(), case.config)
    convert(prepare(open_local(str(tmp_path / "source")), Options(16, 64, 16)), tmp_path / "out", hash_source=False)
    with Engine.open(tmp_path / "out", ram_bytes=PLENTY, backend="native") as engine:
        session = engine.new_session()
        engine.steps.step([(session, [1, 2, 3])])
        assert [latents is not None for latents, _ in session.states] == [True, True, False, False, True, False]
        assert [index is not None for _, index in session.states] == [True, False, True, False, True, False]


@pytest.mark.parametrize("name", CASES)
def test_a_config_alone_tells_the_tensors_of_the_checkpoint(name: str) -> None:
    case = CASES[name]
    raw = json.dumps(case.config).encode()
    told = {tensor.name: tensor.shape for tensor in published_tensors(read_config(raw), read_quantization(raw))}
    stored = {name: tensor.shape for name, tensor in case.tensors().items()}
    assert told == {name: shape for name, shape in stored.items() if not name.startswith(STRANGERS)}


def test_a_projection_to_latents_has_no_place_in_a_layer_that_shares_them(tmp_path: Path) -> None:
    case, name = CASES["mistral_large4"], "layers.2.attention.wkv_a_with_mqa.weight"
    write_checkpoint(tmp_path, case.tensors() | as_bf16(name, np.zeros((48, 64), np.float32)).tensors, case.config)
    with pytest.raises(FormatError, match=f"{name} has no place in mistral_large4"):
        prepare(open_local(str(tmp_path)), Options(16, 64, 16))
