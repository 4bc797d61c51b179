"""A repository on the hub: huggingface_hub's real client against a hub on loopback, in a process of its own."""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from formats.container import open_container
from repack.convert import convert, prepare
from repack.plan import Options
from repack.sources.folder import FolderSource
from tests.repack.checkpoints import SMALL, read_tree, shapes, write_random
from tests.repack.hub_server import COMMIT, serve

ROOT = Path(__file__).parent.parent.parent
SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]


class Hub(NamedTuple):
    """A hub with the repository org/tiny, and a cache that begins empty."""

    folder: Path
    cache: Path
    address: str
    requests: list[str]

    def run(self, *args: str, address: str | None = None, **environment: str) -> "subprocess.CompletedProcess[str]":
        own = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        own |= {
            "HF_ENDPOINT": address or self.address,
            "HF_HOME": str(self.cache),
            "NO_PROXY": "127.0.0.1",
            **environment,
        }
        command = [sys.executable, "-m", "repack.cli", "convert", *args]
        return subprocess.run(command, cwd=ROOT, env=own, capture_output=True, text=True, check=False)

    def downloads(self) -> list[str]:
        return [request.rsplit("/", 1)[1] for request in self.requests if request.startswith("GET /org/tiny/resolve")]


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    folder = write_random(tmp_path / "source", SMALL, shapes(SMALL), shards=2)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "README.md").write_text("not needed")
    (folder / "pytorch_model.bin").write_text("not needed")
    with serve(folder) as (address, requests):
        yield Hub(folder, tmp_path / "cache", address, requests)


def test_a_repository_is_converted_at_its_commit(hub: Hub, tmp_path: Path) -> None:
    result = hub.run("org/tiny", str(tmp_path / "out"), "--json")
    assert result.returncode == 0, result.stderr
    source = open_container(tmp_path / "out").index.source
    assert (source.repository, source.revision) == ("org/tiny", COMMIT)
    assert [(file.name, file.proof) for file in source.files] == [(name, "stated") for name in SHARDS]
    for file in source.files:
        assert file.sha256 == hashlib.sha256((hub.folder / file.name).read_bytes()).hexdigest()


def test_its_data_files_are_those_of_the_folder(hub: Hub, tmp_path: Path) -> None:
    assert hub.run("org/tiny", str(tmp_path / "out")).returncode == 0
    convert(prepare(FolderSource(hub.folder), Options()), tmp_path / "local")
    remote, local = read_tree(tmp_path / "out"), read_tree(tmp_path / "local")
    del remote["index.json"], local["index.json"]  # the sources differ
    assert remote == local


def test_only_what_is_needed_is_fetched(hub: Hub, tmp_path: Path) -> None:
    assert hub.run("org/tiny", str(tmp_path / "out")).returncode == 0
    assert set(hub.downloads()) == {"config.json", "tokenizer.json", "model.safetensors.index.json", *SHARDS}


def test_a_second_run_finds_it_done_without_a_download(hub: Hub, tmp_path: Path) -> None:
    assert hub.run("org/tiny", str(tmp_path / "out")).returncode == 0
    written = {path: path.stat().st_mtime_ns for path in hub.cache.rglob("blobs/*")}
    result = hub.run("org/tiny", str(tmp_path / "out"), "--revision", COMMIT, "--json")
    assert json.loads(result.stdout)["already_there"]
    assert {path: path.stat().st_mtime_ns for path in hub.cache.rglob("blobs/*")} == written


def test_a_dry_run_fetches_headers_only(hub: Hub, tmp_path: Path) -> None:
    result = hub.run("org/tiny", str(tmp_path / "out"), "--dry-run", "--json")
    assert result.returncode == 0, result.stderr
    planned = json.loads(result.stdout)
    assert planned["total_bytes"] == prepare(FolderSource(hub.folder), Options()).plan.layout.total_bytes
    assert not list(hub.cache.rglob("*.safetensors"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["org/gated"], "org/gated: is gated: accept its terms at http://127.0.0.1:"),
        (["org/absent"], "org/absent: is not on http://127.0.0.1:"),
        (["org/tiny", "--revision", "v9"], "org/tiny: has no revision 'v9'"),
        (["org/.."], "org/..: is no name of a repository"),
    ],
)
def test_what_the_hub_refuses_is_one_line_with_what_to_do(
    hub: Hub, tmp_path: Path, arguments: list[str], line: str
) -> None:
    result = hub.run(arguments[0], str(tmp_path / "out"), *arguments[1:])
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.startswith(f"error: {line}")
    assert len(result.stderr.splitlines()) == 1


def test_offline_is_one_line(hub: Hub, tmp_path: Path) -> None:
    result = hub.run("org/tiny", str(tmp_path / "out"), HF_HUB_OFFLINE="1")
    assert result.returncode == 1
    assert result.stderr.startswith("error: org/tiny: cannot be fetched from http://127.0.0.1:")
    assert len(result.stderr.splitlines()) == 1


def test_a_hub_that_does_not_answer_is_one_line(hub: Hub, tmp_path: Path) -> None:
    result = hub.run("org/tiny", str(tmp_path / "out"), address="http://127.0.0.1:9")
    assert result.returncode == 1
    assert "error: org/tiny: cannot be fetched from http://127.0.0.1:9" in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.stderr
