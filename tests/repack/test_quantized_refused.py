"""Quantized checkpoints that are refused: planes that are missing or wrong, and configs that say something else."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from formats.encodings import Plain
from formats.encodings.sources import STORAGE
from formats.errors import FormatError, UnsupportedError
from formats.quantization import read_quantization
from repack.convert import prepare
from repack.plan import Options
from repack.sources.folder import FolderSource
from tests.fixtures import deepseek_v4_tiny, deepseek_v41_tiny, glm5_next_tiny, muse_spark_tiny, qwen4_tiny
from tests.fixtures.mlx_names import mlx_config
from tests.fixtures.recipe import Stored, write_checkpoint
from tests.repack.checkpoints import PREFIX, SMALL, shapes
from tests.repack.quantized import CONFIGS, Tensors, in_kind, write_tensors
from tests.repack.test_quantized import CONFIG, DEFAULT, checkpoint, converted, is_expert, said

EXPERT0 = f"{PREFIX}layers.0.mlp.experts.0.gate_proj"


def of(kind: str, plane: str, change: Callable[[Any], Any]) -> tuple[str, dict[str, Any]]:
    """(kind, changes): one tensor of the first expert changed, or taken away where change gives None."""
    tensors: Tensors = in_kind(shapes(SMALL, fused=False), kind, is_expert, np.random.default_rng(1))
    name = f"{EXPERT0}.{plane}"
    return kind, {name: change(tensors[name])}


def with_value(value: Any) -> Callable[[Any], Any]:
    """The first element replaced."""

    def change(tensor: Any) -> Any:
        dtype, array = tensor
        array = np.array(array)  # a copy, of a number as well
        array.reshape(-1)[0] = value
        return dtype, array

    return change


def reshaped(*shape: int) -> Callable[[Any], Any]:
    return lambda tensor: (tensor[0], np.resize(tensor[1], shape))


def retyped(dtype: str) -> Callable[[Any], Any]:
    return lambda tensor: (dtype, np.zeros(tensor[1].shape, STORAGE[dtype]))


def gone(tensor: Any) -> None:
    return None


@pytest.mark.parametrize(
    ("case", "line"),
    [
        (
            of("fp8_block", "weight_scale_inv", gone),
            "is F8_E4M3, but EXPERT.weight_scale_inv or EXPERT",
        ),
        (
            of("fp8_block", "weight_scale_inv", reshaped(2, 2)),
            "weight_scale_inv has shape [2, 2], expected [1, 1]",
        ),
        (of("fp8_channel", "weight_scale", retyped("I8")), "EXPERT.weight_scale has dtype I8, expected one of BF16"),
        (of("int4", "weight_scale", gone), "EXPERT.weight_packed is I32, but EXPERT.weight_scale is missing"),
        (of("int4", "weight_scale", reshaped(64, 3)), "expected scales that divide the input width 64"),
        (
            of("int4", "weight_scale", reshaped(64, 1)),
            "group_size is 32, but model.safetensors: EXPERT",
        ),
        (of("int4", "weight_shape", gone), "EXPERT.weight_shape is missing"),
        (
            of("mxfp4_packed", "weight_scale", retyped("I32")),
            "weight_scale has dtype I32, expected U8 or F8_E8M0",
        ),
        (of("mxfp4_packed", "weight_scale", reshaped(64, 4)), "has shape [64, 4], expected [64, 2]"),
        (of("nvfp4_packed", "weight_global_scale", gone), "but EXPERT.weight_global_scale is missing"),
        (of("nvfp4_modelopt", "weight_scale_2", reshaped(64)), "has shape [64], expected one number"),
        (of("mlx_nvfp4_factor", "global_scale", reshaped(64)), "global_scale has shape [64], expected one number"),
        (of("mlx_nvfp4_factor", "global_scale", retyped("BF16")), "global_scale has dtype BF16, expected F32"),
        (of("mlx4", "biases", gone), "EXPERT.weight is U32, but EXPERT.biases is missing"),
        (of("mlx4", "biases", retyped("F16")), "EXPERT.biases has dtype F16, expected BF16"),
        (of("gptq", "qzeros", gone), "EXPERT.qweight is I32, but EXPERT.qzeros is missing"),
        (of("gptq", "g_idx", reshaped(3)), "EXPERT.g_idx has shape [3], expected [64]"),
        (of("awq", "qzeros", reshaped(2, 3)), "EXPERT.qzeros has shape [2, 3], expected [2, 8]"),
    ],
)
def test_a_plane_that_is_missing_or_wrong_is_refused(tmp_path: Path, case: tuple[str, Any], line: str) -> None:
    kind, changes = case
    source = checkpoint(tmp_path / "source", kind, changes=changes)
    with pytest.raises(FormatError, match=re.escape(line.replace("EXPERT", EXPERT0))):
        prepare(FolderSource(source), DEFAULT)


@pytest.mark.parametrize(
    ("case", "line"),
    [
        (
            of("fp8_block", "weight_scale_inv", with_value(np.nan)),
            "weight_scale_inv holds nan (layer 0 expert 0,",
        ),
        (of("fp8_block", "weight", with_value(0x7F)), "weight holds E4M3 0x7f (layer 0 expert 0, row 0, column 0)"),
        (of("fp8_channel", "weight_scale", with_value(0x7F80)), "weight_scale holds inf"),
        (of("fp8_mx", "weight", with_value(0xFF)), "weight holds E4M3 0xff (layer 0 expert 0, row 0, column 0)"),
        (of("fp8_mx", "weight_scale", with_value(255)), "weight_scale holds E8M0 0xff (layer 0 expert 0, row 0"),
        (
            of("fp8_mx_mlx", "weight", with_value(0x38387F38)),
            "weight holds E4M3 0x7f (layer 0 expert 0, row 0, column 1)",
        ),
        (of("int4", "weight_scale", with_value(0x7FC0)), "weight_scale holds nan"),
        (
            of("int4", "weight_shape", with_value(3)),
            "weight_shape holds [3, 64] (layer 0 expert 0, row 0",
        ),
        (of("mxfp4_packed", "weight_scale", with_value(255)), "weight_scale holds E8M0 0xff (layer 0 expert 0, row 0"),
        (of("nvfp4_packed", "weight_scale", with_value(0x7F)), "weight_scale holds E4M3 0x7f"),
        (
            of("nvfp4_packed", "weight_global_scale", with_value(0)),
            "weight_global_scale holds 0 (layer 0 expert 0",
        ),
        (of("mlx4", "scales", with_value(0x7F80)), "scales holds inf"),
        (of("mlx_nvfp4_factor", "global_scale", with_value(np.inf)), "global_scale holds inf"),
        (of("gptq", "scales", with_value(np.inf)), "scales holds inf"),
        (
            of("gptq", "g_idx", with_value(1)),
            "row 0, column 0), expected 0: act-order (desc_act) is not",
        ),
        (of("gptq", "qzeros", with_value(0x77777776)), "qzeros holds zero point 7 (layer 0 expert 0, row 0"),
    ],
)
def test_content_that_no_weight_may_have_is_refused(tmp_path: Path, case: tuple[str, Any], line: str) -> None:
    kind, changes = case
    source = checkpoint(tmp_path / "source", kind, changes=changes)
    with pytest.raises(FormatError, match=re.escape(line)):
        converted(source, tmp_path / "out", Options(bits=8))


@pytest.mark.parametrize(
    ("kind", "config", "error", "line"),
    [
        (
            "fp8_block",
            None,
            FormatError,
            "config.json holds no quantization_config, but",
        ),
        (
            "fp8_block",
            CONFIGS["gptq"],
            FormatError,
            "says gptq, but model.safetensors: EXPERT.weight",
        ),
        (
            "int4",
            said("int4") | {"transform_config": {"config_groups": {"R4": {"apply": [{"location": "input"}]}}}},
            UnsupportedError,
            "transform_config.config_groups.R4.apply[0].location is input, only weight_input, weight_output",
        ),
        ("bf16", CONFIGS["fp8_block"], FormatError, "says fp8, but every tensor is of plain floats"),
        ("int4", CONFIGS["mlx4"], FormatError, "quantization says mlx, but"),
        (
            "gptq",
            {**said("gptq"), "bits": 8},
            FormatError,
            "bits is 8, but model.safetensors: EXPERT",
        ),
        ("gptq", {**said("gptq"), "group_size": 128}, FormatError, "group_size is 128, but"),
        (
            "gptq",
            {**said("gptq"), "desc_act": True},
            UnsupportedError,
            "desc_act is true: GPTQ with act-order",
        ),
        (
            "gptq",
            {**said("gptq"), "checkpoint_format": "marlin"},
            UnsupportedError,
            "checkpoint_format is marlin",
        ),
        ("awq", {**said("awq"), "version": "gemv"}, UnsupportedError, "version is gemv, only gemm, GEMM"),
        ("awq", {**said("awq"), "version": None, "format": "gemv"}, UnsupportedError, "format is gemv, only gemm"),
        ("mlx4", {**said("mlx4"), "bits": 8}, FormatError, "bits of EXPERT is 8, but"),
        (
            "mlx4",
            {**said("mlx4"), EXPERT0: False},
            FormatError,
            "EXPERT is false, but it is MLX affine 4-bit",
        ),
        (
            "mlx4",
            {**said("mlx4"), "mode": "mxfp6"},
            UnsupportedError,
            "mode is mxfp6, only affine",
        ),
        ("fp8_mx_mlx", said("mlx_mxfp4"), FormatError, "bits of EXPERT is 4, but"),
        ("mlx8", said("fp8_mx_mlx"), FormatError, "mode of EXPERT is mxfp8, but"),
        ("fp8_mx", CONFIGS["fp8_block"], FormatError, "says fp8, but model.safetensors: EXPERT.weight is mxfp8"),
        (
            "fp8_block",
            {"quant_method": "fp8", "weight_block_size": [64, 64]},
            UnsupportedError,
            "only [128, 128]",
        ),
        (
            "fp8_block",
            {"quant_method": "bitsandbytes"},
            UnsupportedError,
            "is bitsandbytes, supported are fp8",
        ),
        (
            "nvfp4_modelopt",
            {"quant_method": "modelopt", "quant_algo": "W4A16_AWQ"},
            UnsupportedError,
            "quant_algo is W4",
        ),
        (
            "nvfp4_modelopt",
            {
                "quant_method": "modelopt",
                "quant_algo": "FP8",
                "quantization": {"quant_algo": "NVFP4", "group_size": 16},
            },
            UnsupportedError,
            "quant_algo differs from",
        ),
        (
            "nvfp4_modelopt",
            {"quant_method": "modelopt", "ignore": ["lm_head"], "quantization": {"quant_algo": "NVFP4"}},
            UnsupportedError,
            "ignore differs from",
        ),
    ],
)
def test_a_config_that_contradicts_the_tensors_is_refused(
    tmp_path: Path, kind: str, config: Any, error: type[Exception], line: str
) -> None:
    tensors = in_kind(shapes(SMALL, fused=False), kind, is_expert, np.random.default_rng(1))
    source = write_tensors(tmp_path / "source", CONFIG, tensors, config)
    with pytest.raises(error, match=re.escape(line.replace("EXPERT", EXPERT0))):
        prepare(FolderSource(source), DEFAULT)


def test_act_order_of_gptq_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    first, later = (f"{PREFIX}layers.{layer}.mlp.experts.{expert}.up_proj.g_idx" for layer, expert in ((1, 0), (1, 3)))
    shuffled = ("I32", np.arange(64, dtype=np.int32)[::-1] // 32)
    source = checkpoint(tmp_path / "source", "gptq", changes={first: shuffled})
    with pytest.raises(FormatError, match=re.escape(f"{first} holds group 1 (row 0, column 0), expected 0: act-order")):
        prepare(FolderSource(source), DEFAULT)
    source = checkpoint(tmp_path / "source", "gptq", changes={later: shuffled})
    with pytest.raises(FormatError, match=re.escape(f"{later} holds group 1 (layer 1 expert 3, row 0, column 0)")):
        converted(source, tmp_path / "out")


def test_mlx_overrides_by_path_are_what_the_tensors_must_be(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    gate = f"{PREFIX}layers.0.mlp.gate"
    listing = shapes(SMALL, fused=False)
    tensors = in_kind(listing, "mlx4", is_expert, rng) | in_kind(
        {f"{gate}.weight": listing[f"{gate}.weight"]}, "mlx8", lambda _: True, rng
    )
    del tensors[f"{PREFIX}layers.0.mlp.gate.weight"]
    tensors |= in_kind({f"{gate}.weight": ("BF16", (5, 64))}, "mlx8", lambda _: True, rng)
    config = {**said("mlx4"), gate: {"bits": 8, "group_size": 32}}
    source = write_tensors(tmp_path / "source", CONFIG, tensors, config)
    assert converted(source, tmp_path / "out").tensors["layers.0.mlp.gate"].encoding == Plain("f32")


@pytest.mark.parametrize(
    "case",
    [deepseek_v4_tiny.CASES["deepseek_v4"], glm5_next_tiny.CASES["glm5_next"], qwen4_tiny.CASES["qwen4_exp"]],
)
def test_mlx_files_of_a_model_that_mlx_lm_does_not_have_are_refused_by_name(case: Any, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, case.tensors(), mlx_config(case.config))
    with pytest.raises(
        UnsupportedError, match=r"config\.json: quantization: \w+ as MLX quantizes it is not implemented"
    ):
        prepare(FolderSource(tmp_path), Options())


def test_mlx_files_of_a_model_with_ngrams_that_mlx_lm_does_not_have_are_refused_by_name(tmp_path: Path) -> None:
    """mlx-lm leaves the tensors out that the config tells of, and refuses the config."""
    case = deepseek_v41_tiny.CASES["deepseek_v41_mlx"]
    with_ngrams = deepseek_v41_tiny.deepseek_v41()["text_config"]
    write_checkpoint(tmp_path, case.tensors(), case.config | {"text_config": with_ngrams})
    with pytest.raises(
        UnsupportedError,
        match=r"config\.json: engram_layer_ids is \[1, 4\], but \S+safetensors has the names of MLX, which knows no",
    ):
        prepare(FolderSource(tmp_path), Options())


def test_mlx_files_whose_config_says_mxfp8_may_have_mxfp4_where_no_module_is_named(tmp_path: Path) -> None:
    """mlx-lm says mxfp8 of DeepSeek's FP8 with FP4 experts; what it says of a module holds."""
    case = deepseek_v41_tiny.CASES["deepseek_v41_mlx_fp8"]
    experts = f"model.layers.0.mlp.{deepseek_v41_tiny.STACK}.gate_proj"
    said = case.config["quantization"] | {experts: {"bits": 8, "group_size": 32, "mode": "mxfp8"}}
    write_checkpoint(tmp_path, case.tensors(), case.config | {"quantization": said})
    with pytest.raises(FormatError, match=f"bits of {re.escape(experts)} is 8, but .* has 4"):
        prepare(FolderSource(tmp_path), Options())


def test_mlx_files_of_muse_spark_with_gates_of_another_temperature_are_refused(tmp_path: Path) -> None:
    case = muse_spark_tiny.CASES["muse_spark_mlx_4bit"]
    write_checkpoint(
        tmp_path, case.tensors(), case.config | {"text_config": case.text | {"residual_gate_temperature": 0.4}}
    )
    with pytest.raises(UnsupportedError, match=r"residual_gate_temperature is 0\.4, but MLX makes gates of 0\.3"):
        prepare(FolderSource(tmp_path), Options())


def test_a_factor_that_mlx_says_a_module_has_must_be_there(tmp_path: Path) -> None:
    case = muse_spark_tiny.CASES["muse_spark_mlx_fp4"]
    tensors, name = case.tensors(), f"{muse_spark_tiny.AT}.layers.2.mlp.experts.up_proj"
    del tensors[f"{name}.global_scale"]
    write_checkpoint(tmp_path, tensors, case.config)
    with pytest.raises(FormatError, match=rf"{re.escape(name)}\.weight is U32, but .*\.global_scale is missing"):
        prepare(FolderSource(tmp_path), Options())


@pytest.mark.parametrize("plane", ["weight", "scales", "biases"])
def test_attention_of_mlx_whose_rows_are_not_of_its_parts_is_refused(plane: str, tmp_path: Path) -> None:
    case = muse_spark_tiny.CASES["muse_spark_mlx_4bit"]
    tensors, name = case.tensors(), f"{muse_spark_tiny.AT}.layers.1.self_attn.qkvg_proj.{plane}"
    dtype, (_, *rest), data = tensors[name]
    tensors[name] = Stored(dtype, (191, *rest), data[:191])
    write_checkpoint(tmp_path, tensors, case.config)
    with pytest.raises(
        FormatError, match=rf"{plane} has shape \[191, \d+\], expected rows of 4 parts, 4 to 2 to 2 to 4"
    ):
        prepare(FolderSource(tmp_path), Options())


def test_a_part_of_mlx_beside_the_matrix_that_holds_it_is_refused(tmp_path: Path) -> None:
    case = muse_spark_tiny.CASES["muse_spark_mlx_4bit"]
    tensors, name = case.tensors(), f"{muse_spark_tiny.AT}.layers.0.self_attn.k_proj.weight"
    tensors[name] = Stored("BF16", (32, 64), np.zeros((32, 64), "<u2"))
    write_checkpoint(tmp_path, tensors, case.config)
    with pytest.raises(FormatError, match=rf"{re.escape(name)} is there, but \S+\.qkvg_proj\.weight holds it, too"):
        prepare(FolderSource(tmp_path), Options())


def test_a_config_inside_text_config_or_beside_it_is_read(tmp_path: Path) -> None:
    tensors = in_kind(shapes(SMALL, fused=False), "int4", is_expert, np.random.default_rng(1))
    text = {**CONFIG["text_config"], "quantization_config": CONFIGS["int4"]}  # type: ignore[dict-item]
    source = write_tensors(tmp_path / "inside", {**CONFIG, "text_config": text}, tensors, None)
    assert prepare(FolderSource(source), DEFAULT).plan.layout.expert_bytes > 0
    tensors = in_kind(shapes(SMALL, fused=False), "nvfp4_modelopt", is_expert, np.random.default_rng(1))
    source = write_tensors(tmp_path / "beside", CONFIG, tensors, None)
    (source / "hf_quant_config.json").write_text('{"quantization": {"quant_algo": "NVFP4", "group_size": 16}}')
    assert prepare(FolderSource(source), DEFAULT).plan.layout.expert_bytes > 0


def test_a_weight_that_stands_in_two_encodings_is_refused(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    plain = in_kind({f"{EXPERT0}.weight": ("BF16", (64, 64))}, "bf16", is_expert, rng)
    source = checkpoint(tmp_path / "source", "int4", changes=plain)
    with pytest.raises(FormatError, match=re.escape(f"{EXPERT0}.weight stands twice, as {EXPERT0}.weight_packed")):
        prepare(FolderSource(source), DEFAULT)


@pytest.mark.parametrize(
    ("plane", "change", "line"),
    [
        ("weight_packed", reshaped(32, 8), "experts.2.gate_proj.weight_packed has shape [32, 8]"),
        ("weight_scale", retyped("I32"), "experts.2.gate_proj.weight_scale has dtype I32"),
        ("weight_scale", retyped("F16"), "experts.2.gate_proj.weight_packed is int4, f16 scales"),
        ("weight_shape", gone, "experts.2.gate_proj.weight_shape is missing"),
    ],
)
def test_an_expert_that_is_not_kept_as_the_first_is_refused(
    plane: str, change: Callable[[Any], Any], line: str, tmp_path: Path
) -> None:
    tensors: Tensors = in_kind(shapes(SMALL, fused=False), "int4", is_expert, np.random.default_rng(1))
    name = f"{EXPERT0.replace('experts.0', 'experts.2')}.{plane}"
    source = checkpoint(tmp_path / "source", "int4", changes={name: change(tensors[name])})
    with pytest.raises((FormatError, UnsupportedError), match=re.escape(line)):
        prepare(FolderSource(source), DEFAULT)


def test_an_expert_that_stands_in_two_encodings_is_refused(tmp_path: Path) -> None:
    name = f"{EXPERT0.replace('experts.0', 'experts.2')}.weight"
    plain = in_kind({name: ("BF16", (64, 64))}, "bf16", is_expert, np.random.default_rng(1))
    source = checkpoint(tmp_path / "source", "int4", changes=plain)
    with pytest.raises(FormatError, match=re.escape(f"{name} has no place in qwen3_5_moe")):
        prepare(FolderSource(source), DEFAULT)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"dynamic": ["-:.*"]}, "config.json: quantization_config.dynamic is ['-:.*'], expected an object"),
        ({"dynamic": {"+:x": 4}}, "quantization_config.dynamic.+:x: is 4, expected an object"),
    ],
)
def test_what_gptq_says_of_modules_must_be_an_object(changes: dict[str, Any], line: str) -> None:
    config = {"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 128, **changes}}
    with pytest.raises(FormatError, match=re.escape(line)):
        read_quantization(json.dumps(config).encode())


def test_an_expert_that_is_missing_is_named(tmp_path: Path) -> None:
    listing = shapes(SMALL, fused=False)
    tensors = in_kind(listing, "int4", is_expert, np.random.default_rng(1))
    at = f"{PREFIX}layers.1.mlp.experts.3.up_proj"
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith(at)}
    source = write_tensors(tmp_path / "source", CONFIG, kept, CONFIGS["int4"])
    with pytest.raises(FormatError, match=re.escape(f"{at}.weight is missing from the checkpoint")):
        prepare(FolderSource(source), DEFAULT)


def test_an_expert_in_another_encoding_than_the_others_is_refused(tmp_path: Path) -> None:
    other = in_kind({f"{EXPERT0}.weight": ("BF16", (64, 64))}, "bf16", is_expert, np.random.default_rng(1))
    gone_names = {f"{EXPERT0}.{name}": None for name in ("weight_packed", "weight_scale", "weight_shape")}
    source = checkpoint(tmp_path / "source", "int4", changes={**gone_names, **other})
    with pytest.raises(UnsupportedError, match="is int4, bf16 scales per 32, expected bf16 as"):
        prepare(FolderSource(source), DEFAULT)


def test_scales_of_activations_are_skipped_by_name(tmp_path: Path) -> None:
    scales = {
        f"{EXPERT0}.input_scale": ("F32", np.ones((), np.float32)),
        f"{PREFIX}layers.1.self_attn.k_proj.k_scale": ("F32", np.ones((), np.float32)),
    }
    source = checkpoint(tmp_path / "source", "nvfp4_modelopt", changes=scales)
    skipped = prepare(FolderSource(source), DEFAULT).plan.skipped
    assert [(s.what, s.tensors) for s in skipped] == [("scales of quantized activations", 2)]
