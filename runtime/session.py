"""The state of one sequence, explicit: what it has read so far and what every layer remembers of it."""

from dataclasses import dataclass, field

from runtime.backends.facts import State


@dataclass
class Session:
    """One sequence. Engine and model hold nothing of it, so any number can live side by side."""

    token_ids: list[int] = field(default_factory=list)  # all tokens that the states have seen
    states: list[State] = field(default_factory=list)  # made by the model: one entry per layer, and what it adds


@dataclass
class Sequence:
    """A session's part of one step: its rows among the step's tokens, and its states as they change."""

    rows: slice
    position: int  # of its first token in this step
    states: list[State]
