"""DeepSeek-V4.1: what its operations mean, classes of tokens, its tables of n-grams on disk, and sequences.

Its logits are compared with mlx-lm in test_decoders.py.
"""

import json
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from formats.config import DeepseekV41Config, read_config
from formats.container import open_container
from formats.dtypes import Float32
from formats.errors import FormatError, RequestError, StorageError
from formats.origins import read_origins
from repack.convert import convert, prepare
from repack.known_models import KNOWN_MODELS
from repack.plan import Options
from repack.rehearse import prepare_rehearsal, read_geometry
from repack.sources import open_local
from repack.verify import verify_container
from runtime import Engine
from runtime.backends.facts import Rounding
from runtime.backends.numpy_compressed import rounded
from runtime.backends.numpy_latent import select_among, select_candidates
from runtime.backends.numpy_ops import NumpyOps
from runtime.models.ngrams import engram_rows
from runtime.store import EmbeddingRows
from runtime.token_classes import token_classes
from tests.fixtures.deepseek_v41_tiny import CASES, CLASSES, HEAD_ROWS, TOKENIZER, VOCABULARY, WORDS
from tests.fixtures.recipe import TinyCheckpoint, write_checkpoint
from tests.fixtures.stored import E2M1, E4M3
from tests.runtime.helpers import PLENTY, reference

NAME = "deepseek_v41"
LONG = 1500  # tokens: windows forget, and there are many blocks of entries
PROMPT = reference(f"decoders/{NAME}.npz")["prompt_ids"].tolist()
AS_IT_ARRIVES = Options(16, 64, 16)
FLASH = read_config(json.dumps(KNOWN_MODELS["deepseek-ai/DeepSeek-V4.1-Flash"]).encode())


def converted(folder: Path, case: TinyCheckpoint, options: Options = AS_IT_ARRIVES, **changes: Any) -> Path:
    config = case.config | {"text_config": case.text | changes}
    write_checkpoint(folder / "source", case.tensors(), config)
    convert(prepare(open_local(str(folder / "source")), options), folder / "out", hash_source=False)
    return folder / "out"


@pytest.fixture(scope="module")
def container(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return converted(tmp_path_factory.mktemp(NAME), CASES[NAME], max_position_embeddings=2 * LONG)


@pytest.fixture(params=["numpy", "native"])
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def opened(container: Path, backend: str, **options: Any) -> Engine:
    return Engine.open(container, ram_bytes=PLENTY, backend=backend, **options)


# ---- operations


def nearest(x: Float32, table: Float32) -> Float32:
    """Of the values of a table, of two the one of an even code."""
    signed = np.abs(np.abs(x)[..., None] - table)
    codes = signed.argmin(axis=-1)
    tied = signed[..., :-1] == signed[..., 1:]
    least = signed.min(axis=-1)
    for index in np.argwhere(tied.any(axis=-1)):
        at = tuple(index)
        code = int(codes[at])
        if code + 1 < len(table) and signed[at][code + 1] == least[at] and code % 2:
            codes[at] = code + 1
    return np.copysign(table[codes], x).astype(np.float32)


@pytest.mark.parametrize(("rounding", "table"), [(Rounding(8, 32), E4M3), (Rounding(4, 32), E2M1)])
def test_values_are_the_nearest_that_a_power_of_two_scales(rounding: Rounding, table: Float32) -> None:
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((200, 32)) * 2.0 ** rng.integers(-12, 8, (200, 1))).astype(np.float32)
    middles = ((table[1:] + table[:-1]) / 2).astype(np.float32)
    x[0] = np.resize(middles, 32)  # ties, and the largest value itself, whose scale is 1
    x[0, -1] = table[-1]
    x[1] = 0
    found = rounded(x, rounding)
    scales = 2.0 ** np.ceil(np.log2(np.maximum(np.abs(x).max(axis=1, keepdims=True), 1e-4) / table[-1]))
    assert np.array_equal(found, (nearest((x / scales).astype(np.float32), table) * scales).astype(np.float32))


def test_scales_of_entries_are_e4m3() -> None:
    rng = np.random.default_rng(1)
    x = rng.standard_normal((3, 5, 48)).astype(np.float32)
    found = rounded(x, Rounding(4, 16, e4m3_scales=True))
    blocks = x.reshape(-1, 16)
    scales = nearest(np.abs(blocks).max(axis=1, keepdims=True) / np.float32(6), E4M3)
    values = nearest(np.clip(blocks / scales, -6, 6).astype(np.float32), E2M1) * scales
    assert np.array_equal(found, values.reshape(x.shape))


@pytest.mark.parametrize(("block", "blocks", "top_k"), [(4, 3, 4), (5, 2, 3), (1, 4, 4), (3, 50, 6)])
def test_candidates_are_the_best_blocks_and_the_last(block: int, blocks: int, top_k: int) -> None:
    rng = np.random.default_rng(2)
    seen = np.arange(37)
    scores = rng.standard_normal((37, 36)).astype(np.float32)
    selection, candidates = select_candidates(
        iter([(slice(0, 20), scores[:20].copy()), (slice(20, 37), scores[20:].copy())]),
        (37, 36),
        seen,
        top_k,
        block,
        blocks,
    )
    for i, number in enumerate(seen):
        row = scores[i, :number]
        best = [
            (np.inf if b == (number - 1) // block else row[b * block :][:block].max(), b)
            for b in range(-(-number // block))
        ]
        chosen = {b for _, b in sorted(best, reverse=True)[:blocks]}
        assert set(np.flatnonzero(candidates[i]) // block) == chosen
        assert set(np.flatnonzero(selection[i])) == set(np.argsort(-row)[:top_k])
    again = select_among(iter([(slice(0, 37), scores.copy())]), (37, 36), seen, top_k, candidates)
    for i, number in enumerate(seen):
        allowed = [j for j in np.argsort(-scores[i, :number]) if candidates[i, j]]
        assert set(np.flatnonzero(again[i])) == set(allowed[:top_k])


def test_a_block_that_no_context_fills_takes_no_memory() -> None:
    scores = np.zeros((2, 3), np.float32)
    _, candidates = select_candidates(iter([(slice(0, 2), scores)]), (2, 3), np.array([2, 3]), 1, 1 << 60, 1)
    assert candidates.all()


# ---- n-grams


def test_rows_of_n_grams_are_those_of_the_publisher() -> None:
    """Its engram.py gives these for the first tokens of a text, whose classes are 0, 2 and 237."""
    assert isinstance(FLASH, DeepseekV41Config)
    engrams = FLASH.engrams
    assert engrams is not None
    history = [2, 2, 2, 0, 2, 237, 237]
    first, second = (engram_rows(engrams, table, history) for table in range(2))
    assert first[0][:8] == [5702652, 24393184, 39183301, 61503783, 78984481, 90144770, 103724983, 121476532]
    assert first[0][-3:] == [348890037, 367865216, 380066193]
    assert first[2][:3] == [5184683, 27616858, 44205083]
    behind = engrams.table_rows[0]
    assert [row - behind for row in second[0][:3]] == [14361964, 29977809, 32716444]
    assert [row - behind for row in second[2][:3]] == [13339213, 20675680, 42296486]


def test_tokens_that_differ_in_case_accents_or_blanks_are_of_one_class() -> None:
    config = read_config(json.dumps(WORDS.config).encode())
    assert list(token_classes(config, lambda: Tokenizer.from_str(json.dumps(TOKENIZER)))) == CLASSES


def test_where_each_token_is_its_own_class_no_tokenizer_is_asked() -> None:
    config = read_config(json.dumps(CASES[NAME].config).encode())
    assert list(token_classes(config, lambda: pytest.fail("asked"))) == list(range(256))


def test_blanks_and_parts_of_characters_are_their_own_classes() -> None:
    texts = ["a", " ", "\t\n", "", "A ", "\ufffd", "\ufffdb", "b"]
    vocabulary = {text: token_id for token_id, text in enumerate(texts)}
    tokenizer = Tokenizer.from_str(json.dumps(TOKENIZER | {"model": TOKENIZER["model"] | {"vocab": vocabulary}}))
    config = read_config(
        json.dumps(WORDS.config | {"text_config": WORDS.text | {"engram_compressed_vocab_size": 6}}).encode()
    )
    assert list(token_classes(config, lambda: tokenizer)) == [0, 1, 1, 2, 0, 3, 4, 5]


def test_another_number_of_classes_is_refused() -> None:
    config = read_config(
        json.dumps(WORDS.config | {"text_config": WORDS.text | {"engram_compressed_vocab_size": 65}}).encode()
    )
    with pytest.raises(FormatError, match=r"tokenizer\.json: tokens are of 64 classes, config\.json says 65"):
        token_classes(config, lambda: Tokenizer.from_str(json.dumps(TOKENIZER)))


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("words")
    (folder / "source").mkdir()
    (folder / "source" / "tokenizer.json").write_text(json.dumps(TOKENIZER))
    return converted(folder, WORDS)


def test_n_grams_of_classes_give_the_logits_of_the_reference(words: Path, backend: str) -> None:
    expected = reference("decoders/deepseek_v41_words.npz")
    with opened(words, backend, precision="exact") as engine:
        prompt = expected["prompt_ids"].tolist()
        assert np.abs(engine.logits(prompt) - expected["logits"]).max() < 5e-4
        assert engine.generate_ids(prompt, max_new_tokens=16, ignore_eos=True) == expected["greedy_ids"].tolist()


def test_a_container_without_the_tokenizer_that_classes_need_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"tokenizer\.json: is missing .*hashes of n-grams"):
        opened(converted(tmp_path, WORDS), "numpy")


def test_a_token_that_the_tokenizer_does_not_have_is_refused(tmp_path: Path) -> None:
    vocabulary = {text: token_id for token_id, text in enumerate(VOCABULARY[:200])}
    (tmp_path / "source").mkdir()
    less = TOKENIZER | {"model": TOKENIZER["model"] | {"vocab": vocabulary}}
    (tmp_path / "source" / "tokenizer.json").write_text(json.dumps(less))
    with opened(converted(tmp_path, WORDS, engram_compressed_vocab_size=50), "numpy") as engine:
        assert np.isfinite(engine.logits([1, 199])).all()
        with pytest.raises(RequestError, match=r"token 200 is none of the 200 in tokenizer\.json"):
            engine.logits([1, 200])


def test_both_tables_lie_on_disk_one_behind_the_other(container: Path) -> None:
    container_, values = open_container(container), CASES[NAME].values()
    layout = container_.index.layout.ngrams
    assert layout is not None
    assert container_.index.required_features == ("blake3", "ngrams")
    assert layout.rows == sum(map(sum, HEAD_ROWS))
    table = np.concatenate([values[f"layers.{layer}.engram.embed.weight"] for layer in (1, 4)])
    numbers = [0, 303, 304, 305, len(table) - 1]
    with closing(EmbeddingRows(container_, layout)) as rows:
        assert np.array_equal(layout.encoding.decode(layout.views(rows.read(numbers))), table[numbers])


# ---- as published


def test_the_published_encodings_are_kept_to_the_bit(tmp_path: Path) -> None:
    """By default, at 8 bits for what stays in memory, which FP8 has: 280 bytes for a row of 256 of the real tables."""
    case = CASES["deepseek_v41_fp8"]
    out = converted(tmp_path, case, Options(4, 32, 8))
    assert verify_container(out, open_local(str(tmp_path / "source"))).sound
    index = open_container(out).index
    origins = read_origins(index.extensions, "index.json")
    assert origins is not None
    assert origins.ngrams == ("mxfp8", True)
    kinds = {name.partition(".")[2].partition(".")[2]: origin for name, origin in origins.resident.items()}
    for name in ("self_attn.q_a_proj", "self_attn.o_a_proj", "mlp.shared_experts.up_proj", "engram.wkv"):
        assert kinds[name] == ("fp8, e8m0 scales per 32 × 32", True)
    assert {origin for layer in origins.experts.values() for origin in layer} == {("mxfp4", True)}


@pytest.mark.parametrize("name", [name for name in CASES if "mlx" not in name])  # whose headers alone tell
def test_a_rehearsal_has_the_layout_of_the_checkpoint(name: str, tmp_path: Path) -> None:
    case, options = CASES[name], Options(16, 64, 16)
    write_checkpoint(tmp_path / "source", case.tensors(), case.config)
    rehearsal = prepare_rehearsal(read_geometry(tmp_path / "source" / "config.json"), options, 0)
    assert rehearsal.plan.layout == prepare(open_local(str(tmp_path / "source")), options).plan.layout
    convert(rehearsal, tmp_path / "out", hash_source=False)
    with Engine.open(tmp_path / "out") as engine:
        assert np.isfinite(engine.logits([1, 2, 3])).all()


# ---- sequences


@pytest.mark.parametrize("layer", [1, 5])
def test_a_step_that_fails_leaves_the_sessions_as_they_were(
    container: Path, backend: str, layer: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened(container, backend) as engine:
        expected = engine.logits(PROMPT)[-1]
        sessions = [engine.new_session(), engine.new_session()]
        engine.step([(session, PROMPT[:-13]) for session in sessions])
        experts = type(engine.ops).experts

        def fails(self: NumpyOps, at: int, *args: Any) -> Float32:
            if at == layer:
                raise StorageError("the experts")
            return experts(self, at, *args)

        with monkeypatch.context() as patch:
            patch.setattr(type(engine.ops), "experts", fails)
            for ids in (PROMPT[-13:], [7], [3, 1, 4, 1, 5, 9, 2, 6]):
                with pytest.raises(StorageError):
                    engine.step([(session, ids) for session in sessions])
        for session in sessions:
            (found,) = engine.step([(session, PROMPT[-13:])])
            assert np.abs(found - expected).max() < 1e-4


def test_no_chunk_size_changes_a_bit_of_a_long_sequence(container: Path) -> None:
    ids = np.random.default_rng(0).integers(0, 256, LONG).tolist()
    found = []
    for chunk_size, threads in ((LONG, 2), (517, 1), (64, 2)):
        with opened(container, "native", ctx_size=LONG, chunk_size=chunk_size, threads=threads) as engine:
            session = engine.new_session()
            logits = engine.prefill(session, ids[:-1])
            found.append(np.stack([logits, *engine.step([(session, ids[-1:])])]))
            forgot = [state.cache.first for state in session.states[:-1]]
    assert min(forgot) > 0
    assert all(np.array_equal(logits, found[0]) for logits in found)
