"""Text <-> ids on the demo's tokenizer, on variants of it, and on SentencePiece-like ones."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from formats.errors import FormatError, RequestError, StreamingExpertsError
from runtime.text import Text
from tests.runtime.texts import (
    DEMO_TEXT,
    ENDOFTEXT,
    FILES,
    IM_END,
    LITERALS,
    PIECES,
    THINKING_TEXT,
    THINKING_TOKENS,
    added,
    demo_with,
    fast,
    plain_ids,
    stream,
    user,
)

FIXTURES = Path(__file__).parents[1] / "fixtures"
FIXTURE = json.loads((FIXTURES / "chat.json").read_bytes())  # see its maker, make_chat.py
DIFFERENT = {
    "special_tokens_in_content",  # transformers makes them control tokens unless asked not to
    "tool_response_from_user",  # the template looks for tags in a user's text, which here are only text
}


def case_name(case: dict[str, Any]) -> str:
    return f"{case['template']}-{case['name']}-{'prompt' if case['add_generation_prompt'] else 'no prompt'}"


# Raw prompts


@pytest.mark.parametrize("case", FIXTURE["encode"], ids=lambda case: case["name"])
def test_raw_prompts_equal_those_of_transformers(case: dict[str, Any]) -> None:
    assert DEMO_TEXT.encode(case["text"]) == case["ids"]
    assert "".join(stream(DEMO_TEXT, case["ids"])) == case["decoded_without_special"]


def test_a_raw_prompt_recognises_special_tokens() -> None:
    # PreTrainedTokenizerFast of transformers 5.23.0 on the demo's folder.
    assert DEMO_TEXT.encode("Hello<|im_end|> there") == [42, 623, 81, 2, 462]


def test_bos_is_added_by_tokenizer_json_and_not_by_tokenizer_config() -> None:
    assert demo_with(bos_token="<|endoftext|>", add_bos_token=True).encode("a") == plain_ids("a")
    tokenizer = json.loads(FILES["tokenizer.json"])
    sequence = {"Sequence": {"id": "A", "type_id": 0}}
    bos = {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}
    tokenizer["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}, sequence],
        "pair": [sequence, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<|endoftext|>": bos},
    }
    text = Text.from_files(FILES | {"tokenizer.json": json.dumps(tokenizer).encode()})
    assert text.encode("a") == [ENDOFTEXT, *plain_ids("a")]
    assert text.encode_chat(user("a")) == DEMO_TEXT.encode_chat(user("a"))


def test_truncation_and_padding_of_training_are_switched_off() -> None:
    tokenizer = fast(FILES)
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=50)
    text = Text.from_files(FILES | {"tokenizer.json": tokenizer.to_str().encode()})
    assert text.encode("one two three four") == plain_ids("one two three four")


def test_a_token_is_spelled_for_messages() -> None:
    assert DEMO_TEXT.special_ids == {0, 1, 2}
    assert DEMO_TEXT.spelling(IM_END) == "<|im_end|>"
    assert DEMO_TEXT.spelling(plain_ids(" the")[0]) == " the"
    assert DEMO_TEXT.spelling(10**6) == ""


def test_tokens_that_only_tokenizer_config_lists_are_added_as_transformers_does() -> None:
    think = {**added(4096, "<think>", special=False)}
    del think["id"]
    config = json.loads(FILES["tokenizer_config.json"])
    text = demo_with(
        added_tokens_decoder={**config["added_tokens_decoder"], "4096": think},
        image_token="<|img|>",
        extra_special_tokens=["<|x|>"],
    )
    # Ids as PreTrainedTokenizerFast of transformers 5.23.0 gives them.
    assert text.encode("<think><|img|><|x|>") == [4096, 4097, 4098]
    assert text.special_ids == {0, 1, 2, 4097, 4098}


def test_an_older_companion_file_names_tokens_for_a_config_without_added_tokens() -> None:
    named = {"eos_token": {"content": "<|im_end|>"}, "additional_special_tokens": ["<|y|>"]}
    files = {
        "tokenizer.json": FILES["tokenizer.json"],
        "tokenizer_config.json": b"{}",
        "special_tokens_map.json": json.dumps(named).encode(),
        "chat_template.jinja": b"{{ messages[0].content }}{{ eos_token }}",
    }
    text = Text.from_files(files)
    assert text.encode("<|y|>") == [4096]
    assert text.special_ids == {0, 1, 2, 4096}
    assert text.encode_chat(user("a")) == [*plain_ids("a"), IM_END]


def test_lone_surrogates_are_refused() -> None:
    with pytest.raises(RequestError, match="lone surrogates"):
        DEMO_TEXT.encode("a\ud800")
    with pytest.raises(RequestError, match="lone surrogates"):
        DEMO_TEXT.encode_chat(user("a\udcff"))


@pytest.mark.parametrize(
    ("name", "raw", "message"),
    [
        ("tokenizer.json", b"", "tokenizer.json: is no working tokenizer"),
        ("tokenizer.json", b"\xff", "tokenizer.json: is no working tokenizer"),
        ("tokenizer.json", b"{}", "tokenizer.json: is no working tokenizer"),
        ("tokenizer_config.json", b"[]", "tokenizer_config.json: is [], expected an object"),
        ("tokenizer_config.json", b"{", "tokenizer_config.json: is not valid JSON"),
        (
            "tokenizer_config.json",
            b'{"added_tokens_decoder": {"x": {}}}',
            "tokenizer_config.json: added tokens are malformed",
        ),
        (
            "tokenizer_config.json",
            b'{"added_tokens_decoder": [1]}',
            "tokenizer_config.json: added tokens are malformed",
        ),
        (
            "tokenizer_config.json",
            b'{"added_tokens_decoder": {"5": {"content": 5}}}',
            "tokenizer_config.json: added tokens are malformed",
        ),
        (
            "tokenizer_config.json",
            b'{"extra_special_tokens": "<x>"}',
            "tokenizer_config.json: extra_special_tokens is <x>, expected a list",
        ),
        ("chat_template.jinja", b"\xff", "chat_template.jinja: is not UTF-8"),
    ],
)
def test_a_bad_file_is_refused_by_name(name: str, raw: bytes, message: str) -> None:
    with pytest.raises(FormatError) as error:
        Text.from_files(FILES | {name: raw})
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("value", [3, [3], [{"name": "default"}], [{"name": "default", "template": 3}], {"a": "b"}])
def test_a_template_that_is_no_text_is_refused(value: Any) -> None:
    with pytest.raises(FormatError, match=r"^tokenizer_config.json: chat_template is .*, expected a string"):
        demo_with(chat_template=value)


def test_a_container_without_a_tokenizer_is_refused() -> None:
    with pytest.raises(FormatError, match=r"tokenizer\.json: is missing"):
        Text.from_files({})


# Chats


@pytest.mark.parametrize("case", FIXTURE["chat"], ids=case_name)
def test_chats_equal_those_of_transformers(case: dict[str, Any]) -> None:
    text = DEMO_TEXT if case["template"] == "demo" else THINKING_TEXT
    variables = {**case["variables"], "add_generation_prompt": case["add_generation_prompt"]}
    if "error" in case:
        with pytest.raises(RequestError, match=re.escape(case["error"])):
            text.encode_chat(case["messages"], **variables)
    elif case["name"] in DIFFERENT:
        assert case["ids"] != text.encode_chat(case["messages"], **variables)
    else:
        assert case["ids"] == text.encode_chat(case["messages"], **variables)


# Pieces from which control tokens, and near misses of them, come about.
ORDINARY = st.lists(PIECES, max_size=8).map("".join) | st.text(max_size=20).filter(lambda s: s.isprintable())


@given(st.lists(ORDINARY, min_size=1, max_size=4))
@example(["<"])
@example([" > quoted\n<|im_"])
def test_ordinary_content_is_encoded_in_one_go_as_transformers_does(contents: list[str]) -> None:
    assume(not any(literal in content for content in contents for literal in LITERALS))
    rendered = "".join(f"<|im_start|>user\n{content}<|im_end|>\n" for content in contents)
    messages = [message for content in contents for message in user(content)]
    assert DEMO_TEXT.encode_chat(messages, add_generation_prompt=False) == plain_ids(rendered)


@pytest.mark.parametrize(
    "source",
    ["{% generation %}{% set y = 1 %}{{ x }}{% endgeneration %}{{ y }}", "{{ x | tojson }}", "{{ eos_token }}"],
)
def test_templates_have_what_transformers_gives_them(source: str) -> None:
    expected = {"{{ eos_token }}": [IM_END], "{{ x | tojson }}": plain_ids('"<é>&"')}
    assert demo_with(source).encode_chat(user(""), x="<é>&") == expected.get(source, plain_ids("<é>&"))


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{% for i in range(3) %}{% if i == 1 %}{% continue %}{% endif %}{{ i }}{% endfor %}", "02"),
        ("  {% if true %}\nx\n  {% endif %}\n", "x\n"),
        ("{% set ns = namespace(a=1) %}{% set ns.a = 2 %}{{ ns.a }}{{ dict(b=3).b }}", "23"),
        ("{{ missing }}|{{ tools is none }}|{{ documents is none }}", "|True|True"),
        ("{{ messages[0].keys() | list | join(',') }}", "role,content"),
        ("{{ strftime_now('%%') }}", "%"),
        ("{{ {'b': 1, 'a': 'é'} | tojson(indent=1, sort_keys=true) }}", '{\n "a": "é",\n "b": 1\n}'),
    ],
)
def test_templates_render_as_in_transformers(source: str, expected: str) -> None:
    messages = [{"role": "user", "content": "", "tool_calls": None}]
    assert demo_with(source).encode_chat(messages) == plain_ids(expected)


def test_reasoning_reaches_a_template_under_each_of_its_names() -> None:
    text = demo_with("{{ messages[0].reasoning_content }}{{ messages[0].thinking }}")
    assert text.encode_chat([{"role": "assistant", "reasoning": "hm"}]) == plain_ids("hmhm")


def test_named_templates_are_chosen_as_transformers_does() -> None:
    templates = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools"}]
    text = demo_with(chat_template=templates)
    assert text.encode_chat(user("")) == plain_ids("plain")
    assert text.encode_chat(user(""), tools=[{"name": "f"}]) == plain_ids("tools")


def test_tools_that_a_template_does_not_use_are_refused() -> None:
    text = demo_with("{{ messages[0].content }}", THINKING_TOKENS)
    with pytest.raises(RequestError, match="does not use tools, so the model would not see them"):
        text.encode_chat(user(""), tools=[{"name": "f"}])


def test_a_model_without_a_template_says_so() -> None:
    text = demo_with(chat_template=None)
    assert not text.has_chat_template
    assert DEMO_TEXT.has_chat_template
    with pytest.raises(RequestError, match="the model has none"):
        text.encode_chat(user("a"))


@pytest.mark.parametrize("messages", [[], ["hi"], user(object())])
def test_messages_that_are_none_are_refused(messages: Any) -> None:
    with pytest.raises(RequestError, match=r"^messages: "):
        DEMO_TEXT.encode_chat(messages)


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ ''.__class__ }}",
        "{{ ''['__class__'] }}",
        "{{ '' | attr('__class__') }}",
        "{{ messages.append(1) }}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ raise_exception.__globals__ }}",
        "{{ namespace.__init__ }}",
        "{{ dict.__class__ }}",
        "{{ '{0.__class__}'.format('') }}",
        "{{ namespace(__class__=1).__class__.__init__ }}",
        "{{ dict.mro() }}",
        "{% for i in range(10**9) %}{% endfor %}",
        "{{ 10 ** (10 ** 10) }}",
        "{{ 'a' * 2000000 }}",
        "{{ 2000000 * [1] }}",
    ],
)
def test_a_template_that_tries_to_reach_python_is_refused(source: str) -> None:
    with pytest.raises(FormatError, match=r"^chat_template\.jinja: ") as error:
        demo_with(source).encode_chat(user("a"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("source", "kind", "message"),
    [
        ("{{ raise_exception('No\nsystem role') }}", RequestError, "refuses these messages: No system role"),
        ("\n\n{% if %}", FormatError, "line 3: Expected an expression"),
        ("{{ nothing.at.all }}", FormatError, "fails with UndefinedError: 'nothing' is undefined"),
        ("{{ 1 + 'a' }}", FormatError, "fails with TypeError"),
        ("{% include 'x' %}", FormatError, "fails with TypeError"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", FormatError, "fails with RecursionError"),
    ],
)
def test_an_error_of_a_template_is_one_line(source: str, kind: type[StreamingExpertsError], message: str) -> None:
    with pytest.raises(kind) as error:
        demo_with(source).encode_chat(user("a"))
    assert str(error.value).startswith(f"chat_template.jinja: {message}")
    assert "\n" not in str(error.value)


def test_a_template_that_nests_too_deeply_to_be_asked_for_its_names_is_one_line() -> None:
    with pytest.raises(FormatError, match=r"^chat_template\.jinja: nests too deeply$"):
        demo_with("{{ " + "(" * 5000 + "tools" + ")" * 5000 + " }}").encode_chat(user("a"), tools=[])


def test_a_bad_template_does_not_stop_raw_prompts() -> None:
    assert demo_with("{% if %}").encode("a") == plain_ids("a")
