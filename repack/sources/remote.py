"""The files of a repository at one commit, by byte range: located once, fetched with patience, every answer checked.

A file is located when it is first read and again when its address has expired. A request that breaks goes on from
the byte where it broke. What cannot be mended by asking again is raised.
"""

import email.utils
import http.client
import math
import random
import ssl
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol
from urllib.parse import urljoin, urlsplit

from formats.errors import StorageError
from formats.fields import shown
from repack.sources.connection import Connection

FIRST_DELAY_S, MAX_DELAY_S = 0.5, 60.0  # between attempts: doubled each time, and at random down to a half
TELL_AFTER_S, TELL_EVERY_S = 30.0, 300.0  # of trouble without a byte, what is the matter is said
STALL_S, STALL_BYTES = 30.0, 1 << 16  # a connection that brings less than this in that time is dropped
READ_BYTES = 1 << 19  # more at a time leaves the interpreter to other threads for longer
TRANSIENT = (408, 425, 429, 500, 502, 503, 504)
EXPIRED = (400, 401, 403, 404, 410)  # what stores answer to a signed address after its time
REDIRECTS = (301, 302, 303, 307, 308)


@dataclass(frozen=True)
class RemoteFile:
    """A file as the hub lists it: `etag` is the LFS SHA-256, or of a small file git's blob id."""

    name: str
    nbytes: int
    etag: str | None
    sha256: str | None = None


class Location(NamedTuple):
    """Where a file's bytes are for now; the headers hold the token only when that is the hub itself."""

    url: str
    headers: Mapping[str, str]


class Hub(Protocol):
    """Who knows where files are. Picklable."""

    @property
    def endpoint(self) -> str:
        """The hub's own address, for messages."""

    def locate(self, file: RemoteFile) -> Location:
        """Ask for the address of a file at the commit.

        Raises FaultError when asking again may help, StreamingExpertsError when not, as for a file that has changed.
        """


class FaultError(Exception):
    """Something that asking again may mend: after `wait_s`, or after a growing delay.

    `tries` bounds how often it may come in a row without a byte between; None leaves that to patience.
    """

    def __init__(self, kind: str, reason: str, wait_s: float | None = None, tries: int | None = None) -> None:
        super().__init__(reason)
        self.kind, self.wait_s, self.tries = kind, wait_s, tries


class StoppedError(Exception):
    """Nobody wants these bytes any more."""


def _ignore(done: int) -> None:
    pass


def _say_nothing(line: str) -> None:
    pass


class Remote:
    """Fetches byte ranges; for any number of threads, each with a connection of its own. Picklable."""

    def __init__(self, hub: Hub, repository: str, files: Mapping[str, RemoteFile], patience_s: float) -> None:
        self.hub = hub
        self.repository = repository
        self.files = files
        self.patience_s = patience_s
        self._begin()

    def _begin(self) -> None:
        self.received_bytes = 0
        self.requests = 0
        self.faults: Counter[str] = Counter()
        self._lock = threading.Lock()  # of the counters and the two tables
        self._locating = {name: threading.Lock() for name in self.files}
        self._locations: dict[str, Location] = {}
        self._etags: dict[tuple[str, str], str] = {}  # by file and host
        self._local = threading.local()
        self._tell: Callable[[str], None] = _say_nothing
        self._told = -math.inf

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if not name.startswith("_")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._begin()

    def tell(self, say: Callable[[str], None]) -> None:
        """Whom to tell, now and then, that nothing comes and why."""
        self._tell = say

    def _complain(self, line: str) -> None:
        """Of all connections one, every few minutes."""
        with self._lock:
            now = time.monotonic()
            if now - self._told < TELL_EVERY_S:
                return
            self._told = now
        self._tell(line)

    def read(self, name: str, offset: int, nbytes: int, stopped: threading.Event | None = None) -> bytes:
        """Bytes of a file, fewer only at its end, as a header is read. Raises as fetch."""
        buffer = bytearray(max(0, min(nbytes, self.files[name].nbytes - offset)))
        self.fetch(name, offset, memoryview(buffer), stopped=stopped)
        return bytes(buffer)

    def fetch(
        self,
        name: str,
        offset: int,
        buffer: memoryview,
        arrived: Callable[[int], None] = _ignore,
        stopped: threading.Event | None = None,
    ) -> None:
        """Fill the buffer from byte `offset` on; `arrived` is told after each piece how much of it is filled.

        Raises StoppedError soon after `stopped` is set, StreamingExpertsError for what asking again cannot mend.
        """
        stopped = stopped or threading.Event()
        trouble = _Trouble(f"{self.repository}/{name}", self.patience_s)
        done = 0
        while done < len(buffer):
            try:
                for count in self._receive(self.files[name], offset + done, buffer[done:], stopped):
                    done += count
                    with self._lock:
                        self.received_bytes += count
                    trouble.end()
                    arrived(done)
            except FaultError as fault:  # noqa: PERF203  # the loop is there for it
                with self._lock:
                    self.faults[fault.kind] += 1
                if trouble.lasts_s() >= TELL_AFTER_S:
                    left = (self.patience_s - trouble.lasts_s()) / 60
                    self._complain(f"{name}: {fault}; trying again for up to {left:.0f} minutes")
                trouble.wait(fault, stopped)

    def _receive(self, file: RemoteFile, offset: int, buffer: memoryview, stopped: threading.Event) -> Iterator[int]:
        """One request; the length of each piece as it comes. Raises FaultError, StoppedError or StorageError."""
        location = self._locate(file)
        connection = self._connection()
        headers = {**location.headers, "Accept-Encoding": "identity"}
        headers["Range"] = f"bytes={offset}-{offset + len(buffer) - 1}"
        complete = False
        try:
            with self._lock:
                self.requests += 1
            response = connection.get(location.url, headers)
            self._check(file, location, response, offset, len(buffer))
            done, seen, since = 0, 0, time.monotonic()
            while done < len(buffer):
                count = response.readinto1(buffer[done : done + READ_BYTES])
                if not count:
                    raise FaultError("reset", f"the connection ended {len(buffer) - done} bytes early")
                done += count
                yield count
                if stopped.is_set():
                    raise StoppedError
                if done - seen >= STALL_BYTES:
                    seen, since = done, time.monotonic()
                elif time.monotonic() - since > STALL_S:
                    raise FaultError("stall", f"less than {STALL_BYTES} bytes came in {STALL_S:.0f} s", wait_s=0.0)
            response.read()
            complete = not response.will_close
        except TimeoutError:
            raise FaultError("time-out", "nothing came for a while") from None
        except ssl.SSLCertVerificationError as error:
            raise FaultError(
                "certificate", f"{error.verify_message}; SSL_CERT_FILE names other certificates", tries=3
            ) from None
        except (OSError, http.client.HTTPException) as error:
            raise FaultError("reset", str(error) or type(error).__name__) from None
        finally:
            if not complete:
                connection.close()

    def _connection(self) -> Connection:
        if not hasattr(self._local, "connection"):
            self._local.connection = Connection()
        connection: Connection = self._local.connection
        return connection

    def _locate(self, file: RemoteFile) -> Location:
        with self._locating[file.name]:  # however many threads begin with a file, it is asked for once
            if file.name not in self._locations:
                self._locations[file.name] = self.hub.locate(file)
            return self._locations[file.name]

    def _relocate(self, file: RemoteFile, old: Location, new: Location | None) -> None:
        with self._locating[file.name]:
            if self._locations.get(file.name) == old:
                del self._locations[file.name]
                if new is not None:
                    self._locations[file.name] = new

    def _check(
        self, file: RemoteFile, location: Location, response: http.client.HTTPResponse, offset: int, nbytes: int
    ) -> None:
        """Whether the answer is these bytes of this file; else FaultError or StorageError."""
        status, host = response.status, urlsplit(location.url).netloc
        if status in REDIRECTS:
            url = self._sent_to(file, location, response.headers.get("Location", ""))
            headers = location.headers if urlsplit(url)[:2] == urlsplit(location.url)[:2] else {}
            self._relocate(file, location, Location(url, headers))
            raise FaultError("redirect", f"{host} sends elsewhere again and again", wait_s=0.0, tries=5)
        if status in TRANSIENT:
            wait_s = _retry_after(response.headers.get("Retry-After"))
            raise FaultError(str(status), f"{host} answers {status} {response.reason}", wait_s)
        if status in EXPIRED:
            self._relocate(file, location, None)
            raise FaultError(
                "expired", f"{host} answers {status} {response.reason} to a new address", wait_s=0.0, tries=8
            )
        where = f"{self.repository}/{file.name}"
        whole = offset == 0 and nbytes == file.nbytes
        if status == 200 and not whole:
            raise StorageError(
                f"{where}: {host} sends the whole file when asked for {nbytes} bytes of it; fetch it with --download"
            )
        if status not in (200, 206):
            raise StorageError(f"{where}: {host} answers {status} {response.reason}, expected bytes from {offset}")
        self._check_identity(file, where, host, response)
        said = response.headers.get("Content-Range")
        expected = f"bytes {offset}-{offset + nbytes - 1}/{file.nbytes}"
        if (status == 206 and said != expected) or response.length != nbytes:
            found = f"{said}, {response.length} bytes"
            raise FaultError("wrong length", f"{host} answers {found}, expected {expected}, {nbytes} bytes", tries=5)

    def _sent_to(self, file: RemoteFile, location: Location, there: str) -> str:
        """Where a redirection leads. Raises StorageError for what is no address."""
        try:
            url = urljoin(location.url, there)
            parts = urlsplit(url)
            sound = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        except ValueError:
            sound = False
        if not sound:
            raise StorageError(
                f"{self.repository}/{file.name}: {urlsplit(location.url).netloc} sends to {shown(there)}, expected an "
                "address of http or https"
            )
        return url

    def _check_identity(self, file: RemoteFile, where: str, host: str, response: http.client.HTTPResponse) -> None:
        """The bytes must come from the same file as all before. Raises StorageError."""
        total = (response.headers.get("Content-Range") or "").rpartition("/")[2]
        if total.isdecimal() and total != str(file.nbytes):
            raise StorageError(
                f"{where}: is {shown(total)} bytes long, expected {file.nbytes}: it changed during the run"
            )
        etag = response.headers.get("ETag")
        if etag is None:
            return
        with self._lock:
            known = self._etags.setdefault((file.name, host), etag)
        if known != etag:
            raise StorageError(f"{where}: has ETag {etag}, expected {known}: it changed during the run")


class _Trouble:
    """Waits between attempts, until patience is at its end."""

    def __init__(self, where: str, patience_s: float) -> None:
        self._where, self._patience_s = where, patience_s
        self._kinds: Counter[str] = Counter()  # since the last byte
        self._since = time.monotonic()

    def end(self) -> None:
        """A byte came."""
        self._kinds.clear()
        self._since = time.monotonic()

    def lasts_s(self) -> float:
        """Seconds without a byte."""
        return time.monotonic() - self._since

    def wait(self, fault: FaultError, stopped: threading.Event) -> None:
        """Raises StorageError when it has been too long or too often, StoppedError when it is not wanted any more."""
        self._kinds[fault.kind] += 1
        tries = self._kinds.total()
        left = self._patience_s - (time.monotonic() - self._since)
        if left <= 0 or (fault.tries is not None and self._kinds[fault.kind] >= fault.tries):
            raise StorageError(f"{self._where}: {fault}; what is finished is kept, the same command goes on")
        delay = fault.wait_s
        if delay is None or (delay == 0 and tries > 1):
            delay = min(MAX_DELAY_S, FIRST_DELAY_S * 2.0 ** min(tries - 1, 30)) * random.uniform(0.5, 1)
        if stopped.wait(min(delay, left)):
            raise StoppedError


def _retry_after(value: str | None) -> float | None:
    """Seconds that a server asks to wait: it gives a number or a date."""
    if value is None:
        return None
    if value.strip().isdecimal():
        return float(value)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, OverflowError):
        return None
