"""The only composition root: from checked inputs to the parts that a run is made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from mergeopd.data.draw import PromptDraw
from mergeopd.engine.canary import Canaries
from mergeopd.engine.dialect import Dialect
from mergeopd.engine.preflight import Inputs
from mergeopd.loss.heads import Head
from mergeopd.recipe.plan import Plan, SourcePlan, TeacherPlan
from mergeopd.reward.verifiers import build_verifier
from mergeopd.rollout.local import Writer
from mergeopd.student.torch import TorchStudent
from mergeopd.teacher.past import Past
from mergeopd.teacher.store import LoadedTeacher, TeacherSource, TeacherStore

Verify = Callable[[str, str | None], float]


def pick_device() -> torch.device:
    """The first GPU where torch sees one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass(frozen=True)
class Parts:
    """Everything a run works with."""

    inputs: Inputs
    device: torch.device
    student: TorchStudent
    store: TeacherStore
    past: Past
    verifiers: Mapping[str, Verify]
    prompt_draw: PromptDraw
    canaries: Canaries

    @property
    def plan(self) -> Plan:
        """The resolved recipe."""
        return self.inputs.plan

    def student_writer(self) -> Writer:
        """The student as it is now, ready to write."""
        return _writer(self.student.body, self.student.head, self.inputs.student, self.device)

    def teacher_writer(self, teacher: LoadedTeacher) -> Writer:
        """A teacher in its turn, ready to write."""
        head = self.store.heads([teacher.name])[teacher.name]
        return _writer(teacher.body, head, self.inputs.teachers[teacher.name], self.device)


def build(inputs: Inputs, device: torch.device) -> Parts:
    """Load the student and open the teachers. Raises ModelError for checkpoints that do not fit configs."""
    plan = inputs.plan
    torch.set_num_threads(plan.threads)
    student = TorchStudent(
        Path(plan.student.model),
        dtype=plan.student.dtype,
        num_valid=inputs.student.tokenizer.vocab_size,
        optimizer=plan.optimizer,
        device=device,
    )
    rules = [t.moving for t in plan.teachers.values() if t.moving is not None]
    past = Past(rules, student.weights, student.master_weights)
    return Parts(
        inputs=inputs,
        device=device,
        student=student,
        store=TeacherStore(
            {n: _source(t, inputs.teachers[n], past) for n, t in plan.teachers.items()}, device
        ),
        past=past,
        verifiers=build_verifiers(plan.sources, plan.allow_code),
        prompt_draw=PromptDraw(inputs.prompts, {s.name: s.share for s in plan.sources}, plan.seed),
        canaries=Canaries(plan, inputs.teachers),
    )


def _source(teacher: TeacherPlan, dialect: Dialect, past: Past) -> TeacherSource:
    follower = None if teacher.moving is None else past.followers[teacher.moving]
    return TeacherSource(Path(teacher.model), teacher.dtype, dialect.tokenizer.vocab_size, follower)


def build_verifiers(sources: tuple[SourcePlan, ...], allow_code: tuple[str, ...]) -> dict[str, Verify]:
    """Verifiers by source name; sources without one are absent."""
    return {s.name: build_verifier(s.verifier, allow_code) for s in sources if s.verifier is not None}


def _writer(body: torch.nn.Module, head: Head, dialect: Dialect, device: torch.device) -> Writer:
    return Writer(body, head, dialect.eos_ids, dialect.tokenizer.decode, device)
