"""`repack`: options in, calls out. Results go to stdout, progress and notes to stderr."""

import os
import shlex
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Executor
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from formats import __version__
from formats.budget import human, three_digits
from formats.container import read_container_index
from formats.errors import StreamingExpertsError, os_error_line
from formats.memory import granted_processors
from formats.quantization import MODELOPT_FILE
from repack import report, supported, tables
from repack.cli_plan import plan_command, rehearse_command
from repack.cluster import connect
from repack.compare import choose_experts
from repack.convert import Conversion, Outcome, convert, default_jobs, find_finished, prepare
from repack.encode import encoder_name
from repack.options import OUT, hub_options, json_option, open_source, print_json, requantize_option, writing_options
from repack.output import SMALL_FILES, begun_revision, check_space, inspect_folder
from repack.plan import Options, Plan
from repack.rates import Rates
from repack.sources import DEMO
from repack.sources.base import Source
from repack.sources.choice import split_choice
from repack.sources.folder import FolderSource
from repack.terminal import Bar, say, warn_of_checkpoint, warn_of_page_cache
from repack.verify import verify_bytes, verify_container


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="repack")
def cli() -> None:
    """Repack a Mixture-of-Experts checkpoint into a container that `stream-run` streams from disk."""


@cli.command("convert")
@click.argument("source")
@click.argument("out", type=OUT)
@writing_options
@click.option("--revision", help="Branch, tag or commit of a repository.")
@click.option("--file", "pattern", metavar="GLOB", help="Which GGUF files of a repository; or write org/name:Q4_K_M.")
@hub_options
@click.option("--download", is_flag=True, help="Fetch whole files into the hub's cache first, and check their SHA-256.")
@click.option("--dry-run", is_flag=True, help="Print the plan and write nothing.")
@click.option("--scheduler", metavar="ADDRESS", help="Work on the Dask cluster there (tcp://host:8786), not here.")
@click.option("--no-hash-source", is_flag=True, help="Do not take SHA-256 of local source files.")
@requantize_option
def convert_command(
    source: str,
    out: Path,
    bits: str,
    group_size: str,
    resident_bits: str,
    revision: str | None,
    pattern: str | None,
    connections: int,
    patience: float,
    download: bool,
    dry_run: bool,
    scheduler: str | None,
    force: bool,
    jobs: int | None,
    no_hash_source: bool,
    requantize: bool,
    as_json: bool,
) -> None:
    """Convert SOURCE into the container OUT.

    SOURCE is a folder with a checkpoint, a GGUF file, a repository on the hub (org/name, or org/name:Q4_K_M for one
    of its GGUF files), or `demo`, the checkpoint that comes with this program. A conversion that was stopped is
    completed by the same command.

    The workers of a --scheduler need this program and see OUT and SOURCE at the same paths as this machine.
    """
    options = Options(int(bits), int(group_size), int(resident_bits), requantize)
    if scheduler is not None:
        if jobs is not None:
            raise click.UsageError("--jobs is for work on this machine; on a cluster each thread of a worker does one")
        out = out.absolute()
        source = os.path.abspath(source) if source != DEMO and os.path.exists(source) else source
    jobs = jobs or default_jobs()
    revision = revision or begun_revision(out, split_choice(source)[0])
    opened = open_source(source, revision, connections, patience, jobs, pattern)
    conversion = prepare(opened, options)
    warn_of_checkpoint(source, conversion)
    if dry_run:
        _print_plan(conversion, as_json)
        return
    if requantize:
        say("--requantize: weights that arrive quantized are rounded once more, where the bits asked for are no more")
    for skipped in conversion.plan.skipped:
        say(f"skipped {skipped.tensors} tensors of {skipped.what} ({human(skipped.nbytes)})")
    started = time.monotonic()
    inspect_folder(out)
    outcome, fetched = None if force else find_finished(conversion, out), None
    if outcome is None:
        if download:
            conversion = _downloaded(conversion, out)
        rates = _rates(conversion.source, jobs) if scheduler is None else None
        with _executor(scheduler) as executor, Bar(conversion.work_bytes(not no_hash_source), rates) as bar:
            outcome = convert(
                conversion,
                out,
                jobs=jobs,
                force=force,
                hash_source=not no_hash_source,
                progress=bar,
                executor=executor,
            )
        if rates is not None:
            fetched = rates.facts(conversion.plan.source_bytes - outcome.resumed_bytes)
    _print_outcome(conversion, outcome, fetched, source, out, time.monotonic() - started, as_json)


@contextmanager
def _executor(scheduler: str | None) -> Iterator[Executor | None]:
    """Where tasks run: on a cluster, or None for threads here."""
    if scheduler is None:
        yield None
        return
    with connect(scheduler) as cluster:
        say(f"{scheduler}: {cluster.workers} workers with {cluster.threads} threads")
        yield cluster.executor


def _downloaded(conversion: Conversion, out: Path) -> Conversion:
    """The conversion with its weights on this machine: those of a repository are fetched when there is room."""
    from repack.sources.hub import HubSource
    from repack.sources.hub_api import cache_folder

    source = conversion.source
    if not isinstance(source, HubSource):
        return conversion
    small = (*SMALL_FILES, MODELOPT_FILE)
    missing = source.missing_bytes(small)
    check_space(out, conversion.output_bytes, (cache_folder(), missing))
    say(f"{source.repository} at {source.revision}: {human(missing)} to download into {cache_folder()}")
    return prepare(source.download(small), conversion.plan.options)


def _rates(source: Source, jobs: int) -> Rates | None:
    """Of a source that is read over the network."""
    from repack.sources.hub import HubSource

    return Rates(source.traffic, jobs) if isinstance(source, HubSource) else None


def _print_plan(conversion: Conversion, as_json: bool) -> None:
    plan = conversion.plan
    tokenizer = conversion.small_files.get(report.TOKENIZER_FILE, b"")
    described = {
        "options": plan.options.facts(),
        "source_bytes": plan.source_bytes,
        "output_bytes": conversion.output_bytes,
        "skipped": _skipped(plan),
        **report.describe_layout(plan.layout, len(tokenizer), granted_processors(), plan.origins()),
    }
    if as_json:
        print_json(described)
        return
    click.echo(tables.inspection_text(described))
    click.echo()
    for skipped in plan.skipped:
        click.echo(f"skips {skipped.tensors} tensors of {skipped.what} ({human(skipped.nbytes)})")
    if plan.options.requantize:
        click.echo("--requantize: weights that arrive quantized are rounded once more")
    click.echo(f"reads {human(plan.source_bytes)} and writes {human(conversion.output_bytes)}; nothing is written now")


def _print_outcome(
    conversion: Conversion,
    outcome: Outcome,
    fetched: dict[str, Any] | None,
    source: str,
    out: Path,
    seconds: float,
    as_json: bool,
) -> None:
    layout = outcome.index.layout
    read_bytes = 0 if outcome.already_there else conversion.plan.source_bytes - outcome.resumed_bytes
    direct_reads = True
    if read_bytes and isinstance(conversion.source, FolderSource):
        direct_reads = conversion.source.reads_directly()
        warn_of_page_cache(conversion.source.folder, "read", direct_reads)
    warn_of_page_cache(out, "written", outcome.direct_writes)
    if as_json:
        print_json(
            {
                "out": str(out),
                "already_there": outcome.already_there,
                "options": dict(outcome.index.options),
                "total_bytes": layout.total_bytes,
                "expert_bytes": layout.expert_bytes,
                "resident_bytes": layout.resident_bytes,
                "embedding_bytes": sum(table.nbytes for table in layout.embeddings),
                "source_bytes": conversion.plan.source_bytes,
                "read_bytes": read_bytes,
                "resumed_bytes": outcome.resumed_bytes,
                "seconds": seconds,
                "fetched": fetched,
                "encoder": encoder_name(),
                "direct_reads": direct_reads,
                "direct_writes": outcome.direct_writes,
                "skipped": _skipped(conversion.plan),
            }
        )
        return
    if outcome.already_there:
        click.echo(f"{out} is already there, converted with these options from files of these names and sizes")
        sample = " --sample 100" if outcome.index.source.repository else ""
        click.echo(f"compare the weights: repack verify {shlex.quote(str(out))} --source {shlex.quote(source)}{sample}")
    else:
        click.echo(
            f"{out}: {human(layout.total_bytes)}: experts {human(layout.expert_bytes)}, resident "
            f"{human(layout.resident_bytes)}, embedding {human(sum(table.nbytes for table in layout.embeddings))}"
        )
        resumed = f", {human(outcome.resumed_bytes)} were there already" if outcome.resumed_bytes else ""
        rate = three_digits(read_bytes / max(seconds, 1e-9) / 1e9)
        click.echo(
            f"read {human(read_bytes)} of weights in {three_digits(seconds)} s, {rate} GB/s{resumed}, "
            f"encoder {encoder_name()}"
        )
        if fetched is not None:
            click.echo(tables.fetched_text(fetched))
    next_step = "run it: stream-run" if report.TOKENIZER_FILE in outcome.index.files else "measure it: stream-run bench"
    click.echo(f"{next_step} {shlex.quote(str(out))}")


@cli.command("inspect")
@click.argument("out", type=OUT)
@click.option("--layer", type=click.IntRange(min=0), help="Show one record: of this layer.")
@click.option("--expert", type=click.IntRange(min=0), help="Show one record: of this expert.")
@json_option
def inspect_command(out: Path, layer: int | None, expert: int | None, as_json: bool) -> None:
    """Say what the container OUT holds and what running it takes."""
    if layer is None and expert is None:
        found = report.inspect(out, granted_processors())
        text = tables.inspection_text
    else:
        found = report.inspect_expert(out, layer or 0, expert or 0)
        text = tables.expert_text
    print_json(found) if as_json else click.echo(text(found))


@cli.command("verify")
@click.argument("out", type=OUT)
@click.option("--source", help="Compare every tensor with this checkpoint too: a SOURCE of `repack convert`.")
@click.option("--sample", type=click.IntRange(min=1), help="Compare only so many experts, chosen at random.")
@hub_options
@json_option
def verify_command(
    out: Path, source: str | None, sample: int | None, connections: int, patience: float, as_json: bool
) -> None:
    """Read all of the container OUT and check every byte; the exit status is 1 when something is damaged."""
    if sample is not None and source is None:
        raise click.UsageError("--sample is for --source, which is what experts are compared with")
    index = read_container_index(out).index
    same = source is not None and index.source.repository == split_choice(source)[0]
    revision = index.source.revision if same else None
    opened = open_source(source, revision, connections, patience) if source is not None else None
    chosen = choose_experts(index.layout, sample) if sample is not None else None
    with Bar(verify_bytes(out, opened, chosen)) as bar:
        result = verify_container(out, opened, bar, chosen)
    if as_json:
        print_json({**asdict(result), "sound": result.sound})
    else:
        click.echo(tables.verification_text(result))
    if not result.sound:
        raise click.exceptions.Exit(1)


@cli.command("families")
@click.option("--markdown", is_flag=True, help="As the tables of the README.")
@json_option
def families_command(markdown: bool, as_json: bool) -> None:
    """List what can be converted: types of models, and encodings in which their weights may arrive."""
    if as_json:
        models = [row._asdict() for row in supported.SUPPORTED]
        encodings = [row._asdict() for row in supported.SOURCE_ENCODINGS]
        print_json({"models": models, "encodings": encodings, "numpy_parts": supported.NUMPY_PARTS})
        return
    click.echo(supported.markdown() if markdown else tables.families_text(), nl=not markdown)


def _skipped(plan: Plan) -> list[dict[str, Any]]:
    return [{"what": skipped.what, "tensors": skipped.tensors, "bytes": skipped.nbytes} for skipped in plan.skipped]


cli.add_command(plan_command)
cli.add_command(rehearse_command)


def main() -> None:
    """The entry point: an error of the user or the machine is one line, a bug keeps its traceback."""
    try:
        status = cli.main(standalone_mode=False, prog_name="repack")
    except click.ClickException as error:
        error.show()
        status = error.exit_code
    except StreamingExpertsError as error:
        say(f"error: {error}")
        status = 1
    except click.Abort:
        say("interrupted; a conversion goes on with the same command")
        status = 130
    except OSError as error:
        if (line := os_error_line(error)) is None:
            raise
        say(f"error: {line}")
        status = 1
    sys.exit(status)


if __name__ == "__main__":
    main()
