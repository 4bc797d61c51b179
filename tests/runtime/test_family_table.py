"""docs/FAMILIES.md names every case that is run whole, and what it says of them is within the marks."""

from tests.runtime.family_table import FOLDERS, RECIPES, ROOT, TABLE, Row

ROWS = [
    Row(*(cell.strip() for cell in line.strip("|").split("|")))
    for line in TABLE.read_text(encoding="utf-8").partition("## Lines")[0].splitlines()
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
