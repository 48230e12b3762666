"""The run: rounds of responses, scores and updates; checkpoints; export, evaluation and the result."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NoReturn

from mergeopd.engine.checkpoint import Checkpoints, Record, written_by_first
from mergeopd.engine.interrupt import AbandonRound, StopGuard
from mergeopd.engine.pipeline import RoundPipeline
from mergeopd.engine.progress import Progress, phase_at
from mergeopd.engine.score import Scorer
from mergeopd.engine.stages import Stages
from mergeopd.engine.update import Updater
from mergeopd.errors import Stopped, UpdateLimitReached
from mergeopd.messages import shown
from mergeopd.recipe.plan import Plan
from mergeopd.reporting.comparison import Measured, build_result
from mergeopd.reporting.events import RunFinished, RunStarted, StageStarted
from mergeopd.reporting.result import write_result
from mergeopd.storage.run_folder import RunFolder
from mergeopd.student.protocol import Student
from mergeopd.teacher.snapshots import StudentSnapshots

UPDATE_LIMIT = "--updates"  # reason of a stop at a requested number of updates
Evaluate = Callable[[Path, Path | None], Measured]


@dataclass(frozen=True)
class Trainer:
    """One run of a plan, from the state of its folder to its end.

    `evaluate` measures an exported student, and keeps its responses in a folder; None where the recipe
    measures nothing. `write_turns` writes the end tokens and the chat template into an exported folder.
    """

    plan: Plan
    folder: RunFolder
    student: Student
    snapshots: StudentSnapshots
    pipeline: RoundPipeline
    scorer: Scorer
    updater: Updater
    checkpoints: Checkpoints
    evaluate: Evaluate | None
    stop: StopGuard
    stages: Stages
    write_turns: Callable[[Path], None]

    def run(self, progress: Progress, max_updates: int | None) -> None:
        """Train from `progress` to the last update, export, evaluate, write the result. Collective.

        Raises Stopped, after a checkpoint, when a stop was requested or `max_updates` were made.
        """
        first = progress.update
        self._report_start(progress)
        self.pipeline.trained(progress.update)
        while phase_at(self.plan, progress.update) is not None:
            before = progress
            try:
                progress = self._round(progress)
            except AbandonRound:
                self._stop(progress)
            every = self.plan.checkpoint.every
            if progress.update == self.plan.num_updates or progress.update // every > before.update // every:
                self._save(progress)
            if max_updates is not None and first + max_updates <= progress.update < self.plan.num_updates:
                self.stop.interrupt.requested = UPDATE_LIMIT
            if self.stop.is_requested_anywhere():
                self._stop(progress)
        self._finish()

    def _round(self, progress: Progress) -> Progress:
        """Run one round and its updates. Raises AbandonRound only before the first update."""
        before = progress.update
        collected = self.pipeline.next(progress)
        with self.scorer.score(collected) as scored:
            for update in collected.work.updates:
                progress = self.updater.step(scored, update, progress)
        student = self.student
        self.snapshots.advance(student.weights, student.master_weights, before, progress.update)
        self.pipeline.trained(progress.update)
        drawn = progress.drawn + collected.phase.prompts_per_round
        return replace(progress, round=progress.round + 1, drawn=drawn)

    def _report_start(self, progress: Progress) -> None:
        plan = self.plan
        self.stages.reporter.emit(
            RunStarted(
                name=plan.name,
                recipe=plan.recipe_file,
                num_updates=plan.num_updates,
                phases=tuple((phase.name, phase.updates) for phase in plan.phases),
                teachers=tuple(plan.teachers),
                domains=tuple(sorted({source.domain for source in plan.sources})),
                output=self.folder.path,
                resumed_at=progress.update,
            )
        )

    def _save(self, progress: Progress) -> None:
        with self.stages.clock.stage("checkpoint"):
            self.checkpoints.save(Record(progress, self.stages.clock.seconds()), self.stages.reporter)

    def _stop(self, progress: Progress) -> NoReturn:
        """Save a checkpoint if there is none of this update, and raise."""
        self.stop.is_requested_anywhere()  # agree on the reason, since launchers signal others after one ends
        reason = self.stop.interrupt.requested
        if progress.update and not self.stages.ranks.run_on_first(lambda: self.checkpoints.has(progress)):
            self._save(progress)
        self.stages.ranks.gather(None)  # wait until all have written
        self.stop.interrupt.ignore_further()
        error = UpdateLimitReached if reason == UPDATE_LIMIT else Stopped
        raise error(
            f"stopped by {reason} after {progress.update} of {self.plan.num_updates} "
            "updates, all saved; run the same command to resume"
        )

    def _measure(self, evaluate: Evaluate) -> Measured:
        """Evaluate the export; everything is saved already, so a request to stop takes effect at once."""
        try:
            with self.stages.clock.stage("evaluation"):
                return evaluate(self.folder.export, self.folder.evaluation)
        except AbandonRound:
            self.stop.is_requested_anywhere()
            self.stop.interrupt.ignore_further()
            raise Stopped(
                f"stopped by {self.stop.interrupt.requested} during evaluation; training and export are "
                "saved; run the same command to evaluate again"
            ) from None

    def _finish(self) -> None:
        folder, reporter, clock = self.folder, self.stages.reporter, self.stages.clock
        if not self.stages.ranks.run_on_first(folder.export.exists):
            reporter.emit(StageStarted("export", "the student as a Hugging Face folder"))
            with clock.stage("export"), written_by_first(folder.export, self.stages.ranks) as target:
                self.student.export(target)
                if self.stages.ranks.is_first:
                    self.write_turns(target)
        document = None
        if self.evaluate is not None:
            # Free memory that only training needs, since evaluation loads whole models.
            self.pipeline.close()
            self.snapshots.release()
            self.student.release()
            gc.collect()  # a model and its optimizer contain reference cycles
            document = build_result(self._measure(self.evaluate), clock.seconds())
            if self.stages.ranks.is_first:
                write_result(folder.result_file, document)
        reporter.emit(
            RunFinished(
                seconds=clock.seconds(),
                result=document,
                result_path=Path(shown(folder.result_file)) if document is not None else None,
                export_path=Path(shown(folder.export)),
                report_path=Path(shown(folder.report_file)),
            )
        )
