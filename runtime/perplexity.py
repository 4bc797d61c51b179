"""Quality in numbers: perplexity on a text, and against a reference container KL divergence and top-1 agreement."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, repeat

import numpy as np
import numpy.typing as npt

from formats.dtypes import Float32
from formats.errors import FormatError, RequestError
from formats.index import FileChecksum
from runtime.engine import Engine

MOST_NATS = 700  # per token; exp of 710 is more than a float64 holds
Float64 = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Quality:
    """Results over all scored tokens; the last four are None without a reference. KL and NLL in nats."""

    tokens: int  # scored
    window: int
    stride: int
    nll: float
    perplexity: float
    reference_perplexity: float | None
    kl_mean: float | None  # KL(reference || this)
    kl_p99: float | None
    top1_agreement: float | None


def measure(
    engine: Engine,
    token_ids: Sequence[int],
    *,
    window: int,
    stride: int,
    reference: Engine | None = None,
    progress: Callable[[int], object] = lambda tokens: None,
) -> Quality:
    """Score token_ids in windows, each from an empty state; a window scores its last `stride` predictions.

    The first token of a window is never scored. Raises RequestError for windows that make no sense or do not fit.
    """
    check_windows(window, stride, engine.ctx_size)
    if len(token_ids) < 2:
        raise RequestError(f"the text has {len(token_ids)} tokens, expected at least 2")
    if reference is not None and _tokenizer(reference) != _tokenizer(engine):
        raise RequestError("--reference has another vocabulary or tokenizer, expected the same model's")
    nll, reference_nll, divergences, agreements = [], [], [], []
    for ids, skip in windows(token_ids, window, stride):
        rows = chain.from_iterable(engine.logits_in_chunks(ids))
        reference_rows = chain.from_iterable(reference.logits_in_chunks(ids)) if reference else repeat(None)
        for i, (logits, expected) in enumerate(zip(rows, reference_rows, strict=False)):
            if not skip <= i < len(ids) - 1:
                continue
            log_p, target = _log_softmax(logits), ids[i + 1]
            nll.append(-log_p[target])
            if expected is not None:
                log_q = _log_softmax(expected)
                reference_nll.append(-log_q[target])
                divergences.append(np.sum(np.exp(log_q) * (log_q - log_p)))
                agreements.append(log_p.argmax() == log_q.argmax())
        progress(len(ids) - 1 - skip)
    tokens, mean_nll = len(nll), float(np.mean(nll))
    perplexity = _perplexity(mean_nll, engine)
    if reference is None:
        return Quality(tokens, window, stride, mean_nll, perplexity, None, None, None, None)
    return Quality(
        tokens,
        window,
        stride,
        mean_nll,
        perplexity,
        _perplexity(float(np.mean(reference_nll)), reference),
        float(np.mean(divergences)),
        float(np.percentile(divergences, 99)),
        float(np.mean(agreements)),
    )


def check_windows(window: int, stride: int, ctx_size: int) -> None:
    """Raises RequestError for windows that make no sense or do not fit."""
    if not 2 <= window <= ctx_size:
        raise RequestError(f"--window is {window}, expected 2 to --ctx-size {ctx_size}")
    if not 1 <= stride <= window:
        raise RequestError(f"--stride is {stride}, expected 1 to --window {window}")


def windows(token_ids: Sequence[int], window: int, stride: int) -> Iterator[tuple[Sequence[int], int]]:
    """(ids of a window, how many of its predictions an earlier window has scored); covers all ids."""
    scored = 0  # token_ids before this one have been predicted
    for start in range(0, len(token_ids), stride):
        ids = token_ids[start : start + window]
        if len(ids) < 2 or start + len(ids) <= scored:
            return
        yield ids, max(0, scored - start - 1)
        scored = start + len(ids)


def _perplexity(nll: float, engine: Engine) -> float:
    """exp of it. Raises FormatError where no float64 holds that: not even weights drawn at random are so wrong."""
    if not nll < MOST_NATS:  # or not a number
        raise FormatError(
            f"{engine.container.folder}: its logits give {nll:.6g} nats per token, which has no perplexity, expected "
            f"less than {MOST_NATS}: the weights are not this model's, or damaged"
        )
    return math.exp(nll)


def _tokenizer(engine: Engine) -> tuple[int, FileChecksum | None]:
    return engine.config.vocab_size, engine.container.index.files.get("tokenizer.json")


def _log_softmax(logits: Float32) -> Float64:
    """Of the logits at one position: [vocab_size]."""
    x = logits.astype(np.float64)
    with np.errstate(invalid="ignore"):  # infinite ones give no number, which is refused in the end
        x -= x.max()
    x -= np.log(np.exp(x).sum())
    return x
