"""The objective is exact through the whole path.

All answers of at most two tokens over a five-token vocabulary are scored, prepared, packed and accumulated
by the engine in float64; the raw gradient is compared with autograd on full logits of independent Hugging
Face models. No optimizer is in between: Adam would hide a wrong scale.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
from enumeration import (
    ANSWERS,
    EOS,
    Reference,
    V,
    assert_equal,
    build_parts,
    engine_round,
    logprobs,
    prompts_of,
)

from mergeopd.distributed.communicator import SingleProcess
from mergeopd.engine.models import Machine, Models, load_models
from mergeopd.engine.schedule import split_updates
from mergeopd.preflight.inputs import preflight
from mergeopd.types import Prompt, Rollout

CPU = torch.device("cpu")

LOSSES = {
    "reverse": {"reverse_kl": 1.0},
    "forward": {"forward_kl": 0.8},
    "jsd": {"jsd": {"weight": 2.0, "beta": 0.3}},
    "tvd": {"tvd": 1.5},
    "skewed": {"skew_forward_kl": {"alpha": 0.2}, "skew_reverse_kl": 0.5},
    "alpha": {"alpha_divergence": {"alpha": 0.3}},
    "clipped": {"clipped_forward_kl": {"weight": 1.0, "bound": 0.2}},
    "mixture": {"reverse_kl": 1.0, "forward_kl": 0.5, "temperature": 2.0},
    "nll": {"forward_kl": 1.0, "nll": 0.3},
    "top of the student": {"reverse_kl": 1.0, "support": {"top_k": 2, "of": "student", "rest": "tail"}},
    "top of the teacher": {"forward_kl": 1.0, "support": {"top_k": 2, "of": "teacher", "rest": "tail"}},
    "generalised": {
        "reverse_kl": 1.0,
        "forward_kl": 0.5,
        "support": {"top_k": 1, "of": "union", "rest": "generalised"},
    },
    "jsd on the teacher's top": {
        "jsd": {"weight": 1.0, "beta": 0.3},
        "temperature": 1.5,
        "support": {"top_k": 3, "of": "teacher", "rest": "tail"},
    },
}


def all_answers(parts: Models, origin: str = "student") -> list[Rollout]:
    render = parts.inputs.student.render
    return [
        Rollout(p, i, render(p), answer, origin, "eos" if answer[-1] == EOS else "length")  # type: ignore[arg-type]
        for p in prompts_of(parts)
        for i, answer in enumerate(ANSWERS)
    ]


# Every loss in micro-batches of several sizes; one from each way through the kernel also in others.
SPLITS = [
    *((loss, 23) for loss in LOSSES),
    *(
        (loss, size)
        for loss in ("reverse", "nll", "generalised", "top of the teacher")
        for size in (1, 100_000)
    ),
]


@pytest.mark.parametrize(("loss", "micro_batch_tokens"), SPLITS)
def test_gradient_equals_autograd_for_every_micro_batch_split(
    write_job: Callable[..., Path], loss: str, micro_batch_tokens: int
) -> None:
    parts = build_parts(write_job, f"student.micro_batch_tokens={micro_batch_tokens}", loss=LOSSES[loss])
    rollouts = all_answers(parts, "dataset" if loss == "nll" else "student")
    reference = Reference(parts)
    total = sum(losses.sum() for losses in reference.token_losses(LOSSES[loss], rollouts))
    expected = reference.gradient(total / sum(len(r.response_ids) for r in rollouts))
    assert_equal(engine_round(parts, rollouts)[0][0], expected)


@pytest.mark.parametrize("round_index", [0, 1])
@pytest.mark.parametrize("reverse", [False, True])
def test_the_order_of_teachers_and_responses_has_no_effect(
    write_job: Callable[..., Path], round_index: int, reverse: bool
) -> None:
    parts = build_parts(write_job, loss=LOSSES["reverse"])
    rollouts = all_answers(parts)
    found, _ = engine_round(parts, rollouts[::-1] if reverse else rollouts, round_index=round_index)[0]
    reference = Reference(parts)
    total = sum(losses.sum() for losses in reference.token_losses(LOSSES["reverse"], rollouts))
    assert_equal(found, reference.gradient(total / sum(len(r.response_ids) for r in rollouts)))


def test_sequence_mean_budgets_and_several_updates(write_job: Callable[..., Path]) -> None:
    """Each update has denominators of its own; budgets make the domains' shares 3 to 1."""
    parts = build_parts(
        write_job,
        loss=LOSSES["reverse"],
        reduce="sequence",
        balance={"tokens": {"left": 3.0, "right": 1.0}},
        updates_per_round=2,
    )
    rollouts = all_answers(parts)
    reference = Reference(parts)
    gradients = [gradient for gradient, _ in engine_round(parts, rollouts)]
    assert len(gradients) == 2
    for update, found in zip(split_updates(rollouts, 2), gradients, strict=True):
        members = [rollouts[i] for i in update]
        total = torch.zeros((), dtype=torch.float64)
        for domain, share in (("left", 0.75), ("right", 0.25)):
            mine = [r for r in members if r.prompt.domain == domain]
            means = [losses.mean() for losses in reference.token_losses(LOSSES["reverse"], mine)]
            total = total + share * torch.stack(means).mean()
        assert_equal(found, reference.gradient(total))


def test_responses_weighted_by_their_probability_give_the_expectation_over_states(
    write_job: Callable[..., Path],
) -> None:
    """Sum over answers of p(answer) x loss(answer) equals the sum over states of p(state) x loss(state).

    The right side never looks at an answer: a recursion over the two levels of the tree.
    """
    parts = build_parts(write_job, loss=LOSSES["reverse"])
    reference = Reference(parts)
    rollouts, total = [], torch.zeros((), dtype=torch.float64)
    prompts: list[Prompt] = [p for ps in parts.inputs.prompts.values() for p in ps]
    for prompt in prompts:
        ids = parts.inputs.student.render(prompt)
        with torch.no_grad():
            first = logprobs(reference.student, ids, (0,), 1.0)[0].exp()
            second = [logprobs(reference.student, ids, (x, 0), 1.0)[1].exp() for x in range(V - 1)]
        probability = {(EOS,): first[EOS]} | {
            (x, y): first[x] * second[x][y] for x, y in product(range(V - 1), range(V))
        }
        assert float(sum(probability.values())) == pytest.approx(1.0, abs=1e-12)
        for i, (answer, p) in enumerate(probability.items()):
            weighted = replace(prompt, teachers={n: w * float(p) for n, w in prompt.teachers.items()})
            rollouts.append(Rollout(weighted, i, ids, answer, "student", "eos"))
        root = Rollout(prompt, 0, ids, (0,), "student", "eos")
        total = total + reference.token_losses(LOSSES["reverse"], [root])[0][0]
        for x in range(V - 1):
            state = Rollout(prompt, 0, ids, (x, 0), "student", "eos")
            total = total + first[x] * reference.token_losses(LOSSES["reverse"], [state])[0][1]
    num_tokens = sum(len(r.response_ids) for r in rollouts)
    assert_equal(engine_round(parts, rollouts)[0][0], reference.gradient(total / num_tokens))


def test_a_teacher_equal_to_the_student_has_no_gradient(write_job: Callable[..., Path]) -> None:
    recipe = write_job()
    (recipe.parent / "two.yaml").write_text('{"card": 1, "name": "self", "model": "base"}')
    overrides = ['prompts.0.teachers={"two": 1.0}', "prompts.1.teachers=two", 'teachers={"two": "two.yaml"}']
    parts = load_models(preflight(recipe, overrides), Machine(CPU, SingleProcess()))
    [(gradient, _)] = engine_round(parts, all_answers(parts))
    assert max(float(g.abs().max()) for g in gradient.values()) <= 1e-6
