"""Tools, documents and thinking on the way to the chat template: from Python, and from the command line."""

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from formats.errors import FormatError, RequestError
from runtime import Engine
from runtime.chat import Conversation, read_template_options
from runtime.sampling import read_generation_config
from runtime.text import Text
from tests.fixtures.chat_inputs import TOOLS
from tests.runtime.conftest import make
from tests.runtime.helpers import FIXTURES, PLENTY, Command, one_line
from tests.runtime.texts import DEMO, FILES

THINKING = (FIXTURES / "thinking_template.jinja").read_bytes()
THINKING += b"{% for d in documents or [] %}{{ d.title }}: {{ d.text }}{% endfor %}"
TEXT = Text.from_files(FILES | {"chat_template.jinja": THINKING})
HI = [{"role": "user", "content": "Hi"}]
DOCUMENTS = [{"title": "T", "text": "body <|im_end|>"}]
UNSET: dict[str, Any] = dict.fromkeys(("system", "tools", "documents", "thinking", "template_variables"))


def rendered(source: str, **options: Any) -> str:
    text = Text.from_files(FILES | {"chat_template.jinja": source.encode()})
    return text._tokenizer.decode(text.encode_chat(HI, **options), skip_special_tokens=False)


@pytest.fixture(scope="session")
def thinking4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo with a template that thinks and calls tools."""
    source = tmp_path_factory.mktemp("thinking")
    shutil.copytree(DEMO, source, dirs_exist_ok=True)
    (source / "chat_template.jinja").write_bytes(THINKING)
    return make(tmp_path_factory, str(source), 4)


# ---- thinking


@pytest.mark.parametrize("on", [True, False])
@pytest.mark.parametrize("name", ["enable_thinking", "thinking"])
def test_thinking_turns_the_switch_that_the_template_has(name: str, on: bool) -> None:
    assert rendered(f"{{{{ {name} }}}}", thinking=on) == str(on)


def test_thinking_that_is_not_asked_for_leaves_the_default_of_the_template() -> None:
    source = "{% if not thinking is defined %}{% set thinking = 'default' %}{% endif %}{{ thinking }}"
    assert rendered(source) == "default"
    assert rendered(source, thinking=True) == "True"


def test_a_switch_that_the_template_does_not_have_is_refused() -> None:
    with pytest.raises(RequestError, match=r"^chat_template.jinja: has no switch for thinking, expected one named"):
        rendered("{{ messages[0].content }}", thinking=True)


def test_reasoning_can_be_turned_off_in_the_fixture_template() -> None:
    assert TEXT.encode_chat(HI, thinking=False) == TEXT.encode_chat(HI, enable_thinking=False)
    assert TEXT.encode_chat(HI, thinking=True) != TEXT.encode_chat(HI, thinking=False)


# ---- tools and documents


def test_documents_reach_the_template_as_data() -> None:
    source = "{% for d in documents %}{{ d.title }}: {{ d.text }}{% endfor %}"
    assert rendered(source, documents=DOCUMENTS) == "T: body <|im_end|>"
    text = Text.from_files(FILES | {"chat_template.jinja": source.encode()})
    assert not text.special_ids.intersection(text.encode_chat(HI, documents=DOCUMENTS))


def test_documents_that_a_template_does_not_use_are_refused() -> None:
    with pytest.raises(RequestError, match="does not use documents, so the model would not see them"):
        rendered("{{ messages[0].content }}", documents=DOCUMENTS)


def test_without_documents_the_template_sees_none() -> None:
    assert rendered("{{ documents is none }}") == "True"


def test_tools_choose_the_template_of_that_name() -> None:
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "{{ tools|tojson }}"}]
    config = json.loads(FILES["tokenizer_config.json"]) | {"chat_template": named}
    files = {"tokenizer.json": FILES["tokenizer.json"], "tokenizer_config.json": json.dumps(config).encode()}
    text = Text.from_files(files)
    assert text._tokenizer.decode(text.encode_chat(HI)) == "plain"
    assert text._tokenizer.decode(text.encode_chat(HI, tools=[{"é": "<"}])) == '[{"é": "<"}]'


def test_tojson_takes_the_arguments_that_transformers_gives_it() -> None:
    source = "{{ {'b': 1, 'é': [2]}|tojson(true, none, [',', ':'], sort_keys=true) }}"
    assert rendered(source) == '{"b":1,"\\u00e9":[2]}'


def test_an_engine_takes_tools_and_thinking(thinking4: Path) -> None:
    with Engine.open(thinking4, ram_bytes=PLENTY) as engine:
        ids = engine.chat_ids("Hi", "S", tools=TOOLS, thinking=False)
        messages = [{"role": "system", "content": "S"}, *HI]
        assert ids == TEXT.encode_chat(messages, tools=TOOLS, enable_thinking=False)
        assert engine.chat_ids(messages, tools=TOOLS, thinking=False) == ids
        conversation = Conversation(engine, {"max_new_tokens": 1}, "S", True, {"tools": TOOLS, "thinking": False})
        list(conversation.reply("Hi"))
        assert conversation.session is not None
        assert conversation.session.token_ids[: len(ids)] == ids


# ---- the command line


def test_the_command_takes_tools_documents_and_thinking(command: Command, thinking4: Path, tmp_path: Path) -> None:
    tools, documents = tmp_path / "tools.json", tmp_path / "documents.json"
    tools.write_text(json.dumps(TOOLS))
    documents.write_text(json.dumps(DOCUMENTS))
    words = ("--tools", str(tools), "--documents", str(documents), "--no-thinking", "--template-variables", '{"x": 1}')
    outcome = command(thinking4, "-p", "Hi", *words, "-n", "1", "--json")
    expected = TEXT.encode_chat(HI, tools=TOOLS, documents=DOCUMENTS, thinking=False)
    assert json.loads(outcome.out)["prompt_token_ids"] == expected


def test_options_of_a_chat_without_a_chat_are_refused(command: Command, thinking4: Path) -> None:
    message = one_line(command(thinking4, "-p", "Hi", "--raw", "--thinking"))
    assert message.startswith("--thinking is set, but this is no chat")


@pytest.mark.parametrize("raw", [b"{}", b"[1]", b"[", b"\xff"])
def test_tools_that_are_no_list_of_objects_are_refused(raw: bytes) -> None:
    file = io.BytesIO(raw)
    file.name = "tools.json"
    with pytest.raises(FormatError, match=r"^tools.json: "):
        read_template_options(UNSET | {"tools": file})


@pytest.mark.parametrize("text", ["[]", "3", '{"messages": []}', "{"])
def test_variables_that_are_no_object_are_refused(text: str) -> None:
    with pytest.raises(FormatError, match=r"^--template-variables: "):
        read_template_options(UNSET | {"template_variables": text})


# ---- stop tokens


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        ({"eos_token_id": [7, 8]}, {"eos_token_id": 1}, (7, 8)),
        ({"temperature": 0.5}, {"eos_token_id": 1}, (1,)),
        (None, {"eos_token_id": 1, "text_config": {"eos_token_id": [2, 3]}}, (2, 3)),
        (None, {"eos_token_id": 1, "text_config": {}}, (1,)),
        (None, {}, ()),
    ],
)
def test_stop_tokens_that_generation_config_does_not_name_are_those_of_config(
    generation: Any, config: Any, expected: tuple[int, ...]
) -> None:
    raw = None if generation is None else json.dumps(generation).encode()
    assert read_generation_config(raw, json.dumps(config).encode()).stop_ids == expected
