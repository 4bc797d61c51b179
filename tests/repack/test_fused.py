"""Experts side by side in one tensor become the records that they become one by one."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from formats.errors import FormatError
from repack.convert import convert, prepare
from repack.plan import Options
from repack.sources import open_local
from repack.verify import verify_container
from tests.fixtures import decoders_tiny, muse_spark_tiny, plain_tiny, vision_tiny
from tests.fixtures.recipe import Stored, write_checkpoint

Tensors = dict[str, Stored]
PARTS = ("gate_proj", "up_proj", "down_proj")


def records(folder: Path, tensors: Mapping[str, Stored], config: dict[str, Any]) -> dict[str, bytes]:
    """Every layer's experts as they arrive, checked against the source."""
    write_checkpoint(folder / "source", tensors, config)
    convert(prepare(open_local(str(folder / "source")), Options(16, 64, 16)), folder / "out", hash_source=False)
    assert verify_container(folder / "out", open_local(str(folder / "source"))).sound
    return {file.name: file.read_bytes() for file in sorted((folder / "out" / "experts").iterdir())}


def each_layer(tensors: Tensors, change: Callable[[str, Tensors], Tensors]) -> Tensors:
    """The tensors of experts of each layer, by what follows its `experts.`, changed."""
    result, layers = {}, dict[str, Tensors]()
    for name, tensor in tensors.items():
        at, found, rest = name.partition(".mlp.experts.")
        if found:
            layers.setdefault(f"{at}{found}", {})[rest] = tensor
        else:
            result[name] = tensor
    for at, experts in layers.items():
        result |= change(at, experts)
    return result


def side_by_side(at: str, experts: Tensors) -> Tensors:
    """One by one -> gate and up of all experts, and down, rows first."""
    gate, up, down = (
        np.stack([experts[f"{i}.{part}.weight"].data for i in range(len(experts) // 3)]) for part in PARTS
    )
    fused = {"gate_up_proj": np.concatenate([gate, up], axis=1), "down_proj": down}
    return {f"{at}{name}": Stored("BF16", data.shape, data) for name, data in fused.items()}


def turned(at: str, experts: Tensors) -> Tensors:
    """Columns first -> rows first, or the other way round."""
    return {
        f"{at}{name}": Stored(tensor.dtype, data.shape, data)
        for name, tensor in experts.items()
        for data in (np.ascontiguousarray(tensor.data.swapaxes(1, 2)),)
    }


def taken_apart(at: str, experts: Tensors) -> Tensors:
    """gpt-oss's: columns first, gate and up in turns -> one by one, as AutoRound has them."""
    result: Tensors = {}
    for name, tensor in experts.items():
        part, _, bias = name.partition("_proj")
        for i, each in enumerate(tensor.data):
            rows = each if bias else each.T
            parts = {"gate": rows[::2], "up": rows[1::2]} if part == "gate_up" else {"down": rows}
            for which, data in parts.items():
                suffix = "bias" if bias else "weight"
                result[f"{at}{i}.{which}_proj.{suffix}"] = Stored(tensor.dtype, data.shape, np.ascontiguousarray(data))
    return result


def test_experts_of_gpt_oss_one_by_one_are_those_side_by_side(tmp_path: Path) -> None:
    case = decoders_tiny.CASES["gpt_oss"]
    fused = records(tmp_path / "fused", case.tensors(), case.config)
    assert records(tmp_path / "alone", each_layer(case.tensors(), taken_apart), case.config) == fused


@pytest.mark.parametrize(
    "name",
    [
        *("qwen3_moe", "glm4_moe", "olmoe", "dots1", "solar_open", "exaone_moe", "hunyuan_v1_moe", "kolibri1"),
        *("afmoe", "mellum"),
    ],
)
def test_experts_that_transformers_fused_are_the_same(name: str, tmp_path: Path) -> None:
    """As its save_pretrained writes them without save_original_format."""
    case = (decoders_tiny.CASES | plain_tiny.CASES)[name]
    alone = records(tmp_path / "alone", case.tensors(), case.config)
    assert records(tmp_path / "fused", each_layer(case.tensors(), side_by_side), case.config) == alone


@pytest.mark.parametrize("name", ["qwen3_vl_moe", "qwen3_vl_moe_fp8"])
def test_experts_of_qwen3_vl_are_the_same_columns_first_and_rows_first(name: str, tmp_path: Path) -> None:
    """As published, and as transformers 5 saves them."""
    case = vision_tiny.CASES[name]
    published = records(tmp_path / "published", case.tensors(), case.config)
    assert records(tmp_path / "saved", each_layer(case.tensors(), turned), case.config) == published


def apart(at: str, experts: Tensors) -> Tensors:
    """Stacks of ModelOpt, expert by expert."""
    result = {}
    for stored, (dtype, shape, data) in experts.items():
        stack, found, kind = stored.partition("_proj")
        if stack not in ("gate_up", "down") or kind == "_input_scale":
            result[f"{at}{stored}"] = Stored(dtype, shape, data)
            continue
        parts = ("gate", "up") if stack == "gate_up" else ("down",)
        for expert, own in enumerate(data):
            for part, rows in zip(parts, np.split(np.atleast_1d(own), len(parts)), strict=True):
                alone = rows.reshape(()) if kind.endswith("scale_2") else np.ascontiguousarray(rows)
                name = f"{at}{expert}.{part}{found}.{kind.removeprefix('_') or 'weight'}"
                result[name] = Stored(dtype, alone.shape, alone)
    return result


def test_stacks_in_which_gate_and_up_have_a_factor_each_are_the_experts_one_by_one(tmp_path: Path) -> None:
    case = muse_spark_tiny.CASES["muse_spark_modelopt"]
    stacked = records(tmp_path / "stacked", case.tensors(), case.config)
    assert records(tmp_path / "apart", each_layer(case.tensors(), apart), case.config) == stacked


@pytest.mark.parametrize(
    ("part", "shape"), [("down", (8, 2)), ("down", (7,)), ("gate_up", (8,)), ("gate_up", (8, 2, 1))]
)
def test_factors_of_other_than_all_parts_are_refused(part: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    case = muse_spark_tiny.CASES["muse_spark_modelopt"]
    name = f"model.language_model.layers.1.mlp.experts.{part}_proj_weight_scale_2"
    tensors = case.tensors()
    dtype, stored, data = tensors[name]
    assert stored[0] == 8
    wrong = Stored(dtype, shape, np.resize(data, shape))
    write_checkpoint(tmp_path, tensors | {name: wrong}, case.config)
    with pytest.raises(FormatError, match=rf"{part}_proj_weight_scale_2 has shape \[.*, expected \[8"):
        prepare(open_local(str(tmp_path)), Options(16, 64, 16))
