"""The composition root: builds a run from checked inputs, and passes each stage what it uses."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from mergeopd.alarms.watch import AlarmWatch
from mergeopd.data.draw import PhasedDraw, PhaseShares
from mergeopd.data.renderer import Renderer
from mergeopd.distributed.communicator import Communicator, scatter_gather
from mergeopd.engine.checkpoint import Checkpoints
from mergeopd.engine.clock import Clock
from mergeopd.engine.evaluate import Evaluation, InterimEvaluation
from mergeopd.engine.interrupt import Interrupt, StopGuard
from mergeopd.engine.loop import Trainer
from mergeopd.engine.pipeline import SynchronousPipeline
from mergeopd.engine.prior_policy import PriorPolicy
from mergeopd.engine.rollouts import Rewards, StudentRollouts
from mergeopd.engine.schedule import RoundSchedule
from mergeopd.engine.score import Scorer
from mergeopd.engine.stages import Stages
from mergeopd.engine.teacher_rollouts import TeacherRolloutCache
from mergeopd.engine.update import Updater
from mergeopd.environment.episodes import Environments
from mergeopd.loss.cross_tokenizer import Bridge
from mergeopd.loss.heads import Head
from mergeopd.models import static_merges
from mergeopd.models.facts import ModelFacts
from mergeopd.models.flops import ModelFlops, TrainingFlops
from mergeopd.models.hf_folder import write_turns
from mergeopd.models.static_merges import MergeTensors, static_merge
from mergeopd.preflight.inputs import Inputs
from mergeopd.preflight.memory import peak_bytes, refuse_without_room
from mergeopd.recipe import baselines
from mergeopd.recipe.baselines import StaticMerge
from mergeopd.recipe.plan import EvaluationPlan, Plan, SourcePlan, TeacherPlan
from mergeopd.recipe.verifiers import RewardModelVerifier
from mergeopd.reporting.events import Reporter
from mergeopd.reporting.model_card import write_recipe
from mergeopd.reward.grading import Verifiers
from mergeopd.rollout.local import FixedWeights, LocalEngine
from mergeopd.rollout.protocol import EngineContext, RolloutEngine, WeightSource
from mergeopd.storage.run_folder import RunFolder
from mergeopd.student.protocol import Student
from mergeopd.student.torch import TorchStudent
from mergeopd.teacher.bridges import measure
from mergeopd.teacher.canary import Canary
from mergeopd.teacher.hidden_cache import HiddenCache
from mergeopd.teacher.local import LocalTeacher, ResidentHeads, TeacherSource, TeacherStore
from mergeopd.teacher.protocol import Teacher, capabilities
from mergeopd.teacher.reward_model import RewardModel, RewardModels
from mergeopd.teacher.served import ServedModel, ServedTeacher
from mergeopd.teacher.shared_cache import SharedHiddenCache
from mergeopd.teacher.snapshots import StudentSnapshots
from mergeopd.teacher.token_view import AlignedTokens, SameTokens, TokenView
from mergeopd.teacher.weight_reader import MappedReader, Reader, ShardedReader


@dataclass(frozen=True)
class Machine:
    """The device and the processes of a run."""

    device: torch.device
    ranks: Communicator

    @property
    def shares_pages(self) -> bool:
        """Whether all processes share the pages of mapped files."""
        return self.device.type == "cpu" and len(set(self.ranks.machines)) == 1


MakeEngine = Callable[[WeightSource, EngineContext, Any], RolloutEngine]

ENGINES: Mapping[str, MakeEngine] = MappingProxyType(
    {"local": lambda source, context, settings: LocalEngine(source, context, settings.batch_size)}
)
"""Engines that generate the student's responses, by `rollout.engine`; they get that section of the recipe."""


def _context(renderer: Renderer, inputs: Inputs, machine: Machine) -> EngineContext:
    return EngineContext(
        eos_ids=renderer.eos_ids,
        tokenizer=renderer.tokenizer,
        device=machine.device,
        seed=inputs.plan.seed,
        deal=partial(scatter_gather, machine.ranks),
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

    Raises ModelError for checkpoints that do not fit configs, and for a student that does not fit the grid or
    for whose unsharded replicas the machine has no memory.
    """
    plan = inputs.plan
    torch.set_num_threads(max(1, plan.threads // machine.ranks.num_local))
    student = _student(inputs, machine)
    rules = [t.snapshot_rule for t in plan.teachers.values() if t.snapshot_rule is not None]
    snapshots = StudentSnapshots(rules, student.weights, student.master_weights)
    return Models(
        inputs=inputs,
        machine=machine,
        student=student,
        snapshots=snapshots,
        teachers={**_teachers(inputs, machine, snapshots, skip=teachers.keys()), **teachers},
        views=_views(inputs, machine, announce),
    )


def build(
    models: Models,
    *,
    reporter: Reporter,
    clock: Clock,
    interrupt: Interrupt,
    engines: Mapping[str, MakeEngine] = ENGINES,
) -> Trainer:
    """Compose a run. `engines` are the rollout engines that a recipe can name."""
    inputs, machine, student = models.inputs, models.machine, models.student
    plan, ranks, teachers, views = models.plan, machine.ranks, models.teachers, models.views
    guard = StopGuard(interrupt, ranks)
    alarms = AlarmWatch(plan, inputs.overlap, reporter)
    stages = Stages(alarms, clock, ranks, guard)
    engine = engines[plan.rollout.engine](student, _context(inputs.student, inputs, machine), plan.rollout)
    vocab = None if len(student.vocab) == inputs.vocab_size else student.vocab
    folder = RunFolder(Path(plan.output))
    scorer = Scorer(
        needs_prior_policy=plan.needs_prior_policy,
        max_tokens=plan.student.micro_batch_tokens,
        teachers=teachers,
        views=views,
        heads=ResidentHeads(teachers, vocab),
        prior_policy=PriorPolicy(student, machine.device, stages),
        make_cache=partial(_make_cache, inputs, machine, student, folder.spill),
        stages=stages,
    )
    updater = Updater(
        plan,
        student=student,
        tokenizer=inputs.student.tokenizer,
        vocab_size=inputs.vocab_size,
        device=machine.device,
        bytes_read=partial(_bytes_read, teachers, machine),
        peak_memory=lambda: max(ranks.gather(peak_bytes(machine.device))),
        flops=TrainingFlops(
            ModelFlops.read(Path(plan.student.model)),
            {n: ModelFlops.read(Path(t.model)) for n, t in plan.teachers.items() if t.served is None},
        ),
        stages=stages,
    )
    return Trainer(
        plan=plan,
        folder=folder,
        student=student,
        snapshots=models.snapshots,
        pipeline=_pipeline(models, engine, stages),
        scorer=scorer,
        updater=updater,
        checkpoints=models.checkpoints(),
        evaluate=None
        if plan.evaluation is None
        else build_evaluation(inputs, plan.evaluation, machine, stages).run,
        interim=_interim(inputs, engine, machine, stages),
        write_turns=partial(_write_turns, inputs),
        stop=guard,
        alarms=alarms,
        stages=stages,
    )


def _pipeline(models: Models, engine: RolloutEngine, stages: Stages) -> SynchronousPipeline:
    inputs, student = models.inputs, models.student
    plan, ranks = models.plan, models.machine.ranks
    environments = build_environments(plan.sources, plan, ranks)
    return SynchronousPipeline(
        plan,
        draw=PhasedDraw(
            inputs.prompts,
            {phase.name: PhaseShares(plan.shares(phase), phase.num_prompts) for phase in plan.phases},
            plan.seed,
        ),
        model=student,
        renderer=inputs.student,
        rollouts=StudentRollouts(
            engine,
            max(plan.rollout_of(phase).samples_per_prompt for phase in plan.phases),
            inputs.student,
            environments,
            stages,
        ),
        teacher_rollouts=TeacherRolloutCache(
            plan,
            student=inputs.student,
            renderers=inputs.teachers,
            teachers=models.teachers,
            views=models.views,
            environments=environments,
            stages=stages,
        ),
        rewards=Rewards(
            build_verifiers(plan.sources, inputs, models.machine),
            inputs.student.tokenizer,
            stages,
        ),
        stages=stages,
    )


def build_evaluation(inputs: Inputs, plan: EvaluationPlan, machine: Machine, stages: Stages) -> Evaluation:
    def engine(source: WeightSource, renderer: Renderer) -> RolloutEngine:
        return LocalEngine(source, _context(renderer, inputs, machine), plan.batch_size)

    @contextmanager
    def open_model(folder: Path, renderer: Renderer) -> Iterator[RolloutEngine]:
        source = TeacherSource(folder, inputs.plan.student.dtype, renderer.vocab_size)
        store = TeacherStore({"model": source}, machine.device)
        with store.open("model") as model:
            head = store.head("model")
            yield engine(FixedWeights(model.body, lambda: head), renderer)

    @contextmanager
    def open_merge(settings: StaticMerge, base: Path, experts: Sequence[Path]) -> Iterator[RolloutEngine]:
        facts, merge = ModelFacts.read(base), _static_merge(settings, inputs.plan.seed)
        model = static_merge(base, experts, inputs.vocab_size, machine.device, merge)
        head = Head(
            weight=model.get_parameter(facts.embedding_name if facts.tied else facts.head_name),
            bias=model.get_parameter(facts.head_bias_name) if facts.head_bias_name else None,
            scale=facts.logit_scale,
            softcap=facts.softcap,
            num_valid=inputs.student.vocab_size,
        )
        yield engine(FixedWeights(model.base_model, lambda: head), inputs.student)

    return Evaluation(
        inputs,
        plan,
        open_model=open_model,
        open_merge=open_merge,
        verifiers=build_verifiers(plan.sources, inputs, machine),
        environments=build_environments(plan.sources, inputs.plan, machine.ranks),
        stages=stages,
    )


def _interim(
    inputs: Inputs, engine: RolloutEngine, machine: Machine, stages: Stages
) -> InterimEvaluation | None:
    plan = inputs.plan
    if plan.evaluation is None or plan.evaluation.interim is None:
        return None
    return InterimEvaluation(
        inputs,
        plan.evaluation,
        plan.evaluation.interim,
        plan.checkpoint.best,
        engine=engine,
        verifiers=build_verifiers(plan.evaluation.sources, inputs, machine),
        environments=build_environments(plan.evaluation.sources, plan, machine.ranks),
        stages=stages,
    )


def _static_merge(settings: StaticMerge, seed: int) -> MergeTensors:
    match settings:
        case baselines.WeightAverage():
            return static_merges.weight_average()
        case baselines.TaskArithmetic(scale=scale):
            return static_merges.task_arithmetic(scale)
        case baselines.Ties(density=density, scale=scale):
            return static_merges.ties(density, scale)
        case baselines.Dare(density=density, scale=scale):
            return static_merges.dare(density, scale, seed)
        case baselines.Slerp():
            return static_merges.slerp()


def build_verifiers(sources: Sequence[SourcePlan], inputs: Inputs, machine: Machine) -> Verifiers:
    """Build the verifiers of these sources; the processes of a machine divide its cores."""
    specs = {s.name: s.verifier for s in sources if s.verifier is not None}
    models = {
        s.name: RewardModel(Path(s.reward_model.model), inputs.reward_models[s.name], s.verifier)
        for s in sources
        if s.reward_model is not None and isinstance(s.verifier, RewardModelVerifier)
    }
    num_workers = inputs.plan.threads // machine.ranks.num_local
    score = RewardModels(models, machine.device).grade
    return Verifiers(specs, inputs.plan.allow_code, num_workers, score)


def build_environments(sources: Sequence[SourcePlan], plan: Plan, ranks: Communicator) -> Environments:
    """Build the environments of these sources; the first process runs them with all of its threads."""
    settings = {s.name: s.environment for s in sources if s.environment is not None}
    return Environments.of(settings, plan.allow_code, plan.threads // ranks.num_local, ranks)


def _write_turns(inputs: Inputs, folder: Path) -> None:
    """Write the student's end tokens, the recipe's chat template, and the recipe into an exported folder."""
    write_recipe(folder, inputs.document, inputs.plan.hash)
    student, own = inputs.student, inputs.plan.student.template
    write_turns(folder, student.eos_ids, None if own is None else student.template.source)


def _student(inputs: Inputs, machine: Machine) -> Student:
    plan, num_valid = inputs.plan, inputs.vocab_size
    folder, dtype, device = Path(plan.student.model), plan.student.dtype, machine.device
    if plan.student.backend == "torch":
        return TorchStudent(folder, dtype=dtype, num_valid=num_valid, optimizer=plan.optimizer, device=device)
    # Imported here, since Megatron is an extra and changes the process that imports it.
    from mergeopd.student.megatron.grid import Grid
    from mergeopd.student.megatron.step import MegatronStudent

    parallel = plan.student.parallel
    refuse_without_room(plan, device, machine.ranks)
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


def _teachers(
    inputs: Inputs, machine: Machine, snapshots: StudentSnapshots, *, skip: Collection[str]
) -> dict[str, Teacher]:
    """Build the recipe's teachers, whose weights are read by one store."""
    plans = {name: teacher for name, teacher in inputs.plan.teachers.items() if name not in skip}
    sources = {
        name: _source(teacher, inputs, snapshots) for name, teacher in plans.items() if teacher.needs_head
    }
    # Each process reads a part of the bytes if several need their own copies. On one machine's CPUs, they
    # share the pages of mapped files, so each file is read once anyway.
    is_mapped = machine.ranks.size == 1 or machine.shares_pages
    reader: Reader = MappedReader() if is_mapped else ShardedReader(machine.ranks)
    store = TeacherStore(sources, machine.device, reader)

    def make_engine(name: str, source: WeightSource) -> RolloutEngine:
        context = _context(inputs.teachers[name], inputs, machine)
        return LocalEngine(source, context, inputs.plan.rollout.batch_size)

    def make(name: str, teacher: TeacherPlan) -> Teacher:
        canary, run_on_first = Canary.of(teacher, inputs.teachers[name]), machine.ranks.run_on_first
        own = capabilities(teacher)
        if teacher.served is None:
            return LocalTeacher(name, store, own, canary, run_on_first, partial(make_engine, name))
        facts = ModelFacts.read(Path(teacher.model))
        num_valid = _num_valid(teacher, inputs)
        model = ServedModel(facts.hidden_size, facts.vocab_rows, num_valid, teacher.dtype)
        head = store if teacher.needs_head else None
        num_ranks = machine.ranks.size
        return ServedTeacher(name, teacher.served, model, own, head, canary, run_on_first, num_ranks)

    return {name: make(name, teacher) for name, teacher in plans.items()}


def _source(teacher: TeacherPlan, inputs: Inputs, snapshots: StudentSnapshots) -> TeacherSource:
    snapshot = None if teacher.snapshot_rule is None else snapshots.snapshots[teacher.snapshot_rule]
    num_valid, has_body = _num_valid(teacher, inputs), teacher.served is None
    return TeacherSource(Path(teacher.model), teacher.dtype, num_valid, snapshot, has_body)


def _num_valid(teacher: TeacherPlan, inputs: Inputs) -> int:
    """Number of a teacher's ids that are scored: all with a bridge, else those that the student has."""
    is_crossed = teacher.name in inputs.cross_tokenizers
    return inputs.teachers[teacher.name].vocab_size if is_crossed else inputs.vocab_size


def _views(inputs: Inputs, machine: Machine, announce: Callable[[str], None]) -> dict[str, TokenView]:
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


def _make_cache(
    inputs: Inputs, machine: Machine, student: Student, spill: Path, work: RoundSchedule
) -> AbstractContextManager[HiddenCache]:
    budget_bytes = int(inputs.plan.memory.hidden_states_gib * 2**30)
    loss_ranks = student.placement.loss_ranks
    if machine.ranks.size == 1:
        return HiddenCache(budget_bytes, spill, machine.device)
    return SharedHiddenCache(
        budget_bytes, spill, machine.ranks, lambda i: loss_ranks[work.copy_of[i]], machine.device
    )


def _bytes_read(teachers: Mapping[str, Teacher], machine: Machine) -> int:
    """Return the bytes of teachers read so far; shared pages count once. Collective."""
    counts = machine.ranks.gather(sum(teacher.bytes_read for teacher in teachers.values()))
    return max(counts) if machine.shares_pages else sum(counts)
