"""Weight encodings: one file per kind, and one explicit table from id to reader."""

from collections.abc import Callable, Mapping
from typing import Any

from formats.encodings.affine import Affine
from formats.encodings.base import ArraySpec, Encoder, Encoding
from formats.encodings.fp4 import MXFP4, NVFP4
from formats.encodings.fp8 import FP8
from formats.encodings.integer import Symmetric, ZeroPoint
from formats.encodings.k_quants import Q2K, Q3K, Q4K, Q5K, Q6K
from formats.encodings.levels import IQ4NL, KINDS, Levels
from formats.encodings.plain import Plain
from formats.errors import UnsupportedError
from formats.fields import Fields, shown

__all__ = [
    "ENCODINGS",
    "FP8",
    "IQ4NL",
    "MXFP4",
    "NVFP4",
    "Q2K",
    "Q3K",
    "Q4K",
    "Q5K",
    "Q6K",
    "Affine",
    "ArraySpec",
    "Encoder",
    "Encoding",
    "Levels",
    "Plain",
    "Symmetric",
    "ZeroPoint",
    "encoding_from_json",
    "encoding_label",
    "encoding_to_json",
]

ENCODINGS: Mapping[str, Callable[[Fields], Encoding]] = {
    "affine": Affine.read,
    "bf16": Plain.read,
    "f16": Plain.read,
    "f32": Plain.read,
    "fp8": FP8.read,
    **dict.fromkeys(KINDS, Levels.read),
    "iq4_nl": IQ4NL.read,
    "mxfp4": MXFP4.read,
    "nvfp4": NVFP4.read,
    "q2_k": Q2K.read,
    "q3_k": Q3K.read,
    "q4_k": Q4K.read,
    "q5_k": Q5K.read,
    "q6_k": Q6K.read,
    "symmetric": Symmetric.read,
    "zero_point": ZeroPoint.read,
}


def encoding_to_json(encoding: Encoding) -> dict[str, Any]:
    """The index's form of an encoding: its id and every parameter."""
    return {"id": encoding.id, **encoding.parameters()}


def encoding_label(encoding: Encoding) -> str:
    """An encoding in one line of a table: `bf16`, `affine bits 4, group_size 64, scale_dtype bf16`."""
    parameters = ", ".join(f"{key} {value}" for key, value in encoding.parameters().items())
    return f"{encoding.id} {parameters}".rstrip()


def encoding_from_json(fields: Fields) -> Encoding:
    """Read an encoding. Raises UnsupportedError for an unknown id, FormatError for a bad parameter."""
    name = fields.string("id")
    if name not in ENCODINGS:
        raise UnsupportedError(f"{fields.name('id')} is {shown(name)}, expected one of {', '.join(ENCODINGS)}")
    encoding = ENCODINGS[name](fields)
    fields.close()
    return encoding
