"""Tokenizers for the tests of text and of streams: the demo's, variants of it, and a SentencePiece-like one."""

import json
from pathlib import Path
from typing import Any

from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers

from runtime.text import Text

DEMO = Path(__file__).parents[2] / "repack" / "demo"
FILES = {
    name: (DEMO / name).read_bytes() for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
}
DEMO_TEXT = Text.from_files(FILES)


def added(token_id: int, content: str, special: bool, **flags: bool) -> dict[str, Any]:
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"id": token_id, "content": content, "special": special, **plain, **flags}


def demo_with(template: str = "", tokens: tuple[dict[str, Any], ...] = (), **config: Any) -> Text:
    """The demo's tokenizer with another template, more added tokens, or a changed tokenizer_config.json."""
    tokenizer = json.loads(FILES["tokenizer.json"])
    tokenizer["added_tokens"] += tokens
    files = {
        "tokenizer.json": json.dumps(tokenizer).encode(),
        "tokenizer_config.json": json.dumps({**json.loads(FILES["tokenizer_config.json"]), **config}).encode(),
    }
    return Text.from_files(files | ({"chat_template.jinja": template.encode()} if template else {}))


def fast(files: dict[str, bytes]) -> Tokenizer:
    return Tokenizer.from_str(files["tokenizer.json"].decode())


def plain_ids(text: str) -> list[int]:
    """Ids of a text without any added token in it."""
    ids: list[int] = fast(FILES).encode(text, add_special_tokens=False).ids
    return ids


def decode(text: Text, ids: list[int]) -> str:
    return str(text._tokenizer.decode(ids, skip_special_tokens=True))


def stream(text: Text, ids: list[int]) -> list[str]:
    decoder = text.decoder()
    return [*(decoder.push(i) for i in ids), decoder.finish()]


def sentencepiece() -> Text:
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    for piece in ["▁", "a", "b", "s", "/", "<", ">", "▁a", "▁b", "ab"]:
        vocab[piece] = len(vocab)
    merges = [("▁", "a"), ("▁", "b"), ("a", "b")]
    tokenizer = Tokenizer(models.BPE(vocab, merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    config = {"bos_token": "<s>", "eos_token": "</s>"}
    files = {
        "tokenizer.json": tokenizer.to_str().encode(),
        "tokenizer_config.json": json.dumps(config).encode(),
        "chat_template.jinja": b"{{ bos_token }}{{ messages[0].content }}{{ eos_token }}",
    }
    return Text.from_files(files)


SENTENCEPIECE = sentencepiece()


ENDOFTEXT, IM_START, IM_END = 0, 1, 2
LITERALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
THINK, THINK_END, FIM = 4096, 4097, 4098
THINKING_TOKENS = (
    added(THINK, "<think>", special=False),
    added(THINK_END, "</think>", special=False),
    added(FIM, "<|fim_prefix|>", special=False),
)
THINKING_TEMPLATE = Path(__file__).parents[1] / "fixtures" / "thinking_template.jinja"
THINKING_TEXT = Text.from_files(FILES | {"chat_template.jinja": THINKING_TEMPLATE.read_bytes()})
PIECES = st.sampled_from(
    [
        "<",
        "<|",
        "<|im_",
        "im",
        "end",
        "end|>",
        "|>",
        ">",
        "|",
        " ",
        "\n",
        "\n\n",
        "a",
        "é",
        "日",
        "\u212a",
        "'s",
    ]
)


def user(content: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": content}]
