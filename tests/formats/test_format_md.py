"""FORMAT.md is true: its numbers, its example, its tables of fields and its reader."""

import dataclasses
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from formats.config import CONFIG_CLASSES, DecoderConfig
from formats.container import open_container
from formats.encodings import ENCODINGS, Affine
from formats.index import FORMAT_VERSION
from formats.layout import matrix_shape
from formats.record import PAGE_BYTES, PartSpec, decode_part, lay_out_record
from tests.containers import MODEL

TEXT = (Path(__file__).resolve().parents[2] / "formats" / "FORMAT.md").read_text(encoding="utf-8")


def section(title: str) -> str:
    """The text under a heading, up to the next heading."""
    found = re.search(rf"^#+ {re.escape(title)}\n(.*?)(?=^#|\Z)", TEXT, re.MULTILINE | re.DOTALL)
    assert found, title
    return found[1]


def table(text: str) -> list[list[str]]:
    """Cells of a Markdown table, without its head."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def block(language: str) -> str:
    found = re.findall(rf"^```{language}\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)
    assert len(found) == 1
    return str(found[0])


def number(cell: str) -> int:
    return int(cell.replace(",", ""))


def test_the_size_worked_out_in_numbers_is_what_the_code_lays_out() -> None:
    encoding = Affine(4, 64, "bf16")
    shapes = {"gate": (1024, 4096), "up": (1024, 4096), "down": (4096, 1024)}
    record = lay_out_record(PartSpec(name, *shape, encoding) for name, shape in shapes.items())
    expected = [
        [part.name, a.name, a.dtype, " × ".join(map(str, a.shape)), a.offset, a.nbytes]
        for part in record.parts
        for a in part.arrays
    ]
    found = [[*row[:4], number(row[4]), number(row[5])] for row in table(section("Record"))]
    assert found == expected
    sentence = f"{record.record_bytes:,} bytes long, which is {record.record_bytes // PAGE_BYTES} pages"
    assert sentence in section("Record")


def test_the_hex_example_means_the_values_beside_it_and_back() -> None:
    fields = dict(re.findall(r"^(\w+):((?:.*\n)(?:\s+.*\n)*)", block("hex"), re.MULTILINE))
    encoding = Affine(4, 32, "bf16")
    arrays = {
        spec.name: np.frombuffer(bytes.fromhex(fields[spec.name]), "<u4" if spec.dtype == "u32" else "<u2").reshape(
            spec.shape
        )
        for spec in encoding.arrays(1, 32)
    }
    values = np.array([fields["values"].split()], np.float32)
    np.testing.assert_array_equal(encoding.decode(arrays), values)
    for name, expected in encoding.encode(values).items():
        np.testing.assert_array_equal(arrays[name], expected)


def test_the_table_of_encodings_names_all_that_the_code_knows() -> None:
    named = [name for row in table(section("Encodings")) for name in re.findall(r"`(\w+)`", row[0])]
    assert sorted(named) == sorted(ENCODINGS)


def objects_at(content: Any, path: str) -> Iterator[dict[str, Any]]:
    """Objects of the index at a path like `layers[].parts[]`; null entries are left out."""
    if not path:
        yield content
        return
    step, _, rest = path.partition(".")
    below = content[step.removesuffix("[]")]
    for item in below if step.endswith("[]") else [below]:
        if item is not None:
            yield from objects_at(item, rest)


def documented_fields(title: str, model_type: str = MODEL.model_type) -> set[str]:
    """The fields that a table of the index names, but for those of other model types."""
    names = {model_type, "decoder" if issubclass(CONFIG_CLASSES[model_type], DecoderConfig) else model_type}
    of_types = [(row[0], re.search(r"\(([\w, ]+)\)", row[0])) for row in table(section(title))]
    cells = [cell for cell, types in of_types if types is None or names & set(types[1].split(", "))]
    return {name for cell in cells for name in re.findall(r"`(\w+)`", cell)}


@pytest.mark.parametrize("model_type", CONFIG_CLASSES)
def test_the_table_of_the_model_names_exactly_the_facts_of_each_type(model_type: str) -> None:
    facts = {field.name for field in dataclasses.fields(CONFIG_CLASSES[model_type])}
    assert documented_fields("`model`", model_type) == facts
    assert f'`"{model_type}"`' in section("`model`")


@pytest.mark.parametrize("model_type", CONFIG_CLASSES)
def test_facts_that_may_be_missing_are_named(model_type: str) -> None:
    kind = CONFIG_CLASSES[model_type]
    (sentence,) = (line for line in TEXT.splitlines() if line.startswith("Containers that are older"))
    optional = [field.name for field in dataclasses.fields(kind) if field.default is not dataclasses.MISSING]
    assert all(f"`{name}`" in sentence for name in optional)
    assert not optional or ("decoder" if issubclass(kind, DecoderConfig) else model_type) in sentence


ARRAYS = ("embedding.arrays[]", "resident.tensors[].arrays[]", "layers[].parts[].arrays[]")
TABLES = {
    "The object itself": ("",),
    "`source`": ("source",),
    "`model`": ("model",),
    "`files[]`": ("files[]",),
    "`embedding`": ("embedding",),
    "`resident`": ("resident",),
    "`resident.tensors[]`": ("resident.tensors[]",),
    "`layers[]`": ("layers[]",),
    "`layers[].parts[]`": ("layers[].parts[]",),
    "`arrays[]`": ARRAYS,
}


@pytest.mark.parametrize("title", TABLES)
def test_the_tables_of_the_index_name_exactly_its_fields(pristine: Path, title: str) -> None:
    documented = documented_fields(title)
    content = json.loads((pristine / "index.json").read_bytes()) | {"ngrams": None}  # of one model alone
    found = [item for path in TABLES[title] for item in objects_at(content, path)]
    assert found
    assert all(item.keys() == documented for item in found)


def test_every_table_of_the_index_is_tested() -> None:
    index = TEXT[TEXT.index("## Index") : TEXT.index("## Checksums")]
    assert re.findall(r"^### (.*)$", index, re.MULTILINE) == list(TABLES)


def test_the_reader_imports_only_json_and_numpy() -> None:
    assert re.findall(r"^\s*(?:import|from) .*$", block("python"), re.MULTILINE) == [
        "import json",
        "import numpy as np",
    ]


def test_the_reader_reads_what_the_code_reads(pristine: Path) -> None:
    reader: dict[str, Any] = {}
    exec(compile(block("python"), "FORMAT.md", "exec"), reader)
    layout = open_container(pristine).index.layout
    index = reader["open_index"](pristine)
    for i, layer in layout.moe_layers():
        record_bytes = layer.record.record_bytes
        records = np.fromfile(pristine / layer.file, np.uint8).reshape(layer.num_experts, record_bytes)
        for number, record in enumerate(records):
            parts = reader["expert"](pristine, index, i, number)
            assert list(parts) == [part.name for part in layer.record.parts]
            for part in layer.record.parts:
                np.testing.assert_array_equal(parts[part.name], decode_part(part, record)[0])
    resident = np.fromfile(pristine / "resident.bin", np.uint8)
    for tensor in layout.resident:
        views = {array.name: array.view(resident, tensor.offset) for array in tensor.arrays}
        expected = tensor.encoding.decode(views).reshape(tensor.shape)
        assert matrix_shape(tensor.shape) == (expected.size // tensor.shape[-1], tensor.shape[-1])
        np.testing.assert_array_equal(reader["tensor"](pristine, index, tensor.name), expected)
    embedding = layout.embedding
    rows = np.fromfile(pristine / "embedding.bin", np.uint8)[: embedding.rows * embedding.row_bytes]
    expected = embedding.encoding.decode(embedding.views(rows.reshape(embedding.rows, embedding.row_bytes)))
    for row in range(embedding.rows):
        np.testing.assert_array_equal(reader["embedding_row"](pristine, index, row), expected[row])


def test_the_reader_runs_without_our_packages(pristine: Path, tmp_path: Path) -> None:
    script = tmp_path / "reader.py"
    script.write_text(block("python") + "\nimport sys\nprint(len(open_index(sys.argv[1])['layers']))\n", "utf-8")
    command = [sys.executable, "-I", str(script), str(pristine)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout == "5\n"


def test_the_version_is_that_of_the_code() -> None:
    assert TEXT.startswith(f"# Container format, version {FORMAT_VERSION}\n")
    assert f"- Version {FORMAT_VERSION}: " in section("Changes")


def test_prose_has_one_sentence_per_line() -> None:
    prose = re.sub(r"^```.*?^```", "", TEXT, flags=re.MULTILINE | re.DOTALL)
    lines = [line for line in prose.splitlines() if not line.startswith(("|", "#"))]
    assert not [line for line in lines if re.search(r"[a-z`)][.] [A-Z]", line)]
