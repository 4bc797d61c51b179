"""Decoders and hybrids, converted whole and run: logits, greedy ids and chosen experts are those of transformers."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from formats.dtypes import AnyArray
from repack.convert import convert, prepare
from repack.plan import Options
from repack.sources import open_local
from runtime import Engine
from tests.fixtures import (
    bailing_tiny,
    cohere_tiny,
    decoders_tiny,
    deepseek_v4_tiny,
    deepseek_v41_tiny,
    gemma_tiny,
    glm5_next_tiny,
    granite_tiny,
    hy_v4_tiny,
    hybrids_tiny,
    kimi_k3_tiny,
    kimi_linear_tiny,
    llama4_tiny,
    longcat_tiny,
    mimo_tiny,
    minimax_m3_tiny,
    mistral_large4_tiny,
    muse_spark_tiny,
    nemotron_tiny,
    phimoe_tiny,
    plain_tiny,
    qwen4_tiny,
    step_tiny,
    vision_tiny,
)
from tests.fixtures.recipe import digest, write_checkpoint
from tests.runtime.helpers import PLENTY, reference
from tests.runtime.numpy_parts import check_that_they_are_named

CASES: dict[str, Any] = {
    **decoders_tiny.CASES,
    **gemma_tiny.CASES,
    **glm5_next_tiny.CASES,
    **granite_tiny.CASES,
    **hy_v4_tiny.CASES,
    **hybrids_tiny.CASES,
    **deepseek_v4_tiny.CASES,
    **deepseek_v41_tiny.CASES,
    **kimi_k3_tiny.CASES,
    **bailing_tiny.CASES,
    **cohere_tiny.CASES,
    **kimi_linear_tiny.CASES,
    **llama4_tiny.CASES,
    **longcat_tiny.CASES,
    **mistral_large4_tiny.CASES,
    **mimo_tiny.CASES,
    **phimoe_tiny.CASES,
    **plain_tiny.CASES,
    **minimax_m3_tiny.CASES,
    **muse_spark_tiny.CASES,
    **nemotron_tiny.CASES,
    **qwen4_tiny.CASES,
    **step_tiny.CASES,
    **vision_tiny.CASES,
}
EXACT_AT_4 = (
    "gptq",
    "gptq_v2",
    "gptq_zero",
    "awq",
    "nvfp4",
    "mxfp4",
    "mlx",
)  # experts stay what they are at the default of 4 bits
LOGITS_TOLERANCE = 5e-4  # float32 sums in another order: measured below 5e-5


def lossless_bits(name: str) -> int:
    """--bits with which a case loses nothing."""
    return 4 if name.endswith(EXACT_AT_4) else 16


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The container of a checkpoint, everything as it arrives, and what transformers says of it."""
    tensors, expected = CASES[request.param].tensors(), reference(f"decoders/{request.param}.npz")
    assert digest(tensors) == expected["digest"], "the recipe changed: run make_decoders.py"
    folder = tmp_path_factory.mktemp(request.param)
    write_checkpoint(folder / "source", tensors, CASES[request.param].config)
    options = Options(lossless_bits(request.param), 64, 16)
    convert(prepare(open_local(str(folder / "source")), options), folder / "out", hash_source=False)
    return folder / "out", expected


@pytest.mark.parametrize("backend", ["numpy", "native"])
def test_logits_greedy_ids_and_experts_are_those_of_transformers(
    case: tuple[Path, dict[str, Any]], backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    container, expected = case
    chosen: list[AnyArray] = []
    prompt = expected["prompt_ids"].tolist()
    with Engine.open(container, ram_bytes=PLENTY, backend=backend, precision="exact", lookahead="off") as engine:
        ops = engine.steps.model.ops

        def watching(route: Any) -> Any:
            def watched(*args: Any) -> Any:
                ids, weights = route(*args)
                chosen.append(np.sort(ids, axis=1))
                return ids, weights

            return watched

        for name in ("route", "route_by_token"):
            monkeypatch.setattr(ops, name, watching(getattr(ops, name)))
        logits = engine.logits(prompt)
        assert np.array_equal(np.stack(chosen), expected["expert_ids"])
        greedy = engine.generate_ids(prompt, max_new_tokens=16, ignore_eos=True)
    assert np.abs(logits - expected["logits"]).max() < LOGITS_TOLERANCE
    assert greedy == expected["greedy_ids"].tolist()


def test_no_chunk_size_changes_a_bit_of_native_logits(case: tuple[Path, dict[str, Any]]) -> None:
    container, expected = case
    found = []
    for chunk_size, threads in ((1000, 1), (1, 2), (7, 1), (7, 2)):
        options: dict[str, Any] = {"backend": "native", "chunk_size": chunk_size, "threads": threads}
        with Engine.open(container, ram_bytes=PLENTY, **options) as engine:
            found.append(engine.logits(expected["prompt_ids"].tolist()))
    assert all(np.array_equal(logits, found[0]) for logits in found)


@pytest.mark.parametrize("chunk_size", [1, 7, 20])
def test_every_chunk_size_gives_the_logits_of_the_whole(case: tuple[Path, dict[str, Any]], chunk_size: int) -> None:
    container, expected = case
    with Engine.open(container, ram_bytes=PLENTY, backend="numpy", chunk_size=chunk_size) as engine:
        logits = engine.logits(expected["prompt_ids"].tolist())
    assert np.abs(logits - expected["logits"]).max() < LOGITS_TOLERANCE


def test_sequences_that_share_a_step_get_the_native_logits_that_they_get_alone(
    case: tuple[Path, dict[str, Any]],
) -> None:
    container, expected = case
    prompt = expected["prompt_ids"].tolist()
    parts = prompt[:20], prompt[20:37]
    with Engine.open(container, ram_bytes=PLENTY, backend="native") as engine:
        alone = [engine.logits(part)[-1] for part in parts]
        sessions = [engine.steps.new_session() for _ in parts]
        engine.steps.step([(session, part[:7]) for session, part in zip(sessions, parts, strict=True)])
        together = engine.steps.step([(session, part[7:]) for session, part in zip(sessions, parts, strict=True)])
    assert all(np.array_equal(one, other) for one, other in zip(alone, together, strict=True))


def test_what_numpy_computes_beside_the_kernels_is_named_and_said_once(
    case: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    container, expected = case
    check_that_they_are_named(container, expected["prompt_ids"].tolist(), monkeypatch)
