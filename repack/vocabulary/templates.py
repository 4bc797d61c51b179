"""Chat templates of older processors and of folders become those that a tokenizer of today has.

chat_template.json holds what chat_template.jinja does; additional_chat_templates/NAME.jinja are further templates, of
which `tool_use` is taken where tools are given (source: transformers' tokenization_utils_base.py).
"""

import json
from collections.abc import Mapping
from typing import Any

from formats.errors import FormatError
from formats.fields import Fields, parse_json, shown

TEMPLATE, LEGACY, CONFIG = "chat_template.jinja", "chat_template.json", "tokenizer_config.json"
TOOL_USE = "additional_chat_templates/tool_use.jinja"


def with_templates(files: Mapping[str, bytes]) -> dict[str, bytes]:
    """A checkpoint's small files, all templates where the runtime looks for them.

    Raises FormatError for a chat_template.json, a tokenizer_config.json or a template that is none.
    """
    result = {name: raw for name, raw in files.items() if name not in (LEGACY, TOOL_USE)}
    config: dict[str, Any] = parse_json(files[CONFIG], CONFIG) if CONFIG in files else {}
    if not isinstance(config, dict):
        raise FormatError(f"{CONFIG}: is {shown(config)}, expected an object")
    if LEGACY in files and TEMPLATE not in files and config.get("chat_template") is None:
        result[TEMPLATE] = Fields(parse_json(files[LEGACY], LEGACY), LEGACY).string("chat_template").encode()
    if TOOL_USE in files:
        named = config.get("chat_template")
        templates = {"default": named} if isinstance(named, str) else _by_name(named)
        if TEMPLATE in result:
            templates["default"] = _text(result.pop(TEMPLATE), TEMPLATE)
        templates["tool_use"] = _text(files[TOOL_USE], TOOL_USE)
        config["chat_template"] = [{"name": name, "template": text} for name, text in templates.items()]
        result[CONFIG] = json.dumps(config, ensure_ascii=False, indent=1).encode()
    return result


def _by_name(named: Any) -> dict[str, str]:
    if named is None:
        return {}
    if not isinstance(named, list):
        raise FormatError(f"{CONFIG}: chat_template is no string and no list of name and template")
    entries = [Fields(entry, f"{CONFIG}: chat_template") for entry in named]
    return {entry.string("name"): entry.string("template") for entry in entries}


def _text(raw: bytes, where: str) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise FormatError(f"{where}: is not UTF-8 ({error})") from None
