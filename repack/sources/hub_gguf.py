"""GGUF files of a repository on the hub as a source: headers at once, weights by byte ranges."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from threading import Event

from formats.errors import FormatError
from formats.gguf import GGUFHeader, read_gguf_header
from repack.sources.base import Shard, SourceTensor
from repack.sources.gguf import GGUFCheckpoint, check_split, split_names
from repack.sources.hub import Access, HubSource
from repack.sources.hub_api import Listing


class HubGGUFSource(HubSource):
    """A GGUF file of a repository, or all parts of a split one (see repack.sources.base.Source)."""

    def __init__(self, listing: Listing, names: Sequence[str], access: Access) -> None:
        super().__init__(listing, access)
        self._names = names

    @cached_property
    def shards(self) -> Sequence[Shard]:
        return self._shards_of(self._names)

    @cached_property
    def _checkpoint(self) -> GGUFCheckpoint:
        for name in split_names(self._names[0]):
            if name not in self._names:
                raise FormatError(f"{self.repository}/{name}: is missing, but {self._names[0]} is a part of it")
        headers = self._read_headers(self._names, self._header)
        check_split(headers, self.repository)
        return GGUFCheckpoint(headers, f"{self.repository}/{self._names[0]}")

    @property
    def tensors(self) -> Mapping[str, SourceTensor]:
        return self._checkpoint.tensors

    @property
    def notes(self) -> Sequence[str]:  # type: ignore[override]  # which is known when headers are read
        return self._checkpoint.notes

    def small_file(self, name: str) -> bytes | None:
        return self._checkpoint.small_files.get(name)

    def _header(self, name: str, stopped: Event) -> GGUFHeader:
        def read(offset: int, most: int) -> bytes:
            return self.remote.read(name, offset, most, stopped)

        return read_gguf_header(read, self.remote.files[name].nbytes, f"{self.repository}/{name}")
