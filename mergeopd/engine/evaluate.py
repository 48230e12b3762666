"""Greedy accuracy of base, experts, weight average and student on held-out prompts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from mergeopd.engine.average import average, why_not
from mergeopd.engine.build import build_verifiers
from mergeopd.engine.dialect import Dialect
from mergeopd.engine.preflight import Inputs
from mergeopd.engine.writing import answer_text, progress
from mergeopd.loss.heads import Head
from mergeopd.models.facts import ModelFacts
from mergeopd.ranks import Ranks, spread
from mergeopd.recipe.plan import EvaluationPlan, SourcePlan
from mergeopd.report.events import EvaluationDone, Note, Reporter, StageStarted
from mergeopd.rollout.local import Request, Writer, generate
from mergeopd.teacher.store import TeacherSource, TeacherStore
from mergeopd.types import Prompt, Sampling

Accuracies = dict[str, dict[str, float | None]]


@dataclass(frozen=True, slots=True)
class _Contestant:
    """A model to measure: `kind` is base, expert, weight_average or merged."""

    kind: str
    writer: Writer
    dialect: Dialect


class Evaluation:
    """Measures models on the recipe's evaluation prompts, one model in memory at a time.

    Every process has the model and measures its share of the prompts.
    """

    def __init__(
        self, inputs: Inputs, plan: EvaluationPlan, device: torch.device, ranks: Ranks, reporter: Reporter
    ) -> None:
        self._inputs = inputs
        self._plan = plan
        self._device = device
        self._ranks = ranks
        self._reporter = reporter
        self._verifiers = build_verifiers(plan.sources, inputs.plan.allow_code)

    def run(self, merged: Path) -> Accuracies:
        """Accuracy (0 to 1) by domain and kind of model; `merged` is the folder of the trained student.

        `weight_average` is None, with a note, where the experts' weights do not fit together.
        """
        domains = sorted({source.domain for source in self._plan.sources})
        kinds = ("base", "expert", "weight_average", "merged")
        result: Accuracies = {d: dict.fromkeys(kinds) for d in domains}
        base = Path(self._inputs.plan.student.model)
        with self._model(base, self._inputs.student) as writer:
            self._measure(_Contestant("base", writer, self._inputs.student), domains, result)
        for name in sorted(set(self._plan.experts.values())):
            own = [d for d in domains if self._plan.experts[d] == name]
            dialect = self._inputs.teachers[name].as_measured
            with self._model(Path(self._inputs.plan.teachers[name].model), dialect) as writer:
                self._measure(_Contestant("expert", writer, dialect), own, result)
        self._measure_average(base, domains, result)
        with self._model(merged, self._inputs.student) as writer:
            self._measure(_Contestant("merged", writer, self._inputs.student), domains, result)
        return result

    def _measure_average(self, base: Path, domains: Sequence[str], result: Accuracies) -> None:
        teachers = [self._inputs.plan.teachers[name] for name in sorted(set(self._plan.experts.values()))]
        experts = [Path(teacher.model) for teacher in teachers if teacher.student is None]
        foreign = [
            name for name in sorted(set(self._plan.experts.values())) if name in self._inputs.crossings
        ]
        if foreign:  # also where all shapes fit: a row of theirs is another token's
            reason: str | None = f"{foreign[0]} has another tokenizer than the student"
        else:
            reason = why_not(base, experts) if experts else "the experts are the student itself"
        if reason is not None:
            self._reporter.emit(Note(f"no weight average: {reason}"))
            return
        model = average(base, experts, self._inputs.vocab_size, self._device)
        facts = ModelFacts.read(base)
        head = Head(
            weight=model.get_parameter(facts.embedding_name if facts.tied else facts.head_name),
            bias=model.get_parameter(facts.head_bias_name) if facts.head_bias_name else None,
            scale=facts.logit_scale,
            softcap=facts.softcap,
            num_valid=self._inputs.student.vocab_size,
        )
        writer = self._writer(model.base_model, head, self._inputs.student)
        self._measure(_Contestant("weight_average", writer, self._inputs.student), domains, result)

    def _measure(self, contestant: _Contestant, domains: Sequence[str], result: Accuracies) -> None:
        for domain in domains:
            verdicts: list[float] = []
            for source in self._plan.sources:
                if source.domain == domain:
                    verdicts += self._verdicts(contestant, source)
            accuracy = sum(verdicts) / len(verdicts)
            result[domain][contestant.kind] = accuracy
            self._reporter.emit(EvaluationDone(contestant.kind, domain, accuracy, len(verdicts)))

    def _verdicts(self, contestant: _Contestant, source: SourcePlan) -> list[float]:
        prompts: Sequence[Prompt] = self._inputs.evaluation[source.name]
        stop = self._inputs.plan.rollout.stop
        self._reporter.emit(
            StageStarted("evaluation", f"{contestant.kind} on {source.domain}", len(prompts), "answers")
        )
        verify, tokenizer = self._verifiers[source.name], contestant.dialect.tokenizer

        def verdicts(own: Sequence[Prompt]) -> list[float]:
            completions = generate(
                contestant.writer,
                [Request(p.key, 0, contestant.dialect.render(p)) for p in own],
                Sampling(0.0, 1.0, self._plan.max_new_tokens, stop),
                seed=self._inputs.plan.seed,
                batch_size=self._plan.batch_size,
                progress=progress(self._reporter, len(prompts), self._ranks),
            )
            return [
                verify(answer_text(completion.response_ids, tokenizer, stop), prompt.reference)
                for prompt, completion in zip(own, completions, strict=True)
            ]

        return spread(self._ranks, prompts, verdicts)

    @contextmanager
    def _model(self, folder: Path, dialect: Dialect) -> Iterator[Writer]:
        source = TeacherSource(folder, self._inputs.plan.student.dtype, dialect.vocab_size)
        store = TeacherStore({"model": source}, self._device)
        with store.open("model") as model:
            yield self._writer(model.body, store.heads(["model"])["model"], dialect)

    def _writer(self, body: torch.nn.Module, head: Head, dialect: Dialect) -> Writer:
        return Writer(body, head, dialect.eos_ids, dialect.tokenizer, self._device)
