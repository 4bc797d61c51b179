"""Random matrices in their encodings, as kernels see them and as they are meant."""

import numpy as np
import numpy.typing as npt

from formats.dtypes import AnyArray, Float32
from formats.encodings import Affine, Encoding, Plain
from formats.record import Part, PartSpec, decode_part, lay_out_record
from runtime.backends import native

Float64 = npt.NDArray[np.float64]


class Matrix:
    """A random matrix in its encoding, as a record of one part, and what it means."""

    def __init__(self, encoding: Encoding, rows: int, columns: int, bias: str | None, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.part: Part
        (self.part,) = lay_out_record([PartSpec("gate", rows, columns, encoding, bias)]).parts
        self.record = np.zeros(max(a.offset + a.nbytes for a in self.part.arrays), np.uint8)
        fill(self.part, self.record, rng)
        offsets = {array.name: array.offset for array in self.part.arrays}
        self.native = native.matrix(encoding, rows, columns, offsets, bias)

    def product(self, x: Float32) -> Float64:
        """In float64: [T, rows]."""
        values, bias = decode_part(self.part, self.record)
        return x.astype(np.float64) @ values.T + (0 if bias is None else bias)


def fill(part: Part, record: AnyArray, rng: np.random.Generator) -> None:
    """Random weights, of variance 1 / columns, into a record."""
    views = part.views(record)
    values = rng.standard_normal((part.rows, part.columns), np.float32) / np.float32(np.sqrt(part.columns))
    assert isinstance(part.encoding, (Affine, Plain))
    arrays = part.encoding.encode(values)
    if part.linear_bias is not None:
        (arrays["linear_bias"],) = Plain(part.linear_bias).encode(rng.standard_normal((1, part.rows), np.float32))[
            "weight"
        ]
    for name, array in arrays.items():
        views[name][...] = array


def relative_error(found: Float32, expected: Float64) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))
