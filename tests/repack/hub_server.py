"""A hub on loopback that speaks what huggingface_hub's client needs to list and download one repository."""

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import ClassVar

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Handler(BaseHTTPRequestHandler):
    """Serves `folder` as the repository org/tiny; org/gated and anything else give the hub's errors."""

    protocol_version = "HTTP/1.1"
    folder: ClassVar[Path]
    requests: ClassVar[list[str]]

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        self.requests.append(f"{self.command} {path}")
        repository, revision, file = self.parse(path)
        if repository != "org/tiny":
            code = "GatedRepo" if repository == "org/gated" else "RepoNotFound"
            self.answer(403 if code == "GatedRepo" else 404, b"", {"X-Error-Code": code})
        elif revision not in ("main", COMMIT):
            self.answer(404, b"", {"X-Error-Code": "RevisionNotFound"})
        elif file is None:
            content = self.list_tree() if "/tree/" in path else self.describe()
            self.answer(200, json.dumps(content).encode(), {"Content-Type": "application/json"})
        elif (self.folder / file).is_file():
            self.send_part((self.folder / file).read_bytes())
        else:
            self.answer(404, b"", {"X-Error-Code": "EntryNotFound"})

    def parse(self, path: str) -> tuple[str, str, str | None]:
        """(repository, revision, file or None for the repository itself)."""
        match = re.fullmatch(r"/api/models/([\w-]+/[\w-]+)(?:/(?:revision|tree)/([^/]+))?", path)
        if match:
            return match[1], match[2] or "main", None
        match = re.fullmatch(r"/([\w-]+/[\w-]+)/resolve/([^/]+)/([\w.-]+)", path)
        return (match[1], match[2], match[3]) if match else ("", "", None)

    def describe(self) -> dict[str, object]:
        siblings = []
        for path in sorted(self.folder.iterdir()):
            raw = path.read_bytes()
            sibling: dict[str, object] = {"rfilename": path.name, "size": len(raw)}
            if path.suffix == ".safetensors":
                sibling["lfs"] = {"sha256": hashlib.sha256(raw).hexdigest(), "size": len(raw), "pointerSize": 130}
            siblings.append(sibling)
        return {"id": "org/tiny", "sha": COMMIT, "siblings": siblings}

    def list_tree(self) -> list[dict[str, object]]:
        return [
            {"type": "file", "path": path.name, "size": path.stat().st_size, "oid": "0" * 40}
            for path in sorted(self.folder.iterdir())
        ]

    def send_part(self, raw: bytes) -> None:
        headers = {"ETag": f'"{hashlib.sha1(raw).hexdigest()}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if not wanted:
            self.answer(200, raw, headers)
            return
        first, last = int(wanted[1]), min(int(wanted[2] or len(raw)), len(raw) - 1)
        headers["Content-Range"] = f"bytes {first}-{last}/{len(raw)}"
        self.answer(206, raw[first : last + 1], headers)

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


@contextmanager
def serve(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """(the address of the hub, the requests that it has seen)."""
    requests: list[str] = []
    handler = type("FolderHandler", (Handler,), {"folder": folder, "requests": requests})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", requests
        finally:
            server.shutdown()
            thread.join()
