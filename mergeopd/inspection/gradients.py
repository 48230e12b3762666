"""Measure how well teachers' distillation gradients agree with the gradient of the success probability."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import pairwise
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mergeopd.batch.objective import support
from mergeopd.environment.episodes import Response
from mergeopd.inspection.alignment import (
    Floats,
    Ints,
    Successes,
    Totals,
    alignment,
    difference,
    draw_nodes,
    expected_length,
)
from mergeopd.inspection.nodes import Candidates, Continuer, Node, find_candidates, find_descent
from mergeopd.inspection.signal import position_bounds
from mergeopd.loss import DistillationObjective, Head, Hidden, ReverseKL, build_objective
from mergeopd.recipe.loss_terms import DIVERGENCE_TERMS
from mergeopd.recipe.training import Phase
from mergeopd.reporting.inspection import AlignmentRank, GradientAlignment, PositionBucket
from mergeopd.reporting.result import Estimate
from mergeopd.types import Sampling

Mask = NDArray[np.bool_]
T = TypeVar("T")
# Nodes are compared in batches of about this many: a matrix product of a few rows is slow.
_ROWS = 256


def distillation_objective(phase: Phase) -> DistillationObjective:
    """Return the divergences of a phase in the middle of its updates, as one objective.

    The gradient of sampled reverse KL is that of reverse KL on average. Reverse KL also replaces a loss
    without a teacher's term.
    """
    loss, done = phase.loss, phase.updates // 2
    terms = {
        name: (loss.divergence(name), loss.weight(name, done)) for name in DIVERGENCE_TERMS if loss.uses(name)
    }
    terms["sampled_reverse_kl"] = ReverseKL(), loss.weight("sampled_reverse_kl", done)
    if not any(weight for _, weight in terms.values()):
        terms = {"reverse_kl": (ReverseKL(), 1.0)}
    return build_objective(terms, temperature=loss.temperature, support=support(loss))


@dataclass(frozen=True, slots=True, eq=False)
class ProbedResponse:
    """A response of the student. `prompt` is the number of its prompt, `teachers` teach it."""

    prompt: int
    domain: str
    is_correct: bool
    teachers: frozenset[str]
    response: Response


@dataclass(eq=False)
class ProbedSource:
    """All tokens of the student's responses to prompts of one source, T nodes, response after response.

    `states` returns the student's hidden states before the tokens of some of the responses. `descent` has the
    directions of the teachers that were added, `[T, candidates]`.
    """

    responses: Sequence[ProbedResponse]
    sampling: Sampling
    objective: DistillationObjective
    states: Callable[[Sequence[int]], Tensor]
    head: Head
    num_candidates: int
    candidates: Candidates = field(init=False)
    descent: dict[str, Floats] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        """Raises ValueError for greedy sampling, which has no gradient."""
        if not self.sampling.temperature:
            raise ValueError("greedy responses have no policy gradient")
        parts = [
            find_candidates(Hidden(self.states(members), self.head), self.sampling, self.num_candidates)
            for members in _batches(enumerate(self.lengths), lambda length: length)
        ]
        self.candidates = Candidates.joined(parts)

    @property
    def lengths(self) -> list[int]:
        """Number of tokens of each response."""
        return [len(one.response.completion.response_ids) for one in self.responses]

    @property
    def num_nodes(self) -> int:
        return sum(self.lengths)

    def add_teacher(
        self, name: str, states: Iterable[tuple[int, Tensor]], head: Head, masked: Sequence[Sequence[int]]
    ) -> None:
        """Add a teacher with the student's tokens, by its states before the tokens of every response.

        `masked` are the tokens of each response that are not in its loss.
        """
        ends = np.cumsum(self.lengths)
        rows = [np.arange(end - length, end) for end, length in zip(ends, self.lengths, strict=True)]
        descent = np.zeros_like(self.candidates.probability)
        hidden: dict[int, Tensor] = {}

        def read() -> Iterator[tuple[int, Tensor]]:
            for index, own in states:
                hidden[index] = own
                yield index, own

        for members in _batches(read(), len):
            teacher = Hidden(torch.cat([hidden.pop(i) for i in members]), head)
            student = Hidden(self.states(members), self.head)
            places = np.concatenate([rows[i] for i in members])
            descent[places] = find_descent(self.candidates.at(places), student, teacher, self.objective)
        for own_rows, tokens in zip(rows, masked, strict=True):
            descent[own_rows[list(tokens)]] = 0.0
        self.descent[name] = descent


def _batches(items: Iterable[tuple[int, T]], size: Callable[[T], int]) -> Iterator[list[int]]:
    """Collect the numbers of responses until they have enough tokens for a matrix product."""
    members: list[int] = []
    total = 0
    for index, item in items:
        members.append(index)
        total += size(item)
        if total >= _ROWS:
            yield members
            members, total = [], 0
    if members:
        yield members


@dataclass(frozen=True, eq=False)
class _Table:
    """The nodes of all sources, one after another; `descent` is NaN where a teacher was not added."""

    sources: Sequence[ProbedSource]
    source_T: Ints
    row_T: Ints
    response_T: Ints
    position_T: Ints
    probability: Floats
    descent: Mapping[str, Floats]

    @classmethod
    def of(cls, sources: Sequence[ProbedSource]) -> _Table:
        lengths = [length for source in sources for length in source.lengths]
        sizes = [source.num_nodes for source in sources]
        shapes = [source.candidates.probability.shape for source in sources]
        names = dict.fromkeys(name for source in sources for name in source.descent)
        return cls(
            sources,
            np.repeat(np.arange(len(sizes)), sizes),
            np.concatenate([np.arange(size) for size in sizes]),
            np.repeat(np.arange(len(lengths)), lengths),
            np.concatenate([np.arange(length) for length in lengths]),
            np.concatenate([source.candidates.probability for source in sources]),
            {
                name: np.concatenate(
                    [
                        source.descent.get(name, np.full(shape, np.nan))
                        for source, shape in zip(sources, shapes, strict=True)
                    ]
                )
                for name in names
            },
        )

    @cached_property
    def responses(self) -> list[ProbedResponse]:
        return [response for source in self.sources for response in source.responses]

    def flags(self, holds: Callable[[ProbedResponse], bool]) -> Mask:
        """Return at every node whether its response has a property."""
        flags: Mask = np.array([holds(one) for one in self.responses], np.bool_)[self.response_T]
        return flags

    @cached_property
    def prompts(self) -> Ints:
        """The number of the prompt at every node."""
        numbers: Ints = np.array([one.prompt for one in self.responses], np.int64)[self.response_T]
        return numbers

    def node(self, index: int) -> Node:
        number, row, position = self.source_T[index], self.row_T[index], int(self.position_T[index])
        source, response = self.sources[number], self.response_T[index]
        first = int(self.response_T[self.source_T == number][0])
        return Node(
            self.responses[response].response,
            position,
            source.candidates.ids[row],
            source.candidates.probability[row],
            source.states([int(response) - first])[position],
        )


@dataclass(frozen=True, eq=False)
class Gradients:
    """What was measured: all nodes, the drawn ones with their weights, and successes after candidates."""

    table: _Table
    drawn: Ints
    weight: Floats
    successes: Successes
    num_continuations: Ints

    @property
    def teachers(self) -> list[str]:
        """The teachers that were added."""
        return list(self.table.descent)

    def of_teacher(self, name: str) -> GradientAlignment:
        """Return the alignment of a teacher on the prompts that it teaches, and on each domain."""
        is_own = self.table.flags(lambda one: name in one.teachers) & self._has(name)
        is_correct = self.table.flags(lambda one: one.is_correct)
        chosen = is_own[self.drawn]
        return GradientAlignment(
            num_nodes=int(chosen.sum()),
            num_skipped=int((chosen & self.successes.is_constant).sum()),
            num_rollouts=int(self.num_continuations[chosen].sum()),
            score=self._score(name, is_own),
            on_correct=self._score(name, is_own & is_correct),
            on_incorrect=self._score(name, is_own & ~is_correct),
            positions=tuple(self._positions(name, is_own)),
            by_domain={
                domain: self._score(name, self._in(domain) & self._has(name)) for domain in self.domains(name)
            },
        )

    def domains(self, name: str) -> list[str]:
        """The domains on whose responses a teacher was added."""
        has = self._has(name)
        return [domain for domain in self._domains if (self._in(domain) & has).any()]

    def ranks(self) -> list[AlignmentRank]:
        """Rank the teachers that were added on each domain, the best first, if there are several."""
        ranks = []
        for domain in self._domains:
            totals = {
                name: self.totals(name, self._in(domain))
                for name in self.table.descent
                if domain in self.domains(name)
            }
            known = {name: cosine for name, own in totals.items() if (cosine := own.cosine) is not None}
            order = sorted(known, key=lambda name: -known[name])
            if len(order) < 2:
                continue
            for name in order:
                behind = difference(totals[order[0]], totals[name]) if name != order[0] else Estimate(0.0)
                ranks.append(
                    AlignmentRank(domain, name, alignment(totals[name]), behind, is_best=name == order[0])
                )
        return ranks

    def totals(self, name: str, members: Mask) -> Totals:
        """Return a teacher's sums by prompt over these nodes."""
        table, drawn = self.table, self.drawn
        numbers = np.unique(table.prompts[members], return_inverse=True)[1]
        group = np.zeros(len(members), np.int64)
        group[members] = numbers
        num = int(numbers.max(initial=-1)) + 1
        chosen, descent = members[drawn], table.descent[name]
        inner = self.weight * self.successes.inner(descent[drawn])
        ideal = self.weight * self.successes.squared_length

        def by_prompt(values: Floats, where: Ints) -> Floats:
            return np.bincount(group[where], values, num).astype(np.float64)

        return Totals(
            by_prompt(inner[chosen], drawn[chosen]),
            by_prompt(ideal[chosen], drawn[chosen]),
            by_prompt(np.square(descent[members]).sum(1), np.flatnonzero(members)),
            np.bincount(group[drawn[chosen]], minlength=num),
        )

    def _score(self, name: str, members: Mask) -> Estimate:
        return alignment(self.totals(name, members)) if members.any() else Estimate(None)

    def _positions(self, name: str, members: Mask) -> Iterator[PositionBucket]:
        """Yield the alignment by position; `num_tokens` counts drawn nodes."""
        position = self.table.position_T
        for start, stop in pairwise(position_bounds(int(position[members].max(initial=0)) + 1)):
            own = members & (position >= start) & (position < stop)
            score = self._score(name, own)
            yield PositionBucket(
                start,
                stop,
                int(own[self.drawn].sum()),
                reverse_kl=None,
                overlap=None,
                entropy_S=None,
                entropy_T=None,
                alignment=score.value,
                alignment_low=score.low,
                alignment_high=score.high,
            )

    def _has(self, name: str) -> Mask:
        has: Mask = ~np.isnan(self.table.descent[name][:, 0])
        return has

    def _in(self, domain: str) -> Mask:
        return self.table.flags(lambda one: one.domain == domain)

    @property
    def _domains(self) -> list[str]:
        return list(dict.fromkeys(one.domain for one in self.table.responses))


Grade = Callable[[ProbedSource, Sequence[Response]], list[float]]
"""Grades responses to prompts of a source."""


def measure(
    sources: Sequence[ProbedSource],
    continuer: Callable[[ProbedSource], Continuer],
    grade: Grade,
    *,
    num_nodes: int,
    seed: int,
    begin: Callable[[int], Callable[[int], None]],
) -> Gradients:
    """Draw nodes, let the student continue them, and estimate the successes after their candidates.

    `num_nodes` are drawn in every domain, half of them from correct responses, if there are any. `begin` gets
    the number of responses to generate for a source, and returns what gets progress.
    """
    table = _Table.of(sources)
    drawn, weight = _draw(table, num_nodes, seed)
    mean, variance = np.zeros((2, len(drawn), table.probability.shape[1]))
    counts = np.zeros(len(drawn), np.int64)
    for index, source in enumerate(sources):
        own = np.flatnonzero(table.source_T[drawn] == index)
        nodes = [table.node(int(i)) for i in drawn[own]]
        successes, counts[own] = continuer(source).successes(nodes, partial(grade, source), begin)
        mean[own], variance[own] = successes.mean, successes.variance
    return Gradients(table, drawn, weight, Successes(table.probability[drawn], mean, variance), counts)


def _draw(table: _Table, num_nodes: int, seed: int) -> tuple[Ints, Floats]:
    """Draw nodes with a choice in every domain, from correct and incorrect responses in equal numbers.

    Their chances rise with the expected length of the ideal gradient, and with the mean of the teachers'
    gradients, each as a share of its sum.
    """
    random = np.random.default_rng(seed)
    is_open = (table.probability > 0.0).sum(1) > 1
    is_correct = table.flags(lambda one: one.is_correct).astype(np.int64)
    length = expected_length(table.probability)
    indices, weights = [np.zeros(0, np.int64)], [np.zeros(0)]
    for domain in dict.fromkeys(one.domain for one in table.responses):
        own = np.flatnonzero(is_open & table.flags(lambda one, own=domain: one.domain == own))  # type: ignore[misc]
        sizes = [np.linalg.norm(descent[own], axis=1) for descent in table.descent.values()]
        shares = [size / size.sum() for size in sizes if size.any() and not np.isnan(size).any()]
        if not len(own):
            continue
        disagreement = np.mean(shares, axis=0) if shares else length[own]
        strata = is_correct[own]
        num = max(1, num_nodes // len(np.unique(strata)))
        drawn, weight = draw_nodes([length[own], disagreement], strata, num, random)
        indices.append(own[drawn])
        weights.append(weight)
    return np.concatenate(indices), np.concatenate(weights)
