"""Everything that can be found wrong before a weight is read: the recipe, and all that it names.

Nothing here imports torch or transformers, so `mergeopd check` answers at once.
"""

from __future__ import annotations

import filecmp
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from importlib.util import find_spec
from pathlib import Path

from mergeopd.data.prompts import read_prompts
from mergeopd.data.templates import ChatTemplate
from mergeopd.engine.dialect import Dialect
from mergeopd.engine.run_folder import RunFolder
from mergeopd.errors import MergeopdError, Problem, RecipeError
from mergeopd.models.checkpoint import Checkpoint
from mergeopd.models.facts import ModelFacts, head_tensor
from mergeopd.models.tokenizer import Tokenizer
from mergeopd.recipe.plan import Plan, SourcePlan
from mergeopd.recipe.resolve import Resolution, read
from mergeopd.recipe.schema import Phase, UserVerifier
from mergeopd.reward.verifiers import reference_problem
from mergeopd.types import Prompt

Keys = tuple[str | int, ...]
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)


@dataclass(frozen=True)
class Inputs:
    """A plan that can work, with everything that was read to know so.

    `prompts` and `evaluation` are by source name; `notes` are no mistakes, but a person should know.
    `files` maps model folders and prompt files to digests of their contents. `now` is what templates take
    for the present: the start of the run, also when it goes on another day.
    """

    plan: Plan
    student: Dialect
    teachers: Mapping[str, Dialect]
    prompts: Mapping[str, tuple[Prompt, ...]]
    evaluation: Mapping[str, tuple[Prompt, ...]]
    notes: tuple[str, ...]
    files: Mapping[str, str]
    now: datetime


def preflight(recipe: str | Path, overrides: Sequence[str] = ()) -> Inputs:
    """Read a recipe and check all that it names.

    Raises RecipeError with every problem found, the recipe's own and those of models, tokenizers, templates
    and prompt files, each with its place and remedy.
    """
    resolution = read(recipe, overrides)
    check = _Check(resolution)
    check.run()
    if resolution.plan is None or check.student is None or check.problems:
        raise RecipeError(resolution.origins.in_order((*resolution.problems, *check.problems)))
    sources = resolution.plan.sources
    evaluation = resolution.plan.evaluation.sources if resolution.plan.evaluation else ()
    return Inputs(
        plan=resolution.plan,
        student=check.student,
        teachers=check.teachers,
        prompts={source.name: check.prompts[source.name] for source in sources},
        evaluation={source.name: check.evaluation[source.name] for source in evaluation},
        notes=tuple(check.notes),
        files=dict(sorted(check.files.items())),
        now=check.now,
    )


class _Check:
    """Collects problems over whatever parts of the recipe resolved."""

    def __init__(self, resolution: Resolution) -> None:
        self._resolution = resolution
        self.problems: list[Problem] = []
        self.notes: list[str] = []
        self.student: Dialect | None = None
        self.teachers: dict[str, Dialect] = {}
        self.prompts: dict[str, tuple[Prompt, ...]] = {}
        self.evaluation: dict[str, tuple[Prompt, ...]] = {}
        self.files: dict[str, str] = {}
        self.now = datetime.now()
        self._tokenizers: dict[Path, Tokenizer] = {}

    def run(self) -> None:
        """Models first, then prompts, then what needs both."""
        if self._resolution.plan is not None:
            self.now = RunFolder(Path(self._resolution.plan.output)).started() or self.now
        if self._resolution.student is not None:
            folder = Path(self._resolution.student.model)
            self.student = self._dialect(("student", "model"), folder, folder, None, ("student", "model"))
        for name, teacher in self._resolution.teachers.items():
            place = ("teachers", name, "card")
            dialect = self._dialect(
                (*place, "model"),
                Path(teacher.model),
                Path(teacher.tokenizer),
                Path(teacher.template) if teacher.template else None,
                (*place, "tokenizer"),
            )
            if dialect is not None:
                self.teachers[name] = dialect
                self._compare(name, dialect)
        for index, source in self._resolution.sources.items():
            self._source(("prompts", index), source, self.prompts)
        for index, source in self._resolution.eval_sources.items():
            self._source(("evaluation", "prompts", index), source, self.evaluation)
        plan = self._resolution.plan
        if plan is not None:
            self._lengths(plan)
            self._dataset_text(plan)
            self._overlap()

    def _problem(self, place: Keys, message: str, remedy: str = "") -> None:
        self.problems.append(self._resolution.origins.problem(place, message, remedy))

    def _try(self, place: Keys, work: Callable[[], object]) -> bool:
        """Do `work`; an error of ours becomes a problem at `place`."""
        try:
            work()
        except MergeopdError as error:
            self._problem(place, str(error))
            return False
        return True

    def _dialect(
        self, place: Keys, model: Path, tokenizer_folder: Path, template: Path | None, tokenizer_place: Keys
    ) -> Dialect | None:
        """How a model reads; None when a part of it is unusable."""
        found: dict[str, object] = {}
        fine = self._try(place, lambda: found.update(facts=ModelFacts.read(model)))
        fine &= self._try(place, lambda: found.update(checkpoint=Checkpoint.open(model)))
        fine &= self._try(tokenizer_place, lambda: found.update(tokenizer=self._tokenizer(tokenizer_folder)))
        if not fine:
            return None
        facts, tokenizer, checkpoint = found["facts"], found["tokenizer"], found["checkpoint"]
        assert isinstance(facts, ModelFacts)
        assert isinstance(tokenizer, Tokenizer)
        assert isinstance(checkpoint, Checkpoint)
        if not self._try(place, lambda: head_tensor(facts, checkpoint)):
            return None
        self.files[str(model)] = checkpoint.fingerprint
        if tokenizer.vocab_size > facts.vocab_rows:
            self._problem(
                tokenizer_place,
                f"the tokenizer has {tokenizer.vocab_size} ids, the head only {facts.vocab_rows} rows",
                "name the tokenizer that belongs to this model",
            )
            return None
        source = template.read_text(encoding="utf-8") if template else tokenizer.chat_template
        if source is None:
            self._problem(
                tokenizer_place,
                f"{tokenizer_folder} has no chat template, so prompts cannot be rendered",
                "name one in the card (template: FILE.jinja), or add chat_template.jinja to the folder",
            )
            return None
        name = str(template or tokenizer_folder)
        template_place = (*place[:-1], "template") if template else tokenizer_place
        compiled: list[ChatTemplate] = []
        if not self._try(
            template_place,
            lambda: compiled.append(
                ChatTemplate(source, tokenizer.special_tokens, name=name, now=lambda: self.now)
            ),
        ):
            return None
        eos_ids = frozenset(facts.eos_ids) | {tokenizer.eos_id}
        return Dialect(tokenizer, compiled[0], eos_ids, facts.max_positions)

    def _compare(self, name: str, teacher: Dialect) -> None:
        """Without a bridge, teacher and student must cut every text into the same ids."""
        if self.student is None:
            return
        difference = self.student.tokenizer.difference(teacher.tokenizer)
        if difference is not None:
            self._problem(
                ("teachers", name, "card", "tokenizer"),
                f"its tokenizer differs from the student's: {difference}",
                "use a teacher of the student's family",
            )

    def _source(self, place: Keys, source: SourcePlan, into: dict[str, tuple[Prompt, ...]]) -> None:
        if self._try((*place, "source"), lambda: into.update({source.name: read_prompts(source)})):
            self.files[source.source] = hashlib.sha256(Path(source.source).read_bytes()).hexdigest()
            self._references(place, source, into[source.name])
        if isinstance(source.verifier, UserVerifier):
            module = source.verifier.function.partition(":")[0]
            if not _can_import(module):
                self._problem(
                    (*place, "verifier"),
                    f"there is no module {module!r} to import",
                    "install it, or run where it lies (it is looked up like any Python module)",
                )

    def _references(self, place: Keys, source: SourcePlan, prompts: Sequence[Prompt]) -> None:
        """References that no answer could ever match."""
        if source.verifier is None:
            return
        for prompt in prompts:
            reason = reference_problem(source.verifier, prompt.reference) if prompt.reference else None
            if reason is not None:
                self._problem(
                    (*place, "verifier"), f"prompt {prompt.key}: {reason}", "choose another verifier"
                )
                return

    def _tokenizer(self, folder: Path) -> Tokenizer:
        """A folder's tokenizer; equal files are loaded once, since large vocabularies take a second."""
        for known, tokenizer in self._tokenizers.items():
            if all(_same_file(known / name, folder / name) for name in TOKENIZER_FILES):
                return tokenizer
        self._tokenizers[folder] = Tokenizer.load(folder)
        return self._tokenizers[folder]

    def _lengths(self, plan: Plan) -> None:
        """No prompt may outgrow a model that has to read it."""
        for index, source in enumerate(plan.sources):
            readers = {"the student": self.student} | {
                f"teacher {name}": self.teachers.get(name) for name in source.teachers
            }
            budget = plan.rollout.max_new_tokens
            self._length(("prompts", index, "source"), self.prompts.get(source.name, ()), readers, budget)
        if plan.evaluation is None:
            return
        for index, source in enumerate(plan.evaluation.sources):
            expert = plan.evaluation.experts[source.domain]
            readers = {"the student": self.student, f"teacher {expert}": self.teachers.get(expert)}
            place = ("evaluation", "prompts", index, "source")
            prompts = self.evaluation.get(source.name, ())
            self._length(place, prompts, readers, plan.evaluation.max_new_tokens)

    def _length(
        self, place: Keys, prompts: Sequence[Prompt], readers: Mapping[str, Dialect | None], num_new: int
    ) -> None:
        """Reports the first prompt that does not fit, and how many there are."""
        for reader, dialect in readers.items():
            if dialect is None:
                continue
            too_long: list[tuple[Prompt, int]] = []
            for prompt in prompts:
                room = dialect.max_positions - num_new
                try:
                    # A token stands for a byte at least, so most prompts are short enough at a glance.
                    num_bytes = len(dialect.template.render(prompt.messages).encode())
                    num_tokens = num_bytes if num_bytes <= room else len(dialect.render(prompt))
                except MergeopdError as error:
                    self._problem(place, f"prompt {prompt.key}: {error}")
                    return
                if num_tokens > room:
                    too_long.append((prompt, num_tokens))
            if too_long:
                prompt, num_tokens = too_long[0]
                self._problem(
                    place,
                    f"{len(too_long)} prompts do not fit {reader}'s context, first {prompt.key}: "
                    f"{num_tokens} tokens + {num_new} new ones > {dialect.max_positions}",
                    "shorten them, or lower max_new_tokens",
                )

    def _dataset_text(self, plan: Plan) -> None:
        """A phase on dataset text needs a ready answer for every prompt."""
        phases = [phase.name for phase in plan.phases if _reads_dataset(phase)]
        if not phases:
            return
        for index, source in enumerate(plan.sources):
            lacking = [p.key for p in self.prompts.get(source.name, ()) if p.response is None]
            if lacking:
                self._problem(
                    ("prompts", index, "source"),
                    f"phase {phases[0]!r} learns from the dataset's answers, but {len(lacking)} prompts have "
                    f"no field {source.response_field!r}, first {lacking[0]}",
                    "add the field, name it with response_field, or choose another text for the phase",
                )

    def _overlap(self) -> None:
        trained = {p.messages for prompts in self.prompts.values() for p in prompts}
        for name, prompts in self.evaluation.items():
            num_seen = sum(p.messages in trained for p in prompts)
            if num_seen:
                self.notes.append(
                    f"{num_seen} of {len(prompts)} evaluation prompts of {name} are also trained on"
                )


def _same_file(one: Path, other: Path) -> bool:
    if not (one.is_file() and other.is_file()):
        return not one.exists() and not other.exists()
    return filecmp.cmp(one, other, shallow=False)


def _reads_dataset(phase: Phase) -> bool:
    text = phase.text
    return text == "dataset" if isinstance(text, str) else text.otherwise == "dataset"


def _can_import(module: str) -> bool:
    """Whether the module exists, found without running it (its parent packages are run)."""
    try:
        return find_spec(module) is not None
    except (ImportError, ValueError):
        return False
