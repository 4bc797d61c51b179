"""Chat templates: messages -> text in a sandbox, and stand-ins that keep data from spelling control tokens.

Rendering gives what `apply_chat_template` of transformers 5.23 gives (utils/chat_template_utils.py there).
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from typing import Any

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.nodes
import jinja2.parser
import jinja2.runtime
from jinja2.exceptions import SecurityError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from formats.errors import FormatError, RequestError
from formats.fields import shown

TEMPLATE = "chat_template.jinja"
MAX_REPEAT = 1_000_000  # characters or items that `*` may make in a template
# Braille: rare, and repr leaves it alone in `{{ list }}`, unlike Unicode's noncharacters, which are not printable.
MARKS = [chr(code) for code in range(0x2801, 0x2900)]
TAG = re.compile(r"(<[^<>\s]*>)")
PUNCTUATED = re.compile(r"\A\W|\W\Z")  # a literal that begins or ends with punctuation
REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")
THINKING_SWITCHES = ("enable_thinking", "thinking")  # of Qwen and GLM, of Kimi, DeepSeek and Granite
SPOKEN_FIELDS = ("content", *REASONING_FIELDS)


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks the assistant's text for training; here only its body counts."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it as an instance variable

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        lineno = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=lineno)  # `set` inside stays inside, as in transformers


class _Sandbox(ImmutableSandboxedEnvironment):
    """jinja2's sandbox that also refuses at once, rather than printing nothing, and bounds `*` and `**`."""

    intercepted_binops = frozenset({"*", "**"})  # also keeps the compiler from computing 10**10**10

    def unsafe_undefined(self, obj: Any, attribute: str) -> jinja2.Undefined:
        raise SecurityError(f"attribute {attribute!r} of {type(obj).__name__} is out of reach")

    def call_binop(self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any) -> Any:
        lengths = [len(side) if hasattr(side, "__len__") else side for side in (left, right)]
        if operator == "**" or (lengths != [left, right] and lengths[0] * lengths[1] > MAX_REPEAT):
            raise SecurityError(f"{operator} could make more than {MAX_REPEAT} characters, items or digits")
        return super().call_binop(context, operator, left, right)


def _raise_exception(message: object) -> None:
    raise RequestError(str(message))


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON without HTML escapes, unlike jinja's own filter."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _environment() -> jinja2.Environment:
    """The sandbox with the names that templates of Hugging Face checkpoints use."""
    env = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols])
    env.filters["tojson"] = _tojson
    env.globals["raise_exception"] = _raise_exception
    env.globals["strftime_now"] = lambda pattern: datetime.now().strftime(pattern)
    return env


@dataclass(frozen=True)
class ChatTemplate:
    """One template of a checkpoint."""

    source: str
    name: str  # of the file that held it

    @cached_property
    def _compiled(self) -> jinja2.Template:  # at first use: a bad template must not stop raw prompts
        return _environment().from_string(self.source)

    @cached_property
    def variables(self) -> frozenset[str]:
        """Names that the template looks up. Raises FormatError for one that is no template."""
        try:
            return frozenset(jinja2.meta.find_undeclared_variables(_environment().parse(self.source)))
        except jinja2.TemplateSyntaxError as error:
            raise FormatError(f"{self.name}: line {error.lineno}: {_one_line(error.message)}") from None
        except RecursionError:
            raise FormatError(f"{self.name}: nests too deeply") from None

    def render(self, variables: Mapping[str, Any]) -> str:
        """The prompt text.

        Raises RequestError when the template itself refuses the messages (raise_exception), FormatError for
        everything else that goes wrong in it: syntax, undefined values, an attempt to leave the sandbox.
        """
        try:
            return self._compiled.render(variables)
        except RequestError as error:
            raise RequestError(f"{self.name}: refuses these messages: {_one_line(error)}") from None
        except SecurityError as error:
            raise FormatError(f"{self.name}: tries to leave the sandbox: {_one_line(error)}") from None
        except jinja2.TemplateSyntaxError as error:
            raise FormatError(f"{self.name}: line {error.lineno}: {_one_line(error.message)}") from None
        except Exception as error:  # whatever a foreign program raises (TypeError, OverflowError, MemoryError...)
            raise FormatError(f"{self.name}: fails with {type(error).__name__}: {_one_line(error)}") from None


def _one_line(error: object) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 200 else text[:197] + "..."


class StandIns:
    """Keeps the data of one chat from spelling control tokens, whatever its template cuts, joins or deletes.

    In every string of the data a stand-in replaces each punctuation character with which a control token's
    literal begins or ends (`<`, `>`, `[`...). So a literal in the rendered text begins and ends with what the
    template itself wrote, and once the tokens are found there the stand-ins turn back. A literal without
    punctuation at its ends is broken where it stands whole.

    In an assistant's text whole tags without a special token (`</think>`) stay: templates split it there.
    """

    def __init__(self, control: Sequence[str], special: Sequence[str], data: Any) -> None:
        """control: literals of control tokens; special: those of special ones; data: all that is rendered.

        Raises RequestError if the data leaves too few characters unused.
        """
        self._special = special
        characters = sorted(
            {character for literal in control for character in PUNCTUATED.findall(literal) or literal[0]}
        )
        words = [literal for literal in control if not PUNCTUATED.search(literal)]
        patterns = [re.escape(character) for character in characters if PUNCTUATED.search(character)]
        patterns += [f"{word[0]}(?={re.escape(word[1:])})" for word in words]
        self._pattern = re.compile("|".join(patterns) or "(?!)")
        seen = repr(data)
        self._unused = (mark for mark in MARKS if mark not in seen and _escape(mark) not in seen)
        self._marks = {character: self.mark() for character in characters}

    def mark(self) -> str:
        """A character that stands nowhere yet. Raises RequestError if the data holds nearly all that might."""
        mark = next(self._unused, None)
        if mark is None:
            raise RequestError("messages: hold nearly every Braille pattern, expected text that leaves some unused")
        return mark

    def messages(self, messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Copies with stand-ins."""
        return [
            {k: self.value(v, m.get("role") == "assistant" and k in SPOKEN_FIELDS) for k, v in m.items()}
            for m in messages
        ]

    def value(self, value: Any, keep_tags: bool = False) -> Any:
        """A copy of JSON data with stand-ins. Raises RequestError for anything that is no JSON data."""
        if isinstance(value, str):
            parts = TAG.split(value) if keep_tags else [value]  # [text, tag, text, ..., text]
            return "".join(
                part if i % 2 and self._is_harmless(part) else self._replaced(part) for i, part in enumerate(parts)
            )
        if isinstance(value, Mapping):
            return {self.value(k, keep_tags): self.value(v, keep_tags) for k, v in value.items()}
        if isinstance(value, (list, tuple)):
            return [self.value(item, keep_tags) for item in value]
        if value is None or type(value) in (bool, int, float):
            return value
        raise RequestError(f"messages: hold a {type(value).__name__}, expected JSON values")

    def restored(self, text: str) -> str:
        """Rendered text with the characters that the stand-ins stand for."""
        for character, mark in self._marks.items():
            text = text.replace(mark, character).replace(_escape(mark), character)
        return text

    def _replaced(self, text: str) -> str:
        return self._pattern.sub(lambda match: self._marks[match[0]], text)

    def _is_harmless(self, tag: str) -> bool:
        return not any(literal in tag for literal in self._special)


def _escape(mark: str) -> str:
    return f"\\u{ord(mark):04x}"  # as `tojson(ensure_ascii=true)` spells it


def normalized(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Messages as transformers hands them to a template: no null values, reasoning under its usual names.

    Raises RequestError for an empty list or a message that is no object.
    """
    if not messages:
        raise RequestError("messages: are empty, expected at least one")
    result = []
    for message in messages:
        if not isinstance(message, Mapping):
            raise RequestError(f"messages: hold a {type(message).__name__}, expected objects with role and content")
        plain = {key: value for key, value in message.items() if value is not None}
        reasoning = next((plain[key] for key in REASONING_FIELDS if key in plain), None)
        if reasoning is not None:
            plain = {"thinking": reasoning, **plain, "reasoning_content": reasoning}
        result.append(plain)
    return result


def templates_of(files: Mapping[str, bytes], config: Mapping[str, Any]) -> dict[str, ChatTemplate]:
    """Templates by name, often only "default": chat_template.jinja or else those of `config`.

    config: the object of tokenizer_config.json.

    Raises FormatError for a template that is no text.
    """
    if TEMPLATE in files:
        try:
            return {"default": ChatTemplate(files[TEMPLATE].decode(), TEMPLATE)}
        except UnicodeDecodeError as error:
            raise FormatError(f"{TEMPLATE}: is not UTF-8 ({error})") from None
    given = config.get("chat_template")
    if given is None:
        return {}
    where = "tokenizer_config.json: chat_template"
    named = [{"name": "default", "template": given}] if isinstance(given, str) else given
    try:
        sources = {str(entry["name"]): entry["template"] for entry in named}
        if not all(isinstance(source, str) for source in sources.values()):
            raise TypeError
    except (TypeError, KeyError):
        raise FormatError(f"{where} is {shown(given)}, expected a string or a list of name and template") from None
    return {name: ChatTemplate(source, where) for name, source in sources.items()}
