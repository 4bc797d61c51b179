"""Tables of experts by token id (DeepSeek-V4's tid2eid): whole numbers, which float32 holds exactly."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from formats.dtypes import Float32
from formats.encodings.base import Encoding
from formats.encodings.plain import Plain
from formats.encodings.sources.base import STORAGE, Bits, Flaw, Plane

INTEGERS = ("I32", "I64")


@dataclass(frozen=True)
class ExpertIdsSource:
    """One tensor `weight` [rows, columns]: a row holds distinct numbers from 0 to num_experts - 1."""

    dtype: str  # of INTEGERS
    num_experts: int  # at most 2^20 (formats/config)
    quantized: bool = False
    rounded_by_default: bool = False

    @property
    def label(self) -> str:
        return self.dtype.lower()

    @property
    def bits(self) -> int:
        return 8 * STORAGE[self.dtype].itemsize

    def planes(self, rows: int, columns: int) -> tuple[Plane, ...]:
        return (Plane("weight", (self.dtype,), (rows, columns)),)

    def exact(self, columns: int) -> Encoding:
        return Plain("f32")

    def transcode(self, planes: Mapping[str, Bits]) -> dict[str, Bits]:
        return {"weight": planes["weight"].astype(np.float32)}

    def decode(self, planes: Mapping[str, Bits]) -> Float32:
        return planes["weight"].astype(np.float32)

    def flaw(self, planes: Mapping[str, Bits]) -> Flaw | None:
        ids = planes["weight"].view(f"<i{self.bits // 8}")
        order = np.argsort(ids, axis=1, kind="stable")
        ranked = np.take_along_axis(ids, order, axis=1)
        bad = (ranked < 0) | (ranked >= self.num_experts)
        bad[:, 1:] |= ranked[:, 1:] == ranked[:, :-1]
        if not bad.any():
            return None
        row, place = map(int, np.argwhere(bad)[0])
        expected = f"distinct experts from 0 to {self.num_experts - 1} in a row"
        return Flaw("weight", row, int(order[row, place]), str(ranked[row, place]), expected)
