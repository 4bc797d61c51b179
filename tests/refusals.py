"""For tests on arbitrary bytes: a call gives a result, or an error of one line."""

from collections.abc import Callable
from typing import ParamSpec, TypeVar

from formats.errors import StreamingExpertsError

P = ParamSpec("P")
T = TypeVar("T")


def result_or_line(call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> tuple[T | None, str]:
    """(result, "") or (None, the line of the error); any exception but ours is a failure of the test."""
    try:
        return call(*args, **kwargs), ""
    except StreamingExpertsError as error:
        line = str(error)
    assert line
    assert len(line.splitlines()) == 1, line
    return None, line
