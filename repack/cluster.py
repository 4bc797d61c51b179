"""An existing Dask cluster as an executor: `distributed` is an optional dependency, imported when it is asked for."""

import logging
from collections.abc import Iterator
from concurrent.futures import CancelledError, Executor
from contextlib import contextmanager
from importlib import import_module
from typing import Any, NamedTuple

from formats import __version__
from formats.errors import RequestError, StorageError
from repack import workers

CONNECT_S = 10.0


class Cluster(NamedTuple):
    """What runs the tasks; workers may come and go."""

    executor: Executor
    workers: int
    threads: int  # of all workers, each of which writes a file


@contextmanager
def connect(address: str) -> Iterator[Cluster]:
    """The cluster whose scheduler is there; what fails in it is one line.

    Raises RequestError without `distributed`, for an address that nobody answers and for workers of another version,
    StorageError when tasks are lost.
    """
    try:
        distributed: Any = import_module("distributed")  # only parts of it have types
    except ImportError:
        raise RequestError("--scheduler needs Dask: pip install 'streaming-experts[dask]'") from None
    logging.getLogger("distributed.client").setLevel(logging.CRITICAL)  # what it would log is raised here
    try:
        client = distributed.Client(address, timeout=CONNECT_S, set_as_default=False)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise RequestError(f"--scheduler {address}: no Dask scheduler answers there: {reason}") from None
    with client:
        _check_versions(client.run(workers.version, on_error="return"))
        threads = client.nthreads().values()
        try:
            yield Cluster(client.get_executor(), len(threads), sum(threads))
        except distributed.KilledWorker as error:
            raise StorageError(
                f"{address}: workers died again and again in {error.task}, the last one at "
                f"{error.last_worker.address}; what is finished is kept, the same command goes on"
            ) from None
        except CancelledError:
            raise StorageError(
                f"{address}: the scheduler is gone; what is finished is kept, the same command goes on"
            ) from None


def _check_versions(found: dict[str, object]) -> None:
    """Raises RequestError unless every worker has this version."""
    for address, version in found.items():
        if version != __version__:
            has = f"cannot import streaming-experts ({version})" if isinstance(version, Exception) else f"has {version}"
            raise RequestError(f"worker {address} {has}, expected streaming-experts {__version__}")
