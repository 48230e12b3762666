"""The only composition root: from checked inputs to the parts that a run is made of."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from mergeopd.data.draw import PromptDraw
from mergeopd.engine.canary import Canaries
from mergeopd.engine.dialect import Dialect
from mergeopd.engine.measures import measure
from mergeopd.engine.preflight import Inputs
from mergeopd.engine.room import refuse_without_room
from mergeopd.engine.schedule import RoundWork, round_work
from mergeopd.loss.bridge import Bridge
from mergeopd.loss.heads import Head
from mergeopd.ranks import Ranks
from mergeopd.recipe.plan import Plan, SourcePlan, TeacherPlan
from mergeopd.reward.verifiers import build_verifier
from mergeopd.rollout.local import Writer
from mergeopd.student.backend import Student
from mergeopd.student.torch import TorchStudent
from mergeopd.teacher.cache import HiddenCache
from mergeopd.teacher.node_cache import NodeCache
from mergeopd.teacher.past import Past
from mergeopd.teacher.reading import MappedReader, Reader, ShardedReader
from mergeopd.teacher.store import LoadedTeacher, TeacherSource, TeacherStore
from mergeopd.types import Rollout

Verify = Callable[[str, str | None], float]


def pick_device() -> torch.device:
    """The first GPU where torch sees one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass(frozen=True)
class Parts:
    """Everything a run works with."""

    inputs: Inputs
    device: torch.device
    ranks: Ranks
    student: Student
    store: TeacherStore
    past: Past
    verifiers: Mapping[str, Verify]
    prompt_draw: PromptDraw
    canaries: Canaries
    measures: Mapping[str, Bridge]

    @property
    def plan(self) -> Plan:
        """The resolved recipe."""
        return self.inputs.plan

    def work(self, rollouts: Sequence[Rollout], index: int, num_updates: int) -> RoundWork:
        """Who does what in round number `index`."""
        return round_work(
            rollouts,
            index,
            num_updates=num_updates,
            max_tokens=self.plan.student.micro_batch_tokens,
            members=self.student.place.members,
        )

    def hidden_cache(self, work: RoundWork, spill: Path) -> HiddenCache | NodeCache:
        """What keeps the teachers' hidden states of a round where they will be needed."""
        budget_bytes = int(self.plan.memory.hidden_states_gib * 2**30)
        if self.ranks.size == 1:
            return HiddenCache(budget_bytes, spill)
        readers = self.student.place.readers
        return NodeCache(budget_bytes, spill, self.ranks, lambda i: readers[work.copy_of[i]], self.device)

    def bytes_read(self) -> int:
        """Bytes of teachers brought in so far; pages that processes share count once. Collective."""
        counts = self.ranks.gather(self.store.bytes_read)
        return max(counts) if _shares_pages(self.device, self.ranks) else sum(counts)

    @property
    def head_rows(self) -> range | None:
        """The token ids of which this process needs a teacher's head; None: all."""
        vocab = self.student.vocab
        return None if len(vocab) == self.inputs.vocab_size else vocab

    @contextmanager
    def student_writer(self) -> Iterator[Writer]:
        """The student as it is now, ready to write. Collective."""
        with self.student.whole() as (body, head):
            yield _writer(body, head, self.inputs.student, self.device)

    def teacher_writer(self, teacher: LoadedTeacher) -> Writer:
        """A teacher in its turn, ready to write."""
        head = self.store.heads([teacher.name])[teacher.name]
        return _writer(teacher.body, head, self.inputs.teachers[teacher.name], self.device)


def build(inputs: Inputs, device: torch.device, ranks: Ranks) -> Parts:
    """Load the student and open the teachers; the processes of a machine divide its threads. Collective.

    Raises ModelError for checkpoints that do not fit configs, and for a student that does not fit the grid or
    of which the machine cannot hold the copies that write.
    """
    plan = inputs.plan
    torch.set_num_threads(max(1, plan.threads // ranks.num_local))
    student = _student(inputs, device, ranks)
    rules = [t.moving for t in plan.teachers.values() if t.moving is not None]
    past = Past(rules, student.named_weights, student.named_masters)
    return Parts(
        inputs=inputs,
        device=device,
        ranks=ranks,
        student=student,
        store=TeacherStore(
            {n: _source(t, inputs, past) for n, t in plan.teachers.items()},
            device,
            _reader(device, ranks),
        ),
        past=past,
        verifiers=build_verifiers(plan.sources, plan.allow_code),
        prompt_draw=PromptDraw(inputs.prompts, {s.name: s.share for s in plan.sources}, plan.seed),
        canaries=Canaries(plan, inputs.teachers if ranks.is_first else {}),
        measures=_measures(inputs, device, ranks),
    )


def _student(inputs: Inputs, device: torch.device, ranks: Ranks) -> Student:
    plan, num_valid = inputs.plan, inputs.vocab_size
    folder, dtype = Path(plan.student.model), plan.student.dtype
    if plan.student.backend == "torch":
        return TorchStudent(folder, dtype=dtype, num_valid=num_valid, optimizer=plan.optimizer, device=device)
    # Megatron is an extra, and changes the process it is imported into.
    from mergeopd.student.megatron.grid import Grid
    from mergeopd.student.megatron.step import MegatronStudent

    parallel = plan.student.parallel
    refuse_without_room(plan, device, ranks)
    grid = Grid.open(tensor=parallel.tensor, pipeline=parallel.pipeline, sequence_parallel=parallel.sequence)
    return MegatronStudent(
        folder,
        dtype=dtype,
        num_valid=num_valid,
        optimizer=plan.optimizer,
        grid=grid,
        device=device,
        recompute=parallel.recompute,
        layers=parallel.layers,
    )


def _measures(inputs: Inputs, device: torch.device, ranks: Ranks) -> dict[str, Bridge]:
    """How distributions are compared with those of each teacher with another tokenizer; `span` compares none.

    The first process makes the maps that are not there yet.
    """
    cache = Path(inputs.plan.text_cache)

    def all_of_them() -> dict[str, Bridge]:
        found = {n: measure(crossing, cache, device) for n, crossing in inputs.crossings.items()}
        return {name: one for name, one in found.items() if one is not None}

    if not inputs.crossings:
        return {}
    made: list[dict[str, Bridge]] = []
    ranks.first(lambda: made.append(all_of_them()))
    return made[0] if made else all_of_them()


def _reader(device: torch.device, ranks: Ranks) -> Reader:
    """Each process reads a part of the bytes where several need copies of their own.

    On one machine's CPUs they share the pages of mapped files, so that these are read once as it is.
    """
    is_mapped = ranks.size == 1 or _shares_pages(device, ranks)
    return MappedReader() if is_mapped else ShardedReader(ranks)


def _shares_pages(device: torch.device, ranks: Ranks) -> bool:
    return device.type == "cpu" and len(set(ranks.machines)) == 1


def _source(teacher: TeacherPlan, inputs: Inputs, past: Past) -> TeacherSource:
    follower = None if teacher.moving is None else past.followers[teacher.moving]
    is_crossed = teacher.name in inputs.crossings
    num_valid = inputs.teachers[teacher.name].vocab_size if is_crossed else inputs.vocab_size
    return TeacherSource(Path(teacher.model), teacher.dtype, num_valid, follower)


def build_verifiers(sources: tuple[SourcePlan, ...], allow_code: tuple[str, ...]) -> dict[str, Verify]:
    """Verifiers by source name; sources without one are absent."""
    return {s.name: build_verifier(s.verifier, allow_code) for s in sources if s.verifier is not None}


def _writer(body: torch.nn.Module, head: Head, dialect: Dialect, device: torch.device) -> Writer:
    return Writer(body, head, dialect.eos_ids, dialect.tokenizer, device)
