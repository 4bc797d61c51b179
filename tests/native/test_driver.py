"""The C driver on every instruction set: natively, and cross-compiled for aarch64 under an emulator.

It compares kernels and encoder with what NumPy says of committed cases (fixtures/kernels.bin), and all levels to the
bit; its checksum of all results must be the same on both architectures. Natively it is linked with the objects of the
library itself, so what it tests is what is shipped.
"""

import os
import platform
import shutil
import subprocess
import warnings
from collections.abc import Sequence
from pathlib import Path

import pytest

from runtime.native.build_hook import FLAGS, OBJECTS, WARNINGS, compile_objects, library_in, objects_of

ROOT = Path(__file__).parent.parent.parent
NATIVE, FIXTURE = ROOT / "runtime" / "native", ROOT / "tests" / "fixtures" / "kernels.bin"
CC = shutil.which(os.environ.get("CC", "cc"))
CROSS_CC = shutil.which("aarch64-linux-gnu-gcc")
EMULATOR = shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")
CLANG = shutil.which("clang")
STRICT = (*FLAGS, *WARNINGS, "-Werror")

pytestmark = [
    pytest.mark.timeout(600),  # compilers take minutes where others compile, too
    pytest.mark.filterwarnings("default:no current objects"),
]
needs_compiler = pytest.mark.skipif(CC is None, reason="no C compiler")
needs_cross_tools = pytest.mark.skipif(
    not (CROSS_CC and EMULATOR), reason="gcc-aarch64-linux-gnu and qemu-user-static are not installed"
)
needs_clang = pytest.mark.skipif(CLANG is None, reason="clang is not installed")


def compile_kernels(folder: Path, compiler: str, machine: str) -> list[Path]:
    """All kernels as objects, at -O1: the same bits, sooner."""
    return compile_objects(NATIVE, folder, compiler, machine, (*(flag for flag in STRICT if flag != "-O3"), "-O1"))


def link_driver(folder: Path, compiler: str, objects: Sequence[Path]) -> Path:
    """The driver with all kernels in it."""
    source, driver = Path(__file__).parent / "driver.c", folder / "driver"
    subprocess.run([compiler, *STRICT, "-static", source, *objects, "-lm", "-o", driver], check=True)
    return driver


def run_driver(*command: str | Path) -> dict[str, str]:
    """What the driver says, by the words before its colons."""
    result = subprocess.run([*command, FIXTURE], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return dict(line.split(": ", 1) for line in result.stdout.splitlines())


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("native")
    objects = objects_of(library_in(NATIVE))
    if not objects:
        warnings.warn(f"no current objects in {NATIVE / OBJECTS}: the driver compiles all kernels itself", stacklevel=1)
        objects = compile_kernels(folder, str(CC), platform.machine())
    return run_driver(link_driver(folder, str(CC), objects))


@needs_compiler
@pytest.mark.skipif(platform.system() != "Linux", reason="macOS links nothing statically")
def test_every_level_of_this_machine_agrees_with_numpy_and_with_the_others(here: dict[str, str]) -> None:
    assert here["levels"].split()[-1] == "portable"


@needs_compiler
@needs_cross_tools
def test_neon_and_the_portable_loops_of_aarch64_give_the_same_bits_as_here(
    here: dict[str, str], tmp_path: Path
) -> None:
    objects = compile_kernels(tmp_path, str(CROSS_CC), "aarch64")
    driver = link_driver(tmp_path, str(CROSS_CC), objects)
    for processor, levels in (("max", "neon portable"), ("cortex-a53", "portable")):
        words = run_driver(str(EMULATOR), "-cpu", processor, driver)
        assert words["levels"] == levels
        assert (words["bits"], words["cases"]) == (here["bits"], here["cases"])


@needs_clang
@needs_cross_tools
@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_clang_compiles_every_source_without_a_warning(machine: str, tmp_path: Path) -> None:
    """As on macOS.

    Without passes a function is compiled once and not wherever it is inlined, for AVX-512 in a hundredth of the time;
    what clang warns of is found before or behind them. -fsyntax-only would miss some: a missing instruction set.
    """
    flags = (*STRICT, f"--target={machine}-linux-gnu", "-O0", "-Xclang", "-disable-llvm-passes")
    includes = ("-isystem", "/usr/aarch64-linux-gnu/include") if machine == "aarch64" else ()
    compile_objects(NATIVE, tmp_path, str(CLANG), machine, (*flags, *includes))
