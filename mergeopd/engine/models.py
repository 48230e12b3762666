"""The models of a run: student, teachers and their token views, loaded from checked inputs."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType

import torch

from mergeopd.data.renderer import Renderer
from mergeopd.distributed.communicator import Communicator, scatter_gather
from mergeopd.engine.checkpoint import Checkpoints
from mergeopd.loss.cross_tokenizer import Bridge
from mergeopd.loss.kernel_choice import choose_kernel
from mergeopd.models.facts import ModelFacts
from mergeopd.models.residency import Held
from mergeopd.preflight.inputs import Inputs
from mergeopd.preflight.memory import free_bytes, refuse_without_room
from mergeopd.preflight.residency import hold, note, of_teacher, teacher_room
from mergeopd.recipe.plan import Plan, TeacherPlan
from mergeopd.recipe.rollout import LocalRollout
from mergeopd.rollout.local import LocalEngine
from mergeopd.rollout.protocol import EngineContext, ReplicaSource, RolloutEngine
from mergeopd.storage.quantized import Quantization
from mergeopd.storage.run_folder import RunFolder
from mergeopd.student.grid_sizes import GridSizes
from mergeopd.student.layer_options import PassOptions
from mergeopd.student.protocol import Student
from mergeopd.student.shard_grid import ShardGrid
from mergeopd.student.torch import TorchStudent
from mergeopd.teacher.bridges import measure
from mergeopd.teacher.canary import Canary
from mergeopd.teacher.local import LocalTeacher, TeacherSource, TeacherStore
from mergeopd.teacher.protocol import Teacher, capabilities
from mergeopd.teacher.quantized import QuantizedTeacher
from mergeopd.teacher.recorded import RecordedTargets, RecordedTeacher
from mergeopd.teacher.served import ServedModel, ServedTeacher
from mergeopd.teacher.snapshots import StudentSnapshots
from mergeopd.teacher.target_folder import complete_manifest, verify_shards
from mergeopd.teacher.token_view import AlignedTokens, SameTokens, TokenView
from mergeopd.teacher.weight_reader import MappedReader, Reader, ShardedReader

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Machine:
    """The device and the processes of a run."""

    device: torch.device
    ranks: Communicator

    @property
    def shares_pages(self) -> bool:
        """Whether all processes share the pages of mapped files."""
        return self.device.type == "cpu" and len(set(self.ranks.machines)) == 1

    @property
    def is_mapped(self) -> bool:
        """Whether each process reads all of a teacher's bytes: where they share the pages of mapped files."""
        return self.ranks.size == 1 or self.shares_pages


def engine_context(renderer: Renderer, inputs: Inputs, machine: Machine) -> EngineContext:
    return EngineContext(
        eos_ids=renderer.eos_ids,
        tokenizer=renderer.tokenizer,
        device=machine.device,
        seed=inputs.plan.seed,
        deal=partial(scatter_gather, machine.ranks),
        run_on_first=machine.ranks.run_on_first,
    )


@dataclass(frozen=True)
class Models:
    """The models of a run in their roles, with a token view for each teacher."""

    inputs: Inputs
    machine: Machine
    student: Student
    snapshots: StudentSnapshots
    teachers: Mapping[str, Teacher]
    views: Mapping[str, TokenView]

    @property
    def plan(self) -> Plan:
        return self.inputs.plan

    @property
    def notes(self) -> tuple[str, ...]:
        """Remarks on how teachers are held in memory."""
        local = {name: t.held for name, t in self.teachers.items() if isinstance(t, LocalTeacher)}
        return tuple(text for name, one in local.items() if one is not None for text in note(name, one))

    def checkpoints(self) -> Checkpoints:
        folder = RunFolder(Path(self.plan.output)).checkpoints
        return Checkpoints(folder, self.plan, self.student, self.snapshots, self.machine.ranks)


def load_models(
    inputs: Inputs,
    machine: Machine,
    teachers: Mapping[str, Teacher] = MappingProxyType({}),
    announce: Callable[[str], None] = lambda _: None,
) -> Models:
    """Load the student and open the teachers; the processes of a machine divide its threads. Collective.

    `teachers` take the place of the recipe's teachers of these names; `announce` gets what is being built.

    Raises ModelError for checkpoints that do not fit configs, for a student that does not fit the grid or for
    whose unsharded replicas the machine has no memory, and for teachers that do not fit as they are wanted.
    """
    plan = inputs.plan
    divide_threads(plan, machine)
    held = held_teachers(inputs, machine, skip=teachers.keys())
    student = _student(inputs, machine)
    rules = [t.snapshot_rule for t in plan.teachers.values() if t.snapshot_rule is not None]
    snapshots = StudentSnapshots(rules, student.weights, student.master_weights)
    return Models(
        inputs=inputs,
        machine=machine,
        student=student,
        snapshots=snapshots,
        teachers=_recorded(
            {
                **build_teachers(inputs, machine, snapshots, announce, skip=teachers.keys(), held=held),
                **teachers,
            },
            inputs,
            machine,
            announce,
        ),
        views=build_views(inputs, machine, announce),
    )


def _student(inputs: Inputs, machine: Machine) -> Student:
    plan, num_valid = inputs.plan, inputs.vocab_size
    folder, dtype, device = Path(plan.student.model), plan.student.dtype, machine.device
    _log.info("student.kernel: %s", choose_kernel(plan.student.kernel, device.type))
    parallel = plan.student.parallel
    if plan.student.backend == "torch":
        shards = None
        if machine.ranks.size > 1:
            refuse_without_room(plan, device, machine.ranks)
            shards = ShardGrid.open(GridSizes.of(parallel, machine.ranks.size).shard, device)
        layerwise = isinstance(plan.rollout, LocalRollout) and plan.rollout.gather == "layer"
        options = PassOptions(parallel.recompute, plan.student.compile, plan.student.packing, layerwise)
        return TorchStudent(
            folder,
            dtype=dtype,
            num_valid=num_valid,
            optimizer=plan.optimizer,
            device=device,
            kernel=plan.student.kernel,
            grid=shards,
            options=options,
        )
    # Imported here, since Megatron is an extra and changes the process that imports it.
    from mergeopd.student.megatron.grid import Grid
    from mergeopd.student.megatron.step import MegatronStudent

    refuse_without_room(plan, device, machine.ranks)
    grid = Grid.open(
        tensor=parallel.tensor,
        pipeline=parallel.pipeline,
        context=parallel.context,
        expert=parallel.expert,
        sequence_parallel=parallel.sequence,
    )
    return MegatronStudent(
        folder,
        dtype=dtype,
        num_valid=num_valid,
        optimizer=plan.optimizer,
        grid=grid,
        device=device,
        recompute=parallel.recompute,
        layers=parallel.layers,
        kernel=plan.student.kernel,
    )


def held_teachers(inputs: Inputs, machine: Machine, *, skip: Collection[str]) -> dict[str, Held | None]:
    """Decide how the other teachers are held, from the memory that is free before any weights are read.

    It is that of the process that has least, so that all decide the same. Collective. Raises ModelError for a
    teacher that does not fit.
    """
    teachers = {name: teacher for name, teacher in inputs.plan.teachers.items() if name not in skip}
    plan = inputs.plan.model_copy(update={"teachers": teachers})
    ranks, is_cpu = machine.ranks, machine.device.type == "cpu"
    sharers = ranks.num_local if is_cpu else 1
    free = free_bytes(machine.device)
    room = min(ranks.gather(teacher_room(plan, free, sharers=sharers, world=ranks.size, is_cpu=is_cpu)))
    shares_pages = is_cpu and machine.is_mapped
    return {
        name: of_teacher(name, partial(hold, teacher, plan, room, shares_pages=shares_pages))
        for name, teacher in teachers.items()
    }


def build_teachers(
    inputs: Inputs,
    machine: Machine,
    snapshots: StudentSnapshots,
    announce: Callable[[str], None] = lambda _: None,
    *,
    skip: Collection[str],
    held: Mapping[str, Held | None],
) -> dict[str, Teacher]:
    """Build the recipe's teachers, which are `held` so, and whose weights are read by one store. Collective.

    Those that the recipe quantises are converted first, where they are not in the cache; `announce` gets what
    is being done. Raises TeacherError for one that this makes another model.
    """
    plans = {n: t for n, t in inputs.plan.teachers.items() if n not in skip and t.api is None}
    cache = Path(inputs.plan.text_cache)
    sources = {
        name: _source(teacher, inputs, snapshots) for name, teacher in plans.items() if teacher.needs_head
    }
    quantized = {
        name: QuantizedTeacher(plan, inputs.teachers[name], cache, machine.device, announce)
        for name, plan in plans.items()
        if plan.quantize is not None
    }
    measured = {name: _converted(teacher, machine) for name, teacher in quantized.items()}
    sources |= {name: replace(sources[name], model=own.folder) for name, own in quantized.items()}
    reader: Reader = MappedReader() if machine.is_mapped else ShardedReader(machine.ranks)
    store = TeacherStore(sources, machine.device, reader)

    def make_engine(name: str, source: ReplicaSource) -> RolloutEngine:
        context = engine_context(inputs.teachers[name], inputs, machine)
        return LocalEngine(source, context, inputs.plan.rollout.batch_size)

    def make(name: str, teacher: TeacherPlan) -> Teacher:
        canary, run_on_first = Canary.of(teacher, inputs.teachers[name]), machine.ranks.run_on_first
        own = capabilities(teacher)
        if teacher.served is None:
            if name in quantized:
                canary = quantized[name].canary(measured[name])
            return LocalTeacher(
                name,
                store,
                own,
                canary,
                run_on_first,
                partial(make_engine, name),
                held[name],
                machine.ranks.is_first,
                measured.get(name),
            )
        facts = ModelFacts.read(teacher.folder, "any")
        num_valid = num_scored_ids(teacher, inputs)
        model = ServedModel(facts.hidden_size, facts.vocab_rows, num_valid, teacher.dtype)
        head = store if teacher.needs_head else None
        num_ranks = machine.ranks.size
        return ServedTeacher(name, teacher.served, model, own, head, canary, run_on_first, num_ranks)

    return {name: make(name, teacher) for name, teacher in plans.items()}


def _converted(teacher: QuantizedTeacher, machine: Machine) -> Quantization:
    """Convert a teacher on rank 0, then on machines that do not share its cache; measure it. Collective."""
    machine.ranks.run_on_first(teacher.convert)
    machine.ranks.run_and_gather(teacher.convert)
    return machine.ranks.run_on_first(teacher.measure)


def _recorded(
    teachers: Mapping[str, Teacher], inputs: Inputs, machine: Machine, announce: Callable[[str], None]
) -> dict[str, Teacher]:
    """Replace the teachers whose targets the recipe names by these. Collective.

    Raises StorageError for a folder that is not complete, or damaged.
    """
    teachers = dict(teachers)
    for name, plan in inputs.plan.teachers.items():
        if plan.targets is None:
            continue
        folder = Path(plan.targets)
        manifest = complete_manifest(folder)
        announce(f"verifying the targets of {name}, {manifest.num_bytes / 2**30:,.1f} GiB")
        machine.ranks.run_on_first(partial(verify_shards, folder, manifest.shards))
        teachers[name] = RecordedTeacher(teachers[name], RecordedTargets(folder, manifest), machine.device)
    return teachers


def divide_threads(plan: Plan, machine: Machine) -> None:
    torch.set_num_threads(max(1, plan.threads // machine.ranks.num_local))


def _source(teacher: TeacherPlan, inputs: Inputs, snapshots: StudentSnapshots) -> TeacherSource:
    snapshot = None if teacher.snapshot_rule is None else snapshots.snapshots[teacher.snapshot_rule]
    num_valid, has_body = num_scored_ids(teacher, inputs), teacher.served is None
    return TeacherSource(teacher.folder, teacher.dtype, num_valid, snapshot, has_body)


def num_scored_ids(teacher: TeacherPlan, inputs: Inputs) -> int:
    """Number of a teacher's ids that are scored: all with a bridge, else those that the student has."""
    is_crossed = teacher.name in inputs.cross_tokenizers
    return inputs.teachers[teacher.name].vocab_size if is_crossed else inputs.vocab_size


def build_views(inputs: Inputs, machine: Machine, announce: Callable[[str], None]) -> dict[str, TokenView]:
    """Build each teacher's token view; rank 0 builds missing vocabulary maps. Collective."""
    cache, student = Path(inputs.plan.text_cache), inputs.student

    def bridges() -> dict[str, Bridge | None]:
        made = {}
        for name, cross in inputs.cross_tokenizers.items():
            announce(f"vocabulary map of {name}")
            made[name] = measure(cross, cache, machine.device)
        return made

    made: list[dict[str, Bridge | None]] = []
    if inputs.cross_tokenizers:
        machine.ranks.run_on_first(lambda: made.append(bridges()))
        made = made or [bridges()]
    return {
        name: AlignedTokens(inputs.cross_tokenizers[name], student, made[0][name])
        if name in inputs.cross_tokenizers
        else SameTokens(renderer, student)
        for name, renderer in inputs.teachers.items()
    }
