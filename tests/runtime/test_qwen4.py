"""Qwen3.8-Flash-Next: what its operations mean, its table of n-grams on disk, and sequences beside each other."""

import json
import shutil
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from formats.checksum import xxh3_64
from formats.config import NGrams, read_config
from formats.container import open_container
from formats.dtypes import Float32
from formats.errors import ChecksumError, FormatError
from formats.index import canonical_json
from formats.layout import NGRAM_FILE
from formats.origins import read_origins
from repack.convert import convert, prepare
from repack.plan import Options
from repack.published import published_tensors
from repack.sources import open_local
from repack.verify import verify_container
from runtime import Engine
from runtime.backends.base import Ops
from runtime.models.ngrams import ngram_rows
from runtime.store import EmbeddingRows
from tests.fixtures.qwen4_tiny import CASES, HEAD_ROWS, MULTIPLIERS, TABLE_ROWS, TEXT
from tests.fixtures.recipe import write_checkpoint
from tests.formats.test_format_md import block
from tests.runtime.helpers import PLENTY

EOS = TEXT["eos_token_id"]
NGRAMS = NGrams(2, 3, 2, 128, 4, 100, 32, 4, 1234, EOS)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("qwen4") / "source"
    write_checkpoint(folder, CASES["qwen4_exp"].tensors(), CASES["qwen4_exp"].config)
    return folder


@pytest.fixture(scope="module")
def container(source: Path) -> Path:
    convert(prepare(open_local(str(source)), Options(16, 64, 16)), source.parent / "out", hash_source=False)
    return source.parent / "out"


# ---- n-grams


def test_rows_of_n_grams_are_hashes_by_head() -> None:
    (rows,) = ngram_rows(NGRAMS, 64, [5, 9, 7])
    two = 7 * MULTIPLIERS[0] ^ 9 * MULTIPLIERS[1]
    three = two ^ 5 * MULTIPLIERS[2]
    expected = [two % 101, 101 + two % 103, 204 + three % 107, 311 + three % 109]
    assert rows == expected
    assert sum(HEAD_ROWS) == 101 + 103 + 107 + 109 <= TABLE_ROWS == NGRAMS.rows


@pytest.mark.parametrize(
    ("history", "as_if"),
    [([5, EOS, 7], [EOS, EOS, 7]), ([EOS, 9, 7], [EOS, 9, 7]), ([5, 9, EOS], [5, 9, EOS])],
)
def test_no_n_gram_reaches_across_the_end_of_a_text(history: list[int], as_if: list[int]) -> None:
    plain = NGrams(2, 3, 2, 128, 4, 100, 32, 4, 1234, 63)  # for which EOS ends nothing
    assert ngram_rows(NGRAMS, 64, history) == ngram_rows(plain, 64, as_if)


def test_the_table_lies_on_disk_and_its_rows_are_those_of_the_shards(container: Path) -> None:
    opened = open_container(container)
    layout = opened.index.layout.ngrams
    assert layout is not None
    assert opened.index.required_features == ("blake3", "ngrams")
    at = "model.layers.1.ple.ple_embedding.ngram_embedding.shard_{}.weight"
    values = CASES["qwen4_exp"].values()
    table = np.concatenate([values[at.format(shard)] for shard in range(4)])
    with closing(EmbeddingRows(opened, layout)) as rows:
        found = layout.encoding.decode(layout.views(rows.read([0, 111, 112, 113, 447])))
    assert np.array_equal(found, table[[0, 111, 112, 113, 447]])
    origins = read_origins(opened.index.extensions, "index.json")
    assert origins is not None
    assert origins.ngrams == ("bf16", True)


def test_an_fp8_table_is_kept_with_the_scale_that_its_shards_share(tmp_path: Path) -> None:
    """By default, at 8 bits, which FP8 has; as the published FP8 checkpoint is."""
    case = CASES["qwen4_exp_fp8"]
    write_checkpoint(tmp_path / "source", case.tensors(), case.config)
    convert(prepare(open_local(str(tmp_path / "source")), Options(4, 32, 8)), tmp_path / "out", hash_source=False)
    opened = open_container(tmp_path / "out")
    layout, origins = opened.index.layout.ngrams, read_origins(opened.index.extensions, "index.json")
    assert layout is not None
    assert origins is not None
    assert origins.ngrams == ("fp8, bf16 scales per tensor", True)
    at = "model.layers.1.ple.ple_embedding.ngram_embedding.shard_{}.weight"
    table = np.concatenate([case.values()[at.format(shard)] for shard in range(4)])
    with closing(EmbeddingRows(opened, layout)) as rows:
        found = layout.encoding.decode(layout.views(rows.read([0, 111, 112, 447])))
    assert np.array_equal(found, table[[0, 111, 112, 447]])


def test_the_reader_of_the_format_reads_the_same_rows(container: Path) -> None:
    reader: dict[str, Any] = {}
    exec(compile(block("python"), "FORMAT.md", "exec"), reader)
    index = reader["open_index"](container)
    layout = open_container(container).index.layout.ngrams
    assert layout is not None
    raw = np.fromfile(container / NGRAM_FILE, np.uint8)[: layout.rows * layout.row_bytes]
    expected = layout.encoding.decode(layout.views(raw.reshape(layout.rows, layout.row_bytes)))
    for row in (0, 112, 447):
        assert np.array_equal(reader["embedding_row"](container, index, row, "ngrams"), expected[row])


def test_a_damaged_row_is_found_by_verify_and_by_the_engine(source: Path, container: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(container, tmp_path / "out")
    assert verify_container(folder, open_local(str(source))).num_damage == 0
    raw = bytearray((folder / NGRAM_FILE).read_bytes())
    layout = open_container(folder).index.layout.ngrams
    assert layout is not None
    for row in range(layout.rows):
        raw[row * layout.row_bytes] ^= 1
    (folder / NGRAM_FILE).write_bytes(raw)
    damage = [str(entry) for entry in verify_container(folder).damage]
    assert any(NGRAM_FILE in entry and "row 0" in entry for entry in damage), damage
    with (
        Engine.open(folder, ram_bytes=PLENTY) as engine,
        pytest.raises(ChecksumError, match=rf"{NGRAM_FILE}: row \d+ has checksum"),
    ):
        engine.logits([3, 4, 5])


def test_a_table_of_another_length_is_refused(source: Path, tmp_path: Path) -> None:
    case = CASES["qwen4_exp"]
    config = case.config | {"text_config": case.text | {"ngram_vocab_size_base": 90}}
    write_checkpoint(tmp_path / "source", case.tensors(), config)
    with pytest.raises(FormatError, match=r"ngram_embedding.shard_0.weight .*shape"):
        prepare(open_local(str(tmp_path / "source")), Options(16, 64, 16))


def test_an_index_that_does_not_name_its_feature_is_refused(container: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(container, tmp_path / "out")
    content = json.loads((folder / "index.json").read_bytes())
    content["required_features"] = ["blake3"]
    del content["checksum"]
    content["checksum"] = xxh3_64(canonical_json(content))
    (folder / "index.json").write_bytes(canonical_json(content))
    with pytest.raises(
        FormatError, match=r"required_features is \['blake3'\], expected ngrams exactly for models that have"
    ):
        open_container(folder)


# ---- operations


def chosen_by_definition(q: Float32, keys: Float32, position: int, block: int, top_k: int) -> list[set[int]]:
    """Tokens that each of the tokens q [T, H, d] sees, keys [blocks, d]; the sum over heads in float64."""
    result = []
    for i, token in enumerate(q.astype(np.float64)):
        whole = (position + i + 1) // block
        scores = [-np.maximum(token @ key, 0).sum() for key in keys[:whole].astype(np.float64)]
        best = np.argsort(scores, kind="stable")[:top_k]
        seen = {int(b) * block + t for b in best for t in range(block)}
        result.append(seen | set(range(whole * block, position + i + 1)))
    return result


def ops_of(container: Path, backend: str) -> Engine:
    return Engine.open(container, ram_bytes=PLENTY, backend=backend)


@pytest.mark.parametrize("backend", ["numpy", "native"])
@pytest.mark.parametrize("steps", [[50], [1] * 50, [3, 30, 17]])
def test_blocks_are_chosen_as_defined_however_a_sequence_is_cut(
    container: Path, backend: str, steps: Sequence[int]
) -> None:
    rng, block, top_k = np.random.default_rng(0), 4, 3
    q = rng.standard_normal((50, 5, 8), np.float32)
    keys = rng.standard_normal((12, 8), np.float32)
    with ops_of(container, backend) as engine:
        ops: Ops = engine.ops
        cache, position, found = ops.new_index_cache(8), 0, []
        for tokens in steps:
            new = keys[position // block : (position + tokens) // block]
            weights = np.ones((tokens, 5), np.float32)
            seen = [(position + i + 1) // block for i in range(tokens)]
            chosen, cache = ops.select_tokens(q[position : position + tokens], new, weights, cache, top_k, seen)
            selection = ops.block_tokens(chosen, position, block)
            assert selection.shape == (tokens, position + tokens)
            found += [
                {int(t) for t in np.flatnonzero(row[: position + i + 1])} for i, row in enumerate(selection)
            ]  # later tokens attention hides itself
            position += tokens
    assert found == chosen_by_definition(q, keys, 0, block, top_k)


@pytest.mark.parametrize("backend", ["numpy", "native"])
def test_attention_to_a_selection_is_attention_without_the_others(container: Path, backend: str) -> None:
    rng = np.random.default_rng(1)
    q, k, v = (rng.standard_normal((9, heads, 16), np.float32) for heads in (4, 2, 2))
    kept = np.array([0, 3, 4, 8])
    selection = np.zeros((9, 9), np.bool_)
    selection[:, kept] = True
    with ops_of(container, backend) as engine:
        ops: Ops = engine.ops
        found, _ = ops.attention(q, k, v, ops.new_kv_cache(2, 16), 0.3, selection=selection)
        expected, _ = ops.attention(q[kept], k[kept], v[kept], ops.new_kv_cache(2, 16), 0.3)
    assert found[kept] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("backend", ["numpy", "native"])
def test_the_gate_of_n_grams_takes_a_signed_root(container: Path, backend: str) -> None:
    rng = np.random.default_rng(2)
    x, y = (rng.standard_normal((3, 4, 64), np.float32) for _ in range(2))
    y[0, 0] = 0
    d = (x.astype(np.float64) * y).sum(-1, keepdims=True) / 8
    root = np.sign(d) * np.sqrt(np.maximum(np.abs(d), 1e-6))
    with ops_of(container, backend) as engine:
        assert engine.ops.root_gate(x, y) == pytest.approx(1 / (1 + np.exp(-root)), abs=1e-6)


@pytest.mark.parametrize("backend", ["numpy", "native"])
def test_what_a_prompt_leaves_of_an_indexer_is_the_keys_of_its_last_tokens(container: Path, backend: str) -> None:
    with ops_of(container, backend) as engine:
        session = engine.new_session()
        engine.prefill(session, list(range(3, 50)))  # 47 tokens, of which blocks of 4 leave 3
        left = [state[2] for state in session.states[:-1] if len(state) == 3]
    assert left
    for keys in left:
        assert len(keys) == 3
        assert keys.base is None  # no view that holds those of the whole prompt


# ---- the checkpoint


def test_a_config_alone_tells_the_tensors_of_the_checkpoint() -> None:
    case = CASES["qwen4_exp"]
    config = read_config(json.dumps(case.config).encode())
    told = {tensor.name: tensor.shape for tensor in published_tensors(config, None)}
    stored = {name: tensor.shape for name, tensor in case.tensors().items()}
    others = ("model.visual.", "mtp.")
    hashes = ("layer_multipliers", "ngram_heads_offsets", "ngram_heads_vocab_sizes")
    assert told == {n: s for n, s in stored.items() if not n.startswith(others) and not n.endswith(hashes)}
