"""One HTTP connection that is kept alive, with the proxies and certificates of the environment.

The standard library's client: it leaves a body in the socket until it is asked for, so bytes go from the kernel into
the buffer of a row block; httpx costs three times as much of a core per byte (docs/LEARNED.md, 31).
"""

import base64
import http.client
import io
import socket
import ssl
import urllib.request
from collections.abc import Mapping
from typing import Any
from urllib.parse import SplitResult, unquote, urlsplit

import certifi

TIMEOUT_S = 30.0  # to connect, and between two reads
# In the kernel, per connection: what a kill loses; enough for 1 Gbit/s over 50 ms with the default connections.
RECEIVE_BYTES = 512 << 10


class Connection:
    """The connection of one thread; it goes to the host of the last request."""

    def __init__(self) -> None:
        self._origin: tuple[str, str] | None = None
        self._connection: http.client.HTTPConnection | None = None
        self._by_proxy = False  # the request line then holds the whole address

    def get(self, url: str, headers: Mapping[str, str]) -> http.client.HTTPResponse:
        """Ask for an address; the answer's body must be read to its end, or the connection closed.

        Raises OSError or http.client.HTTPException.
        """
        parts = urlsplit(url)
        if self._origin != (parts.scheme, parts.netloc):
            self.close()
            self._connection, self._by_proxy = _connection(parts)
            self._origin = (parts.scheme, parts.netloc)
            self._connection.response_class = _Response
            self._connection.connect()
            self._connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BYTES)
        assert self._connection is not None
        path = parts._replace(scheme="", netloc="", fragment="").geturl() or "/"
        self._connection.request("GET", url if self._by_proxy else path, headers=dict(headers))
        return self._connection.getresponse()

    def close(self) -> None:
        """Drop the connection; the next request makes a new one."""
        if self._connection is not None:
            self._connection.close()
        self._connection = self._origin = None

    def __del__(self) -> None:
        self.close()  # with the thread that it belongs to


class _Response(http.client.HTTPResponse):
    """An answer whose body goes into a buffer as it comes; the base class makes another object of each piece first."""

    _begun = False

    def readinto1(self, buffer: Any) -> int:
        if not self.length or self.chunked:
            return super().readinto1(buffer)
        # What came with the headers lies in fp, which would ask the socket for more, and lose it if that has broken.
        most = self.length if self._begun else min(self.length, io.DEFAULT_BUFFER_SIZE)
        self._begun = True
        count = self.fp.readinto1(memoryview(buffer)[:most])
        self.length -= count
        return count


def _connection(parts: SplitResult) -> tuple[http.client.HTTPConnection, bool]:
    """(a connection that will reach the host, whether a proxy must be given whole addresses)."""
    assert parts.hostname is not None
    default_port = 443 if parts.scheme == "https" else 80
    host, port = parts.hostname, parts.port or default_port
    proxy = None if urllib.request.proxy_bypass(host) else urllib.request.getproxies().get(parts.scheme)
    via = urlsplit(proxy if "//" in proxy else f"//{proxy}") if proxy else None
    there, there_port = (via.hostname or "", via.port or 80) if via else (host, port)
    if parts.scheme != "https":
        return http.client.HTTPConnection(there, there_port, timeout=TIMEOUT_S), via is not None
    connection = http.client.HTTPSConnection(there, there_port, timeout=TIMEOUT_S, context=_tls())
    if via is not None:
        login = f"{unquote(via.username or '')}:{unquote(via.password or '')}".encode()
        headers = {"Proxy-Authorization": f"Basic {base64.b64encode(login).decode()}"} if via.username else {}
        connection.set_tunnel(host, port, headers)
    return connection, False


def _tls() -> ssl.SSLContext:
    """The certificates of the system (or SSL_CERT_FILE), those of certifi where Python knows of none."""
    paths = ssl.get_default_verify_paths()
    return ssl.create_default_context(cafile=None if paths.cafile or paths.capath else certifi.where())
