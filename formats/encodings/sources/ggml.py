"""ggml's block quantization: rows of blocks of 32 or 256 weights, all numbers of a block side by side.

Sources: ggml-quants.c and gguf.quants. A block that packs pairs keeps the first half of a chunk in the lower halves of
its bytes and the second half in the upper ones.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from formats.dtypes import Float32
from formats.encodings.affine import Affine
from formats.encodings.base import Encoding
from formats.encodings.fp4 import MXFP4
from formats.encodings.integer import Symmetric
from formats.encodings.k_quants import Q4K, Q5K, Q6K, pack_scales
from formats.encodings.minifloat import E2M1, E8M0_MAX
from formats.encodings.packing import pack_codes
from formats.encodings.sources.base import GGML_BLOCKS, Bits, Flaw, Plane

BITS = {"Q4_0": 4, "Q4_1": 4, "Q5_0": 5, "Q5_1": 5, "Q8_0": 8, "Q4_K": 4, "Q5_K": 5, "Q6_K": 6, "MXFP4": 4}
_EXACT: Mapping[str, Encoding] = {
    "Q4_0": Symmetric(4, 32, "f16"),
    "Q4_1": Affine(4, 32, "f16"),
    "Q5_0": Symmetric(5, 32, "f16"),
    "Q5_1": Affine(5, 32, "f16"),
    "Q8_0": Symmetric(8, 32, "f16"),
    "Q4_K": Q4K(),
    "Q5_K": Q5K(),
    "Q6_K": Q6K(),
    "MXFP4": MXFP4(),
}


@dataclass(frozen=True)
class GGMLSource:
    """`blocks`: [rows, columns] of a block type that BITS names."""

    type: str
    quantized: bool = True
    rounded_by_default: bool = False

    @property
    def label(self) -> str:
        return f"ggml {self.type}"

    @property
    def bits(self) -> int:
        return BITS[self.type]

    def planes(self, rows: int, columns: int) -> tuple[Plane, ...]:
        return (Plane("blocks", (self.type,), (rows, columns)),)

    def exact(self, columns: int) -> Encoding:
        return _EXACT[self.type]

    def transcode(self, planes: Mapping[str, Bits]) -> dict[str, Bits]:
        fields = self._fields(planes)
        rows = len(planes["blocks"])

        def flat(array: Bits) -> Bits:
            return np.ascontiguousarray(array).reshape(rows, -1)

        if self.type in ("Q4_0", "Q4_1", "MXFP4", "Q4_K"):
            arrays = {"codes": flat(_in_order(fields["qs"])).view("<u4")}
        elif self.type == "Q8_0":
            arrays = {"codes": flat(fields["qs"] ^ np.uint8(0x80)).view("<u4")}
        elif self.type == "Q6_K":
            arrays = {"codes": pack_codes(flat(_six_bits(fields)), 6)}
        else:
            arrays = {"codes": pack_codes(flat(_five_bits(self.type, fields)), 5)}
        if self.type == "MXFP4":
            return arrays | {"scales": flat(fields["e"])}
        if self.type in ("Q4_1", "Q5_1"):
            return arrays | {"scales": flat(fields["d"]), "biases": flat(fields["m"])}
        if self.type == "Q6_K":
            return arrays | {"scales": flat(fields["scales"]).view(np.int8), "d": flat(fields["d"])}
        if self.type in ("Q4_K", "Q5_K"):
            scales = pack_scales(*_scales_and_mins(fields["scales"]))
            return arrays | {"scales": scales, "d": flat(fields["d"]), "dmin": flat(fields["dmin"])}
        return arrays | {"scales": flat(fields["d"])}

    def decode(self, planes: Mapping[str, Bits]) -> Float32:
        fields = self._fields(planes)
        rows = len(planes["blocks"])
        if self.type in ("Q4_K", "Q5_K"):
            scales, mins = (product[..., None] for product in _products(fields))  # [rows, blocks, 8, 1]
            codes = _halves(fields["qs"].reshape(rows, -1, 4, 32)).reshape(rows, -1, 8, 32)
            if self.type == "Q5_K":
                codes = codes | (fields["qh"][:, :, None] >> np.arange(8, dtype=np.uint8)[:, None] & 1) << 4
            return (scales * codes.astype(np.float32) - mins).reshape(rows, -1)
        d = fields["d"].astype(np.float32) if self.type != "MXFP4" else np.exp2(fields["e"].astype(np.float32) - 127)
        if self.type == "Q6_K":
            scales = d * fields["scales"].view(np.int8).astype(np.float32)  # [rows, blocks, 16]
            codes = _six_bits(fields).astype(np.float32).reshape(*scales.shape, 16)
            return (scales[..., None] * (codes - 32)).reshape(rows, -1)
        if self.type == "Q8_0":
            return (d * fields["qs"].view(np.int8).astype(np.float32)).reshape(rows, -1)
        codes = _halves(fields["qs"])
        if self.type in ("Q5_0", "Q5_1"):
            codes = codes | np.unpackbits(fields["qh"], axis=2, bitorder="little") << 4
        if self.type == "MXFP4":
            return (E2M1[codes] * d).reshape(rows, -1)
        values = codes.astype(np.float32)
        if self.type in ("Q4_1", "Q5_1"):
            return (d * values + fields["m"].astype(np.float32)).reshape(rows, -1)
        return (d * (values - (16 if self.type == "Q5_0" else 8))).reshape(rows, -1)

    def flaw(self, planes: Mapping[str, Bits]) -> Flaw | None:
        fields = self._fields(planes)
        for name in ("d", "dmin", "m"):
            if name in fields:
                bad = np.argwhere(fields[name].view("<u2") & 0x7C00 == 0x7C00)
                if len(bad):
                    row, block = map(int, bad[0][:2])
                    return Flaw(
                        "blocks",
                        row,
                        block * GGML_BLOCKS[self.type][0],
                        f"{name} {fields[name][row, block, 0]}",
                        "finite scales",
                    )
        if self.type == "MXFP4" and (fields["e"] > E8M0_MAX).any():
            row, block = map(int, np.argwhere(fields["e"] > E8M0_MAX)[0][:2])
            return Flaw(
                "blocks", row, 32 * block, f"E8M0 0x{fields['e'][row, block, 0]:02x}", f"at most 0x{E8M0_MAX:02x}"
            )
        return None

    def _fields(self, planes: Mapping[str, Bits]) -> dict[str, Bits]:
        """The numbers of every block: [rows, blocks, n] each."""
        blocks = planes["blocks"].reshape(len(planes["blocks"]), -1, GGML_BLOCKS[self.type][1])
        fields: dict[str, Bits] = {}
        start = 0
        for name, nbytes in _LAYOUTS[self.type]:
            raw = blocks[..., start : start + nbytes]
            start += nbytes
            fields[name] = np.ascontiguousarray(raw).view("<f2") if name in ("d", "dmin", "m") else raw
        return fields


_LAYOUTS = {
    "Q4_0": (("d", 2), ("qs", 16)),
    "Q4_1": (("d", 2), ("m", 2), ("qs", 16)),
    "Q5_0": (("d", 2), ("qh", 4), ("qs", 16)),
    "Q5_1": (("d", 2), ("m", 2), ("qh", 4), ("qs", 16)),
    "Q8_0": (("d", 2), ("qs", 32)),
    "Q4_K": (("d", 2), ("dmin", 2), ("scales", 12), ("qs", 128)),
    "Q5_K": (("d", 2), ("dmin", 2), ("scales", 12), ("qh", 32), ("qs", 128)),
    "Q6_K": (("ql", 128), ("qh", 64), ("scales", 16), ("d", 2)),
    "MXFP4": (("e", 1), ("qs", 16)),
}


def _halves(qs: Bits) -> Bits:
    """Bytes [..., n] -> codes [..., 2 * n]: all lower halves, then all upper ones."""
    return np.concatenate([qs & 15, qs >> 4], axis=-1)


def _in_order(qs: Bits) -> Bits:
    """Bytes of chunks of 16 or 32, the same codes in order: two neighbours to a byte. [..., n] -> [..., n]."""
    words = np.ascontiguousarray(qs).reshape(-1, min(32, qs.shape[-1]) // 8, 8).view("<u8")[..., 0]
    low, high = _squeezed(words), _squeezed(words >> np.uint64(4))  # [chunks, 2 or 4] each, 8 codes in the lower half
    half = words.shape[1] // 2
    ordered = np.empty_like(words)
    for i in range(half):
        ordered[:, i] = low[:, 2 * i] | low[:, 2 * i + 1] << np.uint64(32)
        ordered[:, half + i] = high[:, 2 * i] | high[:, 2 * i + 1] << np.uint64(32)
    return ordered.view(np.uint8).reshape(qs.shape)


def _squeezed(words: Bits) -> Bits:
    """The lower halves of the 8 bytes of each uint64, side by side in its lower 32 bits."""
    words = words & np.uint64(0x0F0F0F0F0F0F0F0F)
    for shift, mask in ((4, 0x00FF00FF00FF00FF), (8, 0x0000FFFF0000FFFF), (16, 0x00000000FFFFFFFF)):
        words |= words >> np.uint64(shift)
        words &= np.uint64(mask)
    return words


def _five_bits(kind: str, fields: Mapping[str, Bits]) -> Bits:
    """Codes of Q5_0, Q5_1 and Q5_K: [rows, blocks, 32 or 256]."""
    if kind == "Q5_K":
        qs, qh = fields["qs"], fields["qh"]
        low = _halves(qs.reshape(*qs.shape[:2], 4, 32)).reshape(*qs.shape[:2], 8, 32)
        high = qh[:, :, None, :] >> np.arange(8, dtype=np.uint8)[:, None] & 1
        return (low | high << 4).reshape(*qs.shape[:2], 256)
    return _halves(fields["qs"]) | np.unpackbits(fields["qh"], axis=2, bitorder="little") << 4


def _six_bits(fields: Mapping[str, Bits]) -> Bits:
    """Codes of Q6_K: [rows, blocks, 256]; each half of a block has 64 bytes of 4 bits and 32 of 2."""
    ql, qh = fields["ql"], fields["qh"]
    low = _halves(ql.reshape(*ql.shape[:2], 2, 64)).reshape(*ql.shape[:2], 2, 4, 32)
    high = qh.reshape(*qh.shape[:2], 2, 1, 32) >> np.arange(0, 8, 2, dtype=np.uint8)[:, None] & 3
    return (low | high << 4).reshape(*ql.shape[:2], 256)


def _scales_and_mins(packed: Bits) -> tuple[Bits, Bits]:
    """The 8 scales and 8 mins of 6 bits in 12 bytes [rows, blocks, 12]: [rows, blocks, 8] each."""
    first, second, rest = packed[..., 0:4], packed[..., 4:8], packed[..., 8:12]
    scales = np.concatenate([first & 63, rest & 15 | first >> 2 & 0x30], axis=-1)
    mins = np.concatenate([second & 63, rest >> 4 | second >> 2 & 0x30], axis=-1)
    return scales, mins


def _products(fields: Mapping[str, Bits]) -> tuple[Float32, Float32]:
    """d * scale and dmin * min of each group of Q4_K and Q5_K: float32 [rows, blocks, 8] each."""
    scales, mins = _scales_and_mins(fields["scales"])
    d, dmin = fields["d"].astype(np.float32), fields["dmin"].astype(np.float32)
    return d * scales.astype(np.float32), dmin * mins.astype(np.float32)
