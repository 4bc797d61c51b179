"""Conversions of quantized checkpoints: what is kept to the bit, what is rounded, and what is refused."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from formats.container import open_container
from formats.encodings import FP8, Affine, Encoding, Plain, Symmetric
from formats.errors import RequestError
from formats.layout import Layout
from formats.origins import Origin, read_origins
from repack.convert import convert, prepare
from repack.findings import Verification
from repack.plan import Options
from repack.report import inspect
from repack.sources.folder import FolderSource
from repack.tables import inspection_text
from repack.verify import verify_container
from runtime import Engine
from tests.containers import write_container
from tests.repack.checkpoints import PREFIX, SMALL, shapes
from tests.repack.quantized import CONFIGS, KINDS, in_kind, source_encoding, write_tensors

CONFIG = {"model_type": "qwen3_5_moe", "text_config": {"model_type": "qwen3_5_moe_text", **SMALL}}
STACKED = ("bf16", "fp8_block", "fp8_channel", "mxfp4_blocks", "mlx4")  # kinds that occur with experts on one axis
DEFAULT = Options()


NONE: Mapping[str, Any] = {}


def said(kind: str) -> dict[str, Any]:
    """The config of a kind, to be changed."""
    return dict(CONFIGS[kind] or {})


def is_expert(name: str) -> bool:
    return ".experts." in name


def is_linear(name: str) -> bool:
    return is_expert(name) or name.endswith(("q_proj.weight", "o_proj.weight", "shared_expert.down_proj.weight"))


def checkpoint(
    folder: Path,
    kind: str,
    chosen: Callable[[str], bool] = is_expert,
    changes: Mapping[str, Any] = NONE,
    *,
    fused: bool = False,
) -> Path:
    """A small Qwen3.5 with the chosen matrices in a kind; `changes` replace tensors, None takes one away."""
    tensors: dict[str, Any] = dict(in_kind(shapes(SMALL, fused=fused), kind, chosen, np.random.default_rng(1)))
    tensors |= changes
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    return write_tensors(folder, CONFIG, kept, CONFIGS[kind])


def converted(source: Path, out: Path, options: Options = DEFAULT) -> Layout:
    convert(prepare(FolderSource(source), options), out)
    return open_container(out).index.layout


def verified(source: Path, out: Path) -> Verification:
    return verify_container(out, FolderSource(source))


def parts(layout: Layout) -> list[Encoding]:
    return [part.encoding for layer in layout.layers if layer is not None for part in layer.record.parts]


# ---- kept to the bit


def test_which_gptq_it_is_may_be_said_by_format(tmp_path: Path) -> None:
    """As GPTQModel calls checkpoint_format, which it still writes beside it: zero points differ by one."""
    tensors = in_kind(shapes(SMALL, fused=False), "gptq_v2", is_expert, np.random.default_rng(1))
    config = said("gptq_v2")
    source = write_tensors(tmp_path / "source", CONFIG, tensors, config)
    renamed = {"format" if key == "checkpoint_format" else key: value for key, value in config.items()}
    other = write_tensors(tmp_path / "other", CONFIG, tensors, renamed)
    converted(source, tmp_path / "out")
    converted(other, tmp_path / "other_out")
    name = "experts/layer-000.bin"
    assert (tmp_path / "other_out" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()


def test_a_module_of_mlx_that_says_no_mode_is_affine_whatever_the_others_are(tmp_path: Path) -> None:
    """mlx-lm's Qwen3 MoE with --q-mode mxfp4: its routers say bits and group_size alone (its quant_predicate)."""
    tensors = in_kind(shapes(SMALL, fused=False), "mlx_mxfp4", is_expert, np.random.default_rng(1))
    gates = [f"{PREFIX}layers.{layer}.mlp.gate" for layer in range(2)]
    tensors |= in_kind({f"{gate}.weight": ("BF16", (5, 64)) for gate in gates}, "mlx8", bool, np.random.default_rng(2))
    config = said("mlx_mxfp4") | {gate: {"group_size": 32, "bits": 8} for gate in gates}
    layout = converted(write_tensors(tmp_path / "source", CONFIG, tensors, config), tmp_path / "out")
    assert {encoding.id for encoding in parts(layout)} == {"mxfp4"}
    assert verified(tmp_path / "source", tmp_path / "out").sound


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "bf16" and not kind.startswith("fp8")])
def test_experts_that_arrive_quantized_are_kept_to_the_bit(tmp_path: Path, kind: str) -> None:
    source = checkpoint(tmp_path / "source", kind)
    layout = converted(source, tmp_path / "out")
    assert set(parts(layout)) == {source_encoding(kind, 64, 64).exact(64)}
    result = verified(source, tmp_path / "out")
    assert result.sound
    (experts,) = (c for c in result.comparisons if c.tensors == 2 * 5 * 3)
    assert (experts.source, experts.exact, experts.max_abs_error) == (source_encoding(kind, 64, 64).label, True, 0.0)


def test_groups_of_compressed_tensors_may_be_of_several_sizes_and_whole_rows(tmp_path: Path) -> None:
    def is_down(name: str) -> bool:
        return is_expert(name) and "down_proj" in name

    def others(name: str) -> bool:
        return is_expert(name) and not is_down(name)

    listing, rng = shapes(SMALL, fused=False), np.random.default_rng(1)
    tensors = in_kind({name: found for name, found in listing.items() if not is_down(name)}, "int4", others, rng)
    tensors |= in_kind({name: found for name, found in listing.items() if is_down(name)}, "int8_channel", is_down, rng)
    groups = {kind: {**said(kind)["config_groups"]["group_0"]} for kind in ("int4", "int8_channel")}
    config = said("int4") | {"config_groups": groups, "transform_config": {}}
    layout = converted(write_tensors(tmp_path / "source", CONFIG, tensors, config), tmp_path / "out")
    assert parts(layout)[:3] == [Symmetric(4, 32, "bf16"), Symmetric(4, 32, "bf16"), Symmetric(8, 64, "bf16")]


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.startswith("fp8")])
def test_fp8_is_kept_from_8_bits_on_and_rounded_below(tmp_path: Path, kind: str) -> None:
    source = checkpoint(tmp_path / "source", kind, is_linear)
    exact = source_encoding(kind, 64, 64).exact(64)
    for bits, resident_bits in ((8, 8), (16, 16), (4, 8)):
        out = tmp_path / f"out{bits}"
        layout = converted(source, out, Options(bits, 64, resident_bits))
        assert set(parts(layout)) == {Affine(4, 64, "bf16") if bits == 4 else exact}
        assert layout.tensors["layers.1.self_attn.q_proj"].encoding == exact
        assert verified(source, out).sound
    layout = converted(source, tmp_path / "out_resident", Options(4, 64, 4))
    assert layout.tensors["layers.1.self_attn.q_proj"].encoding == Affine(4, 64, "bf16")
    assert isinstance(exact, FP8)


@pytest.mark.parametrize("kind", STACKED)
def test_stacked_experts_are_those_of_a_checkpoint_that_keeps_them_apart(tmp_path: Path, kind: str) -> None:
    options = Options(bits=16, resident_bits=16)
    source = checkpoint(tmp_path / "source", kind, lambda name: is_expert(name) and "gate_up" not in name, fused=True)
    layout = converted(source, tmp_path / "out", options)
    layer = layout.layers[1]
    assert layer is not None
    assert layer.record.parts[0].encoding == Plain("bf16")
    assert layer.record.parts[2].encoding == source_encoding(kind, 64, 64).exact(64)
    assert verified(source, tmp_path / "out").sound
    source = checkpoint(tmp_path / "both", kind, is_expert, fused=True)
    assert len(set(parts(converted(source, tmp_path / "out2", options)))) == 1
    assert verified(source, tmp_path / "out2").sound


@pytest.mark.parametrize("kind", ["mlx8", "int4", "fp8_block", "awq"])
def test_a_router_that_arrives_quantized_is_decoded_to_f32(tmp_path: Path, kind: str) -> None:
    listing = shapes(SMALL | {"num_experts": 32}, fused=True)
    name = f"{PREFIX}layers.0.mlp.gate.weight"
    tensors = in_kind(listing, kind, lambda other: other == name, np.random.default_rng(1))
    config = {
        "model_type": "qwen3_5_moe",
        "text_config": {"model_type": "qwen3_5_moe_text", **SMALL, "num_experts": 32},
    }
    source = write_tensors(tmp_path / "source", config, tensors, CONFIGS[kind])
    layout = converted(source, tmp_path / "out")
    assert layout.tensors["layers.0.mlp.gate"].encoding == Plain("f32")
    result = verified(source, tmp_path / "out")
    assert result.sound
    assert [c.exact for c in result.comparisons if c.encoding == "f32" and c.source != "f32"] == [True]


@pytest.mark.parametrize(
    "kind", ["mxfp4_packed", "nvfp4_modelopt", "gptq_zero", "mlx3", "fp8_block", "int4_zero", "int8_bytes_zero"]
)
def test_a_run_equals_one_of_the_decoded_weights(tmp_path: Path, kind: str) -> None:
    source = checkpoint(tmp_path / "source", kind, is_linear)
    plain = tmp_path / "plain"
    decoded = {name: ("F32", tensor) for name, tensor in _decoded(source).items()}
    write_tensors(plain, CONFIG, decoded, None)
    logits = []
    for folder in (source, plain):
        out = tmp_path / f"out_{folder.name}"
        converted(folder, out, Options(bits=16, resident_bits=16))
        with Engine.open(out, backend="numpy") as engine:
            logits.append(engine.logits([1, 2, 3, 4, 5]))
    np.testing.assert_array_equal(logits[0], logits[1])


def _decoded(source: Path) -> dict[str, Any]:
    """Every matrix of a checkpoint as float32, by the plan's own names."""
    from repack.rows import RowReader

    plan = prepare(FolderSource(source), Options(bits=16, resident_bits=16)).plan
    experts = [m for layer in plan.experts.values() for expert in layer for m in expert]
    listing = shapes(SMALL, fused=False)
    result = {}
    with FolderSource(source).reader() as reader:
        for matrix in (*experts, *plan.resident, plan.embedding):
            planes = RowReader(reader).read(matrix, 0, matrix.rows)
            name = re.sub(r"\.(weight_packed|qweight)$", ".weight", matrix.tensor)
            result[name] = matrix.encoding.decode(planes).reshape(listing[name][1])
    return result


# ---- rounded on request


@pytest.mark.parametrize("kind", ["int4", "mxfp4_packed", "nvfp4_packed", "mlx8", "gptq", "awq", "fp8_channel"])
def test_requantize_rounds_what_arrived_quantized(tmp_path: Path, kind: str) -> None:
    source = checkpoint(tmp_path / "source", kind)
    layout = converted(source, tmp_path / "out", Options(requantize=True))
    assert set(parts(layout)) == {Affine(4, 64, "bf16")}
    assert open_container(tmp_path / "out").index.options["requantize"] is True
    result = verified(source, tmp_path / "out")
    assert result.sound
    assert not all(c.exact for c in result.comparisons)


def test_requantize_never_adds_bits(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "source", "int4")
    layout = converted(source, tmp_path / "out", Options(bits=8, requantize=True))
    assert set(parts(layout)) == {source_encoding("int4", 64, 64).exact(64)}


def test_requantize_needs_fewer_than_16_bits(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "source", "int4")
    with pytest.raises(RequestError, match="--requantize rounds to fewer bits, expected --bits"):
        prepare(FolderSource(source), Options(bits=16, requantize=True))


# ---- told


def test_the_index_and_inspect_say_what_each_part_was_and_whether_it_is_exact(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "source", "int4")
    converted(source, tmp_path / "out")
    found = {part["part"]: (part["source"], part["exact"]) for part in inspect(tmp_path / "out")["parts"]}
    assert found["experts gate"] == ("int4, bf16 scales per 32", True)
    assert found["attention"] == ("bf16", False)
    assert found["router"] == ("bf16", True)
    origins = read_origins(open_container(tmp_path / "out").index.extensions, "index.json")
    assert origins is not None
    assert origins.experts[1] == (Origin("int4, bf16 scales per 32", True),) * 3
    assert origins.resident["lm_head"] == Origin("bf16", False)
    line = next(line for line in inspection_text(inspect(tmp_path / "out")).splitlines() if "experts gate" in line)
    assert re.search(
        r"experts gate +int4, bf16 scales per 32 +symmetric bits 4, group_size 32, scale_dtype bf16 +yes", line
    )


def test_a_container_without_origins_is_inspected_as_before(tmp_path: Path) -> None:
    write_container(tmp_path)
    assert all("exact" not in part for part in inspect(tmp_path)["parts"])
