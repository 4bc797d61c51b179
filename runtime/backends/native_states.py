"""What the native backend remembers of a sequence: caches of keys and values, states of gated DeltaNet."""

from typing import NamedTuple

import numpy as np

from formats.dtypes import Float32
from formats.window import LANES, first_kept, in_lanes, room
from runtime.backends import abi
from runtime.backends.numpy_latent import Bool


class NativeCache(NamedTuple):
    """Keys and values of tokens `first` to `length` where `memory` says; a longer cache may share the same memory."""

    memory: abi.KVCache
    arrays: tuple[Float32, ...]  # which the memory is
    length: int
    first: int = 0  # a multiple of the kernels' blocks, so that forgetting changes no sum
    window: int | None = None  # of a cache that forgets

    def with_room(self, tokens: int) -> "NativeCache":
        """Itself, or a cache of its own memory that has forgotten what the next tokens do not see."""
        if self.window is None or self.length - self.first + tokens <= self.memory.capacity:
            return self
        first = first_kept(self.window, self.length)
        kept = in_lanes(self.length - first)  # keys of LANES tokens lie together
        new = new_cache(self.memory.heads, self.memory.width, self.memory.value_width, room(self.window, tokens))
        for old, array in zip(self.arrays, new.arrays, strict=True):
            array[:, :kept] = old[:, first - self.first :][:, :kept]
        return new._replace(length=self.length, first=first, window=self.window)


def new_cache(heads: int, width: int, value_width: int, capacity: int) -> NativeCache:
    """An empty one; its memory becomes resident only as tokens come."""
    keys = np.empty((heads, capacity, width), np.float32)
    values = np.empty((heads, capacity, in_lanes(value_width)), np.float32)
    memory = abi.KVCache(keys.ctypes.data, values.ctypes.data, capacity, heads, width, value_width)
    return NativeCache(memory, (keys, values), 0)


class Entries(NamedTuple):
    """Keys that are their own values, [capacity / 16, width, 16]; a longer one may share the same memory."""

    keys: Float32
    length: int

    @classmethod
    def empty(cls, capacity: int, width: int) -> "Entries":
        return cls(np.empty((in_lanes(capacity) // LANES, width, LANES), np.float32), 0)

    def extended(self, keys: Float32) -> "Entries":
        """With the next keys [any, width]."""
        places = np.arange(self.length, self.length + len(keys))
        self.keys[places // LANES, :, places % LANES] = keys
        return self._replace(length=self.length + len(keys))

    def seen_by(self, selection: Bool, gathered: bool) -> abi.Beside:
        """As kernels take them; selection [T, length], which must outlive it, tells who sees which."""
        most = int(np.count_nonzero(selection, axis=1).max())
        return abi.Beside(self.keys.ctypes.data, self.length, selection.ctypes.data, gathered, most)


class DeltaState(NamedTuple):
    """The state of a gated DeltaNet, [H, panels of 16 columns, dk, 16], and room for the one after it.

    A step reads the one and writes the other, so a step that raises has changed nothing.
    """

    now: Float32
    next: Float32
