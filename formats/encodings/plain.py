"""16- and 32-bit floats as they are: one array named `weight`."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from formats.dtypes import AnyArray, Float32, from_float32, storage_dtype, to_float32
from formats.encodings.base import ArraySpec
from formats.fields import Fields


@dataclass(frozen=True)
class Plain:
    """Encoding ids bf16, f16 and f32 (FORMAT.md, Encodings)."""

    id: str

    @classmethod
    def read(cls, fields: Fields) -> "Plain":
        return cls(fields.string("id"))

    @property
    def bits(self) -> int:
        return 8 * storage_dtype(self.id).itemsize

    def parameters(self) -> dict[str, Any]:
        return {}

    def arrays(self, rows: int, columns: int) -> tuple[ArraySpec, ...]:
        return (ArraySpec("weight", self.id, (rows, columns)),)

    def encode(self, values: Float32) -> dict[str, AnyArray]:
        return {"weight": from_float32(values, self.id)}

    def decode(self, arrays: Mapping[str, AnyArray]) -> Float32:
        return to_float32(arrays["weight"], self.id)
