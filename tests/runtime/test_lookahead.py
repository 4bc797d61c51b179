"""The decision whether to read on a guess."""

import pytest

from formats.errors import RequestError
from runtime.lookahead import TRIALS, Lookahead


def after(seconds_without: float, seconds_with: float, mode: str = "auto") -> Lookahead:
    """After as many decode steps as a decision takes."""
    lookahead = Lookahead(mode)
    for _ in range(TRIALS):
        for turn, seconds in enumerate((seconds_without, seconds_with)):
            assert mode != "auto" or lookahead.guesses(1, 0.1) == (turn == 1)
            lookahead.ended(1, seconds, 1000)
    return lookahead


@pytest.mark.parametrize(
    ("without", "with_guesses", "expected"), [(1.1, 1.0, True), (1.0, 1.0, False), (1.0, 2.0, False)]
)
def test_auto_keeps_guessing_only_where_steps_were_faster(without: float, with_guesses: float, expected: bool) -> None:
    lookahead = after(without, with_guesses)
    assert lookahead.decided == lookahead.guesses(1, 0.1) == expected
    assert str(lookahead).startswith(f"auto: {'on' if expected else 'off'}, a step is")


def test_one_slow_step_decides_nothing() -> None:
    lookahead = Lookahead("auto")
    for i in range(2 * TRIALS):
        lookahead.ended(1, 100.0 if i == 4 else 1.0, 1000)
    assert lookahead.decided is False


def test_steps_that_read_nothing_and_prompts_are_not_measured() -> None:
    lookahead = Lookahead("auto")
    for _ in range(100):
        lookahead.ended(1, 1.0, 0)
        lookahead.ended(2, 1.0, 1000)
    assert lookahead.decided is None


def test_once_nothing_is_read_nothing_is_guessed() -> None:
    lookahead = Lookahead("auto")
    lookahead.ended(1, 1.0, 1000)
    assert lookahead.guesses(1, 0.1)
    lookahead.ended(1, 1.0, 0)
    assert not lookahead.guesses(1, 0.1)
    for i in range(2 * TRIALS):
        lookahead.ended(1, 2.0 if i % 2 == 0 else 1.0, 1000)
    assert lookahead.gain == 2.0  # what was measured before is no half of a pair


@pytest.mark.parametrize(
    ("mode", "share", "expected"),
    [
        ("off", 1.0, False),
        ("on", 0.1, True),
        ("auto", 0.4, False),
        ("auto", 0.6, True),
        ("prompts", 0.4, False),
        ("prompts", 0.6, True),
    ],
)
def test_a_chunk_guesses_where_most_of_a_layer_will_be_read(mode: str, share: float, expected: bool) -> None:
    assert Lookahead(mode).guesses(64, share) == expected


@pytest.mark.parametrize(("mode", "expected"), [("on", True), ("off", False), ("prompts", False)])
def test_a_given_mode_is_never_measured(mode: str, expected: bool) -> None:
    lookahead = after(1.0, 2.0, mode)
    assert lookahead.guesses(1, 0.1) == expected
    assert str(lookahead) == mode


def test_an_unknown_mode_is_refused() -> None:
    with pytest.raises(RequestError, match="--lookahead is maybe, expected auto, on, off, prompts"):
        Lookahead("maybe")
