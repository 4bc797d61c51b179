"""Promises of the design that no type and no other test would notice if they broke."""

from __future__ import annotations

import ast
import importlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

import formats

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("formats", "repack", "runtime")

# The modules that talk to a terminal and to the environment; all others return and raise.
COMMAND_LINE = {
    "repack/cli.py",
    "repack/cli_plan.py",
    "repack/options.py",
    "repack/terminal.py",
    "runtime/bench_kernels.py",  # run as a program: tells which settings of BLAS it was measured with
    "runtime/cli.py",
    "runtime/chat.py",
}

# Dependencies that the product does not import, and why they are declared all the same.
DECLARED_UNUSED = {
    "gguf": "asked for by the users: tests compare with it; our own reader of headers is bounded",
    "safetensors": "asked for by the users: tests compare with it; our own reader of headers is stricter",
}

BUILD_HOOK = ROOT / "runtime" / "native" / "build_hook.py"  # runs when the package is built, never in it
SOURCES = sorted({path for package in PACKAGES for path in (ROOT / package).rglob("*.py")} - {BUILD_HOOK})
MODEL_FILES = sorted((ROOT / "runtime" / "models").glob("*.py"))


def name_of(path: Path) -> str:
    """A path as messages and COMMAND_LINE have it: from the root of the checkout, with slashes."""
    return path.relative_to(ROOT).as_posix()


@cache
def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=name_of(path))


def imported_modules(path: Path) -> set[str]:
    """Absolute names of the modules that a file imports, wherever in the file it does so."""
    names: set[str] = set()
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join((*above, *([node.module] if node.module else [])))
            names.update({module, *(f"{module}.{alias.name}" for alias in node.names)})
    return names


def top_level(names: set[str]) -> set[str]:
    return {name.partition(".")[0] for name in names}


@cache
def pyproject() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def declared_dependencies() -> set[str]:
    requirements: list[str] = pyproject()["project"]["dependencies"]
    return {re.split(r"[^\w.-]", line, maxsplit=1)[0].lower().replace("-", "_") for line in requirements}


@cache
def used_dependencies() -> set[str]:
    imported = set().union(*(top_level(imported_modules(path)) for path in SOURCES))
    return imported & declared_dependencies()


def text_files() -> Iterator[tuple[Path, str]]:
    """Every text file of the checkout that is not built: environments, caches and build products left out."""
    for folder, subfolders, files in os.walk(ROOT):
        subfolders[:] = [
            name
            for name in subfolders
            if name not in {"build", "dist", "__pycache__"}
            and (name == ".ci" or not name.startswith("."))
            and not Path(folder, name, "pyvenv.cfg").exists()
        ]
        for file in files:
            if file == ".git":  # a worktree's: where its repository lies
                continue
            path = Path(folder, file)
            data = path.read_bytes() if path.is_file() else b"\0"  # a dangling link holds no text
            if b"\0" not in data:
                yield path, data.decode("utf-8")


def lines_that_match(pattern: re.Pattern[str]) -> list[str]:
    return [
        f"{name_of(path)}:{number}: {line.strip()[:100]}"
        for path, text in text_files()
        if pattern.search(text)
        for number, line in enumerate(text.splitlines(), start=1)
        if pattern.search(line)
    ]


# Who may import whom


def test_the_import_contracts_hold() -> None:
    command = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True))"
    done = subprocess.run([sys.executable, "-c", command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_there_are_model_files_to_check() -> None:
    assert MODEL_FILES


ARCHITECTURE = (ROOT / "docs" / "ARCHITECTURE.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("package", PACKAGES)
def test_the_architecture_names_every_module_or_its_folder(package: str) -> None:
    (section,) = re.findall(rf"^## {package}/: .*?\n(.*?)(?=^## )", ARCHITECTURE, re.MULTILINE | re.DOTALL)
    named = {entry.rpartition("/")[2] or entry for entry in re.findall(r"`([\w/]+(?:\.py|/))`", section)}
    modules = [path for path in SOURCES if path.is_relative_to(ROOT / package) and path.stem != "__init__"]
    assert modules
    folders = {path: f"{path.parent.relative_to(ROOT / package).as_posix()}/" for path in modules}
    assert not [name_of(path) for path in modules if path.name not in named and folders[path] not in named]


@pytest.mark.parametrize("path", MODEL_FILES, ids=name_of)
def test_a_model_file_knows_neither_arrays_of_one_backend_nor_the_terminal(path: Path) -> None:
    assert not top_level(imported_modules(path)) & {"numpy", "mlx", "click", "tqdm"}


@pytest.mark.parametrize("path", MODEL_FILES, ids=name_of)
def test_a_model_file_never_learns_where_an_expert_was(path: Path) -> None:
    assert not imported_modules(path) & {"runtime.store", "runtime.cache", "formats.memory"}


# What a module may do


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_a_module_says_what_it_is(path: Path) -> None:
    assert ast.get_docstring(parse(path))


@pytest.mark.parametrize("path", [path for path in SOURCES if name_of(path) not in COMMAND_LINE], ids=name_of)
def test_only_the_command_line_prints(path: Path) -> None:
    prints = [
        node.lineno
        for node in ast.walk(parse(path))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]
    assert not prints


@pytest.mark.parametrize("path", [path for path in SOURCES if name_of(path) not in COMMAND_LINE], ids=name_of)
def test_only_the_command_line_reads_the_environment(path: Path) -> None:
    reads = {"environ", "environb", "getenv", "getenvb"}
    attributes = {
        node.attr
        for node in ast.walk(parse(path))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "os"
    }
    assert not attributes & reads
    assert not imported_modules(path) & {f"os.{name}" for name in reads}


# What is committed


def test_no_text_file_holds_a_path_of_somebodys_machine() -> None:
    folders = ("home", "Users", "root", "work", "tmp", "opt", "mnt")
    pattern = re.compile(rf"(?<![\w./~}}-])/(?:{'|'.join(folders)})/\w|\b[A-Z]:\\Users\\")
    assert not lines_that_match(pattern)


def test_no_text_file_names_a_package_registry() -> None:
    hosts = ("pypi" + r"\.org", "pythonhosted" + r"\.org", "--(?:extra-)?index" + "-url")
    assert not lines_that_match(re.compile("|".join(hosts)))


# What is published


def test_the_distribution_is_the_three_packages_under_its_name() -> None:
    assert pyproject()["project"]["name"] == "streaming-experts"
    assert pyproject()["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"] == list(PACKAGES)


def test_the_version_is_three_numbers_in_one_place() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+", formats.__version__)
    assert "version" not in pyproject()["project"]
    assert pyproject()["tool"]["hatch"]["version"]["path"] == "formats/__init__.py"


def test_the_console_commands_are_repack_and_stream_run() -> None:
    scripts = pyproject()["project"]["scripts"]
    assert scripts == {"repack": "repack.cli:main", "stream-run": "runtime.cli:main"}
    for target in scripts.values():
        module, _, function = target.partition(":")
        assert callable(getattr(importlib.import_module(module), function))


def test_every_import_is_declared() -> None:
    known = declared_dependencies() | set(sys.stdlib_module_names) | set(PACKAGES)
    undeclared = {name_of(path): top_level(imported_modules(path)) - known for path in SOURCES}
    assert not {name: modules for name, modules in undeclared.items() if modules}


def test_every_declared_dependency_is_used_or_has_a_reason() -> None:
    assert declared_dependencies() - used_dependencies() <= set(DECLARED_UNUSED)


def test_a_reason_goes_when_its_dependency_is_used() -> None:
    assert not used_dependencies() & set(DECLARED_UNUSED)


def test_the_data_that_the_wheel_carries_is_there() -> None:
    assert (ROOT / "formats" / "FORMAT.md").is_file()
    assert (ROOT / "repack" / "demo" / "README.md").is_file()
    assert list((ROOT / "repack" / "demo").glob("*.safetensors*"))
