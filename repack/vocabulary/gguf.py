"""The vocabulary in a GGUF file's metadata -> tokenizer.json and tokenizer_config.json.

Three kinds (tokenizer.ggml.model): "gpt2", byte-level BPE with merges and a named pre-tokenizer; "llama",
SentencePiece's BPE, where the score of a token says when it is joined; and "gemma4", as that one, but with merges.
Source: gguf-py's constants, llama.cpp's llama-vocab.cpp, sentencepiece.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from formats.errors import FormatError, UnsupportedError
from formats.fields import shown
from repack.vocabulary.patterns import PRE_TOKENIZERS
from repack.vocabulary.tokenizer_json import added_token, bpe_model, byte_level_bpe, last_pairs, tokenizer_json

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # tokenizer.ggml.token_type
SPACE = "\u2581"  # what stands for a space in SentencePiece
SARVAM = "sarvam-moe"  # a pre-tokenizer that cuts nothing: bytes are not spelled, spaces are characters
NAMED_TOKENS = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}


# Tokens that end a turn whatever the file says of eos: it names one, where generation_config.json has several.
# Source: llama.cpp's special_eog_ids, of the models that are read here.
STOP_TOKENS = (
    "<|im_end|>",
    "<|endoftext|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end_of_text|>",
    "<|return|>",
    "<|call|>",
    "<|calls|>",
    "<|flush|>",
    "[EOS]",
    "[EOT]",
    "[e~[",
    "<eos>",
    "<turn|>",
    "<|tool_response>",
    "<\uff5cend\u2581of\u2581sentence\uff5c>",
)


def listed(metadata: Mapping[str, Any], key: str, expected: str, where: str) -> list[Any]:
    """The list of tokenizer.ggml.KEY, empty without. Raises FormatError."""
    value = metadata.get(f"tokenizer.ggml.{key}", [])
    if not isinstance(value, list):
        raise FormatError(f"{where}: tokenizer.ggml.{key} is {shown(value)}, expected a list of {expected}")
    return value


def stop_ids(metadata: Mapping[str, Any], where: str) -> list[int]:
    """Ids of all tokens that end a generation: those that the file names, then those known to that are no words.

    Raises FormatError for tokens or types that are no lists.
    """
    named = (metadata.get(f"tokenizer.ggml.{key}_token_id") for key in ("eos", "eot", "eom"))
    tokens, types = listed(metadata, "tokens", "strings", where), listed(metadata, "token_type", "numbers", where)
    known = (
        i
        for i, (token, kind) in enumerate(zip(tokens, types, strict=False))
        if kind in (CONTROL, USER_DEFINED) and token in STOP_TOKENS
    )
    return list(dict.fromkeys([*(stop for stop in named if type(stop) is int), *known]))


def tokenizer_files(metadata: Mapping[str, Any], where: str) -> dict[str, bytes]:
    """tokenizer.json and tokenizer_config.json (names of tokens, chat templates) by file name.

    Raises FormatError for a vocabulary that is malformed, UnsupportedError for a kind that is not known here.
    """
    vocabulary = _Vocabulary(metadata, where)
    kind = vocabulary.value("model", str, "a string")
    if kind not in KINDS:
        known = ", ".join(KINDS)
        raise UnsupportedError(f"{where}: tokenizer.ggml.model is {shown(kind)}, implemented are {known}")
    tokenizer = KINDS[kind](vocabulary)
    config: dict[str, Any] = {name: token for key, name in NAMED_TOKENS.items() if (token := vocabulary.named(key))}
    if templates := _templates(metadata, where):
        config["chat_template"] = templates
    return {"tokenizer.json": tokenizer, "tokenizer_config.json": json.dumps(config, ensure_ascii=False).encode()}


class _Vocabulary:
    """Tokens and their types, checked."""

    def __init__(self, metadata: Mapping[str, Any], where: str) -> None:
        self._metadata, self.where = metadata, where
        texts = self.items("tokens", str, "strings")
        # llama.cpp gives a token without text a name, too: each needs one of its own.
        self.tokens = [text or f"[EMPTY_{i}]" for i, text in enumerate(texts)]
        self.ids = {token: i for i, token in enumerate(self.tokens)}
        if len(self.ids) != len(self.tokens):
            twice = next(token for i, token in enumerate(self.tokens) if self.ids[token] != i)
            raise FormatError(f"{where}: tokenizer.ggml.tokens holds {shown(twice)} twice")
        self.types = self.items("token_type", int, "numbers", len(self.tokens))

    def value(self, key: str, kind: type, expected: str, default: Any = None) -> Any:
        """The value of tokenizer.ggml.KEY."""
        value = self._metadata.get(f"tokenizer.ggml.{key}", default)
        if type(value) is not kind:
            raise FormatError(f"{self.where}: tokenizer.ggml.{key} is {shown(value)}, expected {expected}")
        return value

    def items(self, key: str, kind: type, expected: str, length: int | None = None) -> list[Any]:
        """The list of tokenizer.ggml.KEY, of that length."""
        values: list[Any] = self.value(key, list, f"a list of {expected}")
        if not all(type(value) is kind for value in values) or length not in (None, len(values)):
            count = "" if length is None else f"{length} "
            raise FormatError(f"{self.where}: tokenizer.ggml.{key} is not a list of {count}{expected}")
        return values

    def of_type(self, *types: int) -> list[str]:
        """Tokens of these types, in order."""
        return [token for token, kind in zip(self.tokens, self.types, strict=True) if kind in types]

    def added(self) -> list[dict[str, Any]]:
        """Control tokens and those that users defined: found in text before anything else."""
        return [
            added_token(i, token, kind == CONTROL)
            for i, (token, kind) in enumerate(zip(self.tokens, self.types, strict=True))
            if kind in (CONTROL, USER_DEFINED)
        ]

    def named(self, key: str) -> str | None:
        """The text of the token tokenizer.ggml.KEY_token_id."""
        token_id = self._metadata.get(f"tokenizer.ggml.{key}_token_id")
        known = type(token_id) is int and 0 <= token_id < len(self.tokens)
        return self.tokens[token_id] if known and token_id is not None else None

    def merges(self) -> list[tuple[str, str]]:
        """Pairs of tokens in the order in which they are joined."""
        merges: list[tuple[str, str]] = []
        for i, merge in enumerate(self.items("merges", str, "strings")):
            left, _, right = merge.partition(" ")
            if not {left, right, left + right} <= self.ids.keys():
                raise FormatError(
                    f"{self.where}: tokenizer.ggml.merges[{i}] is {shown(merge)}, expected two tokens that make a third"
                )
            merges.append((left, right))
        return merges

    def post_processor(self, add_bos: bool, always: bool = False) -> dict[str, Any] | None:
        """What begins a raw prompt with BOS, where the file or else the model wants it, or `always`."""
        bos = self.named("bos")
        if bos is None or not (always or self.value("add_bos_token", bool, "true or false", add_bos)):
            return None
        text = {"Sequence": {"id": "A", "type_id": 0}}
        return {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": bos, "type_id": 0}}, text],
            "pair": [text, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {bos: {"id": bos, "ids": [self.ids[bos]], "tokens": [bos]}},
        }


def _byte_level(vocabulary: _Vocabulary) -> bytes:
    where = vocabulary.where
    pre = vocabulary.value("pre", str, "a string", "")
    if pre == SARVAM:
        begin = vocabulary.post_processor(add_bos=False)
        return _spaces_as_characters(vocabulary, vocabulary.merges(), False, begin)
    if pre not in PRE_TOKENIZERS:
        known = ", ".join(sorted((*PRE_TOKENIZERS, SARVAM)))
        raise UnsupportedError(f"{where}: tokenizer.ggml.pre is {shown(pre) or 'missing'}, implemented are {known}")
    pre_tokenizer = PRE_TOKENIZERS[pre]
    return byte_level_bpe(
        vocabulary.ids,  # added tokens too: their ids are then what the file says
        vocabulary.merges(),
        vocabulary.added(),
        pre_tokenizer.patterns,
        normalizer={"type": "NFC"} if pre_tokenizer.nfc else None,
        post_processor=vocabulary.post_processor(pre_tokenizer.add_bos),
        ignore_merges=pre_tokenizer.ignore_merges,
    )


def _sentencepiece(vocabulary: _Vocabulary) -> bytes:
    scores = vocabulary.items("scores", float, "numbers", len(vocabulary.tokens))
    # Highest score first; the sort keeps the order of ids among equals.
    joined = sorted(vocabulary.of_type(NORMAL), key=lambda token: -scores[vocabulary.ids[token]])
    merges = list(last_pairs({token: rank for rank, token in enumerate(joined)}))
    prefix = vocabulary.value("add_space_prefix", bool, "true or false", True)
    return _spaces_as_characters(vocabulary, merges, prefix, vocabulary.post_processor(add_bos=True))


def _gemma4(vocabulary: _Vocabulary) -> bytes:
    """As GemmaTokenizer of transformers. Files say that no BOS is added where one is, as llama.cpp knows, too."""
    begin = vocabulary.post_processor(add_bos=True, always=True)
    return _spaces_as_characters(vocabulary, vocabulary.merges(), False, begin)


def _spaces_as_characters(
    vocabulary: _Vocabulary,
    merges: Sequence[tuple[str, str]],
    prefix: bool,
    post_processor: Mapping[str, Any] | None,
) -> bytes:
    """A BPE over whole texts whose spaces are characters of their own; with a prefix one stands before each text."""
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    back: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if prefix:
        back.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    unknown = vocabulary.of_type(UNKNOWN)
    return tokenizer_json(
        model=bpe_model(
            vocabulary.ids, merges, unk_token=unknown[0] if unknown else None, byte_fallback=True, fuse_unk=True
        ),
        added_tokens=vocabulary.added(),
        normalizer={
            "type": "Sequence",
            "normalizers": [{"type": "Prepend", "prepend": SPACE}, spaces] if prefix else [spaces],
        },
        pre_tokenizer=None,
        post_processor=post_processor,
        decoder={"type": "Sequence", "decoders": back},
    )


KINDS: Mapping[str, Callable[[_Vocabulary], bytes]] = {
    "gpt2": _byte_level,
    "llama": _sentencepiece,
    "gemma4": _gemma4,
}


def _templates(metadata: Mapping[str, Any], where: str) -> Sequence[dict[str, str]] | str | None:
    """tokenizer.chat_template, and those with a name: tokenizer.chat_template.NAME."""
    key = "tokenizer.chat_template"
    found = {name: text for name, text in metadata.items() if name == key or name.startswith(f"{key}.")}
    for name, text in found.items():
        if not isinstance(text, str):
            raise FormatError(f"{where}: {name} is {shown(text)}, expected a string")
    if len(found) <= 1:
        return found.get(key)
    names = {name: "default" if name == key else name.removeprefix(f"{key}.") for name in found}
    return [{"name": names[name], "template": text} for name, text in found.items()]
