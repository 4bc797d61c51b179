"""`stream-run perplexity` and `stream-run bench` as a user types them."""

import fcntl
import json
import os
import pty
import struct
import subprocess
import termios
from pathlib import Path

import pytest

from formats.budget import human
from formats.container import open_container
from runtime import Engine, bench
from tests.runtime.helpers import FIXTURES, PLENTY, STREAM_RUN, Command, one_line

PROMPT = "It was a fine morning, and Elizabeth"
GREEDY = ("--raw", "--temp", "0", "-n", "4")
VALIDATION = str(FIXTURES / "demo" / "validation.txt")


def on_a_terminal(*words: str | Path) -> str:
    """What `stream-run` shows on a stderr that is a terminal; it must end well."""
    terminal, stderr = pty.openpty()
    fcntl.ioctl(stderr, termios.TIOCSWINSZ, struct.pack("4H", 24, 100, 0, 0))  # a bar needs rows and columns
    try:
        with subprocess.Popen([*STREAM_RUN, *map(str, words)], stdout=subprocess.DEVNULL, stderr=stderr) as process:
            os.close(stderr)
            shown = b""
            try:
                while more := os.read(terminal, 1 << 16):
                    shown += more
            except OSError:
                pass  # Linux: the other end is closed
        assert process.returncode == 0, shown
    finally:
        os.close(terminal)
    return shown.decode()


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


BENCH = ("--prompt-tokens", "8", "--new-tokens", "2", "--runs", "2")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "CEILING_S", 0.01)


@pytest.fixture
def bench_lines(command: Command, demo4: Path, quick: None, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """As of a model whose resident weights are more than any cache."""
    monkeypatch.setattr(bench, "MEMORY_BYTES", 1)
    outcome = command("bench", demo4, *BENCH)
    assert (outcome.status, outcome.err) == (0, "")
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


def test_resident_weights_that_fit_into_a_cache_tell_nothing_of_memory(
    command: Command, demo4: Path, quick: None
) -> None:
    lines = command("bench", demo4, *BENCH).out.splitlines()
    size = human(open_container(demo4).index.layout.resident_bytes)
    assert lines[1] == f"memory ceiling     not measured: {size} of resident weights may lie in the processor's caches"
    assert not any(line.startswith("decode bound") for line in lines)
    result = json.loads(lines[-1])
    assert [figure["name"] for figure in result["measurements"]] == ["disk ceiling", "prefill", "decode"]
    assert (result["decode_bound_tokens_per_s"], result["share_of_bound"]) == (None, None)


def test_bench_as_json_is_its_last_line_alone(command: Command, demo4: Path, quick: None) -> None:
    outcome = command("bench", demo4, "--prompt-tokens", "8", "--new-tokens", "2", "--runs", "1", "--json")
    assert len(outcome.out.splitlines()) == 1
    assert json.loads(outcome.out)["settings"]["runs"] == 1


def test_bench_decodes_with_every_slot_taken(demo4: Path, quick: None) -> None:
    """What fits is in memory before anything is timed, though a prompt of one token asks for few of the experts."""
    with Engine.open(demo4, ram_bytes=PLENTY) as engine:
        *_, last = bench.run_bench(engine, prompt_tokens=1, new_tokens=2, runs=1)
        assert engine.experts.cache.free_slots == 0
    assert json.loads(last)["hit_rate"] == 1


@pytest.mark.parametrize("memory_bytes", [1, 1 << 40])
def test_bench_tells_what_begins_as_often_as_it_says(demo4: Path, quick: None, memory_bytes: int) -> None:
    with pytest.MonkeyPatch.context() as patch, Engine.open(demo4, ram_bytes=PLENTY) as engine:
        patch.setattr(bench, "MEMORY_BYTES", memory_bytes)
        begun: list[str] = []
        list(bench.run_bench(engine, prompt_tokens=8, new_tokens=2, runs=2, progress=begun.append))
        assert len(begun) == bench.num_steps(engine, new_tokens=2, runs=2)
    assert begun[0] == "disk ceiling"
    assert begun[-6:] == ["prefill", "decode", "decode"] * 2


def test_bench_shows_a_terminal_what_it_does(demo4: Path) -> None:
    for words, shown in (((), True), (("--json",), False)):
        text = on_a_terminal("bench", demo4, *BENCH, *words)
        assert ("warming up" in text) == shown, text


def test_more_tokens_than_the_context_are_refused_before_anything_is_loaded(
    command: Command, demo4: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("runtime.cli.open_engine", None)
    message = one_line(command("bench", demo4, "--ctx-size", "100", "--prompt-tokens", "90", "--new-tokens", "11"))
    assert message == "--prompt-tokens 90 and --new-tokens 11 make 101 tokens, expected at most --ctx-size 100"
