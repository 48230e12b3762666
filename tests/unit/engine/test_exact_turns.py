"""Responses of two turns are exact through the whole path: what a tool replies is in no loss.

As in test_exact_policy, for every trajectory of two turns over a five-token vocabulary with a reply between
them: raw gradients in float64 of exact divergences and an outcome term under a correction, with two teachers,
against autograd on full logits of Hugging Face models.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from pathlib import Path

import pytest
import torch
from enumeration import (
    EOS,
    Reference,
    advantages,
    assert_equal,
    divergences,
    engine_round,
    methods_parts,
    response_logprobs,
    rollout_logprobs,
)

from mergeopd.engine.models import Models
from mergeopd.types import Rollout, token_flags

TURNS = [(EOS,), *((x, EOS) for x in range(4))]
UNTRAINED_LOGPROB = -77.0  # must not matter


def trajectories(parts: Models, reference: Reference) -> list[Rollout]:
    """Every two turns after every prompt; the reply depends on the first turn, and may contain an end token."""
    rollouts = []
    for name in sorted(parts.inputs.prompts):
        for prompt in parts.inputs.prompts[name]:
            prompt_ids = parts.inputs.student.render(prompt)
            for sample, (first, second) in enumerate(product(TURNS, TURNS)):
                reply = (len(first), EOS, first[0] % 4)
                ids = (*first, *reply, *second)
                trained = [True] * len(first) + [False] * len(reply) + [True] * len(second)
                with torch.no_grad():
                    (rows,) = response_logprobs(reference.teachers["two"], prompt_ids, [ids], 1.2)
                behaviour = [
                    float(row[token]) if own else UNTRAINED_LOGPROB
                    for row, token, own in zip(rows, ids, trained, strict=True)
                ]
                rollouts.append(
                    Rollout(
                        prompt,
                        sample,
                        prompt_ids,
                        ids,  # type: ignore[arg-type]
                        "student",
                        "eos",
                        behaviour,  # type: ignore[arg-type]
                        trained=token_flags(trained),
                    )
                )
    return rollouts


@pytest.mark.parametrize("reduce", ["token", "sequence"])
def test_gradients_of_two_turns(write_job: Callable[..., Path], reduce: str) -> None:
    loss = {"reverse_kl": 1.0, "forward_kl": 0.5, "outcome": {"weight": 0.3, "std": "unbiased"}}
    correction = {"kind": "truncate", "low": 0.6, "high": 1.5}
    parts = methods_parts(
        write_job, "student.micro_batch_tokens=300", loss=loss, correction=correction, reduce=reduce
    )
    reference = Reference(parts)
    rollouts = trajectories(parts, reference)
    grades = [float(sum(r.trained_ids) % 3 == 0) for r in rollouts]
    ((gradients, _),) = engine_round(parts, rollouts, grades)

    students = rollout_logprobs(reference.student, rollouts, 1.0)
    teachers = reference.teacher_logprobs(rollouts, 1.0)
    scaled = advantages(rollouts, grades, "unbiased")
    num_tokens = sum(sum(r.trained) for r in rollouts)  # type: ignore[arg-type]
    total = torch.zeros((), dtype=torch.float64)
    for rollout, log_s, log_t, advantage in zip(rollouts, students, teachers, scaled, strict=True):
        weighted = {n: w * divergences(loss, log_s, log_t[n]) for n, w in rollout.prompt.teachers.items()}
        losses = []
        for t, token in enumerate(rollout.response_ids.tolist()):
            if not rollout.trained[t]:  # type: ignore[index]
                continue
            logprob = log_s[t, token]
            rho = float((logprob.detach() - rollout.logprobs_behaviour[t]).exp())  # type: ignore[index]
            ratio = (logprob - logprob.detach()).exp()
            policy = -min(max(rho, 0.6), 1.5) * 0.3 * advantage * ratio
            losses.append(sum(value[t] for value in weighted.values()) + policy)
        whole = torch.stack(losses).sum()
        total = total + (whole / num_tokens if reduce == "token" else whole / len(losses) / len(rollouts))
    assert_equal(gradients, reference.gradient(total), 1e-10)
