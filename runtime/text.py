"""Text <-> token ids: the tokenizer of a checkpoint, raw prompts and chats."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from tokenizers import AddedToken, Encoding, Tokenizer

from formats.errors import FormatError, RequestError
from formats.fields import parse_json, shown
from formats.tokenizer import decoder_kinds, read_tokenizer, tokenizer_errors
from runtime.chat_template import (
    PUNCTUATED,
    THINKING_SWITCHES,
    ChatTemplate,
    StandIns,
    normalized,
    templates_of,
)
from runtime.streaming import StreamDecoder

TOKENIZER = "tokenizer.json"
CONFIG = "tokenizer_config.json"


class Text:
    """The tokenizer of one checkpoint, as transformers' fast tokenizer treats the same files."""

    def __init__(
        self, tokenizer: Tokenizer, templates: Mapping[str, ChatTemplate], named_tokens: Mapping[str, str]
    ) -> None:
        self._tokenizer = tokenizer
        self._templates = dict(templates)
        self._named_tokens = dict(named_tokens)
        self._decoder_kinds = decoder_kinds(tokenizer)
        added = tokenizer.get_added_tokens_decoder()
        with tokenizer_errors():
            # Asked of decode itself: a token may be made special after tokenizer.json said otherwise.
            self.special_ids = frozenset(i for i in added if not tokenizer.decode([i], skip_special_tokens=True))
        # Other added tokens are vocabulary and control nothing: words, runs of spaces and newlines.
        self._control = {
            i: literal
            for i, token in added.items()
            if (literal := token.content.strip()) and (i in self.special_ids or PUNCTUATED.search(literal))
        }
        self._special = [literal for i, literal in self._control.items() if i in self.special_ids]

    @classmethod
    def from_files(cls, files: Mapping[str, bytes]) -> "Text":
        """Build from the bytes of tokenizer.json and, where present, its companions, by file name.

        Raises FormatError for a file that is not what it should be, UnsupportedError for a tokenizer whose
        decoder cannot stream.
        """
        require_tokenizer(files)
        tokenizer = read_tokenizer(files[TOKENIZER])
        tokenizer.no_truncation()  # settings of training; transformers switches them off too
        tokenizer.no_padding()
        config = _config(files)
        named = _named_tokens(config)
        try:
            _add_tokens(tokenizer, config, list(named.values()))
        except (TypeError, ValueError, AttributeError, OverflowError) as error:
            raise FormatError(f"{CONFIG}: added tokens are malformed ({shown(str(error))})") from None
        return cls(tokenizer, templates_of(files, config), named)

    def encode(self, text: str) -> list[int]:
        """Ids of a raw prompt: special tokens in it are recognised, and BOS is added if tokenizer.json does.

        `add_bos_token` of tokenizer_config.json is not read: beside a tokenizer.json, transformers drops it.
        Raises RequestError for text with lone surrogates.
        """
        return list(_encoding(self._tokenizer, text, add_special_tokens=True).ids)

    @property
    def tokenizer(self) -> Tokenizer:
        """That of the tokenizers library."""
        return self._tokenizer

    @property
    def has_chat_template(self) -> bool:
        return bool(self._templates)

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        thinking: bool | None = None,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> list[int]:
        """Ids of a chat, as apply_chat_template gives them, but literals in what users wrote stay plain text.

        Only the template writes control tokens: see `StandIns` for how. thinking turns the template's own switch,
        under whichever name it has; `variables` go to the template as they are (reasoning_effort...). Raises
        RequestError without a template, for a switch that it does not have, for tools or documents that it does not
        use, or when it refuses the messages, FormatError for a template that fails or tries to leave its sandbox.
        """
        template = self._templates.get("tool_use") if tools is not None else None
        template = template or self._templates.get("default")
        if template is None:
            raise RequestError("chat template: the model has none, expected a raw prompt")
        needed = {"tools": tools is not None and "tool_use" not in self._templates, "documents": documents is not None}
        for name, given in needed.items():
            if given and name not in template.variables:
                raise RequestError(f"{template.name}: does not use {name}, so the model would not see them")
        messages = normalized(messages)
        variables = {"documents": documents, **_switches(template, thinking), **variables}
        stand_ins = StandIns(
            control=list(self._control.values()),
            special=self._special,
            data=[messages, tools, variables, self._named_tokens, template.source],
        )
        rendered = template.render(
            {
                **self._named_tokens,
                **stand_ins.value(variables),
                "messages": stand_ins.messages(messages),
                "tools": stand_ins.value(tools),
                "add_generation_prompt": add_generation_prompt,
            }
        )
        return self._encode_rendered(rendered, stand_ins)

    def spelling(self, token_id: int) -> str:
        """The text of one token, for messages; control tokens are spelled out."""
        with tokenizer_errors():
            return str(self._tokenizer.decode([token_id], skip_special_tokens=False))

    def decoder(self) -> StreamDecoder:
        """A decoder for one stream of generated ids."""
        return StreamDecoder(self._tokenizer, self.special_ids, self._decoder_kinds)

    def _encode_rendered(self, rendered: str, stand_ins: StandIns) -> list[int]:
        """Ids of a rendered chat: the control tokens in it are the template's, all between them is plain text."""
        encoding = _encoding(self._tokenizer, rendered)
        marks: dict[int, str] = {}
        parts, done = [], 0
        for i, (start, end) in zip(encoding.ids, encoding.offsets, strict=True):
            # Not found where a normalizer took look-alikes for the literal: no template means those.
            if i in self._control and (at := rendered.find(self._control[i], start, end)) >= 0:
                marks[i] = marks.get(i) or stand_ins.mark()
                parts += [rendered[done:at], marks[i]]
                done = at + len(self._control[i])
        return self._encode_plain(stand_ins.restored("".join(parts) + rendered[done:]), marks)

    def _encode_plain(self, text: str, marks: Mapping[int, str]) -> list[int]:
        """Ids of text in which no control token is recognised, but for the marks that stand for some.

        The tokenizer splits and strips text at a mark as it does at the token itself.
        """
        added = self._tokenizer.get_added_tokens_decoder()
        added = {i: token for i, token in added.items() if i in marks or i not in self._control}
        for i, mark in marks.items():
            added[i].content = mark
        plain = Tokenizer(self._tokenizer.model)  # shared, not copied
        plain.normalizer = self._tokenizer.normalizer
        plain.pre_tokenizer = self._tokenizer.pre_tokenizer
        plain.add_tokens(list(added.values()))
        numbers = {token.content: i for i, token in added.items()}
        original = {i: numbers[token.content] for i, token in plain.get_added_tokens_decoder().items()}
        ids = _encoding(plain, text).ids
        if spelled := self.special_ids.intersection(ids) - original.keys():  # Unigram models may take </s> for a word
            literal = self.spelling(min(spelled))
            raise RequestError(f"messages: spell {literal}, which this tokenizer cannot encode as plain text")
        return [original.get(i, i) for i in ids]


def require_tokenizer(files: Collection[str]) -> None:
    """Raises FormatError for a container without one among its small files."""
    if TOKENIZER not in files:
        raise FormatError(f"{TOKENIZER}: is missing from the container: no text goes in or out, token ids do (--ids)")


def _switches(template: ChatTemplate, thinking: bool | None) -> dict[str, bool]:
    if thinking is None:
        return {}
    switches = {name: thinking for name in THINKING_SWITCHES if name in template.variables}
    if not switches:
        names = " or ".join(THINKING_SWITCHES)
        raise RequestError(f"{template.name}: has no switch for thinking, expected one named {names}")
    return switches


def _encoding(tokenizer: Tokenizer, text: str, add_special_tokens: bool = False) -> Encoding:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise RequestError("prompt: holds lone surrogates, expected valid Unicode text") from None
    with tokenizer_errors():
        return tokenizer.encode(text, add_special_tokens=add_special_tokens)


def _config(files: Mapping[str, bytes]) -> dict[str, Any]:
    """tokenizer_config.json; older ones leave names of tokens to special_tokens_map.json."""

    def read(name: str) -> dict[str, Any]:
        value = parse_json(files[name], name) if name in files else {}
        if not isinstance(value, dict):
            raise FormatError(f"{name}: is {shown(value)}, expected an object")
        return value

    config = read(CONFIG)
    if "added_tokens_decoder" not in config:
        config |= {"added_tokens_decoder": {}, **read("special_tokens_map.json")}
    return config


def _content(token: Any) -> str | None:
    """The text of a token given as a string or as an AddedToken object."""
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else None


def _extra_tokens(config: Mapping[str, Any]) -> list[Any]:
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    if not isinstance(extra, (list, dict)):
        raise FormatError(f"{CONFIG}: extra_special_tokens is {shown(extra)}, expected a list")
    return list(extra.values()) if isinstance(extra, dict) else extra


def _named_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """bos_token, eos_token and all other `*_token` strings: variables of chat templates."""
    extra = config.get("extra_special_tokens")
    values = {name: token for name, token in config.items() if name.endswith("_token")}
    values |= extra if isinstance(extra, dict) else {}
    return {name: content for name, value in values.items() if (content := _content(value)) is not None}


def _add_tokens(tokenizer: Tokenizer, config: Mapping[str, Any], named: Sequence[str]) -> None:
    """Add tokens of tokenizer_config.json that tokenizer.json lacks, in the order of transformers."""
    listed = sorted(config["added_tokens_decoder"].items(), key=lambda item: int(item[0]))
    tokenizer.add_tokens([AddedToken(**{k: v for k, v in token.items() if k != "__type"}) for _, token in listed])
    special = [*named, *filter(None, map(_content, _extra_tokens(config)))]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
