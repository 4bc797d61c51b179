"""One small container, written once; a test that changes it works on a copy."""

import shutil
from pathlib import Path

import pytest

from tests.containers import write_container


@pytest.fixture(scope="session")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A container that no test changes."""
    folder = tmp_path_factory.mktemp("pristine")
    write_container(folder)
    return folder


@pytest.fixture
def container(pristine: Path, tmp_path: Path) -> Path:
    """A container of the test's own."""
    return shutil.copytree(pristine, tmp_path / "container")
