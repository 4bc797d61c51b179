"""`repack plan` and `repack rehearse`: what a model would need and how fast it would run, before a download."""

import shlex
import time
from pathlib import Path

import click

from formats.budget import human, three_digits
from formats.errors import RequestError, StorageError
from formats.index import REHEARSAL
from formats.layout import Layout
from formats.memory import granted_processors
from formats.predict import Machine, measure
from repack import forecast, tables
from repack.convert import convert, default_jobs, prepare
from repack.known_models import KNOWN_MODELS, known_geometry
from repack.options import (
    OUT,
    Size,
    hub_options,
    layout_options,
    open_source,
    print_json,
    requantize_option,
    revision_option,
    writing_options,
)
from repack.plan import Options
from repack.rehearse import Geometry, prepare_rehearsal, read_geometry
from repack.sources import DEMO, demo_folder, is_repository
from repack.sources.base import Source
from repack.terminal import Bar, warn_of_checkpoint, warn_of_page_cache


@click.command("plan")
@click.argument("source")
@click.option("--out", type=OUT, default=".", help="Where the container would go; its disk is measured.")
@click.option("--ram", type=Size(), help="Memory to run with; default: most of what is free.")
@layout_options
@requantize_option
@revision_option
@hub_options
@click.option("--no-probe", is_flag=True, help="Do not measure this machine, and predict no speed.")
def plan_command(
    source: str,
    out: Path,
    ram: int | None,
    bits: str,
    group_size: str,
    resident_bits: str,
    requantize: bool,
    revision: str | None,
    connections: int,
    patience: float,
    no_probe: bool,
    as_json: bool,
) -> None:
    """Say what converting and running SOURCE takes and how fast it would decode here; nothing is written.

    SOURCE is what `repack convert` takes, a config.json, or the name of a well-known model (no network needed).
    From a repository only headers and small files are read. The exit status is 1 when the model cannot run here.
    """
    threads = granted_processors()
    options = Options(int(bits), int(group_size), int(resident_bits), requantize)
    conversion = prepare(_plannable(source, revision, connections, patience), options)
    warn_of_checkpoint(source, conversion)
    machine = None if no_probe else _measured(conversion.plan.layout, out, threads)
    report = forecast.forecast(conversion, out, ram, machine, threads)
    print_json(report) if as_json else click.echo(tables.forecast_text(report))
    if report["refusals"]:
        raise click.exceptions.Exit(1)


def _measured(layout: Layout, out: Path, threads: int) -> Machine:
    """What this machine does. Raises StorageError where the file of the probe cannot be written or read."""
    try:
        return measure(layout, out, threads)
    except OSError as error:
        reason = error.strerror or error
        raise StorageError(f"{out}: its disk cannot be measured ({reason}); --no-probe plans without speeds") from None


def _plannable(source: str, revision: str | None, connections: int, patience: float) -> Source:
    """A source to convert, or a geometry alone."""
    if source in KNOWN_MODELS or (Path(source).is_file() and source.endswith(".json")):
        return _geometry(source, revision)
    _refuse_unknown(source)
    return open_source(source, revision, connections, patience)


def _geometry(name: str, revision: str | None) -> Geometry:
    """A well-known model, a config.json or a folder with one, or a repository, of which small files are fetched."""
    if name in KNOWN_MODELS and revision is None:
        return known_geometry(name)
    if name == DEMO:
        return read_geometry(demo_folder())
    if is_repository(name):
        return Geometry.of(open_source(name, revision))
    _refuse_unknown(name)
    return read_geometry(Path(name))


def _refuse_unknown(name: str) -> None:
    """Raises RequestError for a word that names nothing here and no repository."""
    if name != DEMO and not Path(name).exists() and not is_repository(name):
        known = ", ".join(sorted(KNOWN_MODELS))
        raise RequestError(f"{name}: is not here and no repository org/name; known without a network are {known}")


@click.command("rehearse")
@click.argument("model")
@click.argument("out", type=OUT)
@writing_options
@revision_option
@click.option("--disk", type=Size(), help="Most that OUT may take: layer files past it repeat others as hard links.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of the made-up weights.")
def rehearse_command(
    model: str,
    out: Path,
    bits: str,
    group_size: str,
    resident_bits: str,
    revision: str | None,
    disk: int | None,
    seed: int,
    force: bool,
    jobs: int | None,
    as_json: bool,
) -> None:
    """Make a container of true geometry with made-up weights, to measure speed with before a download.

    MODEL is a config.json or a folder with one, the name of a well-known model, or a repository on the hub, of which
    only small files are read.
    """
    options = Options(int(bits), int(group_size), int(resident_bits))
    rehearsal = prepare_rehearsal(_geometry(model, revision), options, seed, disk)
    started = time.monotonic()
    with Bar(rehearsal.work_bytes(hash_source=False)) as bar:
        outcome = convert(rehearsal, out, jobs=jobs or default_jobs(), force=force, progress=bar)
    seconds = time.monotonic() - started
    warn_of_page_cache(out, "written", outcome.direct_writes)
    resumed, total_bytes = outcome.already_there or outcome.resumed_bytes > 0, outcome.index.layout.total_bytes
    distinct_bytes = outcome.index.extensions[REHEARSAL].get("distinct_bytes", total_bytes)
    if as_json:
        print_json(
            {
                "out": str(out),
                "seed": seed,
                "total_bytes": total_bytes,
                "distinct_bytes": distinct_bytes,
                "resumed": resumed,
                "seconds": seconds,
                "direct_writes": outcome.direct_writes,
            }
        )
        return
    rate = f"{three_digits(distinct_bytes / max(seconds, 1e-9) / 1e9)} GB/s"
    took = "not timed: it was there, all or in part" if resumed else f"written in {three_digits(seconds)} s, {rate}"
    repeats = f", {human(distinct_bytes)} of them distinct" if distinct_bytes < total_bytes else ""
    click.echo(f"{out}: {human(total_bytes)} of made-up weights{repeats}, {took}")
    click.echo(f"measure it: stream-run bench {shlex.quote(str(out))}")
