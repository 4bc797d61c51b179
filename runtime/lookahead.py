"""Whether it pays to read on a guess: the experts that the next layer's router would choose for this layer's input.

The real router always decides; a guess only changes when something is read.
"""

import statistics

from formats.errors import RequestError

MODES = ("auto", "on", "off", "prompts")  # prompts: only for their chunks
TRIALS = 16  # pairs of decode steps, one with guesses and one without
LEAST_GAIN = 1.02  # below it a guess is not worth the slots that it takes


class Lookahead:
    """The decision for one engine: given, or measured on its first decode steps that read anything.

    Chunks of a prompt are not measured: there guesses are made for a layer of which half or more would be read.
    """

    def __init__(self, mode: str) -> None:
        """Raises RequestError for an unknown mode."""
        if mode not in MODES:
            raise RequestError(f"--lookahead is {mode}, expected {', '.join(MODES)}")
        self.mode = mode
        self.gain: float | None = None  # seconds without guesses over seconds with
        self._steps: list[float] = []  # in turns without and with

    @property
    def decided(self) -> bool | None:
        """Whether decode steps guess; None while it is being measured."""
        if self.mode != "auto":
            return self.mode == "on"
        return None if self.gain is None else self.gain >= LEAST_GAIN

    def asks(self, tokens: int) -> bool:
        """Whether a step of so many tokens may guess, so that its router is worth running."""
        if tokens > 1:
            return self.mode != "off"
        return len(self._steps) % 2 == 1 if self.decided is None else self.decided

    def guesses(self, tokens: int, share: float) -> bool:
        """Whether it does, when it would choose that share of the layer's experts."""
        return self.asks(tokens) and (tokens == 1 or self.mode == "on" or share >= 0.5)

    def ended(self, tokens: int, seconds: float, nbytes_read: int) -> None:
        """A step has ended. One that read nothing tells nothing, nor does its pair; the next guesses nothing."""
        if tokens > 1 or self.decided is not None:
            return
        if nbytes_read == 0:
            del self._steps[len(self._steps) // 2 * 2 :]
            return
        self._steps.append(seconds)
        if len(self._steps) == 2 * TRIALS:
            self.gain = statistics.median(a / b for a, b in zip(self._steps[::2], self._steps[1::2], strict=True))

    def __str__(self) -> str:
        if self.mode != "auto":
            return self.mode
        if self.gain is None:
            return "auto: not decided yet"
        return f"auto: {'on' if self.decided else 'off'}, a step is {self.gain:.3g} x as fast with it"
