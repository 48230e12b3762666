"""Teachers whose body runs on inference servers; a prediction head, where one is needed, is read locally.

Servers with hidden states give exact targets of any kind at any temperature. Others give log-probabilities
of single tokens, at temperature 1 and over all rows of their model: entropies are not known, and the mass
of ids that the student does not have belongs to the tail.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Hashable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from queue import SimpleQueue
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mergeopd.errors import TeacherError
from mergeopd.loss.heads import Head
from mergeopd.loss.targets import Sampled, TopK
from mergeopd.models.causal import DTYPES
from mergeopd.recipe.served import Served
from mergeopd.rollout.protocol import RolloutEngine
from mergeopd.serving.scoring import Likely, ScoringApi, scoring_api, send
from mergeopd.serving.transport import ServerPool
from mergeopd.teacher.canary import Canary
from mergeopd.teacher.local import TeacherStore
from mergeopd.teacher.protocol import TargetSpec, TeacherCapabilities, TeacherSequence
from mergeopd.teacher.scoring import reduced

# Sequences whose hidden states may wait for this process, in multiples of the requests that run at once.
_AHEAD = 2
# Smallest mass of a tail that is 1 minus the sum of log-probabilities in float32.
_LEAST_TAIL = 1e-6
# Likely tokens asked for beyond the k that are kept, where the server's model has ids that are not valid.
_SPARE = 8


@dataclass(frozen=True)
class ServedModel:
    """Facts of a served teacher's model: hidden size, rows of its head, its valid ids, the dtype to keep."""

    hidden_size: int
    vocab_rows: int
    num_valid: int
    dtype: str


@dataclass(eq=False)
class ServedSession:
    """A teacher whose servers take requests."""

    name: str
    api: ScoringApi
    pool: ServerPool
    model: ServedModel
    can_provide_hidden: bool
    read_head: Callable[[], Head]
    _pending: set[Future[Any]] = field(default_factory=set, init=False)

    def score(
        self, sequences: Sequence[TeacherSequence], spec: TargetSpec, max_tokens: int
    ) -> Iterator[tuple[int, Tensor]]:
        """Submit all sequences, and yield their rows as they arrive; see `TeacherSession.score`.

        Requests progress from the call on, whether or not the rows are taken. Of hidden states, which are
        large, only some sequences are fetched ahead of what is taken.
        """
        if self.can_provide_hidden:
            ahead = _AHEAD * self.pool.max_running * len(self.pool.servers)
            states = self._in_order_of_arrival(sequences, self._hidden, ahead)
            if spec.kind == "hidden":
                return states
            return reduced(self.name, states, sequences, self.read_head, spec)
        return self._in_order_of_arrival(sequences, partial(self._logprobs, spec), len(sequences))

    def generator(self) -> RolloutEngine:
        raise TeacherError(f"teacher {self.name!r} is served for scoring only; it generates no text")

    def close(self) -> None:
        """Cancel all requests."""
        for future in self._pending:
            future.cancel()

    def _in_order_of_arrival(
        self,
        sequences: Sequence[TeacherSequence],
        score: Callable[[TeacherSequence], Coroutine[Any, Any, Tensor]],
        ahead: int,
    ) -> Iterator[tuple[int, Tensor]]:
        arrived: SimpleQueue[tuple[int, Future[Tensor]]] = SimpleQueue()
        waiting = iter(enumerate(sequences))

        def submit(count: int) -> None:
            for index, sequence in islice(waiting, count):
                future = self.pool.submit(score(sequence))
                self._pending.add(future)
                future.add_done_callback(lambda done, index=index: arrived.put((index, done)))  # type: ignore[misc]

        def rows() -> Iterator[tuple[int, Tensor]]:
            for _ in range(len(sequences)):
                index, future = arrived.get()
                self._pending.discard(future)
                submit(1)
                yield index, future.result()

        submit(ahead)
        return rows()

    async def _hidden(self, sequence: TeacherSequence) -> Tensor:
        """Hidden states that predict the scored tokens, in the teacher's dtype."""
        # The last token's own state predicts nothing.
        ids, start = _joined(sequence)[:-1], len(sequence.prompt_ids)
        states = await send(self.pool, lambda: self.api.hidden(ids.tolist(), self.model.hidden_size))
        rows = torch.from_numpy(states[start - 1 + _scored(sequence)])
        return rows.to(DTYPES[self.model.dtype])

    async def _logprobs(self, spec: TargetSpec, sequence: TeacherSequence) -> Tensor:
        ids, start, scored = _joined(sequence), len(sequence.prompt_ids), _scored(sequence)
        if spec.kind == "top_k" and spec.k is not None:
            k = min(spec.k, self.model.num_valid)
            spare = min(_SPARE, self.model.vocab_rows - self.model.num_valid)
            likely = await send(self.pool, lambda: self.api.likely(ids.tolist(), start, k + spare))
            return self._top_k(likely, scored, k).packed()
        if spec.kind == "student_top_k" and sequence.support is not None:
            support = sequence.support
            of_ids = await send(
                self.pool,
                lambda: self.api.chosen(ids.tolist(), start, _chosen(support, sequence)),
            )
            values = of_ids[scored]
            return _with_tail(support, values[:, :-1], values[:, -1], of="student").packed()
        given = await send(self.pool, lambda: self.api.given(ids.tolist(), start))
        logprob = torch.from_numpy(given[scored])
        return Sampled(logprob, torch.full_like(logprob, torch.nan)).packed()

    def _top_k(self, likely: Likely, scored: NDArray[np.int64], k: int) -> TopK:
        """Keep the k most probable tokens that are valid."""
        ids, logprobs = likely.ids[scored], likely.logprobs[scored]
        is_valid = ids < self.model.num_valid
        if len(ids) and int(is_valid.sum(1).min()) < k:
            raise TeacherError(
                f"teacher {self.name!r}: fewer than {k} of its most probable tokens are ids of the student; "
                "use hidden states (`hidden_states: true` in its card)"
            )
        best = np.argsort(np.where(is_valid, -logprobs, np.inf), axis=1, kind="stable")[:, :k]
        return _with_tail(
            np.take_along_axis(ids, best, 1),
            np.take_along_axis(logprobs, best, 1),
            likely.given[scored],
            of="teacher",
        )


@dataclass(eq=False)
class ServedTeacher:
    """A teacher that running servers score for.

    `store` has its prediction head, None without hidden states. `canary` is verified the first time that the
    teacher is opened, on rank 0 (`run_on_first`). `num_ranks` processes share the servers' concurrency.
    """

    name: str
    served: Served
    model: ServedModel
    capabilities: TeacherCapabilities
    store: TeacherStore | None
    canary: Canary | None
    run_on_first: Callable[[Callable[[], None]], None]
    num_ranks: int = 1

    @property
    def fingerprint(self) -> str | None:
        """None: the servers' weights are not known."""
        return None

    @property
    def bytes_read(self) -> int:
        return 0 if self.store is None else self.store.bytes_read(self.name)

    @property
    def head_key(self) -> Hashable:
        return self.name if self.store is None else self.store.head_key(self.name)

    @contextmanager
    def open(self) -> Iterator[ServedSession]:
        """Connect to the servers; the connections are closed when the context ends. Collective.

        Raises TeacherError when the canary does not match.
        """
        served = self.served
        pool = ServerPool(
            served.url,
            max_running=max(1, served.concurrency // self.num_ranks),
            timeout_s=served.timeout_s,
        )
        api = scoring_api(served.engine, hidden_states=served.hidden_states)
        session = ServedSession(
            self.name, api, pool, self.model, served.hidden_states, lambda: self.head(None)
        )
        try:
            if self.canary is not None:
                canary, self.canary = self.canary, None
                self.run_on_first(partial(self._verify, canary, session))
            yield session
        finally:
            session.close()
            pool.close()

    def _verify(self, canary: Canary, session: ServedSession) -> None:
        kind = TargetSpec("hidden" if session.can_provide_hidden else "sampled")
        [(_, rows)] = session.score([canary.sequence], kind, canary.sequence.num_tokens)
        if session.can_provide_hidden:
            canary.verify(rows.to(session.read_head().weight.device), session.read_head())
        else:
            canary.compare(Sampled.unpack(rows).logprob.tolist())

    def prefetch(self) -> None:
        """Do nothing: the servers have the weights."""

    def head(self, vocab: range | None) -> Head:
        if self.store is None:
            raise TeacherError(f"teacher {self.name!r} is served without hidden states; it has no head")
        return self.store.head(self.name, vocab)


def _joined(sequence: TeacherSequence) -> NDArray[np.int32]:
    return np.concatenate([sequence.prompt_ids, sequence.response_ids])


def _scored(sequence: TeacherSequence) -> NDArray[np.int64]:
    """Positions of the scored tokens in the response."""
    flags = sequence.trained
    return np.arange(len(sequence.response_ids)) if flags is None else np.flatnonzero(flags)


def _chosen(support: NDArray[np.int32], sequence: TeacherSequence) -> list[list[int]]:
    """The student's ids and the token itself at each response token; none where it is not scored."""
    rows: list[list[int]] = [[] for _ in sequence.response_ids]
    own = np.concatenate([support, sequence.trained_ids[:, None]], axis=1)
    for position, row in zip(_scored(sequence).tolist(), own.tolist(), strict=True):
        rows[position] = row
    return rows


def _with_tail(ids: NDArray[Any], logprobs: NDArray[Any], given: NDArray[Any], *, of: Any) -> TopK:
    # A rounded sum does not tell how much smaller a tail is.
    tail = np.maximum(1.0 - np.exp(logprobs.astype(np.float64)).sum(1), _LEAST_TAIL)
    logprob = torch.from_numpy(np.ascontiguousarray(given, np.float32))
    return TopK(
        ids=torch.from_numpy(ids.astype(np.int64)),
        logprobs=torch.from_numpy(np.ascontiguousarray(logprobs, np.float32)),
        logprob=logprob,
        entropy=torch.full_like(logprob, torch.nan),
        log_tail=torch.from_numpy(np.log(tail).astype(np.float32)),
        of=of,
    )
