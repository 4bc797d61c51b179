"""Exact transcodes by the native library: what `SourceEncoding.transcode` gives, to the bit, at memory speed.

NumPy's text stays the definition, and does it where there is no library.
"""

from collections.abc import Mapping
from ctypes import c_int32, c_int64, c_void_p
from functools import cache
from typing import Any

import numpy as np

from formats.dtypes import storage_dtype
from formats.encodings.sources import AWQSource, GGMLSource, SourceEncoding
from formats.encodings.sources.base import GGML_BLOCKS, Bits
from formats.encodings.sources.grids import GRIDS
from formats.native import declare, load_library

BLOCK_TYPES = (  # numbers of se_block_type
    "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K", "MXFP4", "Q2_K", "Q3_K", "IQ4_NL", "IQ4_XS",
    "IQ3_S", "IQ3_XXS", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_S", "IQ1_M",
)  # fmt: skip
MOST_ARRAYS = 4
_OK, _NOT_FINITE = 0, 4


@cache
def _library() -> Any:
    library = load_library()
    if library is not None:
        declare(
            library,
            {
                "se_transcode_blocks": (c_int32, (c_int32, c_int64, c_void_p, c_void_p, c_void_p * MOST_ARRAYS)),
                "se_transcode_awq": (c_int32, (c_void_p, c_int64, c_int64, c_int64, c_void_p)),
            },
        )
    return library


def transcode(encoding: SourceEncoding, planes: Mapping[str, Bits]) -> dict[str, Bits] | None:
    """The arrays of encoding.exact, outside of Python's lock.

    None where NumPy is to do it: without the library, for an encoding that needs no help, and for ggml's blocks with a
    scale that no container may hold, so that it is found and named.
    """
    if _library() is None:
        return None
    if isinstance(encoding, GGMLSource):
        return _blocks(encoding, planes["blocks"])
    if isinstance(encoding, AWQSource):
        return _awq(encoding, planes)
    return None


def _blocks(encoding: GGMLSource, blocks: Bits) -> dict[str, Bits] | None:
    weights, nbytes = GGML_BLOCKS[encoding.type]
    blocks = np.ascontiguousarray(blocks)
    rows, columns = len(blocks), blocks.shape[1] // nbytes * weights
    specs = encoding.exact(columns).arrays(rows, columns)
    arrays = {spec.name: np.empty(spec.shape, storage_dtype(spec.dtype)) for spec in specs}
    places = (c_void_p * MOST_ARRAYS)(*(array.ctypes.data for array in arrays.values()))
    grid = GRIDS[encoding.type].ctypes.data if encoding.type in GRIDS else None
    status = _library().se_transcode_blocks(
        BLOCK_TYPES.index(encoding.type), blocks.nbytes // nbytes, blocks.ctypes.data, grid, places
    )
    assert status in (_OK, _NOT_FINITE)
    return arrays if status == _OK else None


def _awq(encoding: AWQSource, planes: Mapping[str, Bits]) -> dict[str, Bits] | None:
    words = planes["qweight"]  # [rows / 8, columns]
    item = words.itemsize
    if words.strides[0] != item or words.shape[1] % 8:
        return None
    codes = np.empty((8 * len(words), words.shape[1] // 8), "<u4")
    status = _library().se_transcode_awq(
        words.ctypes.data, words.strides[1] // item, len(words), words.shape[1], codes.ctypes.data
    )
    assert status == _OK
    return {"codes": codes, **encoding.scales_and_zeros(planes)}
