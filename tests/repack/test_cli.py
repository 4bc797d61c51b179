"""The command: what goes to stdout and to stderr, the exit status, and one line for each error."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from formats import __version__
from formats.budget import memory_terms
from formats.container import open_container
from formats.memory import granted_processors
from repack import cli
from repack.sources import demo_folder
from tests.repack.checkpoints import PREFIX, SMALL, config_json, shapes, write_random
from tests.repack.quantized import CONFIGS, in_kind, write_tensors

FIXTURES = Path(__file__).parent.parent / "fixtures"


class Result(NamedTuple):
    status: int
    out: str
    err: str


Run = Callable[..., Result]


@pytest.fixture
def repack(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run the command as the entry point does."""

    def run(*args: object) -> Result:
        monkeypatch.setattr(sys, "argv", ["repack", *map(str, args)])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        captured = capsys.readouterr()
        status = stopped.value.code
        assert status is None or isinstance(status, int)
        return Result(status or 0, captured.out, captured.err)

    return run


def assert_one_line(result: Result, line: str) -> None:
    assert (result.status, result.out) == (1, "")
    assert re.fullmatch(rf"error: [^\n]*{re.escape(line)}[^\n]*\n", result.err), result.err


def test_convert_says_what_was_written_and_what_comes_next(repack: Run, tmp_path: Path) -> None:
    result = repack("convert", "demo", tmp_path / "out")
    assert (result.status, result.err) == (0, "")
    lines = result.out.splitlines()
    assert lines[0] == f"{tmp_path / 'out'}: 17.1 MiB: experts 10.0 MiB, resident 5.86 MiB, embedding 1.25 MiB"
    assert re.fullmatch(r"read 39\.7 MiB of weights in [\d.]+ s, [\d.]+ GB/s, encoder (native \(\w+\)|NumPy)", lines[1])
    assert lines[2] == f"run it: stream-run {tmp_path / 'out'}"


def test_convert_json_is_one_object(repack: Run, tmp_path: Path) -> None:
    said = json.loads(repack("convert", "demo", tmp_path / "out", "--json", "--bits", "8").out)
    layout = open_container(tmp_path / "out").index.layout
    assert said["options"] == {"bits": 8, "group_size": 64, "requantize": False, "resident_bits": 8}
    assert said["total_bytes"] == layout.total_bytes
    assert said["read_bytes"] == said["source_bytes"] == 41_646_736
    assert not said["already_there"]


def test_what_is_skipped_is_told_on_stderr(repack: Run, tmp_path: Path) -> None:
    result = repack("convert", FIXTURES / "fused", tmp_path / "out")
    assert re.findall(r"skipped (\d+) tensors of ([a-z -]+) \(", result.err) == [
        ("19", "multi-token prediction"),
        ("21", "the vision tower"),
    ]


@pytest.mark.parametrize("command", [("convert", "OUT"), ("convert", "OUT", "--dry-run"), ("plan", "--no-probe")])
@pytest.mark.parametrize(
    ("raw", "line"),
    [
        (b"", "tokenizer.json: is no working tokenizer (EOF while parsing"),
        (b"\xff", "tokenizer.json: is no working tokenizer ('utf-8' codec can't decode"),
        (
            b'{"model": {"type": "BPE", "vocab": {}, "merges": []}}',
            "tokenizer.json: decoder is [None], expected Byte",
        ),
    ],
)
def test_a_broken_tokenizer_is_refused_before_anything_is_written(
    repack: Run, tmp_path: Path, raw: bytes, line: str, command: tuple[str, ...]
) -> None:
    source = Path(shutil.copytree(demo_folder(), tmp_path / "source"))
    (source / "tokenizer.json").write_bytes(raw)
    name, *options = (tmp_path / "out" if word == "OUT" else word for word in command)
    assert_one_line(repack(name, source, *options), line)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("command", "options"), [("convert", ()), ("plan", ("--no-probe", "--out"))])
def test_a_source_without_a_tokenizer_is_said_to_give_token_ids_alone(
    repack: Run, tmp_path: Path, command: str, options: tuple[str, ...]
) -> None:
    source = Path(shutil.copytree(demo_folder(), tmp_path / "source"))
    (source / "tokenizer.json").unlink()
    result = repack(command, source, *options, tmp_path / "out")
    text = f"warning: {source}: holds no tokenizer.json: the container takes and gives token ids, no text\n"
    assert (result.status, result.err) == (0, text)


def test_the_same_command_again_says_that_it_is_done(repack: Run, tmp_path: Path) -> None:
    repack("convert", "demo", tmp_path / "out")
    result = repack("convert", "demo", tmp_path / "out")
    assert result.status == 0
    assert result.out.splitlines()[0].endswith(
        "out is already there, converted with these options from files of these names and sizes"
    )


def test_another_option_on_a_finished_output_is_one_line(repack: Run, tmp_path: Path) -> None:
    repack("convert", "demo", tmp_path / "out")
    result = repack("convert", "demo", tmp_path / "out", "--resident-bits", "16")
    assert_one_line(result, "holds a container with options resident_bits 8, not 16; --force replaces it")
    assert repack("convert", "demo", tmp_path / "out", "--resident-bits", "16", "--force").status == 0


def test_a_dry_run_prints_the_plan_and_writes_nothing(repack: Run, tmp_path: Path) -> None:
    result = repack("convert", "demo", tmp_path / "out", "--dry-run")
    assert (result.status, result.err) == (0, "")
    assert "experts gate" in result.out
    assert "RAM floor" in result.out
    assert result.out.splitlines()[-1].endswith("nothing is written now")
    assert not (tmp_path / "out").exists()


def test_a_dry_run_and_inspect_print_the_same_numbers(repack: Run, tmp_path: Path) -> None:
    planned = json.loads(repack("convert", FIXTURES / "fused", tmp_path / "out", "--dry-run", "--json").out)
    repack("convert", FIXTURES / "fused", tmp_path / "out")
    inspected = json.loads(repack("inspect", tmp_path / "out", "--json").out)
    for key in ("model", "parts", "records", "per_token", "memory", "total_bytes", "bits_per_weight", "options"):
        assert planned[key] == inspected[key]
    assert [skipped["tensors"] for skipped in planned["skipped"]] == [19, 21]
    layout = open_container(tmp_path / "out").index.layout
    terms = memory_terms(layout, tokenizer_json_bytes=0, ctx_size=1024, chunk_size=512, threads=granted_processors())
    assert planned["memory"]["floor_bytes"] == terms.floor_bytes


def test_inspect_shows_a_container_and_one_record(repack: Run, tmp_path: Path) -> None:
    repack("convert", "demo", tmp_path / "out")
    assert "bits/weight" in repack("inspect", tmp_path / "out").out
    record = repack("inspect", tmp_path / "out", "--layer", "7", "--expert", "39").out
    assert record.startswith("layer 7, expert 39: experts/layer-007.bin, byte 1277952")
    said = json.loads(repack("inspect", tmp_path / "out", "--expert", "39", "--json").out)
    assert (said["layer"], said["expert"]) == (0, 39)
    assert_one_line(repack("inspect", tmp_path / "out", "--layer", "8"), "--layer is 8, expected 0 to 7")
    assert_one_line(repack("inspect", tmp_path), "holds no index.json, so it is no container")


def test_verify_is_content_with_a_sound_container(repack: Run, tmp_path: Path) -> None:
    repack("convert", "demo", tmp_path / "out")
    assert repack("verify", tmp_path / "out").status == 0
    result = repack("verify", tmp_path / "out", "--source", "demo", "--json")
    said = json.loads(result.out)
    assert (result.status, said["sound"], said["num_damage"]) == (0, True, 0)
    assert {comparison["exact"] for comparison in said["comparisons"]} == {True, False}


def test_verify_names_damage_and_exits_1(repack: Run, tmp_path: Path) -> None:
    repack("convert", "demo", tmp_path / "out")
    path = tmp_path / "out/experts/layer-003.bin"
    raw = bytearray(path.read_bytes())
    raw[32768 * 17 + 5] ^= 1
    path.write_bytes(raw)
    result = repack("verify", tmp_path / "out")
    assert result.status == 1
    assert result.out.startswith("experts/layer-003.bin: layer 3, expert 17: checksum is ")
    assert result.err == ""


def test_version(repack: Run) -> None:
    assert repack("--version").out == f"repack, version {__version__}\n"


# ---- refusals


def test_errors_are_one_line_and_exit_1(repack: Run, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    assert_one_line(repack("convert", empty, tmp_path / "out"), "holds no model*.safetensors, so it is no checkpoint")
    assert_one_line(repack("convert", "absent", tmp_path / "out"), "absent: no such file or folder")
    assert_one_line(repack("verify", tmp_path / "absent"), "no such folder")
    assert_one_line(
        repack("convert", "demo", tmp_path / "out", "--group-size", "128"), "expected --group-size 32 or 64"
    )
    assert not (tmp_path / "out").exists()
    for command in (("plan", "Qwen3-30B-A3B"), ("rehearse", "Qwen3-30B-A3B", tmp_path / "out")):
        assert_one_line(repack(*command), "Qwen3-30B-A3B: is not here and no repository org/name; known without")


def test_a_place_that_cannot_be_written_promises_nothing(repack: Run, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    result = repack("convert", "demo", tmp_path / "file" / "out")
    assert_one_line(result, "Not a directory")
    assert "goes on" not in result.err


def test_an_unsupported_architecture_is_one_line(repack: Run, tmp_path: Path) -> None:
    folder = write_random(tmp_path / "source", SMALL, shapes(SMALL))
    (folder / "config.json").write_text('{"model_type": "llama"}')
    assert_one_line(
        repack("convert", folder, tmp_path / "out"),
        "config.json: model_type is llama, supported are AXK1, afmoe,",
    )


def test_an_unknown_tensor_is_one_line(repack: Run, tmp_path: Path) -> None:
    listing = shapes(SMALL) | {f"{PREFIX}layers.0.bonus": ("BF16", (1,))}
    folder = write_random(tmp_path / "source", SMALL, listing)
    assert_one_line(repack("convert", folder, tmp_path / "out"), f"{PREFIX}layers.0.bonus has no place in")


@pytest.mark.parametrize(
    "arguments",
    [
        ("convert", "demo"),
        ("convert", "demo", "out", "--bits", "5"),
        ("convert", "demo", "out", "--group-size", "48"),
        ("convert", "demo", "out", "--jobs", "0"),
        ("convert", "demo", "out", "--revision", "main"),
        ("convert", "demo", "out", "--unknown"),
        ("inspect", "out", "--layer", "-1"),
        ("unknown",),
    ],
    ids=" ".join,
)
def test_wrong_usage_exits_2(repack: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: Any) -> None:
    monkeypatch.chdir(tmp_path)
    result = repack(*arguments)
    assert (result.status, result.out) == (2, "")
    assert "Error: " in result.err
    assert not list(tmp_path.iterdir())


def test_a_bug_keeps_its_traceback(repack: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "prepare", None)
    with pytest.raises(TypeError):
        repack("convert", "demo", tmp_path / "out")


def test_requantize_is_echoed(repack: Run, tmp_path: Path) -> None:
    tensors = in_kind(shapes(SMALL, fused=False), "int4", lambda name: ".experts." in name, np.random.default_rng(0))
    source = write_tensors(tmp_path / "source", json.loads(config_json(SMALL)), tensors, CONFIGS["int4"])
    kept = repack("convert", source, tmp_path / "kept", "--json")
    assert json.loads(kept.out)["options"]["requantize"] is False
    result = repack("convert", source, tmp_path / "out", "--requantize")
    assert result.status == 0
    assert "--requantize: weights that arrive quantized are rounded once more" in result.err
    dry = repack("convert", source, tmp_path / "dry", "--requantize", "--dry-run")
    assert "--requantize: weights that arrive quantized are rounded once more" in dry.out


def test_a_full_disk_behind_stdout_is_one_line() -> None:
    with open("/dev/full", "w") as full:
        words = [sys.executable, "-m", "repack.cli", "families"]
        done = subprocess.run(words, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr.splitlines()[-1:]) == (
        1,
        ["error: the output cannot be written (No space left on device)"],
    )
    assert "Traceback" not in done.stderr


def test_the_command_to_run_next_can_be_pasted(repack: Run, tmp_path: Path) -> None:
    out = tmp_path / "a folder; with marks"
    assert repack("convert", "demo", out).out.splitlines()[-1] == f"run it: stream-run '{out}'"


def test_what_takes_no_text_is_measured_next(repack: Run, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for _ in range(2):  # made, then already there
        told = repack("convert", FIXTURES / "fused", out).out.splitlines()
        assert told[-1] == f"measure it: stream-run bench {out}"
    assert told[-2] == f"compare the weights: repack verify {out} --source {FIXTURES / 'fused'}"
