"""ggml's block quantization: rows of blocks of 32 or 256 weights, all numbers of a block side by side.

Sources: ggml-quants.c and gguf.quants. A block that packs pairs keeps the first half of a chunk in the lower halves of
its bytes and the second half in the upper ones.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from formats.dtypes import Float32
from formats.encodings.affine import Affine
from formats.encodings.base import Encoding
from formats.encodings.fp4 import MXFP4
from formats.encodings.integer import Symmetric
from formats.encodings.k_quants import Q2K, Q3K, Q4K, Q5K, Q6K, pack_scales
from formats.encodings.levels import IQ4, IQ4NL, Levels
from formats.encodings.minifloat import E2M1, E8M0_MAX
from formats.encodings.packing import pack_codes
from formats.encodings.sources.base import GGML_BLOCKS, Bits, Flaw, Plane
from formats.encodings.sources.ggml_iq import arrays_of, decode_blocks, iq1_m_d
from formats.encodings.sources.grids import GRIDS

_EXACT: Mapping[str, Encoding] = {
    "Q4_0": Symmetric(4, 32, "f16"),
    "Q4_1": Affine(4, 32, "f16"),
    "Q5_0": Symmetric(5, 32, "f16"),
    "Q5_1": Affine(5, 32, "f16"),
    "Q8_0": Symmetric(8, 32, "f16"),
    "Q2_K": Q2K(),
    "Q3_K": Q3K(),
    "Q4_K": Q4K(),
    "Q5_K": Q5K(),
    "Q6_K": Q6K(),
    "MXFP4": MXFP4(),
    "IQ4_NL": IQ4NL(),
    "IQ4_XS": Levels("iq4_xs"),
    "IQ3_S": Levels("iq3_s"),
    "IQ3_XXS": Levels("iq3_xxs"),
    "IQ2_S": Levels("iq2_xs"),
    "IQ2_XS": Levels("iq2_xs"),
    "IQ2_XXS": Levels("iq2_xxs"),
    "IQ1_S": Levels("iq1_s"),
    "IQ1_M": Levels("iq1_m"),
}


@dataclass(frozen=True)
class GGMLSource:
    """`blocks`: [rows, columns] of a block type that GGML_BLOCKS names."""

    type: str
    quantized: bool = True
    rounded_by_default: bool = False

    @property
    def label(self) -> str:
        published, kept = self.published_bits, self.kept_bits
        return f"ggml {self.type}" + (f", {published:g} bits" if kept > published else "")

    @property
    def published_bits(self) -> float:
        """Bits of a weight and its share of the scales."""
        weights, nbytes = GGML_BLOCKS[self.type]
        return 8 * nbytes / weights

    @property
    def kept_bits(self) -> float:
        """The same of the container's encoding that holds it to the bit: more where grids are written out."""
        weights, _ = GGML_BLOCKS[self.type]
        return 8 * sum(array.nbytes for array in _EXACT[self.type].arrays(1, weights)) / weights

    @property
    def bits(self) -> int:
        """Of a published code: what the type is called after."""
        return next(int(letter) for letter in self.type if letter.isdigit())

    def planes(self, rows: int, columns: int) -> tuple[Plane, ...]:
        return (Plane("blocks", (self.type,), (rows, columns)),)

    def exact(self, columns: int) -> Encoding:
        return _EXACT[self.type]

    def transcode(self, planes: Mapping[str, Bits]) -> dict[str, Bits]:
        fields = self._fields(planes)
        rows = len(planes["blocks"])

        def flat(array: Bits) -> Bits:
            return np.ascontiguousarray(array).reshape(rows, -1)

        bits = _EXACT[self.type].bits
        if self.type in GRIDS:
            codes, scales = arrays_of(self.type, fields)
            return {"codes": pack_codes(flat(codes), bits), "scales": flat(scales), "d": flat(fields["d"])}
        if self.type in ("Q4_0", "Q4_1", "MXFP4", "Q4_K", "IQ4_NL"):
            arrays = {"codes": flat(_in_order(fields["qs"])).view("<u4")}
        elif self.type == "IQ4_XS":
            arrays = {"codes": flat(_in_order(fields["qs"].reshape(rows, -1, 16))).view("<u4")}
        elif self.type == "Q8_0":
            arrays = {"codes": flat(fields["qs"] ^ np.uint8(0x80)).view("<u4")}
        else:
            arrays = {"codes": pack_codes(flat(_CODES[self.type](fields)), bits)}
        if self.type == "MXFP4":
            return arrays | {"scales": flat(fields["e"])}
        if self.type in ("Q4_1", "Q5_1"):
            return arrays | {"scales": flat(fields["d"]), "biases": flat(fields["m"])}
        if self.type in _SCALES:
            return arrays | {"scales": flat(_SCALES[self.type](fields)), "d": flat(fields["d"])}
        if self.type == "Q2_K":
            return arrays | {name: flat(fields[name]) for name in ("scales", "d", "dmin")}
        if self.type in ("Q4_K", "Q5_K"):
            scales = pack_scales(*_scales_and_mins(fields["scales"]))
            return arrays | {"scales": scales, "d": flat(fields["d"]), "dmin": flat(fields["dmin"])}
        return arrays | {"scales": flat(fields["d"])}

    def decode(self, planes: Mapping[str, Bits]) -> Float32:
        fields = self._fields(planes)
        rows = len(planes["blocks"])
        if self.type in GRIDS:
            return decode_blocks(self.type, fields).reshape(rows, -1)
        if self.type in ("Q2_K", "Q4_K", "Q5_K"):
            scales, mins = (product[..., None] for product in _products(self.type, fields))  # [rows, blocks, groups, 1]
            codes = _CODES[self.type](fields).reshape(*scales.shape[:3], -1)
            return (scales * codes.astype(np.float32) - mins).reshape(rows, -1)
        d = fields["d"].astype(np.float32) if self.type != "MXFP4" else np.exp2(fields["e"].astype(np.float32) - 127)
        if self.type in _SCALES:
            scales = d * _SCALES[self.type](fields).astype(np.float32)  # [rows, blocks, groups]
            codes = _CODES[self.type](fields).reshape(*scales.shape, -1)
            values = (
                IQ4[codes] if self.type == "IQ4_XS" else codes.astype(np.float32) - (4 if self.type == "Q3_K" else 32)
            )
            return (scales[..., None] * values).reshape(rows, -1)
        if self.type == "Q8_0":
            return (d * fields["qs"].view(np.int8).astype(np.float32)).reshape(rows, -1)
        codes = _CODES[self.type](fields) if self.type in _CODES else _halves(fields["qs"])
        if self.type in ("MXFP4", "IQ4_NL"):
            return ((E2M1 if self.type == "MXFP4" else IQ4)[codes] * d).reshape(rows, -1)
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
            raw = np.ascontiguousarray(raw)
            fields[name] = raw.view("<f2") if name in ("d", "dmin", "m") else raw
        if self.type == "IQ1_M":
            fields["d"] = iq1_m_d(fields["scales"])
        return fields


_LAYOUTS = {
    "Q4_0": (("d", 2), ("qs", 16)),
    "Q4_1": (("d", 2), ("m", 2), ("qs", 16)),
    "Q5_0": (("d", 2), ("qh", 4), ("qs", 16)),
    "Q5_1": (("d", 2), ("m", 2), ("qh", 4), ("qs", 16)),
    "Q8_0": (("d", 2), ("qs", 32)),
    "Q2_K": (("scales", 16), ("qs", 64), ("d", 2), ("dmin", 2)),
    "Q3_K": (("hmask", 32), ("qs", 64), ("scales", 12), ("d", 2)),
    "Q4_K": (("d", 2), ("dmin", 2), ("scales", 12), ("qs", 128)),
    "Q5_K": (("d", 2), ("dmin", 2), ("scales", 12), ("qh", 32), ("qs", 128)),
    "Q6_K": (("ql", 128), ("qh", 64), ("scales", 16), ("d", 2)),
    "MXFP4": (("e", 1), ("qs", 16)),
    "IQ4_NL": (("d", 2), ("qs", 16)),
    "IQ4_XS": (("d", 2), ("scales_h", 2), ("scales_l", 4), ("qs", 128)),
    "IQ3_S": (("d", 2), ("qs", 64), ("qh", 8), ("signs", 32), ("scales", 4)),
    "IQ3_XXS": (("d", 2), ("qs", 64), ("signs", 32)),
    "IQ2_S": (("d", 2), ("qs", 32), ("signs", 32), ("qh", 8), ("scales", 8)),
    "IQ2_XS": (("d", 2), ("qs", 64), ("scales", 8)),
    "IQ2_XXS": (("d", 2), ("qs", 64)),
    "IQ1_S": (("d", 2), ("qs", 32), ("qh", 16)),
    "IQ1_M": (("qs", 32), ("qh", 16), ("scales", 8)),
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


def _five_bits(fields: Mapping[str, Bits]) -> Bits:
    """Codes of Q5_0 and Q5_1: [rows, blocks, 32]."""
    return _halves(fields["qs"]) | np.unpackbits(fields["qh"], axis=2, bitorder="little") << 4


def _by_bits(packed: Bits, bits: int) -> Bits:
    """Chunks of 32 bytes, each of 32 codes in its lowest bits, then 32 in the next: [..., n] -> [..., 8 / bits * n]."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    codes = packed.reshape(*packed.shape[:-1], -1, 1, 32) >> shifts & (1 << bits) - 1
    return codes.reshape(*packed.shape[:-1], -1)


def _six_bits(fields: Mapping[str, Bits]) -> Bits:
    """Codes of Q6_K: [rows, blocks, 256]; each half of a block has 64 bytes of 4 bits and 32 of 2."""
    ql = fields["ql"]
    low = _halves(ql.reshape(*ql.shape[:2], 2, 64)).reshape(*ql.shape[:2], 256)
    return low | _by_bits(fields["qh"], 2) << 4


# Codes in order: [rows, blocks, weights].
_CODES: Mapping[str, Callable[[Mapping[str, Bits]], Bits]] = {
    "Q5_0": _five_bits,
    "Q5_1": _five_bits,
    "Q2_K": lambda fields: _by_bits(fields["qs"], 2),
    "Q3_K": lambda fields: _by_bits(fields["qs"], 2) | _by_bits(fields["hmask"], 1) << 2,
    "Q4_K": lambda fields: _by_bits(fields["qs"], 4),
    "Q5_K": lambda fields: _by_bits(fields["qs"], 4) | _by_bits(fields["qh"], 1) << 4,
    "Q6_K": _six_bits,
    "IQ4_XS": lambda fields: _halves(fields["qs"].reshape(*fields["qs"].shape[:2], 8, 16)),
}


def _q3_scales(fields: Mapping[str, Bits]) -> Bits:
    """Those of Q3_K, of 6 bits in 12 bytes: int8 [rows, blocks, 16]."""
    low = _halves(fields["scales"][..., :8])
    high = fields["scales"][..., None, 8:] >> np.arange(0, 8, 2, dtype=np.uint8)[:, None] & 3
    return (low | high.reshape(low.shape) << 4).view(np.int8) - np.int8(32)


def _iq4_scales(fields: Mapping[str, Bits]) -> Bits:
    """Those of IQ4_XS, of 6 bits, 4 of them first: int8 [rows, blocks, 8]."""
    low, high = (
        fields[name][..., None] >> np.arange(0, 8, bits, dtype=np.uint8) & (1 << bits) - 1
        for name, bits in (("scales_l", 4), ("scales_h", 2))
    )
    return (low.reshape(*low.shape[:2], 8) | high.reshape(*low.shape[:2], 8) << 4).view(np.int8) - np.int8(32)


# What d is multiplied by for each group: int8 [rows, blocks, groups].
_SCALES: Mapping[str, Callable[[Mapping[str, Bits]], Bits]] = {
    "Q3_K": _q3_scales,
    "Q6_K": lambda fields: fields["scales"].view(np.int8),
    "IQ4_XS": _iq4_scales,
}


def _scales_and_mins(packed: Bits) -> tuple[Bits, Bits]:
    """The 8 scales and 8 mins of 6 bits in 12 bytes [rows, blocks, 12]: [rows, blocks, 8] each."""
    first, second, rest = packed[..., 0:4], packed[..., 4:8], packed[..., 8:12]
    scales = np.concatenate([first & 63, rest & 15 | first >> 2 & 0x30], axis=-1)
    mins = np.concatenate([second & 63, rest >> 4 | second >> 2 & 0x30], axis=-1)
    return scales, mins


def _products(kind: str, fields: Mapping[str, Bits]) -> tuple[Float32, Float32]:
    """d * scale and dmin * min of each group of Q2_K, Q4_K and Q5_K: float32 [rows, blocks, groups] each."""
    packed = fields["scales"]
    scales, mins = (packed & 15, packed >> 4) if kind == "Q2_K" else _scales_and_mins(packed)
    d, dmin = fields["d"].astype(np.float32), fields["dmin"].astype(np.float32)
    return d * scales.astype(np.float32), dmin * mins.astype(np.float32)
