"""What several tests of the runtime share."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from runtime import Engine

FIXTURES = Path(__file__).parent.parent / "fixtures"
PLENTY = 1 << 32  # --ram that holds every expert of these models
STREAM_RUN = (sys.executable, "-c", "from runtime.cli import main; main()")  # a process of its own, from any folder


def reference(name: str) -> dict[str, Any]:
    """The arrays of a committed reference.npz; see tests/fixtures/README.md."""
    with np.load(FIXTURES / name) as arrays:
        return dict(arrays)


def floor_bytes(container: Path, **options: Any) -> int:
    """The least --ram of a container with these options."""
    with Engine.open(container, ram_bytes=PLENTY, **options) as engine:
        return engine.terms.floor_bytes


def flip(path: Path, offset: int) -> None:
    """Change one bit of a file."""
    with open(path, "r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 0x40]))


def open_fds() -> set[str]:
    """The files that this process has open; there may be pipes of others beside them."""
    links = (os.path.realpath(f"/dev/fd/{fd}") for fd in os.listdir("/dev/fd"))
    return {link for link in links if link.endswith((".bin", ".json"))}


class Outcome(NamedTuple):
    status: int
    out: str
    err: str


Command = Callable[..., Outcome]


def one_line(outcome: Outcome) -> str:
    """The one line that an error is: nothing on stdout, status 1."""
    assert (outcome.status, outcome.out) == (1, ""), outcome
    assert outcome.err.startswith("error: ")
    assert outcome.err.count("\n") == 1, outcome.err
    return outcome.err.removeprefix("error: ").rstrip("\n")
