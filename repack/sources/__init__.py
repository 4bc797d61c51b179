"""Sources of weights, and how a word on the command line names one."""

import re
from pathlib import Path

from formats.errors import RequestError, UnsupportedError
from repack.sources.base import Source
from repack.sources.folder import FolderSource
from repack.sources.gguf import SUFFIX, GGUFSource

DEMO = "demo"
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(:[\w.-]+)?", re.ASCII)


def demo_folder() -> Path:
    """The embedded checkpoint."""
    return Path(__file__).parent.parent / DEMO


def is_repository(name: str) -> bool:
    """Whether SOURCE means a repository on the hub: `org/name` or `org/name:Q4_K_M`, and no such path is here."""
    return name != DEMO and not Path(name).exists() and _REPOSITORY.fullmatch(name) is not None


def open_local(name: str) -> Source:
    """Open `demo` (./demo for a folder of that name), a GGUF file or a folder. Raises StreamingExpertsError."""
    if name == DEMO:
        return FolderSource(demo_folder())
    path = Path(name)
    if path.is_dir():
        return FolderSource(path)
    if path.suffix == SUFFIX and path.exists():
        return GGUFSource(path)
    if path.exists():
        raise UnsupportedError(
            f"{name}: is a file, expected one of {SUFFIX} or a folder with config.json and model*.safetensors"
        )
    if _REPOSITORY.fullmatch(name):
        raise RequestError(
            f"{name}: is no folder; a repository is not fetched for this, give the folder with its files"
        )
    raise RequestError(f"{name}: no such file or folder, and a repository on the hub is named org/name")
