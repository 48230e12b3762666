"""What the verifiers' verdicts on a round mean: advantages, and whom teachers still comment."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mergeopd.recipe.training import Phase
from mergeopd.reward.groups import RIGHT, group_advantages, pass_rate_weight
from mergeopd.types import Rollout


@dataclass(frozen=True, slots=True)
class Outcomes:
    """Per rollout of a round.

    `advantage` is 0 for answers without an outcome: of other writers, cut off, without verifier, alone in
    their group. `teaching` multiplies the teachers' terms. `silent_fraction` is the share of the groups that
    have an outcome but no advantage, since all their answers have one reward; None without groups.
    """

    advantage: tuple[float, ...]
    teaching: tuple[float, ...]
    silent_fraction: float | None


def outcomes(rollouts: Sequence[Rollout], verdicts: Sequence[float | None], phase: Phase) -> Outcomes:
    """Advantages and teaching factors of a round; a group is the answers of the student to one prompt.

    A cut-off answer has no outcome and does not count in the others' advantages, but its reward does in the
    group's pass rate, and its teachers stay where the group has any. What nothing verifies, or another hand
    wrote, is taught in full.
    """
    groups: dict[str, list[int]] = {}
    for index, rollout in enumerate(rollouts):
        if rollout.origin == "student" and verdicts[index] is not None:
            groups.setdefault(rollout.prompt.key, []).append(index)
    advantage = [0.0] * len(rollouts)
    teaching = [1.0] * len(rollouts)
    num_groups = num_silent = 0
    for members in groups.values():
        known = {i: _known(verdicts[i]) for i in members}
        for index, factor in _teaching(rollouts, known, phase).items():
            teaching[index] = factor
        term = phase.loss.outcome
        whole = [i for i in members if rollouts[i].finish != "length"]
        if term is None or len(whole) < 2:
            continue
        values = group_advantages([known[i] for i in whole], term.std)
        num_groups, num_silent = num_groups + 1, num_silent + (not any(values))
        for index, value in zip(whole, values, strict=True):
            if term.answers == "all" or known[index] >= RIGHT:
                advantage[index] = value
    silent = num_silent / num_groups if num_groups else None
    return Outcomes(tuple(advantage), tuple(teaching), silent)


def _teaching(rollouts: Sequence[Rollout], rewards: dict[int, float], phase: Phase) -> dict[int, float]:
    """What multiplies the teachers' terms of one group's answers."""
    balance = phase.balance
    rate = sum(rewards.values()) / len(rewards)
    exponents = balance.pass_rate
    factor = 1.0 if exponents is None else pass_rate_weight(rate, exponents.a, exponents.b)
    # Cut off is not right, whatever the verifier found in what there is.
    right = {i for i, reward in rewards.items() if reward >= RIGHT and rollouts[i].finish != "length"}
    taught = {}
    for index in rewards:
        match balance.teach:
            case "all":
                is_taught = True
            case "wrong":
                is_taught = index not in right
            case "failed_groups":
                is_taught = not right
        taught[index] = factor if is_taught else 0.0
    return taught


def _known(verdict: float | None) -> float:
    assert verdict is not None
    return verdict
