"""Kills a conversion at every call that changes the disk, completes it, and compares the bytes.

`python -m tests.repack.crash_points SOURCE WORK STEP` forks a child for each STEP-th such call: it dies by SIGKILL in
the midst of it (a write has then reached half of its bytes). Another child completes the conversion. The last line is
the number of deaths that were survived.
"""

import os
import shutil
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from repack.convert import convert, prepare
from repack.plan import Options
from repack.sources.folder import FolderSource
from tests.repack.checkpoints import read_tree

CALLS = ("write", "pwrite", "fsync", "rename", "replace", "unlink", "ftruncate", "mkdir", "open")


def main() -> None:
    source, work, step = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    in_child(lambda: run(source, work / "undisturbed"))
    expected = read_tree(work / "undisturbed")
    deaths, at, out = 0, 1, work / "out"
    while in_child(partial(run, source, out, die_at=at)) == -signal.SIGKILL:
        assert in_child(lambda: run(source, out)) == 0, at
        assert read_tree(out) == expected, at
        shutil.rmtree(out)
        deaths, at = deaths + 1, at + step
    assert read_tree(out) == expected
    sys.stdout.write(f"{deaths}\n")


def run(source: Path, out: Path, die_at: int = 0) -> None:
    """Convert with one thread, so that the calls come in the same order each time."""
    conversion = prepare(FolderSource(source), Options())
    if die_at:
        count_calls(die_at)
    convert(conversion, out, jobs=1)


def count_calls(die_at: int) -> None:
    """Let this process die in the `die_at`-th call that changes the disk."""
    left = die_at

    def counted(call: Callable[..., Any], name: str) -> Callable[..., Any]:
        def wrapper(*args: Any, **more: Any) -> Any:
            nonlocal left
            left -= not (name == "open" and not args[1] & os.O_CREAT)
            if left == 0:
                with suppress(OSError):
                    if name in ("write", "pwrite"):
                        call(args[0], args[1][: len(args[1]) // 2], *args[2:])
                    elif die_at % 4 > 1:  # killed before the call, or just after it
                        call(*args, **more)
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **more)

        return wrapper

    for name in CALLS:
        setattr(os, name, counted(getattr(os, name), name))


def in_child(work: Callable[[], None]) -> int:
    """Run in a forked child; its exit status, negative for a signal."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
        except BaseException as error:  # a child must never go on as the parent
            sys.stderr.write(f"{type(error).__name__}: {error}\n")
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


if __name__ == "__main__":
    main()
