"""Lengths of prompts and responses: measured on files that are here, else assumed and said so."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from statistics import fmean

from mergeopd.data.prompts import read_prompts
from mergeopd.data.renderer import Renderer
from mergeopd.errors import MergeopdError
from mergeopd.messages import joined
from mergeopd.planner.workload import Lengths, TextLengths, longest_response
from mergeopd.preflight.models import ModelReader
from mergeopd.preflight.problems import Findings
from mergeopd.recipe.plan import Plan, SourcePlan
from mergeopd.recipe.resolve import Resolution
from mergeopd.recipe.training import Phase, reads_dataset
from mergeopd.types import Prompt

_SAMPLE = 64
_PROMPT_TOKENS, _NUM_EVALUATED = 512, 1000


@dataclass(frozen=True, slots=True)
class Texts:
    """Lengths of every phase's sources, and number and lengths of the prompts of evaluations.

    `num_prompts` are those of JSON lines that are here; other files are not read to the end.
    `notes` say what is assumed.
    """

    of_phases: dict[str, dict[str, TextLengths]]
    evaluated: dict[str, tuple[int, Lengths]]
    num_prompts: dict[str, int]
    notes: tuple[str, ...]


def text_lengths(resolution: Resolution, prompt_tokens: int | None, response_tokens: int | None) -> Texts:
    """Measure the first prompts of each file with the student's template, where both are here.

    `prompt_tokens` and `response_tokens` are means that replace what is measured or assumed.
    """
    plan = resolution.plan
    assert plan is not None
    renderer = _renderer(resolution)
    reader = _Reader(renderer)
    of_phases: dict[str, dict[str, TextLengths]] = {}
    for phase in plan.phases:
        own = of_phases[phase.name] = {}
        for source in plan.sources_of(phase):
            own[source.name] = _lengths(plan, phase, source, reader, prompt_tokens, response_tokens)
    suites = () if plan.evaluation is None else plan.evaluation.sources
    evaluated = {source.name: reader.evaluated(source) for source in suites}
    notes = []
    if reader.assumed and prompt_tokens is None:
        names = joined([f"'{name}'" for name in sorted(reader.assumed)], "and")
        notes.append(f"assumed: prompts of {_PROMPT_TOKENS} tokens from {names}; set --prompt-tokens")
    if response_tokens is None:
        notes.append("assumed: responses as long as they may be, an upper bound; set --response-tokens")
    known = {source.name: _num_rows(source) for source in plan.sources}
    num_prompts = {name: number for name, number in known.items() if number is not None}
    return Texts(of_phases, evaluated, num_prompts, tuple(notes))


def _lengths(
    plan: Plan,
    phase: Phase,
    source: SourcePlan,
    reader: _Reader,
    prompt_tokens: int | None,
    response_tokens: int | None,
) -> TextLengths:
    longest = longest_response(plan, phase, source)
    if source.text_field is not None:
        # The first token of a document is not predicted.
        mean = min(response_tokens or longest, longest)
        return TextLengths(Lengths(1, 1), Lengths(mean - 1, longest - 1))
    prompt = reader.prompt(source) if prompt_tokens is None else Lengths(prompt_tokens, prompt_tokens)
    if response_tokens is not None:
        return TextLengths(prompt, Lengths(min(response_tokens, longest), longest))
    if reads_dataset(phase) and (measured := reader.response(source)) is not None:
        return TextLengths(prompt, measured)
    return TextLengths(prompt, Lengths(longest, longest))


class _Reader:
    """Lengths of the prompts of sources, each read once."""

    def __init__(self, renderer: Renderer | None) -> None:
        self._renderer = renderer
        self._known: dict[str, tuple[Prompt, ...]] = {}
        self.assumed: set[str] = set()

    def _prompts(self, source: SourcePlan, limit: int | None) -> tuple[Prompt, ...]:
        if source.name not in self._known:
            own = source if limit is None else source.model_copy(update={"limit": limit})
            try:
                self._known[source.name] = read_prompts(own)
            except (MergeopdError, OSError):
                self._known[source.name] = ()
        return self._known[source.name]

    def prompt(self, source: SourcePlan, limit: int | None = _SAMPLE) -> Lengths:
        renderer = self._renderer
        lengths = [] if renderer is None else self._measure(source, limit, lambda p: len(renderer.render(p)))
        if not lengths:
            self.assumed.add(source.name)
            return Lengths(_PROMPT_TOKENS, _PROMPT_TOKENS)
        return Lengths(fmean(lengths), max(lengths))

    def response(self, source: SourcePlan) -> Lengths | None:
        """Return the lengths of a file's own responses; None if they cannot be measured."""
        renderer = self._renderer
        if renderer is None:
            return None

        def length(prompt: Prompt) -> int:
            own = prompt.response
            return len(renderer.tokenizer.encode(own)) + 1 if isinstance(own, str) else 0

        lengths = [n for n in self._measure(source, _SAMPLE, length) if n]
        return Lengths(fmean(lengths), max(lengths)) if lengths else None

    def evaluated(self, source: SourcePlan) -> tuple[int, Lengths]:
        """Return the number and the lengths of an evaluation's prompts."""
        length = self.prompt(source, None)
        return len(self._prompts(source, None)) or source.limit or _NUM_EVALUATED, length

    def _measure(self, source: SourcePlan, limit: int | None, length: Callable[[Prompt], int]) -> list[int]:
        try:
            return [length(prompt) for prompt in self._prompts(source, limit)[:_SAMPLE]]
        except MergeopdError:
            return []


def _num_rows(source: SourcePlan) -> int | None:
    """Return the rows of a file of JSON lines, at most the source's limit; None for others."""
    path = Path(source.source)
    if path.suffix != ".jsonl" or not path.is_file() or source.text_field is not None:
        return None
    with path.open("rb") as file:
        number = sum(not line.isspace() for line in file)
    return number if source.limit is None else min(number, source.limit)


def _renderer(resolution: Resolution) -> Renderer | None:
    """Return how the student renders prompts; None without its tokenizer."""
    assert resolution.student is not None
    if not (Path(resolution.student.model) / "tokenizer.json").is_file():
        return None
    return ModelReader(Findings(resolution.origins), datetime.now()).student(resolution.student)
