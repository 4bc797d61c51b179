"""Native calls that stay the same from token to token, written down once and made by one call of C (se_run)."""

import array
import ctypes
import sys
from typing import Any

import numpy as np

from formats.dtypes import AnyArray
from runtime.backends.abi import CALL_WORDS, FUNCTIONS


class Run:
    """A list of se_call. `words` may be changed in place, for what is different from token to token."""

    def __init__(self) -> None:
        self.words = array.array("q")
        self._kept: list[Any] = []  # what words point to

    def add(self, function: str, *arguments: Any) -> int:
        """Write a call down: a name of FUNCTIONS, and all but the context; the place of its first argument in words.

        Arguments are contiguous arrays, structs, addresses, numbers as C has them (int or float), or None.
        """
        place = len(self.words) + 1
        told = [FUNCTIONS.index(function), *map(self._word, arguments)]
        self.words.extend(told + [0] * (CALL_WORDS - len(told)))
        return place

    def _word(self, argument: Any) -> int:
        if argument is None:
            return 0
        if isinstance(argument, float):
            return int.from_bytes(
                bytes(ctypes.c_float(argument)), sys.byteorder
            )  # beyond float32: infinite, as in a call
        if isinstance(argument, int):
            return argument
        self._kept.append(argument)
        return int(argument.ctypes.data) if isinstance(argument, np.ndarray) else ctypes.addressof(argument)

    def __len__(self) -> int:
        """How many calls."""
        return len(self.words) // CALL_WORDS

    def call(self, place: int) -> int:
        """The address of one of them, now that all are written down."""
        return self.words.buffer_info()[0] + place * CALL_WORDS * self.words.itemsize

    def keep(self, values: AnyArray) -> AnyArray:
        """What a call points to by way of something else."""
        self._kept.append(values)
        return values
