"""A rehearsal: the true geometry, made-up weights, and a mark that says so."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from formats.container import open_container
from formats.errors import FormatError, RequestError, UnsupportedError
from formats.index import REHEARSAL
from repack.convert import convert, prepare
from repack.plan import Options
from repack.rehearse import prepare_rehearsal
from repack.sources.folder import FolderSource
from repack.verify import verify_container
from runtime import Engine
from tests.repack.checkpoints import read_tree

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures"
CONFIGS = [FIXTURES / "per_expert" / "config.json", FIXTURES / "qwen3_moe" / "config.json"]  # all bf16


def rehearse(config: Path, out: Path, options: Options | None = None, seed: int = 0, jobs: int = 1) -> Path:
    convert(prepare_rehearsal(config, options or Options(), seed), out, jobs=jobs)
    return out


@pytest.mark.parametrize("config", CONFIGS, ids=["qwen3_5_moe", "qwen3_moe"])
@pytest.mark.parametrize("bits", [4, 8, 16])
def test_its_layout_is_that_of_the_converted_checkpoint(config: Path, bits: int, tmp_path: Path) -> None:
    options = Options(bits=bits, resident_bits=bits)
    out = rehearse(config, tmp_path / "out", options)
    assert open_container(out).index.layout == prepare(FolderSource(config.parent), options).plan.layout


@pytest.mark.parametrize("config", CONFIGS, ids=["qwen3_5_moe", "qwen3_moe"])
def test_every_byte_of_it_is_sound(config: Path, tmp_path: Path) -> None:
    assert verify_container(rehearse(config, tmp_path / "out")).sound


def test_the_same_seed_gives_the_same_bytes_whatever_the_jobs(tmp_path: Path) -> None:
    one = read_tree(rehearse(CONFIGS[0], tmp_path / "one", seed=7))
    assert read_tree(rehearse(CONFIGS[0], tmp_path / "three", seed=7, jobs=3)) == one
    assert read_tree(rehearse(CONFIGS[0], tmp_path / "other", seed=8)) != one


def test_no_two_experts_are_the_same(tmp_path: Path) -> None:
    index = open_container(rehearse(CONFIGS[0], tmp_path / "out")).index
    checksums = [checksum for layer in index.record_checksums.values() for checksum in layer]
    assert len(set(checksums)) == len(checksums)


@pytest.mark.parametrize("config", CONFIGS, ids=["qwen3_5_moe", "qwen3_moe"])
def test_routing_varies_by_token_in_every_layer(config: Path, tmp_path: Path) -> None:
    with Engine.open(rehearse(config, tmp_path / "out")) as engine:
        chosen: list[np.ndarray] = []
        route = engine.model.ops.route  # type: ignore[attr-defined]

        def noted(*args: Any) -> tuple[np.ndarray, np.ndarray]:
            ids, weights = route(*args)
            chosen.append(ids)
            return ids, weights

        engine.model.ops.route = noted  # type: ignore[attr-defined]
        engine.logits(np.random.default_rng(0).integers(0, engine.config.vocab_size, 200).tolist())
        for ids in chosen:  # of one layer: [200, top_k]
            uses = np.bincount(ids.ravel(), minlength=engine.config.num_experts)
            assert uses.min() > 0
            assert uses.max() < 4 * uses.mean()


def test_the_index_and_the_engine_say_that_it_is_a_rehearsal(tmp_path: Path) -> None:
    out = rehearse(CONFIGS[0], tmp_path / "out", seed=3)
    assert open_container(out).index.extensions == {REHEARSAL: {"seed": 3}}
    with Engine.open(out) as engine:
        assert [line for line in engine.warnings if "rehearsal" in line]


def test_another_seed_does_not_go_on_with_the_first_one(tmp_path: Path) -> None:
    rehearse(CONFIGS[0], tmp_path / "out", seed=1)
    with pytest.raises(RequestError, match="extensions rehearsal seed 1, not 2; --force replaces it"):
        rehearse(CONFIGS[0], tmp_path / "out", seed=2)


def test_a_model_that_is_not_supported_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises(UnsupportedError, match="model_type is gpt2, supported are"):
        prepare_rehearsal(path, Options(), 0)


def test_a_folder_without_a_config_and_a_pipe_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"holds no config\.json"):
        prepare_rehearsal(tmp_path, Options(), 0)
    os.mkfifo(tmp_path / "config.json")
    for path in (tmp_path, tmp_path / "config.json"):
        with pytest.raises(FormatError, match=r"config\.json: is no regular file"):
            prepare_rehearsal(path, Options(), 0)
