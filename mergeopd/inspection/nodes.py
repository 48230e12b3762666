"""Nodes of the student's responses: likeliest next tokens, teachers' gradients, and continuations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from mergeopd.data.renderer import Renderer
from mergeopd.environment.episodes import Response
from mergeopd.inspection.alignment import Floats, Ints, Successes, divide, mean_and_variance
from mergeopd.loss.buffers import Workspace
from mergeopd.loss.descent import descent_directions
from mergeopd.loss.heads import Head, Hidden, Projection
from mergeopd.loss.objective import DistillationObjective
from mergeopd.loss.slicing import compute_dtype, rows_in_chunk, slices
from mergeopd.rollout import sampling as policy
from mergeopd.rollout.keyed import stream_key, uniforms
from mergeopd.rollout.protocol import Completion, GenerationRequest, RolloutEngine
from mergeopd.types import Finish, Sampling, token_ids, token_logprobs

# Tokens below this probability, and a rest below it, are not continued.
NEGLIGIBLE = 0.01

Grade = Callable[[Sequence[Response]], list[float]]


@dataclass(frozen=True, slots=True, eq=False)
class Candidates:
    """The K likeliest next tokens of T nodes: `ids [T, K]`, and probabilities `[T, K + 1]` that sum to 1.

    The last probability is that of all other tokens. Tokens below `NEGLIGIBLE` have probability 0 and belong
    to the others; if all of these together are below it, they have probability 0 as well.
    """

    ids: Ints
    probability: Floats

    @classmethod
    def joined(cls, parts: Sequence[Candidates]) -> Candidates:
        return cls(np.concatenate([p.ids for p in parts]), np.concatenate([p.probability for p in parts]))

    def at(self, rows: Ints) -> Candidates:
        """Return the candidates of these nodes."""
        return Candidates(self.ids[rows], self.probability[rows])


@torch.no_grad()
def find_candidates(student: Hidden, sampling: Sampling, num: int) -> Candidates:
    """Find the likeliest `num` tokens under the distribution that rollouts sample from, at every row."""
    width = len(student.head.vocab)
    num, ids, probabilities = min(num, width), [], []
    for rows in _chunks(student):
        best = _policy(student, rows, sampling).topk(num, dim=1)
        ids.append(best.indices.cpu().numpy())
        probabilities.append(best.values.double().cpu().numpy())
    likeliest = np.concatenate(probabilities)
    kept = np.where(likeliest >= NEGLIGIBLE, likeliest, 0.0)
    rest = 1.0 - kept.sum(1, keepdims=True)
    probability = np.concatenate([kept, np.where(rest >= NEGLIGIBLE, rest, 0.0)], axis=1)
    probability /= probability.sum(1, keepdims=True)
    return Candidates(np.concatenate(ids), probability)


def find_descent(
    candidates: Candidates, student: Hidden, teacher: Hidden, objective: DistillationObjective
) -> Floats:
    """Return the direction in which the objective moves the candidates' logits, `[T, K + 1]`.

    The last number is the sum over all other tokens; rows sum to 0.
    """
    ids = torch.from_numpy(candidates.ids).to(student.hidden.device)
    parts = [
        direction.gather(1, ids[rows]).double().cpu().numpy()
        for rows, direction in descent_directions(student, teacher, objective)
    ]
    own = np.concatenate(parts) * (candidates.probability[:, :-1] > 0.0)
    return np.concatenate([own, -own.sum(1, keepdims=True)], axis=1)


def _chunks(student: Hidden) -> list[slice]:
    width = rows_in_chunk(student.hidden.device, len(student.head.vocab), compute_dtype(student.hidden))
    return list(slices(0, len(student.hidden), width))


def _policy(student: Hidden, rows: slice, sampling: Sampling) -> Tensor:
    """Return the probabilities `[n, V]` with which rollouts sample."""
    hidden = student.hidden[rows]
    projection = Projection("nodes", student.head, hidden, 1.0, compute_dtype(hidden), Workspace())
    logits = projection.raw_logits(slice(0, len(hidden)))
    projection.finish_logits(logits)
    mass = policy.masses(logits, sampling.temperature, sampling.top_p)
    return mass / mass.sum(1, keepdim=True)


@dataclass(frozen=True, slots=True, eq=False)
class Node:
    """A drawn node: the token at `position` of a response, and the student's hidden state before it."""

    response: Response
    position: int
    ids: Ints
    probability: Floats
    hidden: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class _Continuation:
    """One response with a forced token. `finish` is None while tokens may follow."""

    node: int
    column: int
    sample: int
    ids: tuple[int, ...]
    room: int
    finish: Finish | None


def _completion(ids: Sequence[int], finish: Finish) -> Completion:
    return Completion(token_ids(ids), token_logprobs([]), finish)


@dataclass(frozen=True)
class Continuer:
    """Lets the student finish responses after forced tokens, as its rollouts would.

    `continuations` is the number per candidate, on average over a node's candidates. `sampling` is that of
    the rollouts, whose length limit counts the whole response.
    """

    engine: RolloutEngine
    renderer: Renderer
    head: Head
    sampling: Sampling
    continuations: int
    seed: int

    def successes(
        self, nodes: Sequence[Node], grade: Grade, begin: Callable[[int], Callable[[int], None]]
    ) -> tuple[Successes, Ints]:
        """Estimate the success after each candidate of each node; also return its number of continuations.

        `grade` returns the rewards of responses; `begin` gets the number to generate, and returns what gets
        progress.
        """
        forced = [one for i, node in enumerate(nodes) for one in self._force(i, node)]
        finished = self._finish(nodes, forced, begin)
        rewards = grade(finished)
        shape = len(nodes), len(nodes[0].probability) if nodes else 1
        by_candidate: dict[tuple[int, int], list[float]] = {}
        for one, reward in zip(forced, rewards, strict=True):
            by_candidate.setdefault((one.node, one.column), []).append(reward)
        mean, variance = np.zeros(shape), np.zeros(shape)
        for place, values in by_candidate.items():
            mean[place], variance[place] = mean_and_variance(values)
        probability = np.array([node.probability for node in nodes]).reshape(shape)
        counts = np.bincount([one.node for one in forced], minlength=len(nodes))
        return Successes(probability, mean, variance), counts

    def _force(self, index: int, node: Node) -> list[_Continuation]:
        present = node.probability > 0.0
        tokens = [int(token) for token in node.ids]
        ends = [present[c] and self._end(node, token) is not None for c, token in enumerate(tokens)]
        is_fixed = np.array([*ends, False])
        counts = divide(node.probability, is_fixed, self.continuations * int(present.sum())) * present
        others = self._draw_others(index, node, int(counts[-1]))
        by_column = [[token] * int(num) for token, num in zip(tokens, counts[:-1], strict=True)]
        return [
            self._forced(index, node, column, sample, token)
            for column, own in enumerate([*by_column, others])
            for sample, token in enumerate(own)
        ]

    def _forced(self, index: int, node: Node, column: int, sample: int, token: int) -> _Continuation:
        ids = (*self._prefix(node), token)
        room = self.sampling.max_new_tokens - len(ids)
        return _Continuation(index, column, sample, ids, room, self._end(node, token))

    def _draw_others(self, index: int, node: Node, num: int) -> list[int]:
        """Draw tokens from the student's distribution without the candidates."""
        if not num:
            return []
        mass = _policy(Hidden(node.hidden[None], self.head), slice(0, 1), self.sampling)
        mass[0, torch.from_numpy(node.ids[node.probability[:-1] > 0.0])] = 0.0
        key = stream_key(self.seed, self._key(index, node, len(node.ids)), -1)
        uniform = torch.from_numpy(uniforms([key], num)[0]).to(mass.device)
        tokens, _ = policy.draw(mass.expand(num, -1).contiguous(), uniform)
        return [int(token) for token in tokens]

    def _end(self, node: Node, token: int) -> Finish | None:
        """Return how a response ends with this token at the node; None where more tokens follow."""
        if token in self.renderer.eos_ids:
            return "eos"
        if self._has_stop((*self._prefix(node), token)):
            return "stop"
        return "length" if node.position + 1 >= self.sampling.max_new_tokens else None

    def _finish(
        self,
        nodes: Sequence[Node],
        forced: Sequence[_Continuation],
        begin: Callable[[int], Callable[[int], None]],
    ) -> list[Response]:
        """Generate what is missing, all in one batch, and cut it where a rollout would have ended."""
        going = [one for one in forced if one.finish is None]
        requests = [
            GenerationRequest(
                self._key(one.node, nodes[one.node], one.column),
                one.sample,
                token_ids([*nodes[one.node].response.prompt_ids, *one.ids]),
            )
            for one in going
        ]
        longest = replace(self.sampling, max_new_tokens=max((one.room for one in going), default=1))
        completions = iter(
            self.engine.submit(requests, longest).wait(begin(len(requests))) if requests else []
        )
        return [
            replace(
                nodes[one.node].response,
                completion=_completion(one.ids, one.finish)
                if one.finish is not None
                else self._joined(one, next(completions)),
            )
            for one in forced
        ]

    def _joined(self, one: _Continuation, completion: Completion) -> Completion:
        tail, finish = completion.response_ids.tolist(), completion.finish
        if len(tail) > one.room:
            tail, finish = tail[: one.room], "length"
        if self.sampling.stop:  # a stop text may begin before the forced token
            for num in range(1, min(len(tail), self._longest_stop) + 1):
                if self._has_stop((*one.ids, *tail[:num])):
                    tail, finish = tail[:num], "stop"
                    break
        return _completion((*one.ids, *tail), finish)

    @property
    def _longest_stop(self) -> int:
        return max(len(stop.encode()) for stop in self.sampling.stop)

    def _has_stop(self, ids: tuple[int, ...]) -> bool:
        if not self.sampling.stop:
            return False
        tail = self.renderer.tokenizer.decode(list(ids[-self._longest_stop - 1 :]), skip_special_tokens=False)
        return any(stop in tail for stop in self.sampling.stop)

    @staticmethod
    def _prefix(node: Node) -> list[int]:
        ids: list[int] = node.response.completion.response_ids[: node.position].tolist()
        return ids

    @staticmethod
    def _key(index: int, node: Node, column: int) -> str:
        return f"{node.response.prompt.key} node {index} {column}"
