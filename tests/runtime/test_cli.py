"""`stream-run` as a user types it: what is read from where, what goes to which stream, and how it ends."""

import errno
import io
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest

from formats import __version__
from formats.errors import RequestError
from runtime import Engine
from runtime.cli import show_text
from runtime.options import Size
from runtime.sampling import Sampler
from runtime.stats import Stats
from tests.runtime.helpers import FIXTURES, PLENTY, Command, Outcome, flip, floor_bytes, one_line

PROMPT = "It was a fine morning, and Elizabeth"
GREEDY = ("--raw", "--temp", "0", "-n", "4")
VALIDATION = str(FIXTURES / "demo" / "validation.txt")


@pytest.fixture(autouse=True)
def direct(monkeypatch: pytest.MonkeyPatch) -> None:
    """No warning of a temporary folder in memory: see test_direct.py."""
    monkeypatch.setattr("runtime.store.proves_direct", lambda file: True)


def usage_error(outcome: Outcome) -> str:
    assert (outcome.status, outcome.out) == (2, ""), outcome
    assert "Traceback" not in outcome.err
    return outcome.err


@pytest.fixture(scope="module")
def expected(demo4: Path) -> str:
    """What follows PROMPT greedily, as `stream-run` shows it."""
    with Engine.open(demo4, ram_bytes=PLENTY) as engine:
        return "".join(engine.generate(PROMPT, max_new_tokens=4, temperature=0)) + "\n"


# ---- the first word


WORDS: dict[str, list[str]] = {
    "OUT alone": ["OUT"],
    "run OUT": ["run", "OUT"],
    "an option with a value before OUT": ["--ram", "1GiB", "OUT"],
    "a short option with a value before OUT": ["-t", "1", "OUT"],
    "a value stuck to its option": ["-t1", "OUT"],
    "a value after an equals sign": ["--chunk=7", "OUT"],
    "a flag before OUT": ["--ignore-eos", "OUT"],
    "run after options": ["-t", "1", "run", "OUT"],
    "the name of a command as a value": ["--stop", "bench", "OUT"],
    "after two dashes": ["--raw", "--", "OUT"],
}


@pytest.mark.parametrize("words", WORDS.values(), ids=WORDS.keys())
def test_run_may_be_left_out(command: Command, demo4: Path, expected: str, words: list[str]) -> None:
    given = [str(demo4) if word == "OUT" else word for word in words]
    outcome = command("-p", PROMPT, *GREEDY, *given)
    assert (outcome.status, outcome.out) == (0, expected)


def test_a_folder_with_the_name_of_a_command_needs_its_path(
    command: Command, demo4: Path, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bench").symlink_to(demo4)
    monkeypatch.chdir(tmp_path)
    assert command("./bench", "-p", PROMPT, *GREEDY).out == expected


def test_the_first_word_that_is_no_option_names_a_command(
    command: Command, demo4: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("runtime.cli.run_bench", lambda engine, **options: iter(["a bench"]))
    assert command("-v", "bench", demo4).out == "a bench\n"


def test_a_command_wins_over_a_folder_of_its_name(
    command: Command, demo4: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bench").symlink_to(demo4)
    monkeypatch.chdir(tmp_path)
    assert "Missing argument 'OUT'" in usage_error(command("bench"))


@pytest.mark.parametrize("name", ["run", "plan", "perplexity", "bench"])
def test_more_threads_than_processors_are_refused(
    command: Command, demo4: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    message = one_line(command(name, demo4, "-t", "5"))
    assert message == "--threads is 5, expected at most 4, the processors of this machine"


@pytest.mark.parametrize("words", [(), ("--help",), ("-h",)])
def test_help_names_the_commands(command: Command, words: tuple[str, ...]) -> None:
    outcome = command(*words)
    assert outcome.status == 0
    assert all(name in outcome.out for name in ("run", "perplexity", "bench"))


@pytest.mark.parametrize("name", ["run", "perplexity", "bench"])
def test_every_command_explains_itself(command: Command, name: str) -> None:
    outcome = command(name, "--help")
    assert outcome.status == 0
    assert "--ram" in outcome.out


def test_the_version_is_that_of_the_distribution(command: Command) -> None:
    assert command("--version") == (0, f"stream-run, version {__version__}\n", "")


# ---- the prompt


def test_the_prompt_may_come_from_a_file(command: Command, demo4: Path, expected: str, tmp_path: Path) -> None:
    (tmp_path / "prompt").write_text(PROMPT)
    assert command(demo4, "-f", tmp_path / "prompt", *GREEDY).out == expected


@pytest.mark.parametrize("words", [(), ("-f", "-")])
def test_the_prompt_may_come_from_a_pipe(command: Command, demo4: Path, expected: str, words: tuple[str, ...]) -> None:
    assert command(demo4, *words, *GREEDY, stdin=PROMPT.encode()).out == expected


def test_a_prompt_wins_over_a_pipe(command: Command, demo4: Path, expected: str) -> None:
    assert command(demo4, "-p", PROMPT, *GREEDY, stdin=b"something else").out == expected


@pytest.mark.parametrize("words", [("-p", ""), ()])
@pytest.mark.parametrize("mode", ["--raw", "--chat"])
def test_an_empty_prompt_is_refused(command: Command, demo4: Path, words: tuple[str, ...], mode: str) -> None:
    assert one_line(command(demo4, *words, mode)) == "the prompt is empty, expected text"


def test_two_prompts_are_a_usage_error(command: Command, demo4: Path) -> None:
    assert "-p and -f are both given" in usage_error(command(demo4, "-p", PROMPT, "-f", VALIDATION))


def test_a_prompt_that_is_not_utf_8_is_refused(command: Command, demo4: Path, tmp_path: Path) -> None:
    (tmp_path / "prompt").write_bytes(b"abc\xff")
    message = one_line(command(demo4, "-f", tmp_path / "prompt"))
    assert message == f"{tmp_path / 'prompt'}: is not UTF-8 text (byte 3)"


def test_a_prompt_file_that_is_not_there_is_a_usage_error(command: Command, demo4: Path) -> None:
    assert "No such file" in usage_error(command(demo4, "-f", "gone"))


def test_a_chat_is_the_default_where_there_is_a_template(command: Command, demo4: Path) -> None:
    words = (demo4, "-p", PROMPT, "--temp", "0", "-n", "4", "--json")
    by_default, chat, raw = command(*words), command(*words, "--chat"), command(*words, "--raw")
    ids = [json.loads(outcome.out)["prompt_token_ids"] for outcome in (by_default, chat, raw)]
    assert ids[0] == ids[1] != ids[2]
    assert ids[0][0] == 1  # <|im_start|>


def test_a_system_message_stands_in_the_prompt(command: Command, demo4: Path) -> None:
    outcome = command(demo4, "-p", PROMPT, "--system", "Be brief.", "-n", "1", "--json")
    with Engine.open(demo4, ram_bytes=PLENTY) as engine:
        assert json.loads(outcome.out)["prompt_token_ids"] == engine.chat_ids(PROMPT, "Be brief.")


def test_a_system_message_without_a_chat_is_refused(command: Command, demo4: Path) -> None:
    message = one_line(command(demo4, "-p", PROMPT, "--raw", "--system", "Be brief."))
    assert message.startswith("--system is set, but this is no chat")


# ---- token ids


def test_without_a_tokenizer_token_ids_go_in_and_out(command: Command, fused16: Path) -> None:
    with Engine.open(fused16, ram_bytes=PLENTY) as engine:
        expected = engine.generate_ids([1, 2, 3], max_new_tokens=4, ignore_eos=True)
    words = (fused16, "--ids", "1,2, 3", "--temp", "0", "-n", "4", "--ignore-eos")
    outcome = command(*words, "-v", stdin=None)
    assert (outcome.status, outcome.out) == (0, ",".join(map(str, expected)) + "\n"), outcome.err
    assert command(fused16, "--ids", outcome.out, "-n", "1").status == 0  # what came out goes in again
    result = json.loads(command(*words, "--json").out)
    assert (result["prompt_token_ids"], result["token_ids"]) == ([1, 2, 3], expected)
    assert "text" not in result


def test_with_a_tokenizer_token_ids_go_in_and_text_comes_out(command: Command, demo4: Path, expected: str) -> None:
    with Engine.open(demo4, ram_bytes=PLENTY) as engine:
        ids = ",".join(map(str, engine.text.encode(PROMPT)))
    outcome = command(demo4, "--ids", ids, "--temp", "0", "-n", "4")
    assert (outcome.status, outcome.out) == (0, expected)


@pytest.mark.parametrize("word", ["", "x", "-1", "1.5", "1_0", "\N{ARABIC-INDIC DIGIT ONE}", "VOCAB", "9" * 5000])
def test_what_is_no_token_id_is_one_line_before_weights_are_read(
    command: Command, demo4: Path, monkeypatch: pytest.MonkeyPatch, word: str
) -> None:
    with Engine.open(demo4, ram_bytes=PLENTY) as engine:
        vocab_size = engine.config.vocab_size
    word = word.replace("VOCAB", str(vocab_size))
    monkeypatch.setattr("runtime.cli.open_engine", None)
    message = one_line(command(demo4, "--ids", f"1,{word},2"))
    shown = word if len(word) <= 60 else word[:57] + "..."
    assert message == (f"--ids holds '{shown}', expected token ids from 0 to {vocab_size - 1} with commas between them")


@pytest.mark.parametrize("words", [("-p", "x"), ("-f", VALIDATION), ("--chat",)])
def test_token_ids_beside_another_prompt_or_a_chat_are_a_usage_error(
    command: Command, demo4: Path, words: tuple[str, ...]
) -> None:
    assert f"{words[0]} and --ids are both given" in usage_error(command(demo4, *words, "--ids", "1"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ("--stop", "x"),
            "tokenizer.json: is missing from the container: no text goes in or out, token ids do (--ids)",
        ),
        (
            ("--system", "x"),
            "--system is set, but this is no chat: the model has no chat template, or --raw or --ids is set",
        ),
    ],
)
def test_options_about_text_beside_token_ids_are_refused(
    command: Command, fused16: Path, words: tuple[str, ...], message: str
) -> None:
    assert one_line(command(fused16, "--ids", "1", *words)) == message


# ---- stdout and stderr


def test_stdout_holds_the_text_and_stderr_one_line_of_numbers(command: Command, demo4: Path, expected: str) -> None:
    outcome = command(demo4, "-p", PROMPT, *GREEDY)
    assert outcome.out == expected
    (line,) = outcome.err.splitlines()
    number = r"[0-9.e+-]+"
    assert re.fullmatch(
        rf"prompt \d+ tokens, {number} tokens/s; decode 3 tokens, {number} tokens/s; "
        rf"read {number} MiB at {number} GB/s; cache hits {number} %; peak memory {number} MiB; "
        r"(numpy|native \(.+\)), (direct|buffered) reads; --max-new-tokens ended the text",
        line,
    )


def test_json_is_one_object_on_stdout(command: Command, demo4: Path, expected: str) -> None:
    outcome = command(demo4, "-p", PROMPT, *GREEDY, "--json")
    (line,) = outcome.out.splitlines()
    result = json.loads(line)
    assert result["text"] + "\n" == expected
    assert set(Stats.__dataclass_fields__) < set(result)
    assert result["read_mode"] in ("direct", "buffered")
    assert result["ended"] == "max_new_tokens"


def test_json_in_a_chat_that_has_no_prompt_is_a_usage_error(command: Command, demo4: Path) -> None:
    assert "--json needs a prompt" in usage_error(command(demo4, "--json", stdin=None))


def test_verbose_says_what_was_chosen_on_stderr(command: Command, demo4: Path, expected: str) -> None:
    outcome = command(demo4, "-p", PROMPT, *GREEDY, "-v")
    assert outcome.out == expected
    assert re.search(r"^backend (numpy|native \(.+\)), reads (direct|buffered), ctx-size 2048", outcome.err)
    assert "sampling: temperature 0.0, top_k 40, top_p 0.95" in outcome.err
    assert "stop tokens: 0 <|endoftext|>, 2 <|im_end|>\n" in outcome.err
    assert "floor " in outcome.err


def test_warnings_go_to_stderr(command: Command, demo4: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runtime.store.proves_direct", lambda file: False)
    outcome = command(demo4, "-p", PROMPT, *GREEDY)
    assert outcome.err.startswith("warning: O_DIRECT does not work")


def test_a_terminal_that_cannot_show_a_character_does_not_end_the_text(
    command: Command, demo4: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Engine.open(demo4, ram_bytes=PLENTY) as engine:
        ids = engine.text.encode("\u0394t and more")
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="latin-1")
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setattr(Sampler, "sample", lambda *_: ids.pop(0))
    assert command(demo4, "-p", PROMPT, "--raw", "-n", str(len(ids))).status == 0
    assert isinstance(terminal.buffer, io.BytesIO)
    assert terminal.buffer.getvalue() == b"?t and more\n"


@pytest.mark.parametrize(
    ("words", "options"),
    [
        (("--temp", "0.5", "--seed", "3"), {"temperature": 0.5, "seed": 3}),
        (("--top-k", "3", "--seed", "4"), {"top_k": 3, "seed": 4}),
        (("--top-p", "0.3", "--min-p", "0.2", "--seed", "5"), {"top_p": 0.3, "min_p": 0.2, "seed": 5}),
        (("--temp", "0", "--repeat-penalty", "2"), {"temperature": 0, "repeat_penalty": 2.0}),
        (("--temp", "0", "--stop", "a", "--stop", "zzz"), {"temperature": 0, "stop": ["a", "zzz"]}),
        (("--temp", "0", "--ignore-eos"), {"temperature": 0, "ignore_eos": True}),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_options_are_those_of_the_api(
    command: Command, demo4: Path, words: tuple[str, ...], options: dict[str, Any]
) -> None:
    with Engine.open(demo4, ram_bytes=PLENTY) as engine:
        expected = "".join(engine.generate(PROMPT, max_new_tokens=12, **options))
    assert command(demo4, "-p", PROMPT, "--raw", "-n", "12", *words).out == expected + "\n"


# ---- errors


@pytest.mark.parametrize("words", [("-p", PROMPT), ()])
def test_a_folder_that_is_no_container_is_one_line(command: Command, tmp_path: Path, words: tuple[str, ...]) -> None:
    assert one_line(command(tmp_path, *words)) == f"{tmp_path}: holds no index.json, so it is no container"


def test_a_damaged_container_is_one_line(command: Command, own4: Path) -> None:
    flip(own4 / "resident.bin", 0)
    assert "resident.bin: tensor " in one_line(command(own4, "-p", PROMPT))


def test_too_little_memory_is_one_line_with_the_floor(command: Command, demo4: Path) -> None:
    message = one_line(command(demo4, "-p", PROMPT, "--ram", "1MiB"))
    assert re.match(r"--ram is 1\.00 MiB, but this model needs \d+(\.\d+)? MiB \(base ", message)


def test_a_prompt_longer_than_the_context_is_one_line(command: Command, demo4: Path) -> None:
    assert "but --ctx-size is 2" in one_line(command(demo4, "-p", PROMPT, "-c", "2"))


@pytest.mark.parametrize("words", [("OUT", "-p", PROMPT), ("perplexity", "OUT", VALIDATION)])
def test_a_container_without_a_tokenizer_is_one_line_before_weights_are_read(
    command: Command, fused16: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...]
) -> None:
    monkeypatch.setattr("runtime.cli.open_engine", None)
    message = one_line(command(*(fused16 if word == "OUT" else word for word in words)))
    assert message == "tokenizer.json: is missing from the container: no text goes in or out, token ids do (--ids)"


@pytest.mark.parametrize(
    "words",
    [
        ("--no-such-option",),
        ("-n", "0"),
        ("-n", "many"),
        ("--ram", "lots"),
        ("--temp", "-1"),
        ("--top-k", "-1"),
        ("--top-p", "2"),
        ("--min-p", "-0.1"),
        ("--repeat-penalty", "0"),
        ("extra",),
    ],
)
def test_a_wrong_option_is_a_usage_error(command: Command, demo4: Path, words: tuple[str, ...]) -> None:
    usage_error(command(demo4, "-p", PROMPT, *words))


def test_floors_are_those_that_the_engine_keeps(command: Command, demo4: Path) -> None:
    floor = floor_bytes(demo4, threads=2)
    assert command(demo4, "-p", PROMPT, *GREEDY, "-t", "2", "--ram", str(floor)).status == 0
    one_line(command(demo4, "-p", PROMPT, *GREEDY, "-t", "2", "--ram", str(floor - 1)))


def test_an_error_after_some_text_begins_a_line_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    def pieces(text: str) -> Iterator[str]:
        yield from text
        raise RequestError("damaged")

    for text, shown in (("It was", "It was\n"), ("", "")):
        with pytest.raises(RequestError):
            show_text(pieces(text))
        assert capsys.readouterr().out == shown


def test_a_file_that_may_not_be_read_is_one_line(command: Command, own4: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, at_most: int) -> bytes:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr("formats.container._read", refuse)
    assert one_line(command(own4, "-p", PROMPT)) == f"{own4}/index.json: Permission denied"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("-p", "x", "--temp", "nan"), "temperature is nan, expected a finite number of at least 0"),
        (("-p", "x", "--seed", "-1"), "seed is -1, expected an integer of at least 0"),
        (("-p", "x", "--stop", ""), "stop: holds an empty string, expected text"),
    ],
)
def test_what_is_out_of_range_is_refused_before_weights_are_read(
    command: Command, demo4: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], message: str
) -> None:
    monkeypatch.setattr("runtime.cli.open_engine", None)
    assert one_line(command(demo4, *words)) == message


# ---- sizes


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("1048576", 1 << 20),
        ("0", 0),
        ("2GiB", 2 << 30),
        ("2gib", 2 << 30),
        ("3g", 3 << 30),
        ("3 G", 3 << 30),
        ("1500MB", 1_500_000_000),
        ("1.5k", 1536),
        ("0.5TiB", 1 << 39),
        ("7B", 7),
    ],
)
def test_a_size_is_a_number_and_a_unit(text: str, nbytes: int) -> None:
    assert Size().convert(text, None, None) == nbytes


@pytest.mark.parametrize(
    "text", ["", "GiB", "-1", "1e9", "2 GiB 3", "2XB", "0x10", "nan", "inf", "1.", ".5", "9" * 400]
)
def test_anything_else_is_no_size(text: str) -> None:
    with pytest.raises(click.BadParameter, match="is no size such as 2GiB or 1500MB"):
        Size().convert(text, None, None)
