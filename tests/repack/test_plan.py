"""The plan: sizes worked out by hand, where rows come from, and every refusal with its line."""

import re
from collections.abc import Mapping
from typing import Any

import pytest

from formats.config import read_config
from formats.encodings import Affine, Plain
from formats.encodings.sources import PlainSource
from formats.errors import FormatError, RequestError, UnsupportedError
from repack.carriers import without_head_axes
from repack.plan import Options, Plan, SourceMatrix, SourcePlane
from repack.planner import make_plan
from tests.repack.checkpoints import PREFIX, QWEN3_5_397B, SMALL, Shapes, config_json, shapes, source_tensors

LAYER0 = f"{PREFIX}layers.0."


DEFAULT = Options()


def refusal(kind: type[Exception], line: str) -> "pytest.RaisesExc[Exception]":
    """The error of a call must hold this text."""
    return pytest.raises(kind, match=re.escape(line))


def plan(
    listing: Shapes | None = None, text: Mapping[str, Any] = SMALL, options: Options = DEFAULT, **outer: Any
) -> Plan:
    config = read_config(config_json(text, **outer))
    return make_plan(source_tensors(shapes(text) if listing is None else listing), config, options)


# ---- sizes


def test_an_expert_of_qwen3_5_397b_is_432_pages() -> None:
    # gate and up: 1024 x 4096 / 2 codes + 2 x 1024 x 64 x 2 scales and biases = 2,359,296; down the same
    layout = plan(text=QWEN3_5_397B).layout
    (record,) = {layer.record for _, layer in layout.moe_layers()}
    assert record.record_bytes == 7_077_888 == 432 * 16_384 == record.payload_bytes
    assert layout.expert_bytes == 60 * 512 * 7_077_888


def test_the_bytes_read_are_those_of_the_text_model() -> None:
    listing = shapes(QWEN3_5_397B)
    every = sum(tensor.nbytes for tensor in source_tensors(listing).values())
    assert plan(listing, QWEN3_5_397B).source_bytes == every


def test_an_embedding_row_of_qwen3_5_397b_holds_codes_scales_biases_and_checksum() -> None:
    embedding = plan(text=QWEN3_5_397B).layout.embedding
    assert (embedding.rows, embedding.row_bytes) == (248320, 4416)  # 4096 + 128 + 128 + 8, on 64


def test_files_cover_the_layout_and_units_cover_the_files() -> None:
    made = plan()
    files = {file.name: file for file in made.files()}
    assert sorted(files) == ["embedding.bin", "experts/layer-000.bin", "experts/layer-001.bin", "resident.bin"]
    assert sum(file.nbytes for file in files.values()) == made.layout.total_bytes
    assert sum(file.source_bytes for file in files.values()) == made.source_bytes
    for file in files.values():
        assert sum(unit.nbytes for unit in file.units) == file.nbytes


def test_resident_tensors_stand_in_model_order() -> None:
    names = [tensor.name for tensor in plan().layout.resident]
    assert names[:3] == [
        "layers.0.input_layernorm",
        "layers.0.linear_attn.in_proj_qkv",
        "layers.0.linear_attn.in_proj_z",
    ]
    assert names[-2:] == ["norm", "lm_head"]
    assert names.index("layers.0.mlp.shared_expert_gate") < names.index("layers.1.input_layernorm")


# ---- encodings


def encodings(made: Plan) -> dict[str, Any]:
    return {tensor.name: tensor.encoding for tensor in made.layout.resident}


def test_matrices_are_quantized_and_sensitive_tensors_stay() -> None:
    made = plan(options=Options(4, 32, 8))
    found = encodings(made)
    assert found["lm_head"] == found["layers.0.linear_attn.in_proj_qkv"] == Affine(8, 64, "bf16")
    for name in ("input_layernorm", "linear_attn.in_proj_a", "linear_attn.conv1d", "linear_attn.dt_bias", "mlp.gate"):
        assert found[f"layers.0.{name}"] == Plain("bf16")
    assert found["layers.0.linear_attn.A_log"] == found["layers.0.linear_attn.norm"] == Plain("f32")
    assert made.layout.embedding.encoding == Affine(8, 64, "bf16")
    layer = made.layout.layers[0]
    assert layer is not None
    assert [part.encoding for part in layer.record.parts] == [Affine(4, 32, "bf16")] * 3


def test_16_bits_are_as_they_arrive() -> None:
    made = plan(shapes(SMALL, dtype="F16"), options=Options(16, 64, 16))
    assert set(encodings(made).values()) == {Plain("f16"), Plain("f32")}
    layer = made.layout.layers[0]
    assert layer is not None
    assert {part.encoding for part in layer.record.parts} == {Plain("f16")}


def test_scales_of_an_f16_source_are_f16() -> None:
    made = plan(shapes(SMALL, dtype="F16"))
    assert encodings(made)["lm_head"] == Affine(8, 64, "f16")
    layer = made.layout.layers[0]
    assert layer is not None
    assert layer.record.parts[0].encoding == Affine(4, 64, "f16")


def test_scales_of_an_f32_source_are_bf16() -> None:
    assert encodings(plan(shapes(SMALL, dtype="F32")))["lm_head"] == Affine(8, 64, "bf16")


def test_a_resident_width_that_64_does_not_divide_takes_groups_of_32() -> None:
    text = SMALL | {"shared_expert_intermediate_size": 96}
    assert encodings(plan(text=text))["layers.0.mlp.shared_expert.down_proj"] == Affine(8, 32, "bf16")


def test_the_convolution_loses_its_axis_of_one() -> None:
    assert plan().layout.tensors["layers.0.linear_attn.conv1d"].shape == (128, 4)
    assert plan().layout.tensors["layers.0.mlp.shared_expert_gate"].shape == (1, 64)


def test_group_size_is_no_option_of_16_bits() -> None:
    assert Options(16, 32, 8).facts() == Options(16, 128, 8).facts()
    assert Options(4, 32, 8).facts() != Options(4, 128, 8).facts()


# ---- where rows come from


def test_gate_rows_come_first_in_the_fused_tensor() -> None:
    made = plan()
    offset = source_tensors(shapes(SMALL))[f"{LAYER0}mlp.experts.gate_up_proj"].offset
    gate, up, down = made.experts[0][3]
    row = 64 * 2
    assert list(gate.ranges()) == [("model.safetensors", offset + 3 * 128 * row, 64 * row)]
    assert list(up.ranges()) == [("model.safetensors", offset + (3 * 128 + 64) * row, 64 * row)]
    assert (gate.rows, up.rows, down.rows) == (64, 64, 64)
    assert down.tensor == f"{LAYER0}mlp.experts.down_proj"


def test_fused_and_per_expert_sources_give_one_layout() -> None:
    fused, separate = plan(), plan(shapes(SMALL, fused=False))
    assert fused.layout == separate.layout
    assert separate.experts[1][4][2].tensor == f"{PREFIX}layers.1.mlp.experts.4.down_proj.weight"


def test_a_text_model_saved_alone_has_another_prefix() -> None:
    assert plan(shapes(SMALL, prefix="model.")).layout == plan().layout


def test_a_slice_of_rows_begins_where_they_do() -> None:
    source = PlainSource("bf16")
    (spec,) = source.planes(10, 8)
    matrix = SourceMatrix(source, (SourcePlane(spec, "t", "f", "BF16", 1000),), 10, 10, 8)
    assert list(matrix.slice(3, 2).ranges()) == [("f", 1000 + 3 * 16, 2 * 16)]
    assert list(matrix.every(2, 1).slice(1, 2).ranges()) == [("f", 1000, 10 * 16)]
    assert [matrix.every(2, 1).slice(1, 2).first, matrix.every(2, 1).slice(1, 2).step] == [3, 2]


def test_a_tied_lm_head_is_made_of_the_embedding() -> None:
    listing = shapes(SMALL)
    del listing["lm_head.weight"]
    made = plan(listing, tie_word_embeddings=True)
    assert made.resident[-1] == made.embedding
    assert made.layout.resident[-1].name == "lm_head"


def test_a_tied_lm_head_that_is_stored_all_the_same_is_the_head() -> None:
    """A head that was trained apart: transformers' tie_weights ties no two tensors that are stored and differ."""
    made = plan(tie_word_embeddings=True)
    assert (made.resident[-1].tensor, made.skipped) == ("lm_head.weight", ())
    listing = shapes(SMALL) | {"lm_head.bias": ("BF16", (96,))}
    with refusal(FormatError, "lm_head.bias has no place in"):
        plan(listing, tie_word_embeddings=True)


def test_tensors_of_any_shape_and_name_are_refused_in_one_line_where_mlx_is_looked_for() -> None:
    with refusal(FormatError, "linear_attn.conv1d.weight has shape [], expected [128, 1, 4]"):
        plan(shapes(SMALL) | {f"{LAYER0}linear_attn.conv1d.weight": ("BF16", ())})
    split: Shapes = {f"{PREFIX}layers.0.self_attn.embed_q.weight": ("BF16", (2, 3, 4)), "x": ("BF16", (1, 1, 1))}
    found = {tensor.name: tensor.shape for tensor in without_head_axes(source_tensors(split)).values()}
    assert list(found.values()) == [(6, 4), (1, 1, 1)]


def test_vision_and_multi_token_prediction_are_skipped_and_counted() -> None:
    listing = shapes(SMALL) | {
        "model.visual.blocks.0.attn.qkv.weight": ("BF16", (8, 8)),
        "model.visual.pos_embed.weight": ("F32", (8, 8)),
        "mtp.fc.weight": ("BF16", (4, 8)),
    }
    assert [(s.what, s.tensors, s.nbytes) for s in plan(listing).skipped] == [
        ("multi-token prediction", 1, 64),
        ("the vision tower", 2, 384),
    ]


# ---- refusals


def test_a_missing_tensor_is_named() -> None:
    listing = shapes(SMALL)
    del listing[f"{LAYER0}linear_attn.A_log"]
    with pytest.raises(
        FormatError, match=re.escape(f"{LAYER0}linear_attn.A_log is missing from the checkpoint, expected")
    ):
        plan(listing)


def test_a_missing_expert_is_named() -> None:
    listing = shapes(SMALL, fused=False)
    del listing[f"{LAYER0}mlp.experts.3.up_proj.weight"]
    with refusal(FormatError, "experts.3.up_proj.weight is missing"):
        plan(listing)


def test_a_layer_without_any_experts_is_named() -> None:
    listing = {name: spec for name, spec in shapes(SMALL).items() if "layers.1.mlp.experts" not in name}
    with refusal(FormatError, "layers.1.mlp.experts.gate_up_proj is missing"):
        plan(listing)


def test_another_shape_is_named_with_both() -> None:
    listing = shapes(SMALL) | {f"{LAYER0}mlp.experts.down_proj": ("BF16", (5, 64, 65))}
    with refusal(FormatError, "down_proj has shape [5, 64, 65], expected [5, 64, 64]"):
        plan(listing)


def test_a_scalar_where_a_matrix_should_be_is_refused() -> None:
    with refusal(FormatError, "lm_head.weight has shape [], expected [96, 64]"):
        plan(shapes(SMALL) | {"lm_head.weight": ("BF16", ())})


def test_an_unknown_tensor_is_refused_by_name() -> None:
    listing = shapes(SMALL) | {f"{LAYER0}mlp.bonus.weight": ("BF16", (1,))}
    with refusal(FormatError, f"model.safetensors: {LAYER0}mlp.bonus.weight has no place in"):
        plan(listing)


def test_a_layer_beyond_the_config_is_refused() -> None:
    listing = shapes(SMALL) | {f"{PREFIX}layers.2.input_layernorm.weight": ("BF16", (64,))}
    with refusal(FormatError, "layers.2.input_layernorm.weight has no place"):
        plan(listing)


def test_an_expert_beyond_the_config_is_refused() -> None:
    listing = shapes(SMALL, fused=False) | {f"{LAYER0}mlp.experts.5.up_proj.weight": ("BF16", (64, 64))}
    with refusal(FormatError, "experts.5.up_proj.weight has no place"):
        plan(listing)


def test_a_layer_with_its_experts_twice_is_refused() -> None:
    listing = shapes(SMALL) | shapes(SMALL, fused=False)
    with refusal(FormatError, "layer 0 has its experts twice"):
        plan(listing)


def test_a_quantized_tensor_is_refused_with_its_dtype() -> None:
    listing = shapes(SMALL) | {"lm_head.weight": ("F8_E4M3", (96, 64))}
    with refusal(FormatError, "lm_head.weight is F8_E4M3, but lm_head.weight_scale_inv or"):
        plan(listing)
    listing = shapes(SMALL) | {"lm_head.weight": ("I32", (96, 64))}
    with refusal(UnsupportedError, "lm_head.weight has dtype I32, expected one of BF16, F16, F32"):
        plan(listing)


def test_experts_of_two_dtypes_in_a_layer_are_refused() -> None:
    listing = shapes(SMALL, fused=False) | {f"{LAYER0}mlp.experts.2.up_proj.weight": ("F16", (64, 64))}
    with refusal(UnsupportedError, "experts.2.up_proj.weight is f16, expected bf16 as"):
        plan(listing)


def test_a_group_that_does_not_divide_names_the_sizes_that_fit() -> None:
    with pytest.raises(
        RequestError, match=re.escape("width 64 is not a multiple of --group-size 128, expected --group-size 32 or 64")
    ):
        plan(options=Options(group_size=128))


def test_a_width_that_no_group_divides_names_the_way_out() -> None:
    text = SMALL | {"moe_intermediate_size": 40}
    with pytest.raises(
        RequestError,
        match=re.escape("down_proj: input width 40 is not a multiple of --group-size 64, expected --bits 16"),
    ):
        plan(text=text)
    assert plan(text=text, options=Options(bits=16)).layout.expert_bytes > 0


def test_a_resident_width_that_no_group_divides_names_the_way_out() -> None:
    text = SMALL | {"shared_expert_intermediate_size": 40}
    with pytest.raises(
        RequestError,
        match=re.escape("width 40 is not a multiple of 64 or 32; keep it as it is with --resident-bits 16"),
    ):
        plan(text=text)
    assert plan(text=text, options=Options(resident_bits=16)).layout.resident_bytes > 0
