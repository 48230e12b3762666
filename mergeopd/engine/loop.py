"""The run: rounds of responses, scores and updates; checkpoints; export, evaluation and the result."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from pathlib import Path
from typing import NoReturn

from mergeopd.alarms.watch import AlarmWatch
from mergeopd.engine.checkpoint import Checkpoints, Record, written_by_first
from mergeopd.engine.evaluate import InterimEvaluation
from mergeopd.engine.interrupt import AbandonRound, StopGuard
from mergeopd.engine.pipeline import RoundPipeline
from mergeopd.engine.progress import Progress, phase_at
from mergeopd.engine.score import Scorer
from mergeopd.engine.stages import Stages
from mergeopd.engine.update import Updater
from mergeopd.errors import Stopped, StoppedByAlarm, UpdateLimitReached
from mergeopd.messages import shown
from mergeopd.models.checkpoint import Checkpoint
from mergeopd.models.facts import ModelFacts
from mergeopd.models.stored import num_weights
from mergeopd.recipe.plan import Plan, TeacherPlan
from mergeopd.reporting.comparison import Measured, build_result
from mergeopd.reporting.events import (
    AccuracyMeasured,
    Reporter,
    RunFacts,
    RunFinished,
    RunStarted,
    StageStarted,
)
from mergeopd.reporting.jsonl import read_accuracy, read_updates
from mergeopd.reporting.model_card import write_model_card
from mergeopd.reporting.result import write_result
from mergeopd.storage.chat_replies import read_use
from mergeopd.storage.folders import copy_folder, keep_only, prune
from mergeopd.storage.quantized import Quantization
from mergeopd.storage.run_folder import RunFolder
from mergeopd.storage.teacher_text import kept_shares, read_graded
from mergeopd.student.protocol import Student
from mergeopd.teacher.snapshots import StudentSnapshots

_RECALLED = 1000  # updates that the display of a resumed run starts with
UPDATE_LIMIT = "--updates"  # reason of a stop at a requested number of updates
ALARM = "the alarm"  # begins the reason of a stop by an alarm
Evaluate = Callable[[Path, Path | None], Measured]


@dataclass(frozen=True)
class Trainer:
    """One run of a plan, from the state of its folder to its end.

    `evaluate` measures an exported student, and keeps its responses in a folder; None where the recipe
    measures nothing. `interim` measures the student during training. `write_turns` writes the end tokens, the
    chat template and the recipe into an exported folder.
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
    interim: InterimEvaluation | None
    stop: StopGuard
    alarms: AlarmWatch
    stages: Stages
    write_turns: Callable[[Path], None]
    quantized: Mapping[str, Quantization]

    def run(self, progress: Progress, max_updates: int | None) -> None:
        """Train from `progress` to the last update, export, evaluate, write the result. Collective.

        Raises Stopped, after a checkpoint, when a stop was requested or `max_updates` were made, and
        StoppedByAlarm likewise.
        """
        try:
            self._train(progress, max_updates)
            self._finish()
        except BaseException as error:
            self.checkpoints.close(at_once=isinstance(error, KeyboardInterrupt))
            raise

    def _train(self, progress: Progress, max_updates: int | None) -> None:
        first = progress.update
        self._report_start(progress)
        self._recall_interim(progress)
        self.pipeline.trained(progress.update)
        while True:
            before = progress
            try:
                self._measure_interim(progress)
                if phase_at(self.plan, progress.update) is None:
                    break
                progress = self._round(progress)
            except AbandonRound:
                self._stop(progress)
            every = self.plan.checkpoint.every
            if progress.update == self.plan.num_updates or progress.update // every > before.update // every:
                self._save(progress)
            if max_updates is not None and first + max_updates <= progress.update < self.plan.num_updates:
                self.stop.interrupt.requested = UPDATE_LIMIT
            alarm = self.alarms.take_stop()
            # Only the first process has restored the alarms of a resumed run.
            if alarm is not None and self.stages.ranks.is_first:
                self.stop.interrupt.requested = f"{ALARM} {alarm}"
            self._saved(self.checkpoints.poll)
            if self.stop.is_requested_anywhere():
                self._stop(progress)
        self._saved(self.checkpoints.finish)

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

    def _recall_interim(self, progress: Progress) -> None:
        """Read what was measured up to `progress`, and drop best students of updates that are made again."""
        if self.interim is None:
            return

        def recall() -> tuple[dict[int, AccuracyMeasured], int | None]:
            records = [r for r in read_accuracy(self.folder.accuracy_file) if r.update <= progress.update]
            measured = {record.update: record for record in records}
            return measured, keep_only(self.folder.best, measured)

        self.interim.measured, self.interim.best = self.stages.ranks.run_on_first(recall)

    def _measure_interim(self, progress: Progress) -> None:
        """Measure the student if it is due, and keep it if it is the best; a resumed run catches up on it."""
        interim = self.interim
        if interim is None or not interim.is_due(progress.update):
            return
        if self.stages.ranks.run_on_first(self.folder.export.exists):
            return  # without checkpoints, these weights are not the trained ones
        self.pipeline.use_newest_weights()
        with self.stages.clock.stage("interim"):
            measured = interim.measure(progress.update)
            if interim.is_best(measured):
                # Before the measurement is recorded: a run that is killed in between measures again.
                self._export(self.folder.best / f"step-{measured.update}", "the best student so far")
                interim.best = measured.update
            interim.measured[measured.update] = measured
        self.stages.reporter.emit(measured)

    def _export(self, target: Path, detail: str, best: int | None = None) -> None:
        """Write the student, or the best one that is kept, as a Hugging Face folder. Collective."""
        self.stages.reporter.emit(StageStarted("export", detail))
        with written_by_first(target, self.stages.ranks) as folder:
            if best is None:
                self.student.export(folder)
                if self.stages.ranks.is_first:
                    self.write_turns(folder)
            elif self.stages.ranks.is_first:
                copy_folder(self.folder.best / f"step-{best}", folder)

    def _report_start(self, progress: Progress) -> None:
        plan = self.plan
        history = read_updates(self.folder.metrics_file, _RECALLED) if progress.update else ()
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
                seconds=self.stages.clock.seconds()["total"],
                history=history,
                facts=self._facts(),
            )
        )

    def _facts(self) -> RunFacts:
        import torch

        plan, device = self.plan, self.updater.device
        name = (
            f"{device.type} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else device.type
        )
        return RunFacts(
            student=shown(Path(plan.student.model)),
            dtype=plan.student.dtype,
            num_parameters=Checkpoint.open(Path(plan.student.model)).num_weights,
            num_trainable=sum(map(prod, self.student.state_shapes().values())),
            teachers={name: _size(teacher) for name, teacher in plan.teachers.items()},
            quantized={name: f"{one.format}, {one.text}" for name, one in self.quantized.items()},
            device=name,
            num_threads=torch.get_num_threads(),
            num_processes=self.stages.ranks.size,
        )

    def _save(self, progress: Progress) -> None:
        with self.stages.clock.stage("checkpoint"):
            record = Record(progress, self.stages.clock.seconds())
            self._saved(partial(self.checkpoints.save, record))

    def _saved(self, action: Callable[[Reporter], None]) -> None:
        """Save, look for the end of a save or wait for it; drop best students of before it. Collective."""
        before = self.checkpoints.saved
        action(self.stages.reporter)
        saved = self.checkpoints.saved
        if saved is not None and saved != before and self.stages.ranks.is_first:
            # The checkpoint does not lead back before the newest best student of its time.
            prune(self.folder.best, 1, up_to=saved)

    def _stop(self, progress: Progress) -> NoReturn:
        """Save a checkpoint if there is none of this update, and raise."""
        self.stop.is_requested_anywhere()  # agree on the reason, since launchers signal others after one ends
        reason = self.stop.interrupt.requested
        self._saved(self.checkpoints.finish)
        if progress.update and not self.stages.ranks.run_on_first(lambda: self.checkpoints.has(progress)):
            self._save(progress)
            self._saved(self.checkpoints.finish)
        self.stop.interrupt.ignore_further()
        error = UpdateLimitReached if reason == UPDATE_LIMIT else Stopped
        saved = "all saved; run the same command to resume"
        if not progress.update:
            saved = "before the first checkpoint; run the same command to start again"
        if reason is not None and reason.startswith(ALARM):
            error = StoppedByAlarm
        raise error(
            f"stopped by {reason} after {progress.update} of {self.plan.num_updates} updates, {saved}"
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
        best = None if self.interim is None else self.interim.best
        if not self.stages.ranks.run_on_first(folder.export.exists):
            what = "the student" if best is None else f"the best student, of update {best},"
            with clock.stage("export"):
                self._export(folder.export, f"{what} as a Hugging Face folder", best)
            if self.stages.ranks.is_first:
                write_model_card(folder.path, folder.export, reporter)
                prune(folder.best, 1)
        document = None
        if self.evaluate is not None:
            # Free memory that only training needs, since evaluation loads whole models.
            self.pipeline.close()
            self.snapshots.release()
            self.student.release()
            gc.collect()  # a model and its optimizer contain reference cycles
            result = build_result(self._measure(self.evaluate), clock.seconds(), best)
            document = self.alarms.judge(result)
            text = self.stages.ranks.run_on_first(lambda: read_graded(folder.teacher_text_file))
            used = self.stages.ranks.run_on_first(lambda: read_use(folder.api_use_file))
            document = replace(document, text_kept=kept_shares(text), api_use=used, quantized=self.quantized)
            if self.stages.ranks.is_first:
                write_result(folder.result_file, document)
                write_model_card(folder.path, folder.export, reporter)
        reporter.emit(
            RunFinished(
                seconds=clock.seconds() if document is None else document.seconds,
                result=document,
                result_path=Path(shown(folder.result_file)) if document is not None else None,
                export_path=Path(shown(folder.export)),
                report_path=Path(shown(folder.report_file)),
                alarms=self.alarms.summaries,
            )
        )


def _size(teacher: TeacherPlan) -> int | str:
    """Return a teacher's number of weights, or what it is without weights of its own here."""
    if teacher.api is not None:
        return teacher.api.model
    if teacher.served is not None:
        return f"served by {teacher.served.engine}"
    if teacher.student is not None:
        return "the student"
    return num_weights(ModelFacts.read(teacher.folder, "readable"), Checkpoint.open(teacher.folder))
