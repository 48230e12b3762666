"""The run: rounds of prompts, answers, scores and updates; phases; checkpoints; the result."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

from mergeopd.engine.batch import Before, Dialects, prepare
from mergeopd.engine.build import Parts
from mergeopd.engine.checkpoint import Record, save, written_by_first
from mergeopd.engine.clock import Clock
from mergeopd.engine.crossing import align_round
from mergeopd.engine.evaluate import Accuracies, Evaluation
from mergeopd.engine.interrupt import Interrupt, StopNow, Watch
from mergeopd.engine.lookback import is_needed, look_back
from mergeopd.engine.objectives import phase_objective
from mergeopd.engine.observing import Observed, kept
from mergeopd.engine.outcomes import outcomes
from mergeopd.engine.run_folder import RunFolder
from mergeopd.engine.samples import SampleTaker, choose, is_due
from mergeopd.engine.schedule import RoundWork, UpdateWork, clip_factor, learning_rate
from mergeopd.engine.scoring import ScoredRound, rewards, score
from mergeopd.engine.state import Progress, phase_at
from mergeopd.engine.tasks import Task, plan_round
from mergeopd.engine.texts import TeacherTexts
from mergeopd.engine.updating import accumulate
from mergeopd.engine.writing import dataset_rollout, write_student
from mergeopd.errors import Stopped
from mergeopd.recipe.locate import shown
from mergeopd.recipe.plan import EvaluationPlan
from mergeopd.recipe.training import Phase
from mergeopd.report.events import Reporter, RunFinished, RunStarted, StageStarted, UpdateDone
from mergeopd.report.result import result_document, write_result
from mergeopd.student.companions import write_turns
from mergeopd.teacher.cache import RoundCache
from mergeopd.types import Rollout


class Merge:
    """One run of a plan, from wherever its folder stands to its end."""

    def __init__(
        self, parts: Parts, folder: RunFolder, reporter: Reporter, clock: Clock, interrupt: Interrupt
    ) -> None:
        self._parts = parts
        self._plan = parts.plan
        self._folder = folder
        self._ranks = parts.ranks
        self._interrupt = interrupt
        self._reporter = Watch(reporter, interrupt, parts.ranks)
        self._clock = clock
        self._texts = TeacherTexts(parts)
        self._prepared_phase = ""

    def run(self, progress: Progress, max_updates: int | None) -> None:
        """Train from `progress` to the last update, export, evaluate, write the result. Collective.

        Raises Stopped, after a checkpoint, when a stop was requested or `max_updates` were made.
        """
        first = progress.update
        plan = self._plan
        self._reporter.emit(
            RunStarted(
                name=plan.name,
                recipe=plan.recipe_file,
                num_updates=plan.num_updates,
                phases=tuple((phase.name, phase.updates) for phase in plan.phases),
                teachers=tuple(plan.teachers),
                domains=tuple(sorted({source.domain for source in plan.sources})),
                output=self._folder.path,
                resumed_at=progress.update,
            )
        )
        while (now := phase_at(plan, progress.update)) is not None:
            try:
                self._reporter.abandonable = True
                progress = self._round(*now, progress)
            except StopNow:
                self._stop(progress)
            self._reporter.abandonable = False
            if self._is_due(progress, now[0].updates_per_round):
                self._save(progress)
            if max_updates is not None and first + max_updates <= progress.update < plan.num_updates:
                self._interrupt.requested = "--updates"
            if self._is_stopping():
                self._stop(progress)
        self._finish()

    def _is_stopping(self) -> bool:
        """Whether any process was asked to stop; then all of them were."""
        asked = [request for request in self._ranks.gather(self._interrupt.requested) if request]
        self._interrupt.requested = asked[0] if asked else None
        return bool(asked)

    def _save(self, progress: Progress) -> None:
        with self._clock.stage("checkpoint"):
            record = Record(progress, self._clock.seconds())
            save(self._folder.checkpoints, self._parts, record, self._reporter)

    def _stop(self, progress: Progress) -> NoReturn:
        """Save what is not saved yet and leave."""
        self._reporter.abandonable = False
        self._is_stopping()  # all know by whom, whatever a starter of processes sends when the first has left
        reason = self._interrupt.requested
        target = self._folder.checkpoints / f"step-{progress.update}"
        if progress.update and not self._ranks.first(target.exists):
            self._save(progress)
        self._ranks.gather(None)  # none leaves while another still has something to write
        raise Stopped(
            f"stopped by {reason} after {progress.update} of {self._plan.num_updates} "
            "updates, all saved; the same command goes on"
        )

    def _round(self, phase: Phase, updates_done: int, progress: Progress) -> Progress:
        """One round and its updates."""
        before = progress.update
        if phase.name != self._prepared_phase:
            self._prepare_texts(phase, updates_done, progress)
        tasks = plan_round(self._parts, phase, progress, updates_done)
        with self._clock.stage("rollout"):
            rollouts = self._rollouts(tasks, progress)
            verdicts = rewards(self._parts, rollouts)
        student = self._parts.student
        work = self._parts.work(rollouts, progress.round, phase.updates_per_round)
        with self._parts.hidden_cache(work, self._folder.spill) as cache:
            scored = self._scored(phase, rollouts, verdicts, work, cache)
            for done, update in enumerate(work.updates, updates_done):
                self._update(scored, update, done, progress.update + 1)
                progress = replace(progress, update=progress.update + 1)
        self._parts.store.heads(())
        self._parts.past.advance(student.named_weights, student.named_masters, before, progress.update)
        return replace(progress, round=progress.round + 1, drawn=progress.drawn + phase.prompts_per_round)

    def _scored(
        self,
        phase: Phase,
        rollouts: Sequence[Rollout],
        verdicts: Sequence[float | None],
        work: RoundWork,
        cache: RoundCache,
    ) -> ScoredRound:
        """All that is known of a round before its first update."""
        wanted = kept(phase.loss)
        crossings = self._parts.inputs.crossings
        observed = Observed(cache, wanted, align_round(crossings, rollouts) if wanted is not None else {})
        if observed.kept is not None:
            with self._clock.stage("teachers"):
                score(self._parts, rollouts, work, observed, self._reporter)
        past: Mapping[int, Before] = {}
        if is_needed(phase, spans=self._has_spans(phase)):
            with self._clock.stage("update"):
                past = look_back(self._parts, rollouts, phase, work, observed, self._reporter)
        found = outcomes(rollouts, verdicts, phase)
        return ScoredRound(phase, work, rollouts, verdicts, observed, found, past)

    def _update(self, scored: ScoredRound, update: UpdateWork, updates_done: int, number: int) -> None:
        """Update number `number` (from 1) of the run, after `updates_done` of its phase; then its events."""
        parts, phase, rollouts, members = self._parts, scored.phase, scored.rollouts, update.rollouts
        objective = phase_objective(phase, updates_done, spans=self._has_spans(phase))
        lr = phase.lr_scale * self._learning_rate(number)
        with self._clock.stage("update"):
            dialects = Dialects.of(parts.inputs)
            prepared = prepare(
                rollouts,
                members,
                phase,
                updates_done,
                dialects,
                scored.outcomes,
                scored.before,
                scored.observed.alignments,
            )
            due = is_due(number, self._plan.num_updates)
            samples = SampleTaker(choose(rollouts, members) if due else (), objective)
            stats = accumulate(
                parts,
                objective,
                prepared,
                update.packs[parts.student.place.copy],
                scored.observed,
                samples,
                self._reporter,
            )
            stats.refuse_uniform_teachers(parts.inputs.vocab_size)
            self._reporter.abandonable = False
            grad_norm = parts.student.apply(lr)
        num_on_policy = sum(rollouts[i].origin == "student" for i in members)
        self._reporter.emit(
            UpdateDone(
                update=number,
                phase=phase.name,
                round=scored.work.index,
                lr=lr,
                loss=stats.loss,
                grad_norm=grad_norm,
                num_tokens=sum(rollouts[i].num_trained for i in members),
                on_policy_fraction=num_on_policy / len(members),
                teachers=stats.teachers(parts.inputs.crossings),
                domains=stats.domains(prepared, scored.verdicts),
                seconds=self._clock.lap(),
                teacher_bytes_read=parts.bytes_read(),
                policy=stats.policy(scored.outcomes.silent_fraction),
                clip_factor=clip_factor(grad_norm, self._plan.optimizer.clip_grad),
            )
        )
        tokenizer = parts.inputs.student.tokenizer
        for sample in samples.events(number, phase.name, rollouts, scored.verdicts, tokenizer):
            self._reporter.emit(sample)

    def _has_spans(self, phase: Phase) -> bool:
        """Whether a teacher's bridge is a policy term of this phase."""
        crossings = self._parts.inputs.crossings.values()
        return phase.loss.needs_teacher and any(c.bridge.kind == "span" for c in crossings)

    def _learning_rate(self, number: int) -> float:
        optimizer = self._plan.optimizer
        return learning_rate(
            number - 1,
            peak=optimizer.lr,
            warmup=optimizer.warmup_updates,
            total=self._plan.num_updates,
            shape=optimizer.schedule,
            final_fraction=optimizer.final_lr_fraction,
        )

    def _rollouts(self, tasks: Sequence[Task], progress: Progress) -> list[Rollout]:
        """Answers to all tasks; the student's first, each kind in the order of the tasks."""
        student = self._parts.inputs.student
        rollouts = write_student(self._parts, tasks, progress.update, self._reporter)
        for task in tasks:
            if task.origin == "teacher":
                rollouts += self._texts.rollouts(task)
            elif task.origin == "dataset":
                rollouts.append(dataset_rollout(task, student))
        return rollouts

    def _prepare_texts(self, phase: Phase, updates_done: int, progress: Progress) -> None:
        """Have the teachers write, at once, all that the rest of this phase will ask of them."""
        tasks: list[Task] = []
        while updates_done < phase.updates:
            tasks += plan_round(self._parts, phase, progress, updates_done)
            progress = replace(progress, drawn=progress.drawn + phase.prompts_per_round)
            updates_done += phase.updates_per_round
        with self._clock.stage("text"):
            self._texts.prepare(tasks, self._reporter)
        self._prepared_phase = phase.name

    def _is_due(self, progress: Progress, num_new: int) -> bool:
        """Whether the last `num_new` updates reached a multiple of `checkpoint.every`, or the end."""
        every = self._plan.checkpoint.every
        is_last = progress.update == self._plan.num_updates
        return is_last or progress.update // every > (progress.update - num_new) // every

    def _measure(self, plan: EvaluationPlan) -> Accuracies:
        """Evaluate the export; everything is saved already, so a request to stop is met at once."""
        try:
            self._reporter.abandonable = True
            with self._clock.stage("evaluation"):
                parts = self._parts
                evaluation = Evaluation(parts.inputs, plan, parts.device, parts.ranks, self._reporter)
                return evaluation.run(self._folder.export)
        except StopNow:
            self._is_stopping()
            raise Stopped(
                f"stopped by {self._interrupt.requested} while the student was measured; training and export "
                "are saved, and the same command measures again"
            ) from None
        finally:
            self._reporter.abandonable = False

    def _finish(self) -> None:
        """Export the student, measure, write the result."""
        folder = self._folder
        if not self._ranks.first(folder.export.exists):
            self._reporter.emit(StageStarted("export", "the student as a Hugging Face folder"))
            with written_by_first(folder.export, self._ranks) as target:
                self._parts.student.export(target)
                if self._ranks.is_first:
                    student, own = self._parts.inputs.student, self._plan.student.template
                    write_turns(target, student.eos_ids, None if own is None else student.template.source)
        document = None
        if self._plan.evaluation is not None:
            document = result_document(self._measure(self._plan.evaluation), self._clock.seconds())
            if self._ranks.is_first:
                write_result(folder.result_file, document)
        self._reporter.emit(
            RunFinished(
                seconds=self._clock.seconds(),
                result=document,
                result_path=Path(shown(folder.result_file)) if document is not None else None,
                export_path=Path(shown(folder.export)),
            )
        )
