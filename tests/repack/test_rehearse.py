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
from repack.known_models import KNOWN_MODELS, known_geometry
from repack.plan import Options
from repack.rehearse import geometry, prepare_rehearsal, read_geometry
from repack.report import inspect
from repack.sources import demo_folder, open_local
from repack.sources.folder import FolderSource
from repack.tables import inspection_text
from repack.verify import verify_container
from runtime import Engine
from tests.fixtures import deepseek_v4_tiny
from tests.fixtures.deepseek_tiny import CASES
from tests.fixtures.recipe import write_checkpoint
from tests.repack.checkpoints import read_tree
from tests.repack.quantized import CONFIGS

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures"
LARGE = {  # GiB: n-grams take 60 of the first and 200 of the second, resident weights 56 of the last
    "Qwen/Qwen3.8-Flash-Next": 72,
    "deepseek-ai/DeepSeek-V4.1-Flash": 232,
    "moonshotai/Kimi-K3": 72,
}
CONFIGS_BF16 = [FIXTURES / "per_expert" / "config.json", FIXTURES / "qwen3_moe" / "config.json"]  # all bf16


def rehearse(
    config: Path,
    out: Path,
    options: Options | None = None,
    seed: int = 0,
    jobs: int = 1,
    disk_bytes: int | None = None,
) -> Path:
    convert(prepare_rehearsal(read_geometry(config), options or Options(), seed, disk_bytes), out, jobs=jobs)
    return out


@pytest.mark.parametrize("config", CONFIGS_BF16, ids=["qwen3_5_moe", "qwen3_moe"])
@pytest.mark.parametrize("bits", [4, 8, 16])
def test_its_layout_is_that_of_the_converted_checkpoint(config: Path, bits: int, tmp_path: Path) -> None:
    options = Options(bits=bits, resident_bits=bits)
    out = rehearse(config, tmp_path / "out", options)
    assert open_container(out).index.layout == prepare(FolderSource(config.parent), options).plan.layout


@pytest.mark.parametrize("config", CONFIGS_BF16, ids=["qwen3_5_moe", "qwen3_moe"])
def test_every_byte_of_it_is_sound(config: Path, tmp_path: Path) -> None:
    assert verify_container(rehearse(config, tmp_path / "out")).sound


def test_the_same_seed_gives_the_same_bytes_whatever_the_jobs(tmp_path: Path) -> None:
    one = read_tree(rehearse(CONFIGS_BF16[0], tmp_path / "one", seed=7))
    assert read_tree(rehearse(CONFIGS_BF16[0], tmp_path / "three", seed=7, jobs=3)) == one
    assert read_tree(rehearse(CONFIGS_BF16[0], tmp_path / "other", seed=8)) != one


def test_no_two_experts_are_the_same(tmp_path: Path) -> None:
    index = open_container(rehearse(CONFIGS_BF16[0], tmp_path / "out")).index
    checksums = [checksum for layer in index.record_checksums.values() for checksum in layer]
    assert len(set(checksums)) == len(checksums)


@pytest.mark.parametrize("config", CONFIGS_BF16, ids=["qwen3_5_moe", "qwen3_moe"])
def test_routing_varies_by_token_in_every_layer(config: Path, tmp_path: Path) -> None:
    with Engine.open(rehearse(config, tmp_path / "out"), lookahead="off") as engine:
        chosen: list[np.ndarray] = []
        route = engine.steps.model.ops.route

        def noted(*args: Any) -> tuple[np.ndarray, np.ndarray]:
            ids, weights = route(*args)
            chosen.append(ids)
            return ids, weights

        engine.steps.model.ops.route = noted  # type: ignore[method-assign,assignment]
        engine.logits(np.random.default_rng(0).integers(0, engine.config.vocab_size, 200).tolist())
        assert len(chosen) == engine.config.num_hidden_layers
        for ids in chosen:  # of one layer: [200, top_k]
            uses = np.bincount(ids.ravel(), minlength=engine.config.num_experts)
            assert uses.min() > 0
            assert uses.max() < 4 * uses.mean()


def test_the_index_and_the_engine_say_that_it_is_a_rehearsal(tmp_path: Path) -> None:
    out = rehearse(CONFIGS_BF16[0], tmp_path / "out", seed=3)
    assert open_container(out).index.extensions == {REHEARSAL: {"seed": 3}}
    with Engine.open(out) as engine:
        assert [line for line in engine.warnings if "rehearsal" in line]
        assert engine.stats.lookahead == "prompts"  # no guess would be wrong, which no real model offers
    with Engine.open(out, lookahead="on") as engine:
        assert engine.stats.lookahead == "on"


def layer_files(out: Path) -> list[os.stat_result]:
    return [path.stat() for path in sorted((out / "experts").iterdir())]


def test_past_the_allowance_layer_files_are_hard_links_to_earlier_ones(tmp_path: Path) -> None:
    whole = rehearse(CONFIGS_BF16[0], tmp_path / "whole")
    files = layer_files(whole)
    room = prepare_rehearsal(read_geometry(CONFIGS_BF16[0]), Options(), 0).output_bytes - files[0].st_size
    out = rehearse(CONFIGS_BF16[0], tmp_path / "out", disk_bytes=room)
    assert len({status.st_ino for status in layer_files(out)}) == len(files) - 1
    index = open_container(out).index
    (repeat,) = index.extensions[REHEARSAL]["links"].items()
    assert (out / repeat[0]).samefile(out / repeat[1])
    assert "rehearsal   made-up weights, " in inspection_text(inspect(out))
    assert index.extensions[REHEARSAL]["distinct_bytes"] == index.layout.total_bytes - files[0].st_size
    assert verify_container(out).sound
    with Engine.open(out) as engine:
        assert any("distinct" in line for line in engine.warnings)
        engine.logits([1, 2, 3])


def test_a_rehearsal_with_links_takes_no_more_disk_than_allowed(tmp_path: Path) -> None:
    smallest = prepare_rehearsal(read_geometry(CONFIGS_BF16[0]), Options(), 0)
    layers = [layer for _, layer in smallest.plan.layout.moe_layers()]
    room = smallest.output_bytes - sum(layer.nbytes for layer in layers[1:])
    out = rehearse(CONFIGS_BF16[0], tmp_path / "out", disk_bytes=room)
    statuses = {path.stat().st_ino: path.stat() for path in out.rglob("*") if path.is_file()}
    assert sum(status.st_size for status in statuses.values()) <= room
    with pytest.raises(RequestError, match=r"--disk is .*, expected at least"):
        prepare_rehearsal(read_geometry(CONFIGS_BF16[0]), Options(), 0, room - 1)


@pytest.mark.parametrize("name", KNOWN_MODELS)
def test_a_well_known_model_can_be_rehearsed(name: str) -> None:
    room = LARGE.get(name, 64) << 30
    rehearsal = prepare_rehearsal(known_geometry(name), Options(), 0, room)
    assert rehearsal.output_bytes <= room or not rehearsal.links


def test_modules_that_a_config_leaves_out_stay_bf16() -> None:
    origins = prepare_rehearsal(known_geometry("XiaomiMiMo/MiMo-V2-Flash"), Options(), 0, 64 << 30).plan.origins()
    kinds = {name.rpartition(".")[2]: origin.encoding for name, origin in origins.resident.items() if ".5." in name}
    assert kinds["o_proj"] == "bf16"
    assert kinds["q_proj"] == kinds["k_proj"] == kinds["v_proj"] == "fp8, f32 scales per 128 × 128"


def test_another_seed_does_not_go_on_with_the_first_one(tmp_path: Path) -> None:
    rehearse(CONFIGS_BF16[0], tmp_path / "out", seed=1)
    with pytest.raises(RequestError, match="extensions rehearsal seed 1, not 2; --force replaces it"):
        rehearse(CONFIGS_BF16[0], tmp_path / "out", seed=2)


def test_a_conversion_does_not_replace_a_rehearsal_unless_forced(tmp_path: Path) -> None:
    conversion = prepare(open_local("demo"), Options())
    convert(prepare_rehearsal(read_geometry(demo_folder()), Options(), 0, None), tmp_path / "out")
    with pytest.raises(RequestError, match="out: holds a rehearsal; --force replaces it"):
        convert(conversion, tmp_path / "out")


def test_a_model_that_is_not_supported_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises(UnsupportedError, match="model_type is gpt2, supported are"):
        read_geometry(path)


def test_a_folder_without_a_config_and_a_pipe_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"holds no config\.json"):
        read_geometry(tmp_path)
    os.mkfifo(tmp_path / "config.json")
    for path in (tmp_path, tmp_path / "config.json"):
        with pytest.raises(FormatError, match=r"config\.json: is no regular file"):
            read_geometry(path)


@pytest.mark.parametrize(
    ("name", "arrives", "kept"),
    [("deepseek_v3_fp8", "fp8, f32 scales per 128", "affine"), ("kimi_k25_int4", "int4", "symmetric")],
)
def test_a_config_of_quantized_weights_is_rehearsed_as_published(
    name: str, arrives: str, kept: str, tmp_path: Path
) -> None:
    path = tmp_path / f"{name}.json"
    path.write_text(json.dumps(CASES[name].config))
    rehearsal = prepare_rehearsal(read_geometry(path), Options(4, 32, 8), 0)
    layer, found = next(iter(rehearsal.plan.layout.moe_layers()))
    assert found.record.parts[0].encoding.id == kept
    assert rehearsal.plan.origins().experts[layer][0].encoding.startswith(arrives)


@pytest.mark.parametrize("name", ["deepseek_v4", "deepseek_v4_fp8"])
def test_the_encodings_of_deepseek_v4_are_told_by_its_config(name: str, tmp_path: Path) -> None:
    case, options = deepseek_v4_tiny.CASES[name], Options(16, 64, 16)
    write_checkpoint(tmp_path / "source", case.tensors(), case.config)
    out = rehearse(tmp_path / "source" / "config.json", tmp_path / "out", options)
    assert open_container(out).index.layout == prepare(FolderSource(tmp_path / "source"), options).plan.layout
    assert verify_container(out).sound
    with Engine.open(out) as engine:
        assert np.isfinite(engine.logits([1, 2, 3])).all()


def test_experts_of_deepseek_v4_arrive_in_fp4_or_fp8_and_nothing_else(tmp_path: Path) -> None:
    config, path = deepseek_v4_tiny.CASES["deepseek_v4_fp8"].config, tmp_path / "config.json"
    for dtype, arrives in (("fp4", "mxfp4"), ("fp8", "fp8, e8m0 scales per 128 × 128")):
        path.write_text(json.dumps(config | {"expert_dtype": dtype}))
        origins = prepare_rehearsal(read_geometry(path), Options(16, 64, 16), 0).plan.origins()
        assert {origin.encoding for origin in origins.experts[0]} == {arrives}
        beside = {key: value for key, value in config.items() if key != "expert_dtype"}  # as DeepSeek-V4.1 says it
        said = config["quantization_config"] | {"expert_dtype": dtype}
        path.write_text(json.dumps(beside | {"quantization_config": said}))
        assert prepare_rehearsal(read_geometry(path), Options(16, 64, 16), 0).plan.origins() == origins
    path.write_text(json.dumps(config | {"expert_dtype": "int4"}))
    with pytest.raises(UnsupportedError, match="expert_dtype is int4, only fp4, fp8 is implemented"):
        read_geometry(path)


HEADERS_ALONE_TELL = ("fp8_e8m0", "mxfp4_i8", "fp8_mx_mlx")
METHODS = [kind for kind in CONFIGS if not kind.startswith("mlx") and kind not in HEADERS_ALONE_TELL]


@pytest.mark.parametrize("kind", METHODS)
def test_an_encoding_that_config_json_names_is_that_of_the_rehearsal_and_runs(kind: str, tmp_path: Path) -> None:
    config = json.loads(CONFIGS_BF16[1].read_text())
    if CONFIGS[kind] is not None:
        config["quantization_config"] = CONFIGS[kind]
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    out = rehearse(path, tmp_path / "out", Options(4, 32, 8))
    assert verify_container(out).sound
    with Engine.open(out) as engine:
        assert np.isfinite(engine.logits([1, 2, 3])).all()


def test_what_only_headers_tell_is_refused_by_name(tmp_path: Path) -> None:
    config = json.loads(CONFIGS_BF16[1].read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization": CONFIGS["mlx4"]}))
    with pytest.raises(UnsupportedError, match="mlx checkpoints differ in what only their headers tell"):
        read_geometry(tmp_path)


def test_a_pattern_of_modules_that_is_no_regular_expression_is_refused() -> None:
    said = {"quant_method": "fp8", "modules_to_not_convert": ["re:("]}
    config = json.loads((FIXTURES / "qwen3_moe" / "config.json").read_text()) | {"quantization_config": said}
    with pytest.raises(
        FormatError, match=r"x: quantization_config: leaves out re:\(, no regular expression: missing \)"
    ):
        geometry({"config.json": json.dumps(config).encode()}, "x")


def test_modules_are_left_out_by_name_by_their_ends_and_by_patterns() -> None:
    left_out = ["model.layers.0.mlp", "o_proj", "model.layers.2.*q_proj", "re:.*layers.3.*k_proj"]
    said = {"quant_method": "fp8", "modules_to_not_convert": left_out}
    config = json.loads((FIXTURES / "qwen3_moe" / "config.json").read_text()) | {"quantization_config": said}
    config |= {"num_hidden_layers": 4}
    tensors = geometry({"config.json": json.dumps(config).encode()}, "x").tensors.values()
    plain = {t.name.removeprefix("model.layers.").removesuffix(".weight") for t in tensors if t.dtype == "BF16"}
    chosen = {name for name in plain if name.endswith(("q_proj", "k_proj", "o_proj", "experts.1.up_proj"))}
    outputs = {f"{i}.self_attn.o_proj" for i in range(4)}
    assert chosen == outputs | {"0.mlp.experts.1.up_proj", "2.self_attn.q_proj", "3.self_attn.k_proj"}
