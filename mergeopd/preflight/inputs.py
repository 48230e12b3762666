"""Check a recipe and all files it names, before reading weights.

Does not import torch or transformers, so that `mergeopd check` is fast.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, cast

from mergeopd.config.locate import Origins
from mergeopd.config.tree import Keys
from mergeopd.data.documents import MAX_TOKENS, sequences
from mergeopd.data.prompts import read_prompts
from mergeopd.data.renderer import Renderer
from mergeopd.data.rows import source_digest
from mergeopd.data.teacher_prompt import SAME
from mergeopd.errors import RecipeError
from mergeopd.messages import joined, shown_in
from mergeopd.preflight.apis import check_apis
from mergeopd.preflight.capabilities import check_capabilities
from mergeopd.preflight.conversations import template_notes
from mergeopd.preflight.environments import EnvironmentChecks
from mergeopd.preflight.models import ModelReader, file_digest
from mergeopd.preflight.problems import Findings
from mergeopd.preflight.prompts import LengthBudget, PromptChecks, check_verifier, turns_budget
from mergeopd.preflight.quantization import quantization_notes
from mergeopd.preflight.recorded import check_recorded
from mergeopd.preflight.residency import check_residency
from mergeopd.preflight.reward_models import RewardModelChecks
from mergeopd.preflight.servers import check_rollout_servers, note_staleness
from mergeopd.recipe.controls import Control, control_plan
from mergeopd.recipe.plan import Plan, SourcePlan, TeacherPlan, phase_teachers
from mergeopd.recipe.resolve import Resolution, read
from mergeopd.recipe.rollout import AnyServerRollout
from mergeopd.recipe.training import Phase, never_student, reads_dataset, reads_teachers
from mergeopd.recipe.verifiers import JsonVerifier, single_verifiers
from mergeopd.rollout.protocol import EngineCapabilities
from mergeopd.storage.run_folder import RunFolder
from mergeopd.teacher.protocol import TargetSpec, TeacherCapabilities, capabilities, required_target
from mergeopd.teacher.target_folder import TargetOrigin
from mergeopd.types import Prompt

if TYPE_CHECKING:
    from mergeopd.teacher.cross_tokenizer import CrossTokenizer

_LARGE_LR = 1e-2
_MANY_UPDATES = 10_000_000


@dataclass(frozen=True)
class Inputs:
    """A valid plan, with tokenizers, templates and prompts.

    Distributions are over the first `vocab_size` ids, which the student and every teacher without a bridge
    share. `cross_tokenizers` has the teachers with a bridge; `prompts` and `evaluation` are by source name,
    and so is `overlap`, which counts the evaluation prompts that are also trained on. `notes` are remarks,
    not mistakes. `files` maps model folders and small files to digests of their contents. `now` is the time
    in templates: the start of the run, also when it is resumed later. `document` is the recipe as written,
    with what it extends and overrides. `reward_models` have the renderers of reward models, by source name.
    """

    plan: Plan
    student: Renderer
    vocab_size: int
    teachers: Mapping[str, Renderer]
    cross_tokenizers: Mapping[str, CrossTokenizer]
    prompts: Mapping[str, tuple[Prompt, ...]]
    evaluation: Mapping[str, tuple[Prompt, ...]]
    overlap: Mapping[str, int]
    notes: tuple[str, ...]
    files: Mapping[str, str]
    now: datetime
    document: Mapping[str, Any]
    reward_models: Mapping[str, Renderer]


def preflight(
    recipe: str | Path,
    overrides: Sequence[str] = (),
    *,
    control: Control | None = None,
    engine: EngineCapabilities | None = None,
    teachers: Mapping[str, TeacherCapabilities] = MappingProxyType({}),
    announce: Callable[[str], None] = lambda _: None,
    with_servers: bool = True,
    records: bool = False,
) -> Inputs:
    """Read a recipe and check all that it names; with `control`, the inputs are those of its control.

    `engine` and `teachers` are the capabilities of a rollout engine and of teachers that replace the recipe's
    in `build` and `load_models`. `announce` gets what is being read. Inference servers are asked only
    `with_servers`: one process of a run does, and an evaluation needs none. `records`: the folders of
    teachers' targets are to be written, so they are not compared.

    Raises RecipeError with every problem found, the recipe's own and those of models, tokenizers, templates
    and prompt files, each with its place and remedy.
    """
    resolution = read(recipe, overrides)
    if control is not None and resolution.plan is not None:
        plan = control_plan(resolution.plan, control)
        phases = dict(enumerate(plan.phases))
        resolution = replace(resolution, plan=plan, phases=phases, teachers=plan.teachers)
    check = _Check(resolution, announce, with_servers=with_servers)
    check.run()
    if engine is None and resolution.rollout is not None:
        engine = resolution.rollout.capabilities
    own = {name: capabilities(teacher) for name, teacher in resolution.teachers.items()}
    check_capabilities(check.findings, resolution, engine, {**own, **teachers})
    check_apis(check.findings, resolution.teachers)
    check_recorded(check.findings, resolution, None if records else check.current_origin)
    problems = (*resolution.problems, *check.findings.problems)
    if resolution.plan is None or check.student is None or problems:
        raise RecipeError(resolution.origins.in_order(problems))
    return check.inputs(resolution.plan, check.student)


def read_again(
    plan: Plan, file: Path, teachers: Sequence[str], announce: Callable[[str], None] = lambda _: None
) -> Inputs:
    """Read the models and the prompts of training of a run again, with these of its teachers.

    `file` is the run's plan. What was checked when the run began is not checked again.

    Raises RecipeError with every problem of what is read.
    """
    resolution = Resolution(
        plan,
        (),
        Origins(file, None, {}),
        teachers={name: plan.teachers[name] for name in teachers},
        sources=dict(enumerate(plan.sources)),
        student=plan.student,
        rollout=plan.rollout,
        phases=dict(enumerate(plan.phases)),
    )
    check = _Check(resolution, announce, with_servers=False)
    check.read()
    if check.student is None or check.findings.problems:
        raise RecipeError(check.findings.problems)
    return check.inputs(plan, check.student)


def advice(plan: Plan) -> str | None:
    """Return a warning about teachers without a canary; None if every card has one."""
    bare = [
        name
        for name, teacher in plan.teachers.items()
        if teacher.canary is None and teacher.student is None and teacher.api is None
    ]
    if not bare:
        return None
    who = f"teacher {bare[0]} has" if len(bare) == 1 else f"teachers {joined(bare, 'and')} have"
    return f"{who} no canary, so a wrong or damaged model is not detected; `mergeopd new teacher` writes one"


class _Check:
    """Checks all parts of the recipe that resolved."""

    def __init__(
        self, resolution: Resolution, announce: Callable[[str], None], *, with_servers: bool
    ) -> None:
        self._resolution, self._with_servers = resolution, with_servers
        self._announce = announce
        self.findings = Findings(resolution.origins)
        folder = None if resolution.plan is None else RunFolder(Path(resolution.plan.output))
        started = None if folder is None else self.findings.attempt(("output",), folder.started)
        self.now = started or datetime.now()
        self.models = ModelReader(self.findings, self.now)
        self.reward_models = RewardModelChecks(self.findings, self.models)
        self.student: Renderer | None = None
        self.teachers: dict[str, Renderer] = {}
        self.cross_tokenizers: dict[str, CrossTokenizer] = {}
        self.prompts: dict[str, tuple[Prompt, ...]] = {}
        self.evaluation: dict[str, tuple[Prompt, ...]] = {}
        self.overlap: dict[str, int] = {}
        self._server_tokens: int | None = None  # in the longest sequence that the servers take
        plan = resolution.plan
        self.environments = EnvironmentChecks(self.findings, plan.allow_code if plan is not None else ())

    def run(self) -> None:
        """Check models, then prompts, then their combination."""
        self.read()
        if self._resolution.plan is not None:
            self._check_training(self._resolution.plan)
            self._check_evaluation(self._resolution.plan)
            quantized = quantization_notes(self._resolution.plan, self.teachers, self.models.files)
            self.findings.notes += quantized

    def read(self) -> None:
        """Read models and prompts."""
        resolution = self._resolution
        if resolution.student is not None:
            self._announce("reading the student's tokenizer")
            self.student = self.models.student(resolution.student)
            self.models.check_replay(resolution.student, resolution.rollout)
        if self._with_servers and isinstance(resolution.rollout, AnyServerRollout):
            self._announce("asking the inference servers")
            model = None if resolution.student is None else Path(resolution.student.model)
            self._server_tokens = check_rollout_servers(self.findings, resolution.rollout, model)
        for name, teacher in resolution.teachers.items():
            self._announce(f"reading the tokenizer of {name}")
            renderer = self.models.teacher(teacher, self.student)
            if renderer is not None:
                self.teachers[name] = renderer
        for name, renderer in self.teachers.items():
            self._cross(resolution.teachers[name], renderer)
        self._check_servers()
        for index, source in resolution.sources.items():
            self._read(("prompts", index), source, self._teachers_that_read(source), self.prompts)
        for index, source in resolution.eval_sources.items():
            self._read(("evaluation", "prompts", index), source, (), self.evaluation)

    def inputs(self, plan: Plan, student: Renderer) -> Inputs:
        """Return what was read, for a plan without problems."""
        return Inputs(
            plan=plan,
            student=student,
            vocab_size=self.vocab_size(student),
            teachers=self.teachers,
            cross_tokenizers=self.cross_tokenizers,
            prompts=self.prompts,
            evaluation=self.evaluation,
            overlap=self.overlap,
            notes=tuple(self.findings.notes),
            files=dict(sorted(self.models.files.items())),
            now=self.now,
            document=self._resolution.document,
            reward_models=self.reward_models.renderers,
        )

    def vocab_size(self, student: Renderer) -> int:
        """Number of leading ids that the student and every teacher without a bridge share."""
        return min((student.vocab_size, *self.models.num_shared.values()))

    def current_origin(self, teacher: TeacherPlan, spec: TargetSpec) -> TargetOrigin | None:
        """Describe the targets that a teacher has now; None if it could not be read."""
        fingerprint = self.models.files.get(teacher.model or "")
        if self.student is None or teacher.name not in self.teachers or fingerprint is None:
            return None
        renderer, size = self.teachers[teacher.name], self.vocab_size(self.student)
        return TargetOrigin.of(teacher, renderer, fingerprint, size, spec)

    def _cross(self, teacher: TeacherPlan, renderer: Renderer) -> None:
        student, bridge = self.student, teacher.bridge
        if bridge is None or student is None:
            return
        # Imported here, because it imports numpy.
        from mergeopd.teacher.cross_tokenizer import CrossTokenizer

        cross_tokenizer = self.findings.attempt(
            ("teachers", teacher.name, "bridge"),
            lambda: CrossTokenizer.of(teacher.name, bridge, student, self.vocab_size(student), renderer),
            "choose a teacher of the student's family",
        )
        if cross_tokenizer is not None:
            self.cross_tokenizers[teacher.name] = cross_tokenizer

    def _check_servers(self) -> None:
        """Ask the servers of teachers, if any; where their context is shorter, it is the teacher's."""
        teachers = self._resolution.teachers
        for name in [n for n in self.teachers if teachers[n].served is not None and self._with_servers]:
            # Imported here, because it imports the HTTP client.
            from mergeopd.preflight.served_teachers import ServerProbe

            self._announce(f"asking the servers of {name}")
            renderer = self.teachers[name]
            is_crossed = name in self.cross_tokenizers or self.student is None
            num_valid = renderer.vocab_size if is_crossed else self.vocab_size(cast(Renderer, self.student))
            own = capabilities(teachers[name])
            specs = [
                own.smallest(spec)
                for phase in self._resolution.phases.values()
                if (spec := required_target(phase.loss)) is not None and teachers[name].bridge is None
            ]
            place: Keys = ("teachers", name, "card")
            probe = ServerProbe(self.findings, place, teachers[name], renderer, num_valid, specs)
            self.teachers[name] = probe.run()

    def _read(
        self, place: Keys, source: SourcePlan, teachers: Sequence[str], into: dict[str, tuple[Prompt, ...]]
    ) -> None:
        self._announce(f"reading {shown_in(source.title)}")
        check_verifier(self.findings, place, source)
        prompts = self.findings.attempt((*place, "source"), lambda: self._read_rows(source, teachers))
        if prompts is not None:
            if source.environment is not None:
                prompts = self.environments.add_tools((*place, "environment"), source.environment, prompts)
            into[source.name] = prompts
            self.models.files[source.title] = source_digest(source)
            PromptChecks(self.findings, place, source, prompts).references()
        self.reward_models.read(place, source, prompts or ())
        for verifier in single_verifiers(source.verifier).values() if source.verifier else ():
            if isinstance(verifier, JsonVerifier) and verifier.schema_file is not None:
                schema = Path(verifier.schema_file)
                digest = self.findings.attempt(place, partial(file_digest, schema))
                self.models.files |= {} if digest is None else {str(schema): digest}

    def _read_rows(self, source: SourcePlan, teachers: Sequence[str]) -> tuple[Prompt, ...]:
        if source.text_field is None:
            return read_prompts(source, self._shown(teachers))
        rows = read_prompts(source)
        student = self.student
        return rows if student is None else sequences(source, rows, student, self.vocab_size(student))

    def _teachers_that_read(self, source: SourcePlan) -> tuple[str, ...]:
        """Return the teachers that read prompts of a source in some phase, in the recipe's order."""
        resolution = self._resolution
        names = set() if resolution.phases else set(source.teachers)
        for phase in resolution.phases.values():
            if phase.prompts is None or source.name in phase.prompts:
                own = phase_teachers(phase, resolution.sources.values(), resolution.teachers)
                names |= own.scoring([source.name])
                names |= own.routed[source.name].keys() if reads_teachers(phase) else set()
        return tuple(name for name in resolution.teachers if name in names)

    def _shown(self, teachers: Sequence[str]) -> dict[str, str]:
        """Return the row fields that these teachers' prompts use, each with the first teacher that does."""
        shown: dict[str, str] = {}
        for name in teachers:
            own = self.teachers[name].teacher_prompt.prompt if name in self.teachers else None
            for field in () if own is None else sorted(own.fields):
                shown.setdefault(field, name)
        return shown

    def _renderers(self, teachers: Sequence[str]) -> dict[str, Renderer]:
        """Return the models that read a prompt, by their name in messages."""
        renderers = {} if self.student is None else {"the student": self.student}
        if self.student is not None and self._server_tokens is not None:
            limited = replace(self.student, max_positions=self._server_tokens)
            renderers = {"the inference server": limited} | renderers
        return renderers | {
            f"teacher '{name}'": self.teachers[name] for name in teachers if name in self.teachers
        }

    def _check_training(self, plan: Plan) -> None:
        check_residency(self.findings, plan, self.teachers)
        self._note_sampling(plan)
        note_staleness(self.findings, plan)
        self._note_sizes(plan)
        if not any(phase.loss.needs_teacher or reads_teachers(phase) for phase in plan.phases):
            self.findings.notes.append("no phase uses a teacher: none will be loaded for training")
        for index, source in enumerate(plan.sources):
            place = ("prompts", index)
            self._announce(f"checking {shown_in(source.title)}")
            checks = PromptChecks(self.findings, place, source, self.prompts.get(source.name, ()))
            if source.text_field is not None:
                self._check_documents(place, source)
                continue
            phases = [phase for phase in plan.phases if source.name in plan.shares(phase)]
            with_responses = any(reads_dataset(phase) for phase in phases)
            checks.responses(phases)
            budget = _length_budget(plan, phases)
            if with_responses:
                checks.bridged_responses(
                    [n for n in self._teachers_that_read(source) if n in self.cross_tokenizers]
                )
            if with_responses and self.student is not None:
                bounds = checks.trajectories(self.student)
                checks = replace(checks, prompts=[p for p in checks.prompts if p.key in bounds])
                checks.response_tokens(self.student, self.vocab_size(self.student))
                budget = replace(budget, bounds=bounds, student=self.student)
            renderers = self._renderers(self._teachers_that_read(source))
            if source.environment is not None and checks.prompts:
                checks.bridged_turns(self.cross_tokenizers)
                where = (*place, "environment")
                self.environments.templates(where, source.environment, checks.prompts[0], renderers)
                budget = turns_budget(source, budget, place)
            checks.lengths(renderers, budget)
            checks.lengths(self.reward_models.of(source), replace(budget, bounds={}))
            self._compare_templates(source)

    def _check_documents(self, place: Keys, source: SourcePlan) -> None:
        """Report teachers that cannot read documents, and sequences longer than a model's context."""
        names = self._teachers_that_read(source)
        for name in names:
            own, teacher = self.teachers.get(name), f"teacher '{name}'"
            other = "give the source or the phase other `teachers`"
            if name in self.cross_tokenizers:
                message = f"{teacher} has another tokenizer, and documents are aligned with no bridge"
                self.findings.report((*place, "text_field"), message, other)
            elif own is not None and own.teacher_prompt != SAME:
                message = (
                    f"{teacher} has a prompt or a system message of its own, and documents have no prompt"
                )
                self.findings.report((*place, "text_field"), message, other)
        length = source.max_tokens or MAX_TOKENS
        contexts = {name: one.max_positions for name, one in self._renderers(names).items()}
        shortest = min(contexts, key=contexts.__getitem__, default=None)
        if shortest is not None and length > contexts[shortest]:
            message = f"sequences of {length} tokens exceed the context of {shortest}"
            remedy = f"set `max_tokens` to {contexts[shortest]} or less"
            self.findings.report((*place, "max_tokens"), message, remedy)

    def _note_sampling(self, plan: Plan) -> None:
        """Note policy terms whose correction does not account for the sampling settings."""
        for phase in filter(plan.has_policy, plan.phases):
            rollout = plan.rollout_of(phase)
            if rollout.temperature == 1.0 and rollout.top_p == 1.0:
                continue
            where = f"responses are sampled at temperature {rollout.temperature} and top_p {rollout.top_p}"
            if phase.correction.kind == "none":
                self.findings.notes.append(
                    f"phase '{phase.name}' has policy terms without correction, but {where}: its gradient is "
                    "that of another policy; give the phase `correction: truncate`, or sample at 1"
                )
            elif phase.correction.kind == "mask":
                self.findings.notes.append(
                    f"phase '{phase.name}' masks tokens by their ratio, but {where}: tokens are masked for "
                    "the sampling settings alone; use `correction: truncate`, or sample at 1"
                )

    def _note_sizes(self, plan: Plan) -> None:
        """Note learning rates and numbers of updates that are probably typing errors."""
        for phase in plan.phases:
            rate = plan.optimizer.lr * phase.lr_scale
            if rate > _LARGE_LR:
                self.findings.notes.append(
                    f"phase '{phase.name}' has the learning rate {rate:g} (`optimizer.lr` x `lr_scale`), "
                    "which usually makes training diverge; 1e-6 to 1e-4 is usual"
                )
        num_updates = sum(phase.updates for phase in plan.phases)
        if num_updates > _MANY_UPDATES:
            self.findings.notes.append(
                f"the phases have {num_updates:,} updates, which take {num_updates / 86400:,.0f} days at one "
                "second each"
            )

    def _compare_templates(self, source: SourcePlan) -> None:
        if self.student is not None:
            same_tokens = {
                name: self.teachers[name]
                for name in source.teachers
                if name in self.teachers and name not in self.cross_tokenizers
            }
            prompts = self.prompts.get(source.name, ())
            self.findings.notes += template_notes(source.name, prompts, self.student, same_tokens)

    def _check_evaluation(self, plan: Plan) -> None:
        if plan.evaluation is None:
            return
        measured = plan.teachers if plan.evaluation.static_merges else plan.experts
        for name in sorted(n for n in measured if n in plan.teachers and plan.teachers[n].served is not None):
            self.models.check_weights(plan.teachers[name])
        for name in sorted(set(plan.evaluation.experts.values()) & self.teachers.keys()):
            own = self.teachers[name].teacher_prompt.prompt
            if own is not None and own.fields:
                self.findings.notes.append(
                    f"expert '{name}' is evaluated with the student's prompt, because its own shows "
                    f"{joined([repr(field) for field in sorted(own.fields)], 'and')} of each row"
                )
        suites = {source.name: suite for suite in plan.evaluation.suites for source in suite.sources}
        trained = {p.messages for prompts in self.prompts.values() for p in prompts}
        for index, source in self._resolution.eval_sources.items():
            prompts = self.evaluation.get(source.name, ())
            place: Keys = ("evaluation", "prompts", index)
            self._announce(f"checking {shown_in(source.title)}")
            suite = suites[source.name]
            limits = {each.max_new_tokens for each in suites.values()}
            of_all: Keys = ("rollout",) if limits == {plan.rollout.max_new_tokens} else ("evaluation",)
            limit_place: Keys = (*(of_all if len(limits) == 1 else place), "max_new_tokens")
            budget = LengthBudget(suite.max_new_tokens, limit_place)
            compared = () if suite.expert is None else (suite.expert,)
            renderers = {name: renderer.as_measured for name, renderer in self._renderers(compared).items()}
            if source.environment is not None and prompts:
                where = (*place, "environment")
                self.environments.templates(where, source.environment, prompts[0], renderers)
                budget = turns_budget(source, budget, place)
            read_by = {**renderers, **self.reward_models.of(source)}
            PromptChecks(self.findings, place, source, prompts).lengths(read_by, budget)
            num_seen = self.overlap[source.name] = sum(prompt.messages in trained for prompt in prompts)
            if num_seen and source.allow_overlap:
                self.findings.notes.append(
                    f"{num_seen} of {len(prompts)} evaluation prompts of '{source.name}' are also trained on"
                )
            elif num_seen:
                self.findings.report(
                    (*place, "source"),
                    f"{num_seen} of {len(prompts)} prompts are also trained on",
                    "remove them from one file, or set `allow_overlap: true`; the result then counts them",
                )


def _length_budget(plan: Plan, phases: Sequence[Phase]) -> LengthBudget:
    """Return the longest responses that are generated in these phases, and the key that sets their length."""
    budget = LengthBudget(0, ("rollout", "max_new_tokens"))
    for phase in phases:
        length = plan.rollout_of(phase).max_new_tokens
        if length > budget.num_new and not (never_student(phase) and reads_dataset(phase)):
            of_phase: Keys = ("phases", plan.phases.index(phase), "rollout")
            own = phase.rollout.max_new_tokens is not None
            budget = LengthBudget(length, (*(of_phase if own else ("rollout",)), "max_new_tokens"))
    return budget
