"""What is built and shipped: with a compiler and without one."""

import os
import platform
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from runtime.native.build_hook import OBJECTS, is_current, objects_of, sources_of

ROOT = Path(__file__).parent.parent
FOLDERS = ("formats", "repack", "runtime", "tests", "docs")


def build(kind: str, to: Path, path: str) -> subprocess.CompletedProcess[str]:
    """Build from a copy of the sources, in this environment, with that PATH."""
    source = to / "source"
    ignored = shutil.ignore_patterns("__pycache__", "*.so", "*.dylib", OBJECTS)
    for folder in FOLDERS[:3]:
        shutil.copytree(ROOT / folder, source / folder, ignore=ignored)
    (kept := source / "runtime" / "native" / OBJECTS).mkdir()
    (kept / "kept.o").write_bytes(b"of a build before")
    for name in ("pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "Makefile"):
        shutil.copy(ROOT / name, source)
    return subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", kind, "-d", to / "dist"],
        cwd=source, env={**os.environ, "PATH": path, "CC": "cc"}, capture_output=True, text=True, check=True,
    )  # fmt: skip


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The content of a wheel that was built where there is no compiler."""
    folder = tmp_path_factory.mktemp("packaging")
    (folder / "empty").mkdir()
    built = build("wheel", folder, str(folder / "empty"))
    assert (built.stdout + built.stderr).count("NumPy only") == 1
    (wheel,) = (folder / "dist").iterdir()
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as file:
        file.extractall(folder / "unpacked")
    return folder / "unpacked"


def test_without_a_compiler_the_wheel_has_no_library(unpacked: Path) -> None:
    assert not [*unpacked.rglob("libse_native.*")]
    assert (unpacked / "runtime" / "native" / "se_native.h").exists()


def test_no_wheel_has_the_objects_of_the_library(unpacked: Path) -> None:
    assert not [*unpacked.rglob("*.o")]


def test_without_a_compiler_everything_runs_on_numpy_and_says_so_once(unpacked: Path, tmp_path: Path) -> None:
    out = str(tmp_path / "out")

    def run(module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        program = f"import sys; sys.path[0] = {str(unpacked)!r}; from {module} import main; main()"
        return subprocess.run(
            [sys.executable, "-c", program, *arguments], cwd=tmp_path, capture_output=True, text=True, check=True
        )

    assert "encoder NumPy" in run("repack.cli", "convert", "demo", out).stdout
    said = run("runtime.cli", out, "-p", "Once", "--raw", "-n", "2")
    assert said.stdout.strip()
    assert said.stderr.count("NumPy only") == 1


def test_what_is_compiled_already_is_taken_while_no_source_is_newer(tmp_path: Path) -> None:
    source, library = tmp_path / "kernels.c", tmp_path / "libse_native.so"
    source.write_text("int answer(void) { return 42; }\n")
    assert not is_current(library)
    subprocess.run([shutil.which("cc") or "cc", "-shared", "-fPIC", "-o", library, source], check=True)
    os.utime(source, (1, 1))
    assert is_current(library)
    os.utime(source, (library.stat().st_mtime + 1,) * 2)
    assert not is_current(library)
    os.utime(source, (1, 1))
    (other := tmp_path / "libse_native.dylib").write_bytes(b"of another machine")
    assert not is_current(other)


def test_objects_are_those_of_a_current_library_or_none(tmp_path: Path) -> None:
    source, library = tmp_path / "kernels.c", tmp_path / "libse_native.so"
    source.write_text("int answer(void) { return 42; }\n")
    subprocess.run([shutil.which("cc") or "cc", "-shared", "-fPIC", "-o", library, source], check=True)
    (tmp_path / OBJECTS).mkdir()
    objects = [tmp_path / OBJECTS / f"{name}.o" for name in sources_of(platform.machine())]
    for path in objects:
        path.touch()
    times = {source: 1, **dict.fromkeys(objects, 2), library: 3}

    def found(changed: dict[Path, int]) -> list[Path]:
        for path, time in {**times, **changed}.items():
            os.utime(path, (time, time))
        return objects_of(library)

    assert found({}) == objects
    assert found({objects[0]: 1}) == []  # of older sources
    assert found({objects[-1]: 4}) == []  # of a build that did not end
    assert found({source: 4}) == []
    assert found({}) == objects
    objects[0].unlink()
    assert objects_of(library) == []


def test_a_source_distribution_holds_every_file_that_git_has(tmp_path: Path) -> None:
    listed = subprocess.run(["git", "ls-files", *FOLDERS], cwd=ROOT, capture_output=True, text=True, check=True)
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", tmp_path],
        cwd=ROOT, capture_output=True, check=True,
    )  # fmt: skip
    (archive,) = tmp_path.iterdir()
    with tarfile.open(archive) as file:
        names = {name.split("/", 1)[1] for name in file.getnames()}
    assert set(listed.stdout.splitlines()) <= names
    assert {"pyproject.toml", "Makefile", "LICENSE", "README.md", "CHANGELOG.md"} <= names
    assert not [name for name in names if name.endswith((".so", ".dylib", ".o"))]
