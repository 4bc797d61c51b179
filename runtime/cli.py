"""`stream-run`: options in, calls out. Text goes to stdout, numbers and warnings to stderr."""

import io
import json
import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

import click
from tqdm import tqdm

from formats import __version__
from formats.budget import human, token_bytes
from formats.container import open_container
from formats.errors import RequestError, StreamingExpertsError, os_error_line
from formats.memory import default_ram_bytes
from runtime.bench import num_steps, run_bench
from runtime.chat import chat_loop, limit_reached, read_template_options, refuse_without_chat
from runtime.engine import Engine
from runtime.needs import memory_needs
from runtime.options import ENGINE_OPTIONS, DefaultGroup, engine_options, read_ids, threads_option
from runtime.perplexity import check_windows, measure
from runtime.plan import memory_plan, plan_text, position_factors
from runtime.sampling import SamplingOptions
from runtime.simulate import hit_rates
from runtime.stats import Stats
from runtime.streaming import StopStrings
from runtime.text import TOKENIZER, require_tokenizer
from runtime.trace import read_trace

CACHE_SHARES = (0.1, 0.25, 0.5)  # of all experts


@click.group(cls=DefaultGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="stream-run")
def cli() -> None:
    """Run a container made by `repack convert` within the memory it is given.

    `stream-run OUT` is short for `stream-run run OUT`.
    """


def open_engine(
    out: Path,
    ram: int | None,
    threads: int | None,
    ctx_size: int | None,
    chunk: int | None,
    backend: str,
    precision: str,
    lookahead: str,
    hot: bool,
    verbose: bool,
    trace: Path | None = None,
) -> Engine:
    """Open the container; warnings, and with -v what was chosen, go to stderr."""
    engine = Engine.open(
        out,
        ram_bytes=ram,
        threads=threads,
        ctx_size=ctx_size,
        chunk_size=chunk,
        backend=backend,
        precision=precision,
        lookahead=lookahead,
        hot=hot,
        trace=trace,
    )
    for warning in engine.warnings:
        say(f"warning: {warning}")
    if verbose:
        stats, need = engine.stats, token_bytes(engine.container.index.layout)
        say(f"backend {stats.backend}, reads {stats.read_mode}, ctx-size {engine.ctx_size}, chunk {engine.chunk_size}")
        say(f"memory: ceiling {human(stats.ram_bytes)}, floor {human(engine.terms.floor_bytes)}, {stats.slots} slots")
        for name, nbytes in asdict(engine.terms).items():
            say(f"  {name.removesuffix('_bytes'):10} {human(nbytes)}")
        say(f"a token uses {human(need.expert_bytes)} of experts and {human(need.resident_bytes)} resident")
    return engine


def say(line: str) -> None:
    """One line to stderr."""
    click.echo(line, err=True)


@cli.command()
@engine_options
@click.option("-p", "--prompt", help="The prompt.")
@click.option("-f", "--file", "file", type=click.File("r", encoding="utf-8"), help="Read the prompt; - is stdin.")
@click.option("--ids", help="The prompt as token ids, such as 1,2,3; without a tokenizer ids come out, too.")
@click.option(
    "-n",
    "--max-new-tokens",
    type=click.IntRange(min=1),
    default=256,
    show_default=True,
    help="Most tokens of an answer.",
)
@click.option(
    "--temp", type=click.FloatRange(min=0), help="Temperature; 0 is greedy. Sampling defaults: generation_config.json."
)
@click.option("--top-k", type=click.IntRange(min=0), help="Keep the k likeliest tokens; 0 keeps all.")
@click.option("--top-p", type=click.FloatRange(0, 1), help="Keep the likeliest tokens that make up this probability.")
@click.option(
    "--min-p", type=click.FloatRange(0, 1), help="Keep tokens at least this share as likely as the likeliest."
)
@click.option(
    "--repeat-penalty", type=click.FloatRange(0.01, 100), help="Penalty on tokens that have occurred; 1 is none."
)
@click.option("--seed", type=int, help="Same seed, same text.")
@click.option("--stop", multiple=True, help="End before this text; may be given several times.")
@click.option("--ignore-eos", is_flag=True, help="Go on after the model's stop tokens.")
@click.option(
    "--chat/--raw", "chat", default=None, help="Use the model's chat template or not; default: if it has one."
)
@click.option("--system", help="System message of a chat.")
@click.option("--tools", type=click.File("rb"), help="JSON list of the tools that the model may call.")
@click.option("--documents", type=click.File("rb"), help="JSON list of the documents that it may use.")
@click.option("--thinking/--no-thinking", default=None, help="Turn the template's thinking on or off.")
@click.option("--template-variables", help="JSON object of more variables for the chat template.")
@click.option("--trace", type=click.Path(path_type=Path), help="Write the routing of every step to this file.")
def run(out: Path, **options: Any) -> None:
    """Continue a prompt, or chat when started in a terminal without one."""
    index = open_container(out).index
    if options["ids"] is None or options["stop"]:
        require_tokenizer(index.files)  # before a prompt is awaited and weights are read
    overrides = {"temperature": options["temp"], **pick(options, ("top_k", "top_p", "min_p", "repeat_penalty", "seed"))}
    given = {name: value for name, value in overrides.items() if value is not None}
    SamplingOptions(**given)  # as is what is out of range
    StopStrings(options["stop"])
    prompt = read_prompt(options, index.layout.model.vocab_size)
    if prompt is None and options["as_json"]:
        raise click.UsageError("--json needs a prompt: -p, -f, --ids or a pipe")
    has_tokenizer = TOKENIZER in index.files
    template_options = read_template_options(options)
    engine = open_engine(out, **pick(options, ENGINE_OPTIONS), trace=options["trace"])
    with engine:
        chat = options["chat"]
        if chat is None:
            chat = options["ids"] is None and engine.text.has_chat_template
        refuse_without_chat(options, chat)
        settings: dict[str, Any] = given | pick(options, ("max_new_tokens", "stop", "ignore_eos"))
        if options["verbose"]:
            chosen = asdict(engine.sampling_options(**given))
            say(f"sampling: {', '.join(f'{name} {value}' for name, value in chosen.items() if value is not None)}")
            stops = (f"{i} {engine.text.spelling(i)}" if has_tokenizer else str(i) for i in engine.generation.stop_ids)
            say(f"stop tokens: {', '.join(stops)}")
        if prompt is None:
            chat_loop(engine, settings, options["system"], chat=chat, **template_options)
            if engine.stats.generated_tokens:
                say(stats_line(engine.stats))
            return
        if isinstance(prompt, list):
            ids = prompt
        else:
            ids = engine.chat_ids(prompt, options["system"], **template_options) if chat else engine.text.encode(prompt)
        new_ids = engine.stream_ids(  # instead of text; nothing is computed until one of the two is asked
            ids,
            options["max_new_tokens"],
            ignore_eos=options["ignore_eos"],
            sampling=engine.sampling_options(**given),
        )
        pieces = engine.generate(ids, **settings) if has_tokenizer else with_commas(new_ids)
        if options["as_json"]:
            answer = {"text": "".join(pieces)} if has_tokenizer else {"token_ids": list(new_ids)}
            click.echo(json.dumps({**answer, "prompt_token_ids": ids, **stats_json(engine.stats)}))
        else:
            show_text(pieces)
        limit = limit_reached(engine.stats)
        say(stats_line(engine.stats) + (f"; {limit} ended the text" if limit else ""))


def show_text(pieces: Iterable[str]) -> None:
    """Each piece as it comes, then a newline, also before an error or Ctrl-C that ends them early."""
    begun = False
    try:
        for piece in pieces:
            click.echo(piece, nl=False)
            begun = True
    except (StreamingExpertsError, KeyboardInterrupt):
        if begun:
            click.echo()
        raise
    click.echo()


def with_commas(token_ids: Iterable[int]) -> Iterator[str]:
    """Token ids as --ids takes them, each as it comes."""
    for nth, token_id in enumerate(token_ids):
        yield f",{token_id}" if nth else str(token_id)


def pick(options: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    """The options of those names."""
    return {name: options[name] for name in names}


def read_prompt(options: dict[str, Any], vocab_size: int) -> str | list[int] | None:
    """The prompt from -p, a file or a pipe, or token ids; None in a terminal without one."""
    prompt, file, ids = options["prompt"], options["file"], options["ids"]
    given = [name for name, value in (("-p", prompt), ("-f", file), ("--ids", ids)) if value is not None]
    if len(given) > 1:
        raise click.UsageError(f"{given[0]} and {given[1]} are both given")
    if ids is not None:
        if options["chat"]:
            raise click.UsageError("--chat and --ids are both given")
        return read_ids(ids, vocab_size)
    if file is None and prompt is None and sys.stdin is None:
        raise click.UsageError("stdin is closed: the prompt must come from -p or -f")
    if file is None and prompt is None and not sys.stdin.isatty():
        file = click.File("r", encoding="utf-8").convert("-", None, None)
    if file is not None:
        prompt = read_text(file)
    if prompt == "":
        raise RequestError("the prompt is empty, expected text")
    return prompt


def read_text(file: IO[str]) -> str:
    """The whole of a text file. Raises RequestError when it is not UTF-8."""
    try:
        return file.read()
    except UnicodeDecodeError as error:
        raise RequestError(f"{file.name}: is not UTF-8 text (byte {error.start})") from None


def stats_json(stats: Stats) -> dict[str, Any]:
    """All counters and rates, bytes and seconds as plain numbers."""
    names = ("prompt_tokens_per_s", "decode_tokens_per_s", "read_bytes_per_s", "hit_rate")
    return {**asdict(stats), **{name: getattr(stats, name) for name in names}}


def stats_line(stats: Stats) -> str:
    """The one line of numbers after a run; speeds of what was done."""
    done = (
        ("prompt", stats.prompt_tokens, stats.prompt_tokens_per_s),
        ("decode", stats.generated_tokens, stats.decode_tokens_per_s),
    )
    speeds = [f"{name} {tokens} tokens, {rate:.3g} tokens/s; " for name, tokens, rate in done if tokens]
    return (
        f"{''.join(speeds)}read {human(stats.bytes_read)} at {stats.read_bytes_per_s / 1e9:.3g} GB/s; "
        f"cache hits {100 * stats.hit_rate:.3g} %; peak memory {human(stats.peak_memory_bytes)}; "
        f"{stats.backend}, {stats.read_mode} reads"
    )


@cli.command()
@engine_options
@click.argument("file", type=click.File("r", encoding="utf-8"))
@click.option("--window", type=int, default=512, show_default=True, help="Tokens per window, from an empty state.")
@click.option("--stride", type=int, help="Tokens from one window to the next; default: the window.")
@click.option("--max-tokens", type=click.IntRange(min=2), help="Use only this many tokens of the file.")
@click.option("--reference", type=click.Path(path_type=Path), help="Container to compare with: KL, top-1 agreement.")
def perplexity(out: Path, file: IO[str], window: int, stride: int | None, **options: Any) -> None:
    """Perplexity on a text FILE; with --reference also KL divergence and top-1 agreement, each in half of --ram.

    The text is encoded as a whole: above --ctx-size, each of its tokens takes 0.7 KB beside --ram.
    """
    picked, beside = pick(options, ENGINE_OPTIONS), options["reference"]
    if beside is not None:
        picked["ram"] = (default_ram_bytes() if picked["ram"] is None else picked["ram"]) // 2
    stride = window if stride is None else stride
    container = open_container(out)
    require_tokenizer(container.index.files)
    _, ctx_size, *_ = memory_needs(container, options["ctx_size"], options["chunk"], options["threads"])
    check_windows(window, stride, ctx_size)  # and the file, before what may take minutes to open
    text = read_text(file)
    with ExitStack() as stack:
        engine = stack.enter_context(open_engine(out, **picked))
        reference = stack.enter_context(open_engine(beside, **picked)) if beside is not None else None
        token_ids = engine.text.encode(text)[: options["max_tokens"]]
        progress = stack.enter_context(tqdm(total=len(token_ids), unit="token", disable=None, leave=False))
        quality = measure(
            engine,
            token_ids,
            window=window,
            stride=stride,
            reference=reference,
            progress=progress.update,
        )
        progress.close()
        if options["as_json"]:
            click.echo(json.dumps({**asdict(quality), **stats_json(engine.stats)}))
            return
        click.echo(f"tokens scored       {quality.tokens} (windows of {quality.window}, stride {quality.stride})")
        click.echo(f"perplexity          {quality.perplexity:.4f} ({quality.nll:.5f} nats per token)")
        if quality.top1_agreement is not None:
            click.echo(f"reference           {quality.reference_perplexity:.4f}")
            click.echo(f"KL divergence       {quality.kl_mean:.3g} nats mean, {quality.kl_p99:.3g} at 99 %")
            click.echo(f"top-1 agreement     {100 * quality.top1_agreement:.2f} %")
        say(stats_line(engine.stats))


@cli.command()
@engine_options
@click.option(
    "--prompt-tokens", type=click.IntRange(min=1), default=128, show_default=True, help="Random ones, for prefill."
)
@click.option(
    "--new-tokens", type=click.IntRange(min=1), default=32, show_default=True, help="Decoded after each prompt."
)
@click.option("--runs", type=click.IntRange(min=1), default=3, show_default=True, help="Of which medians are told.")
def bench(out: Path, prompt_tokens: int, new_tokens: int, runs: int, **options: Any) -> None:
    """Ceilings of disk and memory first, then prefill and decode and their share; the last line is JSON."""
    _, ctx_size, *_ = memory_needs(open_container(out), options["ctx_size"], options["chunk"], options["threads"])
    if prompt_tokens + new_tokens > ctx_size:
        raise RequestError(
            f"--prompt-tokens {prompt_tokens} and --new-tokens {new_tokens} make {prompt_tokens + new_tokens} tokens, "
            f"expected at most --ctx-size {ctx_size}"
        )
    with ExitStack() as stack:
        engine = stack.enter_context(open_engine(out, **pick(options, ENGINE_OPTIONS)))
        steps, silent = num_steps(engine, new_tokens, runs), options["as_json"] or None
        progress = stack.enter_context(tqdm(total=steps, unit="step", disable=silent, leave=False))

        def begin(what: str) -> None:
            progress.update()
            progress.set_description_str(what)

        lines = run_bench(engine, prompt_tokens=prompt_tokens, new_tokens=new_tokens, runs=runs, progress=begin)
        for line in lines:
            if not options["as_json"] or line.startswith("{"):
                with tqdm.external_write_mode():
                    click.echo(line)


@cli.command()
@click.argument("out", type=click.Path(path_type=Path))
@threads_option
@click.option("-c", "--ctx-size", type=int, help="Most tokens of a conversation; default: up to 4096.")
@click.option("--chunk", type=int, help="Prompt tokens computed at a time; default: 512.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
def plan(out: Path, threads: int | None, ctx_size: int | None, chunk: int | None, as_json: bool) -> None:
    """Say what OUT needs in memory, term by term, and which --ram to give it here; status 1 if it does not fit."""
    container = open_container(out)
    terms, ctx_size, *_ = memory_needs(container, ctx_size, chunk, threads)
    found = memory_plan(container.index.layout, terms, default_ram_bytes())
    found["position_factors"] = position_factors(container.index.layout.model, ctx_size)
    click.echo(json.dumps(found) if as_json else plan_text(found))
    if not found["fits"]:
        raise click.exceptions.Exit(1)


@cli.command()
@click.argument("trace", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
def simulate(trace: Path, as_json: bool) -> None:
    """Hit rates that caches of several sizes and policies would have had on TRACE, a file of `--trace`."""
    recorded = read_trace(trace)
    every = sum(recorded.num_experts)
    rates = {share: hit_rates(recorded, max(1, int(share * every))) for share in CACHE_SHARES}
    if as_json:
        click.echo(json.dumps({"steps": len(recorded.steps), "hit_rates": {s: r.table() for s, r in rates.items()}}))
        return
    click.echo(f"{'hit rate % with this share of the experts cached':48}" + "".join(f"{s:8.0%}" for s in rates))
    for name in next(iter(rates.values())).table():
        click.echo(f"{name:48}" + "".join(f"{100 * r.table()[name]:8.1f}" for r in rates.values()))


def main() -> None:
    """Entry point: errors of ours are one line and status 1, Ctrl-C is 130."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that cannot show a character is no reason to stop
    try:
        if sys.stdout is None:
            raise RequestError("stdout is closed: there is nowhere to write to")
        status = cli.main(standalone_mode=False)
        if status:
            sys.exit(status)
    except click.exceptions.Abort:
        sys.exit(130)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except StreamingExpertsError as error:
        say(f"error: {error}")
        sys.exit(1)
    except KeyboardInterrupt:
        say("interrupted")
        sys.exit(130)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(1)
    except OSError as error:
        if (line := os_error_line(error)) is None:
            raise
        say(f"error: {line}")
        sys.exit(1)
