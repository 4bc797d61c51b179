"""What huggingface_hub does for us: names, commits, tokens, the cache; its errors as one line with what to do."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast
from urllib.parse import urlsplit

import huggingface_hub
from huggingface_hub import constants, errors
from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]  # public, by its documentation

from formats.errors import RequestError, StorageError
from formats.fields import shown
from repack.sources.remote import TRANSIENT, FaultError, Location, RemoteFile

# HTTPError of the client library that huggingface_hub uses, which has changed twice.
_TRANSPORT_ERROR: type[Exception] = cast("type[Exception]", errors.HfHubHTTPError.__mro__[1])
_TRIES, _DELAY_S = 4, 0.5  # while the user is waiting for the first answer; doubled each time

Result = TypeVar("Result")


@dataclass(frozen=True)
class Listing:
    """A repository at one commit, by the name that it has today. As a Hub it tells where its files are."""

    repository: str
    commit: str
    files: Mapping[str, RemoteFile]
    asked: str | None = None  # the revision that was asked for

    @property
    def endpoint(self) -> str:
        return constants.ENDPOINT

    def locate(self, file: RemoteFile) -> Location:
        """See repack.sources.remote.Hub."""
        where = f"{self.repository}/{file.name}"
        url = huggingface_hub.hf_hub_url(self.repository, file.name, revision=self.commit)
        with hub_errors(self.repository, self.commit), _faults():
            found = huggingface_hub.get_hf_file_metadata(url)
        said = (
            ("commit", found.commit_hash, self.commit),
            ("size", found.size, file.nbytes),
            ("ETag", found.etag, file.etag),
        )
        for what, now, before in said:
            if now is not None and before is not None and now != before:
                raise StorageError(f"{where}: has {what} {now}, expected {before}: it changed during the run")
        own, there = urlsplit(self.endpoint), urlsplit(found.location)
        headers = build_hf_headers()
        if (own.scheme, own.netloc) != (there.scheme, there.netloc):
            headers = {name: value for name, value in headers.items() if name.lower() == "user-agent"}
        return Location(found.location, headers)


def list_repository(name: str, revision: str | None) -> Listing:
    """The commit of a revision and its files. Raises RequestError for what the user can mend, StorageError."""
    info = _ask(
        name,
        revision,
        lambda: huggingface_hub.HfApi().model_info(
            name, revision=revision, files_metadata=True, timeout=constants.HF_HUB_ETAG_TIMEOUT
        ),
    )
    if not isinstance(info.sha, str):
        raise StorageError(f"{name}: {constants.ENDPOINT} does not say which commit it is")
    files = {}
    siblings: Any = info.siblings or ()  # the client checks no types
    for file in siblings:
        if file.size is not None:
            if not isinstance(file.rfilename, str) or type(file.size) is not int or file.size < 0:
                found = f"{shown(file.rfilename)} of {shown(file.size)} bytes"
                raise StorageError(f"{name}: {constants.ENDPOINT} lists {found}, expected a name and a length")
            sha256 = file.lfs.sha256 if file.lfs else None
            files[file.rfilename] = RemoteFile(file.rfilename, file.size, sha256 or file.blob_id, sha256)
    return Listing(info.id or name, info.sha, files, revision)


def read_small(listing: Listing, name: str) -> bytes:
    """A file that fits into memory, through the hub's cache. Raises as list_repository."""
    path = _ask(
        listing.repository,
        listing.commit,
        lambda: huggingface_hub.hf_hub_download(listing.repository, name, revision=listing.commit),
    )
    return Path(path).read_bytes()


def download(listing: Listing, names: list[str]) -> Path:
    """Files into the hub's cache, unless they are there; returns the snapshot's folder. Raises StorageError."""
    with hub_errors(listing.repository, listing.commit):
        folder = huggingface_hub.snapshot_download(listing.repository, revision=listing.commit, allow_patterns=names)
        # Under the commit alone it would not be found again by the name of its branch.
        huggingface_hub.hf_hub_download(listing.repository, "config.json", revision=listing.asked)
    missing = [name for name in names if not Path(folder, name).is_file()]
    if missing:  # the client gives what it has when it cannot ask
        raise StorageError(f"{listing.repository}: {missing[0]} was not fetched; the same command goes on")
    return Path(folder)


def cached_file(name: str, revision: str | None, file: str) -> Path | None:
    """Where a file lies in the hub's cache; nothing is asked of the hub. Raises RequestError for a bad name."""
    with hub_errors(name, revision):
        path = huggingface_hub.try_to_load_from_cache(name, file, revision=revision)
    return Path(path) if isinstance(path, str) else None


def cache_folder() -> Path:
    """Where downloads go."""
    return Path(constants.HF_HUB_CACHE)


def _ask(name: str, revision: str | None, call: Callable[[], Result]) -> Result:
    """What the call returns; a few more tries when the network or the hub fails."""
    for tried in range(_TRIES):
        try:
            with hub_errors(name, revision), _faults(raise_others=tried + 1 == _TRIES):
                return call()
        except FaultError as fault:  # noqa: PERF203  # the loop is there for it
            time.sleep(_DELAY_S * 2**tried if fault.wait_s is None else min(fault.wait_s, 60.0))
    raise AssertionError("the last try raises")


@contextmanager
def _faults(raise_others: bool = False) -> Iterator[None]:
    """Raise as FaultError what asking again may mend."""
    try:
        yield
    except (errors.OfflineModeIsEnabled, errors.RepositoryNotFoundError, errors.EntryNotFoundError):
        raise
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        if raise_others or status not in TRANSIENT:
            raise
        waits = error.response.headers.get("Retry-After", "")
        raise FaultError(
            str(status), f"{constants.ENDPOINT} answers {status}", float(waits) if waits.isdecimal() else None
        ) from None
    except (_TRANSPORT_ERROR, OSError) as error:
        if raise_others:
            raise
        raise FaultError("reset", f"{constants.ENDPOINT} cannot be reached ({_first_line(error)})") from None


@contextmanager
def hub_errors(name: str, revision: str | None) -> Iterator[None]:
    """Turn what huggingface_hub raises into one line that says what to do."""
    endpoint = constants.ENDPOINT
    known = huggingface_hub.get_token() is not None
    try:
        yield
    except errors.GatedRepoError:
        then = "with the account of your token" if known else "then log in with `hf auth login` or HF_TOKEN"
        raise RequestError(f"{name}: is gated: accept its terms at {endpoint}/{name}, {then}") from None
    except errors.DisabledRepoError:
        raise RequestError(f"{name}: is disabled on {endpoint}: nobody can fetch it") from None
    except errors.RevisionNotFoundError:
        raise RequestError(f"{name}: has no revision {revision!r}; see {endpoint}/{name}/tree/main") from None
    except errors.RepositoryNotFoundError:
        private = (
            "is private and not open to the account of your token: check the name, or ask its owner"
            if known
            else "is private: check the name, or log in with `hf auth login` or HF_TOKEN"
        )
        raise RequestError(f"{name}: is not on {endpoint}, or {private}") from None
    except errors.RemoteEntryNotFoundError as error:
        raise StorageError(f"{name}: a file is gone from {endpoint} ({_first_line(error)})") from None
    except errors.HFValidationError as error:
        raise RequestError(f"{name}: is no name of a repository ({_first_line(error)})") from None
    except errors.HfHubHTTPError as error:
        if error.response.status_code == 401:
            raise RequestError(
                f"{name}: {endpoint} does not accept your token: log in again with `hf auth login`, or mend HF_TOKEN"
            ) from None
        raise StorageError(f"{name}: {endpoint} answers {_first_line(error)}; the same command tries again") from None
    except (errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError, _TRANSPORT_ERROR, OSError) as error:
        how = "SSL_CERT_FILE names other certificates" if "CERTIFICATE" in str(error) else "the same command goes on"
        raise StorageError(
            f"{name}: cannot be fetched from {endpoint} ({_first_line(error)}); {how}, or give a folder with the files"
        ) from None
    except (AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:  # the client's, on its answer
        raise StorageError(
            f"{name}: {endpoint} answers what is no answer of a hub ({shown(_first_line(error))}); is it one?"
        ) from None


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
