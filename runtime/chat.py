"""The interactive chat of `stream-run`: one line in, an answer out, the history kept."""

import sys
from collections.abc import Generator, Mapping
from contextlib import closing, suppress
from dataclasses import dataclass, field
from typing import Any

import click

from formats.budget import human
from formats.errors import FormatError, RequestError
from formats.fields import parse_json, shown
from runtime.engine import Engine
from runtime.session import Session
from runtime.stats import Stats

HELP = "/reset begins anew, /stats shows numbers, /quit or Ctrl-D ends; Ctrl-C stops an answer"


CHAT_OPTIONS = ("system", "tools", "documents", "thinking", "template_variables")  # of the command line


def refuse_without_chat(options: Mapping[str, Any], chat: bool) -> None:
    """Raises RequestError for an option that only a chat has."""
    for name in CHAT_OPTIONS:
        if options[name] is not None and not chat:
            reason = "this is no chat: the model has no chat template, or --raw or --ids is set"
            raise RequestError(f"--{name.replace('_', '-')} is set, but {reason}")


def read_template_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """What is set of Text.encode_chat's keywords. Raises FormatError for JSON that is not what it should be."""
    found: dict[str, Any] = {} if options["thinking"] is None else {"thinking": options["thinking"]}
    for name in ("tools", "documents"):
        if (file := options[name]) is not None:
            found[name] = parse_json(file.read(), file.name)
            if not isinstance(found[name], list) or not all(isinstance(item, dict) for item in found[name]):
                raise FormatError(f"{file.name}: is {shown(found[name])}, expected a list of objects")
    if (text := options["template_variables"]) is not None:
        variables = parse_json(text.encode(), "--template-variables")
        if not isinstance(variables, dict) or {"messages", "add_generation_prompt"} & variables.keys():
            raise FormatError(f"--template-variables: is {shown(variables)}, expected an object of other variables")
        found |= variables
    return found


@dataclass
class Conversation:
    """Messages so far and the session that has read them."""

    engine: Engine
    settings: dict[str, Any]  # of Engine.generate
    system: str | None
    chat: bool  # through the chat template, or as one growing text
    template_options: dict[str, Any] = field(default_factory=dict)  # of Text.encode_chat
    messages: list[dict[str, str]] = field(default_factory=list)
    session: Session | None = None

    def __post_init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget everything but the system message."""
        self.messages = [{"role": "system", "content": self.system}] if self.system is not None else []
        self.session = None

    def reply(self, user: str) -> Generator[str, None, None]:
        """The answer, piece by piece. What the session has read is not read again when the new ids extend it.

        The question and what was said of the answer are remembered together; a question without any is forgotten.
        """
        messages = [*self.messages, {"role": "user", "content": user}]
        ids = self._ids(messages)
        seen = self.session.token_ids if self.session is not None else []
        if self.session is None or len(ids) <= len(seen) or ids[: len(seen)] != seen:
            self.session, seen = self.engine.new_session(), []
        pieces: list[str] = []
        try:
            for piece in self.engine.generate(ids[len(seen) :], session=self.session, **self.settings):
                pieces.append(piece)
                yield piece
        finally:
            if pieces:
                self.messages = [*messages, {"role": "assistant", "content": "".join(pieces)}]

    def _ids(self, messages: list[dict[str, str]]) -> list[int]:
        if self.chat:
            return self.engine.text.encode_chat(messages, **self.template_options)
        return self.engine.text.encode("".join(message["content"] for message in messages))


def chat_loop(
    engine: Engine, settings: dict[str, Any], system: str | None, *, chat: bool, **template_options: Any
) -> None:
    """Talk until /quit or the end of input."""
    conversation = Conversation(engine, settings, system, chat, template_options)
    click.echo(HELP, err=True)
    with suppress(ImportError):  # of a Python without it
        import readline  # noqa: F401 - with it `input` edits lines and recalls them
    while True:
        try:
            line = ask().strip()
        except (EOFError, KeyboardInterrupt):
            click.echo(err=True)
            return
        except UnicodeDecodeError as error:
            click.echo(f"error: the line is not UTF-8 text (byte {error.start})", err=True)
            continue
        if line == "/quit":
            return
        if line == "/reset":
            conversation.reset()
        elif line == "/help":
            click.echo(HELP, err=True)
        elif line == "/stats":
            show_stats(engine)
        elif line.startswith("/"):
            click.echo(f"unknown command {line.split()[0]}; {HELP}", err=True)
        elif line:
            answer(conversation, line)


def ask() -> str:
    """The next line, which a terminal lets edit (readline). Raises EOFError or KeyboardInterrupt at the end."""
    if sys.stdin.isatty() and sys.stdout.isatty():
        return input("> ")
    click.echo("> ", nl=False, err=True)
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line


def answer(conversation: Conversation, line: str) -> None:
    """Show one answer; Ctrl-C ends it and keeps what was said."""
    try:
        with closing(conversation.reply(line)) as pieces:
            for piece in pieces:
                click.echo(piece, nl=False)
        if limit := limit_reached(conversation.engine.stats):
            click.echo(f" [{limit} ended this]", err=True, nl=False)
    except KeyboardInterrupt:
        click.echo(" [stopped]", err=True, nl=False)
    except RequestError as error:
        click.echo(f"error: {error}; /reset begins anew", err=True)
    click.echo()


def limit_reached(stats: Stats) -> str:
    """The option that ended the latest text before the model did, or nothing."""
    return f"--{stats.ended.replace('_', '-')}" if stats.ended in ("max_new_tokens", "ctx_size") else ""


def show_stats(engine: Engine) -> None:
    """Speed, cache and memory so far."""
    stats = engine.stats
    click.echo(
        f"prompt {stats.prompt_tokens_per_s:.3g} tokens/s, decode {stats.decode_tokens_per_s:.3g} tokens/s, "
        f"cache hits {100 * stats.hit_rate:.3g} %, peak memory {human(stats.peak_memory_bytes)}",
        err=True,
    )
