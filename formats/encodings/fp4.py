"""FP4 (E2M1) codes with small scales: MXFP4, a power of two per 32, and NVFP4, an FP8 scale per 16 and a global one."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from formats.dtypes import AnyArray, Float32
from formats.encodings.base import ArraySpec, Parameterless, codes_spec, num_groups, one_of
from formats.encodings.minifloat import E2M1, E4M3FN, E8M0
from formats.encodings.packing import unpack_codes
from formats.fields import Fields

MX_GROUP_SIZE = 32
NV_GROUP_SIZE = 16


@dataclass(frozen=True)
class MXFP4(Parameterless):
    """Encoding id `mxfp4` (FORMAT.md, Encodings): value = E2M1[code] * 2 ** (scale - 127)."""

    id: str = "mxfp4"

    @property
    def bits(self) -> int:
        return 4

    def arrays(self, rows: int, columns: int) -> tuple[ArraySpec, ...]:
        groups = num_groups(columns, MX_GROUP_SIZE)
        return codes_spec(rows, columns, 4), ArraySpec("scales", "u8", (rows, groups))

    def decode(self, arrays: Mapping[str, AnyArray]) -> Float32:
        return _decode(arrays["codes"], E8M0[arrays["scales"]])


@dataclass(frozen=True)
class NVFP4:
    """Encoding id `nvfp4` (FORMAT.md, Encodings): value = E2M1[code] * (E4M3[scale] times or through the global)."""

    global_scale: str  # `multiply` as ModelOpt writes it, `divide` as compressed-tensors does
    id: str = "nvfp4"

    @classmethod
    def read(cls, fields: Fields) -> "NVFP4":
        return cls(one_of(fields, "global", ("multiply", "divide")))

    @property
    def bits(self) -> int:
        return 4

    def parameters(self) -> dict[str, Any]:
        return {"global": self.global_scale}

    def arrays(self, rows: int, columns: int) -> tuple[ArraySpec, ...]:
        groups = num_groups(columns, NV_GROUP_SIZE)
        return (
            codes_spec(rows, columns, 4),
            ArraySpec("scales", "u8", (rows, groups)),
            ArraySpec("global", "f32", (rows, 1)),
        )

    def decode(self, arrays: Mapping[str, AnyArray]) -> Float32:
        operation = np.multiply if self.global_scale == "multiply" else np.divide
        return _decode(arrays["codes"], operation(E4M3FN[arrays["scales"]], arrays["global"]))


def _decode(words: AnyArray, scales: Float32) -> Float32:
    """Packed codes and the float32 scale [rows, groups] of each group -> float32 [rows, columns]."""
    values = E2M1[unpack_codes(words, 4)].reshape(*scales.shape, -1)
    values *= scales[..., None]
    return values.reshape(len(scales), -1)
