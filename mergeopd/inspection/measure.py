"""Figures of teachers per token: their distributions on the student's responses, and on their own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mergeopd.data.renderer import Renderer
from mergeopd.data.trajectory import dataset_response
from mergeopd.engine.rollouts import student_rollout
from mergeopd.engine.stages import Stages
from mergeopd.environment.episodes import Response
from mergeopd.errors import DataError
from mergeopd.inspection.sample import GradedResponse
from mergeopd.inspection.signal import Graded, Scored
from mergeopd.intervals import Values
from mergeopd.loss.compare import Comparison, compare, compare_teachers
from mergeopd.loss.heads import Head, Hidden
from mergeopd.loss.targets import Sampled
from mergeopd.teacher.hidden_cache import HiddenCache
from mergeopd.teacher.protocol import TargetSpec, TeacherSequence, TeacherSession
from mergeopd.teacher.token_view import AlignedTokens, SameTokens, TokenView
from mergeopd.types import Rollout, token_flags, token_ids

STUDENT = ""
"""The student's key in the cache of hidden states; no teacher has this name."""
NUM_CANDIDATES = 5
# Distributions are compared at about so many tokens at once: a matrix product of a few rows is slow.
_ROWS = 512
_PAIRED = 32  # responses
_FIGURES = (
    "reverse_kl",
    "forward_kl",
    "entropy_S",
    "entropy_T",
    "logprob_S",
    "logprob_T",
    "overlap",
    "advantage",
    "mass_S",
    "mass_T",
)
_SAMPLED = TargetSpec("sampled")
# A teacher uses an end token if at least this share of its ended responses end with it.
_LEAST_SHARE_OF_ENDS = 0.05


@dataclass(frozen=True, slots=True)
class Candidates:
    """The likeliest tokens at each scored token, the likeliest first: ids and log-probabilities."""

    ids_S: list[list[int]]
    logprobs_S: list[list[float]]
    ids_T: list[list[int]]
    logprobs_T: list[list[float]]


@dataclass(frozen=True)
class StudentResponses:
    """The student's responses, its head, and its hidden states in `cache`.

    `logprobs` and `entropies` are those of every trained token, by response.
    """

    graded: Sequence[GradedResponse]
    rollouts: Sequence[Rollout]
    head: Head
    cache: HiddenCache
    max_tokens: int
    logprobs: list[Values] = field(default_factory=list)
    entropies: list[Values] = field(default_factory=list)

    def of(self, prompts: Iterable[int]) -> list[int]:
        """Return the numbers of the responses to these prompts that have a token in the loss."""
        wanted = set(prompts)
        return [
            i for i, g in enumerate(self.graded) if g.prompt in wanted and self.rollouts[i].num_trained > 0
        ]

    def counted(self, prompts: Iterable[int]) -> list[Graded]:
        wanted = set(prompts)
        return counted([g for g in self.graded if g.prompt in wanted])


def counted(graded: Sequence[GradedResponse]) -> list[Graded]:
    """Return responses as they count in pass rates."""
    return [
        Graded(
            g.prompt,
            g.reward,
            len(g.response.completion.response_ids),
            g.response.completion.finish == "length",
        )
        for g in graded
    ]


def rollouts_of(graded: Sequence[GradedResponse]) -> list[Rollout]:
    return [student_rollout(g.response, g.sample) for g in graded]


def own_sequence(response: Response) -> TeacherSequence:
    """Return a response as the model that generated it reads it."""
    return TeacherSequence(response.prompt_ids, response.completion.response_ids, response.trained)


def positions_of(rollout: Rollout | TeacherSequence) -> NDArray[np.int64]:
    """Return the positions of the scored tokens in a response."""
    if rollout.trained is None:
        return np.arange(len(rollout.response_ids))
    return np.flatnonzero(rollout.trained)


def sampled_figures(
    session: TeacherSession, sequences: Sequence[TeacherSequence], max_tokens: int
) -> dict[int, tuple[Values, Values]]:
    """Return log-probabilities and entropies of the scored tokens, by sequence; empty ones are left out."""
    known = [i for i, sequence in enumerate(sequences) if sequence.num_trained]
    figures = {}
    for position, rows in session.score([sequences[i] for i in known], _SAMPLED, max_tokens):
        sampled = Sampled.unpack(rows)
        figures[known[position]] = _numbers(sampled.logprob), _numbers(sampled.entropy)
    return figures


@dataclass
class OnStudent:
    """Compares one teacher with the student on the student's responses, and keeps what is shown of them.

    `name` is the teacher's key in the cache of hidden states for the responses in `kept`, which other
    teachers score, too. `candidates` has the likeliest tokens of the responses in `shown`.
    """

    student: StudentResponses
    k: int
    stages: Stages
    shown: frozenset[int] = frozenset()
    kept: frozenset[int] = frozenset()
    candidates: dict[int, Candidates] = field(default_factory=dict)
    figures: dict[int, Scored] = field(default_factory=dict)

    def distributions(
        self, name: str, session: TeacherSession, head: Head, view: TokenView, members: Sequence[int]
    ) -> list[Scored]:
        """Compare the whole distributions of a teacher with the student's tokens."""
        rollouts = self.student.rollouts
        sequences = [view.read(rollouts[i], None) for i in members]
        read = [sequence for sequence in sequences if sequence is not None]
        on_progress = self.stages.begin("teachers", name, len(members), "responses")
        states = session.score(read, TargetSpec("hidden"), self.student.max_tokens)
        done = 0
        for batch in _batches((members[position], rows) for position, rows in states):
            self._compare(name, [i for i, _ in batch], [rows for _, rows in batch], head, view)
            done += len(batch)
            on_progress(done)
        return [self.figures[i] for i in members]

    def _compare(
        self, name: str, batch: Sequence[int], states: Sequence[Tensor], head: Head, view: TokenView
    ) -> None:
        own = self.student
        labels = np.concatenate([own.rollouts[i].trained_ids for i in batch])
        hidden_T = torch.cat(list(states))
        compared = compare(
            Hidden(own.cache.gather(STUDENT, batch), own.head),
            Hidden(hidden_T, head),
            torch.tensor(labels, dtype=torch.long, device=hidden_T.device),
            k=self.k,
            num_candidates=NUM_CANDIDATES,
        )
        figures = {name: _numbers(getattr(compared, name)) for name in _FIGURES}
        figures["entropy_gap"] = np.abs(figures["entropy_T"] - figures["entropy_S"])
        figures["logprob_gap"] = figures["logprob_T"] - figures["logprob_S"]
        end = 0
        for i, rows in zip(batch, states, strict=True):
            part = slice(end, end + len(rows))
            end = part.stop
            rollout = own.rollouts[i]
            scored = Scored(
                own.graded[i].prompt, positions_of(rollout), {n: v[part] for n, v in figures.items()}
            )
            self.figures[i] = scored.without(view.masked(rollout))
            if i in self.shown:
                self.candidates[i] = _candidates(compared, part)
            if i in self.kept:
                own.cache.put(name, i, rows)

    def spans(
        self, name: str, session: TeacherSession, view: TokenView, members: Sequence[int]
    ) -> list[Scored]:
        """Compare log-probabilities of what was sampled, for a teacher without the student's distributions.

        A token of a teacher with another tokenizer has its share of the difference of its group.
        """
        own = self.student
        alignments = view.align({i: own.rollouts[i] for i in members})
        sequences = {i: view.read(own.rollouts[i], alignments.get(i)) for i in members}
        read = {i: sequence for i, sequence in sequences.items() if sequence is not None}
        self.stages.begin("teachers", name, len(read), "responses")
        sampled = sampled_figures(session, list(read.values()), own.max_tokens)
        for position, i in enumerate(read):
            if position not in sampled:
                continue
            logprobs, entropies = sampled[position]
            gaps = np.full(len(own.logprobs[i]), np.nan)
            figures = {"logprob_gap": gaps, "entropy_S": own.entropies[i]}
            if view.bridge_kind is None:
                gaps[:] = logprobs - own.logprobs[i]
                figures["entropy_T"] = entropies
            else:
                for ours, theirs in alignments[i].groups():
                    difference = logprobs[theirs].sum() - own.logprobs[i][ours].sum()
                    gaps[ours] = difference / (ours.stop - ours.start)
            scored = Scored(own.graded[i].prompt, positions_of(own.rollouts[i]), figures)
            self.figures[i] = scored.without(view.masked(own.rollouts[i]))
        return [self.figures[i] for i in members if i in self.figures]


def both_teachers(
    student: StudentResponses,
    names: tuple[str, str],
    heads: tuple[Head, Head],
    views: tuple[TokenView, TokenView],
    members: Sequence[int],
    weights: Sequence[tuple[float, float]],
) -> list[Scored]:
    """Compare two teachers on the student's responses that both have scored, whose states are kept.

    `weights` are those of both teachers at each response.
    """
    scored = []
    numbered = list(zip(members, weights, strict=True))
    for start in range(0, len(numbered), _PAIRED):
        batch = numbered[start : start + _PAIRED]
        own = [i for i, _ in batch]
        sizes = torch.tensor([student.rollouts[i].num_trained for i in own])
        first, second = (
            Hidden(student.cache.gather(name, own), head) for name, head in zip(names, heads, strict=True)
        )
        labels = np.concatenate([student.rollouts[i].trained_ids for i in own])
        compared = compare_teachers(
            Hidden(student.cache.gather(STUDENT, own), student.head),
            first,
            second,
            torch.tensor(labels, dtype=torch.long, device=first.hidden.device),
            torch.tensor([pair for _, pair in batch]).repeat_interleave(sizes, 0).unbind(1),
        )
        parts = [torch.split(each, sizes.tolist()) for each in (compared.cosine, compared.floor)]
        for i, cosine, floor in zip(own, *parts, strict=True):
            rollout = student.rollouts[i]
            figures = {"cosine": _numbers(cosine), "floor": _numbers(floor)}
            one = Scored(student.graded[i].prompt, positions_of(rollout), figures)
            scored.append(one.without({*views[0].masked(rollout), *views[1].masked(rollout)}))
    return scored


@dataclass(frozen=True)
class OwnResponses:
    """A teacher's responses to its prompts, with its log-probabilities and entropies of their tokens."""

    graded: Sequence[GradedResponse]
    figures: Mapping[int, tuple[Values, Values]]

    @classmethod
    def of(cls, graded: Sequence[GradedResponse], session: TeacherSession, max_tokens: int) -> OwnResponses:
        return cls(graded, sampled_figures(session, [own_sequence(g.response) for g in graded], max_tokens))

    def end_ids(self) -> frozenset[int]:
        """Return the tokens that end these responses; one at the end of very few is none."""
        completions = [g.response.completion for g in self.graded]
        ends = Counter(int(one.response_ids[-1]) for one in completions if one.finish == "eos")
        return frozenset(i for i, num in ends.items() if num >= _LEAST_SHARE_OF_ENDS * ends.total())

    def scored(self) -> list[Scored]:
        """Return the teacher's entropies on its own responses."""
        return [
            Scored(
                self.graded[i].prompt,
                positions_of(own_sequence(self.graded[i].response)),
                {"entropy_T": entropies},
            )
            for i, (_, entropies) in self.figures.items()
        ]

    def gaps(
        self, session: TeacherSession, student: Renderer, view: TokenView, max_tokens: int
    ) -> Iterator[Scored]:
        """Yield log p of student minus teacher at the tokens of these responses; `session` is the student's.

        Where the student reads them in other tokens, each has an equal share of the difference of the sums.
        """
        read = {i: _reading(view, student, self.graded[i].response) for i in self.figures}
        known = [(i, sequence) for i, sequence in read.items() if sequence is not None]
        figures = sampled_figures(session, [sequence for _, sequence in known], max_tokens)
        for position, (logprobs, _) in figures.items():
            i, sequence = known[position]
            response = self.graded[i].response.completion.response_ids
            others = self.figures[i][0]
            is_same = isinstance(view, SameTokens) and len(logprobs) == len(others)
            if is_same:
                num = len(logprobs) - (sequence.response_ids[-1] != response[-1])  # an end token of its own
                gap = logprobs[:num] - others[:num]
            else:
                gap = np.full(len(logprobs), (logprobs.sum() - others.sum()) / len(logprobs))
            yield Scored(self.graded[i].prompt, positions_of(sequence)[: len(gap)], {"gap": gap})


def _reading(view: TokenView, student: Renderer, response: Response) -> TeacherSequence | None:
    """Return a teacher's response as the student reads it.

    None for turns that its template cannot render, and for bytes that are no text.
    """
    prompt, episode, completion = response.prompt, response.episode, response.completion
    if isinstance(view, AlignedTokens):
        ended = completion.finish == "eos"
        same, is_whole = view.crossing.in_student_ids(completion.response_ids, ended=ended)
        return TeacherSequence(student.render(prompt), token_ids(same)) if is_whole else None
    if episode is None or _has_students_turns(view, student):
        ids, _ = view.student_ids(completion, prompt)
        return TeacherSequence(student.render(prompt), ids, response.trained)
    turns = episode.messages
    while turns and turns[-1].role != "assistant":  # a truncated turn was to follow
        turns = turns[:-1]
    try:
        rendered = dataset_response(replace(prompt, response=turns), student) if turns else None
    except DataError:
        return None
    if rendered is None:
        return None
    trained = None if rendered.trained is None else token_flags(rendered.trained)
    return TeacherSequence(student.render(prompt), token_ids(rendered.ids), trained)


def _has_students_turns(view: TokenView, student: Renderer) -> bool:
    """Whether a teacher writes turns and replies with the student's tokens and template."""
    if not isinstance(view, SameTokens):
        return False
    own = view.renderer.template
    return (own.source, own.arguments) == (student.template.source, student.template.arguments)


def _batches(states: Iterable[tuple[int, Tensor]]) -> Iterator[list[tuple[int, Tensor]]]:
    batch: list[tuple[int, Tensor]] = []
    for index, rows in states:
        batch.append((index, rows))
        if sum(len(each) for _, each in batch) >= _ROWS:
            yield batch
            batch = []
    if batch:
        yield batch


def _candidates(compared: Comparison, rows: slice) -> Candidates:
    return Candidates(
        compared.ids_S[rows].tolist(),
        compared.logprobs_S[rows].tolist(),
        compared.ids_T[rows].tolist(),
        compared.logprobs_T[rows].tolist(),
    )


def _numbers(values: Tensor) -> Values:
    return values.double().cpu().numpy()
