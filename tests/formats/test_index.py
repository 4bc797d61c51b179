"""index.json: the same bytes again, and nothing that it does not say out loud."""

import copy
import json
import re
from collections.abc import Callable
from dataclasses import MISSING, fields, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from formats.errors import ChecksumError, FormatError, StreamingExpertsError, UnsupportedError
from formats.families import FAMILIES
from formats.fields import MAX_DEPTH
from formats.index import canonical_json, index_to_bytes
from formats.index_reader import MAX_INDEX_BYTES, index_from_bytes
from tests.containers import MODEL, signed, write_container
from tests.refusals import result_or_line

Change = Callable[[dict[str, Any]], Any]


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder = tmp_path_factory.mktemp("index")
    write_container(folder)
    return (folder / "index.json").read_bytes()


@pytest.fixture
def content(raw: bytes) -> dict[str, Any]:
    result: dict[str, Any] = json.loads(raw)
    return result


def objects_of(value: Any, path: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    """Paths of all objects that the format defines; what stands in options and extensions is free."""
    if isinstance(value, dict):
        inner = [
            p
            for key, item in value.items()
            if key not in ("options", "extensions")
            for p in objects_of(item, (*path, key))
        ]
        return [path, *inner]
    if isinstance(value, list):
        return [p for i, item in enumerate(value[:4]) for p in objects_of(item, (*path, i))]
    return []


def at(content: Any, path: tuple[str | int, ...]) -> Any:
    for step in path:
        content = content[step]
    return content


# ---- writing


def test_an_index_survives_a_round_trip_to_the_same_bytes(tmp_path: Path) -> None:
    index = write_container(tmp_path)
    raw = (tmp_path / "index.json").read_bytes()
    assert index_from_bytes(raw) == index
    assert index_to_bytes(index_from_bytes(raw)) == raw


def test_the_text_is_ascii_and_sorted_and_ends_with_a_newline(raw: bytes) -> None:
    assert raw.isascii()
    assert raw.endswith(b"}\n")
    assert list(json.loads(raw)) == sorted(json.loads(raw))


def test_text_beyond_ascii_survives(tmp_path: Path) -> None:
    options = {"\N{GREEK SMALL LETTER ALPHA}": "\N{GRINNING FACE}"}
    index = write_container(tmp_path, options=options)
    assert index_from_bytes(index_to_bytes(index)).options == options


def test_a_hash_that_nobody_proved_is_null(tmp_path: Path) -> None:
    index = write_container(tmp_path)
    unproven = replace(index.source.files[0], sha256=None, proof="none")
    source = replace(index.source, repository=None, revision=None, files=(unproven,))
    assert index_from_bytes(index_to_bytes(replace(index, source=source))).source == source


# ---- unknown and missing things


@pytest.mark.parametrize("version", [0, 2, 9])
def test_another_version_is_refused(content: dict[str, Any], version: int) -> None:
    content["format_version"] = version
    with pytest.raises(UnsupportedError, match=f"out/index.json: format_version is {version}, expected 1"):
        index_from_bytes(signed(content), "out/index.json")


def test_another_version_is_named_even_when_all_else_is_different() -> None:
    raw = b'{"format": "streaming-experts", "format_version": 7, "news": []}'
    with pytest.raises(UnsupportedError, match=r"index.json: format_version is 7, expected 1"):
        index_from_bytes(raw)


def test_a_required_feature_is_refused_by_name(content: dict[str, Any]) -> None:
    content["required_features"] = ["entropy-coded-records"]
    with pytest.raises(UnsupportedError, match="required_features holds entropy-coded-records, unknown"):
        index_from_bytes(signed(content))


def test_an_extension_is_ignored_and_kept(content: dict[str, Any]) -> None:
    content["extensions"] = {"entropy-coded-records": {"table": [1, 2, {"x": None}]}}
    raw = signed(content)
    index = index_from_bytes(raw)
    assert index.extensions == content["extensions"]
    assert index_to_bytes(index) == raw


@pytest.mark.parametrize("place", ["embedding", "resident.tensors", "layers.parts"])
def test_an_unknown_encoding_is_refused_by_name(content: dict[str, Any], place: str) -> None:
    entry = {
        "embedding": content["embedding"],
        "resident.tensors": content["resident"]["tensors"][0],
        "layers.parts": content["layers"][0]["parts"][1],
    }[place]
    entry["encoding"] = {"id": "made-up", "bits": 3}
    with pytest.raises(UnsupportedError, match=r"encoding.id is made-up, expected one of affine, bf16, f16, f32"):
        index_from_bytes(signed(content))


def test_an_unknown_field_anywhere_is_refused_by_name(content: dict[str, Any]) -> None:
    paths = objects_of(content)
    assert len(paths) > 40
    for path in paths:
        changed = copy.deepcopy(content)
        at(changed, path)["surprise"] = 1
        with pytest.raises(FormatError, match=r"surprise is unknown to this version"):
            index_from_bytes(signed(changed))


def test_a_missing_field_anywhere_is_refused_by_name(content: dict[str, Any]) -> None:
    defaults = {field.name for field in fields(MODEL) if field.default is not MISSING}  # of facts that came later
    for path in objects_of(content):
        for key in at(content, path).keys() - (defaults if path == ("model",) else set()):
            changed = copy.deepcopy(content)
            del at(changed, path)[key]
            raw = canonical_json(changed) if key == "checksum" and not path else signed(changed)
            with pytest.raises(FormatError, match=rf"{re.escape(key)} is missing"):
                index_from_bytes(raw)


# ---- wrong values


def put(*path: str | int, value: Any) -> Change:
    def change(content: dict[str, Any]) -> None:
        at(content, path[:-1])[path[-1]] = value

    return change


def swap_layers(content: dict[str, Any]) -> None:
    content["layers"][0], content["layers"][2] = content["layers"][2], content["layers"][0]


def overlap_arrays(content: dict[str, Any]) -> None:
    arrays = content["layers"][0]["parts"][0]["arrays"]
    arrays[1]["offset"] = arrays[0]["offset"]


def overlap_parts(content: dict[str, Any]) -> None:
    content["layers"][0]["parts"][1]["arrays"][0]["offset"] = 0


def same_name_twice(content: dict[str, Any]) -> None:
    content["resident"]["tensors"][1]["name"] = content["resident"]["tensors"][0]["name"]


def transposed_part(content: dict[str, Any]) -> None:
    parts = content["layers"][0]["parts"]
    parts[0]["rows"], parts[0]["columns"] = parts[2]["rows"], parts[2]["columns"]
    parts[0]["linear_bias"] = None
    parts[0]["arrays"] = [{**array, "offset": array["offset"]} for array in parts[2]["arrays"][:3]]
    for array, offset in zip(parts[0]["arrays"], (0, 8192, 8704), strict=True):
        array["offset"] = offset


def without_bias(content: dict[str, Any]) -> None:
    part = content["layers"][0]["parts"][0]
    part["linear_bias"], part["arrays"] = None, part["arrays"][:-1]


TENSOR = ("resident", "tensors", 9)
WRONG: list[tuple[Change, str]] = [
    (put("format", value="zip"), "format is zip, expected streaming-experts"),
    (put("format", value=1), "format is 1, expected a string"),
    (put("format_version", value="1"), "format_version is 1, expected an integer"),
    (put("page_bytes", value=4096), "page_bytes is 4096, expected 16384"),
    (put("array_alignment", value=32), "array_alignment is 32, expected 64"),
    (put("written_by", value="\x1b[2J"), "written_by is .*, expected printable"),
    (put("options", value=[]), r"options is \[\], expected an object"),
    (put("extensions", value=None), "extensions is missing"),
    (put("required_features", value="x"), "required_features is x, expected a list"),
    (put("checksum", value="x"), "checksum is x, expected 16 lower-case hexadecimal digits"),
    (put("layers", value=[]), "layers has 0 entries, expected 5"),
    (put("layers", 0, value=7), r"layers\[0\]: is 7, expected an object|layers\[0\] is 7"),
    (swap_layers, r"layers\[2\].file is experts/layer-000.bin, expected experts/layer-002.bin"),
    (put("layers", 0, "file", value="../x"), r"layers\[0\].file is ../x, expected experts/layer-000.bin"),
    (put("layers", 0, "num_experts", value=-1), "num_experts is -1, expected an integer from 0"),
    (put("layers", 0, "num_experts", value=4), "num_experts is 4, expected 3"),
    (put("layers", 0, "record_bytes", value=2**53), "record_bytes is 9007199254740992, expected an integer from"),
    (put("layers", 0, "record_bytes", value=16385), "record_bytes is 16385, expected a multiple of 16384"),
    (put("layers", 0, "bytes", value=1), "bytes is 1, expected"),
    (put("layers", 0, "bytes", value=2**50 + 1), "bytes is 1125899906842625, expected an integer from 0 to"),
    (put("layers", 0, "parts", value=[]), "parts has 0 entries, expected 3"),
    (put("layers", 0, "parts", 0, "name", value="down"), "name is down, expected gate"),
    (put("layers", 0, "parts", 0, "rows", value=0), "rows is 0, expected an integer from 1"),
    (put("layers", 0, "parts", 0, "rows", value=2**40), "rows is .*, expected an integer from 1"),
    (put("layers", 0, "parts", 0, "columns", value=96), "encoding: input width 96 is not a multiple"),
    (put("layers", 0, "parts", 0, "linear_bias", value="u32"), "linear_bias is u32, expected null or one of"),
    (put("layers", 0, "parts", 0, "linear_bias", value=None), "arrays are not those of the encoding"),
    (put("layers", 0, "parts", 0, "arrays", 0, "offset", value=-64), "offset is -64, expected an integer from 0"),
    (put("layers", 0, "parts", 0, "arrays", 0, "offset", value=32), "codes has offset 32, expected a multiple of 64"),
    (put("layers", 0, "parts", 2, "arrays", 2, "offset", value=2**40), "biases has offset .*, expected a multiple"),
    (put("layers", 0, "parts", 0, "arrays", 0, "bytes", value=1), "bytes is 1, expected"),
    (put("layers", 0, "parts", 0, "arrays", 0, "dtype", value="f8"), "dtype is f8, expected one of bf16"),
    (put("layers", 0, "parts", 0, "arrays", 0, "shape", value=[2**31] * 5000), "expected 1 to 4 axes"),
    (put("layers", 0, "parts", 0, "arrays", 0, "shape", value=[2**31] * 4), "bytes is .*, expected 85070591730"),
    (put("layers", 0, "checksums", value=[]), "checksums is .*, expected a list of 3 checksums"),
    (put("layers", 0, "blake3", value="0" * 63), "blake3 is 0+..., expected 64|blake3 is"),
    (put("layers", 0, "sha256", value="0" * 64), r"layers\[0\]\.sha256 is unknown to this version"),
    (put("required_features", value=[]), "embedding.sha256 is missing"),
    (overlap_arrays, "scales has offset 0, expected a multiple of 64 from"),
    (overlap_parts, "codes has offset 0, expected a multiple of 64 from"),
    (transposed_part, r"parts: gate is \[256, 64\], expected"),
    (put("embedding", "file", value="x"), "embedding.file is x, expected embedding.bin"),
    (put("embedding", "rows", value=1), "embedding.rows is 1, expected 2100"),
    (put("embedding", "columns", value=2**60), "embedding.columns is .*, expected an integer"),
    (put("embedding", "row_bytes", value=1), "embedding.row_bytes is 1, expected 192"),
    (put("embedding", "checksum_offset", value=0), "embedding.checksum_offset is 0, expected"),
    (put("embedding", "arrays", value=[]), "embedding.arrays are not those of one row"),
    (put("resident", "file", value="/etc/passwd"), "resident.file is /etc/passwd, expected resident.bin"),
    (put("resident", "block_bytes", value=1), "resident.block_bytes is 1, expected 1048576"),
    (put("resident", "bytes", value=0), "resident.bytes is 0, expected"),
    (same_name_twice, r"tensors\[1\].name is .*, expected a name that no other tensor has"),
    (put(*TENSOR, "name", value="a\nb"), "name is .*, expected printable"),
    (put(*TENSOR, "shape", value=[]), "shape is .*, expected 1 to 4 axes"),
    (put(*TENSOR, "shape", value=[1] * 5), "shape is .*, expected 1 to 4 axes"),
    (put(*TENSOR, "shape", value=[0, 128]), "shape is .*, expected a list of integers from 1"),
    (put(*TENSOR, "offset", value=0), "offset is 0, expected"),
    (put(*TENSOR, "bytes", value=2**50), "checksums is .*, expected a list of 1073741824 checksums"),
    (put(*TENSOR, "bytes", value=16384), "codes has offset|scales has offset|biases has offset"),
    (put("files", 0, "name", value="../config.json"), "name is ../config.json, expected the name of a file in this"),
    (put("files", 0, "name", value="/config.json"), "name is /config.json, expected the name of a file"),
    (put("files", 0, "name", value=".."), "name is .., expected the name of a file"),
    (put("files", 0, "name", value="index.json"), "name is index.json, expected the name of a file"),
    (put("files", 1, "name", value="generation_config.json"), r"files\[1\].name is generation_config.json, expected"),
    (put("files", 0, "bytes", value=2**40), "bytes is .*, expected an integer from 0"),
    (put("source", "files", 0, "proof", value="trust me"), "proof is trust me, expected one of computed"),
    (put("source", "files", 0, "proof", value="none"), "sha256 is .*, expected null exactly when proof is none"),
    (put("source", "files", 0, "sha256", value=None), "sha256 is None, expected null exactly when"),
    (put("source", "repository", value=3), "repository is 3, expected a string"),
    (put("model", "vocab_size", value=0), "model.vocab_size is 0, expected an integer from 1"),
    (put("model", "vocab_size", value=2101), "embedding.rows is 2100, expected 2101"),
    (put("model", "num_experts", value=2**31), "num_experts is 3, expected 2147483648"),
    (put("model", "num_key_value_heads", value=4), r"layers.0.self_attn.k_proj is \[64, 256\], expected \[128, 256\]"),
    (put("model", "attention_sinks", value=True), r"lacks layers.0.self_attn.sinks, which gpt_oss has as \[8\]"),
    (put("model", "model_type", value="mixtral"), "resident.tensors holds layers.0.mlp.gate.bias, which this mixtral"),
    (put("model", "moe_intermediate_size", value=65), r"layers\[0\].parts: gate is \[64, 256\], expected \[65, 256\]"),
    (put("layers", 0, value=None), r"layers\[0\] has no experts, expected some"),
    (without_bias, r"layers\[0\].parts: gate has linear_bias None, expected a dtype"),
    (put("model", "top_k", value=4), "top_k is 4, expected 1 to num_experts 3"),
    (put("model", "model_type", value="gpt2"), "model_type is gpt2, supported are"),
    (put("model", "layer_types", value=["x"] * 5), "layer_types is .*, expected only"),
    (put("model", "rms_norm_eps", value=0), "rms_norm_eps is 0.0, expected a number above 0"),
    (put("model", "tie_word_embeddings", value=0), "tie_word_embeddings is 0, expected true or false"),
]


@pytest.mark.parametrize(("change", "message"), WRONG, ids=[message[:40] for _, message in WRONG])
def test_a_wrong_value_is_refused_with_its_name(content: dict[str, Any], change: Change, message: str) -> None:
    change(content)
    raw = canonical_json(content) if content["checksum"] == "x" else signed(content)
    with pytest.raises(StreamingExpertsError, match=message) as caught:
        index_from_bytes(raw)
    assert str(caught.value).startswith("index.json")
    assert len(str(caught.value).splitlines()) == 1
    said, _, model_types = str(caught.value).partition(", supported are ")  # a list that grows
    assert len(said) < 600
    assert model_types == "" or model_types.split(", ") == sorted(FAMILIES)


def test_keys_twice_and_numbers_that_are_none_are_refused(raw: bytes) -> None:
    for before, after, message in (
        (b'"format_version": 1', b'"format_version": 1, "format_version": 1', "key format_version stands twice"),
        (b'"rms_norm_eps": 1e-06', b'"rms_norm_eps": NaN', "holds NaN"),
        (b'"bits": 4', b'"bits": 1e999', "holds 1e999"),
    ):
        assert before in raw
        with pytest.raises(FormatError, match=message):
            index_from_bytes(raw.replace(before, after, 1))


def test_deep_nesting_is_refused_wherever_it_is(content: dict[str, Any], raw: bytes) -> None:
    deep: Any = 1
    for _ in range(MAX_DEPTH):
        deep = [deep]
    content["extensions"] = {"x": deep}
    with pytest.raises(FormatError, match="nested deeper than"):
        index_from_bytes(signed(content))
    opened = raw.replace(b'"extensions": {}', b'"extensions": ' + b"[" * 50_000 + b"]" * 50_000)
    with pytest.raises(FormatError, match=r"nested deeper than|is not valid JSON"):
        index_from_bytes(opened)


def test_an_index_that_is_too_long_is_refused_unread() -> None:
    with pytest.raises(FormatError, match="expected at most 268435456"):
        index_from_bytes(bytes(MAX_INDEX_BYTES + 1))


def test_another_form_of_the_same_content_is_refused(content: dict[str, Any], raw: bytes) -> None:
    for other in (json.dumps(content).encode(), raw + b"\n", raw[:-1], b" " + raw, raw.replace(b"1e-06", b"0.000001")):
        with pytest.raises(ChecksumError, match="is not in the canonical form of its content"):
            index_from_bytes(other)


@given(data=st.data())
def test_any_flipped_bit_is_refused_with_one_line(data: st.DataObject, raw: bytes) -> None:
    place, bit = data.draw(st.integers(0, len(raw) - 1)), data.draw(st.integers(0, 7))
    damaged = bytearray(raw)
    damaged[place] ^= 1 << bit
    index, line = result_or_line(index_from_bytes, bytes(damaged))
    assert index is None
    assert line.startswith("index.json")


@given(data=st.data())
def test_an_index_with_a_piece_cut_out_is_refused(data: st.DataObject, raw: bytes) -> None:
    start = data.draw(st.integers(0, len(raw) - 1))
    stop = data.draw(st.integers(start + 1, len(raw)))
    index, _ = result_or_line(index_from_bytes, raw[:start] + raw[stop:])
    assert index is None


@given(st.binary(max_size=100))
def test_any_bytes_are_refused_with_one_line(raw: bytes) -> None:
    index, line = result_or_line(index_from_bytes, raw)
    assert index is None
    assert line.startswith("index.json")


HOSTILE = st.sampled_from(
    [
        None,
        True,
        -1,
        0,
        1,
        3,
        63,
        64,
        2**31,
        2**53,
        2**70,
        1.5,
        -0.0,
        "",
        "x",
        "bf16",
        "../x",
        [],
        [1],
        {},
        {"id": "f32"},
    ]
)


@given(data=st.data())
def test_a_signed_index_with_any_value_replaced_is_refused_or_sound(data: st.DataObject, raw: bytes) -> None:
    content = json.loads(raw)
    path = data.draw(st.sampled_from(objects_of(content)))
    key = data.draw(st.sampled_from(sorted(at(content, path))))
    at(content, path)[key] = data.draw(HOSTILE)
    index, _ = result_or_line(index_from_bytes, signed(content))
    if index is not None:
        again = index_from_bytes(index_to_bytes(index))
        assert again == index


def test_the_model_of_the_helper_is_what_the_index_says(raw: bytes) -> None:
    assert index_from_bytes(raw).layout.model == MODEL
