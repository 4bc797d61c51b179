"""DeepSeek-V3 and V3.2, Kimi K2, GLM-4.7-Flash and GLM-5 against transformers, after the whole convert and run."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from formats.config import DeepseekV3Config
from repack.convert import convert, prepare
from repack.plan import Options
from repack.sources import open_local
from runtime import Engine
from runtime.backends import native_latent
from runtime.backends.native_ops import NativeOps
from runtime.backends.numpy_ops import NumpyOps
from tests.fixtures.deepseek_tiny import CASES, has_indexer
from tests.fixtures.recipe import digest, write_checkpoint
from tests.runtime.helpers import PLENTY, reference
from tests.runtime.numpy_parts import check_that_they_are_named

TOLERANCE = 5e-4  # float32 in another order, absorbed latents against expanded keys; logits have a deviation of 2
BACKENDS = ("numpy", "native")


@pytest.fixture(scope="module", params=CASES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def container(name: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny checkpoint, converted without loss."""
    folder = tmp_path_factory.mktemp(name)
    case = CASES[name]
    tensors = case.tensors()
    assert digest(tensors) == str(reference(f"decoders/{name}.npz")["digest"])
    write_checkpoint(folder / "source", tensors, case.config)
    convert(prepare(open_local(str(folder / "source")), Options(16, 64, 16)), folder / "out", hash_source=False)
    return folder / "out"


@pytest.fixture(scope="module")
def expected(name: str) -> dict[str, Any]:
    return reference(f"decoders/{name}.npz")


def test_the_logits_are_those_of_transformers(container: Path, expected: dict[str, Any], backend: str) -> None:
    with Engine.open(container, ram_bytes=PLENTY, backend=backend, precision="exact") as engine:
        found = engine.logits(expected["prompt_ids"].tolist())
    assert float(np.abs(found - expected["logits"]).max()) <= TOLERANCE


def test_it_continues_greedily_as_transformers_does(container: Path, expected: dict[str, Any], backend: str) -> None:
    with Engine.open(container, ram_bytes=PLENTY, backend=backend, precision="exact") as engine:
        found = engine.generate_ids(expected["prompt_ids"].tolist(), max_new_tokens=16, ignore_eos=True)
    assert found == expected["greedy_ids"].tolist()


def test_tokens_go_to_the_experts_of_transformers(
    container: Path, expected: dict[str, Any], backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    experts = NumpyOps.experts if backend == "numpy" else NativeOps.experts
    kind = NumpyOps if backend == "numpy" else NativeOps

    def watched(self: Any, layer: int, x: Any, expert_ids: Any, weights: Any) -> Any:
        seen.append(np.sort(expert_ids, axis=1))
        return experts(self, layer, x, expert_ids, weights)

    monkeypatch.setattr(kind, "experts", watched)
    with Engine.open(container, ram_bytes=PLENTY, backend=backend, precision="exact") as engine:
        engine.logits(expected["prompt_ids"].tolist())
    assert np.array_equal(np.stack(seen), expected["expert_ids"])


def test_no_chunk_size_changes_a_bit_of_native_logits(container: Path, expected: dict[str, Any]) -> None:
    found = []
    for chunk_size, threads in ((1000, 1), (1, 2), (7, 1), (7, 2)):
        options: dict[str, Any] = {"backend": "native", "chunk_size": chunk_size, "threads": threads}
        with Engine.open(container, ram_bytes=PLENTY, **options) as engine:
            found.append(engine.logits(expected["prompt_ids"].tolist()))
    assert all(np.array_equal(logits, found[0]) for logits in found)


def test_no_number_of_tokens_that_are_absorbed_at_a_time_changes_a_bit(
    container: Path, expected: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt, found = expected["prompt_ids"].tolist(), []
    with Engine.open(container, ram_bytes=PLENTY, backend="native") as engine:
        c = engine.config
        assert isinstance(c, DeepseekV3Config)
        for tokens in (len(prompt), 1, 7):
            monkeypatch.setattr(native_latent, "ABSORBED_VALUES", tokens * c.absorbed_values_per_token)
            found.append(engine.logits(prompt))
    assert all(np.array_equal(logits, found[0]) for logits in found)


def test_what_numpy_computes_beside_the_kernels_is_named_and_said_once(
    container: Path, expected: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    check_that_they_are_named(container, expected["prompt_ids"].tolist(), monkeypatch)


@pytest.mark.parametrize("chunk_size", [1, 7, 16])
def test_every_chunk_size_gives_the_logits_of_the_whole(
    container: Path, expected: dict[str, Any], chunk_size: int
) -> None:
    with Engine.open(container, ram_bytes=PLENTY, backend="numpy", chunk_size=chunk_size) as engine:
        found = engine.logits(expected["prompt_ids"].tolist())
    assert float(np.abs(found - expected["logits"]).max()) <= TOLERANCE


def test_the_cache_holds_latents_and_keys_of_indexers_alone(container: Path, name: str) -> None:
    text = CASES[name].text
    with Engine.open(container, ram_bytes=PLENTY, backend="numpy") as engine:
        per_layer = text["kv_lora_rank"] + text["qk_rope_head_dim"]
        indexed = sum(has_indexer(text, layer) for layer in range(text["num_hidden_layers"]))
        expected = text["num_hidden_layers"] * per_layer + indexed * text.get("index_head_dim", 0)
        assert engine.ctx_size % 16 == 0
        assert engine.terms.kv_bytes == 4 * engine.ctx_size * expected


def test_what_arrives_quantized_is_kept_as_it_is(tmp_path: Path) -> None:
    """By default: INT4 experts stay INT4, FP8 experts become affine 4, or stay FP8 when 8 bits are asked for."""
    found = {}
    for name, options in (
        ("kimi_k25_int4", Options(4, 32, 8)),
        ("deepseek_v3_fp8", Options(4, 32, 8)),
        ("deepseek_v3_fp8", Options(8, 32, 8)),
    ):
        write_checkpoint(tmp_path / name, CASES[name].tensors(), CASES[name].config)
        plan = prepare(open_local(str(tmp_path / name)), options).plan
        layer = next(layer for _, layer in plan.layout.moe_layers())
        found[name, options.bits] = layer.record.parts[0].encoding.id
    assert found == {
        ("kimi_k25_int4", 4): "symmetric",
        ("deepseek_v3_fp8", 4): "affine",
        ("deepseek_v3_fp8", 8): "fp8",
    }


def test_what_the_indexer_leaves_out_is_not_seen(tmp_path: Path) -> None:
    """With an indexer that may choose every token the logits are others, but for the first index_topk positions."""
    case, expected = CASES["deepseek_v32"], reference("decoders/deepseek_v32.npz")
    write_checkpoint(tmp_path / "source", case.tensors(), case.config | {"index_topk": 1000})
    convert(prepare(open_local(str(tmp_path / "source")), Options(16, 64, 16)), tmp_path / "out", hash_source=False)
    with Engine.open(tmp_path / "out", ram_bytes=PLENTY, backend="numpy") as engine:
        error = np.abs(engine.logits(expected["prompt_ids"].tolist()) - expected["logits"]).max(axis=1)
    assert error[:12].max() <= TOLERANCE
    assert error[13:].max() > 0.1
