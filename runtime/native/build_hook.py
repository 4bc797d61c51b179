"""Compiles the native kernels when the package is built or installed for development.

Each instruction set is a file with flags of its own; which one runs is chosen at load (context.c). Without a C
compiler the package is built all the same, and runs on NumPy only. The objects stay in build/, which is not shipped,
for the driver in tests/native.
"""

import ctypes
import os
import platform
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

SOURCES = (
    "context", "pool", "product", "linear", "experts", "reader", "xxh3", "rows", "route", "attention", "heads", "delta",
    "streams", "run", "ceiling", "encode_affine", "transcode", "kernels_portable", "loops_portable",
)  # fmt: skip
_AVX2 = ("-mavx2", "-mfma", "-mf16c")
_AVX512 = (*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq")
X86_SOURCES: dict[str, tuple[str, ...]] = {
    "kernels_avx512": _AVX512,
    "kernels_avx512vnni": (*_AVX512, "-mavx512vnni"),
    "kernels_avx512vbmi": (*_AVX512, "-mavx512vnni", "-mavx512vbmi"),
    "kernels_avx2": _AVX2,
    "loops_avx2": _AVX2,
    "loops_avx512": _AVX512,
    "encode_affine_avx2": _AVX2,
    "encode_affine_avx512": _AVX512,
}
ARM_SOURCES: dict[str, tuple[str, ...]] = {"kernels_neon": ("-march=armv8.2-a+dotprod",)}
# No contraction: a product and a sum are fused where the source says fmaf, so all instruction sets agree.
FLAGS = ("-std=gnu11", "-O3", "-fPIC", "-pthread", "-fvisibility=hidden", "-ffp-contract=off")
# Intel's Skylake to Cascade Lake decode a branch on a border of 32 bytes anew each time (docs/LEARNED.md 121).
BRANCHES = "-Wa,-mbranches-within-32B-boundaries"
WARNINGS = ("-Wall", "-Wextra", "-fno-math-errno", "-fno-trapping-math")
OBJECTS = "build"  # the folder beside the sources: neither in git nor in a wheel


class NativeKernels(BuildHookInterface):  # type: ignore[type-arg]  # generic only in newer hatchlings
    """Puts libse_native beside the sources and, for a wheel, into it."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        folder = Path(self.root) / "runtime" / "native"
        library = library_in(folder)
        if not is_current(library):
            compiler = shutil.which(os.environ.get("CC", "cc"))
            if compiler is None:
                self.app.display_warning("no C compiler: the package will run on NumPy only")
                return
            warnings = (*WARNINGS, "-Werror") if version == "editable" else WARNINGS  # strict where it is developed
            compile_kernels(folder, compiler, warnings)
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{sysconfig.get_platform().replace('-', '_').replace('.', '_')}"
        build_data["artifacts"].append(f"/{library.relative_to(self.root)}")


def sources_of(machine: str) -> dict[str, tuple[str, ...]]:
    """Every source for a machine (as platform.machine has it), and its flags; what compiles longest comes first."""
    levels: dict[str, dict[str, tuple[str, ...]]] = {
        "x86_64": X86_SOURCES, "AMD64": X86_SOURCES,
        "aarch64": ARM_SOURCES, "arm64": ARM_SOURCES,
    }  # fmt: skip
    return {**levels.get(machine, {}), **dict.fromkeys(SOURCES, ())}


def library_in(folder: Path) -> Path:
    """Where the kernels of the sources in folder are, or will be."""
    return folder / ("libse_native.dylib" if platform.system() == "Darwin" else "libse_native.so")


def is_current(library: Path) -> bool:
    """Whether the library is this machine's and no file beside it is newer, as make asks.

    So a wheel takes what an editable install has compiled, whatever CC says now.
    """
    try:
        ctypes.CDLL(str(library))
    except OSError:
        return False
    return _last_change(library.parent) < library.stat().st_mtime


def objects_of(library: Path) -> list[Path]:
    """The objects that the library was linked from; none unless it is current and all of them are, too."""
    objects = [library.parent / OBJECTS / f"{name}.o" for name in sources_of(platform.machine())]
    if not is_current(library) or not all(path.exists() for path in objects):
        return []
    times = [path.stat().st_mtime for path in objects]  # later than the library's: of a build that did not end
    return objects if _last_change(library.parent) < min(times) and max(times) <= library.stat().st_mtime else []


def _last_change(folder: Path) -> float:
    """When the newest source in folder was written."""
    return max(path.stat().st_mtime for path in folder.iterdir() if path.suffix in {".c", ".h", ".py"})


def compile_kernels(folder: Path, compiler: str, warnings: Sequence[str] = WARNINGS) -> Path:
    """Compile the sources in folder into folder/libse_native and keep its objects; names appear when all is whole."""
    library, kept = library_in(folder), folder / OBJECTS
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        flags = (*FLAGS, *([BRANCHES] if accepts(compiler, BRANCHES, Path(scratch)) else []), *warnings)
        objects = compile_objects(folder, Path(scratch), compiler, platform.machine(), flags)
        linked = Path(scratch) / library.name
        subprocess.run([compiler, "-shared", "-pthread", *objects, "-lm", "-o", linked], check=True)
        kept.mkdir(exist_ok=True)
        for path in objects:
            path.replace(kept / path.name)
        linked.replace(library)
    return library


def accepts(compiler: str, flag: str, scratch: Path) -> bool:
    """Whether the compiler, or the assembler behind it, knows a flag."""
    empty = scratch / "empty.c"
    empty.touch()
    command = [compiler, flag, "-c", str(empty), "-o", str(scratch / "empty.o")]
    return subprocess.run(command, stderr=subprocess.DEVNULL, check=False).returncode == 0


def compile_objects(folder: Path, to: Path, compiler: str, machine: str, flags: Sequence[str]) -> list[Path]:
    """The sources in folder as objects in `to`."""
    files = sources_of(machine)

    def compile_one(name: str) -> Path:
        compiled = to / f"{name}.o"
        subprocess.run([compiler, *flags, *files[name], "-c", folder / f"{name}.c", "-o", compiled], check=True)
        return compiled

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(compile_one, files))
