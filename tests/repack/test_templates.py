"""Chat templates, wherever a checkpoint keeps them, come where the runtime looks."""

import json

import pytest

from formats.errors import FormatError
from repack.vocabulary import with_templates
from runtime.chat_template import templates_of

CONFIG = "tokenizer_config.json"
LEGACY, TOOL_USE = "chat_template.json", "additional_chat_templates/tool_use.jinja"


def names_and_sources(files: dict[str, bytes]) -> dict[str, str]:
    found = with_templates(files)
    assert not {LEGACY, TOOL_USE} & set(found)
    return {name: t.source for name, t in templates_of(found, json.loads(found.get(CONFIG, b"{}"))).items()}


def config(**values: object) -> dict[str, bytes]:
    return {CONFIG: json.dumps(values).encode()}


def test_that_of_an_older_processor_is_taken_where_there_is_no_other() -> None:
    legacy = {LEGACY: b'{"chat_template": "old"}'}
    assert names_and_sources(legacy) == {"default": "old"}
    assert names_and_sources(legacy | {"chat_template.jinja": b"new"}) == {"default": "new"}
    assert names_and_sources(legacy | config(chat_template="own")) == {"default": "own"}


@pytest.mark.parametrize(
    "default",
    [
        {"chat_template.jinja": b"plain"},
        config(chat_template="plain"),
        config(chat_template=[{"name": "default", "template": "plain"}]),
    ],
)
def test_one_for_tools_in_a_folder_stands_beside_the_default(default: dict[str, bytes]) -> None:
    assert names_and_sources({**default, TOOL_USE: b"tools"}) == {"default": "plain", "tool_use": "tools"}


def test_files_without_any_are_left_as_they_are() -> None:
    files = {"config.json": b"{}", "chat_template.jinja": b"plain", **config(chat_template="own")}
    assert with_templates(files) == files


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({LEGACY: b"{}"}, "chat_template.json: chat_template is missing"),
        ({LEGACY: b'{"chat_template": 3}'}, "chat_template.json: chat_template is 3"),
        ({TOOL_USE: b"\xff"}, "tool_use.jinja: is not UTF-8"),
        ({TOOL_USE: b"", **config(chat_template=3)}, "chat_template is no string and no list"),
        (
            {TOOL_USE: b"", **config(chat_template=["x"])},
            "chat_template: is x, expected an object",
        ),
        ({TOOL_USE: b"", **config(chat_template=[{"name": "x", "template": 3}])}, "chat_template.template is 3"),
        ({LEGACY: b'{"chat_template": "x"}', CONFIG: b"[]"}, r"tokenizer_config.json: is \[\], expected an object"),
    ],
)
def test_what_is_no_template_is_refused(files: dict[str, bytes], message: str) -> None:
    with pytest.raises(FormatError, match=message):
        with_templates(files)
