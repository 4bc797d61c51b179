"""Multi-head latent attention and its indexer on native kernels; matrices that are cut into heads."""

from collections.abc import Callable, Sequence

import numpy as np

from formats.budget import SCORES_BYTES
from formats.config import ABSORBED_VALUES
from formats.dtypes import Float32
from formats.encodings import Plain
from formats.errors import UnsupportedError
from formats.kernels import matrix as matrix_of
from formats.window import LANES, in_lanes
from runtime.backends import abi
from runtime.backends.facts import State
from runtime.backends.native import address
from runtime.backends.native_states import NativeCache
from runtime.backends.native_weights import Told, native_weight, require_shapes
from runtime.backends.numpy_latent import Bool, IndexCache, Integers, Scored, choose_tokens, seen_tokens
from runtime.backends.numpy_ops import Weight


class NativeLatentOps:
    """Operations of numpy_latent.py by kernels; `_call` is that of native.Context."""

    _call: Callable[..., None]
    _base: int  # address of resident memory
    _told: Told
    _ctx_size: int

    def new_latent_cache(self, kv_lora_rank: int, rope_dim: int) -> State:
        """Latents, then the key with position, as keys of one head whose first kv_lora_rank are the values."""
        if kv_lora_rank % LANES != 0:
            raise UnsupportedError(f"kv_lora_rank is {kv_lora_rank}, expected a multiple of {LANES}")
        capacity = in_lanes(self._ctx_size)
        keys = np.empty((capacity, kv_lora_rank + rope_dim), np.float32)
        memory = abi.KVCache(keys.ctypes.data, None, capacity, 1, kv_lora_rank + rope_dim, kv_lora_rank)
        return NativeCache(memory, (keys,), 0)

    def latent_attention(
        self,
        q: Float32,
        q_rope: Float32,
        latent: Float32,
        k_rope: Float32,
        kv_b: Sequence[Weight],
        cache: State,
        scale: float,
        selection: Bool | None = None,
        sinks: Weight | None = None,
    ) -> tuple[Float32, State]:
        """Some tokens at a time: in the space of latents queries are wide (128 heads of 576 in DeepSeek-V3)."""
        tokens, heads = q.shape[:2]
        block = max(1, ABSORBED_VALUES // (heads * (cache.memory.value_width + cache.memory.width)))
        outputs = []
        for first in range(0, tokens, block):
            rows = slice(first, min(first + block, tokens))
            seen = selection[rows, : cache.length + rows.stop - first] if selection is not None else None
            queries = q[rows], q_rope[rows]
            block_of = queries, latent[rows], k_rope[rows]
            output, cache = self._latent_attention(*block_of, kv_b, cache, scale, seen, sinks)
            outputs.append(output)
        return outputs[0] if len(outputs) == 1 else np.concatenate(outputs), cache

    def _latent_attention(
        self,
        queries: tuple[Float32, Float32],
        latent: Float32,
        k_rope: Float32,
        kv_b: Sequence[Weight],
        cache: NativeCache,
        scale: float,
        selection: Bool | None,
        sinks: Weight | None,
    ) -> tuple[Float32, NativeCache]:
        """`latent_attention` of a block; queries: without, and with position."""
        tokens, heads, n = queries[0].shape
        if len(kv_b) == 1:
            rows, values = slice(0, n), slice(n, kv_b[0].rows // heads)
        else:  # W_k transposed and W_v, each a matrix of its own
            rows, values = (slice(0, matrix.rows // heads) for matrix in kv_b)
        absorbed = self.heads_product(queries[0], kv_b[0], heads, rows, transposed=len(kv_b) == 1)
        wide, keys = np.concatenate([absorbed, queries[1]], axis=2), np.concatenate([latent, k_rope], axis=1)
        memory, mixed = cache.memory, absorbed  # whose memory is free now
        require_shapes(
            "latent attention",
            (wide, (tokens, heads, memory.width)),
            (keys, (tokens, memory.width)),
            (mixed, (tokens, heads, memory.value_width)),
        )
        self._call(
            "se_attention", memory, cache.length, address(wide), address(keys), None, tokens, heads,
            scale, 0, self._told.place(sinks, heads) if sinks is not None else None,
            address(np.ascontiguousarray(selection)) if selection is not None else None, None, None, address(mixed),
        )  # fmt: skip
        return self.heads_product(mixed, kv_b[-1], heads, values), cache._replace(length=cache.length + tokens)

    def heads_product(
        self, x: Float32, weight: Weight, heads: int, rows: slice, *, transposed: bool = False
    ) -> Float32:
        """Rows of each head of a matrix [heads * (rows per head), columns] times its own input [T, heads, ...]."""
        x = np.ascontiguousarray(x, np.float32)
        number = rows.stop - rows.start
        require_shapes("heads", (x, (len(x), heads, number if transposed else weight.columns)))
        y = np.empty((len(x), heads, weight.columns if transposed else number), np.float32)
        which = abi.Heads(heads, weight.rows // heads, rows.start, number)
        matrix = native_weight(weight).matrix
        self._call("se_heads_product", matrix, self._base, which, transposed, address(x), len(x), address(y))
        return y

    def select_tokens(
        self,
        q: Float32,
        k: Float32,
        weights: Float32,
        cache: IndexCache,
        top_k: int,
        seen: Sequence[int] | None = None,
    ) -> tuple[Bool, IndexCache]:
        cache = cache.extended(k)
        each = seen_tokens(cache, len(q)) if seen is None else np.asarray(seen)
        selection = np.zeros((len(q), cache.length), np.bool_)
        for rows, scores in self.index_scores(q, weights, cache, each):
            choose_tokens(scores, each[rows], top_k, selection[rows])
        return selection, cache

    def index_scores(self, q: Float32, weights: Float32, cache: IndexCache, _seen: Integers) -> Scored:
        """As that of numpy_latent, of all keys."""
        tokens, heads, _ = q.shape
        number = cache.length
        block = max(1, SCORES_BYTES // (4 * heads * max(1, number)))
        for first in range(0, tokens if number else 0, block):
            dots = self.index_dots(q[first : first + block], cache)
            np.maximum(dots, 0, out=dots)
            rows = slice(first, first + len(dots))
            dots *= weights[rows, :, None]
            yield rows, np.add.reduce(dots, axis=1)  # [n, number], head after head

    def index_dots(self, q: Float32, cache: IndexCache) -> Float32:
        """The keys are a matrix of float32, its rows the tokens so far."""
        q = np.ascontiguousarray(q)
        tokens, heads, d = q.shape
        keys = matrix_of(Plain("f32"), cache.length, d, {"weight": 0})
        dots = np.empty((tokens, heads, cache.length), np.float32)
        self._call(
            "se_heads_product", keys, cache.keys.ctypes.data, abi.Heads(1, cache.length, 0, cache.length), 0,
            address(q), tokens * heads, address(dots),
        )  # fmt: skip
        return dots
