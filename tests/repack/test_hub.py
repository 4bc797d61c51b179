"""A repository on the hub: huggingface_hub's real client and the range reader against a hub on loopback."""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel
from tokenizers.models import BPE

from formats.container import open_container
from repack.convert import convert, prepare
from repack.plan import Options
from repack.sources import open_local
from repack.sources.folder import FolderSource
from tests.gguf_files import FIXTURES, recorded, write_gguf
from tests.llama_cpp import converted
from tests.repack.checkpoints import SMALL, read_tree, shapes, write_random
from tests.repack.hub_server import COMMIT, TOKEN, Fault, Hub, chaos, serve

ROOT = Path(__file__).parent.parent.parent
SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
# The command with short delays and small requests, so that a small file gives much to break.
PROGRAM = """
from repack import cli
from repack.sources import ahead, hub_api, remote, spool
remote.FIRST_DELAY_S, hub_api._DELAY_S = 0.01, 0.01
ahead.BLOCK_BYTES = spool.BLOCK_BYTES = 4096
ahead.SEGMENT_BYTES, ahead.WINDOW_BYTES = 16384, 1 << 18
cli.main()
"""


class Client(NamedTuple):
    """A machine with an empty cache, and the hub that it asks."""

    hub: Hub
    cache: Path
    out: Path

    def run(self, *args: str, address: str | None = None, **environment: str) -> "subprocess.CompletedProcess[str]":
        own = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        own |= {
            "HF_ENDPOINT": address or self.hub.address,
            "HF_HOME": str(self.cache),
            "NO_PROXY": "127.0.0.1,localhost",
            **environment,
        }
        own = {name: value for name, value in own.items() if value}
        command = [sys.executable, "-c", PROGRAM, *args]
        return subprocess.run(command, cwd=ROOT, env=own, capture_output=True, text=True, check=False)

    def convert(self, *args: str, **environment: str) -> "subprocess.CompletedProcess[str]":
        return self.run("convert", "org/tiny", str(self.out), *args, **environment)

    def fails(self, *args: str, **environment: str) -> str:
        """The one line of a conversion that cannot be done."""
        result = self.convert(*args, **environment)
        assert (result.returncode, result.stdout) == (1, ""), result.stderr
        assert len([line for line in result.stderr.splitlines() if not line.startswith("skipped")]) == 1
        return result.stderr.splitlines()[-1]

    def needed(self) -> int:
        """Bytes of the tensors that a conversion reads."""
        return prepare(FolderSource(self.hub.folder), Options()).plan.source_bytes


@pytest.fixture
def client(tmp_path: Path) -> Iterator[Client]:
    listing = shapes(SMALL)
    listing["model.visual.patch_embed.proj.weight"] = ("BF16", (64, 4096))  # never fetched
    folder = write_random(tmp_path / "source", SMALL, listing, shards=2)
    tokenizer = Tokenizer(BPE())
    tokenizer.decoder = ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "README.md").write_text("not needed")
    (folder / "pytorch_model.bin").write_text("not needed")
    with serve(folder) as hub:
        yield Client(hub, tmp_path / "cache", tmp_path / "out")


@pytest.fixture
def local(client: Client, tmp_path: Path) -> dict[str, bytes]:
    """The data files of a conversion from the folder itself."""
    convert(prepare(FolderSource(client.hub.folder), Options()), tmp_path / "local")
    return data_files(tmp_path / "local")


def data_files(out: Path) -> dict[str, bytes]:
    return {name: raw for name, raw in read_tree(out).items() if name.endswith(".bin")}


# ---- by byte ranges


def test_a_repository_is_converted_at_its_commit_by_byte_ranges(client: Client, local: dict[str, bytes]) -> None:
    result = client.convert("--json")
    assert result.returncode == 0, result.stderr
    assert data_files(client.out) == local
    source = open_container(client.out).index.source
    assert (source.repository, source.revision) == ("org/tiny", COMMIT)
    assert [(file.name, file.proof) for file in source.files] == [(name, "ranges") for name in SHARDS]
    for file in source.files:
        assert file.sha256 == hashlib.sha256((client.hub.folder / file.name).read_bytes()).hexdigest()


def test_only_headers_and_what_the_plan_needs_are_fetched(client: Client) -> None:
    assert client.convert().returncode == 0
    headers = sum(min(65536, (client.hub.folder / name).stat().st_size) for name in SHARDS)
    assert client.hub.sent_bytes == client.needed() + headers
    assert not list(client.cache.rglob("*.safetensors"))
    assert {path.name for path in client.out.rglob("*") if path.suffix in (".fetched", ".journal")} == set()


def test_an_address_is_asked_for_once_per_file(client: Client) -> None:
    assert client.convert().returncode == 0
    asked = [request for request in client.hub.requests if request.endswith(".safetensors") and "resolve" in request]
    assert sorted(asked) == [f"HEAD /org/tiny/resolve/{COMMIT}/{name}" for name in SHARDS]


def test_connections_are_kept(client: Client) -> None:
    assert client.convert("--connections", "2", "--jobs", "1").returncode == 0
    assert len(client.hub.ranges) > 20
    assert client.hub.connections < 10


def test_the_token_goes_to_the_hub_and_nowhere_else(client: Client) -> None:
    assert client.convert(HF_TOKEN=TOKEN).returncode == 0
    assert client.hub.ranges
    assert client.hub.leaks == []


def test_a_second_run_finds_it_done_and_fetches_headers_only(client: Client) -> None:
    assert client.convert().returncode == 0
    before = client.hub.sent_bytes
    result = client.convert("--revision", COMMIT, "--json")
    assert json.loads(result.stdout)["already_there"]
    assert client.hub.sent_bytes - before <= 2 * 65536


def test_a_dry_run_fetches_headers_only(client: Client) -> None:
    result = client.convert("--dry-run", "--json")
    assert result.returncode == 0, result.stderr
    planned = json.loads(result.stdout)
    assert planned["total_bytes"] == prepare(FolderSource(client.hub.folder), Options()).plan.layout.total_bytes
    assert client.hub.sent_bytes <= 2 * 65536
    assert not client.out.exists()


# ---- whole files


def test_a_download_goes_through_the_cache_and_is_hashed(client: Client, local: dict[str, bytes]) -> None:
    assert client.convert("--download").returncode == 0
    assert data_files(client.out) == local
    assert {file.proof for file in open_container(client.out).index.source.files} == {"computed"}
    assert {path.name for path in client.cache.rglob("*.safetensors")} == set(SHARDS)
    assert not list(client.cache.rglob("README.md"))


def test_a_cached_snapshot_is_used_without_any_request(client: Client, local: dict[str, bytes]) -> None:
    assert client.convert("--download").returncode == 0
    client.hub.requests.clear()
    assert client.convert("--force").returncode == 0
    assert client.hub.requests == []
    assert data_files(client.out) == local
    source = open_container(client.out).index.source
    assert (source.repository, source.revision) == ("org/tiny", COMMIT)
    assert {file.proof for file in source.files} == {"computed"}


def test_a_damaged_download_is_refused(client: Client) -> None:
    assert client.convert("--download").returncode == 0
    blob = next(client.cache.rglob(SHARDS[1])).resolve()
    raw = bytearray(blob.read_bytes())
    raw[-1] ^= 1
    blob.write_bytes(raw)
    assert "has SHA-256 " in client.fails("--force")


# ---- names


@pytest.mark.parametrize(
    ("arguments", "environment", "line"),
    [
        (["org/gated"], {}, "org/gated: is gated: accept its terms at http://127.0.0.1:"),
        (["org/disabled"], {}, "org/disabled: is disabled on http://127.0.0.1:"),
        (["org/tiny", "--revision", "v9"], {}, "org/tiny: has no revision 'v9'"),
        (["org/.."], {}, "org/..: is no name of a repository"),
    ],
)
def test_what_the_hub_refuses_is_one_line_with_what_to_do(
    client: Client, arguments: list[str], environment: dict[str, str], line: str
) -> None:
    result = client.run("convert", arguments[0], str(client.out), *arguments[1:], **environment)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.startswith(f"error: {line}")
    assert len(result.stderr.splitlines()) == 1


def test_a_private_repository_and_a_bad_token_say_what_to_do(client: Client) -> None:
    def line(**environment: str) -> str:
        return client.run("convert", "org/private", str(client.out), **environment).stderr

    assert "or is private: check the name, or log in with `hf auth login` or HF_TOKEN" in line()
    assert "or is private and not open to the account of your token" in line(HF_TOKEN=TOKEN)
    assert "does not accept your token: log in again" in line(HF_TOKEN="hf_old")


def test_a_renamed_repository_is_found_and_called_by_its_new_name(client: Client) -> None:
    result = client.run("convert", "org/renamed", str(client.out))
    assert result.returncode == 0, result.stderr
    assert "org/renamed is called org/tiny now" in result.stderr
    assert open_container(client.out).index.source.repository == "org/tiny"


def test_offline_is_one_line(client: Client) -> None:
    line = client.fails(HF_HUB_OFFLINE="1")
    assert line.startswith("error: org/tiny: cannot be fetched from http://127.0.0.1:")


def test_a_hub_that_does_not_answer_is_one_line(client: Client) -> None:
    result = client.run("convert", "org/tiny", str(client.out), address="http://127.0.0.1:9")
    assert result.returncode == 1
    assert "error: org/tiny: cannot be fetched from http://127.0.0.1:9" in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.stderr


SIBLING = b'{"id": "org/tiny", "sha": "0", "siblings": [{"rfilename": "config.json", "size": "1"}]}'


@pytest.mark.parametrize(
    ("body", "line"),
    [
        (b"[" * 100_000, "answers what is no answer of a hub (maximum recursion"),
        (b"9" * 5000, "answers what is no answer of a hub (Exceeds the limit"),
        (b"<html>", "answers what is no answer of a hub (Expecting value"),
        (b"[]", "answers what is no answer of a hub ("),
        (b'{"id": "org/tiny", "sha": "0", "siblings": [1]}', "answers what is no answer of a hub ("),
        (SIBLING, "lists config.json of 1 bytes, expected a name and a length"),
    ],
    ids=["nested", "a large integer", "a page", "a list", "no siblings", "no size"],
)
def test_an_answer_that_is_none_of_a_hub_is_one_line(client: Client, body: bytes, line: str) -> None:
    client.hub.described = body
    assert client.fails().startswith(f"error: org/tiny: {client.hub.address} {line}")


# ---- faults

HEADERS = [None] * len(SHARDS)  # the first requests are for headers


def test_every_kind_of_fault_is_survived(
    client: Client, local: dict[str, bytes], record_property: Callable[[str, object], None]
) -> None:
    faults = [Fault("reset", 0), Fault("reset", 1000), Fault("429", 1), Fault("500"), Fault("503"), Fault("short")]
    faults += [Fault("longer"), Fault("expired"), Fault("drip", 0.001)]
    client.hub.faults = [*HEADERS, *(found for fault in faults for found in (None, fault, fault))]
    result = client.convert("--json")
    assert result.returncode == 0, result.stderr
    assert data_files(client.out) == local
    assert client.hub.faults == []
    assert set(json.loads(result.stdout)["fetched"]["faults"]) >= {"reset", "429", "500", "wrong length", "expired"}
    record_property("survived", dict(client.hub.survived))


def test_faults_at_random_are_survived_and_fetch_little_twice(
    client: Client, local: dict[str, bytes], record_property: Callable[[str, object], None]
) -> None:
    client.hub.chaos = chaos(seed=1, rate=0.4)
    result = client.convert("--json")
    assert result.returncode == 0, result.stderr
    assert data_files(client.out) == local
    assert sum(client.hub.survived.values()) > 8
    said = json.loads(result.stdout)["fetched"]
    assert sum(said["faults"].values()) > 8
    record_property("survived", dict(client.hub.survived))


def test_a_request_that_breaks_goes_on_where_it_broke(client: Client) -> None:
    client.hub.faults = [*HEADERS, *[Fault("reset", 1000)] * 3]
    assert client.convert("--connections", "1", "--jobs", "1").returncode == 0
    headers = sum(min(65536, (client.hub.folder / name).stat().st_size) for name in SHARDS)
    assert client.hub.sent_bytes == client.needed() + headers


@pytest.mark.parametrize(
    ("kind", "line"),
    [
        ("ignored range", "sends the whole file when asked for"),
        ("changed etag", "it changed during the run"),
        ("changed size", "it changed during the run"),
    ],
)
def test_what_asking_again_cannot_mend_is_refused(client: Client, kind: str, line: str) -> None:
    client.hub.faults = [*HEADERS, None, Fault(kind)]
    assert line in client.fails("--connections", "1", "--jobs", "1")


def test_a_commit_that_changes_under_the_run_is_refused(client: Client) -> None:
    client.hub.moved_to = "f" * 40
    assert f"has commit {'f' * 40}, expected {COMMIT}: it changed during the run" in client.fails()


def test_patience_has_an_end(client: Client) -> None:
    client.hub.chaos = lambda: Fault("503")
    line = client.fails("--patience", "0.005")
    assert "answers 503" in line
    assert "what is finished is kept, the same command goes on" in line


# ---- a container against the hub


def test_experts_are_compared_with_the_hub_and_a_corrupt_byte_is_found(client: Client) -> None:
    client.hub.faults = [*HEADERS, *[Fault("corrupt", 0)] * 200]  # all that is fetched
    assert client.convert().returncode == 0
    client.hub.faults = []
    result = client.run("verify", str(client.out), "--source", "org/tiny", "--sample", "10", "--json")
    assert result.returncode == 1, result.stderr
    damage = json.loads(result.stdout)["damage"]
    assert damage
    assert all("of the source gives in" in found["message"] for found in damage)
    assert client.convert("--force").returncode == 0
    result = client.run("verify", str(client.out), "--source", "org/tiny", "--sample", "4", "--json")
    assert result.returncode == 0, result.stderr


# ---- GGUF


def test_a_gguf_file_of_a_repository_is_chosen_and_streamed(client: Client, tmp_path: Path) -> None:
    for path in client.hub.folder.iterdir():
        path.unlink()
    content = recorded("qwen3_moe")["metadata"], converted(FIXTURES / "qwen3_moe", "qwen3moe")
    for name in ("tiny-Q8_0.gguf", "tiny-F32.gguf"):
        write_gguf(client.hub.folder / name, *content)
    line = client.fails()
    assert "org/tiny: holds 2 GGUF models; choose one with org/tiny:NAME or --file GLOB: tiny-F32, tiny-Q8_0" in line
    result = client.run("convert", "org/tiny:F32", str(client.out))
    assert result.returncode == 0, result.stderr
    local = tmp_path / "local"
    convert(prepare(open_local(str(client.hub.folder / "tiny-F32.gguf")), Options()), local)
    assert data_files(client.out) == data_files(local)
    assert {name for name, _, _ in client.hub.ranges} == {"tiny-F32.gguf"}
    source = open_container(client.out).index.source
    assert [(file.name, file.proof) for file in source.files] == [("tiny-F32.gguf", "ranges")]
    assert client.run("convert", "org/tiny", str(client.out), "--file", "*F32*").returncode == 0


def test_a_gguf_file_is_compared_at_the_commit_that_was_converted(client: Client) -> None:
    for path in client.hub.folder.iterdir():
        path.unlink()
    write_gguf(
        client.hub.folder / "tiny-F32.gguf",
        recorded("qwen3_moe")["metadata"],
        converted(FIXTURES / "qwen3_moe", "qwen3moe"),
    )
    assert client.run("convert", "org/tiny:F32", str(client.out)).returncode == 0
    compare = "verify", str(client.out), "--source", "org/tiny:F32", "--sample", "4"
    result = client.run(*compare)
    assert result.returncode == 0, result.stderr
    client.hub.commit = "f" * 40  # the hub of the tests knows no other then
    result = client.run(*compare)
    assert result.returncode == 1
    assert f"org/tiny: has no revision '{COMMIT}'" in result.stderr


def test_a_split_gguf_file_of_a_repository_is_streamed_and_a_missing_part_named(client: Client, tmp_path: Path) -> None:
    for path in client.hub.folder.iterdir():
        path.unlink()
    metadata, tensors = recorded("qwen3_moe")["metadata"], converted(FIXTURES / "qwen3_moe", "qwen3moe")
    names = sorted(tensors)
    for nth in range(3):
        own = {"split.no": nth, "split.count": 3, "split.tensors.count": len(names)}
        part = {name: tensors[name] for name in names[nth::3]}
        write_gguf(client.hub.folder / f"tiny-Q4_K_M-0000{nth + 1}-of-00003.gguf", metadata | own, part)
    result = client.run("convert", "org/tiny:Q4_K_M", str(client.out))
    assert result.returncode == 0, result.stderr
    local = tmp_path / "local"
    convert(prepare(open_local(str(client.hub.folder / "tiny-Q4_K_M-00001-of-00003.gguf")), Options()), local)
    assert data_files(client.out) == data_files(local)
    assert len({name for name, _, _ in client.hub.ranges}) == 3
    (client.hub.folder / "tiny-Q4_K_M-00002-of-00003.gguf").unlink()
    result = client.run("convert", "org/tiny:Q4_K_M", str(client.out), "--force")
    assert result.returncode == 1
    assert "org/tiny/tiny-Q4_K_M-00002-of-00003.gguf: is missing, but tiny-Q4_K_M-00001" in result.stderr
