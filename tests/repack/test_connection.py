"""How the hub is reached: through proxies, with certificates of one's own, and when it is gone for hours."""

import http.client
import os
import re
import ssl
import threading
from collections.abc import Iterator
from pathlib import Path
from socket import create_connection, socket
from socketserver import BaseRequestHandler, ThreadingTCPServer
from typing import Any, ClassVar, NamedTuple

import pytest
import trustme

from formats.errors import StorageError
from repack.sources import connection, remote
from repack.sources.connection import Connection
from repack.sources.remote import Location, Remote, RemoteFile
from tests.repack.checkpoints import SMALL, shapes, write_random
from tests.repack.hub_server import Hub, serve
from tests.repack.test_hub import Client

FILE = "model.safetensors"


# ---- certificates and proxies


class Proxy(ThreadingTCPServer):
    """A CONNECT proxy that notes whom it was asked for."""

    daemon_threads = True
    asked: ClassVar[list[bytes]]


class _Tunnel(BaseRequestHandler):
    def handle(self) -> None:
        head = b""
        while b"\r\n\r\n" not in head:
            head += self.request.recv(4096)
        assert isinstance(self.server, Proxy)
        self.server.asked.append(head)
        host, port = head.split()[1].decode().rsplit(":", 1)
        with create_connection((host, int(port))) as there:
            self.request.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
            back = threading.Thread(target=_copy, args=(there, self.request), daemon=True)
            back.start()
            _copy(self.request, there)
            back.join(10)


def _copy(source: socket, target: socket) -> None:
    try:
        while piece := source.recv(1 << 16):
            target.sendall(piece)
    except OSError:
        pass  # one side has gone


@pytest.fixture
def proxy() -> Iterator[Proxy]:
    with Proxy(("127.0.0.1", 0), _Tunnel) as server:
        server.asked = []  # type: ignore[misc]  # of this one
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def authority(tmp_path: Path) -> trustme.CA:
    found = trustme.CA()
    found.cert_pem.write_to_path(tmp_path / "ca.pem")
    return found


@pytest.fixture
def tls_client(tmp_path: Path, authority: trustme.CA) -> Iterator[Client]:
    """A machine, and a hub whose certificate only `authority` vouches for."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost", "127.0.0.1").configure_cert(context)
    folder = write_random(tmp_path / "source", SMALL, shapes(SMALL))
    with serve(folder, tls=context) as hub:
        yield Client(hub, tmp_path / "cache", tmp_path / "out")


@pytest.mark.parametrize("variable", ["SSL_CERT_FILE", "REQUESTS_CA_BUNDLE"])
def test_certificates_of_the_environment_are_trusted(tls_client: Client, tmp_path: Path, variable: str) -> None:
    other = {"SSL_CERT_FILE", "REQUESTS_CA_BUNDLE"} - {variable}
    result = tls_client.convert(**dict.fromkeys(other, ""), **{variable: str(tmp_path / "ca.pem")})
    assert result.returncode == 0, result.stderr
    assert tls_client.hub.ranges
    assert tls_client.hub.leaks == []


def test_a_certificate_that_nobody_vouches_for_is_one_line(tls_client: Client) -> None:
    line = tls_client.fails(SSL_CERT_FILE="", REQUESTS_CA_BUNDLE="")
    assert "org/tiny: cannot be fetched from https://" in line
    assert "certificate verify failed" in line
    assert "SSL_CERT_FILE" in line


def test_a_proxy_is_used_for_the_hub_and_for_the_weights(tls_client: Client, proxy: Proxy, tmp_path: Path) -> None:
    through = f"http://user:secret@127.0.0.1:{proxy.server_address[1]}"
    own = {"SSL_CERT_FILE": str(tmp_path / "ca.pem"), "HTTPS_PROXY": through, "NO_PROXY": "", "no_proxy": ""}
    result = tls_client.convert(**own)
    assert result.returncode == 0, result.stderr
    hosts = {head.split()[1].split(b":")[0] for head in proxy.asked}
    assert hosts == {b"127.0.0.1", b"localhost"}  # the hub, and who has the weights
    assert all(b"proxy-authorization: basic dxnlcjpzzwnyzxq=" in head.lower() for head in proxy.asked)


def test_no_proxy_is_heeded(tls_client: Client, proxy: Proxy, tmp_path: Path) -> None:
    through = f"http://127.0.0.1:{proxy.server_address[1]}"
    assert tls_client.convert(SSL_CERT_FILE=str(tmp_path / "ca.pem"), HTTPS_PROXY=through).returncode == 0
    assert proxy.asked == []


# ---- a network that is gone for a while, in simulated time


class Clock:
    """Time that only passes when somebody waits; stands for the time module and for the event that ends waits."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.waits: list[float] = []

    def monotonic(self) -> float:
        return self.now

    time = monotonic

    def wait(self, seconds: float) -> bool:
        self.waits.append(seconds)
        self.now += seconds
        return False

    def is_set(self) -> bool:
        return False


class Addresses:
    """Knows where the files of a test hub are."""

    def __init__(self, hub: Hub) -> None:
        self._hub, self.endpoint = hub, hub.address

    def locate(self, file: RemoteFile) -> Location:
        port = self._hub.address.rpartition(":")[2]
        return Location(f"http://localhost:{port}/signed/{file.name}?signature={self._hub.signature}", {})


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(remote, "time", found)
    return found


def gone_until(end: float, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """No connection can be made before that time."""
    get = Connection.get

    def try_get(self: Connection, url: str, headers: Any) -> http.client.HTTPResponse:
        if clock.now < end:
            raise OSError("Network is unreachable")
        return get(self, url, headers)

    monkeypatch.setattr(connection.Connection, "get", try_get)


def fetch(folder: Path, clock: Clock, patience_s: float, lines: list[str]) -> bytes:
    nbytes = os.stat(folder / FILE).st_size
    with serve(folder) as hub:
        files = {FILE: RemoteFile(FILE, nbytes, None)}
        found = Remote(Addresses(hub), "org/tiny", files, patience_s)
        found.tell(lines.append)
        return found.read(FILE, 0, nbytes, clock)  # type: ignore[arg-type]  # an event that passes time


def test_a_network_that_is_gone_for_an_hour_is_waited_for(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, lines = write_random(tmp_path / "source", SMALL, shapes(SMALL)), list[str]()
    gone_until(clock.now + 3600, clock, monkeypatch)
    assert fetch(folder, clock, 7200.0, lines) == (folder / FILE).read_bytes()
    assert 3600 <= clock.now - 1000 < 3600 + remote.MAX_DELAY_S
    assert 60 <= len(clock.waits) < 150
    assert max(clock.waits) <= remote.MAX_DELAY_S
    assert "model.safetensors: Network is unreachable; trying again for up to 119 minutes" in lines[0]
    assert len(lines) < 15


def test_after_patience_the_line_says_that_nothing_is_lost(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_random(tmp_path / "source", SMALL, shapes(SMALL))
    gone_until(clock.now + 7300, clock, monkeypatch)
    with pytest.raises(StorageError, match="Network is unreachable; what is finished is kept, the same command goes"):
        fetch(folder, clock, 7200.0, [])
    assert 7200 <= clock.now - 1000 < 7300


# ---- answers that no server should give


class Here(NamedTuple):
    """A hub whose files are all at one address."""

    endpoint: str

    def locate(self, file: RemoteFile) -> Location:
        return Location(f"{self.endpoint}/{file.name}", {})


@pytest.mark.parametrize(
    ("answer", "line"),
    [
        ("429 Slow\r\nRetry-After: \u00b2", "answers 429 Slow"),
        ("429 Slow\r\nRetry-After: Mon, 01 Jan 99999999999999999999 00:00:00", "answers 429 Slow"),
        (
            "302 Found\r\nLocation: ftp://elsewhere/x",
            "sends to ftp://elsewhere/x, expected an address of http",
        ),
        ("302 Found\r\nLocation: http://elsewhere:99999/", "sends to http://elsewhere:99999/, expected an address"),
        ("302 Found\r\nLocation: http://[elsewhere/", "sends to http://[elsewhere/, expected an address"),
        ("206 Part\r\nContent-Range: bytes 0-3/\u00b2", "answers bytes 0-3/\u00b2, 0 bytes, expected bytes 0-3/4"),
        (f"206 Part\r\nContent-Range: bytes 0-3/{'9' * 5000}", "... bytes long, expected 4: it changed during the run"),
    ],
)
def test_an_answer_that_means_nothing_is_one_line(answer: str, line: str) -> None:
    class Answer(BaseRequestHandler):
        def handle(self) -> None:
            self.request.recv(1 << 16)
            self.request.sendall(f"HTTP/1.1 {answer}\r\nContent-Length: 0\r\n\r\n".encode("latin-1"))

    with ThreadingTCPServer(("localhost", 0), Answer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            hub = Here(f"http://localhost:{server.server_address[1]}")
            found = Remote(hub, "org/tiny", {FILE: RemoteFile(FILE, 4, None)}, patience_s=0.0)
            with pytest.raises(StorageError, match=re.escape(line)):
                found.read(FILE, 0, 4)
        finally:
            server.shutdown()
