"""What can be wrong with prompts once they are read: references, ready answers, lengths."""

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
    """Where a prompt stands: `data/math.jsonl:3`, or `data/math.parquet: row 2`, as the readers count."""
    row = int(prompt.key.rpartition(":")[2])
    file = shown(Path(source.source))
    return f"{file}:{row + 1}" if source.source.endswith(".jsonl") else f"{file}: row {row}"


def check_verifier(findings: Findings, place: Keys, source: SourcePlan) -> None:
    """Files and functions that a verifier names."""
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
    """References that no answer could ever match."""
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
    """A phase on dataset text needs a ready answer for every prompt."""
    learners = [phase.name for phase in phases if reads_dataset(phase)]
    lacking = [prompt for prompt in prompts if prompt.response is None]
    if learners and lacking:
        count = _counted(lacking, prompts, "row", "has", "have")
        findings.report(
            (*place, "source"),
            f"phase '{learners[0]}' learns from the dataset's answers, but {count} no field "
            f"'{source.response_field}': {_first(lacking)}{row_name(source, lacking[0])}",
            "add the field, name the right one with `response_field`, or choose another `text` for the phase",
        )


@dataclass(frozen=True)
class DatasetResponses:
    """The sources' ready answers, as the student writes them.

    `bounds` has for each prompt, by key, a number of tokens that its answer does not exceed.
    """

    student: Renderer
    bounds: Mapping[str, int]


def check_dataset_responses(
    findings: Findings, place: Keys, source: SourcePlan, prompts: Sequence[Prompt], student: Renderer
) -> DatasetResponses:
    """Logged trajectories must come out of the student's template turn by turn; those that do not are absent
    from the result."""
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
            f"{count} be written for the student: {_first(refused)}{row_name(source, prompt)}: {reason}",
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
    """Ready answers may have the first `num_ids` ids alone, which every model of the run has."""
    beyond = student.tokenizer.added_from(num_ids) or ()
    if not beyond:
        return
    texts = ((prompt, dataset_text(prompt, student)) for prompt in prompts)
    found = [(prompt, token) for prompt, text in texts for token in beyond if token in text]
    if found:
        prompt, token = found[0]
        count = _counted({p.key for p, _ in found}, prompts, "ready answer", "has", "have")
        findings.report(
            (*place, "source"),
            f"{count} tokens that not every model of the run has: {_first(found)}{row_name(source, prompt)}: "
            f"{token!r}",
            "remove it, or choose teachers of the student's family",
        )


def check_cross_tokenizer_responses(
    findings: Findings,
    place: Keys,
    source: SourcePlan,
    prompts: Sequence[Prompt],
    crossed: Collection[str],
) -> None:
    """A logged trajectory has turns between the assistant's, which no alignment of one answer covers."""
    foreign = [name for name in source.teachers if name in crossed]
    logged = [prompt for prompt in prompts if isinstance(prompt.response, tuple)]
    if foreign and logged:
        findings.report(
            (*place, "source"),
            f"teacher '{foreign[0]}' has a bridge, which aligns answers of one turn, but "
            f"{_counted(logged, prompts, 'ready answer', 'is', 'are')} a conversation: "
            f"{_first(logged)}{row_name(source, logged[0])}",
            "give these prompts a teacher of the student's family",
        )


@dataclass(frozen=True)
class LengthBudget:
    """How long answers get: `num_new` tokens at most, as `limit_place` in the recipe says.

    Where there are `ready` answers, they must fit too.
    """

    num_new: int
    limit_place: Keys
    ready: DatasetResponses | None = None


def check_lengths(
    findings: Findings,
    place: Keys,
    source: SourcePlan,
    prompts: Sequence[Prompt],
    readers: Mapping[str, Renderer],
    room: LengthBudget,
) -> None:
    """No prompt may outgrow a model that has to read it, and every model must be able to write it.

    `readers` come in order; what is wrong with a prompt for one of them is not said again for the others.
    """
    left = list(prompts)
    seen: set[tuple[object, ...]] = set()
    for reader, dialect in readers.items():
        template = dialect.template
        voice = (
            template.source,
            *template.special_tokens.items(),
            id(dialect.tokenizer),
            dialect.vocab_size,
            dialect.max_positions,
            dialect.script.system,
            dialect.script.prompt and dialect.script.prompt.source,
        )
        if voice in seen:
            continue
        seen.add(voice)
        if room.num_new >= dialect.max_positions:
            findings.report(
                room.limit_place,
                f"answers of {room.num_new} tokens leave no room for a prompt in {reader}'s context of "
                f"{dialect.max_positions} tokens",
                "lower it",
            )
            continue
        refused, long = _misfits(left, dialect, room)
        if refused:
            count = _counted(refused, prompts, "prompt", "cannot", "cannot")
            prompt, reason = refused[0]
            findings.report(
                (*place, "source"),
                f"{count} be written for {reader}: {_first(refused)}{row_name(source, prompt)}: {reason}",
                "change the prompts or the template",
            )
        if long:
            prompt, num_tokens, num_answer = long[0]
            count = _counted(long, prompts, "prompt", "is", "are")
            findings.report(
                (*place, "source"),
                f"{count} too long for {reader}: {_first(long)}{row_name(source, prompt)} takes {num_tokens} "
                f"tokens in its chat template, the answer up to {num_answer}, and its context holds "
                f"{dialect.max_positions}",
                "shorten the prompts or their answers"
                if num_answer > room.num_new
                else f"shorten the prompts, or lower {'.'.join(map(str, room.limit_place))}",
            )
        bad = {prompt.key for prompt, _ in refused} | {prompt.key for prompt, _, _ in long}
        left = [prompt for prompt in left if prompt.key not in bad]


def _misfits(
    prompts: Sequence[Prompt], dialect: Renderer, room: LengthBudget
) -> tuple[list[tuple[Prompt, str]], list[tuple[Prompt, int, int]]]:
    """Prompts that the template refuses, with the reason; prompts that are too long, with lengths."""
    refused: list[tuple[Prompt, str]] = []
    long: list[tuple[Prompt, int, int]] = []
    beyond = dialect.tokenizer.added_from(dialect.vocab_size) or ()
    for prompt in prompts:
        try:
            text = dialect.text(prompt)
        except DataError as error:
            refused.append((prompt, str(error)))
            continue
        odd = next((token for token in beyond if token in text), None)
        if odd is not None:
            refused.append((prompt, f"has the token {odd!r}, for which the model has no row"))
            continue
        bound = 0 if room.ready is None else room.ready.bounds[prompt.key]
        # A token stands for a byte at least, so most texts are short enough at a glance.
        if len(text.encode()) + max(room.num_new, bound) <= dialect.max_positions:
            continue
        num_answer = room.num_new
        if room.ready is not None and bound:
            num_answer = max(num_answer, len(dataset_response(prompt, room.ready.student).ids))
        num_tokens = len(dialect.render(prompt))
        if num_tokens + num_answer > dialect.max_positions:
            long.append((prompt, num_tokens, num_answer))
    return refused, long


def _counted(some: Sized, of: Sized, thing: str, one: str, many: str, plural: str = "") -> str:
    """`1 of 3 prompts is`, with the verbs `one` and `many`."""
    things = thing if len(of) == 1 else plural or f"{thing}s"
    return f"{len(some)} of {len(of)} {things} {one if len(some) == 1 else many}"


def _first(some: Sized) -> str:
    return "" if len(some) == 1 else "first "
