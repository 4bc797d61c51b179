"""Containers for the tests of the runtime, made by repack itself; each worker of pytest-xdist makes its own."""

import io
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from repack.convert import convert, prepare
from repack.plan import Options
from repack.sources import open_local
from runtime.cli import main
from tests.runtime.helpers import FIXTURES, Command, Outcome


def make(tmp_path_factory: pytest.TempPathFactory, source: str, bits: int) -> Path:
    """The checkpoint converted with experts and all else at so many bits."""
    out = tmp_path_factory.mktemp("container") / f"out{bits}"
    convert(prepare(open_local(source), Options(bits, 64, bits)), out, hash_source=False)
    return out


@pytest.fixture(scope="session")
def demo16(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory, "demo", 16)


@pytest.fixture(scope="session")
def demo4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory, "demo", 4)


@pytest.fixture(scope="session")
def fused16(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny, random, without a tokenizer."""
    return make(tmp_path_factory, str(FIXTURES / "fused"), 16)


@pytest.fixture(scope="session")
def per_expert16(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory, str(FIXTURES / "per_expert"), 16)


@pytest.fixture
def own4(demo4: Path, tmp_path: Path) -> Path:
    """A copy of demo4 that the test may damage."""
    return Path(shutil.copytree(demo4, tmp_path / "own"))


@pytest.fixture
def own16(demo16: Path, tmp_path: Path) -> Path:
    """A copy of demo16 that the test may damage."""
    return Path(shutil.copytree(demo16, tmp_path / "own"))


@pytest.fixture
def own_fused16(fused16: Path, tmp_path: Path) -> Path:
    """A copy of fused16 that the test may damage."""
    return Path(shutil.copytree(fused16, tmp_path / "own"))


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Run `stream-run` with these words; `stdin` is what a pipe gives, None is a terminal."""

    def run(*words: str | Path, stdin: bytes | None = b"") -> Outcome:
        pipe = io.TextIOWrapper(io.BytesIO(stdin or b""), encoding="utf-8")
        monkeypatch.setattr(pipe, "isatty", lambda: stdin is None)
        monkeypatch.setattr(sys, "stdin", pipe)
        monkeypatch.setattr(sys, "argv", ["stream-run", *map(str, words)])
        status: Any = 0
        try:
            main()
        except SystemExit as exit_:
            status = exit_.code
        return Outcome(status, *capsys.readouterr())

    return run
