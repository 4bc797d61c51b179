"""ERNIE-4.5-VL: experts for vision behind those for text, which a text model does not need."""

from pathlib import Path

import numpy as np
import pytest

from formats.errors import FormatError
from repack.convert import prepare
from repack.plan import Options, Plan
from repack.sources import open_local
from tests.fixtures.recipe import Stored, bf16, f32, write_checkpoint
from tests.fixtures.vision_tiny import CASES

CASE = CASES["ernie4_5_vl_moe"]
GATE, BIAS = "model.layers.1.mlp.gate.weight", "model.layers.1.mlp.moe_statics.e_score_correction_bias"


def planned(folder: Path, changes: dict[str, Stored]) -> Plan:
    write_checkpoint(folder, {**CASE.tensors(), **changes}, CASE.config)
    return prepare(open_local(str(folder)), Options(16, 64, 16)).plan


def test_experts_for_vision_and_their_router_are_counted_as_left_out(tmp_path: Path) -> None:
    skipped = {skipped.what: skipped.tensors for skipped in planned(tmp_path, {}).skipped}
    assert skipped["experts for vision"] == 2 * (3 * 8 + 1)


def test_an_expert_behind_those_of_both_is_refused(tmp_path: Path) -> None:
    name = "model.layers.1.mlp.experts.16.up_proj.weight"
    with pytest.raises(FormatError, match=f"{name} has no place in ernie4_5_vl_moe with 3 layers and 8 experts"):
        planned(tmp_path, {name: bf16(np.zeros((32, 64), np.float32))})


@pytest.mark.parametrize(("name", "found", "expected"), [(GATE, (8, 64), (64, 8)), (BIAS, (1, 8), (2, 8))])
def test_routers_and_biases_of_another_shape_are_refused(
    tmp_path: Path, name: str, found: tuple[int, ...], expected: tuple[int, ...]
) -> None:
    message = rf"{name} .*\[{found[0]}, {found[1]}\].*\[{expected[0]}, {expected[1]}\]"
    with pytest.raises(FormatError, match=message):
        planned(tmp_path, {name: f32(np.zeros(found, np.float32))})
