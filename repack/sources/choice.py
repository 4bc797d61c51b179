"""Which GGUF files of a repository are meant: `org/name:Q4_K_M`, or a pattern of names."""

import re
from collections.abc import Iterable
from fnmatch import fnmatch

from formats.errors import RequestError

_SPLIT = re.compile(r"(.+)-\d{5}-of-\d{5}\.gguf")


def split_choice(source: str) -> tuple[str, str | None]:
    """org/name:Q4_K_M -> (org/name, Q4_K_M)."""
    name, _, choice = source.partition(":")
    return name, choice or None


def choose_gguf(names: Iterable[str], repository: str, choice: str | None, pattern: str | None) -> list[str]:
    """The files of the one model that a choice such as Q4_K_M or a pattern means: one, or all of a split.

    Projectors (mmproj) are no choices. Raises RequestError, naming all choices, unless exactly one is meant.
    """
    models: dict[str, list[str]] = {}
    for name in sorted(names):
        if name.endswith(".gguf") and "mmproj" not in name.rpartition("/")[2].lower():
            match = _SPLIT.fullmatch(name)
            models.setdefault(match[1] if match else name.removesuffix(".gguf"), []).append(name)
    found = {
        model: files
        for model, files in models.items()
        if (choice is None or _ends_with(model, choice))
        and (pattern is None or any(fnmatch(name, pattern) for name in files))
    }
    if len(found) == 1:
        return next(iter(found.values()))
    asked = " and ".join([*([f":{choice}"] if choice else []), *([f"--file {pattern}"] if pattern else [])])
    problem = f"{len(found)} of its models are called {asked}" if asked else f"holds {len(models)} GGUF models"
    listing = ", ".join(sorted(found or models))
    raise RequestError(f"{repository}: {problem}; choose one with {repository}:NAME or --file GLOB: {listing}")


def _ends_with(model: str, choice: str) -> bool:
    """Whether a file or its folder is of that quantization, as in model-Q4_K_M, model.Q4_K_M and Q4_K_M/model."""
    words = re.split(r"[-./]", model.lower())
    wanted = choice.lower()
    return wanted in words or model.lower().endswith(("-" + wanted, "." + wanted))
