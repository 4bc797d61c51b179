"""GGUF files as sources: names, order and values as llama.cpp's converter has them, and the logits of transformers."""

import hashlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf.quants import quant_shape_to_byte_shape

from formats.config import Qwen3_5MoeConfig
from formats.container import open_container
from formats.dtypes import AnyArray, Float32
from formats.errors import FormatError, StreamingExpertsError, UnsupportedError
from formats.gguf import GGUFHeader, GGUFTensor
from formats.layout import matrix_shape
from repack.convert import convert, prepare
from repack.plan import Options
from repack.sources import open_local
from repack.sources.gguf import GGUFCheckpoint
from repack.verify import verify_container
from repack.vocabulary.gguf import tokenizer_files
from runtime import Engine
from tests.gguf_files import CHECKPOINTS, recorded, write_gguf
from tests.llama_cpp import checkpoint_values, converted
from tests.runtime.helpers import PLENTY, reference

AS_IT_ARRIVES = Options(16, 64, 16)
Kind = gguf.GGMLQuantizationType


@pytest.fixture(scope="module")
def tensors(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, Float32]]:
    """The tensors of a tiny checkpoint as the converter has them."""
    known: dict[str, dict[str, Float32]] = {}

    def of(name: str) -> dict[str, Float32]:
        if name not in known:
            folder = CHECKPOINTS[name].write(tmp_path_factory.mktemp(name))
            known[name] = converted(folder, CHECKPOINTS[name].architecture)
        return known[name]

    return of


Tensors = Callable[[str], dict[str, Float32]]


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_what_the_tests_write_is_what_the_converter_of_llama_cpp_writes(name: str, tensors: Tensors) -> None:
    expected = recorded(name)
    architecture = expected["metadata"]["general.architecture"]
    layers = expected["metadata"][f"{architecture}.block_count"]
    layers -= expected["metadata"].get(f"{architecture}.nextn_predict_layers", 0)
    beyond = tuple(f"blk.{layer}." for layer in range(layers, layers + 2))
    left = {key: value for key, value in expected["tensors"].items() if not key.startswith(beyond)}
    for key, value in tensors(name).items():
        shape, content, *kind = left.pop(key)
        stored = kind[0] if kind else "F32"
        bits = (value.view("<u4") >> 16).astype("<u2") if stored == "BF16" else value  # the checkpoint has bf16, too
        assert bits.dtype == {"F32": "<f4", "BF16": "<u2", "I32": "<i4", "MXFP4": "u1"}[stored]
        blocks = stored == "MXFP4"
        assert list(bits.shape) == (list(quant_shape_to_byte_shape(shape, Kind.MXFP4)) if blocks else shape)
        if isinstance(content, list):
            np.testing.assert_allclose(value, content, rtol=3e-7)  # exp of another library
        else:
            assert hashlib.sha256(bits.tobytes()).hexdigest() == content, key
    assert not left


def container_of(tmp_path: Path, name: str, tensors: Tensors, kind: Kind = Kind.F32) -> Path:
    path = write_gguf(tmp_path / f"{name}.gguf", recorded(name)["metadata"], tensors(name), kind)
    convert(prepare(open_local(str(path)), AS_IT_ARRIVES), tmp_path / "out", hash_source=False)
    return tmp_path / "out"


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_gguf_file_gives_the_logits_of_transformers(name: str, tensors: Tensors, tmp_path: Path) -> None:
    expected, container = reference(CHECKPOINTS[name].reference), container_of(tmp_path, name, tensors)
    for backend in ("numpy", "native"):
        with Engine.open(container, ram_bytes=PLENTY, backend=backend, precision="exact") as engine:
            logits = engine.logits(expected["prompt_ids"].tolist())
            greedy = engine.generate_ids(expected["prompt_ids"].tolist(), max_new_tokens=16, ignore_eos=True)
        assert np.abs(logits - expected["logits"]).max() < 5e-4
        assert greedy == expected["greedy_ids"][:16].tolist()


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_container_of_a_gguf_file_is_sound_beside_it(name: str, tensors: Tensors, tmp_path: Path) -> None:
    container = container_of(tmp_path, name, tensors)
    assert verify_container(container, open_local(str(tmp_path / f"{name}.gguf"))).damage == ()


@pytest.mark.parametrize("kind", [Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1, Kind.Q8_0, Kind.BF16, Kind.F16])
def test_blocks_keep_their_values_to_the_bit_whatever_the_bits(kind: Kind, tensors: Tensors, tmp_path: Path) -> None:
    """Default options: what arrives quantized is not rounded again."""
    path = write_gguf(tmp_path / "m.gguf", recorded("qwen3_moe")["metadata"], tensors("qwen3_moe"), kind)
    options = AS_IT_ARRIVES if kind in (Kind.BF16, Kind.F16) else Options()
    convert(prepare(open_local(str(path)), options), tmp_path / "out", hash_source=False)
    container = open_container(tmp_path / "out")
    values = {tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type) for tensor in _read(path)}
    layer = container.index.layout.layers[1]
    assert layer is not None
    raw = np.fromfile(container.data_path(layer.file), np.uint8).reshape(layer.num_experts, -1)
    for part in layer.record.parts:
        found = np.stack([part.encoding.decode(part.views(record)) for record in raw])
        assert np.array_equal(found, values[f"blk.1.ffn_{part.name}_exps.weight"])
    resident = np.fromfile(container.data_path("resident.bin"), np.uint8)
    assert np.array_equal(
        _decoded(container, resident, "layers.1.self_attn.o_proj"), values["blk.1.attn_output.weight"]
    )
    assert verify_container(tmp_path / "out", open_local(str(path))).sound


def _read(path: Path) -> "list[gguf.ReaderTensor]":
    return list(gguf.GGUFReader(path).tensors)


def _decoded(container: Any, resident: AnyArray, name: str) -> Float32:
    tensor = container.index.layout.tensors[name]
    rows, columns = matrix_shape(tensor.shape)
    arrays = {array.name: array.view(resident, tensor.offset) for array in tensor.arrays}
    values: Float32 = tensor.encoding.decode(arrays)
    return values.reshape(rows, columns)


def split(path: Path, metadata: dict[str, Any], tensors: dict[str, Float32], parts: int) -> Path:
    """Part files of a file, named as gguf-split names them; the first one."""
    names = sorted(tensors)
    for nth in range(parts):
        own = {"split.no": nth, "split.count": parts, "split.tensors.count": len(names)}
        chosen = {name: tensors[name] for name in names[nth::parts]}
        write_gguf(path.with_name(f"m-{nth + 1:05}-of-{parts:05}.gguf"), metadata | own, chosen)
    return path.with_name(f"m-00001-of-{parts:05}.gguf")


def test_a_split_file_is_read_from_any_of_its_parts(tensors: Tensors, tmp_path: Path) -> None:
    metadata = recorded("qwen3_moe")["metadata"]
    whole = container_of(tmp_path, "qwen3_moe", tensors)
    first = split(tmp_path / "m", metadata, tensors("qwen3_moe"), 3)
    for number, path in enumerate((first, tmp_path / "m-00003-of-00003.gguf")):
        convert(prepare(open_local(str(path)), AS_IT_ARRIVES), tmp_path / f"out{number}", hash_source=False)
        for file in ("resident.bin", "experts/layer-001.bin"):
            assert (tmp_path / f"out{number}" / file).read_bytes() == (whole / file).read_bytes()


def test_a_missing_part_of_a_split_file_is_named(tensors: Tensors, tmp_path: Path) -> None:
    first = split(tmp_path / "m", recorded("qwen3_moe")["metadata"], tensors("qwen3_moe"), 3)
    (tmp_path / "m-00002-of-00003.gguf").unlink()
    with pytest.raises(FormatError, match=r"m-00002-of-00003\.gguf: is missing"):
        open_local(str(first))


def test_parts_of_another_split_are_refused(tensors: Tensors, tmp_path: Path) -> None:
    first = split(tmp_path / "m", recorded("qwen3_moe")["metadata"], tensors("qwen3_moe"), 2)
    (tmp_path / "m-00002-of-00002.gguf").write_bytes(first.read_bytes())
    with pytest.raises(FormatError, match=r"m-00002-of-00002\.gguf: is part 0 of 2, expected part 1 of 2"):
        open_local(str(first))


@pytest.mark.parametrize(
    ("key", "value", "error", "message"),
    [
        ("general.architecture", "gpt2", UnsupportedError, "general.architecture is gpt2, supported are"),
        (
            "qwen3moe.rope.scaling.type",
            "longrope",
            UnsupportedError,
            "rope.scaling.type is longrope, only none or yarn",
        ),
        ("qwen3moe.attention.value_length", 7, UnsupportedError, "attention.value_length is 7, only"),
        ("qwen3moe.expert_count", None, FormatError, "qwen3moe.expert_count is missing"),
        ("qwen3moe.block_count", 9, FormatError, "layers.3.input_layernorm.weight is missing"),
    ],
)
def test_metadata_that_is_not_implemented_is_refused_by_name(
    key: str, value: Any, error: type[StreamingExpertsError], message: str, tensors: Tensors, tmp_path: Path
) -> None:
    metadata = {name: old for name, old in recorded("qwen3_moe")["metadata"].items() if name != key}
    path = write_gguf(tmp_path / "m.gguf", metadata | ({} if value is None else {key: value}), tensors("qwen3_moe"))
    with pytest.raises(error, match=re.escape(message)):
        prepare(open_local(str(path)), AS_IT_ARRIVES)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("attention.sliding_window", 0, "llama4.attention.sliding_window is 0, only 8192 is implemented"),
        ("attention.sliding_window_pattern", 3, "llama4.attention.sliding_window_pattern is 3, only 4 is implemented"),
        ("rope.scaling.type", "yarn", "llama4.rope.scaling.type is yarn, only none is implemented"),
        ("rope.dimension_count", 16, "llama4.rope.dimension_count is 16, only 32 is implemented"),
    ],
)
def test_a_llama_4_that_llama_cpp_runs_otherwise_is_refused(
    key: str, value: Any, message: str, tensors: Tensors, tmp_path: Path
) -> None:
    metadata = recorded("llama4_gguf")["metadata"] | {f"llama4.{key}": value}
    path = write_gguf(tmp_path / "m.gguf", metadata, tensors("llama4_gguf"))
    with pytest.raises(UnsupportedError, match=re.escape(message)):
        prepare(open_local(str(path)), AS_IT_ARRIVES)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("attention.head_count", [4, 6, 4, 6, 4, 6], "step35.attention.head_count is [4, 6, 4, 6, 4], only one number"),
        ("attention.head_count_kv", [1, 2, 2, 2, 1, 2], "and as many heads of keys in both"),
        ("rope.dimension_count", 16, "step35.rope.dimension_count is 16, only 32 is implemented"),
        ("rope.scaling.type", "yarn", "step35.rope.scaling.type is yarn, only none is implemented"),
        ("expert_weights_norm", False, "norm_expert_weight is False, only True is implemented"),
    ],
)
def test_a_step_3_5_that_is_not_implemented_is_refused(
    key: str, value: Any, message: str, tensors: Tensors, tmp_path: Path
) -> None:
    metadata = recorded("step3p5")["metadata"] | {f"step35.{key}": value}
    path = write_gguf(tmp_path / "m.gguf", metadata, tensors("step3p5"))
    with pytest.raises(UnsupportedError, match=re.escape(message)):
        prepare(open_local(str(path)), AS_IT_ARRIVES)


def test_a_step_3_5_of_which_more_than_half_of_a_head_is_slowed_is_refused(tensors: Tensors, tmp_path: Path) -> None:
    values = tensors("step3p5") | {"rope_freqs.weight": np.full(16, 2, np.float32)}
    path = write_gguf(tmp_path / "m.gguf", recorded("step3p5")["metadata"], values)
    with pytest.raises(UnsupportedError, match=r"rope_freqs\.weight is .*, expected 16 factors"):
        prepare(open_local(str(path)), AS_IT_ARRIVES)


def test_what_slows_rotary_pairs_is_refused_where_no_model_is_known_to_have_it(
    tensors: Tensors, tmp_path: Path
) -> None:
    values = tensors("mixtral") | {"rope_freqs.weight": np.ones(16, np.float32)}
    path = write_gguf(tmp_path / "m.gguf", recorded("mixtral")["metadata"], values)
    with pytest.raises(UnsupportedError, match=r"rope_freqs\.weight is not implemented for llama"):
        prepare(open_local(str(path)), AS_IT_ARRIVES)


@pytest.mark.parametrize("name", ["deepseek_v3_gguf", "qwen3_next"])
def test_files_of_older_converters_give_the_same_logits(name: str, tensors: Tensors, tmp_path: Path) -> None:
    """kv_b whole, and the projections of Qwen3-Next by key head, as llama.cpp wrote them at first."""
    metadata, values = recorded(name)["metadata"], dict(tensors(name))
    original = checkpoint_values(CHECKPOINTS[name].write(tmp_path / "checkpoint"))
    whole = {"self_attn.kv_b_proj.weight": "attn_kv_b.weight", "linear_attn.in_proj_qkvz.weight": "ssm_in.weight"}
    parts = ("attn_k_b.weight", "attn_v_b.weight", "attn_qkv.weight", "attn_gate.weight")
    values = {key: value for key, value in values.items() if not key.endswith(parts)}
    for key, value in original.items():
        _, layer, rest = key.removeprefix("model.").split(".", 2) if ".layers." in key else ("", "", "")
        if rest in whole and f"blk.{layer}.attn_norm.weight" in values:
            values[f"blk.{layer}.{whole[rest]}"] = value
    if name == "deepseek_v3_gguf":
        metadata = {key: value for key, value in metadata.items() if not key.endswith("_mla")}
        metadata |= {"deepseek2.attention.key_length": 40, "deepseek2.attention.value_length": 40}
    path = write_gguf(tmp_path / "old.gguf", metadata, values)
    convert(prepare(open_local(str(path)), AS_IT_ARRIVES), tmp_path / "out", hash_source=False)
    expected = reference(CHECKPOINTS[name].reference)
    with Engine.open(tmp_path / "out", ram_bytes=PLENTY) as engine:
        logits = engine.logits(expected["prompt_ids"].tolist())
    assert np.abs(logits - expected["logits"]).max() < 5e-4


@pytest.mark.parametrize(("name", "tiled"), [("qwen3_next", False), ("qwen3_5_moe", True)])
def test_heads_as_ggml_orders_them_give_a_token_alone_the_same_bits(
    name: str, tiled: bool, tensors: Tensors, tmp_path: Path
) -> None:
    """The native backend takes one token another way than many."""
    container = container_of(tmp_path, name, tensors)
    ids = reference(CHECKPOINTS[name].reference)["prompt_ids"].tolist()
    found = []
    for chunk_size in (1, 64):
        with Engine.open(container, ram_bytes=PLENTY, chunk_size=chunk_size) as engine:
            assert isinstance(engine.config, Qwen3_5MoeConfig)
            assert engine.config.linear_value_heads_tiled == tiled
            found.append(engine.logits(ids))
    assert np.array_equal(found[0], found[1])


@pytest.mark.parametrize("name", ["qwen3_moe", "granitemoe", "minimax_m2", "qwen3_5_moe", "deepseek_v3_gguf"])
def test_gate_and_up_in_one_tensor_give_the_same_container(name: str, tensors: Tensors, tmp_path: Path) -> None:
    """As the converter writes them with --fuse-gate-up-exps."""
    values = dict(tensors(name))
    for key in [key for key in values if "ffn_gate_exps" in key]:
        parts = [values.pop(key.replace("gate_exps", f"{part}_exps")) for part in ("gate", "up")]
        values[key.replace("gate_exps", "gate_up_exps")] = np.concatenate(parts, axis=1)
    path = write_gguf(tmp_path / "fused.gguf", recorded(name)["metadata"], values)
    convert(prepare(open_local(str(path)), AS_IT_ARRIVES), tmp_path / "fused", hash_source=False)
    apart = container_of(tmp_path, name, tensors)
    files = [file.relative_to(apart) for file in apart.glob("experts/*")]
    assert files
    for file in files:
        assert (tmp_path / "fused" / file).read_bytes() == (apart / file).read_bytes()


def test_a_tensor_that_nobody_knows_is_refused_by_its_own_name(tensors: Tensors, tmp_path: Path) -> None:
    more = tensors("qwen3_moe") | {"blk.0.attn_mystery.weight": np.zeros((2, 32), np.float32)}
    path = write_gguf(tmp_path / "m.gguf", recorded("qwen3_moe")["metadata"], more)
    with pytest.raises(FormatError, match=r"attn_mystery\.weight has no place in qwen3_moe"):
        prepare(open_local(str(path)), AS_IT_ARRIVES)


def test_a_decay_that_no_converter_writes_is_refused(tensors: Tensors, tmp_path: Path) -> None:
    broken = tensors("qwen3_5_moe") | {"blk.0.ssm_a": np.full(4, 0.5, np.float32)}
    path = write_gguf(tmp_path / "m.gguf", recorded("qwen3_5_moe")["metadata"], broken)
    with pytest.raises(FormatError, match=r"A_log holds 0\.5 .* expected numbers below 0"):
        convert(prepare(open_local(str(path)), AS_IT_ARRIVES), tmp_path / "out", hash_source=False)


@pytest.mark.parametrize(
    ("tensor", "change", "message"),
    [
        ("blk.1.ffn_up_exps.weight", None, "model.layers.1.mlp.switch_mlp.up_proj.weight is missing"),
        ("blk.1.ffn_up_exps.weight", 7, "up_proj.weight has shape [7, 64, 64], expected [8, 64, 64]"),
        (
            "blk.0.attn_output.weight",
            np.int8,
            "o_proj.weight has dtype ggml I8, expected one of BF16, F16, F32, ",
        ),
        ("blk.0.attn_output.weight", np.float64, "o_proj.weight has dtype ggml F64, expected one of BF16, F16, F32, "),
        ("token_embd.weight", None, "token_embd.weight is missing"),
    ],
)
def test_tensors_that_are_missing_or_of_another_kind_are_refused_by_name(
    tensor: str, change: Any, message: str, tensors: Tensors, tmp_path: Path
) -> None:
    changed: dict[str, Any] = dict(tensors("qwen3_moe"))
    value = changed.pop(tensor)
    if change is not None:
        changed[tensor] = value[:change] if isinstance(change, int) else value.astype(change)
    path = write_gguf(tmp_path / "m.gguf", recorded("qwen3_moe")["metadata"], changed)
    with pytest.raises(StreamingExpertsError, match=re.escape(message)):
        prepare(open_local(str(path)), AS_IT_ARRIVES)


def test_a_tensor_that_stands_in_two_parts_of_a_split_is_refused(tensors: Tensors, tmp_path: Path) -> None:
    values, metadata = tensors("qwen3_moe"), recorded("qwen3_moe")["metadata"]
    first = split(tmp_path / "m", metadata, values, 2)
    names = sorted(values)
    own = {"split.no": 1, "split.count": 2, "split.tensors.count": len(names)}
    chosen = {name: values[name] for name in names[: len(names) - len(names[0::2])]}
    write_gguf(tmp_path / "m-00002-of-00002.gguf", metadata | own, chosen)
    with pytest.raises(FormatError, match=r"stands in m-00001-of-00002\.gguf as well"):
        open_local(str(first))


def test_more_tokens_than_the_embedding_has_rows_are_refused(tensors: Tensors, tmp_path: Path) -> None:
    """Fewer are not: published embeddings are padded."""
    values = tensors("qwen3_moe")
    rows = len(values["token_embd.weight"])
    for count in (rows + 1, rows - 1):
        vocabulary = {"tokenizer.ggml.tokens": [f"t{i}" for i in range(count)]}
        path = write_gguf(tmp_path / f"{count}.gguf", recorded("qwen3_moe")["metadata"] | vocabulary, values)
        if count < rows:
            open_local(str(path))
            continue
        with pytest.raises(FormatError, match=f"tokenizer.ggml.tokens holds {count}, expected at most the {rows} rows"):
            open_local(str(path))


@pytest.mark.parametrize(
    ("key", "value", "line"),
    [
        ("tokenizer.ggml.tokens", 7, "tokenizer.ggml.tokens is 7, expected a list of strings"),
        ("tokenizer.ggml.token_type", 7, "tokenizer.ggml.token_type is 7, expected a list of numbers"),
        ("general.sampling.temp", float("nan"), "general.sampling.temp is nan, expected a finite number"),
        ("general.sampling.top_k", "many", "general.sampling.top_k is many, expected a finite number"),
    ],
)
def test_metadata_of_another_kind_is_one_line(
    key: str, value: Any, line: str, tensors: Tensors, tmp_path: Path
) -> None:
    vocabulary = {"tokenizer.ggml.tokens": ["a", "b"], "tokenizer.ggml.token_type": [1, 1]}
    metadata = recorded("qwen3_moe")["metadata"] | vocabulary | {key: value}
    path = write_gguf(tmp_path / "m.gguf", metadata, tensors("qwen3_moe"))
    with pytest.raises(FormatError, match=re.escape(line)):
        open_local(str(path))


def test_a_vocabulary_without_tokens_has_no_types(tmp_path: Path) -> None:
    metadata = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.tokens": [], "tokenizer.ggml.token_type": [1]}
    with pytest.raises(FormatError, match="token_type is not a list of 0 numbers"):
        tokenizer_files(metadata, "m.gguf")


def test_an_embedding_without_rows_is_one_line() -> None:
    shapes = {name: shape for name, (shape, _) in recorded("qwen3_moe")["tensors"].items()} | {"token_embd.weight": ()}
    tensors = {name: GGUFTensor(name, "F32", tuple(shape), 0, 4) for name, shape in shapes.items()}
    with pytest.raises(FormatError, match=r"token_embd.weight has shape \[\], expected rows and columns"):
        GGUFCheckpoint({"m.gguf": GGUFHeader(recorded("qwen3_moe")["metadata"], tensors)}, "m.gguf")


@pytest.mark.parametrize("name", ["m-00001-of-00000.gguf", "m-00003-of-00002.gguf"])
def test_a_name_that_no_part_of_a_split_has_is_refused(name: str, tensors: Tensors, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / name, recorded("qwen3_moe")["metadata"], tensors("qwen3_moe"))
    with pytest.raises(FormatError, match=f"{name}: is no part of a split of its name"):
        open_local(str(path))


def test_stop_tokens_and_recommended_sampling_become_the_generation_config(tensors: Tensors, tmp_path: Path) -> None:
    metadata = recorded("qwen3_moe")["metadata"] | {
        "general.sampling.temp": 0.6,
        "general.sampling.top_k": 20,
        "tokenizer.ggml.eos_token_id": 7,
        "tokenizer.ggml.eot_token_id": 9,
    }
    path = write_gguf(tmp_path / "m.gguf", metadata, tensors("qwen3_moe"))
    convert(prepare(open_local(str(path)), AS_IT_ARRIVES), tmp_path / "out", hash_source=False)
    with Engine.open(tmp_path / "out", ram_bytes=PLENTY) as engine:
        assert engine.generation.stop_ids == (7, 9)
