"""What verdicts mean, by hand: groups, cut-off answers, other writers, whom teachers comment."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from mergeopd.batch.advantages import Outcomes, outcomes
from mergeopd.recipe.training import Phase
from mergeopd.types import Prompt, Rollout

# Prompt, who wrote it, how it ended, what the verifier says.
ROUND: list[tuple[str, str, str, float | None]] = [
    ("p", "student", "eos", 1.0),
    ("p", "student", "eos", 0.0),
    ("p", "student", "length", 1.0),  # in no group, but part of the pass rate
    ("q", "student", "eos", 0.0),
    ("p", "teacher", "eos", 1.0),  # another writer
    ("q", "student", "stop", 0.0),
    ("p", "student", "eos", 1.0),  # groups need not be neighbours
    ("r", "student", "eos", 0.25),  # alone
    ("s", "student", "eos", None),  # nothing verifies it
    ("s", "student", "eos", None),
]


def found_in(answers: Sequence[tuple[str, str, str, float | None]], **phase: object) -> Outcomes:
    rollouts = [
        Rollout(Prompt(key, "source", "domain", ()), i, (1,), (2,), origin, finish, (-1.0,))  # type: ignore[arg-type]
        for i, (key, origin, finish, _) in enumerate(answers)
    ]
    whole = Phase.model_validate({"name": "phase", "updates": 1, "loss": "outcome", **phase})
    return outcomes(rollouts, [grade for *_, grade in answers], whole)


def test_advantages_of_a_round() -> None:
    """Group p: 1, 0, 1 with mean 2/3; q is of one mind; r is alone."""
    found = found_in(ROUND, loss={"outcome": {"std": "none"}})
    third = 1 / 3
    assert found.advantage == pytest.approx((third, -2 * third, 0, 0, 0, 0, third, 0, 0, 0))
    assert found.zero_advantage_fraction == 0.5
    assert found.teacher_loss_weight == (1.0,) * len(ROUND)
    unbiased = found_in(ROUND).advantage
    assert unbiased[0] == pytest.approx(third / (third**0.5), rel=1e-5)  # variance 1/3 with n - 1
    biased = found_in(ROUND, loss={"outcome": {"std": "biased"}}).advantage
    assert biased[1] == pytest.approx(-(2**0.5), rel=1e-5)


def test_only_right_answers() -> None:
    """Wrong ones stay in the group: the advantages of the others do not change."""
    every = found_in(ROUND).advantage
    right = found_in(ROUND, loss={"outcome": {"answers": "right"}}).advantage
    assert right[1] == 0.0
    assert [right[i] for i in (0, 6)] == [every[i] for i in (0, 6)]


def test_rounds_without_groups() -> None:
    assert found_in([]) == Outcomes((), (), None)
    lonely = [("p", "student", "length", 1.0), ("p", "student", "eos", 0.0), ("q", "teacher", "eos", 1.0)]
    assert found_in(lonely) == Outcomes((0.0,) * 3, (1.0,) * 3, None)
    assert found_in(ROUND, loss="reverse_kl").zero_advantage_fraction is None
    assert not any(found_in(ROUND, loss="reverse_kl").advantage)


def test_pass_rates_count_cut_off_answers_as_they_were_judged() -> None:
    """p: 3 of 4; q: none; r: 0.25; what is not verified, or not the student's, is taught in full."""
    phase = {"loss": "reverse_kl", "balance": {"pass_rate": {"a": 1.0, "b": 1.0}}}
    p, q, r = 0.75 * 0.25, 0.0, 0.25 * 0.75
    assert found_in(ROUND, **phase).teacher_loss_weight == pytest.approx((p, p, p, q, 1, q, p, r, 1, 1))
    uniform = {"loss": "reverse_kl", "balance": {"pass_rate": {"a": 0.0, "b": 0.0}}}
    assert found_in(ROUND, **uniform).teacher_loss_weight == (1.0,) * len(ROUND)


@pytest.mark.parametrize(
    ("distill_on", "expected"),
    [
        ("all", (1, 1, 1, 1, 1, 1, 1, 1, 1, 1)),
        ("wrong", (0, 1, 1, 1, 1, 1, 0, 1, 1, 1)),  # cut off is not right
        ("failed_groups", (0, 0, 0, 1, 1, 1, 0, 1, 1, 1)),
    ],
)
def test_whom_teachers_comment(distill_on: str, expected: tuple[int, ...]) -> None:
    phase = {"loss": "reverse_kl", "balance": {"distill_on": distill_on}}
    assert found_in(ROUND, **phase).teacher_loss_weight == expected
    both = {"loss": "reverse_kl", "balance": {"distill_on": distill_on, "pass_rate": {}}}
    rates = found_in(ROUND, loss="reverse_kl", balance={"pass_rate": {}}).teacher_loss_weight
    product = tuple(a * b for a, b in zip(rates, expected, strict=True))
    assert found_in(ROUND, **both).teacher_loss_weight == pytest.approx(product)


@pytest.mark.parametrize("distill_on", ["wrong", "failed_groups"])
def test_truncated_responses_solve_no_prompt(distill_on: str) -> None:
    """Otherwise the answers of a prompt that the student never finishes would lose their teachers."""
    group = [("p", "student", "length", 1.0), ("p", "student", "eos", 0.0), ("p", "student", "length", 0.0)]
    assert (
        found_in(group, loss="reverse_kl", balance={"distill_on": distill_on}).teacher_loss_weight
        == (1.0,) * 3
    )
