"""A repository on the hub: headers and small files first, then, when there is room, a download of what is needed."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from functools import cached_property
from pathlib import Path
from typing import cast

import huggingface_hub
from huggingface_hub import constants, errors

from formats.errors import FormatError, RequestError, StorageError
from repack.sources.base import Reader, Shard, SourceTensor
from repack.sources.folder import SAFETENSORS_INDEX, FolderSource

SHARDS = "model*.safetensors"
# HTTPError of the client library that huggingface_hub uses, which has changed twice.
_TRANSPORT_ERROR: type[Exception] = cast("type[Exception]", errors.HfHubHTTPError.__mro__[1])


class Repository:
    """A repository at one commit, as a source that can be planned but not read (see repack.sources.base.Source).

    Raises RequestError for what the user can mend (name, revision, access), StorageError for a failing network.
    """

    def __init__(self, name: str, revision: str | None, small_files: Sequence[str]) -> None:
        with hub_errors(name, revision):
            info = huggingface_hub.HfApi().model_info(name, revision=revision, files_metadata=True)
        assert info.sha is not None
        self.repository = name
        self.revision = info.sha
        self._patterns = [SHARDS, SAFETENSORS_INDEX, *small_files]
        self._files = {
            file.rfilename: file
            for file in info.siblings or ()
            if any(fnmatch(file.rfilename, pattern) for pattern in self._patterns)
        }

    @cached_property
    def shards(self) -> Sequence[Shard]:
        return [
            Shard(name, file.size or 0, self.revision, file.lfs.sha256 if file.lfs else None)
            for name, file in sorted(self._files.items())
            if fnmatch(name, SHARDS)
        ]

    @cached_property
    def tensors(self) -> Mapping[str, SourceTensor]:
        with hub_errors(self.repository, self.revision):
            headers = huggingface_hub.HfApi().get_safetensors_metadata(self.repository, revision=self.revision)
        tensors: dict[str, SourceTensor] = {}
        for file, header in headers.files_metadata.items():
            for name, tensor in header.tensors.items():
                if name in tensors:
                    raise FormatError(f"{self.repository}: {name} stands in {tensors[name].file} and in {file}")
                first, end = tensor.data_offsets
                tensors[name] = SourceTensor(name, file, tensor.dtype, tuple(tensor.shape), first, end - first)
        return tensors

    def small_file(self, name: str) -> bytes | None:
        if name not in self._files:
            return None
        with hub_errors(self.repository, self.revision):
            path = huggingface_hub.hf_hub_download(self.repository, name, revision=self.revision)
        return Path(path).read_bytes()

    def reader(self) -> Reader:
        raise AssertionError("a repository is downloaded before it is read")

    def check(self) -> None:
        """A commit does not change."""

    @property
    def cache_folder(self) -> Path:
        """Where the download goes."""
        return Path(constants.HF_HUB_CACHE)

    def missing_bytes(self) -> int:
        """Bytes of the files that are not in the cache yet."""
        return sum(
            file.size or 0
            for name, file in self._files.items()
            if not isinstance(
                huggingface_hub.try_to_load_from_cache(self.repository, name, revision=self.revision), str
            )
        )

    def download(self) -> FolderSource:
        """Fetch what is needed into the hub's cache; what is already there is not fetched again."""
        with hub_errors(self.repository, self.revision):
            folder = huggingface_hub.snapshot_download(
                self.repository, revision=self.revision, allow_patterns=self._patterns
            )
        missing = [name for name in self._files if not Path(folder, name).is_file()]
        if missing:  # the client gives what it has when it cannot ask
            raise StorageError(f"{self.repository}: {missing[0]} was not fetched; the same command goes on")
        stated = {shard.name: shard.sha256 for shard in self.shards if shard.sha256}
        return FolderSource(Path(folder), repository=self.repository, revision=self.revision, sha256=stated)


@contextmanager
def hub_errors(name: str, revision: str | None) -> Iterator[None]:
    """Turn what huggingface_hub raises into one line that says what to do."""
    endpoint = constants.ENDPOINT
    try:
        yield
    except errors.GatedRepoError:
        raise RequestError(
            f"{name}: is gated: accept its terms at {endpoint}/{name}, then log in with `hf auth login` or HF_TOKEN"
        ) from None
    except errors.RevisionNotFoundError:
        raise RequestError(f"{name}: has no revision {revision!r}; see {endpoint}/{name}/tree/main") from None
    except errors.RepositoryNotFoundError:
        raise RequestError(
            f"{name}: is not on {endpoint}, or is private: check the name, or log in with `hf auth login` or HF_TOKEN"
        ) from None
    except (errors.NotASafetensorsRepoError, errors.SafetensorsParsingError) as error:
        raise FormatError(f"{name}: has no readable safetensors files ({_first_line(error)})") from None
    except errors.HFValidationError as error:
        raise RequestError(f"{name}: is no name of a repository ({_first_line(error)})") from None
    except errors.HfHubHTTPError as error:
        raise StorageError(f"{name}: {endpoint} answers {_first_line(error)}; the same command tries again") from None
    except (errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError, _TRANSPORT_ERROR, OSError) as error:
        raise StorageError(
            f"{name}: cannot be fetched from {endpoint} ({_first_line(error)}); the same command goes on, "
            "or give a folder with the files"
        ) from None


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
