"""Check prompts after reading them: references, dataset responses, lengths."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence, Sized
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from mergeopd.config.tree import Keys
from mergeopd.data.renderer import Renderer
from mergeopd.data.trajectory import dataset_response, dataset_text, length_bound
from mergeopd.errors import DataError
from mergeopd.messages import shown
from mergeopd.preflight.problems import Findings
from mergeopd.preflight.user_code import function_problem
from mergeopd.recipe.plan import SourcePlan
from mergeopd.recipe.training import Phase, reads_dataset
from mergeopd.recipe.verifiers import (
    HumanEvalVerifier,
    JsonVerifier,
    PythonTestsVerifier,
    UserVerifier,
    single_verifiers,
)
from mergeopd.reward.verifiers import build_verifier, reference_problem
from mergeopd.sandbox.client import sandbox_problem
from mergeopd.types import Prompt


def check_verifier(findings: Findings, place: Keys, source: SourcePlan) -> None:
    """Check the files and functions that a verifier names, and that programs can be isolated."""
    for path, verifier in single_verifiers(source.verifier).items() if source.verifier else ():
        where: Keys = (*place, "verifier", *path)
        match verifier:
            case UserVerifier():
                problem = function_problem(verifier.function)
                if problem is not None:
                    findings.report((*where, "function"), *problem)
            case JsonVerifier(schema_file=str()):
                build = partial(build_verifier, verifier, ())
                findings.attempt((*where, "schema_file"), build, "correct the file")
            case PythonTestsVerifier() | HumanEvalVerifier():
                if (refusal := sandbox_problem()) is not None:
                    findings.report((*where, "kind"), refusal)
            case _:
                pass


@dataclass(frozen=True)
class LengthBudget:
    """Maximum response length: `num_new` tokens, set at `limit_place`, or a dataset response.

    `bounds` are upper bounds of the lengths of dataset responses in the student's template, by prompt key.
    """

    num_new: int
    limit_place: Keys
    bounds: Mapping[str, int] = field(default_factory=dict)
    student: Renderer | None = None


def turns_budget(source: SourcePlan, turn: LengthBudget, place: Keys) -> LengthBudget:
    """Return the budget of responses of several turns, the last of which may begin just below the limit."""
    if source.environment is None:
        return turn
    num_new = source.environment.max_tokens + turn.num_new
    return replace(turn, num_new=num_new, limit_place=(*place, "environment", "max_tokens"))


@dataclass(frozen=True)
class PromptChecks:
    """Checks of one source's prompts, with problems reported below `place`."""

    findings: Findings
    place: Keys
    source: SourcePlan
    prompts: Sequence[Prompt]

    def references(self) -> None:
        """Report references that no response can match."""
        verifier = self.source.verifier
        if verifier is None:
            return
        rows = [
            (prompt, f": {reason}")
            for prompt in self.prompts
            if prompt.reference is not None and (reason := reference_problem(verifier, prompt.reference))
        ]
        self._report(
            rows,
            f"{_counted(rows, self.prompts, 'reference', 'can', 'can')} never be matched",
            "correct the prompt file, or choose another verifier",
            key="verifier",
        )

    def responses(self, phases: Sequence[Phase]) -> None:
        """Report missing responses for phases with dataset text."""
        learners = [phase.name for phase in phases if reads_dataset(phase)]
        rows = [(prompt, "") for prompt in self.prompts if prompt.response is None]
        if learners:
            count = _counted(rows, self.prompts, "row", "has", "have")
            self._report(
                rows,
                f"phase '{learners[0]}' trains on the dataset's responses, but {count} no field "
                f"'{self.source.response_field}'",
                "add the field, name another with `response_field`, or choose another `text` for the phase",
            )

    def trajectories(self, student: Renderer) -> dict[str, int]:
        """Report trajectories that the student's template cannot render turn by turn.

        Returns upper bounds of the lengths of the other dataset responses, by prompt key.
        """
        bounds: dict[str, int] = {}
        rows: list[tuple[Prompt, str]] = []
        for prompt in self.prompts:
            try:
                bounds[prompt.key] = length_bound(prompt, student)
            except DataError as error:
                rows.append((prompt, f": {error}"))
        of = [prompt for prompt in self.prompts if isinstance(prompt.response, tuple)]
        count = _counted(rows, of, "trajectory", "cannot", "cannot", plural="trajectories")
        self._report(rows, f"{count} be rendered for the student")
        return bounds

    def response_tokens(self, student: Renderer, num_ids: int) -> None:
        """Report dataset responses with ids from `num_ids` on, which not every model of the run has."""
        beyond = student.tokenizer.added_from(num_ids) or ()
        texts = ((prompt, dataset_text(prompt, student)) for prompt in self.prompts if beyond)
        rows = [(prompt, f": {token!r}") for prompt, text in texts if (token := _contained(beyond, text))]
        count = _counted(rows, self.prompts, "dataset response", "has", "have")
        self._report(
            rows,
            f"{count} tokens that not every model of the run has",
            "remove it, or choose teachers of the student's family",
        )

    def bridged_responses(self, teachers: Sequence[str]) -> None:
        """Report trajectories for teachers with a bridge, which aligns single-turn responses only."""
        rows = [(prompt, "") for prompt in self.prompts if isinstance(prompt.response, tuple)]
        if teachers:
            count = _counted(rows, self.prompts, "dataset response", "has", "have")
            self._report(
                rows,
                f"teacher '{teachers[0]}' has a bridge, which aligns single-turn responses, but {count} "
                "several turns",
                "give these prompts a teacher of the student's family",
            )

    def bridged_turns(self, bridged: Collection[str]) -> None:
        """Report an environment for teachers with a bridge, which aligns single-turn responses only."""
        teachers = [name for name in self.source.teachers if name in bridged]
        if teachers:
            self.findings.report(
                (*self.place, "environment"),
                f"teacher '{teachers[0]}' has a bridge, which aligns single-turn responses",
                "give these prompts a teacher of the student's family",
            )

    def lengths(self, renderers: Mapping[str, Renderer], budget: LengthBudget) -> None:
        """Report prompts that a model's template cannot render, or that exceed its context with the response.

        A prompt is reported for the first of the `renderers` for which it fails.
        """
        left = list(self.prompts)
        seen: set[tuple[object, ...]] = set()
        for reader, renderer in renderers.items():
            template, own = renderer.template, renderer.teacher_prompt
            identity = (
                template.source,
                *template.special_tokens.items(),
                json.dumps(template.arguments, default=str),
                id(renderer.tokenizer),
                renderer.vocab_size,
                renderer.max_positions,
                own.system,
                own.prompt and own.prompt.source,
            )
            if identity in seen:
                continue
            seen.add(identity)
            if budget.num_new >= renderer.max_positions:
                self.findings.report(
                    budget.limit_place,
                    f"responses of {budget.num_new} tokens leave no space for a prompt in {reader}'s context "
                    f"of {renderer.max_positions} tokens",
                    "lower it",
                )
                continue
            bad = self._misfits(left, reader, renderer, budget)
            left = [prompt for prompt in left if prompt.key not in bad]

    def _misfits(
        self, prompts: Sequence[Prompt], reader: str, renderer: Renderer, budget: LengthBudget
    ) -> set[str]:
        """Report prompts that cannot be rendered or are too long for one model; return their keys."""
        refused: list[tuple[Prompt, str]] = []
        long: list[tuple[Prompt, str]] = []
        num_response_of_first = 0
        beyond = renderer.tokenizer.added_from(renderer.vocab_size) or ()
        for prompt in prompts:
            try:
                text = renderer.text(prompt)
            except DataError as error:
                refused.append((prompt, f": {error}"))
                continue
            if token := _contained(beyond, text):
                refused.append((prompt, f": has the token {token!r}, for which the model has no embedding"))
                continue
            bound = budget.bounds.get(prompt.key, 0)
            # A token has at least one byte, so most texts need not be encoded.
            if len(text.encode()) + max(budget.num_new, bound) <= renderer.max_positions:
                continue
            num_response = budget.num_new
            if budget.student is not None and bound:
                num_response = max(num_response, len(dataset_response(prompt, budget.student).ids))
            num_tokens = len(renderer.render(prompt))
            if num_tokens + num_response > renderer.max_positions:
                num_response_of_first = num_response_of_first or num_response
                text = f" takes {num_tokens} tokens in its chat template, the response up to {num_response}"
                long.append((prompt, f"{text}, and its context has {renderer.max_positions}"))
        self._report(
            refused,
            f"{_counted(refused, self.prompts, 'prompt', 'cannot', 'cannot')} be rendered for {reader}",
            "change the prompts or the template",
        )
        self._report(
            long,
            f"{_counted(long, self.prompts, 'prompt', 'is', 'are')} too long for {reader}",
            "shorten the prompts or their responses"
            if num_response_of_first > budget.num_new
            else f"shorten the prompts, or lower {'.'.join(map(str, budget.limit_place))}",
        )
        return {prompt.key for prompt, _ in (*refused, *long)}

    def _report(
        self, rows: Sequence[tuple[Prompt, str]], message: str, remedy: str = "", key: str = "source"
    ) -> None:
        """Report the first of some rows as an example: `MESSAGE: first FILE:LINE` and the row's own text.

        Places are `data/math.jsonl:3` or `data/math.parquet: row 2`, as file readers count.
        """
        if not rows:
            return
        prompt, text = rows[0]
        row, file = int(prompt.key.rpartition(":")[2]), shown(Path(self.source.source))
        line = f"{file}:{row + 1}" if self.source.source.endswith(".jsonl") else f"{file}: row {row}"
        first = "first " if len(rows) > 1 else ""
        self.findings.report((*self.place, key), f"{message}: {first}{line}{text}", remedy)


def _contained(tokens: Sequence[str], text: str) -> str | None:
    return next((token for token in tokens if token in text), None)


def _counted(some: Sized, of: Sized, thing: str, one: str, many: str, plural: str = "") -> str:
    """`1 of 3 prompts is`, with the verbs `one` and `many`."""
    things = thing if len(of) == 1 else plural or f"{thing}s"
    return f"{len(some)} of {len(of)} {things} {one if len(some) == 1 else many}"
