"""Checkpoints of AutoRound, compressed-tensors in bytes and Quark: what their configs say, as published, and refuse.

Configs are those of Intel's, RedHatAI's and AMD's releases, cut to what is read; geometries are of known_models.json.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from formats.encodings import Affine, Plain, Symmetric, ZeroPoint
from formats.errors import FormatError, UnsupportedError
from formats.quantization import Groups, Quantization, read_quantization
from repack.convert import prepare
from repack.known_models import KNOWN_MODELS
from repack.plan import Options
from repack.rehearse import geometry
from repack.sources.folder import FolderSource
from tests.repack.checkpoints import PREFIX, SMALL, shapes
from tests.repack.quantized import CONFIGS, in_kind, write_tensors
from tests.repack.test_quantized import CONFIG, DEFAULT, converted, is_expert, parts, said, verified

Json = dict[str, Any]

INT4: Json = {
    "autoround_version": "0.6.1.dev",
    "batch_size": 4,
    "bits": 4,
    "data_type": "int",
    "group_size": 128,
    "packing_format": "auto_round:auto_gptq",
    "quant_method": "auto-round",
    "sym": True,
}
LAYERS = "model.language_model.layers"
QWEN3_5: Json = INT4 | {  # experts in 4 bits, all else in 16
    "autoround_version": "0.12.0",
    "block_name_to_quantize": LAYERS,
    "extra_config": {
        **{
            f"{LAYERS}.{layer}.mlp.{module}": {"bits": 16, "data_type": "float"}
            for layer in range(48)
            for module in ("gate", "shared_expert_gate", "shared_expert.gate_proj", "shared_expert.up_proj")
        },
        r".*linear_attn.*": {"bits": 16},
        r".*self_attn.*": {"bits": 16},
        r".*shared_expert\.down_proj": {"bits": 16},
    },
}
MIXED: Json = INT4 | {  # experts in 4 bits, what is not an expert in 8
    "extra_config": {
        **{f"model.layers.{layer}.mlp.gate": {"bits": 16} for layer in range(48)},
        r"model\.layers\.\d+\.self_attn\..*": {"bits": 8, "group_size": -1, "act_bits": 16, "super_bits": None},
        "lm_head": {"bits": 8, "group_size": 128, "sym": True, "data_type": "int", "act_bits": None},
    },
    "block_name_to_quantize": [["model.layers.0", "model.layers.1"], "model.layers"],
}
MX: Json = {"dtype": "fp4", "qscheme": "per_group", "group_size": 32, "ch_axis": -1, "scale_format": "e8m0"}
QUARK: Json = {
    "quant_method": "quark",
    "quant_mode": "eager_mode",
    "algo_config": None,
    "exclude": ["lm_head", "re:.*self_attn.*", "re:.*mlp.gate$"],
    "global_quant_config": {
        "bias": None,
        "input_tensors": {**MX, "is_dynamic": True},
        "weight": {**MX, "is_dynamic": False, "scale_calculation_mode": "even", "symmetric": None},
    },
    "layer_quant_config": {},
    "layer_type_quant_config": {},
    "export": {"kv_cache_group": [], "min_kv_scale": 0.0, "pack_method": "reorder", "weight_format": "real_quantized"},
}
W8A8: Json = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "ignore": ["lm_head", "re:.*mlp.gate$"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "input_activations": {
                "dynamic": True,
                "num_bits": 8,
                "strategy": "token",
                "symmetric": True,
                "type": "int",
            },
            "weights": {"num_bits": 8, "strategy": "channel", "symmetric": True, "type": "int", "group_size": None},
        }
    },
    "kv_cache_scheme": None,
    "quantization_status": "compressed",
}


def read(config: Mapping[str, Any]) -> Quantization:
    quantization = read_quantization(json.dumps({"quantization_config": config}).encode())
    assert quantization is not None
    return quantization


def planned(model: str, config: Mapping[str, Any]) -> dict[str, str]:
    """How tensors of a known model's layer 3 arrive, and its head and experts, when its config says this."""
    raw = json.dumps({**KNOWN_MODELS[model], "quantization_config": config}).encode()
    origins = prepare(geometry({"config.json": raw}, model), Options(16, 64, 16)).plan.origins()
    found = {name.removeprefix("layers.3."): origin.encoding for name, origin in origins.resident.items()}
    return found | {"experts": " and ".join(sorted({origin.encoding for origin in origins.experts[3]}))}


# ---- as published


def test_auto_round_of_qwen3_is_planned_from_its_config_alone() -> None:
    found = planned("Qwen/Qwen3-30B-A3B", INT4 | {"extra_config": {"model.layers.3.mlp.gate": {"bits": 16}}})
    int4 = "GPTQ 4-bit symmetric, f16 scales per 128"
    assert found["experts"] == found["self_attn.q_proj"] == int4
    assert (found["mlp.gate"], found["lm_head"]) == ("bf16", "bf16")


def test_auto_round_of_qwen3_5_keeps_what_patterns_leave_out() -> None:
    found = planned("Qwen/Qwen3.5-122B-A10B", QWEN3_5)
    assert found["experts"] == "GPTQ 4-bit symmetric, f16 scales per 128"
    plain = [name for name in found if re.search(r"self_attn|linear_attn|shared_expert|gate|lm_head", name)]
    assert {found[name] for name in plain} <= {"bf16", "f32"}
    assert "self_attn.o_proj" in plain


def test_auto_round_in_mixed_bits_is_planned_module_by_module() -> None:
    found = planned("Qwen/Qwen3-30B-A3B", MIXED)
    assert found["experts"] == "GPTQ 4-bit symmetric, f16 scales per 128"
    assert found["self_attn.q_proj"] == "GPTQ 8-bit symmetric, f16 scales per 2048"
    assert found["self_attn.o_proj"] == "GPTQ 8-bit symmetric, f16 scales per 4096"
    assert found["lm_head"] == "GPTQ 8-bit symmetric, f16 scales per 128"
    assert found["mlp.gate"] == "bf16"


def test_int8_of_compressed_tensors_is_planned_from_its_config_alone() -> None:
    found = planned("Qwen/Qwen3-30B-A3B", W8A8)
    assert found["experts"] == "int8, bf16 scales per 2048 and int8, bf16 scales per 768"
    assert (found["mlp.gate"], found["lm_head"]) == ("bf16", "bf16")


def test_quark_is_planned_from_its_config_alone() -> None:
    found = planned("Qwen/Qwen3-235B-A22B", QUARK)
    assert (found["experts"], found["self_attn.q_proj"], found["mlp.gate"]) == ("mxfp4", "bf16", "bf16")
    fp8 = {"dtype": "fp8_e4m3", "qscheme": "per_channel", "ch_axis": 0, "symmetric": True, "is_dynamic": False}
    caches = {"*k_proj": {"weight": fp8, "output_tensors": {"dtype": "fp8_e4m3", "qscheme": "per_tensor"}}}
    config = QUARK | {"global_quant_config": {"weight": fp8}, "layer_quant_config": caches}
    assert planned("Qwen/Qwen3-235B-A22B", config)["experts"] == "fp8, f32 scales per channel"


def test_quark_in_several_encodings_is_told_by_headers_alone() -> None:
    config = QUARK | {"global_quant_config": {"weight": {}}, "layer_quant_config": {"*experts*": {"weight": MX}}}
    with pytest.raises(UnsupportedError, match="quark checkpoints differ in what only their headers tell"):
        planned("Qwen/Qwen3-235B-A22B", config)


@pytest.mark.parametrize(
    ("name", "groups"),
    [
        ("model.layers.1.mlp.up_proj", Groups(4, 128)),
        ("model.layers.1.mlp.gate", None),
        ("model.layers.1.mlp.gate_proj", Groups(4, 128)),  # no pattern, though found in it
        ("model.layers.1.self_attn.q_proj", Groups(8, -1)),  # the first of two patterns
        ("model.layers.1.self_attn.k_proj", Groups(2, 64)),  # its name goes first
        ("model.visual.blocks.0", None),  # of no block
        ("lm_head", Groups(4, 32)),  # named
    ],
)
def test_modules_of_auto_round_are_found_by_name_then_by_the_first_pattern_then_by_block(
    name: str, groups: Groups | None
) -> None:
    extra = {
        "model.layers.1.mlp.gate": {"bits": 16, "data_type": "float"},
        r".*self_attn\..*": {"bits": 8, "group_size": -1},
        r"q_proj$": {"bits": 2},
        "model.layers.1.self_attn.k_proj": {"bits": 2, "group_size": 64},
        "lm_head": {"group_size": 32},
    }
    modules = read(INT4 | {"block_name_to_quantize": "model.layers, model.others", "extra_config": extra}).modules
    assert modules is not None
    assert modules.groups(name) == groups


def test_modules_may_be_quantized_where_all_others_are_not() -> None:
    config = INT4 | {"bits": 16, "extra_config": {".*experts.*": {"bits": 4}}, "block_name_to_quantize": ""}
    found = planned("Qwen/Qwen3-30B-A3B", config)
    assert (found["experts"], found["self_attn.q_proj"]) == ("GPTQ 4-bit symmetric, f16 scales per 128", "bf16")
    floats = {"packing_format": "auto_round:llm_compressor", "data_type": "float", "bits": 16}
    said_of_some = {".*experts.*": {"bits": 4, "data_type": "mx_fp", "group_size": 32}}
    quantization = read(INT4 | floats | {"extra_config": said_of_some})
    assert (sorted(quantization.bits), sorted(quantization.group_sizes)) == ([4], [32])


# ---- converted


def mixed(kind: str, other: str) -> dict[str, Any]:
    """Tensors: experts in one kind, queries in the other."""
    listing, rng = shapes(SMALL, fused=False), np.random.default_rng(1)
    queries = {name: found for name, found in listing.items() if name.endswith("q_proj.weight")}
    rest = {name: found for name, found in listing.items() if name not in queries}
    return dict(in_kind(rest, kind, is_expert, rng)) | dict(in_kind(queries, other, bool, rng))


def test_auto_round_in_mixed_bits_is_kept_to_the_bit(tmp_path: Path) -> None:
    config = said("auto_round") | {"sym": False, "extra_config": {r".*q_proj": {"bits": 3}}}
    source = write_tensors(tmp_path / "source", CONFIG, mixed("auto_round", "auto_round3"), config)
    layout = converted(source, tmp_path / "out")
    assert set(parts(layout)) == {ZeroPoint(4, 32, "f16")}
    assert layout.tensors["layers.1.self_attn.q_proj"].encoding == ZeroPoint(3, 32, "f16")
    assert verified(source, tmp_path / "out").sound


def test_packing_formats_differ_by_one_in_their_zero_points(tmp_path: Path) -> None:
    tensors = in_kind(shapes(SMALL, fused=False), "auto_round", is_expert, np.random.default_rng(1))
    zeros = []
    for packing in ("auto_round", "auto_round:gptqmodel", "auto_round:auto_gptq", "auto_round:gptq"):
        config = said("auto_round") | {"packing_format": packing}
        source = write_tensors(tmp_path / packing, CONFIG, tensors, config)
        (first, *_), *_ = prepare(FolderSource(source), DEFAULT).plan.experts[0]
        zeros.append(first.encoding.version)  # type: ignore[attr-defined]
    assert zeros == [2, 2, 1, 1]


def test_modelopt_may_say_it_in_an_object_of_its_own() -> None:
    said = {"quant_algo": "MXFP8", "exclude_modules": ["lm_head", "*.linear_gate"]}
    forms = [{"quant_method": "modelopt", **form} for form in (said, {"quantization": said})]
    flat, nested = (read_quantization(json.dumps({"quantization_config": form}).encode()) for form in forms)
    assert flat is not None
    assert nested == replace(flat, where="config.json: quantization_config.quantization")
    other = {"quantization_config": {"quant_method": "modelopt", "quantization": {"quant_algo": "W4A16_AWQ"}}}
    with pytest.raises(UnsupportedError, match=r"quantization_config\.quantization\.quant_algo is W4A16_AWQ"):
        read_quantization(json.dumps(other).encode())


@pytest.mark.parametrize(("kind", "bits"), [("int8_bytes", 4), ("quark_mxfp4", 4), ("int4_zero", 4)])
def test_what_these_keep_is_rounded_on_request_only(tmp_path: Path, kind: str, bits: int) -> None:
    tensors = in_kind(shapes(SMALL, fused=False), kind, is_expert, np.random.default_rng(1))
    source = write_tensors(tmp_path / "source", CONFIG, tensors, CONFIGS[kind])
    layout = converted(source, tmp_path / "out", Options(bits, 64, 8, requantize=True))
    assert set(parts(layout)) == {Affine(bits, 64, "bf16")}
    assert verified(source, tmp_path / "out").sound


def test_a_router_of_int8_is_decoded_and_scales_of_activations_are_skipped(tmp_path: Path) -> None:
    listing, name = shapes(SMALL | {"num_experts": 32}, fused=False), f"{PREFIX}layers.0.mlp.gate.weight"
    tensors = in_kind(
        listing, "int8_bytes_zero", lambda other: is_expert(other) or other == name, np.random.default_rng(1)
    )
    tensors[f"{PREFIX}layers.0.mlp.experts.0.up_proj.input_scale"] = ("F32", np.ones((), np.float32))
    text = {"model_type": "qwen3_5_moe_text", **SMALL, "num_experts": 32}
    source = write_tensors(tmp_path / "source", CONFIG | {"text_config": text}, tensors, CONFIGS["int8_bytes_zero"])
    assert [(s.what, s.tensors) for s in prepare(FolderSource(source), DEFAULT).plan.skipped] == [
        ("scales of quantized activations", 1)
    ]
    layout = converted(source, tmp_path / "out")
    assert layout.tensors["layers.0.mlp.gate"].encoding == Plain("f32")
    assert set(parts(layout)) == {ZeroPoint(8, 64, "bf16")}


def test_awq_without_zero_points_has_each_in_the_middle(tmp_path: Path) -> None:
    """As AutoRound writes AWQ's tensors with sym: its config of quant_method awq says zero_point false."""
    config = said("awq") | {"zero_point": False, "provider": "auto-round"}
    tensors = in_kind(shapes(SMALL, fused=False), "auto_round_awq_sym", is_expert, np.random.default_rng(1))
    layout = converted(write_tensors(tmp_path / "source", CONFIG, tensors, config), tmp_path / "out")
    assert set(parts(layout)) == {Symmetric(4, 32, "f16")}
    tensors = in_kind(shapes(SMALL, fused=False), "awq", is_expert, np.random.default_rng(1))
    other = write_tensors(tmp_path / "other", CONFIG, tensors, config)
    with pytest.raises(FormatError, match=r"qzeros holds zero point \d+ .*, expected 8, as the config says symmetric"):
        converted(other, tmp_path / "other_out")


def test_zero_points_may_be_there_for_some_groups_alone(tmp_path: Path) -> None:
    groups = {kind: said(kind)["config_groups"]["group_0"] for kind in ("int4", "int8_zero")}
    config = said("int4") | {"config_groups": groups}
    source = write_tensors(tmp_path / "source", CONFIG, mixed("int4", "int8_zero"), config)
    layout = converted(source, tmp_path / "out")
    assert set(parts(layout)) == {Symmetric(4, 32, "bf16")}
    assert layout.tensors["layers.1.self_attn.q_proj"].encoding == ZeroPoint(8, 64, "bf16")


# ---- refused


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        (
            {"packing_format": "auto_round:exllamav2"},
            "packing_format is auto_round:exllamav2, only auto_round:auto_gptq",
        ),
        ({"packing_format": "auto_round:fp8_static"}, "packing_format is auto_round:fp8_static, only"),
        ({"packing_format": "mlx"}, "packing_format is mlx, only"),
        ({"data_type": "mx_int"}, "data_type is mx_int, only int is implemented"),
        ({"bits": 5}, "quantization_config.bits is 5, only 2, 3, 4, 8"),
        ({"act_bits": 8}, "act_bits is 8, only 16, 32"),
        ({"rotation_config": {"r1": True}}, "rotation_config is {'r1': True}, only None"),
        ({"spinquant_config": {"online_r1_rotation": True}}, "spinquant_config is {'online_r1_rotation': True}, only"),
        ({"packing_format": "auto_round:auto_awq", "bits": 8}, "bits is 8, only 4 is implemented"),
        ({"packing_format": "auto_round:llm_compressor"}, "data_type is int, only mx_fp, mx_fp_rceil, nv_fp"),
        (
            {"packing_format": "auto_round:llm_compressor", "data_type": "mx_fp", "bits": 8},
            "bits is 8, only 4 is implemented",
        ),
        ({"extra_config": {"a.b": {"sym": False}}}, "extra_config.a.b.sym is False, only True is implemented"),
        ({"extra_config": {"a.b": {"bits": 6}}}, "extra_config.a.b.bits is 6, only 2, 3, 4, 8 is implemented"),
        ({"extra_config": {"a.b": {"super_bits": 6}}}, "extra_config.a.b.super_bits is 6, only None is implemented"),
        ({"extra_config": {".*(": {"bits": 8}}}, "extra_config..*( is no regular expression: missing )"),
        ({"extra_config": {"a.b": 8}}, "extra_config.a.b: is 8, expected an object"),
        ({"extra_config": ["a.b"]}, "extra_config is ['a.b'], expected an object"),
        (
            {"block_name_to_quantize": [["model.layers.0"], 3]},
            "block_name_to_quantize is [['model.layers.0'], 3], expected",
        ),
    ],
)
def test_what_auto_round_says_and_nobody_implements_is_refused_by_name(changes: Json, line: str) -> None:
    with pytest.raises((UnsupportedError, FormatError), match=re.escape(line)):
        read(INT4 | changes)


@pytest.mark.parametrize(
    ("weight", "line"),
    [
        ({"dtype": "int4"}, "global_quant_config.weight.dtype is int4, only fp4, fp8_e4m3 is implemented"),
        ({"dtype": "mx", "mx_element_dtype": "fp4"}, "weight.dtype is mx, only fp4"),
        ({"group_size": 16}, "weight.group_size is 16, only 32"),
        ({"scale_format": "e5m3"}, "weight.scale_format is e5m3, only e8m0"),
        (
            {"dtype": "fp8_e4m3", "qscheme": "per_group"},
            "weight.qscheme is per_group, only per_tensor, per_channel, per_block",
        ),
        (
            {"dtype": "fp8_e4m3", "qscheme": "per_block", "block_size": [1, 128], "ch_axis": None},
            "block_size is [1, 128], only",
        ),
        ({"is_dynamic": True}, "weight.is_dynamic is True, only False"),
    ],
)
def test_weights_of_quark_that_nobody_implements_are_refused_by_name(weight: Json, line: str) -> None:
    config = QUARK | {"global_quant_config": {"weight": MX | weight}}
    with pytest.raises(UnsupportedError, match=re.escape(line)):
        read(config)
    layer = QUARK | {"layer_quant_config": {"*experts*": {"weight": MX | weight}}}
    with pytest.raises(UnsupportedError, match=re.escape("layer_quant_config.*experts*.weight.")):
        read(layer)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"algo_config": [{"name": "rotation", "r1": True}]}, "algo_config is rotation, which is not implemented"),
        ({"algo_config": {"name": "quarot"}}, "algo_config is quarot, which is not implemented"),
        (
            {"export": {"weight_format": "fake_quantized"}},
            "export.weight_format is fake_quantized, only real_quantized",
        ),
        ({"global_quant_config": None}, "quantization_config.global_quant_config is missing"),
        (
            {"global_quant_config": {"weight": [MX, MX]}},
            "weight is [{'dtype': 'fp4', 'qscheme': 'per_group', 'group_size': 3..., expected an object",
        ),
    ],
)
def test_what_quark_says_and_nobody_implements_is_refused_by_name(changes: Json, line: str) -> None:
    with pytest.raises((UnsupportedError, FormatError), match=re.escape(line)):
        read(QUARK | changes)


@pytest.mark.parametrize(
    ("kind", "config", "line"),
    [
        ("auto_round", {"bits": 8}, "bits is 8, but model.safetensors"),
        ("auto_round", {"group_size": 128}, "group_size is 128, but model.safetensors"),
        ("auto_round_mxfp4", CONFIGS["auto_round"], "says auto-round, but model.safetensors"),
        ("int4_zero", CONFIGS["int4"], "symmetric is true, but model.safetensors"),
        ("int4", CONFIGS["int4_zero"], "weight_zero_point is missing"),
        ("int8_bytes", CONFIGS["int8_bytes_zero"], "weight_zero_point is missing"),
        ("int8_bytes", CONFIGS["fp8_block"], "says fp8, but model.safetensors"),
        ("int8_bytes_group", CONFIGS["int8_bytes"], "group_size is 64, but model.safetensors"),
        ("quark_mxfp4", CONFIGS["nvfp4_modelopt"], "says modelopt, but model.safetensors"),
        ("fp8_quark_channel", CONFIGS["mxfp4_blocks"], "says mxfp4, but model.safetensors"),
        ("bf16", CONFIGS["auto_round"], "says auto-round, but every tensor is of plain floats"),
    ],
)
def test_a_config_that_says_something_else_than_tensors_is_refused(
    tmp_path: Path, kind: str, config: Json, line: str
) -> None:
    tensors = in_kind(shapes(SMALL, fused=False), kind, is_expert, np.random.default_rng(1))
    full = config if "quant_method" in config else said(kind) | config
    source = write_tensors(tmp_path / "source", CONFIG, tensors, full)
    with pytest.raises(FormatError, match=re.escape(line)):
        prepare(FolderSource(source), DEFAULT)


@pytest.mark.parametrize(("width", "line"), [(64, ""), (48, "of 96 rows 48 are wanted, from 48")])
def test_words_of_zero_points_are_not_cut(tmp_path: Path, width: int, line: str) -> None:
    """Gate and up in one tensor, packed by 32 rows: parts of a multiple of 32 can be taken apart."""
    small = SMALL | {"moe_intermediate_size": width}
    tensors = in_kind(shapes(small, fused=True), "int4_zero", lambda name: "gate_up" in name, np.random.default_rng(1))
    config = CONFIG | {"text_config": {"model_type": "qwen3_5_moe_text", **small}}
    source = FolderSource(write_tensors(tmp_path / "source", config, tensors, CONFIGS["int4_zero"]))
    options = Options(16, 64, 16)
    if not line:
        assert prepare(source, options).plan.layout.expert_bytes > 0
        return
    with pytest.raises(UnsupportedError, match=line):
        prepare(source, options)


def test_an_embedding_is_cut_between_words_of_zero_points(tmp_path: Path) -> None:
    """Its rows take 512 bytes, of which any 8 are written at a time; the words of its source are of 32 rows."""
    small = SMALL | {"hidden_size": 832, "vocab_size": 17500}
    tensors = in_kind(shapes(small), "int4_zero", lambda name: "embed_tokens" in name, np.random.default_rng(1))
    config = CONFIG | {"text_config": {"model_type": "qwen3_5_moe_text", **small}}
    source = write_tensors(tmp_path / "source", config, tensors, CONFIGS["int4_zero"])
    layout = converted(source, tmp_path / "out", Options(16, 64, 16))
    assert (layout.embedding.row_bytes, layout.embedding.encoding) == (512, ZeroPoint(4, 32, "bf16"))
    assert verified(source, tmp_path / "out").sound


@pytest.mark.parametrize("kind", ["gptq_zero", "awq", "auto_round"])
def test_rows_that_do_not_fill_words_of_zero_points_are_refused(tmp_path: Path, kind: str) -> None:
    tensors = in_kind(shapes(SMALL, fused=False), kind, lambda name: "mlp.gate." in name, np.random.default_rng(1))
    source = write_tensors(tmp_path / "source", CONFIG, tensors, CONFIGS[kind])
    with pytest.raises(
        FormatError, match=r"mlp.gate.qweight is of 5 rows, expected 4 bits of each to fill words of 32"
    ):
        prepare(FolderSource(source), DEFAULT)


@pytest.mark.parametrize(
    ("kind", "plane", "shape", "line"),
    [
        ("int8_bytes", "weight_scale", (63, 1), "weight_scale has shape [63, 1], expected [64, 1]"),
        ("int8_bytes", "weight_scale", (64, 3), "expected scales that divide the input width 64"),
        ("int8_bytes_zero", "weight_zero_point", (64,), "weight_zero_point has shape [64], expected [64, 1]"),
        ("int4_zero", "weight_zero_point", (64, 2), "weight_zero_point has shape [64, 2], expected [8, 2]"),
        ("quark_mxfp4", "weight_scale", (64, 4), "weight_scale has shape [64, 4], expected [64, 2]"),
    ],
)
def test_a_plane_of_another_shape_is_refused(
    tmp_path: Path, kind: str, plane: str, shape: tuple[int, ...], line: str
) -> None:
    tensors: dict[str, Any] = dict(in_kind(shapes(SMALL, fused=False), kind, is_expert, np.random.default_rng(1)))
    name = f"{PREFIX}layers.0.mlp.experts.0.gate_proj.{plane}"
    dtype, array = tensors[name]
    tensors[name] = dtype, np.resize(array, shape)
    source = write_tensors(tmp_path / "source", CONFIG, tensors, CONFIGS[kind])
    with pytest.raises(FormatError, match=re.escape(line)):
        prepare(FolderSource(source), DEFAULT)


@pytest.mark.parametrize("block", [32, 128])
def test_blocks_of_whole_floats_are_blocks_of_integers(block: int) -> None:
    said = {"quant_method": "fp8", "weight_block_size": [float(block)] * 2}
    read = read_quantization(json.dumps({"quantization_config": said}).encode())
    assert read is not None
    assert type(read.block) is int
    assert read.block == block
