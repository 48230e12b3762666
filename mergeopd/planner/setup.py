"""The run that is estimated: its plan, models, hardware, grid and work."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache, cached_property
from math import prod
from pathlib import Path

from mergeopd.errors import ModelError
from mergeopd.models.facts import ModelFacts
from mergeopd.planner.profile import Hardware
from mergeopd.planner.shapes import ITEMSIZE, ModelShape
from mergeopd.planner.workload import PhaseWork, TextLengths, phase_work
from mergeopd.recipe.plan import Plan, TeacherPlan
from mergeopd.reporting.estimate import Grid
from mergeopd.student.megatron.architecture import Architecture
from mergeopd.student.megatron.layout import OUTPUT, parameter_names, shard, tensor_shapes


@dataclass(frozen=True)
class Setup:
    """A run to estimate. `lengths` has the sources' text lengths by phase; `shapes` all models by name.

    `num_prompts` are those of the sources whose files are here.
    """

    plan: Plan
    student: ModelShape
    shapes: Mapping[str, ModelShape]
    lengths: Mapping[str, Mapping[str, TextLengths]]
    hardware: Hardware
    num_prompts: Mapping[str, int]

    @cached_property
    def phases(self) -> tuple[PhaseWork, ...]:
        plan = self.plan
        return tuple(
            phase_work(plan, phase, self.lengths[phase.name], self.num_prompts) for phase in plan.phases
        )

    @property
    def dtype(self) -> str:
        return self.plan.student.dtype

    @property
    def itemsize(self) -> int:
        return ITEMSIZE[self.dtype]

    @property
    def is_megatron(self) -> bool:
        return self.plan.student.backend == "megatron"

    @property
    def grid(self) -> Grid:
        parallel, world = self.plan.student.parallel, self.world
        data = world // parallel.replica_size
        return Grid(parallel.tensor, parallel.pipeline, data, parallel.context, parallel.expert)

    @property
    def world(self) -> int:
        """Processes of the run."""
        return self.hardware.num_devices if self.is_megatron else 1

    @property
    def micro_batch_tokens(self) -> int:
        return self.plan.student.micro_batch_tokens

    @property
    def needs_replica(self) -> bool:
        """Whether each rank of a grid has the whole student while it generates."""
        return self.is_megatron and self.plan.rollout.capabilities.needs_replica

    @property
    def shares_pages(self) -> bool:
        """Whether the processes read teachers through shared pages of mapped files."""
        return self.world == 1 or (self.hardware.profile.is_cpu and self.hardware.num_machines == 1)

    def changed(self, *, num_devices: int | None = None, **student: object) -> Setup:
        """Return the run with other settings of the student (`parallel` as a whole), or more devices."""
        own = self.plan.student.model_copy(update=student)
        hardware = self.hardware if num_devices is None else self.hardware.with_devices(num_devices)
        return replace(self, plan=self.plan.model_copy(update={"student": own}), hardware=hardware)

    def with_teachers(self, dtypes: Mapping[str, str]) -> Setup:
        """Return the run with other dtypes of teachers."""
        teachers = dict(self.plan.teachers)
        for name, dtype in dtypes.items():
            teachers[name] = teachers[name].model_copy(update={"dtype": dtype})
        return replace(self, plan=self.plan.model_copy(update={"teachers": teachers}))

    def with_streamed(self, names: Iterable[str]) -> Setup:
        """Return the run with these teachers streamed, as their cards could say."""
        teachers = dict(self.plan.teachers)
        for name in names:
            teachers[name] = teachers[name].model_copy(update={"residency": "stream"})
        return replace(self, plan=self.plan.model_copy(update={"teachers": teachers}))

    def with_teacher_gib(self, gib: float) -> Setup:
        """Return the run with another limit on the memory of a teacher's pass."""
        memory = self.plan.memory.model_copy(update={"teacher_gib": gib})
        return replace(self, plan=self.plan.model_copy(update={"memory": memory}))

    def with_batch(self, size: int) -> Setup:
        """Return the run with other batches of decoding."""
        rollout = self.plan.rollout.model_copy(update={"batch_size": size})
        return replace(self, plan=self.plan.model_copy(update={"rollout": rollout}))

    def stage_weights(self, stage: int) -> int:
        """Return the parameters that a rank of a pipeline stage holds, padding included."""
        grid, arch = self.grid, self.architecture
        if not self.is_megatron:
            return self.student.parameters
        if arch is None:
            return -(-self.student.parameters // (grid.tensor * grid.pipeline))
        return shard_weights(arch, grid.tensor, grid.pipeline, grid.expert, stage)

    def state_weights(self, stage: int) -> float:
        """Return the parameters whose optimizer state is on a rank of a pipeline stage."""
        grid, arch, weights = self.grid, self.architecture, self.stage_weights(stage)
        if not self.is_megatron:
            return weights
        if arch is None or arch.experts is None:
            return weights / grid.holders
        common = shard_weights(arch, grid.tensor, grid.pipeline, None, stage)
        return common / grid.holders + (weights - common) * grid.expert / (grid.tensor * grid.holders)

    @property
    def architecture(self) -> Architecture | None:
        """The student's sizes for Megatron; None if it is not mapped."""
        return _architecture(self.plan.student.model)

    def teacher(self, name: str) -> TeacherPlan:
        return self.plan.teachers[name]

    @property
    def loaded_teachers(self) -> tuple[str, ...]:
        """Teachers whose weights this run reads for passes: not served, recorded or behind an API."""
        return tuple(name for name in self.shapes if self.is_loaded(name))

    @property
    def read_teachers(self) -> tuple[str, ...]:
        """Those whose weights are read from files: not snapshots of the student."""
        return tuple(n for n in self.loaded_teachers if self.plan.teachers[n].snapshot_rule is None)

    def is_loaded(self, name: str) -> bool:
        teacher = self.plan.teachers[name]
        return teacher.api is None and teacher.served is None and teacher.targets is None


@cache
def _architecture(folder: str) -> Architecture | None:
    try:
        return Architecture.read(ModelFacts.read(Path(folder)))
    except ModelError:
        return None


@cache
def shard_weights(arch: Architecture, tensor: int, pipeline: int, expert: int | None, stage: int) -> int:
    """Return the parameters of the first rank of a stage, from the layout of its shards.

    `expert` ranks divide the experts; with None, these are left out.
    """
    shapes, names = tensor_shapes(arch), list(parameter_names(arch, stage, pipeline, range(0)))
    if arch.facts.tied and stage == pipeline - 1 and stage > 0:
        names.append(OUTPUT)
    total = 0
    if arch.experts is not None and expert is not None:
        per_stage = arch.facts.num_layers // pipeline
        layers = arch.experts.layers & set(range(stage * per_stage, (stage + 1) * per_stage))
        total += len(layers) * arch.experts.count // expert * 3 * arch.experts.size * arch.facts.hidden_size
    for name in names:
        part = shard(name, arch, tensor, 0)
        shape = shapes[part.slices[0].tensor]
        total += part.size * prod(size for dim, size in enumerate(shape) if dim != part.dim)
    return total
