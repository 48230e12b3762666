"""Measure models on held-out prompts: base, experts, static merges of the experts, and the merged student."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from mergeopd.data.renderer import Renderer
from mergeopd.distributed.communicator import scatter_gather
from mergeopd.engine.rollouts import submission
from mergeopd.engine.stages import Stages
from mergeopd.intervals import Values
from mergeopd.models.checkpoint import Checkpoint
from mergeopd.models.static_merges import why_not
from mergeopd.preflight.inputs import Inputs
from mergeopd.recipe.baselines import StaticMerge
from mergeopd.recipe.controls import Control
from mergeopd.recipe.plan import EvaluationPlan, SourcePlan
from mergeopd.reporting.comparison import Measured, mean_reward
from mergeopd.reporting.events import EvaluationDone
from mergeopd.reporting.result import Model
from mergeopd.reward.grading import Verifiers
from mergeopd.reward.pool import Grade, failures_note
from mergeopd.rollout.protocol import Completion, GenerationRequest, RolloutEngine
from mergeopd.storage.completion_cache import CompletionCache, Origin
from mergeopd.storage.controls import finished_controls, trained_tokens
from mergeopd.storage.responses import EvaluatedResponse, write_responses
from mergeopd.storage.run_folder import RunFolder
from mergeopd.types import Prompt, Sampling

OpenModel = Callable[[Path, Renderer], AbstractContextManager[RolloutEngine]]
OpenMerge = Callable[[StaticMerge, Path, Sequence[Path]], AbstractContextManager[RolloutEngine]]


@dataclass(frozen=True, slots=True)
class _Candidate:
    """A model to measure."""

    model: Model
    renderer: Renderer
    fingerprint: str
    open: Callable[[], AbstractContextManager[RolloutEngine]]

    @property
    def file_stem(self) -> str:
        return self.model.key.replace("/", "-")


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
    stages: Stages

    def run(self, merged: Path, responses: Path | None) -> Measured:
        """Measure all models; `merged` is the trained student's folder. Collective.

        Writes the responses of each model, with prompts and verdicts, to a Parquet file in `responses`.
        Models that cannot be built or measured are left out with a note. Raises AbandonRound when a stop was
        requested.
        """
        domains = tuple(self.plan.experts)
        models: list[Model] = []
        scores: dict[str, dict[str, Values]] = {}
        controls: dict[Control, RunFolder] = self.stages.ranks.run_on_first(
            lambda: finished_controls(self.inputs.plan, self.stages.note)
        )
        with self.verifiers:
            for candidate in self._candidates(merged, controls):
                models.append(candidate.model)
                measured = self._measure(candidate, domains)
                scores[candidate.model.key] = {
                    domain: self._values(rows) for domain, rows in measured.items()
                }
                if responses is not None and self.stages.ranks.is_first:
                    path = responses / f"{candidate.file_stem}.parquet"
                    write_responses(path, [row for rows in measured.values() for row in rows])
        tokens = self.stages.ranks.run_on_first(lambda: self._trained_tokens(merged, controls))
        overlap = dict.fromkeys(domains, 0)
        for source in self.plan.sources:
            overlap[source.domain] += self.inputs.overlap[source.name]
        experts = {domain: Model.expert(name).key for domain, name in self.plan.experts.items()}
        return Measured(tuple(models), scores, experts, overlap, tokens)

    def _measure(self, candidate: _Candidate, domains: Sequence[str]) -> dict[str, list[EvaluatedResponse]]:
        """Measure a model, which is opened if a response is missing, and report each domain's accuracy."""
        measured: dict[str, list[EvaluatedResponse]] = {}
        with ExitStack() as opened:
            # Opened once, at the first source with a missing response.
            engine = cache(lambda: opened.enter_context(candidate.open()))
            for domain in self._domains_of(candidate, domains):
                sources = [source for source in self.plan.sources if source.domain == domain]
                rows = [row for source in sources for row in self._grade(candidate, source, engine)]
                measured[domain] = rows
                is_own = candidate.model == Model.expert(self.plan.experts[domain])
                accuracy = mean_reward(self._values(rows))
                self.stages.reporter.emit(EvaluationDone(candidate.model, domain, accuracy, is_own))
        return measured

    def _candidates(self, merged: Path, controls: Mapping[Control, RunFolder]) -> Iterator[_Candidate]:
        student, plan = self.inputs.student, self.inputs.plan
        base = Path(plan.student.model)
        yield self._of_folder(Model("base", "base", "base"), base, student)
        for name in sorted(set(self.plan.experts.values())):
            renderer = self.inputs.teachers[name].as_measured
            yield self._of_folder(Model.expert(name), Path(plan.teachers[name].model), renderer)
        yield from self._static_merges(base)
        for control, folder in controls.items():
            yield self._of_folder(Model.control(control), folder.export, student)
        yield self._of_folder(Model("merged", "merged", "merged"), merged, student)

    def _of_folder(self, model: Model, folder: Path, renderer: Renderer) -> _Candidate:
        return _Candidate(model, renderer, _fingerprint(folder), lambda: self.open_model(folder, renderer))

    def _static_merges(self, base: Path) -> Iterator[_Candidate]:
        teachers = [self.inputs.plan.teachers[name] for name in sorted(set(self.plan.experts.values()))]
        experts = [Path(teacher.model) for teacher in teachers if teacher.student is None]
        foreign = [teacher.name for teacher in teachers if teacher.bridge is not None]
        if foreign:  # even if all shapes match, since their rows are of other tokens
            reason: str | None = f"{foreign[0]} has another tokenizer than the student"
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

    def _trained_tokens(self, merged: Path, controls: Mapping[Control, RunFolder]) -> dict[str, int]:
        """Count the trained tokens of the run's controls, and beside them those of its student."""
        own = RunFolder(Path(self.inputs.plan.output))
        runs = {Model.control(name).key: folder for name, folder in controls.items()}
        runs |= {"merged": own} if controls and merged == own.export else {}
        counts = {key: trained_tokens(run, self.inputs.plan.num_updates) for key, run in runs.items()}
        return {key: count for key, count in counts.items() if count is not None}

    def _domains_of(self, candidate: _Candidate, domains: Sequence[str]) -> Sequence[str]:
        """Return the domains to measure an expert on: all, or its own, and those that its context holds."""
        if candidate.model.kind != "expert":
            return domains
        own = [d for d in domains if self.plan.experts[d] == candidate.model.title]
        if not self.plan.all_experts:
            return own
        return [d for d in domains if d in own or self._fits(candidate, d)]

    def _fits(self, candidate: _Candidate, domain: str) -> bool:
        longest = max(
            len(candidate.renderer.render(prompt))
            for source in self.plan.sources
            if source.domain == domain
            for prompt in self.inputs.evaluation[source.name]
        )
        fits = longest + self.plan.max_new_tokens <= candidate.renderer.max_positions
        if not fits:
            name, limit = candidate.model.title, candidate.renderer.max_positions
            self.stages.note(
                f"{name} is not measured on {domain}: its context of {limit} tokens is too short"
            )
        return fits

    def _values(self, graded: Sequence[EvaluatedResponse]) -> Values:
        """Return the mean reward of each prompt."""
        rewards = np.array([r.reward or 0.0 for r in graded])
        means: Values = rewards.reshape(-1, self.plan.samples).mean(1)
        return means

    def _grade(
        self, candidate: _Candidate, source: SourcePlan, engine: Callable[[], RolloutEngine]
    ) -> list[EvaluatedResponse]:
        """Generate the responses to a source's prompts, or read those kept, and grade them."""
        prompts = [p for p in self.inputs.evaluation[source.name] for _ in range(self.plan.samples)]
        completions, on_progress = self._complete(candidate, source, prompts, engine)
        tokenizer, stop = candidate.renderer.tokenizer, self.inputs.plan.rollout.stop
        submissions = [
            submission(prompt, completion.response_ids, completion.finish, tokenizer, stop)
            for prompt, completion in zip(prompts, completions, strict=True)
        ]
        grades: list[Grade] = scatter_gather(
            self.stages.ranks,
            submissions,
            # Report progress again, so that a request to stop is handled while verifiers are slow.
            lambda own: self.verifiers.verify(own, lambda _: on_progress(len(own))),
        )
        failures = [grade.failure for grade in grades if grade.failure is not None]
        if failures:
            note = failures_note(source.name, failures)
            self.stages.note(f"{note}; they count as incorrect")
        return [
            EvaluatedResponse(
                domain=source.domain,
                source=source.name,
                key=prompt.key,
                sample=i % self.plan.samples,
                prompt=candidate.renderer.text(prompt),
                reference=prompt.reference,
                response=one.response,
                reward=grade.reward,
                failure=grade.failure,
                finish=completion.finish,
                num_tokens=len(completion.response_ids),
            )
            for i, (prompt, one, grade, completion) in enumerate(
                zip(prompts, submissions, grades, completions, strict=True)
            )
        ]

    def _complete(
        self,
        candidate: _Candidate,
        source: SourcePlan,
        prompts: Sequence[Prompt],
        engine: Callable[[], RolloutEngine],
    ) -> tuple[list[Completion], Callable[[int], None]]:
        plan, renderer = self.plan, candidate.renderer
        detail = f"{candidate.model.title} on {source.domain}"
        on_progress = self.stages.begin("evaluation", detail, len(prompts), "responses")
        how = Sampling(plan.temperature, plan.top_p, plan.max_new_tokens, self.inputs.plan.rollout.stop)
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

        requests = [
            GenerationRequest(p.key, i % plan.samples, renderer.render(p)) for i, p in enumerate(prompts)
        ]
        kept = CompletionCache(Path(self.inputs.plan.text_cache), self.stages.ranks, self.stages.note)
        return kept.complete(origin, requests, generate), on_progress


def _fingerprint(folder: Path) -> str:
    """Identify a model by its weights and its config, on which its responses depend as well."""
    config = (folder / "config.json").read_bytes()
    return hashlib.sha256(Checkpoint.open(folder).fingerprint.encode() + config).hexdigest()
