"""Steps of a model over a batch of sessions, each whole or not at all."""

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from threadpoolctl import ThreadpoolController

from formats.dtypes import Float32
from formats.errors import FormatError, RequestError
from runtime.experts import Experts
from runtime.models import Model
from runtime.session import Sequence as StepSequence
from runtime.session import Session


class Steps:
    """Feeds sessions to one model; `where` is the folder that errors name. Close it when done."""

    def __init__(self, model: Model, experts: Experts, ctx_size: int, where: Path) -> None:
        self.model = model
        self._experts = experts
        self._ctx_size = ctx_size
        self._where = where
        self._blas = ThreadpoolController().select(user_api="blas").lib_controllers
        self._thread = ThreadPoolExecutor(1, "step")

    def new_session(self) -> Session:
        """The state of a sequence that has not begun."""
        return Session([], self.model.new_states())

    def step(self, batch: Sequence[tuple[Session, Sequence[int]]]) -> list[Float32]:
        """Feed each session its next token ids (at least one) in one pass; experts are read once for all of them.

        Returns per session the logits after its last id: [vocab_size]. A step that raises leaves the sessions as
        they were. Raises RequestError for an id outside the vocabulary, no ids, more than ctx_size tokens in a
        session or a session that stands twice in the batch, FormatError for logits that are no numbers.
        """
        hidden, sequences = self._forward(batch, last=True)
        logits = self.logits(hidden)
        _keep(batch, sequences)
        return list(logits)

    def advance(self, session: Session, token_ids: Sequence[int], *, last: bool = False) -> Float32:
        """As `step` for one session, but the last hidden states of all new tokens, or the last: [.., hidden_size]."""
        batch = [(session, token_ids)]
        hidden, sequences = self._forward(batch, last)
        _keep(batch, sequences)
        return hidden

    def logits(self, hidden: Float32) -> Float32:
        """Of last hidden states [T, hidden_size]: [T, vocab_size]. Raises FormatError for what is no number."""
        with self._computing():
            logits: Float32 = self.model.logits(hidden)
        if not np.isfinite(logits.max(axis=1)).all():  # the largest is NaN if any is
            raise FormatError(f"{self._where}: its logits are no finite numbers; are weights damaged?")
        return logits

    def check_ids(self, session: Session, token_ids: Sequence[int]) -> None:
        """Raises RequestError for no ids, more than fit into ctx_size, or one outside the vocabulary."""
        if len(token_ids) == 0:
            raise RequestError("the prompt has no tokens, expected at least one")
        total = len(session.token_ids) + len(token_ids)
        if total > self._ctx_size:
            raise RequestError(f"the prompt makes {total} tokens, but --ctx-size is {self._ctx_size}")
        vocab_size = self.model.config.vocab_size
        for token_id in token_ids:
            if not 0 <= token_id < vocab_size:
                raise RequestError(f"token id is {token_id}, expected 0 to {vocab_size - 1}")

    def close(self) -> None:
        """End the thread of steps."""
        self._thread.shutdown()

    def _forward(
        self, batch: Sequence[tuple[Session, Sequence[int]]], last: bool
    ) -> tuple[Float32, list[StepSequence]]:
        """Last hidden states of all new tokens, session after session, or of each session's last one alone.

        And the states that the sessions would have.
        """
        if len({id(session) for session, _ in batch}) != len(batch):
            raise RequestError("a session stands twice in a step, expected distinct ones")
        sequences: list[StepSequence] = []
        token_ids: list[int] = []
        for session, ids in batch:
            self.check_ids(session, ids)
            rows = slice(len(token_ids), len(token_ids) + len(ids))
            sequences.append(StepSequence(rows, len(session.token_ids), list(session.states)))
            token_ids.extend(ids)
        began, before = time.perf_counter(), self._experts.bytes_read
        ends = [s.rows.stop for s in sequences]
        wanted = [slice(end - 1, end) for end in ends] if last and len(token_ids) > len(batch) else None
        hidden = self._whole(lambda: self.model.forward(token_ids, sequences, wanted))
        seconds, nbytes_read = time.perf_counter() - began, self._experts.bytes_read - before
        self._experts.lookahead.ended(len(token_ids), seconds, nbytes_read)
        return hidden, sequences

    def _whole(self, compute: Callable[[], Float32]) -> Float32:
        """Compute on a thread that Ctrl-C does not reach, so that it never leaves the cache half changed.

        Ctrl-C ends the wait for it here, and the computation at its next expert.
        """

        def computing() -> Float32:
            try:
                with self._computing():
                    return compute()
            except BaseException:
                self._experts.abandon()
                raise

        self._experts.resume()
        future = self._thread.submit(computing)
        try:
            return future.result()
        except BaseException:
            self._experts.stop()
            wait([future])
            raise

    @contextmanager
    def _computing(self) -> Iterator[None]:
        """Where sums do not depend on BLAS threads, and NaN is not warned of on the way: the logits tell of it."""
        threads = [library.num_threads for library in self._blas]
        try:
            for library in self._blas:
                library.set_num_threads(1)
            with np.errstate(all="ignore"):
                yield
        finally:
            for library, number in zip(self._blas, threads, strict=True):
                library.set_num_threads(number)


def ignore_nan() -> None:
    """What a step does for its own thread, for a thread of the pool that computes parts of it."""
    np.seterr(all="ignore")


def _keep(batch: Sequence[tuple[Session, Sequence[int]]], sequences: Sequence[StepSequence]) -> None:
    """Give the sessions what a step has made, each in one statement that Ctrl-C cannot part."""
    for (session, ids), sequence in zip(batch, sequences, strict=True):
        token_ids = [*session.token_ids, *ids]
        session.token_ids, session.states = token_ids, sequence.states
