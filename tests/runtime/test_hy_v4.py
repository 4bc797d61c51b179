"""Hunyuan 4: the names that transformers saves, and what layers remember."""

import re
from pathlib import Path

import pytest

from formats.errors import FormatError
from repack.convert import convert, prepare
from repack.plan import Options
from repack.sources import open_local
from runtime import Engine
from tests.fixtures.hy_v4_tiny import BESIDE, CASES
from tests.fixtures.recipe import Stored, write_checkpoint
from tests.runtime.helpers import PLENTY

OPTIONS = Options(16, 64, 16)


def saved(name: str, head: str) -> str:
    """As save_pretrained of transformers 5.24 names it."""
    name = name.replace("model.hc_head.", head).replace("gate_proj.weight", "linear_gate.weight")
    return re.sub(r"\.(hc_\w+_layer)\.hc_pre\.", r".hc_pre.\1.", name)


def converted(folder: Path, tensors: dict[str, Stored], case: str) -> Path:
    write_checkpoint(folder / "source", tensors, CASES[case].config)
    convert(prepare(open_local(str(folder / "source")), OPTIONS), folder / "out", hash_source=False)
    return folder / "out"


@pytest.mark.parametrize(("case", "head"), [("hy_v4", "model.hc_pre.hc_head."), ("hy_v4_vl", "model.hc_head.hc_pre.")])
def test_names_that_transformers_saves_give_the_same_bytes(tmp_path: Path, case: str, head: str) -> None:
    tensors = {name: tensor for name, tensor in CASES[case].tensors().items() if name not in BESIDE}
    renamed = {saved(name, head): tensor for name, tensor in tensors.items()}
    assert len(renamed.keys() - tensors.keys()) == 2 * 3 * 6 + 3 + 6  # of connections, their head, and gates
    first, second = (converted(tmp_path / key, named, case) for key, named in (("a", tensors), ("b", renamed)))
    for file in (path for path in first.iterdir() if path.suffix == ".bin"):
        assert file.read_bytes() == (second / file.name).read_bytes()


def test_layers_that_share_a_choice_keep_no_keys_of_an_indexer(tmp_path: Path) -> None:
    with Engine.open(converted(tmp_path, CASES["hy_v4"].tensors(), "hy_v4"), ram_bytes=PLENTY) as engine:
        session = engine.new_session()
        engine.steps.step([(session, [1, 2, 3])])
        assert [index is not None for _, index in session.states] == [True, True, False, False, True, False]


def test_an_indexer_has_no_place_in_a_layer_that_shares_a_choice(tmp_path: Path) -> None:
    tensors, name = CASES["hy_v4"].tensors(), "self_attn.indexer.wk.weight"
    tensors[f"model.layers.2.{name}"] = tensors[f"model.layers.1.{name}"]
    write_checkpoint(tmp_path, tensors, CASES["hy_v4"].config)
    with pytest.raises(FormatError, match=f"model.layers.2.{name} has no place in hy_v4"):
        prepare(open_local(str(tmp_path)), OPTIONS)
