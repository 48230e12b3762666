"""Check prompts after reading them: references, dataset responses, lengths."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence, Sized
from dataclasses import dataclass
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
from mergeopd.recipe.verifiers import JsonVerifier, UserVerifier
from mergeopd.reward.verifiers import build_verifier, reference_problem
from mergeopd.types import Prompt


def row_name(source: SourcePlan, prompt: Prompt) -> str:
    """Location of a prompt: `data/math.jsonl:3`, or `data/math.parquet: row 2`, as file readers count."""
    row = int(prompt.key.rpartition(":")[2])
    file = shown(Path(source.source))
    return f"{file}:{row + 1}" if source.source.endswith(".jsonl") else f"{file}: row {row}"


def check_verifier(findings: Findings, place: Keys, source: SourcePlan) -> None:
    """Check the files and functions that a verifier names."""
    match source.verifier:
        case UserVerifier():
            problem = function_problem(source.verifier.function)
            if problem is not None:
                findings.report((*place, "verifier", "function"), *problem)
        case JsonVerifier(schema_file=str()):
            verifier = source.verifier
            where: Keys = (*place, "verifier", "schema_file")
            findings.attempt(where, lambda: build_verifier(verifier, ()), "correct the file")
        case _:
            pass


def check_references(findings: Findings, place: Keys, source: SourcePlan, prompts: Sequence[Prompt]) -> None:
    """Report references that no response can match."""
    if source.verifier is None:
        return
    verifier = source.verifier
    reasons = [
        (prompt, reason)
        for prompt in prompts
        if prompt.reference is not None and (reason := reference_problem(verifier, prompt.reference))
    ]
    if reasons:
        prompt, reason = reasons[0]
        count = _counted(reasons, prompts, "reference", "can", "can")
        findings.report(
            (*place, "verifier"),
            f"{count} never be matched: {_first(reasons)}{row_name(source, prompt)}: {reason}",
            "correct the prompt file, or choose another verifier",
        )


def check_responses(
    findings: Findings, place: Keys, source: SourcePlan, prompts: Sequence[Prompt], phases: Sequence[Phase]
) -> None:
    """Report missing responses for phases with dataset text."""
    learners = [phase.name for phase in phases if reads_dataset(phase)]
    lacking = [prompt for prompt in prompts if prompt.response is None]
    if learners and lacking:
        count = _counted(lacking, prompts, "row", "has", "have")
        findings.report(
            (*place, "source"),
            f"phase '{learners[0]}' trains on the dataset's responses, but {count} no field "
            f"'{source.response_field}': {_first(lacking)}{row_name(source, lacking[0])}",
            "add the field, name another with `response_field`, or choose another `text` for the phase",
        )


@dataclass(frozen=True)
class DatasetResponses:
    """Dataset responses in the student's template. `bounds`: upper bounds of their lengths, by prompt key."""

    student: Renderer
    bounds: Mapping[str, int]


def check_dataset_responses(
    findings: Findings, place: Keys, source: SourcePlan, prompts: Sequence[Prompt], student: Renderer
) -> DatasetResponses:
    """Report trajectories that the student's template cannot render turn by turn; the result omits them."""
    bounds: dict[str, int] = {}
    refused: list[tuple[Prompt, str]] = []
    for prompt in prompts:
        try:
            bounds[prompt.key] = length_bound(prompt, student)
        except DataError as error:
            refused.append((prompt, str(error)))
    if refused:
        prompt, reason = refused[0]
        of = [p for p in prompts if isinstance(p.response, tuple)]
        count = _counted(refused, of, "trajectory", "cannot", "cannot", plural="trajectories")
        findings.report(
            (*place, "source"),
            f"{count} be rendered for the student: {_first(refused)}{row_name(source, prompt)}: {reason}",
        )
    return DatasetResponses(student, bounds)


def check_response_tokens(
    findings: Findings,
    place: Keys,
    source: SourcePlan,
    prompts: Sequence[Prompt],
    student: Renderer,
    num_ids: int,
) -> None:
    """Report dataset responses with ids from `num_ids` on, which not every model of the run has."""
    beyond = student.tokenizer.added_from(num_ids) or ()
    if not beyond:
        return
    texts = ((prompt, dataset_text(prompt, student)) for prompt in prompts)
    unshared = [(prompt, token) for prompt, text in texts for token in beyond if token in text]
    if unshared:
        prompt, token = unshared[0]
        count = _counted({p.key for p, _ in unshared}, prompts, "dataset response", "has", "have")
        findings.report(
            (*place, "source"),
            f"{count} tokens that not every model of the run has: {_first(unshared)}"
            f"{row_name(source, prompt)}: {token!r}",
            "remove it, or choose teachers of the student's family",
        )


def check_cross_tokenizer_responses(
    findings: Findings,
    place: Keys,
    source: SourcePlan,
    prompts: Sequence[Prompt],
    crossed: Collection[str],
) -> None:
    """Report trajectories for teachers with a bridge, which aligns single-turn responses only."""
    foreign = [name for name in source.teachers if name in crossed]
    logged = [prompt for prompt in prompts if isinstance(prompt.response, tuple)]
    if foreign and logged:
        findings.report(
            (*place, "source"),
            f"teacher '{foreign[0]}' has a bridge, which aligns single-turn responses, but "
            f"{_counted(logged, prompts, 'dataset response', 'has', 'have')} several turns: "
            f"{_first(logged)}{row_name(source, logged[0])}",
            "give these prompts a teacher of the student's family",
        )


@dataclass(frozen=True)
class LengthBudget:
    """Maximum response length: `num_new` tokens, set at `limit_place`, or a dataset response."""

    num_new: int
    limit_place: Keys
    responses: DatasetResponses | None = None


def check_lengths(
    findings: Findings,
    place: Keys,
    source: SourcePlan,
    prompts: Sequence[Prompt],
    renderers: Mapping[str, Renderer],
    budget: LengthBudget,
) -> None:
    """Report prompts that a model's template cannot render, or that exceed its context with the response.

    A prompt is reported for the first of the `renderers` for which it fails.
    """
    left = list(prompts)
    seen: set[tuple[object, ...]] = set()
    for reader, renderer in renderers.items():
        template, own = renderer.template, renderer.teacher_prompt
        identity = (
            template.source,
            *template.special_tokens.items(),
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
            findings.report(
                budget.limit_place,
                f"responses of {budget.num_new} tokens leave no space for a prompt in {reader}'s context of "
                f"{renderer.max_positions} tokens",
                "lower it",
            )
            continue
        refused, long = _misfits(left, renderer, budget)
        if refused:
            count = _counted(refused, prompts, "prompt", "cannot", "cannot")
            prompt, reason = refused[0]
            findings.report(
                (*place, "source"),
                f"{count} be rendered for {reader}: {_first(refused)}{row_name(source, prompt)}: {reason}",
                "change the prompts or the template",
            )
        if long:
            prompt, num_tokens, num_response = long[0]
            count = _counted(long, prompts, "prompt", "is", "are")
            findings.report(
                (*place, "source"),
                f"{count} too long for {reader}: {_first(long)}{row_name(source, prompt)} takes {num_tokens} "
                f"tokens in its chat template, the response up to {num_response}, and its context has "
                f"{renderer.max_positions}",
                "shorten the prompts or their responses"
                if num_response > budget.num_new
                else f"shorten the prompts, or lower {'.'.join(map(str, budget.limit_place))}",
            )
        bad = {prompt.key for prompt, _ in refused} | {prompt.key for prompt, _, _ in long}
        left = [prompt for prompt in left if prompt.key not in bad]


def _misfits(
    prompts: Sequence[Prompt], renderer: Renderer, budget: LengthBudget
) -> tuple[list[tuple[Prompt, str]], list[tuple[Prompt, int, int]]]:
    """Prompts that cannot be rendered, with the reason; prompts that are too long, with lengths."""
    refused: list[tuple[Prompt, str]] = []
    long: list[tuple[Prompt, int, int]] = []
    beyond = renderer.tokenizer.added_from(renderer.vocab_size) or ()
    for prompt in prompts:
        try:
            text = renderer.text(prompt)
        except DataError as error:
            refused.append((prompt, str(error)))
            continue
        odd = next((token for token in beyond if token in text), None)
        if odd is not None:
            refused.append((prompt, f"has the token {odd!r}, for which the model has no embedding"))
            continue
        bound = 0 if budget.responses is None else budget.responses.bounds[prompt.key]
        # A token has at least one byte, so most texts need not be encoded.
        if len(text.encode()) + max(budget.num_new, bound) <= renderer.max_positions:
            continue
        num_response = budget.num_new
        if budget.responses is not None and bound:
            num_response = max(num_response, len(dataset_response(prompt, budget.responses.student).ids))
        num_tokens = len(renderer.render(prompt))
        if num_tokens + num_response > renderer.max_positions:
            long.append((prompt, num_tokens, num_response))
    return refused, long


def _counted(some: Sized, of: Sized, thing: str, one: str, many: str, plural: str = "") -> str:
    """`1 of 3 prompts is`, with the verbs `one` and `many`."""
    things = thing if len(of) == 1 else plural or f"{thing}s"
    return f"{len(some)} of {len(of)} {things} {one if len(some) == 1 else many}"


def _first(some: Sized) -> str:
    return "" if len(some) == 1 else "first "
