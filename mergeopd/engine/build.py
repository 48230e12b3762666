"""The composition root: builds a run from checked inputs, and passes each stage what it uses."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mergeopd.alarms.watch import AlarmWatch
from mergeopd.data.draw import PhasedDraw, PhaseShares
from mergeopd.data.renderer import Renderer
from mergeopd.distributed.communicator import Communicator, SingleProcess
from mergeopd.engine.clock import Clock
from mergeopd.engine.engines import MakeEngine, engines_of
from mergeopd.engine.evaluate import Evaluation, InterimEvaluation
from mergeopd.engine.interrupt import Interrupt, StopGuard
from mergeopd.engine.loop import Trainer
from mergeopd.engine.models import (
    Machine,
    Models,
    build_teachers,
    build_views,
    divide_threads,
    engine_context,
    held_teachers,
    num_scored_ids,
)
from mergeopd.engine.pipeline import AheadPipeline, Background, ProgressCounter, SynchronousPipeline
from mergeopd.engine.prior_policy import PriorPolicy
from mergeopd.engine.rollouts import Rewards, StudentRollouts
from mergeopd.engine.schedule import RoundSchedule, schedule_round
from mergeopd.engine.score import Scorer
from mergeopd.engine.selection import PromptSelection
from mergeopd.engine.stages import Stages
from mergeopd.engine.targets import TargetRecorder, read_by
from mergeopd.engine.teacher_rollouts import FixedText, TeacherRolloutCache
from mergeopd.engine.update import Updater
from mergeopd.environment.episodes import Environments
from mergeopd.errors import TeacherError
from mergeopd.loss.heads import Head
from mergeopd.models import static_merges
from mergeopd.models.causal import DTYPES
from mergeopd.models.facts import ModelFacts
from mergeopd.models.flops import ModelFlops, TrainingFlops
from mergeopd.models.hf_folder import write_turns
from mergeopd.models.static_merges import MergeTensors, static_merge
from mergeopd.preflight.inputs import Inputs
from mergeopd.preflight.memory import peak_bytes
from mergeopd.recipe import baselines
from mergeopd.recipe.baselines import StaticMerge
from mergeopd.recipe.plan import EvaluationPlan, Plan, SourcePlan, TeacherPlan
from mergeopd.recipe.rollout import AnyServerRollout
from mergeopd.recipe.verifiers import RewardModelVerifier
from mergeopd.reporting.events import Reporter
from mergeopd.reporting.model_card import write_recipe
from mergeopd.reward.grading import Verifiers
from mergeopd.rollout.local import FixedWeights, LocalEngine
from mergeopd.rollout.protocol import ReplicaSource, RolloutEngine
from mergeopd.rollout.served import ServedEngine
from mergeopd.storage.run_folder import RunFolder
from mergeopd.student.protocol import Student
from mergeopd.teacher.api import ApiTeacher
from mergeopd.teacher.hidden_cache import HiddenCache
from mergeopd.teacher.local import ResidentHeads, TeacherSource, TeacherStore
from mergeopd.teacher.protocol import TargetSpec, Teacher, TeacherSequence, required_of
from mergeopd.teacher.quantized import quantizations
from mergeopd.teacher.recorded import recorded_spec
from mergeopd.teacher.reward_model import RewardModel, RewardModels
from mergeopd.teacher.shared_cache import SharedHiddenCache
from mergeopd.teacher.snapshots import StudentSnapshots
from mergeopd.teacher.target_folder import TargetOrigin
from mergeopd.teacher.token_view import TokenView


def build(
    models: Models,
    *,
    reporter: Reporter,
    clock: Clock,
    interrupt: Interrupt,
    engines: Mapping[str, MakeEngine] | None = None,
) -> Trainer:
    """Compose a run. `engines` are the rollout engines that a recipe can name; default: `engines_of`."""
    inputs, machine, student = models.inputs, models.machine, models.student
    plan, ranks, teachers, views = models.plan, machine.ranks, models.teachers, models.views
    guard = StopGuard(interrupt, ranks)
    alarms = AlarmWatch(plan, inputs.overlap, reporter)
    stages = Stages(alarms, clock, ranks, guard)
    if engines is None:
        engines = engines_of(
            plan,
            inputs.vocab_size,
            ranks,
            begin=lambda num: stages.begin("startup", "servers", num, "servers"),
            check_stop=stages.check,
        )
    engine = engines[plan.rollout.engine](
        student, engine_context(inputs.student, inputs, machine), plan.rollout
    )
    folder = RunFolder(Path(plan.output))
    scorer = Scorer(
        needs_prior_policy=plan.needs_prior_policy,
        max_tokens=plan.student.micro_batch_tokens,
        teachers=teachers,
        views=views,
        heads=ResidentHeads(teachers, partial(_scored_ids, student, inputs)),
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
            {
                name: _teacher_flops(teacher)
                for name, teacher in plan.teachers.items()
                if teacher.api is None and teacher.served is None
            },
        ),
        stages=stages,
    )
    return Trainer(
        plan=plan,
        folder=folder,
        student=student,
        snapshots=models.snapshots,
        pipeline=_pipeline(models, engine, scorer, stages),
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
        quantized=quantizations(teachers),
    )


def _pipeline(models: Models, engine: RolloutEngine, scorer: Scorer, stages: Stages) -> SynchronousPipeline:
    inputs, student = models.inputs, models.student
    plan, ranks = models.plan, models.machine.ranks
    environments = build_environments(plan.sources, plan, ranks)
    rewards = Rewards(build_verifiers(plan.sources, inputs, models.machine), inputs.student.tokenizer, stages)
    rollouts = StudentRollouts(
        engine,
        max(plan.rollout_of(phase).samples_per_prompt for phase in plan.phases),
        inputs.student,
        environments,
        stages,
    )
    text = _fixed_text(inputs, models.teachers, models.views, environments, rewards, stages, models.machine)
    selection = PromptSelection(
        plan,
        prompts=inputs.prompts,
        draw=text.draw,
        rollouts=rollouts,
        responses=text.responses,
        rewards=rewards,
        scorer=scorer,
        schedule=partial(
            schedule_round,
            index=0,
            num_updates=1,
            max_tokens=plan.student.micro_batch_tokens,
            members=student.placement.replica_ranks,
            packing=plan.student.packing,
        ),
        stages=stages,
    )
    settings = plan.rollout
    make: Callable[..., SynchronousPipeline] = SynchronousPipeline
    if isinstance(settings, AnyServerRollout) and settings.ahead:
        make = partial(
            AheadPipeline,
            ahead=settings.ahead,
            open_background=partial(_background, plan, rollouts),
        )
    return make(
        plan,
        model=student,
        rollouts=rollouts,
        text=text,
        rewards=rewards,
        selection=selection,
        stages=stages,
    )


def _background(plan: Plan, rollouts: StudentRollouts) -> Background:
    """Build the student's rollouts for a thread of the first process: nothing in them is collective."""
    assert isinstance(rollouts.engine, ServedEngine)
    interrupt, progress, alone = Interrupt(), ProgressCounter(), SingleProcess()
    own = replace(
        rollouts,
        engine=rollouts.engine.background,
        environments=build_environments(plan.sources, plan, alone),
        stages=Stages(progress, Clock(), alone, StopGuard(interrupt, alone)),
    )
    return Background(own, interrupt, progress)


def _fixed_text(
    inputs: Inputs,
    teachers: Mapping[str, Teacher],
    views: Mapping[str, TokenView],
    environments: Environments,
    rewards: Rewards,
    stages: Stages,
    machine: Machine,
) -> FixedText:
    plan = inputs.plan
    shares = {
        phase.name: PhaseShares(plan.shares(phase), phase.num_prompts, selects=phase.select is not None)
        for phase in plan.phases
    }
    responses = TeacherRolloutCache(
        plan,
        student=inputs.student,
        renderers=inputs.teachers,
        teachers=teachers,
        api_teachers=_api_teachers(inputs, machine, stages),
        views=views,
        environments=environments,
        stages=stages,
    )
    return FixedText(plan, PhasedDraw(inputs.prompts, shares, plan.seed), responses, rewards, stages)


def build_evaluation(inputs: Inputs, plan: EvaluationPlan, machine: Machine, stages: Stages) -> Evaluation:
    def engine(source: ReplicaSource, renderer: Renderer) -> RolloutEngine:
        return LocalEngine(source, engine_context(renderer, inputs, machine), plan.batch_size)

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
        api_teachers=_api_teachers(inputs, machine, stages),
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


def _api_teachers(inputs: Inputs, machine: Machine, stages: Stages) -> dict[str, ApiTeacher]:
    plan = inputs.plan
    return {
        name: ApiTeacher(
            name,
            teacher.api,
            inputs.teachers[name],
            vocab_size=inputs.vocab_size,
            seed=plan.seed,
            text_cache=Path(plan.text_cache),
            use_file=RunFolder(Path(plan.output)).api_use_file,
            run_on_first=machine.ranks.run_on_first,
            note=stages.note,
        )
        for name, teacher in plan.teachers.items()
        if teacher.api is not None
    }


def build_recorders(
    inputs: Inputs, names: Sequence[str], machine: Machine, stages: Stages
) -> Iterator[tuple[TargetRecorder, list[TeacherSequence]]]:
    """Yield what writes each teacher's targets, with the sequences that phases need. Collective."""
    plan = inputs.plan
    divide_threads(plan, machine)
    moving = {name for name, teacher in plan.teachers.items() if teacher.snapshot_rule is not None}
    held = held_teachers(inputs, machine, skip=moving)
    teachers = build_teachers(inputs, machine, StudentSnapshots((), _none, _none), skip=moving, held=held)
    views = build_views(inputs, machine, stages.note)
    specs: dict[str, list[TargetSpec]] = {name: [] for name in names}
    sequences: dict[str, list[TeacherSequence]] = {name: [] for name in names}
    scored = {
        phase.name: [n for n in names if n in plan.teachers_of(phase).scoring()]
        for phase in plan.phases
        if phase.loss.needs_teacher
    }
    with ExitStack() as opened:
        environments = build_environments(plan.sources, plan, machine.ranks)
        opened.callback(environments.close)
        rewards = Rewards(build_verifiers(plan.sources, inputs, machine), inputs.student.tokenizer, stages)
        opened.callback(rewards.close)
        text = _fixed_text(inputs, teachers, views, environments, rewards, stages, machine)
        for phase, rollouts in text.of_phases([phase for phase, own in scored.items() if own]):
            for name in scored[phase.name]:
                if (spec := required_of(phase.loss, plan.teachers[name])) is not None:
                    specs[name].append(spec)
                    sequences[name] += read_by(views[name], name, rollouts)
    for name in names:
        yield _recorder(inputs, teachers[name], specs[name], stages), sequences[name]


def _recorder(
    inputs: Inputs, teacher: Teacher, needed: Sequence[TargetSpec], stages: Stages
) -> TargetRecorder:
    plan, renderer = inputs.plan.teachers[teacher.name], inputs.teachers[teacher.name]
    if teacher.fingerprint is None:
        raise TeacherError(
            f"teacher '{teacher.name}' has no fingerprint, so its targets could not be told from those of "
            "other weights; use its checkpoint, or remove `targets`"
        )
    folder = Path(str(plan.targets))
    spec = stages.ranks.run_on_first(partial(recorded_spec, folder, needed))
    origin = TargetOrigin.of(plan, renderer, teacher.fingerprint, inputs.vocab_size, spec)
    reduced_dtype = torch.float64 if plan.dtype == "float64" else torch.float32
    if origin.kind == "hidden":
        row_bytes = ModelFacts.read(plan.folder, "any").hidden_size * DTYPES[plan.dtype].itemsize
    else:
        row_bytes = (2 if origin.k is None else 2 * origin.k + 3) * reduced_dtype.itemsize
    max_tokens = inputs.plan.student.micro_batch_tokens
    return TargetRecorder(teacher, origin, folder, row_bytes, max_tokens, stages)


def _none() -> Iterator[Any]:
    return iter(())


def _teacher_flops(teacher: TeacherPlan) -> ModelFlops:
    """Return the operations of a teacher; a recorded one has no pass, but its logits are computed."""
    flops = ModelFlops.read(teacher.folder)
    return flops if teacher.targets is None else replace(flops, per_token=0, per_position=0)


def _scored_ids(student: Student, inputs: Inputs, teacher: str) -> range | None:
    """Return the ids of a teacher's vocabulary that this process scores: the student's share; None: all."""
    if len(student.vocab) == inputs.vocab_size:
        return None
    size = num_scored_ids(inputs.plan.teachers[teacher], inputs)
    return range(*(id * size // inputs.vocab_size for id in (student.vocab.start, student.vocab.stop)))


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
