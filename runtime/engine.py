"""Engine: a container, opened within a memory ceiling; prompt in, logits, tokens or text out."""

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from formats.budget import LOGITS_ROWS, MemoryTerms, human
from formats.config import LongRope
from formats.container import Container, open_container
from formats.dtypes import Float32
from formats.errors import FormatError, RequestError
from formats.index import REHEARSAL
from formats.kernels import DEFAULT_PRECISION, PRECISIONS
from formats.memory import default_ram_bytes, peak_memory_bytes
from runtime.backends.native import levels
from runtime.backends.native_ops import NativeOps
from runtime.backends.numpy_ops import NumpyOps
from runtime.cache import default_policy
from runtime.experts import Experts
from runtime.hot import hot_path, load_hot, save_hot
from runtime.models import new_model
from runtime.needs import memory_needs
from runtime.plan import position_factors
from runtime.sampling import GenerationConfig, Sampler, SamplingOptions, read_generation_config
from runtime.session import Session
from runtime.stats import Stats
from runtime.steps import Steps, ignore_nan
from runtime.store import EmbeddingRows, ExpertStore, load_resident
from runtime.streaming import StopStrings
from runtime.text import TOKENIZER, Text
from runtime.trace import TraceWriter

BACKENDS = ("native", "numpy")  # the first that is there is `auto`
READERS = 4  # reads in flight where many are queued; one is enough for a virtio disk, an NVMe wants 4 to 8


class Engine:
    """One opened container. Sessions are separate: several can be stepped together, sharing each expert's read.

    Use as a context manager, or call `close`. Not for several threads at once.
    """

    def __init__(
        self,
        container: Container,
        ram_bytes: int,
        terms: MemoryTerms,
        threads: int,
        ctx_size: int,
        chunk_size: int,
        readers: int,
        backend: str,
        precision: str,
        trace: Path | None,
        lookahead: str,
        hot: bool,
    ) -> None:
        layout = container.index.layout
        num_slots = terms.slots(layout, ram_bytes)
        rehearsal = container.index.extensions.get(REHEARSAL)
        if rehearsal is not None and lookahead == "auto":
            lookahead = "prompts"  # of made-up weights nearly every guess is right, which flatters decoding
        self.container = container
        self.terms = terms
        self.threads = threads
        self.config = layout.model
        self.ctx_size = ctx_size
        self.chunk_size = chunk_size
        self.warnings: list[str] = []  # one line each, for the command to show
        self._files = container.small_files()
        self.generation: GenerationConfig = read_generation_config(
            self._files.get("generation_config.json"), self._files.get("config.json")
        )
        self._text: Text | None = None
        with ExitStack() as resources:
            store = resources.enter_context(closing(ExpertStore(container)))
            embedding, *others = (
                resources.enter_context(closing(EmbeddingRows(container, table))) for table in layout.embeddings
            )
            ngrams = others[0] if others else None
            writer = resources.enter_context(TraceWriter(trace, layout)) if trace else None
            policy = default_policy(num_slots, {i: layer.num_experts for i, layer in layout.moe_layers()})
            self.experts = resources.enter_context(
                closing(
                    Experts(store, num_slots, readers, policy, writer, native=backend == "native", lookahead=lookahead)
                )
            )
            pool = resources.enter_context(ThreadPoolExecutor(threads, "compute", ignore_nan))
            self.resident = load_resident(container)
            self.ops = NumpyOps(layout, self.resident, embedding, self.experts, pool, ctx_size, chunk_size, ngrams)
            if backend == "native":
                self.ops = resources.enter_context(
                    closing(
                        NativeOps(
                            layout,
                            self.resident,
                            embedding,
                            self.experts,
                            pool,
                            ctx_size,
                            chunk_size,
                            threads=threads,
                            precision=precision,
                            ngrams=ngrams,
                        )
                    )
                )
            model = new_model(self.config.within(ctx_size), self.ops, self._tokenizer, made_up=rehearsal is not None)
            self.steps = resources.enter_context(closing(Steps(model, self.experts, ctx_size, container.folder)))
            self._resources = resources.pop_all()
        self._hot = hot_path(container.folder) if hot else None
        self._policy = policy
        try:
            hot_loaded = self._load_hot() if hot else 0
        except BaseException:
            self._resources.close()
            raise
        self._stats = Stats(self.ops.description, "direct" if store.direct else "buffered", ram_bytes, num_slots)
        self._stats.hot_loaded = hot_loaded
        if not store.direct:
            self.warnings.append("O_DIRECT does not work on this file system: reads go through the page cache, slower")
        scaling = self.config.rope_scaling
        if isinstance(scaling, LongRope) and scaling.is_long(ctx_size):
            self.warnings.append(
                f"positions turn by {position_factors(self.config, ctx_size)}, short prompts too: "
                f"with --ctx-size {scaling.original_max_position_embeddings} they turn by short_factor"
            )
        if rehearsal is not None:
            self.warnings.append(_rehearsal_warning(rehearsal))
        if self.generation.ignored:
            keys = ", ".join(self.generation.ignored)
            self.warnings.append(f"generation_config.json: {keys}: not implemented, ignored")

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        *,
        ram_bytes: int | None = None,
        backend: str = "auto",
        precision: str = DEFAULT_PRECISION,
        threads: int | None = None,
        ctx_size: int | None = None,
        chunk_size: int | None = None,
        readers: int = READERS,
        trace: str | os.PathLike[str] | None = None,
        lookahead: str = "auto",
        hot: bool = False,
    ) -> "Engine":
        """Open a container: index, small files and resident weights are checked, experts when first read.

        ram_bytes is a ceiling on all memory of this process; by default a share of what the machine and its memory
        groups grant. backend auto is native where its kernels were built; its precision is exact (as float32),
        close or fast (activations rounded to 16 or 8 bits).
        trace names a file for the routing of every step (runtime/trace.py).
        lookahead: whether experts are read on a guess before their layer asks for them; auto measures if that pays,
        and leaves it to prompts for a rehearsal.
        hot: read the experts that earlier runs used most at once (OUT.hot.json beside the container), and save them.
        Raises FormatError, ChecksumError or UnsupportedError for a container that cannot be trusted or run,
        RequestError for a value that cannot be met (too little memory names the floor and its terms).
        """
        if backend not in ("auto", *BACKENDS):
            raise RequestError(f"--backend is {backend}, expected auto or {', '.join(BACKENDS)}")
        if precision not in PRECISIONS:
            raise RequestError(f"--precision is {precision}, expected one of {', '.join(PRECISIONS)}")
        slow = backend == "auto" and not levels()
        if backend == "auto":
            backend = "numpy" if slow else "native"
        container = open_container(Path(path))
        terms, ctx_size, chunk_size, threads = memory_needs(container, ctx_size, chunk_size, threads)
        granted = default_ram_bytes()
        if ram_bytes is None:
            ram_bytes = max(granted, terms.floor_bytes)
        taken = terms.taken_bytes(container.index.layout, ram_bytes)
        routing = Path(trace) if trace is not None else None
        engine = cls(
            container,
            ram_bytes,
            terms,
            threads,
            ctx_size,
            chunk_size,
            readers,
            backend,
            precision,
            routing,
            lookahead,
            hot,
        )
        if slow:
            engine.warnings.append("NumPy only: the native kernels were not built, as no C compiler was there; slow")
        if backend == "native" and engine.config.numpy_parts:
            engine.warnings.append(f"NumPy computes beside the native kernels: {', '.join(engine.config.numpy_parts)}")
        if taken > granted:
            engine.warnings.append(f"{human(granted)} of memory are free for it, but this run takes {human(taken)}")
        return engine

    # ---- tokens

    def new_session(self) -> Session:
        """The state of a sequence that has not begun."""
        return self.steps.new_session()

    def step(self, batch: Sequence[tuple[Session, Sequence[int]]]) -> list[Float32]:
        """Feed each session its next token ids: see Steps.step. Returns per session its logits: [vocab_size]."""
        return self.steps.step(batch)

    def prefill(self, session: Session, token_ids: Sequence[int]) -> Float32:
        """Feed token_ids (at least one) in chunks; the logits after the last one: [vocab_size]."""
        began = time.perf_counter()
        self.steps.check_ids(session, token_ids)
        *chunks, last = self._chunks(token_ids)
        for chunk in chunks:
            self.steps.advance(session, chunk, last=True)
        (logits,) = self.step([(session, last)])
        self._stats.prompt_tokens += len(token_ids)
        self._stats.prompt_s += time.perf_counter() - began
        return logits

    def logits(self, token_ids: Sequence[int]) -> Float32:
        """Logits at every position of a sequence of its own: [T, vocab_size]."""
        return np.concatenate(list(self.logits_in_chunks(token_ids)))

    def logits_in_chunks(self, token_ids: Sequence[int]) -> Iterator[Float32]:
        """The rows of `logits`, some at a time: all of them can be larger than memory."""
        session = self.new_session()
        self.steps.check_ids(session, token_ids)
        for chunk in self._chunks(token_ids):
            hidden = self.steps.advance(session, chunk)
            for i in range(0, len(hidden), LOGITS_ROWS):
                yield self.steps.logits(hidden[i : i + LOGITS_ROWS])

    def generate_ids(
        self,
        token_ids: Sequence[int],
        *,
        max_new_tokens: int,
        ignore_eos: bool = False,
        sampling: SamplingOptions | None = None,
        session: Session | None = None,
    ) -> list[int]:
        """Continue token_ids; greedy unless sampling is given. The stop token, if one came, is not among the result.

        With a session, token_ids are what follows the ones it has already seen. Raises RequestError when the prompt
        does not fit into ctx_size; generation ends when ctx_size is full.
        """
        ids = self.stream_ids(token_ids, max_new_tokens, ignore_eos=ignore_eos, sampling=sampling, session=session)
        return list(ids)

    def stream_ids(
        self,
        token_ids: Sequence[int],
        max_new_tokens: int,
        *,
        ignore_eos: bool = False,
        sampling: SamplingOptions | None = None,
        session: Session | None = None,
    ) -> Iterator[int]:
        """As `generate_ids`, one id at a time, each as soon as it is chosen."""
        session = session or self.new_session()
        sampler = Sampler(sampling or SamplingOptions())
        history = [*session.token_ids, *token_ids]
        self._stats.ended = ""
        logits = self.prefill(session, token_ids)
        for left in range(max_new_tokens - 1, -1, -1):
            token_id = sampler.sample(logits, history)
            if token_id in self.generation.stop_ids and not ignore_eos:
                self._stats.ended = "stop token"
                return
            history.append(token_id)
            yield token_id
            if left == 0 or len(session.token_ids) == self.ctx_size:
                self._stats.ended = "max_new_tokens" if left == 0 else "ctx_size"
                return
            began = time.perf_counter()
            (logits,) = self.step([(session, [token_id])])
            self._stats.generated_tokens += 1
            self._stats.decode_s += time.perf_counter() - began

    # ---- text

    @property
    def text(self) -> Text:
        """The tokenizer and chat template. Raises FormatError when the container has none."""
        if self._text is None:
            self._text = Text.from_files(self._files)
        return self._text

    def generate(
        self,
        prompt: str | Sequence[int],
        *,
        max_new_tokens: int = 256,
        ignore_eos: bool = False,
        stop: Sequence[str] = (),
        session: Session | None = None,
        **sampling: Any,
    ) -> Iterator[str]:
        """Continue a text, or token ids, piece by piece.

        Sampling keywords (temperature, top_k, top_p, min_p, repeat_penalty, seed) override generation_config.json.
        Text ends before any of the stop strings.
        """
        token_ids = self.text.encode(prompt) if isinstance(prompt, str) else prompt
        options = self.sampling_options(**sampling)
        ids = self.stream_ids(token_ids, max_new_tokens, ignore_eos=ignore_eos, sampling=options, session=session)
        decoder, stops = self.text.decoder(), StopStrings(stop)
        for token_id in ids:
            piece, stopped = stops.push(decoder.push(token_id))
            if piece:
                yield piece
            if stopped:
                self._stats.ended = "stop text"
                return
        piece, _ = stops.push(decoder.finish())
        yield piece + stops.finish()

    def chat_ids(
        self, prompt: str | Sequence[Mapping[str, Any]], system: str | None = None, **template_options: Any
    ) -> list[int]:
        """Token ids of a chat through the model's template: its first question, or all messages so far.

        template_options are those of Text.encode_chat: tools and documents (lists of JSON objects), thinking
        (true or false), and any other variable of the template. Raises RequestError when the model has none.
        """
        messages = [{"role": "system", "content": system}] if system is not None else []
        asked = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        return self.text.encode_chat([*messages, *asked], **template_options)

    def sampling_options(self, **overrides: Any) -> SamplingOptions:
        """generation_config.json's defaults with overrides; None leaves a default. Raises RequestError."""
        given = {name: value for name, value in overrides.items() if value is not None}
        return replace(self.generation.sampling, **given)

    # ---- the rest

    @property
    def stats(self) -> Stats:
        """Counters and seconds so far: a copy that later work does not change."""
        experts, cache = self.experts, self.experts.cache
        return replace(
            self._stats,
            bytes_read=experts.bytes_read,
            read_s=experts.read_s,
            wait_s=experts.wait_s,
            reader=experts.reader.name,
            lookahead=str(experts.lookahead),
            early_reads=experts.early_reads,
            early_used=experts.early_used,
            cache_hits=cache.hits,
            cache_misses=cache.misses,
            peak_memory_bytes=peak_memory_bytes(),
        )

    def _chunks(self, token_ids: Sequence[int]) -> Iterator[Sequence[int]]:
        return (token_ids[i : i + self.chunk_size] for i in range(0, len(token_ids), self.chunk_size))

    def _tokenizer(self) -> Tokenizer:
        if TOKENIZER not in self._files:
            raise FormatError(f"{TOKENIZER}: is missing from the container, and hashes of n-grams follow from it")
        return self.text.tokenizer

    def _load_hot(self) -> int:
        """Fill free slots with what earlier runs used most; how many experts."""
        assert self._hot is not None
        uses = load_hot(self._hot, self.container.index.layout)
        for key, count in uses:
            self._policy.expect(key, count)
        return self.experts.load(key for key, _ in uses)

    def close(self) -> None:
        """Save the hot experts if that was asked for, close all files, end all threads; twice does no harm."""
        hot, self._hot = self._hot, None
        try:
            if hot is not None:
                save_hot(hot, self._policy.most_used())
        finally:
            self._resources.close()

    def __enter__(self) -> "Engine":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _rehearsal_warning(mark: Any) -> str:
    distinct = mark.get("distinct_bytes") if isinstance(mark, dict) else None
    repeats = f"; {human(distinct)} of distinct bytes lie behind it" if isinstance(distinct, int) else ""
    return f"this is a rehearsal: its weights are made up, and its text means nothing{repeats}"
