"""Policy terms, corrections and budgets are exact through the whole path.

As in test_exact_gradient: all answers of at most two tokens over a five-token vocabulary, in float64, raw
gradients against autograd on full logits of independent Hugging Face models. The answers come from another
policy than the student, some of them are cut off, and every prompt's answers are one group with rewards.
Each method is written down once more here, from its paper, token by token in plain arithmetic.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from enumeration import (
    Reference,
    advantages,
    assert_equal,
    divergences,
    engine_round,
    methods_parts,
    rewards_of,
    rollout_logprobs,
    rollouts_of,
)
from torch import Tensor

from mergeopd.engine.schedule import split_updates
from mergeopd.types import Rollout

SGD_LR = 0.5


@dataclass
class Token:
    """What a method may look at. `lp` carries the gradient; all else is a number."""

    lp: Tensor
    old: float
    mu: float
    gaps: dict[str, float]  # log p_T - log p_S, under the weights as they are
    old_gaps: list[dict[str, float]]  # of the whole answer, under the weights before the round
    weights: dict[str, float]
    position: int
    advantage: float
    right: bool
    group_failed: bool
    cut_off: bool

    @property
    def ratio(self) -> Tensor:
        return (self.lp - self.old).exp()

    @property
    def rho(self) -> float:
        return math.exp(self.old - self.mu)

    def d(self, bound: float = math.inf) -> float:
        return sum(w * max(-bound, min(bound, self.gaps[n])) for n, w in self.weights.items())

    @property
    def mean_d(self) -> float:
        total = sum(self.weights.values())
        return sum(w * self.gaps[n] for n, w in self.weights.items()) / total if total else 0.0


def surrogate(ratio: Tensor, advantage: float, low: float = 0.2, high: float = 0.28) -> Tensor:
    """PPO's objective, negative: a loss."""
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage)


def reward_to_go(token: Token, gamma: float) -> float:
    """MiniLLM without the token's own part, over the number of tokens that follow."""
    future = token.old_gaps[token.position + 1 :]
    total = 0.0
    for steps, gaps in enumerate(future, start=1):
        total += gamma**steps * sum(w * gaps[n] for n, w in token.weights.items())
    return total / len(future) if future else 0.0


def early(token: Token, gain: float) -> float:
    total = 0.0
    for name, weight in token.weights.items():
        sizes = [abs(gaps[name]) for gaps in token.old_gaps]
        factor = 1 + gain * (1 - sum(sizes[: token.position]) / sum(sizes))
        total += weight * factor * token.old_gaps[token.position][name]
    return total


def trust_region(token: Token, alpha: float) -> Tensor:
    """`r = pi / (pi_old^alpha pi_T^(1 - alpha))`, pi_T the geometric mean of the teachers."""
    # log p_T from the gap under the weights as they are
    log_t = token.mean_d + float(token.lp.detach())
    if not sum(token.weights.values()):
        log_t = token.old
    return (token.lp - alpha * token.old - (1 - alpha) * log_t).exp()


def credit(token: Token, mix: float, bound: float) -> float:
    sign = (token.advantage > 0) - (token.advantage < 0)
    share = min(max(math.exp(sign * token.mean_d), 1 - bound), 1 + bound)
    return token.advantage * ((1 - mix) + mix * share)


def inside(rho: float, low: float, high: float) -> float:
    return rho if low <= rho <= high else 0.0


# Phase as in a recipe -> the method, token by token. Divergences beside it are taken from the phase.
METHODS: dict[str, tuple[dict, Callable[[Token], Tensor]]] = {
    "sampled": ({"loss": "sampled_reverse_kl"}, lambda t: surrogate(t.ratio, t.d())),
    "sampled, no clip": (
        {"loss": "sampled_reverse_kl", "clip_ratio": None},
        lambda t: -t.ratio * t.d(),
    ),
    "MiMo": (
        {
            "loss": {"sampled_reverse_kl": 1.0, "outcome": {"weight": 0.4, "std": "biased"}},
            "correction": {"kind": "mask", "low": 0.7, "high": 1.4},
            "clip_ratio": None,
            "reduce": "sequence",
        },
        lambda t: -inside(t.rho, 0.7, 1.4) * (t.d() + 0.4 * t.advantage) * t.ratio,
    ),
    "GLM-5": (
        {
            "loss": {"sampled_reverse_kl": {"weight": 1.0, "bound": 0.3}},
            "correction": {"kind": "mask", "low": 0.5, "high": 2.0},
        },
        lambda t: inside(t.rho, 0.5, 2.0) * surrogate(t.ratio, t.d(bound=0.3)),
    ),
    "truncated": (
        {"loss": "sampled_reverse_kl", "correction": {"kind": "truncate", "low": 0.8, "high": 1.1}},
        lambda t: min(max(t.rho, 0.8), 1.1) * surrogate(t.ratio, t.d()),
    ),
    "KDRL": (
        {"loss": {"outcome": 1.0, "sampled_reverse_kl": {"weight": 0.3}}},
        lambda t: surrogate(t.ratio, t.advantage + 0.3 * t.d()),
    ),
    "KDRL on wrong answers": (
        {"loss": {"outcome": 1.0, "sampled_reverse_kl": 0.3}, "balance": {"distill_on": "wrong"}},
        lambda t: surrogate(t.ratio, t.advantage + 0.3 * t.d()),
    ),
    "SRPO": (
        {
            "loss": {"outcome": {"weight": 1.0, "answers": "right"}, "sampled_reverse_kl": 1.0},
            "balance": {"distill_on": "wrong"},
        },
        lambda t: surrogate(t.ratio, (t.advantage if t.right else 0.0) + t.d()),
    ),
    "HDPO": (
        {"loss": {"outcome": 1.0, "sampled_reverse_kl": 0.5}, "balance": {"distill_on": "failed_groups"}},
        lambda t: surrogate(t.ratio, t.advantage + 0.5 * t.d()),
    ),
    "RLAD": (
        {"loss": {"outcome": {"weight": 1.0, "teacher": {"kind": "trust_region", "alpha": 0.5}}}},
        lambda t: surrogate(trust_region(t, 0.5), t.advantage),
    ),
    "RLSD": (
        {"loss": {"outcome": {"weight": 1.0, "teacher": {"kind": "credit", "mix": 0.5}}}},
        lambda t: surrogate(t.ratio, credit(t, 0.5, 0.2)),
    ),
    "GRPO": ({"loss": "outcome"}, lambda t: surrogate(t.ratio, t.advantage)),
    "Dr. GRPO, dual clip": (
        {
            "loss": {"outcome": {"weight": 1.0, "std": "none"}},
            "clip_ratio": {"low": 0.2, "high": 0.2, "dual": 1.1},
        },
        lambda t: (
            -torch.maximum(-surrogate(t.ratio, t.advantage, 0.2, 0.2), torch.tensor(1.1 * t.advantage))
            if t.advantage < 0
            else surrogate(t.ratio, t.advantage, 0.2, 0.2)
        ),
    ),
    "MiniLLM": (
        {
            "loss": {
                "reverse_kl": 1.0,
                "sampled_reverse_kl": {
                    "weight": 1.0,
                    "discount": 0.9,
                    "future_only": True,
                    "per_remaining_token": True,
                },
            }
        },
        lambda t: surrogate(t.ratio, reward_to_go(t, 0.9)),
    ),
    "IW-OPD": (
        {"loss": {"sampled_reverse_kl": {"weight": 1.0, "early_gain": 0.5}}},
        lambda t: surrogate(t.ratio, early(t, 0.5)),
    ),
    "exact + outcome": (
        {
            "loss": {"reverse_kl": 1.0, "outcome": 0.3},
            "correction": {"kind": "mask", "low": 0.6, "high": 1.5},
        },
        lambda t: inside(t.rho, 0.6, 1.5) * surrogate(t.ratio, 0.3 * t.advantage),
    ),
    "top of the teacher + outcome": (
        {
            "loss": {
                "reverse_kl": 1.0,
                "outcome": 0.3,
                "support": {"top_k": 2, "of": "teacher", "rest": "tail"},
            }
        },
        lambda t: surrogate(t.ratio, 0.3 * t.advantage),
    ),
    "exact JSD + sampled + outcome": (
        {"loss": {"jsd": {"beta": 0.3, "weight": 2.0}, "outcome": 0.3, "sampled_reverse_kl": 0.2}},
        lambda t: surrogate(t.ratio, 0.3 * t.advantage + 0.2 * t.d()),
    ),
}


class Method:
    """The reference: one method on Hugging Face models, over the updates of a round."""

    def __init__(self, reference: Reference, document: dict, formula: Callable[[Token], Tensor]) -> None:
        self.reference, self.document, self.formula = reference, document, formula
        loss = document["loss"]
        self.loss = {loss: 1.0} if isinstance(loss, str) else loss

    def old(
        self, rollouts: Sequence[Rollout], teachers: Sequence[dict[str, Tensor]]
    ) -> list[list[tuple[float, dict[str, float]]]]:
        """Log-probability of every response token under the student and the teachers, before the round."""
        with torch.no_grad():
            students = rollout_logprobs(self.reference.student, rollouts, 1.0)
        return [
            [
                (float(log_s[t, y]), {n: float(log_t[n][t, y]) for n in log_t})
                for t, y in enumerate(r.response_ids)
            ]
            for r, log_s, log_t in zip(rollouts, students, teachers, strict=True)
        ]

    def round(
        self, rollouts: Sequence[Rollout], grades: Sequence[float], num_updates: int
    ) -> list[dict[str, Tensor]]:
        teachers = self.reference.teacher_logprobs(rollouts, 1.0)
        old = self.old(rollouts, teachers)
        std = self.loss.get("outcome", {})
        std = std.get("std", "unbiased") if isinstance(std, dict) else "unbiased"
        scaled = advantages(rollouts, grades, std)
        results = []
        for update in split_updates(rollouts, num_updates):
            members = [(rollouts[i], grades[i], scaled[i], old[i], teachers[i]) for i in update]
            students = rollout_logprobs(self.reference.student, [r for r, *_ in members], 1.0)
            failed = {r.prompt.key: True for r, *_ in members}
            for r, v in zip(rollouts, grades, strict=True):
                if r.prompt.key in failed:
                    failed[r.prompt.key] &= not v
            total = torch.zeros((), dtype=torch.float64)
            num_tokens = sum(len(r.response_ids) for r, *_ in members)
            for log_s, (r, v, a, past, log_t) in zip(students, members, strict=True):
                losses = self.response(r, v, a, past, failed[r.prompt.key], log_s, log_t)
                if self.document.get("reduce") == "sequence":
                    total = total + losses.mean() / len(members)
                else:
                    total = total + losses.sum() / num_tokens
            gradient = self.reference.gradient(total)
            results.append(gradient)
            with torch.no_grad():
                for name, parameter in self.reference.student.named_parameters():
                    parameter -= SGD_LR * gradient[name]
        return results

    def response(
        self,
        r: Rollout,
        grade: float,
        advantage: float,
        past: list,
        failed: bool,
        log_s: Tensor,
        log_t: dict[str, Tensor],
    ) -> Tensor:
        """Loss of every token of one response."""
        teach = self.document.get("balance", {}).get("distill_on", "all")
        cut = r.finish == "length"
        taught = {"all": True, "wrong": grade == 0 or cut, "failed_groups": failed}[teach]
        weights = {n: w if taught else 0.0 for n, w in r.prompt.teachers.items()}
        losses = sum(w * divergences(self.loss, log_s, log_t[n]) for n, w in weights.items())
        tokens = []
        for t, y in enumerate(r.response_ids):
            token = Token(
                lp=log_s[t, y],
                old=past[t][0],
                mu=r.logprobs_behaviour[t],  # type: ignore[index]
                gaps={n: float(log_t[n][t, y] - log_s[t, y].detach()) for n in weights},
                old_gaps=[{n: lt[n] - ls for n in lt} for ls, lt in past],
                weights=weights,
                position=t,
                advantage=0.0 if cut else advantage,
                right=grade > 0,
                group_failed=failed,
                cut_off=cut,
            )
            tokens.append(self.formula(token))
        return losses + torch.stack(tokens)


# A round of two updates asks the student before the first; a round of one does not.
ROUNDS = [
    *((method, 2) for method in METHODS),
    *((method, 1) for method in ("sampled", "MiMo", "GRPO", "RLAD", "RLSD", "exact + outcome")),
]


@pytest.mark.parametrize(("method", "num_updates"), ROUNDS)
def test_gradient_equals_that_of_the_paper(
    write_job: Callable[..., Path], method: str, num_updates: int
) -> None:
    document, formula = METHODS[method]
    parts = methods_parts(
        write_job, "student.micro_batch_tokens=300", **document, updates_per_round=num_updates
    )
    reference = Reference(parts)
    rollouts = rollouts_of(parts, reference)
    grades = rewards_of(rollouts)
    assert {True, False} == {v > 0 for v in grades}
    found = engine_round(parts, rollouts, grades, sgd_lr=SGD_LR)
    expected = Method(reference, document, formula).round(rollouts, grades, num_updates)
    for (gradients, _), wanted in zip(found, expected, strict=True):
        assert_equal(gradients, wanted, 1e-10)
