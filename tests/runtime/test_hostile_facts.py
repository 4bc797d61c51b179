"""An index with one fact of the model changed, and signed anew: one clear line, or a run that ends as any other."""

import json
from collections.abc import Iterator
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest

from formats.errors import StreamingExpertsError
from formats.index import INDEX_FILE
from repack.convert import convert, prepare
from repack.plan import Options
from repack.sources import open_local
from runtime import Engine
from tests.containers import signed
from tests.fixtures import deepseek_tiny
from tests.fixtures.recipe import write_checkpoint
from tests.refusals import result_or_line
from tests.runtime.helpers import PLENTY
from tests.runtime.test_decoders import CASES, lossless_bits

EVERY = {**CASES, **deepseek_tiny.CASES}
# One of each kind of facts: the first case of every model_type of config.json.
FIRST = {case.config["model_type"]: name for name, case in reversed(EVERY.items())}
PROMPT = list(range(1, 20))


@pytest.fixture(scope="module", params=sorted(FIRST.values()))
def container(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, case = tmp_path_factory.mktemp("hostile"), EVERY[request.param]
    write_checkpoint(folder / "source", case.tensors(), case.config)
    source = open_local(str(folder / "source"))
    convert(prepare(source, Options(lossless_bits(request.param), 64, 16)), folder / "out", hash_source=False)
    return folder / "out"


def others(value: Any) -> list[Any]:
    """Values of the same type."""
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return [1, value + 1, 2 * value]
    if isinstance(value, float):
        return [0.0, -value, 1.0, 1e300]
    if value is None:
        return [1]
    return []


def changes(facts: dict[str, Any]) -> Iterator[tuple[dict[str, Any], str, Any]]:
    """(object, key, another value) of every number and switch, in nested objects too; and of lists."""
    for key, value in facts.items():
        if isinstance(value, dict):
            yield from changes(value)
        elif isinstance(value, list):
            shorter, turned, uniform = value[1:], value[::-1], value[:1] * len(value)
            yield from ((facts, key, other) for other in (shorter, turned, uniform) if other != value)
        else:
            yield from ((facts, key, other) for other in others(value) if other != value)


def test_a_changed_fact_is_refused_in_one_line_or_runs(container: Path) -> None:
    sound = (container / INDEX_FILE).read_bytes()
    content = json.loads(sound)

    def run(backend: str) -> int:
        with Engine.open(container, ram_bytes=PLENTY, backend=backend, ctx_size=64, threads=1) as engine:
            return len(engine.generate_ids(PROMPT, max_new_tokens=2, ignore_eos=True))

    refused = ran = 0
    for (place, key, other), backend in zip(list(changes(content["model"])), cycle(("numpy", "native"))):
        before, place[key] = place[key], other
        (container / INDEX_FILE).write_bytes(signed(content))
        place[key] = before
        result, line = result_or_line(run, backend)
        refused, ran = refused + bool(line), ran + (result == 2)
    assert refused > 40
    assert ran > 0
    (container / INDEX_FILE).write_bytes(sound)


@pytest.mark.parametrize("container", ["olmoe", "qwen3_moe", "muse_spark", "gpt_oss"], indirect=True)
def test_a_kind_of_layer_that_a_model_has_not_is_refused(container: Path) -> None:
    """Facts that agree with each other, and with no tensor."""
    sound = (container / INDEX_FILE).read_bytes()
    content = json.loads(sound)
    model = content["model"]
    content["model"] = model | {"conv_kernel_size": 3, "layer_types": ["conv", *model["layer_types"][1:]]}
    (container / INDEX_FILE).write_bytes(signed(content))
    with pytest.raises(StreamingExpertsError, match=r"index\.json: model\.\S+ is .*(which \w+ has not|expected .*)$"):
        Engine.open(container, ram_bytes=PLENTY)
    (container / INDEX_FILE).write_bytes(sound)
