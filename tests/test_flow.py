"""The whole path as a user walks it, through the installed commands' own entry points: demo in, English out."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.test_contracts import pyproject


def finished(command: str, *words: str | Path) -> "subprocess.CompletedProcess[str]":
    """An installed command with these words, at its end."""
    module, _, function = pyproject()["project"]["scripts"][command].partition(":")
    entry = f"import sys; from {module} import {function}; sys.argv[0] = {command!r}; sys.exit({function}())"
    return subprocess.run(
        [sys.executable, "-c", entry, *map(str, words)], capture_output=True, text=True, timeout=100, check=False
    )


def run(command: str, *words: str | Path) -> str:
    """stdout of an installed command; it must end well."""
    done = finished(command, *words)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo, converted as `make demo` does."""
    folder = tmp_path_factory.mktemp("flow") / "out"
    run("repack", "convert", "demo", folder)
    return folder


def test_the_converted_demo_can_be_inspected(out: Path) -> None:
    assert "qwen3_5_moe" in run("repack", "inspect", out)


def test_the_converted_demo_is_sound(out: Path) -> None:
    run("repack", "verify", out, "--source", "demo")


def test_the_converted_demo_writes_english(out: Path) -> None:
    words = ("-p", "It was a fine morning, and Elizabeth", "--raw", "-n", "24", "--temp", "0")
    text = run("stream-run", out, *words)
    assert {"the", "and", "was", "of", "to", "a", "had", "her"} & set(text.split())


def test_the_same_prompt_and_seed_give_the_same_text_again(out: Path) -> None:
    words = ("-p", "Tell me a story.", "-n", "12", "--seed", "1")
    assert run("stream-run", out, *words) == run("stream-run", out, *words)


def test_the_converted_demo_loses_little_against_16_bits(out: Path, tmp_path: Path) -> None:
    run("repack", "convert", "demo", tmp_path / "out16", "--bits", "16", "--resident-bits", "16")
    text = Path(__file__).parent / "fixtures" / "demo" / "validation.txt"
    words = ("--max-tokens", "1024", "--reference", tmp_path / "out16", "--json")
    quality = json.loads(run("stream-run", "perplexity", out, text, *words))
    # measured on 20,000 tokens: 0.00865 nats and 93.8 %; a wrong group or scale is off by far more
    assert quality["kl_mean"] < 0.02
    assert quality["top1_agreement"] > 0.9


@pytest.mark.parametrize(("missing", "status"), [(0, 0), (1, 1)], ids=["the floor", "one byte less"])
def test_the_floor_that_inspect_prints_is_the_least_that_a_run_takes(out: Path, missing: int, status: int) -> None:
    memory = json.loads(run("repack", "inspect", out, "--json"))["memory"]
    ram, threads = str(memory["floor_bytes"] - missing), str(memory["threads"])
    words = ("-p", "Once", "-n", "1", "--ram", ram, "--threads", threads)
    assert finished("stream-run", out, *words).returncode == status
