"""`repack plan` of a repository: it fetches small files and headers, no more, and says how much that was."""

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from formats.dtypes import AnyArray
from repack.sources import demo_folder
from repack.sources.hub import FIRST_BYTES
from tests.gguf_files import write_gguf
from tests.repack.checkpoints import (
    QWEN3_5_397B,
    SMALL,
    Shapes,
    config_json,
    read_tree,
    shapes,
    write_random,
    write_shard,
)
from tests.repack.hub_server import serve
from tests.repack.test_gguf_k_quants import METADATA, kind_of, qwen3_shapes, random_k_blocks
from tests.repack.test_hub import Client

QWEN3_235B: dict[str, Any] = QWEN3_5_397B | {
    "num_hidden_layers": 94,
    "layer_types": ["full_attention"] * 94,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 1536,
}


def plan(client: Client, *args: str) -> dict[str, Any]:
    done = client.run("plan", "org/tiny", "--no-probe", "--json", "--ram", "300GiB", *args)
    assert done.stdout, done.stderr
    report: dict[str, Any] = json.loads(done.stdout)
    return report


def test_a_fused_repository_is_planned_from_its_headers(tmp_path: Path) -> None:
    folder = write_random(tmp_path / "source", SMALL, shapes(SMALL), shards=2)
    tokenizer = (demo_folder() / "tokenizer.json").read_bytes()
    (folder / "tokenizer.json").write_bytes(tokenizer)
    with serve(folder) as hub:
        client = Client(hub, tmp_path / "cache", tmp_path / "out")
        report = plan(client, "--connections", "2", "--patience", "1")
        assert {(first, nbytes) for _, first, nbytes in hub.ranges} == {(0, FIRST_BYTES)}
        small = ("config.json", "model.safetensors.index.json", "tokenizer.json")
        expected = hub.sent_bytes + sum((folder / name).stat().st_size for name in small)
        assert report["fetched_bytes"] == expected < 10_000_000
        assert report["tokenizer_is_known"]
        text = client.run("plan", "org/tiny", "--no-probe", "--ram", "300GiB").stdout
        assert "fetched for this plan" in text
    assert not client.out.exists()


def test_a_tokenizer_that_cannot_be_used_is_refused_before_any_weight_is_fetched(tmp_path: Path) -> None:
    folder = write_random(tmp_path / "source", SMALL, shapes(SMALL), shards=2)
    (folder / "tokenizer.json").write_bytes(b"{}")
    with serve(folder) as hub:
        done = Client(hub, tmp_path / "cache", tmp_path / "out").run("plan", "org/tiny", "--no-probe")
        assert {(first, nbytes) for _, first, nbytes in hub.ranges} == {(0, FIRST_BYTES)}
    assert done.returncode == 1
    assert done.stderr.startswith("error: tokenizer.json: is no working tokenizer")
    assert done.stderr.count("\n") == 1


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_the_headers_of_94_shards_of_single_experts_are_under_64_mb(tmp_path: Path) -> None:
    folder, parts = tmp_path / "source", defaultdict[str, Shapes](dict)
    folder.mkdir()
    (folder / "config.json").write_bytes(config_json(QWEN3_235B))
    for name, spec in shapes(QWEN3_235B, fused=False).items():
        layer = int(name.split(".layers.")[1].split(".")[0]) if ".layers." in name else 0
        parts[f"model-{layer + 1:05d}-of-00094.safetensors"][name] = spec
    weight_map = {name: shard for shard, part in parts.items() for name in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    with serve(folder) as hub:
        for shard, part in parts.items():
            write_shard(folder / shard, part)
            hub.hashes[str(folder / shard), (folder / shard).stat().st_mtime_ns] = "0" * 64  # nobody reads 470 GB
        report = plan(Client(hub, tmp_path / "cache", tmp_path / "out"))
        weights = sum((folder / shard).stat().st_size for shard in parts)
        assert report["weights_bytes"] == pytest.approx(weights, rel=1e-3)
        assert len({file for file, _, _ in hub.ranges}) == len(parts) == 94
        assert hub.sent_bytes < report["fetched_bytes"] < 64_000_000


def test_a_gguf_file_of_mixed_small_types_is_planned_from_its_header_as_it_is_converted(tmp_path: Path) -> None:
    metadata = METADATA | {"qwen3moe.expert_count": 32}
    kinds: dict[str, gguf.GGMLQuantizationType] = {}
    blocks: dict[str, AnyArray] = {}
    for name, shape in qwen3_shapes(metadata).items():
        if len(shape) == 1 or "gate_inp" in name:
            blocks[name] = np.ones(shape, np.float32)
        else:
            kinds[name] = kind_of(name, None)
            blocks[name] = random_k_blocks(kinds[name], shape, len(kinds))
    (tmp_path / "source").mkdir()
    path = write_gguf(tmp_path / "source" / "tiny-UD-Q2_K_XL.gguf", metadata, blocks, kinds=kinds)
    with serve(path.parent) as hub:
        client = Client(hub, tmp_path / "cache", tmp_path / "out")
        done = client.run("plan", "org/tiny:UD-Q2_K_XL", "--no-probe", "--json", "--ram", "300GiB")
        assert done.stdout, done.stderr
        planned: dict[str, Any] = json.loads(done.stdout)
        assert hub.sent_bytes == planned["fetched_bytes"] <= 2 << 20 < path.stat().st_size / 2
        assert client.run("convert", "org/tiny:UD-Q2_K_XL", str(client.out)).returncode == 0
        converted: dict[str, Any] = json.loads(client.run("inspect", str(client.out), "--json").stdout)

    assert planned["weights_bytes"] == sum(block.nbytes for block in blocks.values())
    assert all(part["exact"] for part in planned["parts"])
    experts = [part for part in planned["parts"] if part["part"].startswith("experts ")]
    assert {(part["part"], part["source"]): part["bits_per_weight"] for part in experts} == {
        ("experts gate", "ggml IQ2_XXS, 2.0625 bits"): 3.3125,  # grids are written out
        ("experts gate", "ggml Q2_K"): 2.625,
        ("experts up", "ggml IQ1_M, 1.75 bits"): 3.5625,
        ("experts up", "ggml IQ3_XXS, 3.0625 bits"): 4.3125,
        ("experts down", "ggml Q3_K, 3.4375 bits"): 3.5625,
        ("experts down", "ggml IQ4_XS, 4.25 bits"): 4.3125,
    }
    for key in ("parts", "records", "total_bytes", "bits_per_weight", "experts_file_bytes", "resident_file_bytes"):
        assert planned[key] == converted[key], key
    written = {name: len(raw) for name, raw in read_tree(client.out).items() if name.endswith(".bin")}
    assert sum(written.values()) == planned["total_bytes"]
