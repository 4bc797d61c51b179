"""tiktoken.model of Kimi as tokenizer.json: the ids of the tiktoken package."""

import base64
import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from formats.errors import StreamingExpertsError
from repack.convert import prepare
from repack.plan import Options
from repack.sources import open_local
from repack.vocabulary import with_tokenizer
from repack.vocabulary.tiktoken import read_ranks, tiktoken_tokenizer
from tests.fixtures.deepseek_tiny import CASES
from tests.fixtures.recipe import write_checkpoint

FOLDER = Path(__file__).resolve().parents[1] / "fixtures" / "tiktoken"
RANKS = (FOLDER / "tiktoken.model").read_bytes()
CONFIG: dict[str, Any] = json.loads((FOLDER / "tokenizer_config.json").read_bytes())
IDS = json.loads((FOLDER / "ids.json").read_bytes())
BYTES = b"".join(base64.b64encode(bytes([byte])) + b" %d\n" % byte for byte in range(256))
TOKENIZER = tiktoken_tokenizer(RANKS, json.dumps(CONFIG).encode())


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_str(TOKENIZER.decode())


def test_ids_are_those_of_the_tiktoken_package(tokenizer: Tokenizer) -> None:
    assert len(IDS) > 100
    assert [tokenizer.encode(text).ids for text, _ in IDS] == [ids for _, ids in IDS]


def test_ids_become_the_text_again(tokenizer: Tokenizer) -> None:
    assert [tokenizer.decode(ids, skip_special_tokens=False) for _, ids in IDS] == [text for text, _ in IDS]


def test_ids_that_the_config_does_not_name_are_reserved(tokenizer: Tokenizer) -> None:
    first = len(read_ranks(RANKS))
    assert tokenizer.id_to_token(first + 2) == "<|im_end|>"
    assert tokenizer.id_to_token(first + 255) == f"<|reserved_token_{first + 255}|>"
    assert tokenizer.get_vocab_size() == first + 256


def test_a_conversion_holds_tokenizer_json_alone(tmp_path: Path) -> None:
    case = CASES["kimi_k2"]
    write_checkpoint(tmp_path, case.tensors(), case.config)
    for name in ("tiktoken.model", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((FOLDER / name).read_bytes())
    files = prepare(open_local(str(tmp_path)), Options(16, 64, 16)).small_files
    assert sorted(files) == ["config.json", "tokenizer.json", "tokenizer_config.json"]


def test_a_tokenizer_json_beside_the_ranks_is_kept() -> None:
    assert with_tokenizer({"tiktoken.model": b"anything", "tokenizer.json": b"{}"}) == {"tokenizer.json": b"{}"}


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"not base64! 0\n", "line 1 is not base64! 0, expected a new token in base64 and its rank 0"),
        (b"YQ== 1\n", "line 1 is YQ== 1, expected .* its rank 0"),
        (b"YQ==\n", "line 1 is YQ==, expected"),
        (b"YQ== 0\nYQ== 1\n", "line 2 is YQ== 1, expected a new token"),
        (b"YQ== 0 0\n", "line 1 is YQ== 0 0, expected"),
        (b" \n", "line 1 is  , expected"),
        (b"YQ== 0\n", "has no token for byte 0, expected one for each of the 256"),
    ],
)
def test_malformed_ranks_are_refused_by_line(raw: bytes, message: str) -> None:
    with pytest.raises(StreamingExpertsError, match=f"^tiktoken.model: {message}"):
        tiktoken_tokenizer(raw, json.dumps(CONFIG).encode())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokenizer_class": "QWenTokenizer"}, "tokenizer_class is QWenTokenizer, expected TikTokenTokenizer"),
        ({"added_tokens_decoder": None}, "added_tokens_decoder is missing"),
        ({"added_tokens_decoder": {"256": {"content": 3}}}, "added_tokens_decoder.256 is .*, expected its content"),
    ],
)
def test_another_tokenizer_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(StreamingExpertsError, match=f"^tokenizer_config.json: {message}"):
        tiktoken_tokenizer(BYTES, json.dumps(CONFIG | change).encode())


def test_without_a_config_the_ranks_are_refused() -> None:
    with pytest.raises(StreamingExpertsError, match="tokenizer_class is nothing, expected TikTokenTokenizer"):
        tiktoken_tokenizer(BYTES, None)
