"""Peak memory of whole conversions of sparse sources that no computer could hold twice: under 400 MiB."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from repack.sources.ahead import WINDOW_BYTES
from tests.repack.checkpoints import SMALL, shapes, write_sparse
from tests.repack.hub_kills import Watch, disk_bytes
from tests.repack.hub_server import serve

ROOT = Path(__file__).parent.parent.parent
LIMIT_BYTES = 400 << 20
CLIENT_BYTES = 128 << 20  # huggingface_hub with all that it imports, and threads of connections
# Runs the command; the peak of the process goes to stderr (getrusage would tell of the parent too, if that was larger).
PROGRAM = """
import atexit, sys
from formats.memory import peak_memory_bytes
from repack.cli import main
atexit.register(lambda: sys.stderr.write(f"{peak_memory_bytes()}\\n"))
main()
"""


def run(*arguments: str | Path, **environment: str) -> tuple[dict[str, Any], int]:
    """(what a conversion says, its peak memory in bytes)."""
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, "convert", *map(str, arguments), "--json"],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout), int(result.stderr.splitlines()[-1])


def convert(tmp_path: Path, text: Mapping[str, Any], *options: str, **outer: Any) -> tuple[dict[str, Any], int]:
    """(what the command says, its peak memory in bytes) for a source of zeros."""
    listing = shapes(text)
    if outer.get("tie_word_embeddings"):
        del listing["lm_head.weight"]
    source = write_sparse(tmp_path / "source", text, listing, **outer)
    return run(source, tmp_path / "out", "--no-hash-source", *options)


def test_from_a_hub_memory_and_disk_are_bounded_as_from_a_folder(
    tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    text = SMALL | {"hidden_size": 2048, "moe_intermediate_size": 768, "num_experts": 40, "num_hidden_layers": 2}
    source = write_sparse(tmp_path / "source", text, shapes(text))
    said, local_bytes = run(source, tmp_path / "local", "--no-hash-source")
    assert said["source_bytes"] > 700e6
    watch = Watch(tmp_path / "out")
    watch.start()
    with serve(source) as hub:
        environment = {
            "HF_ENDPOINT": hub.address,
            "HF_HOME": str(tmp_path / "cache"),
            "NO_PROXY": "127.0.0.1,localhost",
        }
        said, hub_bytes = run("org/tiny", tmp_path / "out", **environment)
    watch.ended.set()
    watch.join()
    beyond = watch.peak_bytes - disk_bytes(tmp_path / "out")
    record_property("measured", {"folder": local_bytes, "hub": hub_bytes, "disk beyond the output": beyond})
    assert hub_bytes < local_bytes + WINDOW_BYTES + CLIENT_BYTES
    assert beyond < 2 << 30


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
