"""What the commands of `repack` share: options, sources by name, sizes, JSON."""

import json
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click

from formats.budget import parse_size
from formats.encodings.base import GROUP_SIZES
from repack.sources import is_repository, open_local
from repack.sources.base import Source
from repack.sources.choice import split_choice
from repack.terminal import say

Command = Callable[..., Any]
BITS = ("4", "8", "16")
OUT = click.Path(path_type=Path)
json_option = click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
revision_option = click.option("--revision", help="Branch, tag or commit of a repository.")
requantize_option = click.option(
    "--requantize", is_flag=True, help="Round weights that arrive quantized once more; else they stay to the bit."
)
_LAYOUT = (
    click.option(
        "--bits", type=click.Choice(BITS), default="4", show_default=True, help="Of experts; 16: as they are."
    ),
    click.option(
        "--group-size",
        type=click.Choice([str(size) for size in GROUP_SIZES]),
        default="64",
        show_default=True,
        help="Weights of an expert that share a scale.",
    ),
    click.option(
        "--resident-bits", type=click.Choice(BITS), default="8", show_default=True, help="Of all other matrices."
    ),
)
_WRITING = (
    click.option("--force", is_flag=True, help="Replace the container or the unfinished conversion in OUT."),
    click.option(
        "--jobs", type=click.IntRange(1, 64), help="Files written at a time; default: processors and one more, up to 4."
    ),
)
_HUB = (
    click.option(
        "--connections", type=click.IntRange(1, 64), default=8, show_default=True, help="To the hub, at a time."
    ),
    click.option(
        "--patience",
        type=click.FloatRange(min=0),
        default=120,
        show_default=True,
        help="Minutes without a byte from the hub before it is given up.",
    ),
)


class Size(click.ParamType):  # type: ignore[type-arg]  # generic only in newer clicks
    """A number of bytes: 2GiB, 1500MB, 3g (GiB), 1048576."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        nbytes = parse_size(str(value))
        if nbytes is None:
            self.fail(f"{value!r} is no size such as 2GiB or 1500MB", param, ctx)
        return nbytes


def layout_options(command: Command) -> Command:
    """Add the options that decide what a container holds."""
    for option in reversed((*_LAYOUT, json_option)):
        command = option(command)
    return command


def writing_options(command: Command) -> Command:
    """Add the options of the commands that write a container."""
    for option in reversed((*_LAYOUT, *_WRITING, json_option)):
        command = option(command)
    return command


def hub_options(command: Command) -> Command:
    """Add the options of how a repository is read."""
    for option in reversed(_HUB):
        command = option(command)
    return command


def open_source(
    source: str,
    revision: str | None,
    connections: int = 8,
    patience: float = 1.0,
    jobs: int = 1,
    pattern: str | None = None,
) -> Source:
    """The source of that name: headers are read; `patience` is minutes. Raises StreamingExpertsError."""
    if is_repository(source):
        if not sys.stderr.isatty():
            os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # read when it is imported
        if bundle := os.environ.get("REQUESTS_CA_BUNDLE"):  # which older clients read
            os.environ.setdefault("SSL_CERT_FILE", bundle)
        from repack.sources.hub import Access, HubSource, open_repository  # slow to import

        name, choice = split_choice(source)
        access = Access(connections, 60.0 * patience, jobs)
        opened = open_repository(name, revision, access, choice, pattern)
        if isinstance(opened, HubSource):
            opened.remote.tell(say)
        if opened.repository != name:
            say(f"{name} is called {opened.repository} now")
        return opened
    if pattern is not None:
        raise click.UsageError(f"--file is for a repository on the hub, which {source} is not")
    if revision is not None:
        raise click.UsageError(f"--revision is for a repository on the hub, which {source} is not")
    return open_local(source)


def print_json(content: Mapping[str, Any]) -> None:
    """The result of a command as one object."""
    click.echo(json.dumps(content))
