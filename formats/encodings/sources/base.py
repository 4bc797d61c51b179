"""What every encoding of a published checkpoint offers: one file per kind.

A source encoding says in which tensors ("planes") a checkpoint keeps a matrix [rows, columns], moves them into
the arrays of the container's encoding that means the same float32 values to the bit (`transcode`, which never
computes a value), and decodes them by itself (`decode`), so that the one can be proven with the other.

Both take planes rows first: whatever a file's order is, the first axis of each plane given is that of the rows asked
for; a plane that holds for all rows has them as its only row. Floats come as bits (bf16 as uint16).
"""

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from formats.dtypes import FLOAT_DTYPES, Float32, to_float32
from formats.encodings.base import Encoding
from formats.encodings.minifloat import E4M3FN_NAN, E8M0_MAX
from formats.errors import UnsupportedError

Bits = npt.NDArray[Any]  # the bits of a plane, or of an array of the container

# Names are those of safetensors and ggml.
FLOATS = {"BF16": "bf16", "F16": "f16", "F32": "f32"}
E8M0_DTYPES = ("U8", "F8_E8M0")
STORAGE: Mapping[str, "np.dtype[Any]"] = {
    **dict.fromkeys(("U8", "I8", "F8_E4M3", "F8_E8M0"), np.dtype("u1")),
    **dict.fromkeys(("I32", "U32"), np.dtype("<u4")),
    "I64": np.dtype("<u8"),
    "BF16": np.dtype("<u2"),
    "F16": np.dtype("<f2"),
    "F32": np.dtype("<f4"),
}
GGML_BLOCKS = {  # weights and bytes of a block
    "Q4_0": (32, 18),
    "Q4_1": (32, 20),
    "Q5_0": (32, 22),
    "Q5_1": (32, 24),
    "Q8_0": (32, 34),
    "Q2_K": (256, 84),
    "Q3_K": (256, 110),
    "Q4_K": (256, 144),
    "Q5_K": (256, 176),
    "Q6_K": (256, 210),
    "MXFP4": (32, 17),
    "IQ4_NL": (32, 18),
    "IQ4_XS": (256, 136),
    "IQ3_S": (256, 110),
    "IQ3_XXS": (256, 98),
    "IQ2_S": (256, 82),
    "IQ2_XS": (256, 74),
    "IQ2_XXS": (256, 66),
    "IQ1_S": (256, 50),
    "IQ1_M": (256, 56),
}

EACH_ROW, ALL_ROWS = 0, None
PACKED_ROWS = 32  # rows that a checkpoint packs into words along the rows; as many words as a code has bits


class Plane(NamedTuple):
    """A tensor of a source encoding.

    `axis` is that of the rows: 0, 1 for a matrix stored columns first, None for what holds for all rows. `each`
    rows share one index of it. `words` is not 0 where PACKED_ROWS rows are packed into that many words.
    """

    name: str
    dtypes: tuple[str, ...]
    shape: tuple[int, ...]
    axis: int | None = EACH_ROW
    each: int = 1
    words: int = 0
    kind: str = ""  # "e4m3", "e8m0": what bytes are, to be checked; of floats their dtype tells


class SourceEncoding(Protocol):
    """How a checkpoint keeps a matrix. Implementations are frozen dataclasses."""

    @property
    def label(self) -> str:
        """For people: `fp8, f32 scales of 128 × 128`."""

    @property
    def quantized(self) -> bool:
        """Whether weights have been rounded to fewer than 16 bits, so that no further rounding is wanted."""

    @property
    def rounded_by_default(self) -> bool:
        """Whether weights are rounded to the bits asked for where these are fewer: 16- and 32-bit floats and FP8."""

    @property
    def bits(self) -> int:
        """Bits of a weight, without its scales."""

    def planes(self, rows: int, columns: int) -> tuple[Plane, ...]:
        """The tensors of a matrix [rows, columns]."""

    def exact(self, columns: int) -> Encoding:
        """The container's encoding that holds it to the bit. Raises UnsupportedError for sizes that none has."""

    def transcode(self, planes: Mapping[str, Bits]) -> dict[str, Bits]:
        """Planes of some rows -> the arrays of `exact`, without computing a value."""

    def decode(self, planes: Mapping[str, Bits]) -> Float32:
        """Planes of some rows -> float32 [rows, columns], by the source's own definition."""

    def flaw(self, planes: Mapping[str, Bits]) -> "Flaw | None":
        """What is wrong with the content of planes beyond what their kind tells."""


class Flaw(NamedTuple):
    """Content that a plane must not have."""

    plane: str
    row: int
    column: int
    found: str
    expected: str


def find_flaw(encoding: SourceEncoding, specs: tuple[Plane, ...], planes: Mapping[str, Bits]) -> Flaw | None:
    """The first number that is not finite, scale that no container may hold, or what else the encoding refuses."""
    for spec in specs:
        values = planes[spec.name]
        kind = _float_kind(values) if spec.dtypes[0] in FLOATS else spec.kind
        bad = _bad(values, kind) if kind else None
        if bad is None or not bad.any():
            continue
        row, column = np.argwhere(bad.reshape(len(bad), -1))[0]
        value = values.reshape(len(values), -1)[row, column]
        found = str(to_float32(np.array([value]), kind)[0]) if kind in FLOAT_DTYPES else f"{kind.upper()} 0x{value:02x}"
        what = "weights" if spec.name == "weight" else spec.name.replace("_", " ")
        expected = f"at most 0x{E8M0_MAX:02x}" if kind == "e8m0" else f"finite {what}"
        return Flaw(spec.name, int(row), int(column), found, expected)
    return encoding.flaw(planes)


def _float_kind(values: Bits) -> str:
    return {"u2": "bf16", "f2": "f16", "f4": "f32"}[values.dtype.str[1:]]


def _bad(values: Bits, kind: str) -> "np.ndarray[tuple[int, ...], np.dtype[np.bool_]]":
    """Which elements are not finite, from their bits, or a scale that is too large."""
    if kind == "e8m0":
        return values > E8M0_MAX
    if kind == "e4m3":
        return (values & E4M3FN_NAN) == E4M3FN_NAN
    exponents: Mapping[str, np.uint16 | np.uint32] = {
        "bf16": np.uint16(0x7F80),
        "f16": np.uint16(0x7C00),
        "f32": np.uint32(0x7F800000),
    }
    exponent = exponents[kind]
    return (values.view(exponent.dtype) & exponent) == exponent


def stored(dtype: str, shape: tuple[int, ...]) -> tuple["np.dtype[Any]", tuple[int, ...]]:
    """What holds the bits of a tensor: a NumPy dtype and shape; bytes of whole blocks for ggml's."""
    if dtype in GGML_BLOCKS:
        weights, nbytes = GGML_BLOCKS[dtype]
        return np.dtype("u1"), (*shape[:-1], shape[-1] // weights * nbytes)
    return STORAGE[dtype], shape


def group_size(columns: int, groups: int, what: str) -> int:
    """Elements per group. Raises UnsupportedError where groups do not divide the columns."""
    if groups < 1 or columns % groups:
        raise UnsupportedError(f"{what} are {groups} per row, expected a number that divides the input width {columns}")
    return columns // groups
