"""The extension `origins` of an index: in which encoding each tensor arrived, and whether it is the same to the bit."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from formats.fields import Fields

ORIGINS = "origins"


class Origin(NamedTuple):
    """The source's encoding, as people read it; exact when the container means its values to the bit."""

    encoding: str
    exact: bool


@dataclass(frozen=True)
class Origins:
    """Of every tensor of a container."""

    embedding: Origin
    resident: Mapping[str, Origin]  # by name
    experts: Mapping[int, tuple[Origin, ...]]  # of gate, up and down, by layer
    ngrams: Origin | None = None

    def to_json(self) -> dict[str, Any]:
        """The extension's form."""
        ngrams = {} if self.ngrams is None else {"ngrams": self.ngrams._asdict()}
        return {
            **ngrams,
            "embedding": self.embedding._asdict(),
            "resident": {name: origin._asdict() for name, origin in self.resident.items()},
            "experts": {str(i): [origin._asdict() for origin in parts] for i, parts in self.experts.items()},
        }


def read_origins(extensions: Mapping[str, Any], where: str) -> Origins | None:
    """What an index tells of origins, None where it does not. Raises FormatError for another form."""
    if ORIGINS not in extensions:
        return None
    fields = Fields(extensions[ORIGINS], f"{where}: extensions.{ORIGINS}")
    experts, resident = fields.object("experts"), fields.object("resident")
    return Origins(
        _read(fields.object("embedding")),
        {name: _read(resident.object(name)) for name, _ in resident.entries()},
        {int(i): tuple(map(_read, experts.objects(i))) for i, _ in experts.entries() if i.isdecimal()},
        _read(fields.object("ngrams")) if "ngrams" in fields else None,
    )


def _read(fields: Fields) -> Origin:
    return Origin(fields.label("encoding"), fields.boolean("exact"))
