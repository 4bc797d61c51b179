"""Random matrices in any encoding: arrays that a writer may write, with values of about 1."""

import numpy as np

from formats.dtypes import FLOAT_DTYPES, AnyArray, from_float32
from formats.encodings import (
    FP8,
    IQ4NL,
    MXFP4,
    NVFP4,
    Q2K,
    Q3K,
    Q4K,
    Q5K,
    Q6K,
    Affine,
    ArraySpec,
    Encoding,
    Levels,
    Plain,
    Symmetric,
    ZeroPoint,
)
from formats.encodings.k_quants import pack_scales
from formats.encodings.levels import KINDS

# Those of ggml's blocks that have no parameters.
GGML_ENCODINGS: tuple[Encoding, ...] = (Q4K(), Q5K(), Q6K(), Q2K(), Q3K(), IQ4NL(), *map(Levels, KINDS))

# One of each id, and every way in which they differ.
EVERY_ENCODING: tuple[Encoding, ...] = (
    Plain("bf16"),
    Plain("f16"),
    Plain("f32"),
    *(Affine(bits, 64, "bf16") for bits in (2, 3, 4, 5, 6, 8)),
    Affine(4, 32, "f32"),
    Affine(4, 128, "f16"),
    Symmetric(4, 32, "bf16"),
    Symmetric(5, 32, "f16"),
    Symmetric(8, 256, "f32"),
    Symmetric(8, 32, "f16"),
    *(ZeroPoint(bits, 128, "f16") for bits in (2, 3, 4, 8)),
    ZeroPoint(4, 256, "bf16"),
    MXFP4(),
    NVFP4("multiply"),
    NVFP4("divide"),
    FP8(128, "f32"),
    FP8(256, "bf16"),
    FP8(32, "bf16"),
    *GGML_ENCODINGS,
)


def random_arrays(encoding: Encoding, rows: int, columns: int, rng: np.random.Generator) -> dict[str, AnyArray]:
    """The arrays of a matrix [rows, columns] of uniform codes."""
    return {spec.name: _random(encoding, spec, rng) for spec in encoding.arrays(rows, columns)}


def _random(encoding: Encoding, spec: ArraySpec, rng: np.random.Generator) -> AnyArray:
    name, shape = spec.name, spec.shape
    if isinstance(encoding, Q4K) and name == "scales":
        blocks = (shape[0], shape[1] // 3, 8)
        return pack_scales(rng.integers(1, 64, blocks, np.uint8), rng.integers(0, 64, blocks, np.uint8))
    if name == "codes" and isinstance(encoding, FP8):
        return rng.integers(0, 0x78, shape, np.uint8) | rng.choice(np.array([0, 0x80], np.uint8), shape)  # no NaN
    if spec.dtype == "u32":
        return rng.integers(0, 1 << 32, shape, np.uint32)
    if spec.dtype == "i8":
        return rng.integers(-128, 128, shape, np.int8)
    if spec.dtype == "u8":
        low, high = {
            MXFP4: (122, 128),
            NVFP4: (0x30, 0x3F),
            Q2K: (0, 256),
            ZeroPoint: (0, 1 << encoding.bits),
        }[type(encoding)]
        return rng.integers(low, high, shape, np.uint8)
    assert spec.dtype in FLOAT_DTYPES
    values = rng.uniform(0.5, 1.5, shape).astype(np.float32) * np.float32(_magnitude(encoding, name))
    signs = rng.choice(np.array([-1, 1], np.float32), shape)
    if name in ("weight", "biases"):  # scales are positive here, but for ggml's, which may have any sign
        values = values * signs
    return from_float32(values, spec.dtype)


def _magnitude(encoding: Encoding, name: str) -> float:
    """Of a float array, such that values are about 1."""
    if isinstance(encoding, FP8):
        return 2.0**-5
    if isinstance(encoding, (Q2K, Q4K, Q6K, Levels, IQ4NL)):
        return {"q2_k": 2.0**-4, "iq4_xs": 2.0**-13}.get(encoding.id, 2.0**-9)
    if name in ("weight", "biases", "global"):
        return 1.0
    return 4.0 / (1 << encoding.bits)
