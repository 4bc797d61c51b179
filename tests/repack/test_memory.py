"""Peak memory of whole conversions of sparse sources that no computer could hold twice: under 400 MiB."""

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.repack.checkpoints import SMALL, shapes, write_sparse

ROOT = Path(__file__).parent.parent.parent
LIMIT_BYTES = 400 << 20
# Runs the command; the peak of the process goes to stderr (ru_maxrss: KiB on Linux, bytes on macOS).
PROGRAM = """
import atexit, resource, sys
from repack.cli import main
unit = 1 if sys.platform == "darwin" else 1024
atexit.register(lambda: sys.stderr.write(f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}\\n"))
main()
"""


def convert(tmp_path: Path, text: Mapping[str, Any], *options: str, **outer: Any) -> tuple[dict[str, Any], int]:
    """(what the command says, its peak memory in bytes) for a source of zeros."""
    listing = shapes(text)
    if outer.get("tie_word_embeddings"):
        del listing["lm_head.weight"]
    source = write_sparse(tmp_path / "source", text, listing, **outer)
    arguments = ["convert", str(source), str(tmp_path / "out"), "--no-hash-source", "--json", *options]
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout), int(result.stderr.splitlines()[-1])


@pytest.mark.slow
def test_experts_of_mixtral_8x22b_fit_into_400_mib(tmp_path: Path) -> None:
    text = SMALL | {
        "hidden_size": 6144,
        "moe_intermediate_size": 16384,
        "num_experts": 2,
        "num_hidden_layers": 1,
        "layer_types": ["full_attention"],
    }
    said, peak_bytes = convert(tmp_path, text)
    assert said["source_bytes"] > 2 * 3 * 6144 * 16384 * 2
    assert peak_bytes < LIMIT_BYTES


@pytest.mark.slow
def test_an_embedding_of_two_gigabytes_fits_into_400_mib(tmp_path: Path) -> None:
    text = SMALL | {
        "vocab_size": 248_320,
        "hidden_size": 4096,
        "num_hidden_layers": 1,
        "layer_types": ["full_attention"],
        "num_experts": 2,
    }
    said, peak_bytes = convert(tmp_path, text, tie_word_embeddings=True)
    assert said["source_bytes"] > 2 * 248_320 * 4096 * 2  # read for the embedding, and again for lm_head
    assert peak_bytes < LIMIT_BYTES
