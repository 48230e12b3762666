"""Compare checkpoints of one expert as teachers, and write the cards of the best."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from mergeopd.batch.advantages import RIGHT
from mergeopd.config.locate import Origins
from mergeopd.data.renderer import Renderer
from mergeopd.errors import RecipeError
from mergeopd.inspection.inspector import Inspector, TeacherFindings
from mergeopd.inspection.records import teacher_inspection
from mergeopd.intervals import Values, difference_interval
from mergeopd.messages import option_problem, shown
from mergeopd.preflight.inputs import Inputs
from mergeopd.preflight.models import TOKENIZER_FILES, ModelReader
from mergeopd.preflight.problems import Findings
from mergeopd.recipe.plan import TeacherPlan
from mergeopd.reporting.inspection import CheckpointRank, TeacherInspection
from mergeopd.reporting.result import Estimate
from mergeopd.scaffold.teacher import NewTeacherOptions, ProbedModel, card_text, take_canary
from mergeopd.storage.folders import write_atomic


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint in the place of a teacher: `inputs` have its folder under the teacher's name."""

    label: str
    inputs: Inputs
    plan: TeacherPlan
    renderer: Renderer
    fingerprint: str


@dataclass(frozen=True)
class MeasuredCheckpoint:
    """A checkpoint with its record, and the share of correct responses by prompt number of the sample."""

    checkpoint: Checkpoint
    record: TeacherInspection
    solved: Mapping[int, float]


@dataclass(frozen=True)
class ComparedCheckpoints:
    """Every checkpoint's record as a teacher, their ranks, and remarks."""

    teachers: tuple[TeacherInspection, ...]
    ranks: tuple[CheckpointRank, ...]
    notes: tuple[str, ...]


def compare_checkpoints(
    inspector: Inspector, teacher: str, folders: Sequence[Path], cards: Path | None
) -> ComparedCheckpoints:
    """Compare checkpoints in the place of a teacher; write cards of the best if there is a folder for them.

    Raises RecipeError for folders that cannot take its place.
    """
    measured = measure_checkpoints(inspector, teacher, find_checkpoints(inspector.inputs, teacher, folders))
    members = inspector.members[teacher]
    ranked = rank(measured, {number: inspector.prompts[number].domain for number in members})
    notes = list(inspector.inputs.notes)
    if not any(one.is_best for one in ranked):
        notes.append("no checkpoint is the best: the prompts have no verifier, so pass rates are unknown")
    elif cards is not None:
        prompt = inspector.prompts[members[0]].messages[-1].content
        files = write_cards(measured, ranked, teacher, prompt, cards)
        notes += [f"wrote the card {shown(file)}" for file in files]
    return ComparedCheckpoints(tuple(one.record for one in measured), ranked, tuple(notes))


def find_checkpoints(inputs: Inputs, teacher: str, folders: Sequence[Path]) -> list[Checkpoint]:
    """Check that each folder can take the place of a teacher, without reading weights.

    A folder is a model's, or has such folders in it. Without a tokenizer of its own, a checkpoint has the
    teacher's.

    Raises RecipeError with every problem.
    """
    models, problems = [], []
    for folder in folders:
        own = [folder] if _is_model(folder) else sorted(filter(_is_model, _inside(folder)), key=_in_numbers)
        if not own:
            remedy = "name a folder with a config.json, or one that contains such folders"
            problems.append(option_problem("--checkpoints", f"no model in {shown(folder)}", remedy))
        models += own
    names = [folder.name for folder in models]
    labels = [f.name if names.count(f.name) == 1 else shown(f) for f in models]
    checkpoints = []
    for label, folder in zip(labels, models, strict=True):
        try:
            checkpoints.append(_checkpoint(inputs, teacher, label, folder.resolve()))
        except RecipeError as error:
            problems += error.problems
    if problems:
        raise RecipeError(problems)
    return checkpoints


def _checkpoint(inputs: Inputs, teacher: str, label: str, folder: Path) -> Checkpoint:
    own = inputs.plan.teachers[teacher]
    has_tokenizer = any((folder / name).is_file() for name in TOKENIZER_FILES)
    update = {
        "student": None,
        "model": str(folder),
        "tokenizer": str(folder) if has_tokenizer else own.tokenizer,
        "fingerprint": None,
        "canary": None,
        "targets": None,
    }
    plan = own.model_copy(update=update)
    findings = Findings(Origins(folder, None, {}))
    reader = ModelReader(findings, inputs.now)
    renderer = reader.teacher(plan, inputs.student)
    if renderer is None or findings.problems:
        raise RecipeError(
            [option_problem(f"--checkpoints {shown(folder)}", p.message, p.remedy) for p in findings.problems]
        )
    teachers = {**inputs.plan.teachers, teacher: plan}
    changed = replace(
        inputs,
        plan=inputs.plan.model_copy(update={"teachers": teachers}),
        teachers={**inputs.teachers, teacher: renderer},
    )
    return Checkpoint(label, changed, plan, renderer, reader.files[str(folder)])


def measure_checkpoints(
    inspector: Inspector, teacher: str, checkpoints: Sequence[Checkpoint]
) -> list[MeasuredCheckpoint]:
    """Measure every checkpoint as a teacher on the same responses of the student."""
    inspector.respond()
    measured = []
    for checkpoint in checkpoints:
        own = inspector.with_weights(checkpoint.inputs)
        finding = own.compare().teachers[teacher]
        record = replace(teacher_inspection(own, finding), name=checkpoint.label)
        measured.append(MeasuredCheckpoint(checkpoint, record, _solved(finding)))
    return measured


def rank(measured: Sequence[MeasuredCheckpoint], domains: Mapping[int, str]) -> tuple[CheckpointRank, ...]:
    """Rank checkpoints on each domain by their pass rates; of equal ones, the closest to the student leads.

    `domains` are those of the sample's prompts, by number. A checkpoint that cannot be measured comes last;
    without a verifier, none is the best.
    """
    ranked = []
    for domain in dict.fromkeys(domains.values()):
        prompts = [number for number, name in domains.items() if name == domain]
        rates = {one.checkpoint.label: _rates(one, prompts) for one in measured}

        def order(one: MeasuredCheckpoint, domain: str = domain) -> tuple[float, float]:
            signal = one.record.by_domain.get(domain)
            rate = None if signal is None else signal.pass_rate_T.value
            gap = None if signal is None else signal.reverse_kl.value
            return -1.0 if rate is None else rate, -np.inf if gap is None else -gap

        first, *others = sorted(measured, key=order, reverse=True)
        is_known = order(first)[0] >= 0.0
        best = rates[first.checkpoint.label]
        ranked.append(_rank(domain, first, Estimate(0.0 if is_known else None), is_best=is_known))
        for one in others:
            own = rates[one.checkpoint.label]
            ranked.append(_rank(domain, one, _behind(best, own), is_best=False))
    return tuple(ranked)


def write_cards(
    measured: Sequence[MeasuredCheckpoint],
    ranked: Sequence[CheckpointRank],
    teacher: str,
    prompt: str,
    folder: Path,
) -> list[Path]:
    """Write a card for every checkpoint that is the best of a domain, with its domains; return the files.

    `prompt` is that of the sample response by which runs verify the model.
    """
    files = []
    for one in measured:
        checkpoint = one.checkpoint
        domains = [rank.domain for rank in ranked if rank.is_best and rank.checkpoint == checkpoint.label]
        if not domains:
            continue
        plan = checkpoint.plan
        name = f"{teacher}-{re.sub(r'[^A-Za-z0-9_.-]', '-', checkpoint.label)}"
        template = None if plan.template is None else Path(plan.template)
        options = NewTeacherOptions(name, str(plan.folder), domains, template, prompt)
        probed = ProbedModel(plan, checkpoint.renderer, checkpoint.fingerprint)
        file = folder / f"{name}.yaml"
        write_atomic(file, card_text(options, checkpoint.fingerprint, take_canary(probed, prompt), str))
        files.append(file)
    return files


def _rank(domain: str, one: MeasuredCheckpoint, behind: Estimate, *, is_best: bool) -> CheckpointRank:
    signal, record = one.record.by_domain.get(domain), one.record
    return CheckpointRank(
        domain,
        one.checkpoint.label,
        Estimate(None) if signal is None else signal.pass_rate_T,
        Estimate(None) if signal is None else signal.reverse_kl,
        record.domain_verdicts.get(domain, record.verdict),
        is_best,
        behind,
    )


def _solved(finding: TeacherFindings) -> dict[int, float]:
    """Return the share of correct responses of each prompt with a verifier."""
    rewards: dict[int, list[bool]] = {}
    for graded in () if finding.measured is None else finding.measured.graded_T:
        if graded.reward is not None:
            rewards.setdefault(graded.prompt, []).append(graded.reward >= RIGHT)
    return {prompt: float(np.mean(own)) for prompt, own in rewards.items()}


def _rates(one: MeasuredCheckpoint, prompts: Sequence[int]) -> dict[int, float]:
    return {prompt: one.solved[prompt] for prompt in prompts if prompt in one.solved}


def _behind(best: Mapping[int, float], own: Mapping[int, float]) -> Estimate:
    """Return by how much the best is better on the prompts of both, with its paired interval."""
    shared = [prompt for prompt in best if prompt in own]
    if not shared:
        return Estimate(None)
    first: Values = np.array([best[prompt] for prompt in shared])
    second: Values = np.array([own[prompt] for prompt in shared])
    interval = difference_interval(first, second)
    return Estimate(float(first.mean() - second.mean()), interval.low, interval.high)


def _is_model(folder: Path) -> bool:
    return (folder / "config.json").is_file()


def _inside(folder: Path) -> list[Path]:
    return list(folder.iterdir()) if folder.is_dir() else []


def _in_numbers(folder: Path) -> list[tuple[int, str]]:
    """Sort checkpoint-200 before checkpoint-1000."""
    return [
        (int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", folder.name) if part
    ]
