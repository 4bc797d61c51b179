"""`stream-run perplexity` and `stream-run bench` as a user types them."""

import json
from pathlib import Path

import pytest

from runtime import bench
from tests.runtime.helpers import FIXTURES, Command, one_line

PROMPT = "It was a fine morning, and Elizabeth"
GREEDY = ("--raw", "--temp", "0", "-n", "4")
VALIDATION = str(FIXTURES / "demo" / "validation.txt")


@pytest.fixture(autouse=True)
def direct(monkeypatch: pytest.MonkeyPatch) -> None:
    """No warning of a temporary folder in memory: see test_direct.py."""
    monkeypatch.setattr("runtime.store.proves_direct", lambda file: True)


def test_perplexity_prints_a_table(command: Command, demo4: Path) -> None:
    outcome = command("perplexity", demo4, VALIDATION, "--max-tokens", "100", "--window", "64", "--stride", "32")
    assert outcome.out.startswith("tokens scored       99 (windows of 64, stride 32)\nperplexity ")
    assert outcome.err.startswith("read ")  # a window is neither a prompt nor new tokens


def test_perplexity_against_itself_has_no_divergence(command: Command, demo4: Path) -> None:
    outcome = command("perplexity", demo4, VALIDATION, "--max-tokens", "100", "--json", "--reference", demo4)
    result = json.loads(outcome.out)
    assert (result["kl_mean"], result["kl_p99"], result["top1_agreement"]) == (0, 0, 1)
    assert result["reference_perplexity"] == result["perplexity"]


def test_perplexity_shares_the_ceiling_with_its_reference(command: Command, demo4: Path) -> None:
    outcome = command(
        "perplexity", demo4, VALIDATION, "--max-tokens", "9", "--reference", demo4, "--ram", "2GiB", "--json"
    )
    assert json.loads(outcome.out)["ram_bytes"] == 1 << 30


def test_perplexity_refuses_the_reference_of_another_vocabulary(command: Command, demo4: Path, fused16: Path) -> None:
    outcome = command("perplexity", demo4, VALIDATION, "--max-tokens", "9", "--reference", fused16)
    assert one_line(outcome) == "--reference has another vocabulary or tokenizer, expected the same model's"


@pytest.mark.parametrize("words", [("--window", "1"), ("--window", "4096"), ("--stride", "0"), ("--stride", "513")])
def test_windows_that_make_no_sense_are_one_line(command: Command, demo4: Path, words: tuple[str, str]) -> None:
    message = one_line(command("perplexity", demo4, VALIDATION, "--max-tokens", "100", *words))
    assert message.startswith(f"{words[0]} is {words[1]}, expected ")


def test_a_text_that_is_not_utf_8_is_one_line(command: Command, demo4: Path, tmp_path: Path) -> None:
    (tmp_path / "text").write_bytes(b"\xff")
    assert "is not UTF-8 text (byte 0)" in one_line(command("perplexity", demo4, tmp_path / "text"))


@pytest.fixture
def bench_lines(command: Command, demo4: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setattr(bench, "CEILING_S", 0.01)
    outcome = command("bench", demo4, "--prompt-tokens", "8", "--new-tokens", "2", "--runs", "2")
    assert outcome.status == 0
    return outcome.out.splitlines()


def test_bench_prints_the_ceilings_first(bench_lines: list[str]) -> None:
    assert [line.split("  ")[0] for line in bench_lines[:4]] == ["disk ceiling", "memory ceiling", "prefill", "decode"]


def test_the_last_line_of_bench_is_one_json_object(bench_lines: list[str]) -> None:
    result = json.loads(bench_lines[-1])
    assert isinstance(result["bars"], list)
    assert [figure["name"] for figure in result["measurements"]] == [
        "disk ceiling",
        "memory ceiling",
        "prefill",
        "decode",
    ]
    assert all(figure["low"] <= figure["median"] <= figure["high"] for figure in result["measurements"])
    assert result["share_of_bound"] > 0


def test_bench_as_json_is_its_last_line_alone(command: Command, demo4: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "CEILING_S", 0.01)
    outcome = command("bench", demo4, "--prompt-tokens", "8", "--new-tokens", "2", "--runs", "1", "--json")
    assert len(outcome.out.splitlines()) == 1
    assert json.loads(outcome.out)["settings"]["runs"] == 1
