"""Measure models on held-out prompts: base, experts, static merges of the experts, and the merged student."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, nullcontext
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path

import numpy as np

from mergeopd.batch.advantages import RIGHT
from mergeopd.data.renderer import Renderer
from mergeopd.engine.rollouts import response_text, verify_responses
from mergeopd.engine.stages import Stages
from mergeopd.environment.episodes import Environments, Response
from mergeopd.intervals import Values, pass_at_k
from mergeopd.messages import joined, shown
from mergeopd.models.checkpoint import Checkpoint
from mergeopd.models.static_merges import why_not
from mergeopd.models.tokenizer import Tokenizer
from mergeopd.preflight.inputs import Inputs
from mergeopd.recipe.baselines import StaticMerge
from mergeopd.recipe.controls import Control
from mergeopd.recipe.plan import EvaluationPlan, Plan, SourcePlan, SuitePlan
from mergeopd.recipe.schema import Interim
from mergeopd.recipe.suites import MEAN_ACCURACY
from mergeopd.reporting.comparison import Measured, mean_reward
from mergeopd.reporting.events import AccuracyMeasured, EvaluationDone
from mergeopd.reporting.result import Estimate, Model
from mergeopd.reward.grading import Verifiers
from mergeopd.rollout.protocol import Completion, GenerationRequest, RolloutEngine
from mergeopd.storage.completion_cache import CompletionCache, Origin
from mergeopd.storage.controls import finished_controls, trained_tokens
from mergeopd.storage.responses import EvaluatedResponse, write_responses
from mergeopd.storage.run_folder import RunFolder
from mergeopd.teacher.api import ApiTeacher
from mergeopd.types import Prompt, Sampling

OpenModel = Callable[[Path, Renderer], AbstractContextManager[RolloutEngine]]
OpenMerge = Callable[[StaticMerge, Path, Sequence[Path]], AbstractContextManager[RolloutEngine]]


@dataclass(frozen=True, slots=True)
class _Candidate:
    """A model to measure; `api` keeps the responses of one behind an API itself."""

    model: Model
    renderer: Renderer
    fingerprint: str
    open: Callable[[], AbstractContextManager[RolloutEngine | ApiTeacher]]
    api: ApiTeacher | None = None

    def is_expert_of(self, suite: SuitePlan) -> bool:
        return suite.expert is not None and self.model == Model.expert(suite.expert)

    @property
    def file_stem(self) -> str:
        return self.model.key.replace("/", "-")


def _opened(api: ApiTeacher) -> AbstractContextManager[ApiTeacher]:
    return nullcontext(api)


class _NotKept(Exception):  # noqa: N818 (control flow, not an error)
    """A response is not kept, and its model must not be opened."""


@dataclass(frozen=True, slots=True)
class _Outcome:
    """The graded responses of a model by suite, and the suites that are missing because of `only`."""

    title: str
    rows: Mapping[str, list[EvaluatedResponse]]
    missing: Sequence[str]
    was_opened: bool


@dataclass(frozen=True)
class Evaluation:
    """Measures models on the recipe's evaluation prompts, one model in memory at a time.

    `open_model` opens an engine that generates with a folder's weights, `open_merge` one with a static merge
    of the experts in the shape of the base. Responses of every model are kept in the recipe's `text_cache` by
    its fingerprint, so a model is measured once; verifiers grade them each time.
    """

    inputs: Inputs
    plan: EvaluationPlan
    open_model: OpenModel
    open_merge: OpenMerge
    verifiers: Verifiers
    environments: Environments
    api_teachers: Mapping[str, ApiTeacher]
    stages: Stages

    def run(self, merged: Path | None, responses: Path | None, only: Collection[str] = ()) -> Measured:
        """Measure all models; `merged` is the trained student's folder, if there is one. Collective.

        If `only` has keys of models, no others are opened; others are measured as far as their responses are
        kept. Writes the responses of each model that is measured on all its suites, with prompts and
        verdicts, to a Parquet file in `responses`. Models that cannot be built or measured are left out with
        a note. Raises AbandonRound when a stop was requested.
        """
        models: list[Model] = []
        scores: dict[str, dict[str, Values]] = {}
        passes: dict[str, dict[str, dict[int, Values]]] = {}
        suites = {suite.name: suite for suite in self.plan.suites}
        outcomes: list[_Outcome] = []
        controls: dict[Control, RunFolder] = self.stages.ranks.run_on_first(
            lambda: finished_controls(self.inputs.plan, self.stages.note)
        )
        with self.verifiers, closing(self.environments):
            for candidate in self._candidates(merged, controls):
                key = candidate.model.key
                outcome = self._measure(candidate, not only or key in only)
                outcomes.append(outcome)
                if not (measured := outcome.rows):
                    continue
                models.append(candidate.model)
                scores[key] = {name: _means(suites[name], rows) for name, rows in measured.items()}
                passes[key] = {name: _passes(suites[name], rows) for name, rows in measured.items()}
                if responses is not None and not outcome.missing and self.stages.ranks.is_first:
                    path = responses / f"{candidate.file_stem}.parquet"
                    write_responses(path, [row for rows in measured.values() for row in rows])
        self._note_unopened(outcomes)
        return Measured(
            models=tuple(models),
            scores=scores,
            experts={s.name: s.expert and Model.expert(s.expert).key for s in suites.values()},
            overlap={
                name: sum(self.inputs.overlap[source.name] for source in suite.sources)
                for name, suite in suites.items()
            },
            domains={name: suite.domain for name, suite in suites.items()},
            samples={name: suite.samples for name, suite in suites.items()},
            passes=passes,
            trained_tokens=self.stages.ranks.run_on_first(lambda: self._trained_tokens(merged, controls)),
        )

    def _note_unopened(self, outcomes: Sequence[_Outcome]) -> None:
        kept = [o.title for o in outcomes if not o.was_opened and not o.missing]
        if kept:
            folder = shown(Path(self.inputs.plan.text_cache))
            was = "was not loaded: all its" if len(kept) == 1 else "were not loaded: all their"
            self.stages.note(f"{joined(kept, 'and')} {was} responses are kept in {folder}")
        left_out: dict[tuple[str, ...], list[str]] = {}
        for outcome in outcomes:
            left_out.setdefault(tuple(outcome.missing), []).append(outcome.title)
        for missing, titles in left_out.items():
            if missing:
                who = f"{joined(titles, 'and')} {'is' if len(titles) == 1 else 'are'} not measured"
                where = "" if len(missing) == len(self.plan.suites) else f" on {joined(missing, 'and')}"
                self.stages.note(f"{who}{where}: `--only` leaves out models whose responses are not kept")

    def _measure(self, candidate: _Candidate, may_open: bool) -> _Outcome:
        """Measure a model, which is opened if a response is missing, and report each suite's accuracy."""
        measured: dict[str, list[EvaluatedResponse]] = {}
        missing: list[str] = []
        with ExitStack() as opened:
            # Opened once, at the first source with a missing response.
            @cache
            def engine() -> RolloutEngine | ApiTeacher:
                if not may_open:
                    raise _NotKept
                return opened.enter_context(candidate.open())

            for suite in self._suites_of(candidate):
                try:
                    graded = [self._grade(candidate, suite, source, engine) for source in suite.sources]
                except _NotKept:
                    missing.append(suite.name)
                    continue
                rows = measured[suite.name] = [row for of_source in graded for row in of_source]
                is_own = candidate.is_expert_of(suite)
                accuracy = mean_reward(_means(suite, rows))
                self.stages.reporter.emit(EvaluationDone(candidate.model, suite.name, accuracy, is_own))
            was_opened = engine.cache_info().currsize > 0
        return _Outcome(candidate.model.title, measured, missing, was_opened)

    def _candidates(self, merged: Path | None, controls: Mapping[Control, RunFolder]) -> Iterator[_Candidate]:
        student, plan = self.inputs.student, self.inputs.plan
        base = Path(plan.student.model)
        yield self._of_folder(Model("base", "base", "base"), base, student)
        for name in self.inputs.plan.experts:
            renderer = self.inputs.teachers[name].as_measured
            api = self.api_teachers.get(name)
            if api is None:
                yield self._of_folder(Model.expert(name), plan.teachers[name].folder, renderer)
            else:
                yield _Candidate(Model.expert(name), renderer, api.fingerprint, partial(_opened, api), api)
        yield from self._static_merges(base)
        for control, folder in controls.items():
            yield self._of_folder(Model.control(control), folder.export, student)
        if merged is not None:
            yield self._of_folder(Model("merged", "merged", "merged"), merged, student)

    def _of_folder(self, model: Model, folder: Path, renderer: Renderer) -> _Candidate:
        return _Candidate(model, renderer, _fingerprint(folder), lambda: self.open_model(folder, renderer))

    def _static_merges(self, base: Path) -> Iterator[_Candidate]:
        teachers = [self.inputs.plan.teachers[name] for name in self.inputs.plan.experts]
        remote = [teacher.name for teacher in teachers if teacher.api is not None]
        experts = [t.folder for t in teachers if t.student is None and t.api is None]
        foreign = [teacher.name for teacher in teachers if teacher.bridge is not None]
        if foreign:  # even if all shapes match, since their rows are of other tokens
            reason: str | None = f"{foreign[0]} has another tokenizer than the student"
        elif remote:
            reason = f"{remote[0]} is behind an API, and its weights are not here"
        else:
            reason = why_not(base, experts) if experts else "the experts are the student itself"
        if reason is not None:
            if self.plan.static_merges:
                self.stages.note(f"no static merge: {reason}")
            return
        parts = [_fingerprint(folder) for folder in (base, *experts)]
        for settings in self.plan.static_merges:
            content = "\0".join([settings.model_dump_json(), str(self.inputs.plan.seed), *parts])
            yield _Candidate(
                Model(f"merge/{settings.kind}", "static_merge", settings.kind.replace("_", " ")),
                self.inputs.student,
                hashlib.sha256(content.encode()).hexdigest(),
                lambda settings=settings: self.open_merge(settings, base, experts),  # type: ignore[misc]
            )

    def _trained_tokens(self, merged: Path | None, controls: Mapping[Control, RunFolder]) -> dict[str, int]:
        """Count the trained tokens of the run's controls, and beside them those of its student."""
        own = RunFolder(Path(self.inputs.plan.output))
        runs = {Model.control(name).key: folder for name, folder in controls.items()}
        runs |= {"merged": own} if controls and merged == own.export else {}
        counts = {key: trained_tokens(run, self.inputs.plan.num_updates) for key, run in runs.items()}
        return {key: count for key, count in counts.items() if count is not None}

    def _suites_of(self, candidate: _Candidate) -> Sequence[SuitePlan]:
        """Return the suites to measure an expert on: all, or its own, and those that its context holds."""
        if candidate.model.kind != "expert":
            return self.plan.suites
        own = [suite for suite in self.plan.suites if candidate.is_expert_of(suite)]
        if not self.plan.all_experts:
            return own
        return [suite for suite in self.plan.suites if suite in own or self._fits(candidate, suite)]

    def _fits(self, candidate: _Candidate, suite: SuitePlan) -> bool:
        longest = max(
            len(candidate.renderer.render(prompt))
            + (0 if source.environment is None else source.environment.max_tokens)
            for source in suite.sources
            for prompt in self.inputs.evaluation[source.name]
        )
        fits = longest + suite.max_new_tokens <= candidate.renderer.max_positions
        if not fits:
            name, limit = candidate.model.title, candidate.renderer.max_positions
            self.stages.note(
                f"{name} is not measured on {suite.name}: its context of {limit} tokens is too short"
            )
        return fits

    def _grade(
        self,
        candidate: _Candidate,
        suite: SuitePlan,
        source: SourcePlan,
        engine: Callable[[], RolloutEngine | ApiTeacher],
    ) -> list[EvaluatedResponse]:
        """Generate the responses to a source's prompts, or read those kept, and grade them."""
        prompts = [p for p in self.inputs.evaluation[source.name] for _ in range(suite.samples)]
        responses, on_progress = self._complete(candidate, suite, prompts, engine)
        tokenizer, stop = candidate.renderer.tokenizer, self.inputs.plan.rollout.stop
        grades = verify_responses(
            self.verifiers, responses, source.name, tokenizer, stop, self.stages, on_progress
        )
        return [
            EvaluatedResponse(
                domain=source.domain,
                source=source.name,
                key=prompt.key,
                suite=suite.name,
                sample=i % suite.samples,
                prompt=candidate.renderer.text(one.prompt),
                reference=prompt.reference,
                response=shown_text(one, tokenizer, stop),
                reward=grade.reward,
                failure=grade.failure,
                finish=one.completion.finish,
                num_tokens=len(one.completion.response_ids),
            )
            for i, (prompt, one, grade) in enumerate(zip(prompts, responses, grades, strict=True))
        ]

    def _complete(
        self,
        candidate: _Candidate,
        suite: SuitePlan,
        prompts: Sequence[Prompt],
        engine: Callable[[], RolloutEngine | ApiTeacher],
    ) -> tuple[list[Response], Callable[[int], None]]:
        renderer = candidate.renderer
        detail = f"{candidate.model.title} on {suite.name}"
        on_progress = self.stages.begin("evaluation", detail, len(prompts), "responses")
        how = _sampling(suite, self.inputs.plan)
        origin = Origin(
            name=f"evaluation-{candidate.file_stem}",
            fingerprint=candidate.fingerprint,
            dtype=self.inputs.plan.student.dtype,
            eos_ids=renderer.eos_ids,
            vocab_size=renderer.vocab_size,
            sampling=how,
            seed=self.inputs.plan.seed,
        )

        def generate(
            requests: Sequence[GenerationRequest],
        ) -> Iterator[tuple[Sequence[GenerationRequest], list[Completion]]]:
            yield requests, engine().submit(requests, how).wait(on_progress)

        kept = CompletionCache(Path(self.inputs.plan.text_cache), self.stages.ranks, self.stages.note)

        def turn(requests: Sequence[GenerationRequest], which: str) -> list[Completion]:
            if candidate.api is not None:
                if candidate.api.num_missing(requests, how):
                    engine()
                return candidate.api.submit(requests, how).wait(on_progress)
            return kept.complete(origin, requests, generate)

        asked = [(prompt, i % suite.samples) for i, prompt in enumerate(prompts)]
        return self.environments.play(asked, renderer, turn, self.stages.check), on_progress


@dataclass
class InterimEvaluation:
    """Measures the current student during training, with the run's own rollout engine.

    `best_by` is `checkpoint.best` of the recipe. `measured` has the measurements of the run by update, `best`
    the update of the student that is kept, if any.
    """

    inputs: Inputs
    plan: EvaluationPlan
    settings: Interim
    best_by: str | None
    engine: RolloutEngine
    verifiers: Verifiers
    environments: Environments
    stages: Stages
    measured: dict[int, AccuracyMeasured] = field(default_factory=dict)
    best: int | None = None

    def is_due(self, update: int) -> bool:
        """Whether the student after `update` updates is still to be measured."""
        last, every = max(self.measured, default=None), self.settings.every
        if last is None or update == self.inputs.plan.num_updates:
            return update not in self.measured
        return update // every > last // every

    def measure(self, update: int) -> AccuracyMeasured:
        """Measure the student. Collective; raises AbandonRound when a stop was requested."""
        accuracy: dict[str, Estimate] = {}
        num_prompts: dict[str, int] = {}
        with self.verifiers, closing(self.environments):
            for suite in self.plan.suites:
                prompts = [p for source in suite.sources for p in self.inputs.evaluation[source.name]]
                num = min(len(prompts), self.settings.prompts)
                chosen = [prompts[i * len(prompts) // num] for i in range(num)]
                accuracy[suite.name] = mean_reward(np.array(self._rewards(suite, chosen)))
                num_prompts[suite.name] = num
        return AccuracyMeasured(update, accuracy, num_prompts)

    def is_best(self, measured: AccuracyMeasured) -> bool:
        """Whether the student is to be kept: trained, and no earlier one is better."""
        if self.best_by is None or not measured.update:
            return False
        return self.best is None or self._metric(measured) >= self._metric(self.measured[self.best])

    def _metric(self, measured: AccuracyMeasured) -> float:
        values = {suite: estimate.value or 0.0 for suite, estimate in measured.accuracy.items()}
        if self.best_by is None or self.best_by == MEAN_ACCURACY:
            return sum(values.values()) / len(values)
        return values[self.best_by]

    def _rewards(self, suite: SuitePlan, prompts: Sequence[Prompt]) -> list[float]:
        student, plan = self.inputs.student, self.inputs.plan
        on_progress = self.stages.begin(
            "evaluation", f"the student on {suite.name}", len(prompts), "responses"
        )

        def turn(requests: Sequence[GenerationRequest], which: str) -> list[Completion]:
            return self.engine.submit(requests, _sampling(suite, plan)).wait(on_progress)

        asked = [(prompt, 0) for prompt in prompts]
        responses = self.environments.play(asked, student, turn, self.stages.check)
        grades = verify_responses(
            self.verifiers,
            responses,
            suite.name,
            student.tokenizer,
            plan.rollout.stop,
            self.stages,
            on_progress,
        )
        return [grade.reward or 0.0 for grade in grades]


def _sampling(suite: SuitePlan, plan: Plan) -> Sampling:
    return Sampling(suite.temperature, suite.top_p, suite.max_new_tokens, plan.rollout.stop)


def shown_text(response: Response, tokenizer: Tokenizer, stop: Sequence[str]) -> str:
    """Return a response's text; of several turns with the special tokens that separate them."""
    ids = response.completion.response_ids
    if response.episode is None:
        return response_text(ids, tokenizer, stop)
    return tokenizer.decode(ids.tolist(), skip_special_tokens=False)


def _rewards(suite: SuitePlan, rows: Sequence[EvaluatedResponse]) -> Values:
    """Return the rewards `[prompts, samples]`."""
    return np.array([row.reward or 0.0 for row in rows]).reshape(-1, suite.samples)


def _means(suite: SuitePlan, rows: Sequence[EvaluatedResponse]) -> Values:
    """Return the mean reward of each prompt."""
    means: Values = _rewards(suite, rows).mean(1)
    return means


def _passes(suite: SuitePlan, rows: Sequence[EvaluatedResponse]) -> dict[int, Values]:
    """Return each prompt's pass@k for `samples` and the powers of two below, from 2; by k."""
    num_correct = (_rewards(suite, rows) >= RIGHT).sum(1)
    powers = (2**exponent for exponent in range(1, suite.samples.bit_length()))
    return {
        k: pass_at_k(num_correct, suite.samples, k)
        for k in sorted({*powers, suite.samples})
        if 1 < k <= suite.samples
    }


def _fingerprint(folder: Path) -> str:
    """Identify a model by its weights and its config, on which its responses depend as well."""
    config = (folder / "config.json").read_bytes()
    return hashlib.sha256(Checkpoint.open(folder).fingerprint.encode() + config).hexdigest()
