"""Multi-head latent attention and its indexer in NumPy: the definition of these operations (base.py)."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from formats.budget import SCORES_BYTES
from formats.dtypes import Float32

Bool = npt.NDArray[np.bool_]
Integers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class LatentCache:
    """Latents [capacity, L] and keys with position [capacity, r] of the first `length` tokens.

    A longer cache may share the same memory.
    """

    latents: Float32
    keys: Float32
    length: int

    def extended(self, latent: Float32, k_rope: Float32) -> "LatentCache":
        """With the next tokens."""
        stop = self.length + len(latent)
        self.latents[self.length : stop], self.keys[self.length : stop] = latent, k_rope
        return LatentCache(self.latents, self.keys, stop)


@dataclass(frozen=True)
class IndexCache:
    """Keys [capacity, d] of an indexer, as LatentCache."""

    keys: Float32
    length: int

    def extended(self, k: Float32) -> "IndexCache":
        """With the next tokens."""
        stop = self.length + len(k)
        self.keys[self.length : stop] = k
        return IndexCache(self.keys, stop)


def latent_attention(
    q: Float32,
    q_rope: Float32,
    matrices: Iterable[tuple[Float32, Float32]],
    cache: LatentCache,
    scale: float,
    selection: Bool | None,
    sinks: Float32 | None = None,
) -> Float32:
    """As Ops.latent_attention, over a cache that holds the new tokens; matrices: W_k and W_v of head after head."""
    tokens = len(q)
    start = cache.length - tokens
    block = max(1, SCORES_BYTES // (4 * cache.length))
    outputs = []
    for h, (w_k, w_v) in enumerate(matrices):  # [n, L], [v, L]
        output = np.empty((tokens, len(w_v)), np.float32)
        for first in range(0, tokens, block):
            rows = slice(first, min(first + block, tokens))
            seen = start + rows.stop
            latents, keys = cache.latents[:seen], cache.keys[:seen]
            scores = (q[rows, h] @ w_k @ latents.T + q_rope[rows, h] @ keys.T) * np.float32(scale)
            hidden = later(rows, start, seen)
            scores[hidden if selection is None else hidden | ~selection[rows, :seen]] = -np.inf
            sink = None if sinks is None else sinks[h : h + 1]
            output[rows] = softmax(scores, sink) @ latents @ w_v.T
        outputs.append(output)
    return np.stack(outputs, axis=1)


def keys_matrix(kv_b: Sequence[Any], head: int, heads: int, n: int) -> Float32:
    """W_k [n, L] of a head."""
    per_head = kv_b[0].rows // heads
    decoded: Float32 = kv_b[0].decode(head * per_head, head * per_head + (n if len(kv_b) == 1 else per_head))
    return decoded if len(kv_b) == 1 else decoded.T


def values_matrix(kv_b: Sequence[Any], head: int, heads: int, n: int) -> Float32:
    """W_v [v, L] of a head."""
    per_head = kv_b[-1].rows // heads
    decoded: Float32 = kv_b[-1].decode(head * per_head + (n if len(kv_b) == 1 else 0), (head + 1) * per_head)
    return decoded


def select_tokens(q: Float32, weights: Float32, cache: IndexCache, top_k: int, seen: Integers) -> Bool:
    """As Ops.select_tokens, over a cache that holds the new keys, of which each query sees `seen`: bool [T, length]."""
    selection = np.zeros((len(q), cache.length), np.bool_)
    for rows, scores in index_scores(q, weights, cache, seen):
        choose_tokens(scores, seen[rows], top_k, selection[rows])
    return selection


Scored = Iterator[tuple[slice, Float32]]


def index_scores(q: Float32, weights: Float32, cache: IndexCache, seen: Integers) -> Scored:
    """Some queries at a time, and their scores of all keys that any of them sees: [n, keys]."""
    tokens, heads, _ = q.shape
    block = max(1, SCORES_BYTES // (4 * max(1, cache.length)))
    for first in range(0, tokens, block):
        rows = slice(first, min(first + block, tokens))
        most = int(seen[rows].max())
        scores = np.zeros((rows.stop - first, most), np.float32)
        for h in range(heads):
            scores += weights[rows, h, None] * np.maximum(q[rows, h] @ cache.keys[:most].T, 0)
        yield rows, scores


def select_among(scored: Scored, shape: tuple[int, int], seen: Integers, top_k: int, candidates: Bool | None) -> Bool:
    """As Ops.select_among, of scores; shape is that of the result."""
    selection = np.zeros(shape, np.bool_)
    for rows, scores in scored:
        if candidates is not None:
            np.copyto(scores, -np.inf, where=~candidates[rows, : scores.shape[1]])
        choose_tokens(scores, seen[rows], top_k, selection[rows])
    return selection if candidates is None else selection & candidates


def select_candidates(
    scored: Scored, shape: tuple[int, int], seen: Integers, top_k: int, block: int, blocks: int
) -> tuple[Bool, Bool]:
    """As Ops.select_candidates, of scores."""
    selection, candidates = np.zeros(shape, np.bool_), np.zeros(shape, np.bool_)
    for rows, scores in scored:
        keys = scores.shape[1]
        if keys == 0:
            continue
        some = seen[rows]
        np.copyto(scores, -np.inf, where=np.arange(keys) >= some[:, None])
        best = np.maximum.reduceat(scores, np.arange(0, keys, block), axis=1)  # [n, blocks]
        last = (some - 1) // block
        np.copyto(best, np.inf, where=np.arange(best.shape[1]) == last[:, None])
        chosen = np.zeros(best.shape, np.bool_)
        choose_tokens(best, last + 1, blocks, chosen)
        candidates[rows, :keys] = chosen[:, np.arange(keys) // block]
        choose_tokens(scores, some, top_k, selection[rows])
    return selection, candidates


def select_blocks(
    q: Float32, cache: IndexCache, dots: Callable[[Float32], Float32], block: int, top_k: int, local: int
) -> Bool:
    """As Ops.select_blocks, over a cache that holds the new keys; dots gives q [n, H, d] . keys: [n, H, length]."""
    tokens, heads, _ = q.shape
    start, number = cache.length - tokens, cache.length
    begins = np.arange(0, number, block)
    chosen = np.zeros((heads, tokens, len(begins)), np.bool_)
    some = max(1, SCORES_BYTES // (4 * heads * number))
    for first in range(0, tokens, some):
        rows = slice(first, min(first + some, tokens))
        scores = dots(q[rows])
        np.copyto(scores, -np.inf, where=later(rows, start, number)[:, None])
        best = np.maximum.reduceat(scores, begins, axis=2)  # [n, H, blocks]
        own = (start + np.arange(rows.start, rows.stop)) // block
        behind = own[:, None] - np.arange(len(begins))
        np.copyto(best, np.inf, where=((behind >= 0) & (behind < local))[:, None])
        for h in range(heads):
            choose_tokens(best[:, h], own + 1, top_k, chosen[h, rows])
    return chosen[..., : number // block]


def choose_tokens(scores: Float32, seen: Integers, top_k: int, selection: Bool) -> None:
    """Mark the top_k best of the first `seen` [n] keys by scores [n, keys] in selection [n, any], of equals the first.

    Changes scores. Nothing is sorted: what is better than the least of the best is in, then equals as far as they go.
    """
    keys = scores.shape[1]
    chosen = np.arange(keys) < seen[:, None]
    if top_k < keys:
        scores[~chosen] = -np.inf
        least = np.partition(scores, keys - top_k, axis=1)[:, keys - top_k, None]
        better, equal = scores > least, scores == least
        left = top_k - np.count_nonzero(better, axis=1)[:, None]
        chosen &= better | (equal & (np.cumsum(equal, axis=1) <= left))
    selection[:, :keys] = chosen


def seen_tokens(cache: IndexCache, tokens: int) -> Integers:
    """How many keys each of the new tokens sees where every token has one and no later one is seen: [T]."""
    return cache.length - tokens + 1 + np.arange(tokens)


def later(rows: slice, start: int, seen: int) -> Bool:
    """Which of the first `seen` tokens come after each of the new tokens `rows`, the first of them at `start`."""
    return np.arange(seen) > start + np.arange(rows.start, rows.stop)[:, None]


def softmax(x: Float32, sink: Float32 | None = None) -> Float32:
    """Over the last axis, with one more score per row that is left out of the result."""
    highest = x.max(axis=-1, keepdims=True)
    if sink is not None:
        highest = np.maximum(highest, sink[:, None])
    y = np.exp(x - highest)
    total = y.sum(axis=-1, keepdims=True)
    y /= total if sink is None else total + np.exp(sink[:, None] - highest)
    return y
