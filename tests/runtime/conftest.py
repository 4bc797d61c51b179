"""Containers for the tests of the runtime, made by repack itself; each worker of pytest-xdist makes its own."""

import shutil
from pathlib import Path

import pytest

from repack.convert import convert, prepare
from repack.plan import Options
from repack.sources import open_local
from tests.runtime.helpers import FIXTURES


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
