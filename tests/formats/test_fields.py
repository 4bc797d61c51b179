"""Strict JSON: whatever the bytes, the result is a value or one FormatError."""

import json

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from formats.errors import FormatError
from formats.fields import MAX_DEPTH, Fields, parse_json, shown
from tests.refusals import result_or_line

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
)


@given(JSON)
def test_valid_json_is_read(value: object) -> None:
    raw = json.dumps(value, ensure_ascii=False).encode("utf-8", errors="surrogatepass")
    assert parse_json(raw, "x") == value


@given(st.binary(max_size=200))
@example(b'{"a": 1e999}')
@example(b"[" * 100_000)
@example(b'{"a":' * 100_000)
@example(b"9" * 10_000)
@example(b'"\\ud800"')
@example(b'{"\\uD800": 1}')
@example(b"\xef\xbb\xbf{}")
def test_any_bytes_give_a_value_or_one_line(raw: bytes) -> None:
    _, line = result_or_line(parse_json, raw, "some file")
    assert not line or line.startswith("some file: ")


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b'{"a": 1, "a": 2}', "key a stands twice"),
        (b'[{"b": 1, "a": 1, "b": 1}]', "key b stands twice"),
        (b"NaN", "holds NaN, which is no JSON number"),
        (b"[-Infinity]", "holds -Infinity, which is no JSON number"),
        (b"[-1e999]", "holds -1e999, which is no JSON number"),
        (b"\xff", "is not valid JSON"),
        (b"", "is not valid JSON"),
        (b'"\\ud800"', "holds half a surrogate pair"),
        (b"[" * (MAX_DEPTH + 2) + b"]" * (MAX_DEPTH + 2), f"is nested deeper than {MAX_DEPTH} levels"),
    ],
)
def test_what_is_no_strict_json_is_refused(raw: bytes, message: str) -> None:
    with pytest.raises(FormatError, match=f"x: {message}"):
        parse_json(raw, "x")


def test_an_escaped_pair_of_surrogates_is_one_character() -> None:
    assert parse_json(b'"\\ud83d\\ude00"', "x") == "\N{GRINNING FACE}"


def test_nesting_up_to_the_limit_is_read() -> None:
    parse_json(b"[" * MAX_DEPTH + b"]" * MAX_DEPTH, "x")


@given(st.text() | st.integers() | st.lists(st.text()))
def test_a_shown_value_is_short_and_of_one_line(value: object) -> None:
    assert len(shown(value)) <= 60
    assert len(shown(value).splitlines()) <= 1


@pytest.mark.parametrize(
    ("getter", "value", "message"),
    [
        ("integer", -1, "x: key is -1, expected an integer from 0"),
        ("integer", 2**53 + 1, "x: key is 9007199254740993, expected an integer from 0"),
        ("integer", True, "x: key is True, expected an integer"),
        ("integer", 1.0, "x: key is 1.0, expected an integer"),
        ("number", "1", "x: key is 1, expected a finite number"),
        ("number", 10**400, "x: key is 1000.*, expected a finite number"),
        ("boolean", 1, "x: key is 1, expected true or false"),
        ("string", 1, "x: key is 1, expected a string"),
        ("label", "a\nb", "x: key is 'a.nb', expected printable characters"),
        ("label", "\x1b[31m", "expected printable characters"),
        ("label", "", "expected printable characters"),
        ("items", {}, "x: key is {}, expected a list"),
        ("strings", ["a", 1], "expected a list of strings"),
        ("numbers", [1, "2"], "expected a list of numbers"),
        ("numbers", [10**400], "expected a list of numbers"),
        ("integers", [1, -1], "expected a list of integers from 0"),
        ("mapping", [], "x: key is \\[\\], expected an object"),
        ("object", [], "x: key: is \\[\\], expected an object|x: key is \\[\\], expected an object"),
    ],
)
def test_a_wrong_value_is_refused_with_its_name(getter: str, value: object, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        getattr(Fields({"key": value}, "x"), getter)("key")
    with pytest.raises(FormatError, match="x: key is missing"):
        getattr(Fields({}, "x"), getter)("key")


def test_hexadecimal_digits_are_lower_case_and_counted() -> None:
    for value in ("ABCD", "abc", "abcde", "abcg", 4, None):
        with pytest.raises(FormatError, match="x: key is"):
            Fields({"key": value}, "x").hexadecimal("key", 4)
        with pytest.raises(FormatError, match="list of 1 checksums of 4"):
            Fields({"key": [value]}, "x").hexadecimals("key", 4, 1)


def test_a_nullable_field_must_stand_there() -> None:
    fields = Fields({"a": None, "b": "text"}, "x")
    assert fields.nullable("a", fields.string) is None
    assert fields.nullable("b", fields.string) == "text"
    with pytest.raises(FormatError, match="x: c is missing"):
        fields.nullable("c", fields.string)


def test_what_nobody_read_is_refused_by_its_full_name() -> None:
    outer = Fields({"a": [{"b": 1, "c": 2}]}, "x")
    (inner,) = outer.objects("a")
    inner.integer("b")
    with pytest.raises(FormatError, match=r"x: a\[0\].c is unknown to this version"):
        inner.close()
    outer.close()
