"""Vocabularies of GGUF files as tokenizer.json: ids of transformers and of sentencepiece; what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, pre_tokenizers

from formats.errors import StreamingExpertsError
from repack.vocabulary.gguf import CONTROL, NORMAL, USER_DEFINED, stop_ids, tokenizer_files
from repack.vocabulary.patterns import PRE_TOKENIZERS
from runtime.text import Text

ROOT = Path(__file__).resolve().parents[2]
FIXTURES = ROOT / "tests" / "fixtures"
DEMO = json.loads((ROOT / "repack" / "demo" / "tokenizer.json").read_bytes())
CHAT = json.loads((FIXTURES / "chat.json").read_bytes())  # ids of transformers, see make_chat.py
SENTENCEPIECE = json.loads((FIXTURES / "sentencepiece.json").read_bytes())  # see make_sentencepiece.py
GEMMA = json.loads((FIXTURES / "gemma_vocabulary.json").read_bytes())  # see make_gemma_vocabulary.py
KEY = "tokenizer.ggml."


def byte_level(**changes: Any) -> dict[str, Any]:
    """The demo's vocabulary as llama.cpp's converter writes it."""
    added = {token["content"]: token["id"] for token in DEMO["added_tokens"]}
    tokens = sorted({**DEMO["model"]["vocab"], **added}.items(), key=lambda item: item[1])
    return {
        f"{KEY}model": "gpt2",
        f"{KEY}pre": "qwen35",
        f"{KEY}tokens": [token for token, _ in tokens],
        f"{KEY}token_type": [CONTROL if token in added else NORMAL for token, _ in tokens],
        f"{KEY}merges": [" ".join(pair) for pair in DEMO["model"]["merges"]],
        f"{KEY}eos_token_id": added["<|im_end|>"],
        f"{KEY}bos_token_id": added["<|endoftext|>"],
        f"{KEY}add_bos_token": False,
        "tokenizer.chat_template": "{{ messages[0].content }}{{ eos_token }}",
    } | {KEY + name: value for name, value in changes.items()}


def fast(files: dict[str, bytes]) -> Tokenizer:
    return Tokenizer.from_str(files["tokenizer.json"].decode())


def test_a_byte_level_vocabulary_gives_the_ids_of_transformers() -> None:
    tokenizer = fast(tokenizer_files(byte_level(), "x.gguf"))
    assert [tokenizer.encode(case["text"]).ids for case in CHAT["encode"]] == [case["ids"] for case in CHAT["encode"]]
    assert [tokenizer.decode(case["ids"], skip_special_tokens=False) for case in CHAT["encode"]] == [
        case["decoded"] for case in CHAT["encode"]
    ]


def test_a_sentencepiece_vocabulary_gives_the_ids_of_sentencepiece() -> None:
    tokenizer = fast(tokenizer_files(SENTENCEPIECE["metadata"], "x.gguf"))
    bos = SENTENCEPIECE["metadata"][f"{KEY}bos_token_id"]
    for text, ids in SENTENCEPIECE["texts"]:
        assert tokenizer.encode(text).ids == [bos, *ids]
        assert tokenizer.decode(ids) == text


def test_a_vocabulary_of_gemma_gives_the_ids_of_transformers_behind_bos() -> None:
    tokenizer = fast(tokenizer_files(GEMMA["metadata"], "x.gguf"))
    bos = GEMMA["metadata"][f"{KEY}bos_token_id"]
    for text, ids in GEMMA["texts"]:
        assert tokenizer.encode(text).ids == [bos, *ids]


def test_a_vocabulary_of_sarvam_is_one_of_gemma_under_another_name_without_bos() -> None:
    metadata = GEMMA["metadata"] | {f"{KEY}model": "gpt2", f"{KEY}pre": "sarvam-moe", f"{KEY}add_bos_token": False}
    tokenizer = fast(tokenizer_files(metadata, "x.gguf"))
    for text, ids in GEMMA["texts"]:
        assert tokenizer.encode(text).ids == ids


def test_gemma_begins_with_bos_whatever_the_file_says_and_ends_with_its_turn() -> None:
    metadata = {**GEMMA["metadata"], f"{KEY}add_bos_token": False}
    tokenizer = fast(tokenizer_files(metadata, "x.gguf"))
    assert tokenizer.encode("a").tokens[0] == "<bos>"
    ends = {metadata[f"{KEY}tokens"][i] for i in stop_ids(metadata, "x")}
    assert ends == {"<eos>", "<turn|>", "<|tool_response>"}


def test_the_runtime_takes_both_with_names_and_template() -> None:
    text = Text.from_files(tokenizer_files(byte_level(), "x.gguf"))
    assert text.spelling(text.encode_chat([{"role": "user", "content": "hi"}])[-1]) == "<|im_end|>"
    spm = Text.from_files(tokenizer_files(SENTENCEPIECE["metadata"], "x.gguf"))
    assert not spm.has_chat_template
    decoder = spm.decoder()
    shown = "".join(decoder.push(i) for i in spm.encode("Größe, Übermut")) + decoder.finish()
    assert shown == "Größe, Übermut"


def test_bos_begins_a_prompt_where_the_file_says_so() -> None:
    tokenizer = fast(tokenizer_files(byte_level(add_bos_token=True), "x.gguf"))
    assert tokenizer.encode("a").ids[0] == tokenizer.token_to_id("<|endoftext|>")


def test_tokens_that_users_defined_are_found_in_text_but_not_special() -> None:
    metadata = byte_level()
    metadata[f"{KEY}tokens"] = [*metadata[f"{KEY}tokens"], "<think>", ""]
    metadata[f"{KEY}token_type"] = [*metadata[f"{KEY}token_type"], USER_DEFINED, NORMAL]
    tokenizer = fast(tokenizer_files(metadata, "x.gguf"))
    assert tokenizer.encode("a<think>b").tokens[1] == "<think>"
    assert tokenizer.decode(tokenizer.encode("<think>").ids, skip_special_tokens=True) == "<think>"
    assert tokenizer.get_vocab_size() == len(metadata[f"{KEY}tokens"])


def test_named_chat_templates_are_all_kept() -> None:
    metadata = byte_level() | {"tokenizer.chat_template.tool_use": "t", "tokenizer.chat_templates": ["tool_use"]}
    config = json.loads(tokenizer_files(metadata, "x.gguf")["tokenizer_config.json"])
    assert [entry["name"] for entry in config["chat_template"]] == ["default", "tool_use"]
    assert (config["bos_token"], config["eos_token"]) == ("<|endoftext|>", "<|im_end|>")


def test_all_tokens_that_end_a_turn_are_stop_tokens() -> None:
    """A file names one, publishers have several; a word that only looks like one is none."""
    metadata = byte_level()
    end, text = (metadata[f"{KEY}tokens"].index(token) for token in ("<|im_end|>", "<|endoftext|>"))
    assert stop_ids(metadata, "x") == [end, text]
    metadata[f"{KEY}token_type"] = [NORMAL] * len(metadata[f"{KEY}tokens"])
    assert stop_ids(metadata | {f"{KEY}eot_token_id": 5}, "x") == [end, 5]
    assert stop_ids({}, "x") == []


def test_a_solar_open_ends_with_its_calls_too() -> None:
    tokens = {f"{KEY}tokens": ["<|end|>", "<|flush|>", "<|calls|>"], f"{KEY}token_type": [CONTROL] * 3}
    assert stop_ids(tokens, "x") == [1, 2]


CUTS = {
    "afmoe": ["Hello", " world", " ", "1", "234", " ", "漢字かな", "!\n\n", "x"],
    "bailingmoe2": ["Hello", " world", " ", "1", "2", "3", "4", " 漢字かな", "!\n\n", "x"],
    "cohere2moe": ["Hello", " world", " ", "1", "234", " 漢字かな", "!\n\n", "x"],
    "deepseek-llm": ["Hello", " world", " ", "1", "2", "3", "4", " ", "漢字かな", "!", "\n", "\n", "x"],
    "deepseek-v3": ["Hello", " world", " ", "123", "4", " ", "漢字かな", "!\n\n", "x"],
    "exaone-moe": ["Hello world", " ", "1", "2", "3", "4", " 漢字かな", "!\n", "\n", "x"],
    "gpt-4o": ["Hello", " world", " ", "123", "4", " 漢字かな", "!\n\n", "x"],
    "kimi-k2": ["Hello", " world", " ", "123", "4", " ", "漢字", "かな", "!\n\n", "x"],
    "laguna": ["Hello", " world", " ", "1", "2", "3", "4", " 漢字かな", "!", "\n\n", "x"],
    "llama-bpe": ["Hello", " world", " ", "123", "4", " 漢字かな", "!\n\n", "x"],
    "qwen2": ["Hello", " world", " ", "1", "2", "3", "4", " 漢字かな", "!\n\n", "x"],
    "pixtral": ["Hello", " world", " ", "123", "4", " 漢字かな", "!\n\n", "x"],
    "refact": ["Hello", " world", " ", "1", "2", "3", "4", " 漢字かな", "!", "\n", "\n", "x"],
    "tekken": ["Hello", " world", " ", "1", "2", "3", "4", " 漢字かな", "!\n\n", "x"],
}


@pytest.mark.parametrize("name", PRE_TOKENIZERS)
def test_every_pattern_cuts_text_without_loss(name: str) -> None:
    steps = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in PRE_TOKENIZERS[name].patterns]
    cutter = pre_tokenizers.Sequence(steps)
    for case in CHAT["encode"]:
        assert "".join(piece for piece, _ in cutter.pre_tokenize_str(case["text"])) == case["text"]
    pieces = [piece for piece, _ in cutter.pre_tokenize_str("Hello world 1234 漢字かな!\n\nx")]
    assert pieces == CUTS.get(name, pieces)


@pytest.mark.parametrize("name", ["afmoe", "cohere2moe"])
def test_digits_are_taken_by_threes_from_the_right(name: str) -> None:
    cutter = pre_tokenizers.Split(Regex(PRE_TOKENIZERS[name].patterns[0]), "isolated")
    numbers = {"1": ["1"], "12": ["12"], "1234": ["1", "234"], "12345": ["12", "345"], "123456": ["123", "456"]}
    for number, parts in numbers.items():
        assert [piece for piece, _ in cutter.pre_tokenize_str(number)] == parts


def test_numbers_of_deepseek_v2_are_cut_as_its_tokenizer_json_does_digit_by_digit() -> None:
    *others, digits = PRE_TOKENIZERS["deepseek-llm"].patterns
    ours, published = (
        pre_tokenizers.Sequence([*(pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in others), last])
        for last in (
            pre_tokenizers.Split(Regex(digits), "isolated"),
            pre_tokenizers.Digits(individual_digits=True),
        )
    )
    for text in (*(case["text"] for case in CHAT["encode"]), "12½³ ٣٤ ⅣⅧ \uff11\uff12"):
        assert ours.pre_tokenize_str(text) == published.pre_tokenize_str(text)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "bert"}, "tokenizer.ggml.model is bert, implemented are gpt2, llama, gemma4"),
        ({"model": 3}, "tokenizer.ggml.model is 3, expected a string"),
        ({"pre": "viking"}, "tokenizer.ggml.pre is viking, implemented are afmoe, "),
        ({"pre": ""}, "tokenizer.ggml.pre is missing, implemented are "),
        ({"tokens": ["a", "a"]}, "tokenizer.ggml.tokens holds a twice"),
        ({"tokens": ["a", 1]}, "tokenizer.ggml.tokens is not a list of strings"),
        ({"tokens": None}, "tokenizer.ggml.tokens is None, expected a list of strings"),
        ({"token_type": [1]}, r"tokenizer.ggml.token_type is not a list of \d+ numbers"),
        ({"merges": ["a"]}, r"tokenizer.ggml.merges\[0\] is a, expected two tokens that make a third"),
        ({"merges": ["a zzzz"]}, r"tokenizer.ggml.merges\[0\] is a zzzz, expected two tokens"),
        ({"add_bos_token": 1}, "tokenizer.ggml.add_bos_token is 1, expected true or false"),
    ],
)
def test_a_vocabulary_that_cannot_be_used_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(StreamingExpertsError, match=f"^x.gguf: {message}"):
        tokenizer_files(byte_level(**changes), "x.gguf")


def test_a_template_that_is_no_text_is_refused() -> None:
    with pytest.raises(StreamingExpertsError, match=r"^x.gguf: tokenizer.chat_template is 3, expected a string"):
        tokenizer_files(byte_level() | {"tokenizer.chat_template": 3}, "x.gguf")


def test_scores_of_the_wrong_length_are_refused() -> None:
    metadata = SENTENCEPIECE["metadata"] | {f"{KEY}scores": [0.0]}
    with pytest.raises(StreamingExpertsError, match=r"^x.gguf: tokenizer.ggml.scores is not a list of 900 numbers"):
        tokenizer_files(metadata, "x.gguf")
