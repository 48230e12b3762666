"""Select the prompts of a phase before it draws any: duplicates, pass rates, distance to the teachers.

A selection is measured once, with the student's weights at the phase's start, and kept in the run folder: a
resumed run reads it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import fmean

from mergeopd.batch.records import PriorScores
from mergeopd.data.draw import PhasedDraw
from mergeopd.data.duplicates import duplicates, normal_text
from mergeopd.engine.clock import Clock
from mergeopd.engine.progress import Task
from mergeopd.engine.rollouts import Rewards, StudentRollouts
from mergeopd.engine.schedule import RoundSchedule
from mergeopd.engine.score import CollectedRound, Scorer
from mergeopd.engine.stages import Stages
from mergeopd.engine.teacher_rollouts import TeacherRolloutCache
from mergeopd.errors import DataError, StorageError
from mergeopd.messages import shown
from mergeopd.recipe.loss_terms import Loss
from mergeopd.recipe.plan import Plan, phase_teachers
from mergeopd.recipe.selection import Frontier, NearTeacher, Select, TeacherRight
from mergeopd.recipe.training import Balance, Phase
from mergeopd.reporting.events import PromptsSelected
from mergeopd.storage import run_layout
from mergeopd.storage.selection import (
    SelectedPrompt,
    SelectedShare,
    read_selection,
    selected_shares,
    write_selection,
)
from mergeopd.types import Origin, Prompt, Rollout

Rows = dict[str, SelectedPrompt]
_MARK = "#select-"  # in the keys of prompts that are measured: other random numbers than in training
_REMEDIES = {
    "teacher_wrong": "lower `teacher_right.least`, or check `verifier`, `template` and the teacher",
    "below": "lower `frontier.low`, raise `frontier.samples`, or begin with a phase of `text: teacher`",
    "above": "raise `frontier.high`, or give the phase harder prompts",
    "ungraded": "check the `verifier`",
    "far": "raise `near_teacher.nats`, or begin with a phase of `text: teacher`",
}


@dataclass
class PromptSelection:
    """Selects prompts of phases with `select`, and lets `draw` draw from these.

    `prompts` are those of all sources; `schedule` assigns the work of scoring responses.
    """

    plan: Plan
    prompts: Mapping[str, Sequence[Prompt]]
    draw: PhasedDraw
    rollouts: StudentRollouts
    responses: TeacherRolloutCache
    rewards: Rewards
    scorer: Scorer
    schedule: Callable[[Sequence[Rollout]], RoundSchedule]
    stages: Stages
    _selected: dict[str, tuple[SelectedShare, ...]] = field(default_factory=dict, init=False)

    def is_ready(self, phase: Phase) -> bool:
        """Whether the phase can be drawn from."""
        return phase.select is None or phase.name in self._selected

    def shares(self, phase: Phase) -> dict[str, float]:
        """Return the share of each source's prompts that a phase draws from; empty if it draws from all."""
        return {each.source: each.kept_fraction for each in self._selected.get(phase.name, ())}

    def prepare(self, phase: Phase, updates_done: int, sync_weights: Callable[[], None]) -> None:
        """Select a phase's prompts, or read what was selected. Collective.

        `sync_weights` gives the newest weights to the rollout engine. Raises DataError if a source has no
        prompt left, StorageError if a phase that has begun lacks its measured selection, and AbandonRound
        when a stop was requested.
        """
        select = phase.select
        if select is None or self.is_ready(phase):
            return
        candidates = self._candidates(phase, select)
        path = Path(self.plan.output) / run_layout.SELECTION
        earlier = self.stages.ranks.run_on_first(lambda: read_selection(path))
        known = [row for row in earlier if row.phase == phase.name]
        rows = {row.key: row for row in known}
        if {key: row.digest for key, row in rows.items()} != {
            k: r.digest for k, (r, _) in candidates.items()
        }:
            if updates_done and select.is_measured:
                raise StorageError(
                    f"{shown(path)} lacks the prompts that phase '{phase.name}' has selected, and the "
                    f"student has changed in {updates_done} updates since; restore the file, undo changes "
                    "of prompts and `select`, or start over with --fresh"
                )
            rows = self._measured(phase, select, candidates, sync_weights)
            others = [row for row in earlier if row.phase != phase.name]
            self.stages.ranks.run_on_first(lambda: write_selection(path, [*others, *rows.values()]))
        shares = selected_shares(list(rows.values()))
        self._check_left(shares)
        kept = {
            name: [prompt for prompt in self.prompts[name] if not rows[prompt.key].dropped]
            for name in self.plan.shares(phase)
        }
        self.draw.narrow(phase.name, kept)
        for each in shares:
            self.stages.reporter.emit(PromptsSelected(each))
        self._selected[phase.name] = shares

    def _candidates(self, phase: Phase, select: Select) -> dict[str, tuple[SelectedPrompt, Prompt]]:
        """Return all prompts of a phase, with its teachers, and rows without measurements, by key."""
        probe = _probe(phase)
        teachers = phase_teachers(probe, self.plan.sources, self.plan.teachers)
        verifiers = {source.name: str(source.verifier) for source in self.plan.sources}
        settings = self.plan.rollout_of(phase).model_dump(mode="json")
        candidates = {}
        for name in self.plan.shares(phase):
            for prompt in self.prompts[name]:
                routed = teachers.route(prompt)
                messages = [asdict(message) for message in prompt.messages]
                measured = [
                    select.model_dump(),
                    settings,
                    verifiers[name],
                    dict(routed.teachers),
                    self.plan.seed,
                ]
                content = [messages, prompt.reference, list(prompt.tools), dict(prompt.fields), measured]
                digest = hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()
                candidates[prompt.key] = SelectedPrompt(phase.name, name, prompt.key, digest[:32]), routed
        return candidates

    def _measured(
        self,
        phase: Phase,
        select: Select,
        candidates: Mapping[str, tuple[SelectedPrompt, Prompt]],
        sync_weights: Callable[[], None],
    ) -> Rows:
        """Apply the rules in order; each measures only the prompts that those before it have kept."""
        rows = {key: row for key, (row, _) in candidates.items()}
        prompts = {key: prompt for key, (_, prompt) in candidates.items()}

        def left() -> list[Prompt]:
            return [prompts[key] for key, row in rows.items() if not row.dropped]

        if select.deduplicate is not None:
            rows |= _without_duplicates(rows, left(), select.deduplicate)
            self._check_left(selected_shares(list(rows.values())))
        if select.teacher_right is not None:
            texts = self._of_teachers(phase, left(), select.teacher_right.samples)
            rates = self._pass_rates(phase, texts, "teacher")
            # A prompt is absent if none of the teacher's responses can be used.
            rows |= {
                prompt.key: _judged_teacher(rows[prompt.key], rates.get(prompt.key), select.teacher_right)
                for prompt in left()
            }
            self._check_left(selected_shares(list(rows.values())))
        if not select.is_measured:
            return rows
        sync_weights()
        responses = self._of_student(phase, left(), select.num_student_samples)
        if select.frontier is not None:
            first = [r for r in responses if r.sample < select.frontier.samples]
            rates = self._pass_rates(phase, first, "student")
            rows |= {key: _judged_student(rows[key], rate, select.frontier) for key, rate in rates.items()}
            self._check_left(selected_shares(list(rows.values())))
        if select.near_teacher is not None:
            near = select.near_teacher
            kept = [r for r in responses if r.sample < near.samples and not rows[_key(r)].dropped]
            gaps = self._gaps(phase, kept)
            rows |= {key: _judged_gap(rows[key], gap, near) for key, gap in gaps.items()}
        return rows

    def _of_student(self, phase: Phase, prompts: Sequence[Prompt], num: int) -> list[Rollout]:
        """Return the student's responses, whose random numbers are not those of any training rollout."""
        settings = self.plan.rollout_of(phase).model_copy(update={"samples_per_prompt": num})
        marked = [replace(prompt, key=f"{prompt.key}{_MARK}{phase.name}") for prompt in prompts]
        with self.stages.clock.stage("text"):
            return self.rollouts.generate([Task(prompt, 0, "student") for prompt in marked], settings)

    def _of_teachers(self, phase: Phase, prompts: Sequence[Prompt], num: int) -> list[Rollout]:
        """Return the responses of the teachers that generate text, which the cache keeps."""
        settings = self.plan.rollout_of(phase).model_copy(update={"samples_per_prompt": num})
        tasks = [Task(prompt, 0, "teacher") for prompt in prompts]
        with self.stages.clock.stage("text"):
            self.responses.prepare(tasks, settings)
        return [rollout for task in tasks for rollout in self.responses.of(task, settings)]

    def _pass_rates(
        self, phase: Phase, rollouts: Sequence[Rollout], origin: Origin
    ) -> dict[str, float | None]:
        """Return the mean reward of each prompt's responses; None where none has a reward."""
        with self.stages.clock.stage("text"):
            grades = self.rewards.of(rollouts, self.plan.rollout_of(phase).stop, origin)
        rewards: dict[str, list[float]] = {_key(rollout): [] for rollout in rollouts}
        for rollout, grade in zip(rollouts, grades, strict=True):
            if grade.reward is not None:
                rewards[_key(rollout)].append(grade.reward)
        return {key: fmean(own) if own else None for key, own in rewards.items()}

    def _gaps(self, phase: Phase, rollouts: Sequence[Rollout]) -> dict[str, float | None]:
        """Return the mean log p of student minus teachers over the tokens of each prompt's responses.

        Rounds of the phase's size are scored one after the other, as in training.
        """
        # A clock of its own: these passes are no part of an update.
        stages = replace(self.stages, clock=Clock())
        scorer = replace(self.scorer, needs_prior_policy=lambda _: True, stages=stages)
        probe = _probe(phase)
        sums = {_key(rollout): (0.0, 0.0) for rollout in rollouts}
        for start in range(0, len(rollouts), phase.prompts_per_round):
            part = rollouts[start : start + phase.prompts_per_round]
            collected = CollectedRound(probe, 0, part, [None] * len(part), self.schedule(part))
            with self.stages.clock.stage("text"), scorer.score(collected) as scored:
                for index, gap in self._gathered_gaps(part, scored.old).items():
                    total, count = sums[_key(part[index])]
                    sums[_key(part[index])] = total + gap[0], count + gap[1]
        return {key: total / count if count else None for key, (total, count) in sums.items()}

    def _gathered_gaps(self, rollouts: Sequence[Rollout], old: PriorScores) -> dict[int, tuple[float, float]]:
        """Return each rollout's weighted sums of gaps and of tokens, over its teachers. Collective."""
        own = {}
        for index, before in old.logprobs.items():
            weights = rollouts[index].prompt.teachers
            gaps = {
                name: float((before.logprob_S - logprob_T).sum())
                for name, logprob_T in before.logprob_T.items()
            }
            own[index] = (
                sum(weights[name] * gap for name, gap in gaps.items()),
                sum(weights[name] * len(before.logprob_S) for name in gaps),
            )
        reports = self.scorer.prior_policy.student.placement.reports_stats
        parts = self.stages.ranks.gather(own if reports else {})
        return {index: gap for part in parts for index, gap in part.items()}

    def _check_left(self, shares: Sequence[SelectedShare]) -> None:
        """Raise DataError for the first source without a prompt left, with what dropped them."""
        for each in shares:
            if each.num_kept:
                continue
            remedies = [text for reason, text in _REMEDIES.items() if reason in each.dropped]
            remedies.append("leave the source out of the phase's `prompts`")
            raise DataError(
                f"phase '{each.phase}' selects none of the {each.num_prompts:,} prompts of '{each.source}': "
                f"{each.reasons}; {', or '.join(remedies)}"
            )


def _probe(phase: Phase) -> Phase:
    """Return the phase with a loss that compares sampled tokens with all teachers of the prompts."""
    loss = Loss.model_validate({"sampled_reverse_kl": {"weight": 1.0}})
    return phase.model_copy(update={"loss": loss, "balance": Balance()})


def _key(rollout: Rollout) -> str:
    """Return the key of a rollout's prompt, without the mark of a selection."""
    return rollout.prompt.key.partition(_MARK)[0]


def _without_duplicates(rows: Rows, prompts: Sequence[Prompt], rule: str | float) -> Rows:
    texts = [normal_text(prompt) for prompt in prompts]
    twins = duplicates(texts, None if isinstance(rule, str) else rule)
    return {
        prompts[index].key: replace(
            rows[prompts[index].key],
            dropped="duplicate" if texts[index] == texts[twin] else "near_duplicate",
            twin=prompts[twin].key,
        )
        for index, twin in twins.items()
    }


def _judged_teacher(row: SelectedPrompt, rate: float | None, rule: TeacherRight) -> SelectedPrompt:
    dropped = "ungraded" if rate is None else "teacher_wrong" if rate < rule.least else ""
    return replace(row, teacher_pass_rate=rate, dropped=dropped)


def _judged_student(row: SelectedPrompt, rate: float | None, rule: Frontier) -> SelectedPrompt:
    if rate is None:
        return replace(row, dropped="ungraded")
    return replace(
        row, pass_rate=rate, dropped="below" if rate < rule.low else "above" if rate > rule.high else ""
    )


def _judged_gap(row: SelectedPrompt, gap: float | None, rule: NearTeacher) -> SelectedPrompt:
    return replace(row, gap=gap, dropped="" if gap is not None and gap <= rule.nats else "far")
