"""Reading JSON from outside: every value is checked for type and bounds and named in the error."""

import json
import math
from collections.abc import Callable, Container, Iterator
from typing import Any, TypeVar

from formats.errors import FormatError

MAX_INTEGER = 2**53  # beyond it JSON numbers are not exact everywhere
MAX_DEPTH = 64  # of nested lists and objects, far below where Python's recursion ends
T = TypeVar("T")
_REQUIRED: Any = object()


def infinity(text: str) -> dict[str, str]:
    """What transformers 5 writes in config.json in place of Infinity or -Infinity, which is no JSON."""
    return {"__float__": text}


def parse_config(raw: bytes, where: str) -> Any:
    """As `parse_json`, but an infinity as Python writes it into config.json is read as transformers 5 writes it."""
    return parse_json(raw, where, ("Infinity", "-Infinity"))


def parse_json(raw: bytes, where: str, infinities: Container[str] = ()) -> Any:
    """Parse strict JSON.

    Raises FormatError for bad UTF-8 or syntax, NaN, infinity, a key that stands twice, half a surrogate pair,
    absurd nesting.
    """

    def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            raise FormatError(f"{where}: key {shown(twice)} stands twice")
        return result

    def no_constant(text: str) -> Any:
        if text in infinities:
            return infinity(text)
        raise FormatError(f"{where}: holds {text}, which is no JSON number")

    def finite(text: str) -> float:
        value = float(text)
        return value if math.isfinite(value) else no_constant(shown(text))

    try:
        value = json.loads(
            raw.decode("utf-8"),
            object_pairs_hook=no_duplicates,
            parse_constant=no_constant,
            parse_float=finite,
        )
        if not _is_nested_within(value, MAX_DEPTH):
            raise FormatError(f"{where}: is nested deeper than {MAX_DEPTH} levels")
        if b"\\ud" in raw.lower():  # an escape may make half a surrogate pair, which no text can show
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise FormatError(f"{where}: holds half a surrogate pair, which is no text") from None
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{where}: is not valid JSON ({shown(str(error))})") from None
    return value


def _is_nested_within(value: Any, depth: int) -> bool:
    """Whether lists and objects are nested at most `depth` deep; a loop, as recursion is what it protects."""
    level = [value]
    for _ in range(depth + 1):
        containers = [item for item in level if isinstance(item, (dict, list))]
        if not containers:
            return True
        level = [
            child
            for item in containers
            for child in (item.values() if isinstance(item, dict) else item)
            if isinstance(child, (dict, list))
        ]
    return False


def shown(value: Any) -> str:
    """A value from outside, cut to fit an error message of one line."""
    text = value if isinstance(value, str) and value.isprintable() else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


class Fields:
    """One JSON object being read: typed getters that name `where.key` in errors; `close` refuses the rest.

    Every getter raises FormatError when the key is missing (unless a default is given) or the value is wrong.
    """

    def __init__(self, value: Any, where: str) -> None:
        if not isinstance(value, dict):
            raise FormatError(f"{where}: is {shown(value)}, expected an object")
        self._values: dict[str, Any] = value
        self._read: set[str] = set()
        self.where = where

    def __contains__(self, key: str) -> bool:
        return self._values.get(key) is not None

    def states(self, key: str) -> bool:
        """Whether the key stands there, be it with a null."""
        return key in self._values

    def name(self, key: str) -> str:
        """`file: a.b.key`, the name of a field in messages."""
        return f"{self.where}.{key}" if ": " in self.where else f"{self.where}: {key}"

    def wrong(self, key: str, expected: str) -> FormatError:
        """The error for field `key`, to be raised by the caller."""
        return FormatError(f"{self.name(key)} is {shown(self._values.get(key))}, expected {expected}")

    def raw(self, key: str, default: Any = _REQUIRED) -> Any:
        """The value as it is; a JSON null counts as missing."""
        self._read.add(key)
        value = self._values.get(key)
        if value is not None:
            return value
        if default is _REQUIRED:
            raise FormatError(f"{self.name(key)} is missing")
        return default

    def integer(self, key: str, low: int = 0, high: int = MAX_INTEGER, default: Any = _REQUIRED) -> int:
        value = self.raw(key, default)
        if value is default and default is not _REQUIRED:
            return int(value)
        if type(value) is not int or not low <= value <= high:
            raise self.wrong(key, f"an integer from {low} to {high}")
        return value

    def number(self, key: str, default: Any = _REQUIRED) -> float:
        value = self.raw(key, default)
        if type(value) is float and math.isfinite(value):
            return value
        if type(value) is int and abs(value) <= MAX_INTEGER:
            return float(value)
        raise self.wrong(key, "a finite number")

    def boolean(self, key: str, default: Any = _REQUIRED) -> bool:
        value = self.raw(key, default)
        if type(value) is not bool:
            raise self.wrong(key, "true or false")
        return value

    def string(self, key: str, default: Any = _REQUIRED) -> str:
        value = self.raw(key, default)
        if not isinstance(value, str):
            raise self.wrong(key, "a string")
        return value

    def label(self, key: str) -> str:
        """A string that a terminal can show: printable and not empty."""
        value = self.string(key)
        if not value or not value.isprintable():
            raise self.wrong(key, "printable characters")
        return value

    def nullable(self, key: str, getter: Callable[[str], T]) -> T | None:
        """What getter gives for the key, or None for a null that stands there."""
        if not self.states(key):
            raise FormatError(f"{self.name(key)} is missing")
        return None if self.raw(key, None) is None else getter(key)

    def mapping(self, key: str) -> dict[str, Any]:
        """An object whose content the caller does not look into."""
        value = self.raw(key)
        if not isinstance(value, dict):
            raise self.wrong(key, "an object")
        return value

    def items(self, key: str, default: Any = _REQUIRED) -> list[Any]:
        value = self.raw(key, default)
        if not isinstance(value, list):
            raise self.wrong(key, "a list")
        return value

    def strings(self, key: str, default: Any = _REQUIRED) -> list[str]:
        values = self.items(key, default)
        if not all(isinstance(value, str) for value in values):
            raise self.wrong(key, "a list of strings")
        return values

    def integers(self, key: str, low: int = 0, high: int = MAX_INTEGER, default: Any = _REQUIRED) -> list[int]:
        values = self.items(key, default)
        if not all(type(value) is int and low <= value <= high for value in values):
            raise self.wrong(key, f"a list of integers from {low} to {high}")
        return values

    def numbers(self, key: str) -> list[float]:
        values = self.items(key)
        if not all(type(value) is float or (type(value) is int and abs(value) <= MAX_INTEGER) for value in values):
            raise self.wrong(key, "a list of numbers")
        return [float(value) for value in values]

    def entries(self) -> Iterator[tuple[str, Any]]:
        """Every key and its value, for an object whose keys are names from outside."""
        self._read.update(self._values)
        return iter(self._values.items())

    def object(self, key: str) -> "Fields":
        return Fields(self.mapping(key), self.name(key))

    def objects(self, key: str) -> Iterator["Fields"]:
        for i, value in enumerate(self.items(key)):
            yield Fields(value, f"{self.name(key)}[{i}]")

    def hexadecimal(self, key: str, digits: int) -> str:
        value = self.raw(key)
        if not is_hexadecimal(value, digits):
            raise self.wrong(key, f"{digits} lower-case hexadecimal digits")
        return str(value)

    def hexadecimals(self, key: str, digits: int, count: int) -> tuple[str, ...]:
        values = self.items(key)
        if len(values) != count or not all(is_hexadecimal(value, digits) for value in values):
            raise self.wrong(key, f"a list of {count} checksums of {digits} hexadecimal digits")
        return tuple(values)

    def close(self) -> None:
        """Refuse keys that nobody read. Raises FormatError naming the first."""
        unknown = sorted(self._values.keys() - self._read)
        if unknown:
            raise FormatError(f"{self.name(shown(unknown[0]))} is unknown to this version")


def is_hexadecimal(value: Any, digits: int) -> bool:
    """Whether value is a string of exactly `digits` lower-case hexadecimal digits."""
    return isinstance(value, str) and len(value) == digits and all(c in "0123456789abcdef" for c in value)
