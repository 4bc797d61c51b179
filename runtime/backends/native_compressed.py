"""Several residual streams and entries that stand for tokens: the part of the native backend that is DeepSeek-V4's."""

import numpy as np

from formats.dtypes import Float32
from formats.errors import FormatError, UnsupportedError
from formats.window import LANES
from runtime.backends import native
from runtime.backends.native import address
from runtime.backends.native_latent import NativeLatentOps
from runtime.backends.native_states import Entries
from runtime.backends.native_weights import with_result
from runtime.backends.numpy_compressed import CompressedOps
from runtime.backends.numpy_ops import Weight


class NativeCompressedOps(NativeLatentOps, CompressedOps):
    """Operations of numpy_compressed.py by the functions of native/streams.c."""

    _context: native.Context

    def new_entries(self, width: int, rate: int) -> Entries:
        if width % LANES != 0:
            raise UnsupportedError(f"head_dim is {width}, expected a multiple of {LANES}")
        return Entries.empty(-(-self._ctx_size // rate), width)

    def pool(self, values: Float32, gates: Float32) -> Float32:
        values, gates = np.ascontiguousarray(values), np.ascontiguousarray(gates)
        windows, slots, width = values.shape
        y = np.empty((windows, width), np.float32)
        self._call("se_pool", address(values), address(gates), windows, slots, width, address(y))
        return y

    def grouped_linear(self, x: Float32, weight: Weight) -> Float32:
        """Group after group as `linear`, an order of magnitude faster than `heads_product` (docs/LEARNED.md, 60)."""
        parts = self._told.row_groups(weight, x.shape[1], self._base)
        return np.concatenate([self._context.linear(part, self._base, x[:, g]) for g, part in enumerate(parts)], axis=1)

    def stream_weights(
        self, mixes: Float32, scale: Weight, base: Weight, streams: int, iterations: int, eps: float
    ) -> tuple[Float32, Float32, Float32]:
        tokens, number = len(mixes), (2 + streams) * streams
        if mixes.shape[1] != number:
            raise FormatError(
                f"{streams} residual streams: have {mixes.shape[1]} weights, config.json asks for {number}"
            )
        pre, post = np.empty((tokens, streams), np.float32), np.empty((tokens, streams), np.float32)
        comb = np.empty((tokens, streams, streams), np.float32)
        self._call(
            "se_stream_weights", address(np.ascontiguousarray(mixes)), address(self._told.vector(scale, 3)),
            address(self._told.vector(base, number)), tokens, streams, iterations, eps,
            address(pre), address(post), address(comb),
        )  # fmt: skip
        return pre, post, comb

    def collapse_streams(self, h: Float32, pre: Float32) -> Float32:
        h, pre = np.ascontiguousarray(h), np.ascontiguousarray(pre)
        y = np.empty((len(h), h.shape[2]), np.float32)
        self._call("se_collapse_streams", address(h), address(pre), *h.shape, address(y))
        return y

    def expand_streams(self, h: Float32, y: Float32, post: Float32, comb: Float32 | None) -> Float32:
        if comb is None:  # what 0 times the other streams adds changes no bit, nor much of the time
            comb = np.tile(np.eye(h.shape[1], dtype=np.float32), (len(h), 1, 1))
        h, new = with_result(h)
        inputs = [address(np.ascontiguousarray(array)) for array in (y, post, comb)]
        self._call("se_expand_streams", address(h), *inputs, *h.shape, address(new))
        return new
