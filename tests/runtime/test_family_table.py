"""docs/FAMILIES.md names every case that is run whole, and what it says of them is within the marks."""

import json

from formats.config import MODEL_TYPES, read_config
from repack.supported import NUMPY_PARTS, numpy_markdown
from tests.runtime.family_table import BESIDE, FOLDERS, RECIPES, ROOT, TABLE, Row

ROWS = [
    Row(*(cell.strip() for cell in line.strip("|").split("|")))
    for line in TABLE.read_text(encoding="utf-8").partition(BESIDE)[0].splitlines()
    if line.startswith("| ") and not line.startswith(("| case", "| ---"))
]


def test_every_case_has_a_row() -> None:
    assert [row.case for row in ROWS] == [*RECIPES, *(f"{name}/" for name in FOLDERS)]


def test_every_conversion_is_exact_and_every_error_within_its_mark() -> None:
    for row in ROWS:
        mark = 2e-3 if row.model_type in ("qwen3_5_moe", "qwen3_next") else 5e-4
        assert row.exact == "yes"
        assert max(float(row.numpy_error), float(row.native_error)) < mark, row


def test_the_tests_that_it_names_are_there() -> None:
    assert all((ROOT / row.test).is_file() for row in ROWS)


def test_it_says_what_numpy_computes_beside_the_kernels() -> None:
    assert f"\n{BESIDE}{numpy_markdown()}\n\n## Lines\n" in TABLE.read_text(encoding="utf-8")


def test_what_numpy_computes_is_listed_by_the_model_types_of_the_cases() -> None:
    configs = [case.config for case, _ in RECIPES.values()]
    configs += [config["text_config"] for config in configs if config["model_type"] == "qwen4_exp"]  # saved alone
    found = {
        (part, config["model_type"])
        for config in configs
        if config["model_type"] in MODEL_TYPES
        for part in read_config(json.dumps(config).encode()).numpy_parts
    }
    assert found == {(part, model_type) for part, model_types in NUMPY_PARTS.items() for model_type in model_types}
