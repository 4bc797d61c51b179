"""`stream-run` as a process: signals, and streams that end, fill up or are closed."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.runtime.helpers import STREAM_RUN

PROMPT = "It was a fine morning, and Elizabeth"


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_ends_with_status_130_and_keeps_what_was_said(demo4: Path) -> None:
    words = [*STREAM_RUN, str(demo4), "-p", PROMPT, "--raw", "-n", "100000", "--ignore-eos", "--seed", "1"]
    with subprocess.Popen(
        words,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    ) as process:
        assert process.stdout is not None
        first = process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert first
    assert process.returncode == 130
    assert b"Traceback" not in err


def test_a_reader_that_goes_away_is_no_traceback(demo4: Path) -> None:
    words = [*STREAM_RUN, str(demo4), "-p", PROMPT, "--raw", "-n", "100000", "--ignore-eos", "--seed", "1"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.read(1)
        process.stdout.close()
        err = process.stderr.read()
        assert process.wait(timeout=60) == 1
    assert b"Traceback" not in err


def in_a_shell(words: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """stream-run as $RUN in a command line of sh, with arguments as $1, $2..."""
    command = [f'run() {{ "{sys.executable}" -c "from runtime.cli import main; main()" "$@"; }}; {words}', "sh"]
    return subprocess.run(["sh", "-c", *command, *arguments], capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize("words", ['run plan "$1"', 'run "$1" -p It --raw -n 2', "run --help"])
def test_a_full_disk_behind_stdout_is_one_line(demo4: Path, words: str) -> None:
    done = in_a_shell(f"{words} >/dev/full", str(demo4))
    assert (done.returncode, done.stderr.splitlines()[-1:]) == (
        1,
        ["error: the output cannot be written (No space left on device)"],
    )
    assert "Traceback" not in done.stderr


def test_closed_streams_are_no_traceback(demo4: Path) -> None:
    done = in_a_shell('run "$1" -p It --raw -n 2 >&-', str(demo4))
    assert (done.returncode, done.stderr) == (1, "error: stdout is closed: there is nowhere to write to\n")
    done = in_a_shell('run "$1" <&-', str(demo4))
    assert (done.returncode, done.stderr.splitlines()[-1:]) == (
        2,
        ["Error: stdin is closed: the prompt must come from -p or -f"],
    )
