"""A hub on loopback that speaks what huggingface_hub's client and range readers need, and breaks when it is told to.

The repository org/tiny is a folder; its weights are on "another host" (localhost, where the hub is 127.0.0.1) under
signed addresses. org/gated, org/private, org/disabled, org/renamed and anything else give the hub's own answers.

`python -m tests.repack.hub_server FOLDER` serves a folder until its stdin ends, in a process of its own: the first
line that it prints is its address, and /stats tells what it has sent.
"""

import hashlib
import json
import os
import random
import re
import socket
import ssl
import struct
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock, Thread
from typing import Any, ClassVar, NamedTuple

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_secret"
WEIGHTS = (".safetensors", ".gguf")
PIECE_BYTES = 1 << 16


class Fault(NamedTuple):
    """What goes wrong with a request for weights: see _Handler.send_weights for the kinds."""

    kind: str
    value: float = 0


KINDS = ("reset", "429", "500", "503", "short", "longer", "expired", "drip")


def chaos(seed: int, rate: float) -> Callable[[], Fault | None]:
    """Faults at random: so many of all requests go wrong, in any way that asking again mends."""
    rng, lock = random.Random(seed), Lock()

    def fault() -> Fault | None:
        with lock:
            if rng.random() >= rate:
                return None
            kind = rng.choice(KINDS)
            return Fault(kind, {"reset": rng.randrange(200_000), "drip": 0.002}.get(kind, 0))

    return fault


@dataclass
class Hub:
    """A running hub: where it is, what it was asked, what it has sent, and what is to go wrong next."""

    folder: Path
    address: str = ""
    scheme: str = "http"
    requests: list[str] = field(default_factory=list)
    ranges: list[tuple[str, int, int]] = field(default_factory=list)  # of weights: file, first byte, length
    leaks: list[str] = field(default_factory=list)  # requests that took the token to the other host
    connections: int = 0
    sent_bytes: int = 0  # of weights
    faults: list[Fault | None] = field(default_factory=list)  # of the next requests for weights
    chaos: Callable[[], Fault | None] = lambda: None  # when the list is empty
    survived: Counter[str] = field(default_factory=Counter)  # faults that were made
    signature: int = 0  # addresses with another one have expired
    commit: str = COMMIT
    moved_to: str | None = None  # the commit that files say they are of
    described: bytes | None = None  # what is answered instead of the repository's description
    delay_s: float = 0.0  # before each answer to a request for weights
    bytes_per_s: float = 0.0  # of all connections together; 0: as fast as it goes
    lock: Lock = field(default_factory=Lock)
    hashes: dict[tuple[str, int], str] = field(default_factory=dict)
    free_at: float = 0.0

    def sha256(self, path: Path) -> str:
        status = path.stat()
        key = (str(path), status.st_mtime_ns)
        if key not in self.hashes:
            with open(path, "rb") as file:
                digest = hashlib.sha256()
                while piece := file.read(1 << 20):
                    digest.update(piece)
            self.hashes[key] = digest.hexdigest()
        return self.hashes[key]

    def next_fault(self) -> Fault | None:
        with self.lock:
            fault = self.faults.pop(0) if self.faults else self.chaos()
            if fault is not None:
                self.survived[fault.kind] += 1
            return fault

    def pace(self, nbytes: int) -> None:
        """Wait until the link is free for so many bytes."""
        if self.bytes_per_s:
            with self.lock:
                self.free_at = max(self.free_at, time.monotonic()) + nbytes / self.bytes_per_s
                wait = self.free_at - time.monotonic()
            time.sleep(max(0.0, wait))


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    hub: ClassVar[Hub]

    def setup(self) -> None:
        super().setup()
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 17)  # what is counted has gone, nearly
        with self.hub.lock:
            self.hub.connections += 1

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])) or "{}")
        paths = body.get("paths", [])
        self.answer_json([entry for entry in self.list_tree() if entry["path"] in paths])

    def do_GET(self) -> None:
        path, _, query = self.path.partition("?")
        self.hub.requests.append(f"{self.command} {path}")
        if path == "/stats":
            self.answer_json({"sent_bytes": self.hub.sent_bytes, "requests": len(self.hub.ranges)})
            return
        if path.startswith("/signed/"):
            self.send_weights(self.hub.folder / path.rpartition("/")[2], query)
            return
        repository, revision, file = self.parse(path)
        if repository != "org/tiny":
            self.refuse(repository, path)
        elif revision not in ("main", self.hub.commit):
            self.answer(404, b"", {"X-Error-Code": "RevisionNotFound"})
        elif file is None:
            if self.hub.described is not None:
                self.answer(200, self.hub.described, {"Content-Type": "application/json"})
            else:
                self.answer_json(self.list_tree() if "/tree/" in path else self.describe())
        elif (self.hub.folder / file).is_file():
            self.send_file(self.hub.folder / file)
        else:
            self.answer(404, b"", {"X-Error-Code": "EntryNotFound"})

    def refuse(self, repository: str, path: str) -> None:
        """What the hub answers for repositories that cannot be read."""
        if repository == "org/renamed":
            self.answer(307, b"", {"Location": path.replace("org/renamed", "org/tiny")})
        elif repository == "org/gated":
            self.answer(403, b"", {"X-Error-Code": "GatedRepo"})
        elif repository == "org/disabled":
            self.answer(403, b"", {"X-Error-Message": "Access to this resource is disabled."})
        elif "Authorization" in self.headers and self.headers["Authorization"] != f"Bearer {TOKEN}":
            self.answer(401, b"", {"X-Error-Message": "Invalid credentials in Authorization header"})
        else:  # a private one looks as if it were not there
            known = "Authorization" in self.headers
            self.answer(404 if known else 401, b"", {"X-Error-Code": "RepoNotFound"})

    def parse(self, path: str) -> tuple[str, str, str | None]:
        """(repository, revision, file or None for the repository itself)."""
        match = re.fullmatch(r"/api/models/([\w-]+/[\w-]+)(?:/(?:revision|tree)/([^/]+))?", path)
        if match:
            return match[1], match[2] or "main", None
        match = re.fullmatch(r"/([\w-]+/[\w-]+)/resolve/([^/]+)/([\w.-]+)", path)
        return (match[1], match[2], match[3]) if match else ("", "", None)

    def describe(self) -> dict[str, object]:
        siblings = []
        for path in sorted(self.hub.folder.iterdir()):
            sibling: dict[str, object] = {"rfilename": path.name, "size": path.stat().st_size}
            if path.suffix in WEIGHTS:
                sibling["lfs"] = {"sha256": self.hub.sha256(path), "size": path.stat().st_size, "pointerSize": 130}
            siblings.append(sibling)
        return {"id": "org/tiny", "sha": self.hub.commit, "siblings": siblings}

    def list_tree(self) -> list[dict[str, Any]]:
        return [
            {"type": "file", "path": path.name, "size": path.stat().st_size, "oid": "0" * 40}
            for path in sorted(self.hub.folder.iterdir())
        ]

    def send_file(self, path: Path) -> None:
        """A small file itself, of weights the address where they are."""
        commit = {"X-Repo-Commit": self.hub.commit}
        if path.suffix in WEIGHTS and self.hub.moved_to:
            commit = {"X-Repo-Commit": self.hub.moved_to}
        if path.suffix in WEIGHTS:
            port = self.hub.address.rpartition(":")[2]
            linked = {"X-Linked-Etag": f'"{self.hub.sha256(path)}"', "X-Linked-Size": str(path.stat().st_size)}
            location = f"{self.hub.scheme}://localhost:{port}/signed/{path.name}?signature={self.hub.signature}"
            self.answer(302, b"", {**commit, **linked, "Location": location})
            return
        raw = path.read_bytes()
        self.answer(200, raw, {**commit, "ETag": f'"{hashlib.sha1(raw).hexdigest()}"', "Accept-Ranges": "bytes"})

    # ---- the other host

    def send_weights(self, path: Path, query: str) -> None:
        if "Authorization" in self.headers:
            self.hub.leaks.append(self.path)
        size = path.stat().st_size
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        first, last = (int(wanted[1]), min(int(wanted[2] or size), size - 1)) if wanted else (0, size - 1)
        if self.command == "GET":
            self.hub.ranges.append((path.name, first, last + 1 - first))
        time.sleep(self.hub.delay_s)
        fault = self.hub.next_fault() if self.command == "GET" else None
        kind, value = fault or Fault("none")
        if kind == "expired":
            self.hub.signature += 1
        if query != f"signature={self.hub.signature}":
            self.answer(403, b"the signature has expired", {})
            return
        if kind in ("429", "500", "503"):
            self.answer(int(kind), b"", {"Retry-After": str(int(value))} if kind == "429" else {})
            return
        if kind == "ignored range":
            wanted, first, last = None, 0, size - 1
        if kind == "longer":
            last = min(last + 1, size - 1)
        nbytes = last + 1 - first
        etag = "changed" if kind == "changed etag" else self.hub.sha256(path)
        self.send_response(206 if wanted else 200)
        self.send_header("ETag", f'"{etag}"')
        if wanted:
            self.send_header("Content-Range", f"bytes {first}-{last}/{size + (kind == 'changed size')}")
        self.send_header("Content-Length", str(nbytes - 1 if kind == "short" else nbytes))
        self.end_headers()
        if self.command == "GET":
            self.send_body(path, first, nbytes, kind, value)

    def send_body(self, path: Path, first: int, nbytes: int, kind: str, value: float) -> None:
        """The bytes: all at once, or as the fault wants it."""
        self.wfile.flush()
        with open(path, "rb") as file:
            whole = kind in ("none", "expired", "longer", "changed etag", "changed size", "ignored range")
            if whole and self.hub.scheme == "http":
                self.send_range(file.fileno(), first, nbytes)
                return
            file.seek(first)
            raw = bytearray(file.read(nbytes))
        if kind == "corrupt":
            raw[int(value)] ^= 0x20
        elif kind == "short":
            raw = raw[:-1]
        elif kind == "reset":
            raw = raw[: int(value)]
        pieces = range(0, len(raw), PIECE_BYTES)
        for start in pieces:
            self.send_piece(raw[start : start + PIECE_BYTES])
            if kind == "drip":
                time.sleep(value)
        if kind == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()  # with what is not sent thrown away
            self.close_connection = True

    def send_range(self, fd: int, first: int, nbytes: int) -> None:
        end = first + nbytes
        step = PIECE_BYTES if self.hub.bytes_per_s else nbytes
        while first < end:
            self.hub.pace(min(step, end - first))
            count = os.sendfile(self.connection.fileno(), fd, first, min(step, end - first))
            first += count
            with self.hub.lock:
                self.hub.sent_bytes += count

    def send_piece(self, raw: bytearray) -> None:
        self.hub.pace(len(raw))
        self.connection.sendall(raw)
        with self.hub.lock:
            self.hub.sent_bytes += len(raw)

    def answer_json(self, content: object) -> None:
        self.answer(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002  # the name is http.server's
        pass


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that goes away is what these tests are about."""


@contextmanager
def serve(folder: Path, port: int = 0, tls: ssl.SSLContext | None = None) -> Iterator[Hub]:
    """A hub with this folder as org/tiny."""
    hub = Hub(folder)
    handler = type("FolderHandler", (_Handler,), {"hub": hub})
    with _Server(("127.0.0.1", port), handler) as server:
        if tls is not None:
            hub.scheme = "https"
            server.socket = tls.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
        hub.address = f"{hub.scheme}://127.0.0.1:{server.server_port}"
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()


def main() -> None:
    """Serve until stdin ends."""
    with serve(Path(sys.argv[1])) as hub:
        hub.bytes_per_s = float(sys.argv[2]) if len(sys.argv) > 2 else 0.0
        sys.stdout.write(f"{hub.address}\n")
        sys.stdout.flush()
        sys.stdin.read()


if __name__ == "__main__":
    main()
