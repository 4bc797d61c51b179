"""What inspect says: numbers that add up, the same from a plan as from a container, in aligned tables."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from formats.budget import DEFAULT_CHUNK_SIZE, memory_terms, token_bytes
from formats.container import open_container
from formats.dtypes import to_float32
from formats.encodings import Affine
from formats.encodings.packing import unpack_codes
from formats.errors import ChecksumError, RequestError
from repack.convert import convert, prepare
from repack.findings import Comparison, Damage, Verification
from repack.plan import Options
from repack.report import describe_layout, inspect, inspect_expert
from repack.sources.folder import FolderSource
from repack.tables import expert_text, inspection_text, verification_text
from tests.containers import write_container

FIXTURES = Path(__file__).resolve().parent.parent / "fixtures"


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report") / "out"
    convert(prepare(FolderSource(FIXTURES / "fused"), Options(4, 32, 8)), folder)
    return folder


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A container whose layers differ in encodings, one of them dense."""
    folder = tmp_path_factory.mktemp("mixed")
    write_container(folder)
    return folder


def test_a_plan_says_what_the_container_says(out: Path) -> None:
    conversion = prepare(FolderSource(FIXTURES / "fused"), Options(4, 32, 8))
    planned = describe_layout(conversion.plan.layout, 0, threads=3, origins=conversion.plan.origins())
    found = inspect(out, threads=3)
    assert planned.items() <= found.items()


@pytest.mark.parametrize("name", ["out", "mixed"])
def test_parts_and_padding_are_the_whole(name: str, request: pytest.FixtureRequest) -> None:
    folder: Path = request.getfixturevalue(name)
    found, container = inspect(folder), open_container(folder)
    assert sum(part["bytes"] for part in found["parts"]) + found["padding_bytes"] == found["total_bytes"]
    assert found["total_bytes"] == sum(container.data_path(name).stat().st_size for name in container.data_bytes)
    assert sum(part["weights"] for part in found["parts"]) == found["model"]["weights"]
    layout = container.index.layout
    experts = sum(layer.num_experts for _, layer in layout.moe_layers())
    assert sum(part["tensors"] for part in found["parts"]) == 3 * experts + len(layout.resident) + 1


def test_bits_per_weight_are_those_of_the_encoding(out: Path) -> None:
    for part in inspect(out)["parts"]:
        expected = {"affine bits 4, group_size 32": 5.0, "affine bits 8, group_size 64": 8.5, "bf16": 16.0, "f32": 32.0}
        (bits,) = (bits for beginning, bits in expected.items() if part["encoding"].startswith(beginning))
        assert part["bits_per_weight"] == bits


def test_resident_tensors_are_named_by_class(out: Path) -> None:
    classes = {part["part"] for part in inspect(out)["parts"]}
    assert classes == {
        "experts gate",
        "experts up",
        "experts down",
        "linear attention",
        "attention",
        "shared expert",
        "router",
        "norms",
        "lm_head",
        "embedding",
    }


def test_bytes_per_token_and_the_floor_come_from_the_budget(out: Path) -> None:
    found, container = inspect(out, threads=2), open_container(out)
    layout, files = container.index.layout, container.index.files
    assert found["per_token"] == vars(token_bytes(layout))
    terms = memory_terms(
        layout,
        tokenizer_json_bytes=files["tokenizer.json"].nbytes if "tokenizer.json" in files else 0,
        ctx_size=found["memory"]["ctx_size"],
        chunk_size=DEFAULT_CHUNK_SIZE,
        threads=2,
    )
    assert found["memory"]["terms"] == vars(terms)
    assert found["memory"]["floor_bytes"] == terms.floor_bytes
    assert found["memory"]["ctx_size"] <= layout.model.max_position_embeddings


def test_layers_that_are_laid_out_alike_stand_together(out: Path, mixed: Path) -> None:
    assert len(inspect(out)["records"]) == 1
    assert [record["layers"] for record in inspect(mixed)["records"]] == [[0], [1], [3]]


def test_a_report_is_plain_json(out: Path, mixed: Path) -> None:
    for found in (inspect(out), inspect(mixed), inspect_expert(out, 0, 0), inspect_expert(mixed, 1, 2)):
        assert json.loads(json.dumps(found, allow_nan=False)) == found


@pytest.mark.parametrize(("layer", "expert"), [(0, 0), (1, 2), (3, 1)])
def test_one_expert_is_described_array_by_array(mixed: Path, layer: int, expert: int) -> None:
    found, layout = inspect_expert(mixed, layer, expert), open_container(mixed).index.layout.layers[layer]
    assert layout is not None
    records = np.fromfile(mixed / layout.file, np.uint8).reshape(layout.num_experts, layout.record.record_bytes)
    assert found["offset"] == expert * layout.record.record_bytes
    assert found["pages"] * 16384 == found["record_bytes"] == layout.record.record_bytes
    for part, described in zip(layout.record.parts, found["parts"], strict=True):
        for array, entry in zip(part.arrays, described["arrays"], strict=True):
            assert (entry["array"], entry["offset"], entry["bytes"]) == (array.name, array.offset, array.nbytes)
            if array.dtype != "u32":
                values = to_float32(array.view(records[expert]), array.dtype)
                assert (entry["min"], entry["max"]) == (values.min(), values.max())
        if isinstance(part.encoding, Affine):
            codes = unpack_codes(part.views(records[expert])["codes"], part.encoding.bits)
            assert described["codes"] == np.bincount(codes.ravel(), minlength=2**part.encoding.bits).tolist()
            assert sum(described["codes"]) == part.rows * part.columns
        else:
            assert "codes" not in described


@pytest.mark.parametrize(
    ("layer", "expert", "message"),
    [
        (5, 0, "--layer is 5, expected 0 to 4"),
        (-1, 0, "--layer is -1, expected 0 to 4"),
        (2, 0, "--layer is 2, which is dense and has no experts"),
        (0, 3, "--expert is 3, expected 0 to 2"),
        (0, -1, "--expert is -1, expected 0 to 2"),
    ],
)
def test_an_expert_that_is_not_there_is_refused(mixed: Path, layer: int, expert: int, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        inspect_expert(mixed, layer, expert)


def test_a_damaged_expert_is_refused_by_name(tmp_path: Path) -> None:
    write_container(tmp_path)
    path = tmp_path / "experts" / "layer-000.bin"
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    inspect_expert(tmp_path, 0, 1)
    with pytest.raises(ChecksumError, match=r"experts/layer-000.bin: layer 0, expert 2: checksum is"):
        inspect_expert(tmp_path, 0, 2)


# ---- text


def check_tables(text: str) -> None:
    for paragraph in text.split("\n\n"):
        assert all(line == line.rstrip() for line in paragraph.splitlines())


def test_the_text_has_units_in_the_head_and_three_significant_digits(out: Path) -> None:
    text = inspection_text(inspect(out))
    check_tables(text)
    assert re.search(r"^part +source +encoding +exact +tensors +weights +MiB +bits/weight$", text, re.MULTILINE)
    assert re.search(r"^experts gate +bf16 +affine bits 4, .* no .* 5\.00$", text, re.MULTILINE)
    assert re.search(r"^total ", text, re.MULTILINE)
    assert re.search(r"^layers +experts +record bytes +pages +padding bytes +bits/weight$", text, re.MULTILINE)
    assert "RAM floor" in text
    assert "per token" in text


def test_columns_of_numbers_end_in_one_column(out: Path) -> None:
    table = inspection_text(inspect(out)).split("\n\n")[1].splitlines()
    assert len({len(line) for line in table if not line.startswith("padding")}) == 1


def test_a_plan_has_the_same_tables_as_the_container(out: Path) -> None:
    conversion = prepare(FolderSource(FIXTURES / "fused"), Options(4, 32, 8))
    origins = conversion.plan.origins()
    planned = inspection_text(describe_layout(conversion.plan.layout, 0, origins=origins)).split("\n\n")
    assert planned[1:] == inspection_text(inspect(out)).split("\n\n")[1:]


def test_one_expert_in_text(mixed: Path) -> None:
    text = expert_text(inspect_expert(mixed, 0, 1))
    check_tables(text)
    assert text.startswith("layer 0, expert 1: experts/layer-000.bin, byte 32768, 32768 bytes = 2 pages")
    assert re.search(r"^gate +codes +u32 +64×32 +0 +8192$", text, re.MULTILINE)
    assert re.search(r"^code +gate % +up % +down %", text, re.MULTILINE)
    assert re.search(r"^15 +\d", text, re.MULTILINE)
    eight_bits = expert_text(inspect_expert(mixed, 1, 1))
    assert re.search(r"^240-255 +\d", eight_bits, re.MULTILINE)
    assert re.search(r"^code +down %", eight_bits, re.MULTILINE)
    assert "code" not in expert_text(inspect_expert(mixed, 3, 0))


def test_text_of_a_writer_cannot_move_the_cursor(tmp_path: Path) -> None:
    write_container(tmp_path, options={"\x1b[2J": "\x1b[1A\n"})
    text = inspection_text(inspect(tmp_path))
    assert all(character.isprintable() or character == "\n" for character in text)


def test_a_verification_in_text_says_damage_first_and_the_verdict_last() -> None:
    damage = Damage("experts/layer-003.bin", "checksum is a, expected b", layer=3, expert=7)
    comparison = Comparison("bf16", "affine bits 4", 10, 1_000_000, 0.0123, 0.0456, False)
    lines = verification_text(Verification(9, 1 << 20, 30, (damage,), ("x: is left over",), (comparison,))).splitlines()
    assert lines[0] == "experts/layer-003.bin: layer 3, expert 7: checksum is a, expected b"
    assert lines[1:3] == ["and 29 more", "note: x: is left over"]
    assert lines[-3].split() == ["bf16", "affine", "bits", "4", "10", "1.00", "M", "0.0123", "4.56", "no"]
    assert lines[-1] == "9 files, 1.00 MiB of weights: 30 damaged places"
    assert verification_text(Verification(9, 1 << 20, 0, (), (), ())) == "9 files, 1.00 MiB of weights: sound"
