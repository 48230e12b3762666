"""Decide which local teachers are held whole and which are streamed, from sizes alone. No torch."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

from mergeopd.config.tree import Keys
from mergeopd.errors import ModelError
from mergeopd.models.checkpoint import Checkpoint
from mergeopd.models.facts import ModelFacts
from mergeopd.models.residency import ITEMSIZE, BodySizes, Held, gib, held
from mergeopd.preflight.memory import free_host_bytes, student_bytes
from mergeopd.preflight.problems import Findings
from mergeopd.recipe.plan import Plan, TeacherPlan
from mergeopd.recipe.training import reads_dataset

# Share of the free memory that is planned with: activations of the update and fragments come on top.
FREE_SHARE = 0.9
_GPUS = Path("/proc/driver/nvidia/gpus")


def teacher_room(plan: Plan, free_bytes: int, *, sharers: int, world: int, is_cpu: bool) -> int:
    """Return the memory that a process may use for a local teacher's pass.

    `free_bytes` are those of the device, before the student is loaded, which `sharers` processes share.
    """
    if plan.memory.teacher_gib is not None:
        return int(plan.memory.teacher_gib * 2**30)
    used = sum(student_bytes(plan, world, on_gpu=not is_cpu).values())
    used += cache_bytes(plan, _hidden_widths(plan)) if is_cpu else 0
    return max(0, int(FREE_SHARE * free_bytes / sharers - used))


def hold(teacher: TeacherPlan, plan: Plan, room_bytes: int, *, shares_pages: bool) -> Held | None:
    """Decide how a teacher is held; None for one whose weights this process does not read.

    `shares_pages`: the processes read mapped files, so that a body whose files have the precision of
    computation needs no memory of its own.

    Raises ModelError when that does not fit.
    """
    if not is_loaded(teacher) or teacher.snapshot_rule is not None:
        return None
    facts, checkpoint = ModelFacts.read(teacher.folder, "readable"), Checkpoint.open(teacher.folder)
    sizes = BodySizes.of(facts, checkpoint, teacher.dtype, quantize=teacher.quantize is not None)
    is_mapped = shares_pages and not sizes.is_copied
    tokens, is_strict = plan.student.micro_batch_tokens, plan.memory.teacher_gib is not None
    return held(teacher.residency, sizes, tokens, room_bytes, is_mapped=is_mapped, is_strict=is_strict)


def is_loaded(teacher: TeacherPlan) -> bool:
    """Whether this process reads a teacher's body for its passes."""
    return teacher.api is None and teacher.served is None and teacher.targets is None


def check_residency(findings: Findings, plan: Plan, names: Collection[str]) -> None:
    """Report those of these teachers that do not fit into `memory.teacher_gib` as their cards want.

    Without that limit, a run decides by the memory of its own devices, before it reads weights.
    """
    if plan.memory.teacher_gib is None:
        return
    room = int(plan.memory.teacher_gib * 2**30)
    for name in names:
        teacher = plan.teachers[name]
        place: Keys = ("memory", "teacher_gib")
        if teacher.residency != "auto":
            place = ("teachers", name, "card", "residency")
        decide = partial(hold, teacher, plan, room, shares_pages=True)
        findings.attempt(place, lambda name=name, decide=decide: of_teacher(name, decide))  # type: ignore[misc]


def of_teacher(name: str, decide: Callable[[], Held | None]) -> Held | None:
    """Return the decision for a teacher. Raises ModelError with its name."""
    try:
        return decide()
    except ModelError as error:
        raise ModelError(f"teacher '{name}': {error}") from error


def residency_notes(plan: Plan) -> Iterator[str]:
    """Yield a note for each teacher that a run on this machine streams.

    None where the machine has a GPU, whose memory the run asks for, or cannot train the student.
    """
    if _GPUS.exists() and plan.memory.teacher_gib is None:
        return
    parallel = plan.student.parallel
    ranks = parallel.tensor * parallel.pipeline
    room = teacher_room(plan, free_host_bytes(), sharers=ranks, world=ranks, is_cpu=True)
    for name, teacher in plan.teachers.items() if room else ():
        with suppress(ModelError):
            yield from note(name, hold(teacher, plan, room, shares_pages=True), " on this machine")


def note(name: str, decision: Held | None, where: str = "") -> Iterator[str]:
    """Yield the note for a teacher if it is streamed."""
    if decision is not None and decision.pass_tokens is not None:
        yield (
            f"teacher '{name}' is streamed layer by layer{where}: {decision.reason}; passes of up to "
            f"{decision.pass_tokens:,} tokens within {gib(decision.num_bytes)}"
        )


def _hidden_widths(plan: Plan) -> list[int]:
    """Return the bytes of a token's hidden state, of each teacher whose head the loss uses."""
    return [
        ModelFacts.read(teacher.folder, "any").hidden_size * ITEMSIZE[teacher.dtype]
        for teacher in plan.teachers.values()
        if teacher.api is None and teacher.needs_head
    ]


def cache_bytes(plan: Plan, widths: Sequence[int]) -> float:
    """Return the most main memory that the hidden states of a round take; `widths` are bytes of a token."""
    limit = plan.memory.hidden_states_gib * 2**30
    if not widths or any(reads_dataset(phase) for phase in plan.phases):
        return limit if widths else 0.0
    rounds = [
        phase.prompts_per_round * rollout.samples_per_prompt * rollout.max_new_tokens
        for phase, rollout in ((phase, plan.rollout_of(phase)) for phase in plan.phases)
    ]
    return min(limit, float(max(rounds, default=0) * sum(widths)))
