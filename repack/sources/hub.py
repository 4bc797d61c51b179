"""A repository on the hub as a source: headers are read at once, weights by byte ranges when they are needed."""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatch
from functools import cached_property
from pathlib import Path
from threading import Event
from typing import NamedTuple, TypeVar

from formats.errors import FormatError, RequestError
from formats.tensorfile import TensorEntry, header_bytes, parse_header
from repack.rates import Traffic
from repack.sources.ahead import Link, RemoteReader
from repack.sources.base import Shard, SourceTensor
from repack.sources.choice import choose_gguf
from repack.sources.folder import FolderSource
from repack.sources.hub_api import Listing, cached_file, download, list_repository, read_small
from repack.sources.remote import Remote
from repack.sources.shards import SAFETENSORS_INDEX, SHARDS, collect_tensors, read_weight_map

FIRST_BYTES = 64 << 10  # of a shard: most headers of fused checkpoints are shorter, others take a second request

Header = TypeVar("Header")


class Access(NamedTuple):
    """How a repository is read."""

    connections: int = 8
    patience_s: float = 7200.0  # without a byte, before it is given up
    jobs: int = 4  # tasks that read at a time


class HubSource:
    """A repository at one commit (see repack.sources.base.Source); headers are read when tensors are asked for.

    Raises RequestError for what the user can mend (name, revision, access), FormatError, UnsupportedError or
    StorageError, naming the file.
    """

    notes: Sequence[str] = ()

    def __init__(self, listing: Listing, access: Access) -> None:
        self.repository = listing.repository
        self.revision = listing.commit
        self._listing = listing
        self._small_bytes = 0  # of small files, fetched
        self.remote = Remote(listing, listing.repository, listing.files, access.patience_s)
        self._link = Link(self.remote, access.connections, access.jobs)

    @cached_property
    def _weight_map(self) -> dict[str, str] | None:
        raw = self.small_file(SAFETENSORS_INDEX)
        where = f"{self.repository}/{SAFETENSORS_INDEX}"
        return read_weight_map(raw, where, self._listing.files.__contains__) if raw is not None else None

    @cached_property
    def shards(self) -> Sequence[Shard]:
        names = self._unlisted() if self._weight_map is None else sorted(set(self._weight_map.values()))
        return self._shards_of(names)

    @cached_property
    def tensors(self) -> Mapping[str, SourceTensor]:
        headers = self._read_headers([shard.name for shard in self.shards], self._safetensors_header)
        return collect_tensors(headers.items(), self._weight_map, self.repository)

    def small_file(self, name: str) -> bytes | None:
        if name not in self._listing.files:
            return None
        if cached_file(self.repository, self.revision, name) is None:
            self._small_bytes += self._listing.files[name].nbytes
        return read_small(self._listing, name)

    def reader(self) -> RemoteReader:
        return RemoteReader(self._link)

    def traffic(self) -> Traffic:
        """What has gone over the network, and how long tasks have waited for it."""
        remote = self.remote
        return Traffic(remote.received_bytes, remote.requests, dict(remote.faults), self._link.waited_s)

    def fetched_bytes(self) -> int:
        """Everything: small files, headers, and what was read of weights."""
        return self._small_bytes + self.remote.received_bytes

    def check(self) -> None:
        """A commit does not change, and every answer was checked."""

    def missing_bytes(self, small_files: Sequence[str]) -> int:
        """Bytes of a download that are not in the hub's cache yet."""
        return sum(
            self._listing.files[name].nbytes
            for name in self._wanted(small_files)
            if cached_file(self.repository, self.revision, name) is None
        )

    def download(self, small_files: Sequence[str]) -> FolderSource:
        """Fetch whole files into the hub's cache; what is already there is not fetched again."""
        folder = download(self._listing, self._wanted(small_files))
        return _snapshot(folder, self.repository, {s.name: s.sha256 for s in self.shards if s.sha256})

    def _wanted(self, small_files: Sequence[str]) -> list[str]:
        names = [*(shard.name for shard in self.shards), SAFETENSORS_INDEX, *small_files]
        return [name for name in names if name in self._listing.files]

    def _unlisted(self) -> list[str]:
        names = sorted(name for name in self._listing.files if fnmatch(name, SHARDS) and "/" not in name)
        if not names:
            raise FormatError(f"{self.repository}: holds no {SHARDS}, so it is no checkpoint that can be read")
        return names

    def _shards_of(self, names: Sequence[str]) -> Sequence[Shard]:
        files = [self._listing.files[name] for name in names]
        return [Shard(file.name, file.nbytes, self.revision, file.sha256, whole=False) for file in files]

    def _read_headers(self, names: Sequence[str], read: Callable[[str, Event], Header]) -> dict[str, Header]:
        """The header of every file, several at a time."""
        stopped = Event()
        with ThreadPoolExecutor(self._link.connections, "headers") as threads:
            try:
                return dict(zip(names, threads.map(lambda name: read(name, stopped), names), strict=True))
            finally:
                stopped.set()  # the first failure, or Ctrl-C, ends the others too

    def _safetensors_header(self, name: str, stopped: Event) -> dict[str, TensorEntry]:
        where, nbytes = f"{self.repository}/{name}", self._listing.files[name].nbytes
        raw = self.remote.read(name, 0, FIRST_BYTES, stopped)
        end = 8 + header_bytes(raw, nbytes, where)
        raw += self.remote.read(name, len(raw), end - len(raw), stopped)
        return parse_header(raw[8:end], nbytes, where)


def open_repository(
    name: str, revision: str | None, access: Access, choice: str | None = None, pattern: str | None = None
) -> "HubSource | FolderSource":
    """A snapshot of it that is whole in the hub's cache, without any request; else the repository itself.

    `choice` and `pattern` say which GGUF files are meant (see repack.sources.choice).
    """
    asked = choice is not None or pattern is not None
    cached = None if asked else cached_snapshot(name, revision)
    if cached is not None:
        return cached
    listing = list_repository(name, revision)
    if asked or not any(fnmatch(file, SHARDS) for file in listing.files):
        if any(file.endswith(".gguf") for file in listing.files):
            from repack.sources.hub_gguf import HubGGUFSource

            return HubGGUFSource(listing, choose_gguf(listing.files, name, choice, pattern), access)
        if asked:
            raise RequestError(f"{name}: holds no GGUF files, so there is nothing to choose")
    return HubSource(listing, access)


def cached_snapshot(name: str, revision: str | None) -> FolderSource | None:
    """The snapshot in the hub's cache if config.json and all weights are there; nothing is asked of the hub."""
    config = cached_file(name, revision, "config.json")
    if config is None:
        return None
    folder = config.parent
    if (folder / SAFETENSORS_INDEX).is_file():
        raw = (folder / SAFETENSORS_INDEX).read_bytes()
        try:
            read_weight_map(raw, str(folder / SAFETENSORS_INDEX), lambda shard: (folder / shard).is_file())
        except FormatError:
            return None
    elif not (folder / "model.safetensors").is_file():
        return None
    return _snapshot(folder, name, {})


def _snapshot(folder: Path, repository: str, sha256: Mapping[str, str]) -> FolderSource:
    """A folder of the cache: it has the commit's name, and its files are links to blobs that have their hash's."""
    blobs = {path.name: path.resolve().name for path in folder.glob(SHARDS)}
    hashes = {name: blob for name, blob in blobs.items() if len(blob) == 64}
    return FolderSource(folder, repository=repository, revision=folder.name, sha256={**hashes, **sha256})
