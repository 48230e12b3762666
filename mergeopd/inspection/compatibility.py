"""Compare a teacher with the student without running a model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from mergeopd.data.renderer import Renderer
from mergeopd.inspection.coverage import align_prompts, alignment
from mergeopd.inspection.pairs import Pair, sources_of
from mergeopd.inspection.template_findings import template_findings
from mergeopd.inspection.templates import compare_templates, num_characters
from mergeopd.inspection.vocabularies import end_tokens, special_tokens, vocabulary
from mergeopd.messages import joined
from mergeopd.preflight.inputs import Inputs
from mergeopd.recipe.plan import TeacherPlan
from mergeopd.reporting.inspection import Compatibility, Finding
from mergeopd.reporting.model_card import common_licence, folder_licence
from mergeopd.types import Prompt

_NUM_LONGEST = 32  # prompts that are encoded to find the longest in tokens


def compatibility(inputs: Inputs, teacher: str) -> Compatibility:
    """Compare a teacher of checked inputs with the student. No model is run and no weights are read."""
    pair = Pair.of(inputs, teacher)
    if pair.plan.api is not None:
        text = "behind an API: the student learns the text that it writes, and no more of it is known"
        return Compatibility((Finding("vocabulary", "ok", text), *_licences(pair)))
    findings: list[Finding] = []
    if pair.plan.student is None:
        findings += [*vocabulary(pair), *special_tokens(pair), *end_tokens(pair)]
    else:
        text = "a self-teacher: tokenizer and template are the student's"
        findings.append(Finding("vocabulary", "ok", text))
    compared = compare_templates(pair)
    findings += template_findings(pair, compared)
    coverage = None
    if pair.cross_tokenizer is not None:
        coverage = align_prompts(pair.cross_tokenizer, pair.prompts)
        findings += alignment(coverage)
    findings += _context(pair, 1.0 if coverage is None else coverage.ratio)
    findings += [*_licences(pair), *_fingerprints(pair)]
    return Compatibility(
        tuple(findings),
        tuple(one.diff for one in compared),
        None if coverage is None else coverage.estimate,
    )


def licence_of(teacher: TeacherPlan) -> str | None:
    """Return the licence that a teacher's card states, else that of the model folder's own card."""
    return teacher.licence or (None if teacher.model is None else folder_licence(teacher.folder))


def _context(pair: Pair, ratio: float) -> Iterator[Finding]:
    """Compare the longest prompt and response with both contexts.

    The teacher has `ratio` tokens per token of the student.
    """
    plan = pair.inputs.plan
    phases = [phase for phase in plan.phases if pair.plan.name in plan.teachers_of(phase).named]
    num_new = max((plan.rollout_of(phase).max_new_tokens for phase in phases), default=0)
    read = sources_of(plan, pair.plan.name)
    environments = [source.environment for source in plan.sources if source.name in read]
    num_new += max((e.max_tokens for e in environments if e is not None), default=0)
    sides = []
    for name, side, length in (
        ("student", pair.student, num_new),
        ("teacher", pair.teacher, round(ratio * num_new)),
    ):
        longest = max((len(side.render(p)) for p in _longest(pair.prompts)), default=0)
        sides.append((name, longest, length, side.max_positions))
    texts = [
        f"{longest:,} + {length:,} of {context:,} tokens for the {name}"
        for name, longest, length, context in sides
    ]
    text = f"longest prompt and response: {joined(texts, 'and')}"
    short = [name for name, longest, length, context in sides if longest + length > context]
    if short:
        yield Finding(
            "context",
            "problem",
            f"{text}: the {joined(short, 'and the')} cannot read all of it, and tokens beyond have no loss",
            "lower rollout.max_new_tokens, or shorten the prompts",
        )
    else:
        yield Finding("context", "ok", text)


def _longest(prompts: tuple[Prompt, ...]) -> list[Prompt]:
    return sorted(prompts, key=num_characters, reverse=True)[:_NUM_LONGEST]


def _licences(pair: Pair) -> Iterator[Finding]:
    """Compare the licences of both models, and that of a card with the folder's own."""
    plan = pair.plan
    if plan.student is not None:
        return
    own = folder_licence(Path(pair.inputs.plan.student.model))
    of_folder = None if plan.model is None else folder_licence(plan.folder)
    if plan.licence and of_folder and common_licence([plan.licence, of_folder]) is None:
        text = f"the card says {plan.licence}, the README.md of the model folder {of_folder}"
        yield Finding("licence", "note", text, "correct the card")
    licence = licence_of(plan)
    if licence is None:
        text = "the teacher's licence is unknown"
        yield Finding("licence", "note", text, "add `licence` to the card, for the model card of the export")
    elif own is None or common_licence([licence, own]) is not None:
        student = "" if own is None else ", as the student's"
        yield Finding("licence", "ok", f"{licence}{student}")
    else:
        yield Finding(
            "licence",
            "note",
            f"the teacher's licence is {licence}, the student's {own}",
            "check that both allow a model that learns from the teacher to be used as you intend",
        )


def _fingerprints(pair: Pair) -> Iterator[Finding]:
    """Compare the digests of weights: the card's with the folder's, and those of models with each other."""
    plan, plans, files = pair.plan, pair.inputs.plan.teachers, pair.inputs.files
    if plan.student is not None or plan.model is None:
        return
    digest = files.get(plan.model)
    if plan.served is not None:
        yield Finding("fingerprint", "ok", "served: its weights are compared by the card's sample")
    elif plan.fingerprint is None:
        yield Finding(
            "fingerprint",
            "note",
            "the card has no fingerprint, so a change of the weights is not noticed",
            "`mergeopd new teacher` writes a card with fingerprint and canary",
        )
    else:
        yield Finding("fingerprint", "ok", f"the weights are the card's ({plan.fingerprint[:12]})")
    if digest is None:
        return
    if digest == files.get(pair.inputs.plan.student.model):
        if _same_prompt(pair.teacher, pair.student) and _reads_same(pair):
            text = "the weights are the student's, and so is the prompt: there is nothing to learn from it"
            remedy = (
                "name the expert's folder, or give this teacher a `system` message or `prompt` of its own"
            )
            yield Finding("fingerprint", "problem", text, remedy)
        else:
            text = "the weights are the student's; it reads another prompt"
            yield Finding("fingerprint", "note", text)
    same = [
        name
        for name, other in plans.items()
        if name != plan.name and other.student is None and other.model and files.get(other.model) == digest
    ]
    if same:
        equal = [name for name in same if _same_prompt(pair.teacher, pair.inputs.teachers[name])]
        text = f"the weights are those of {joined([repr(name) for name in same], 'and')}"
        if equal:
            text += "; with the same prompt, both are one teacher"
            remedy = "route the prompts of both to one teacher, which is opened once"
            yield Finding("fingerprint", "note", text, remedy)
        else:
            yield Finding("fingerprint", "ok", f"{text}, with another prompt")


def _same_prompt(one: Renderer, other: Renderer) -> bool:
    a, b = one.teacher_prompt, other.teacher_prompt
    return (a.system, a.prompt and a.prompt.source) == (b.system, b.prompt and b.prompt.source)


def _reads_same(pair: Pair) -> bool:
    """Whether both models read the first prompt as the same token ids."""
    return all(pair.student.render(p).tolist() == pair.teacher.render(p).tolist() for p in pair.prompts[:1])
