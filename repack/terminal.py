"""What `repack` shows while it works: one bar over bytes on a terminal, nothing elsewhere."""

import sys
from pathlib import Path
from types import TracebackType
from typing import Any

import click
from tqdm import tqdm

from repack.convert import Conversion
from repack.rates import Rates
from repack.vocabulary import has_tokenizer


class Bar:
    """A progress callback: bytes done, with an estimate, and what is being worked on. None without a terminal."""

    def __init__(self, total_bytes: int, rates: Rates | None = None) -> None:
        self._rates = rates
        self.done_bytes = 0
        self._tqdm: tqdm[Any] = tqdm(
            total=total_bytes, unit="B", unit_scale=True, leave=False, dynamic_ncols=True, disable=None, file=sys.stderr
        )

    def __call__(self, nbytes: int, what: str) -> None:
        self._tqdm.set_description_str(what, refresh=False)
        self.done_bytes += nbytes
        if self._rates is not None and not self._tqdm.disable:
            link, encoder = self._rates.link() / 1e6, self._rates.encoder(self.done_bytes) / 1e6
            self._tqdm.set_postfix_str(f"link {link:.1f} MB/s, encoder {encoder:.1f} MB/s", refresh=False)
        self._tqdm.update(nbytes)

    def __enter__(self) -> "Bar":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._tqdm.close()


def say(line: str) -> None:
    """One line to stderr, above a bar that is there."""
    with tqdm.external_write_mode(file=sys.stderr):
        click.echo(line, err=True)


def warn_of_page_cache(path: Path, done: str, direct: bool) -> None:
    """Say that a file system has no direct I/O, if so."""
    if not direct:
        say(f"warning: {path}: its file system has no direct I/O; {done} through the page cache, which is slower")


def warn_of_checkpoint(name: str, conversion: Conversion) -> None:
    """Say what was assumed of a checkpoint, and that it has no tokenizer, if so; of a geometry nobody knows.

    Raises FormatError or UnsupportedError for one that the runtime would refuse, before any weight is fetched.
    """
    for note in conversion.source.notes:
        say(f"warning: {name}: {note}")
    if grown := [
        f"{source.type} {source.published_bits:.3g} -> {source.kept_bits:.3g}" for source in conversion.plan.grown()
    ]:
        say(f"note: {name}: kept to the bit, but in more bits a weight than published: {', '.join(grown)}")
    if not has_tokenizer(conversion.small_files) and conversion.source.shards:
        say(f"warning: {name}: holds no tokenizer.json: the container takes and gives token ids, no text")
