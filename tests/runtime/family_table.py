"""Makes docs/FAMILIES.md: every whole run against another implementation, what it met, and the lines of a family.

    python -m tests.runtime.family_table  # a minute; tests/runtime/test_family_table.py says when it is out of date

A case is a tiny checkpoint with published names (tests/fixtures), converted without loss and run on both backends.
"""

import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from formats.config import read_config
from formats.container import open_container
from formats.origins import read_origins
from repack.convert import convert, prepare
from repack.plan import Options
from repack.sources import open_local
from repack.supported import numpy_markdown
from runtime import Engine
from tests.fixtures import deepseek_tiny
from tests.fixtures.recipe import write_checkpoint
from tests.runtime.helpers import FIXTURES, PLENTY, reference
from tests.runtime.test_decoders import CASES, lossless_bits

ROOT = Path(__file__).resolve().parents[2]
TABLE = ROOT / "docs" / "FAMILIES.md"
DECODERS, DEEPSEEK, QWEN3_5 = (f"tests/runtime/test_{name}.py" for name in ("decoders", "deepseek", "reference"))
RECIPES: Mapping[str, tuple[Any, str]] = {
    **{name: (case, DECODERS) for name, case in CASES.items()},
    **{name: (case, DEEPSEEK) for name, case in deepseek_tiny.CASES.items()},
}
FOLDERS = {"fused": "reference.npz", "per_expert": "reference.npz", "qwen3_moe": "qwen3_moe/reference.npz"}
HEAD = """# Families as tested

Made by `python -m tests.runtime.family_table`; `tests/runtime/test_family_table.py` tells when a case is missing.

Each row is a tiny checkpoint with published names, converted without loss and run whole.
The errors are the largest of the logits of 48 tokens, which have a standard deviation of about 2.
They are against transformers 5.23, or 5.24 where the README says so, in float32 on the decoded weights.
Greedy ids and chosen experts are equal in each.
Native kernels compute with `--precision exact`.
Those of Kimi K3 and DeepSeek-V4.1 are against mlx-lm 0.32.2, as transformers has no such models.
Their last digits depend on the machine; the tests allow 5e-4, and 2e-3 for Qwen3.5 MoE and Qwen3-Next.

| case | model_type | experts arrive as | and are kept as | exact | error on NumPy | on native kernels | test |
| --- | --- | --- | --- | --- | --- | --- | --- |
"""


BESIDE = "## In NumPy beside the native kernels\n\n`stream-run` says so once of a model that has any of it.\n\n"


class Row(NamedTuple):
    case: str
    model_type: str
    arrives_as: str
    kept_as: str
    exact: str
    numpy_error: str
    native_error: str
    test: str


def rows() -> Iterator[Row]:
    for name, (case, test) in RECIPES.items():
        with tempfile.TemporaryDirectory() as folder:
            write_checkpoint(Path(folder) / "source", case.tensors(), case.config)
            yield _row(name, Path(folder) / "source", reference(f"decoders/{name}.npz"), test, lossless_bits(name))
    for name, file in FOLDERS.items():
        yield _row(f"{name}/", FIXTURES / name, reference(file), QWEN3_5, 16)


def _row(name: str, source: Path, expected: Mapping[str, Any], test: str, bits: int) -> Row:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        convert(prepare(open_local(str(source)), Options(bits, 64, 16)), out, hash_source=False)
        index = open_container(out).index
        origins = read_origins(index.extensions, "index.json")
        assert origins is not None
        experts = {origin for layer in origins.experts.values() for origin in layer}
        exact = all(origin.exact for origin in (*experts, *origins.resident.values()))
        parts = {part.encoding.id for _, layer in index.layout.moe_layers() for part in layer.record.parts}
        errors = []
        for backend in ("numpy", "native"):
            with Engine.open(out, ram_bytes=PLENTY, backend=backend, precision="exact") as engine:
                logits = engine.logits(expected["prompt_ids"].tolist())
            errors.append(f"{np.abs(logits - expected['logits']).max():.0e}")
        arrives = ", ".join(sorted({origin.encoding for origin in experts}))
        model_type = read_config((source / "config.json").read_bytes()).model_type
        return Row(
            name, model_type, arrives, ", ".join(sorted(parts)), "yes" if exact else "no", errors[0], errors[1], test
        )


def lines_of_families() -> Iterator[tuple[str, str]]:
    """(file, its lines) of what reads a config and computes a model; a family's tensors are rows of one table."""
    for folder in ("formats/config", "runtime/models"):
        for path in sorted((ROOT / folder).glob("*.py")):
            if path.name != "__init__.py":
                yield str(path.relative_to(ROOT)), str(len(path.read_text(encoding="utf-8").splitlines()))


def main() -> None:
    table = "".join(f"| {' | '.join(row)} |\n" for row in rows())
    lines = "".join(f"| `{file}` | {count} |\n" for file, count in lines_of_families())
    beside = f"{BESIDE}{numpy_markdown()}\n"
    TABLE.write_text(f"{HEAD}{table}\n{beside}\n## Lines\n\n| file | lines |\n| --- | --- |\n{lines}", encoding="utf-8")


if __name__ == "__main__":
    main()
