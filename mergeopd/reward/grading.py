"""Verify responses: cheap built-in verifiers in this process, reward models by turns, others in workers."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mergeopd.errors import VerifierError
from mergeopd.recipe.verifiers import (
    HumanEvalVerifier,
    IsolatedVerifier,
    PythonTestsVerifier,
    RewardModelVerifier,
    Verifier,
    single_verifiers,
)
from mergeopd.reward.pool import Grade, WorkerPool
from mergeopd.reward.protocol import Verify
from mergeopd.reward.verifiers import build_verifier
from mergeopd.types import Message


@dataclass(frozen=True, slots=True)
class Submission:
    """A response to verify. `truncated`: it ended at the length limit. `source` names the verifier.

    `messages` are the conversation that ends with the response, and `tools` its tools: reward models read
    these.
    """

    source: str
    response: str
    reference: str | None
    truncated: bool = False
    messages: tuple[Message, ...] = ()
    tools: tuple[Mapping[str, Any], ...] = ()


OnProgress = Callable[[int], None]
ScoreResponses = Callable[[Sequence[Submission], OnProgress], list[Grade]]
"""Grades responses with the reward models of their sources; see `Verifiers.verify`."""


_SANDBOX_GRACE_S = 10.0


def _time_limit(spec: Verifier) -> float:
    """Return after how many seconds a worker is ended. The sandbox ends programs at their own limit."""
    limits = 0.0
    for one in single_verifiers(spec).values():
        limits += getattr(one, "timeout_s", 1.0)
        limits += _SANDBOX_GRACE_S * isinstance(one, PythonTestsVerifier | HumanEvalVerifier)
    return limits


def _grade(verify: Verify, one: Submission) -> Grade:
    """Verify in this process; a failure costs the reward of this response alone."""
    try:
        return Grade(verify(one.response, one.reference, truncated=one.truncated))
    except Exception as error:  # noqa: BLE001
        return Grade(
            None, str(error) if isinstance(error, VerifierError) else f"{type(error).__name__}: {error}"
        )


class Verifiers:
    """The verifiers of the sources of a recipe.

    Verifiers that run code or patterns of the user, or a library that may hang, run in worker processes with
    a time limit (`timeout_s` of the recipe). A failure costs at most the reward of one response.
    """

    def __init__(
        self,
        verifiers: Mapping[str, Verifier],
        allow_code: Collection[str],
        num_workers: int,
        score: ScoreResponses | None = None,
    ) -> None:
        """Use at most `num_workers` processes, and `score` for sources with a reward model.

        Raises VerifierError for a verifier that cannot work.
        """
        isolated = {name: spec for name, spec in verifiers.items() if isinstance(spec, IsolatedVerifier)}
        self._scored = {name for name, spec in verifiers.items() if isinstance(spec, RewardModelVerifier)}
        self._score = score
        self._local = {
            name: build_verifier(spec, ())
            for name, spec in verifiers.items()
            if name not in isolated and name not in self._scored
        }
        self._timeouts = {name: _time_limit(spec) for name, spec in isolated.items()}
        setup = {
            "verifiers": {name: spec.model_dump() for name, spec in isolated.items()},
            "allow_code": sorted(allow_code),
        }
        self._pool = WorkerPool(setup, max(1, num_workers))

    def __enter__(self) -> Verifiers:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __contains__(self, source: str) -> bool:
        return source in self._local or self.is_slow(source)

    def is_slow(self, source: str) -> bool:
        """Whether a source's verifier runs in worker processes, or is a reward model."""
        return source in self._timeouts or source in self._scored

    def start(self) -> None:
        """Build the verifiers of a worker process now, to fail before a run rather than in it.

        Raises VerifierError if a function cannot be imported or a schema cannot be read.
        """
        if self._timeouts:
            self._pool.start()

    def close(self) -> None:
        """End the worker processes. They start again when needed."""
        self._pool.close()

    def verify(self, submissions: Sequence[Submission], on_progress: OnProgress) -> list[Grade]:
        """Return a grade for each submission, in order.

        `on_progress` gets the number of responses with slow verifiers that are graded, and may raise to
        leave.

        A missing or unusable reference costs its response the reward, as every failure does.

        Raises VerifierError if workers can no longer be started, and ModelError if a reward model cannot be
        loaded.
        """
        slow = {i: self._request(one) for i, one in enumerate(submissions) if one.source in self._timeouts}
        grades = dict(zip(slow, self._pool.run(list(slow.values()), on_progress), strict=True))
        scored = {i: one for i, one in enumerate(submissions) if one.source in self._scored}
        if scored:
            assert self._score is not None
            own = self._score(list(scored.values()), lambda done: on_progress(len(slow) + done))
            grades |= zip(scored, own, strict=True)
        for index, one in enumerate(submissions):
            if index not in grades:
                grades[index] = _grade(self._local[one.source], one)
        return [grades[index] for index in range(len(submissions))]

    def _request(self, one: Submission) -> dict[str, Any]:
        return {
            "source": one.source,
            "response": one.response,
            "reference": one.reference,
            "truncated": one.truncated,
            "timeout_s": self._timeouts[one.source],
        }
