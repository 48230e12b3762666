"""Check values against each other: phases, budgets, schedules, evaluations, backends."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path

from mergeopd.config.locate import Origins, dotted
from mergeopd.config.suggest import did_you_mean
from mergeopd.config.tree import Keys
from mergeopd.errors import Problem
from mergeopd.messages import joined
from mergeopd.recipe.models import Parallel, Student, TeacherRef
from mergeopd.recipe.rollout import AnyRollout, LocalRollout, RolloutSettings
from mergeopd.recipe.routing import PhaseTeachers
from mergeopd.recipe.schema import NO_EXPERT, Reports, TrainSource
from mergeopd.recipe.training import (
    Phase,
    TextMixture,
    only_student,
    reads_dataset,
)
from mergeopd.recipe.valid_parts import ValidParts
from mergeopd.recipe.verifiers import MathVerifier, Verifier

Weights = Mapping[int, Mapping[str, float]]
"""Weights of the teachers of every prompt source, zeros included."""


def phase_problems(parts: ValidParts, origins: Origins) -> Iterator[Problem]:
    """Check the names, rounds and texts of the phases."""
    first_with: dict[str, int] = {}
    for index, phase in parts.phases.items():
        here: Keys = ("phases", index)
        if first_with.setdefault(phase.name, index) != index:
            message = (
                f"phase '{phase.name}' is already defined at {dotted(('phases', first_with[phase.name]))}"
            )
            yield origins.problem((*here, "name"), message, "give each phase its own name")
        if phase.loss.nll and only_student(phase):
            message = "nll on the student's own responses only reinforces them"
            remedy = "use a divergence, or `text: teacher` or `dataset`"
            yield origins.problem((*here, "loss", "nll"), message, remedy, key=True)
        rollout = None if parts.rollout is None else phase.rollout.over(parts.rollout)
        yield from _round_problems(phase, here, rollout, origins)


def _round_problems(
    phase: Phase, here: Keys, rollout: RolloutSettings | None, origins: Origins
) -> Iterator[Problem]:
    size, left = phase.updates_per_round, phase.updates % phase.updates_per_round
    if left:
        fewer, more = phase.updates - left, phase.updates - left + size
        remedy = f"use {fewer} or {more} updates" if fewer else f"use {more} updates"
        message = f"{phase.updates} updates cannot be made in rounds of {size}"
        yield origins.problem((*here, "updates_per_round"), message, remedy)
    if rollout is None:
        return
    count, formula = phase.prompts_per_round, "prompts_per_round: a data set has one response per prompt"
    if phase.keep != "all":
        formula = "prompts_per_round: `keep` may leave one response per prompt"
    elif not reads_dataset(phase):
        count, formula = count * rollout.samples_per_prompt, "prompts_per_round x samples_per_prompt"
    if count < size:
        is_mixed = isinstance(phase.text, TextMixture) and reads_dataset(phase)
        least = "has at least" if is_mixed or phase.keep != "all" else "has"
        message = f"a round {least} {count} responses ({formula}) for {size} updates"
        yield origins.problem((*here, "updates_per_round"), message, f"use {count} or fewer")


def balance_problems(parts: ValidParts, origins: Origins) -> Iterator[Problem]:
    """Check that target shares are given for exactly the domains of a phase."""
    for index, phase in parts.phases.items():
        domains = tuple(dict.fromkeys(source.domain for source in parts.sources_of(phase).values()))
        shares, here = phase.balance.tokens, ("phases", index, "balance", "tokens")
        if isinstance(shares, str) or parts.unknown_sources(phase):  # reported separately
            continue
        for domain in shares:
            if domain not in domains:
                remedy = did_you_mean(domain, domains, f"domains are {', '.join(domains)}")
                yield origins.problem((*here, domain), f"no prompts of domain '{domain}'", remedy, key=True)
        if lacking := [domain for domain in domains if domain not in shares]:
            if any(domain not in domains for domain in shares):
                continue  # the missing domain is probably the misspelt one
            message = f"no share for {', '.join(map(repr, lacking))}"
            yield origins.problem(here, message, "give every training domain a share", key=True)
        elif not any(shares.values()):
            yield origins.problem(here, "every share is 0", "give a positive share", key=True)


def schedule_problems(parts: ValidParts, origins: Origins) -> Iterator[Problem]:
    """Check that the warm-up ends before the run does."""
    num_updates = sum(phase.updates for phase in parts.phases.values())
    warmup = 0 if parts.optimizer is None else parts.optimizer.warmup_updates
    if warmup > num_updates:
        message = f"{warmup} warm-up updates, but only {num_updates} updates in all phases"
        yield origins.problem(("optimizer", "warmup_updates"), message, f"use {num_updates} or fewer")


def unused_teachers(
    parts: ValidParts, weights: Weights, of_phases: Mapping[int, PhaseTeachers], origins: Origins
) -> Iterator[Problem]:
    """Report teachers without prompts. A source without any weight is reported separately."""
    used = {name for w in weights.values() if not any(w.values()) for name in w}
    used.update(name for teachers in of_phases.values() for name in teachers.named)
    if any(parts.unknown_sources(phase) for phase in parts.phases.values()):  # reported separately
        return
    for name in parts.names:
        if name not in used:
            message = f"no prompts are routed to teacher '{name}'"
            yield origins.problem(("teachers", name), message, "route prompts to it, or remove it", key=True)


def experts(
    parts: ValidParts, weights: Weights | None, origins: Origins
) -> tuple[dict[str, str | None], list[Problem]]:
    """Choose the teacher with which each evaluated domain is compared: the named one, else the heaviest.

    None where the recipe names none. A teacher's weight in a domain is the sum of its weights times `share`
    over the domain's training sources. With `weights` None (not all routes are known), only the named ones
    are checked.
    """
    chosen: dict[str, tuple[str, int]] = {}
    problems: list[Problem] = []
    for index, source in parts.eval_sources.items():
        here: Keys = ("evaluation", "prompts", index, "expert")
        if source.expert is None:
            continue
        first = chosen.setdefault(source.domain, (source.expert, index))
        if source.expert not in (*parts.names, NO_EXPERT):
            remedy = did_you_mean(source.expert, parts.names, f"teachers are {', '.join(parts.names)}")
            problems.append(origins.problem(here, f"unknown teacher '{source.expert}'", remedy))
        elif first[0] != source.expert:
            other = dotted(("evaluation", "prompts", first[1]))
            compared = "has no expert" if first[0] == NO_EXPERT else f"is compared with '{first[0]}'"
            message = f"domain '{source.domain}' {compared} at {other}"
            problems.append(origins.problem(here, message, "name one expert for a domain"))
    result = {domain: None if name == NO_EXPERT else name for domain, (name, _) in chosen.items()}
    if NO_EXPERT in parts.names and None in result.values():
        message = f"`expert: {NO_EXPERT}` means no teacher, so no teacher can have this name"
        problems.append(origins.problem(("teachers", NO_EXPERT), message, "give it another name", key=True))
    if weights is None:
        return result, problems
    for index, source in parts.eval_sources.items():
        if source.domain in result:
            continue
        where: Keys = ("evaluation", "prompts", index, "domain")
        best = _heaviest(source.domain, parts.prompts, weights)
        if not best:
            trained = {of.domain for of in parts.prompts.values()}
            remedy = "name the `expert` to compare with, or set `expert: none` to see what the student keeps"
            message = f"no training prompts of domain '{source.domain}', so no teacher to compare with"
            if source.domain in trained:
                message = f"the prompts of domain '{source.domain}' have no teacher to compare with"
            else:
                remedy = did_you_mean(source.domain, trained, remedy)
            problems.append(origins.problem(where, message, remedy))
            continue
        if len(best) > 1:
            message = f"teachers {joined(best, 'and')} weigh the same in domain '{source.domain}'"
            problems.append(origins.problem(where, message, "name the `expert` to compare with"))
        result[source.domain] = best[0]
    return result, problems


def _heaviest(domain: str, train: Mapping[int, TrainSource], weights: Weights) -> list[str]:
    totals: dict[str, float] = {}
    for index, source in train.items():
        if source.domain == domain:
            for name, weight in weights[index].items():
                totals[name] = totals.get(name, 0.0) + weight * source.share
    return [name for name, total in totals.items() if total == max(totals.values())]


def report_problems(report: Reports | None, origins: Origins) -> Iterator[Problem]:
    """Check that the packages of the trackers are installed, without importing them."""
    for index, tracker in enumerate(report.trackers if report is not None else ()):
        if not is_installed(tracker.kind):  # kind, package and extra have one name
            message = f"the package {tracker.kind} is not installed"
            remedy = f"pip install 'mergeopd[{tracker.kind}]', or remove the entry"
            yield origins.problem(("report", "trackers", index), message, remedy)


# The keys of `student.parallel` that only the other backend has, and what this one has for them.
_OTHER_BACKEND = {
    "torch": ("megatron", ("tensor", "pipeline", "context", "expert", "sequence", "layers")),
    "megatron": ("torch", ("data", "shard")),
}
_INSTEAD = {
    "torch": "shard the model with `shard`",
    "megatron": "remove the key: processes beyond `tensor` x `pipeline` x `context` are replicas",
}


def student_problems(student: Student, rollout: AnyRollout | None, origins: Origins) -> Iterator[Problem]:
    """Check that the settings of the backend, and of rollouts from it, are consistent."""
    grid = student.parallel
    here: Keys = ("student", "parallel")
    other, foreign = _OTHER_BACKEND[student.backend]
    for key in foreign:
        if getattr(grid, key) != getattr(Parallel(), key):
            message = f"`{key}` is a setting of `backend: {other}`, and the backend is {student.backend}"
            remedy = f"set `backend: {other}`, or {_INSTEAD[student.backend]}"
            yield origins.problem((*here, key), message, remedy, key=True)
    if student.compile and isinstance(rollout, LocalRollout) and rollout.replay_routes:
        message = "compiled layers would keep the routes of one micro-batch, and `replay_routes` changes them"
        yield origins.problem(("student", "compile"), message, "remove one of the two", key=True)
    if student.backend == "torch":
        return
    for key in ("packing", "compile"):
        if getattr(student, key):
            message = f"`{key}` is a setting of `backend: torch`, and the backend is megatron"
            yield origins.problem(("student", key), message, "remove the key", key=True)
    if isinstance(rollout, LocalRollout) and rollout.gather == "layer":
        message = "`gather: layer` is for students of `backend: torch`, and the backend is megatron"
        yield origins.problem(("rollout", "gather"), message, "remove the key, or use a server", key=True)
    if student.dtype == "float64":
        remedy = "use float32 or bfloat16, or `backend: torch`"
        yield origins.problem(("student", "dtype"), "Megatron's layers do not support float64", remedy)
    if grid.sequence and grid.tensor == 1:
        message = "sequence parallelism splits over the processes of `tensor`, and `tensor` is 1"
        yield origins.problem((*here, "sequence"), message, "raise `tensor`, or remove the key")


def missing_backend(student: Student, origins: Origins) -> Iterator[Problem]:
    """Report packages and devices of the student's backend and kernel that this machine lacks."""
    if student.kernel == "triton":
        yield from _missing_triton(origins)
    if student.backend == "torch":
        return
    here: Keys = ("student", "parallel")
    if not is_installed("megatron.core"):
        message = "the package megatron-core is not installed"
        remedy = "pip install 'mergeopd[megatron]', or use `backend: torch`"
        yield origins.problem(("student", "backend"), message, remedy)
    if student.parallel.layers == "transformer_engine":
        if not has_gpu():
            message = "Transformer Engine's layers need GPUs, and this machine has none"
            remedy = "check and run this recipe on a machine with GPUs, or use `auto` or `local`"
            yield origins.problem((*here, "layers"), message, remedy)
        if not is_installed("transformer_engine"):
            message = "the package transformer-engine is not installed"
            remedy = "pip install 'transformer-engine[pytorch]', or use `auto` or `local`"
            yield origins.problem((*here, "layers"), message, remedy)


def _missing_triton(origins: Origins) -> Iterator[Problem]:
    if not is_installed("triton"):
        message, remedy = (
            "the package triton is not installed",
            "pip install triton, or use `auto` or `torch`",
        )
        yield origins.problem(("student", "kernel"), message, remedy)
    elif not has_gpu() and os.environ.get("TRITON_INTERPRET") != "1":
        message = "Triton's kernels need a GPU, and this machine has none"
        remedy = "use `auto` or `torch`, or set TRITON_INTERPRET=1 for Triton's (slow) interpreter"
        yield origins.problem(("student", "kernel"), message, remedy)


def missing_quantizer(teachers: Mapping[str, TeacherRef], origins: Origins) -> Iterator[Problem]:
    """Report `quantize` where the package that quantises is not installed."""
    for name, teacher in teachers.items():
        if teacher.quantize is not None and not is_installed("torchao"):
            remedy = "pip install 'mergeopd[quantize]', or remove the key"
            message = "the package torchao is not installed"
            yield origins.problem(("teachers", name, "quantize"), message, remedy)


def missing_package(verifier: Verifier) -> tuple[str, str] | None:
    """Return cause and remedy if a verifier needs a package that is not installed."""
    if not isinstance(verifier, MathVerifier) or is_installed("math_verify"):
        return None
    remedy = "pip install 'mergeopd[math]', or name the built-in `number`, which compares single numbers"
    return "the package math-verify is not installed", remedy


def has_gpu() -> bool:
    """Whether the machine has an NVIDIA GPU with a driver. Does not import torch."""
    return any(Path("/dev").glob("nvidia[0-9]*"))


def is_installed(module: str) -> bool:
    """Whether a module can be imported. Only its parent packages are imported to find out.

    A folder of that name without `__init__.py`, such as wandb makes for its runs, is no module.
    """
    try:
        spec = find_spec(module)
        return spec is not None and spec.origin is not None
    except ModuleNotFoundError:
        return False
