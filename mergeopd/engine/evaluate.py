"""Greedy accuracy of base, experts, weight average and student on held-out prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from mergeopd.data.renderer import Renderer
from mergeopd.distributed.communicator import scatter_gather
from mergeopd.engine.rollouts import submission
from mergeopd.engine.stages import Stages
from mergeopd.models.weight_average import why_not
from mergeopd.preflight.inputs import Inputs
from mergeopd.recipe.plan import EvaluationPlan, SourcePlan
from mergeopd.reporting.events import EvaluationDone, Note
from mergeopd.reward.grading import Verifiers
from mergeopd.reward.pool import failures_note
from mergeopd.rollout.protocol import GenerationRequest, RolloutEngine
from mergeopd.types import Prompt, Sampling

Accuracies = dict[str, dict[str, float | None]]
OpenModel = Callable[[Path, Renderer], AbstractContextManager[RolloutEngine]]
OpenAverage = Callable[[Path, Sequence[Path]], AbstractContextManager[RolloutEngine]]


@dataclass(frozen=True)
class Evaluation:
    """Measures models on the recipe's evaluation prompts, one model in memory at a time.

    `open_model` and `open_average` open an engine that generates with a folder's weights, or with the mean of
    several folders' weights in the shape of the first.
    """

    inputs: Inputs
    plan: EvaluationPlan
    open_model: OpenModel
    open_average: OpenAverage
    verifiers: Verifiers
    stages: Stages

    def run(self, merged: Path) -> Accuracies:
        """Return accuracy (0 to 1) by domain and kind of model; `merged` is the trained student's folder.

        `weight_average` is None, with a note, where the experts' weights cannot be averaged. Collective;
        raises AbandonRound when a stop was requested.
        """
        domains = sorted({source.domain for source in self.plan.sources})
        kinds = ("base", "expert", "weight_average", "merged")
        result: Accuracies = {d: dict.fromkeys(kinds) for d in domains}
        student = self.inputs.student
        base = Path(self.inputs.plan.student.model)
        with self.verifiers:
            with self.open_model(base, student) as engine:
                self._measure("base", engine, student, domains, result)
            for name in sorted(set(self.plan.experts.values())):
                own = [d for d in domains if self.plan.experts[d] == name]
                renderer = self.inputs.teachers[name].as_measured
                with self.open_model(Path(self.inputs.plan.teachers[name].model), renderer) as engine:
                    self._measure("expert", engine, renderer, own, result)
            self._measure_average(base, domains, result)
            with self.open_model(merged, student) as engine:
                self._measure("merged", engine, student, domains, result)
        return result

    def _measure_average(self, base: Path, domains: Sequence[str], result: Accuracies) -> None:
        teachers = [self.inputs.plan.teachers[name] for name in sorted(set(self.plan.experts.values()))]
        experts = [Path(teacher.model) for teacher in teachers if teacher.student is None]
        foreign = [teacher.name for teacher in teachers if teacher.bridge is not None]
        if foreign:  # even if all shapes match, since their rows are of other tokens
            reason: str | None = f"{foreign[0]} has another tokenizer than the student"
        else:
            reason = why_not(base, experts) if experts else "the experts are the student itself"
        if reason is not None:
            self.stages.reporter.emit(Note(f"no weight average: {reason}"))
            return
        with self.open_average(base, experts) as engine:
            self._measure("weight_average", engine, self.inputs.student, domains, result)

    def _measure(
        self, kind: str, engine: RolloutEngine, renderer: Renderer, domains: Sequence[str], result: Accuracies
    ) -> None:
        for domain in domains:
            rewards: list[float] = []
            for source in self.plan.sources:
                if source.domain == domain:
                    rewards += self._rewards(kind, engine, renderer, source)
            accuracy = sum(rewards) / len(rewards)
            result[domain][kind] = accuracy
            self.stages.reporter.emit(EvaluationDone(kind, domain, accuracy, len(rewards)))

    def _rewards(
        self, kind: str, engine: RolloutEngine, renderer: Renderer, source: SourcePlan
    ) -> list[float]:
        prompts: Sequence[Prompt] = self.inputs.evaluation[source.name]
        stop = self.inputs.plan.rollout.stop
        on_progress = self.stages.begin("evaluation", f"{kind} on {source.domain}", len(prompts), "responses")
        requests = [GenerationRequest(p.key, 0, renderer.render(p)) for p in prompts]
        greedy = Sampling(0.0, 1.0, self.plan.max_new_tokens, stop)
        completions = engine.submit(requests, greedy).wait(on_progress)
        submissions = [
            submission(prompt, completion.response_ids, completion.finish, renderer.tokenizer, stop)
            for prompt, completion in zip(prompts, completions, strict=True)
        ]
        grades = scatter_gather(
            self.stages.ranks,
            submissions,
            # Report progress again, so that a request to stop is handled while verifiers are slow.
            lambda own: self.verifiers.verify(own, lambda _: on_progress(len(own))),
        )
        failures = [grade.failure for grade in grades if grade.failure is not None]
        if failures:
            note = failures_note(source.name, failures)
            self.stages.reporter.emit(Note(f"{note}; they count as incorrect"))
        return [grade.reward or 0.0 for grade in grades]
