"""AVX-512 kernels on any machine: compiled against SIMDe, which does each instruction in software, and run.

They must give the bits of the portable loops, which test_kernels.py compares with the definition.
"""

import ctypes
import itertools
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from formats.encodings import FP8, MXFP4, NVFP4, Affine, Encoding, Plain, Symmetric, ZeroPoint
from formats.kernels import PRECISIONS
from runtime.backends import abi, native
from runtime.native.build_hook import FLAGS, SOURCES
from tests.encodings import GGML_ENCODINGS
from tests.matrices import Matrix, columns_of

CC = shutil.which(os.environ.get("CC", "cc"))
NATIVE = Path(native.__file__).parent.parent / "native"
HAS_SIMDE = CC is not None and not subprocess.run(
    [CC, "-E", "-include", "simde/x86/avx512.h", "-xc", os.devnull], capture_output=True, check=False
).returncode  # fmt: skip

pytestmark = [
    pytest.mark.skipif(not HAS_SIMDE, reason="the headers of SIMDe are not installed"),
    pytest.mark.timeout(600),  # compilers take minutes where others compile, too
]

EMULATED = ("avx512vbmi", "avx512vnni", "avx512")
ENCODINGS: tuple[Encoding, ...] = (
    *(Affine(bits, size, "f16") for bits, size in itertools.product((2, 3, 4, 5, 6, 8), (32, 64, 128))),
    *(Plain(dtype) for dtype in ("bf16", "f16", "f32")),
    Symmetric(5, 32, "f32"),
    ZeroPoint(2, 64, "bf16"),
    FP8(128, "bf16"),
    MXFP4(),
    NVFP4("divide"),
    *GGML_ENCODINGS,
)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The library with software in the place of AVX-512."""
    kernels = (f"kernels_{level}" for level in EMULATED)
    sources = [NATIVE / f"{name}.c" for name in (*SOURCES, *kernels) if not name.startswith("encode_")]
    flags = [*(flag for flag in FLAGS if flag != "-O3"), "-O1", "-w", "-Wno-psabi", "-DSE_EMULATED", "-shared"]
    shim = Path(__file__).parent / "emulated"
    path = tmp_path_factory.mktemp("emulated") / "libse_emulated.so"
    subprocess.run(
        [
            str(CC),
            *flags,
            "-O1",
            "-w",
            "-DSE_EMULATED",
            "-I",
            shim,
            "-I",
            NATIVE,
            "-shared",
            *sources,
            "-lm",
            "-o",
            path,
        ],
        check=True,
    )
    return ctypes.CDLL(str(path))


@pytest.fixture
def emulated(library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> None:
    """Contexts of that library."""
    abi.declare(library)
    monkeypatch.setattr(native, "load_library", lambda: library)


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("encoding", ENCODINGS, ids=str)
def test_emulated_kernels_give_the_bits_of_the_portable_loops(encoding: Encoding, precision: str) -> None:
    assert native.levels() == (*EMULATED, "portable")
    for groups, rows, tokens in ((1, 1, 1), (7, 3, 2), (37, 35, 1), (33, 18, 9), (16, 6, 3)):
        columns = columns_of(encoding, groups)
        matrix = Matrix(encoding, rows, columns, None, groups)
        x = np.random.default_rng(groups).standard_normal((tokens, columns), np.float32)
        results = []
        for level in native.levels():
            with native.Context(1, precision, level) as context:
                results.append(context.linear(matrix.native, matrix.record.ctypes.data, x))
        assert all((result == results[-1]).all() for result in results)
