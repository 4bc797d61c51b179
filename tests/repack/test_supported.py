"""`repack families` and the README: complete, and about tests that exist."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from formats.config import MODEL_TYPES
from repack.cli import cli
from repack.supported import ENCODINGS_TEST, SOURCE_ENCODINGS, SUPPORTED, markdown

ROOT = Path(__file__).resolve().parents[2]
BEGIN = "<!-- made by `repack families --markdown`; a test compares -->\n"
END = "<!-- end of families -->\n"


def test_every_model_type_that_is_read_has_one_row() -> None:
    assert [row.model_type for row in SUPPORTED] == sorted(MODEL_TYPES)


@pytest.mark.parametrize("path", sorted({ENCODINGS_TEST, *(row.test for row in SUPPORTED)}))
def test_the_tests_that_it_names_are_there(path: str) -> None:
    assert (ROOT / path).is_file()


def test_the_tables_of_the_readme_are_made_from_it() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert readme[readme.index(BEGIN) + len(BEGIN) : readme.index(END)] == markdown()


def test_the_command_prints_markdown_json_and_text() -> None:
    runner = CliRunner()
    assert runner.invoke(cli, ["families", "--markdown"]).output == markdown()
    found = json.loads(runner.invoke(cli, ["families", "--json"]).output)
    assert [row["model_type"] for row in found["models"]] == [row.model_type for row in SUPPORTED]
    assert [row["name"] for row in found["encodings"]] == [row.name for row in SOURCE_ENCODINGS]
    text = runner.invoke(cli, ["families"]).output
    assert all(row.model_type in text and row.models in text for row in SUPPORTED)
