"""Weight encodings: one file each, and one explicit table from id to reader."""

from collections.abc import Callable, Mapping
from typing import Any

from formats.encodings.affine import Affine
from formats.encodings.base import ArraySpec, Encoding
from formats.encodings.plain import Plain
from formats.errors import UnsupportedError
from formats.fields import Fields, shown

__all__ = [
    "ENCODINGS",
    "Affine",
    "ArraySpec",
    "Encoding",
    "Plain",
    "encoding_from_json",
    "encoding_label",
    "encoding_to_json",
]

ENCODINGS: Mapping[str, Callable[[Fields], Encoding]] = {
    "affine": Affine.read,
    "bf16": Plain.read,
    "f16": Plain.read,
    "f32": Plain.read,
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
