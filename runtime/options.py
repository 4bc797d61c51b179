"""What the commands of `stream-run` share: which word names one, sizes, and the options that open a container."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from formats.budget import parse_size
from formats.errors import RequestError
from formats.fields import shown
from formats.kernels import DEFAULT_PRECISION, PRECISIONS
from runtime.engine import BACKENDS

Command = TypeVar("Command", bound=Callable[..., Any])
ENGINE_OPTIONS = ("ram", "threads", "ctx_size", "chunk", "backend", "precision", "lookahead", "hot", "verbose")


class Size(click.ParamType):  # type: ignore[type-arg]  # generic only in newer clicks
    """A number of bytes: 2GiB, 1500MB, 3g (GiB), 1048576."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        nbytes = parse_size(str(value))
        if nbytes is None:
            self.fail(f"{value!r} is no size such as 2GiB or 1500MB", param, ctx)
        return nbytes


class DefaultGroup(click.Group):
    """A group whose command `run` may be left out: the first word that is no option names a command or OUT."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        own = {name for parameter in self.get_params(ctx) for name in parameter.opts}
        if not args or args[0] in own:
            return super().parse_args(ctx, args or ["--help"])
        position = self._first_word(ctx, args)
        if position is not None and args[position] in self.commands:
            args = [args[position], *args[:position], *args[position + 1 :]]
        else:
            args = ["run", *args]
        return super().parse_args(ctx, args)

    def _first_word(self, ctx: click.Context, args: list[str]) -> int | None:
        """Where the first argument stands that is neither an option nor the value of one."""
        takes_value = {
            name
            for command in self.commands.values()
            for parameter in command.params
            if isinstance(parameter, click.Option) and not parameter.is_flag
            for name in parameter.opts
        }
        position = 0
        while position < len(args):
            if args[position] == "--":
                return position + 1 if position + 1 < len(args) else None
            if not args[position].startswith("-") or args[position] == "-":
                return position
            position += 2 if args[position] in takes_value else 1
        return None


def read_ids(text: str, vocab_size: int) -> list[int]:
    """The token ids of --ids, 1,2,3. Raises RequestError for anything else, and for one outside the vocabulary."""
    words = [word.strip() for word in text.split(",")]
    for word in words:
        if not (word.isascii() and word.isdigit() and len(word) < 20 and int(word) < vocab_size):
            raise RequestError(
                f"--ids holds {shown(word)!r}, expected token ids from 0 to {vocab_size - 1} with commas between them"
            )
    return [int(word) for word in words]


def no_more_than_processors(_: click.Context, __: click.Parameter, threads: int | None) -> int | None:
    """--threads, which share the machine's processors. Raises RequestError for more of them."""
    processors = os.cpu_count()
    if threads is not None and processors is not None and threads > processors:
        raise RequestError(f"--threads is {threads}, expected at most {processors}, the processors of this machine")
    return threads


threads_option = click.option(
    "-t",
    "--threads",
    type=int,
    callback=no_more_than_processors,
    help="Compute threads; default: the processors that affinity and CPU limits grant.",
)


def engine_options(command: Command) -> Command:
    """The options of every command that opens a container."""
    for option in reversed(
        (
            click.argument("out", type=click.Path(path_type=Path)),
            click.option("--ram", type=Size(), help="Ceiling on all memory, such as 2GiB; default: what is free."),
            threads_option,
            click.option("-c", "--ctx-size", type=int, help="Most tokens of a conversation; default: up to 4096."),
            click.option("--chunk", type=int, help="Prompt tokens computed at a time; default: 512."),
            click.option("--backend", default="auto", show_default=True, help=f"auto or {', '.join(BACKENDS)}."),
            click.option(
                "--precision",
                default=DEFAULT_PRECISION,
                show_default=True,
                help=f"Of the native backend: {', '.join(PRECISIONS)}.",
            ),
            click.option(
                "--lookahead", default="auto", show_default=True, help="Read on a guess: auto, on, off or prompts."
            ),
            click.option("--hot", is_flag=True, help="Begin with the experts used most before, kept in OUT.hot.json."),
            click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout."),
            click.option("-v", "--verbose", is_flag=True, help="Say what was chosen, on stderr."),
        )
    ):
        command = option(command)
    return command
