"""`mergeopd new recipe`: write a commented recipe that passes `mergeopd check`."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from mergeopd.config.folders import Missing, absolute, existing_file, existing_model, project_folder
from mergeopd.config.load import YAML_SUFFIXES, load_card
from mergeopd.config.locate import Origins
from mergeopd.config.tree import plain
from mergeopd.config.validate import problems_of
from mergeopd.errors import ModelError, Problem, RecipeError, TokenizerError
from mergeopd.messages import option_problem, shown
from mergeopd.models.checkpoint import Checkpoint
from mergeopd.models.facts import ModelFacts
from mergeopd.models.tokenizer import Tokenizer
from mergeopd.preflight.inputs import Inputs, preflight
from mergeopd.recipe.bridges import KINDS
from mergeopd.recipe.models import TeacherCard
from mergeopd.scaffold.files import (
    by_option,
    is_text,
    name_problems,
    native_dtype,
    refuse_existing,
    render,
    write_new,
    write_schema,
)
from mergeopd.scaffold.prompts import PROMPT_FOLDER, PromptFile, find_prompts, sort_prompts

CARD_FOLDER = "teachers"
_MAX_NEW_TOKENS = 256
# The option that causes a problem of the written recipe, by the beginning of the problem's path.
_OPTIONS = {
    "student": "--student",
    "teachers": "--teacher",
    "prompts": "--prompts",
    "evaluation": "--prompts",
    "rollout": "--prompts",
}


@dataclass(frozen=True, slots=True)
class NewRecipeOptions:
    """The options of the command; missing ones are replaced by the files in `teachers/` and `data/`.

    `prompts` are files, or `DOMAIN=FILE` where the name of a file does not contain the domain.
    """

    name: str
    student: str | None
    teachers: Sequence[str]
    prompts: Sequence[str]

    @property
    def recipe_file(self) -> Path:
        return Path("recipes", f"{self.name}.yaml")


@dataclass(frozen=True, slots=True)
class Expert:
    """A teacher. `listed`: its card names its domains, so that the recipe need not.

    `tokenizer` is the folder of its tokenizer; `bridge` is set if that differs from the student's.
    """

    name: str
    card: str
    folder: Path
    dtype: str
    domains: tuple[str, ...]
    listed: bool
    tokenizer: Path
    bridge: str | None = None


def new_recipe(options: NewRecipeOptions) -> tuple[Inputs, tuple[str, ...]]:
    """Write `recipes/NAME.yaml`; return the result of `check`, and notes on files that were left out.

    A file that does not pass the check is removed. Raises:
        RecipeError: missing or wrong options; mistakes in a card, by their place.
        StorageError: the file exists, or the disk fails.
    """
    search = _Search(options)
    if not search.problems:
        refuse_existing(options.recipe_file)
    experts = search.experts()
    student = search.student(experts)
    trained, measured = search.prompts(experts)
    used = search.used(experts, trained)
    if search.problems or student is None:
        raise RecipeError(search.problems)
    text = render(
        "recipe",
        name=options.name,
        student=_relative(options.student or ""),
        student_dtype=native_dtype(Checkpoint.open(student)),
        experts=[_with_bridge(expert, student) for expert in used],
        prompts=[_entry(file, used) for file in trained],
        evaluation=[_entry(file, used, is_measured=True) for file in measured if file.verifier],
        max_new_tokens=_max_new_tokens([student, *(expert.folder for expert in used)]),
        left_out=search.notes,
    )
    inputs = _write(options.recipe_file, text)
    write_schema("recipe")
    return inputs, tuple(search.notes)


def _entry(
    file: PromptFile, experts: Sequence[Expert], *, is_measured: bool = False
) -> Mapping[str, str | Sequence[str] | None]:
    """Return an entry of `prompts` or `evaluation.prompts`; keys without a value have their defaults.

    Teachers are named unless all of their cards list the domain, an expert where a domain has several.
    """
    teachers = [expert for expert in experts if file.domain in expert.domains]
    names = [expert.name for expert in teachers]
    has_own_reference = file.verifier is not None and file.reference_field != "answer"
    return {
        "source": file.path,
        "domain": file.domain,
        "teachers": [] if is_measured or all(expert.listed for expert in teachers) else names,
        "verifier": file.verifier,
        "expert": names[0] if is_measured and len(names) > 1 else None,
        "prompt_field": file.prompt_field if file.prompt_field != "prompt" else None,
        "reference_field": file.reference_field if has_own_reference else None,
    }


def _write(path: Path, text: str) -> Inputs:
    write_new(path, text)
    try:
        return preflight(path)
    except BaseException as error:
        path.unlink(missing_ok=True)
        with suppress(OSError):
            path.parent.rmdir()  # only if it is empty
        if not isinstance(error, RecipeError):
            raise
        own = [p for p in error.problems if p.location.file == shown(path)]
        others = [p for p in error.problems if p.location.file != shown(path)]
        raise RecipeError([*by_option(own, _OPTIONS, "NAME"), *others]) from None


@dataclass
class _Search:
    """Replaces missing options by the project's files. `notes` list the files that are left out."""

    options: NewRecipeOptions
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.problems += name_problems("NAME", [self.options.name], "recipe")

    def report(self, option: str, message: str, remedy: str = "") -> None:
        self.problems.append(option_problem(option, message, remedy))

    def experts(self) -> list[Expert]:
        """Return the teachers of all cards, given or in `teachers/`; report mistakes in cards as `check`."""
        cards = (shown(file) for file in Path(CARD_FOLDER).glob("*") if file.suffix in YAML_SUFFIXES)
        written = self.options.teachers or sorted(cards)
        if not written:
            remedy = "name cards (--teacher FILE), or make one (`mergeopd new teacher NAME --model DIR`)"
            self.report("--teacher", f"no card was given, and there is none in {CARD_FOLDER}/", remedy)
        experts: dict[str, Expert] = {}
        for card in dict.fromkeys(map(_relative, written)):
            path = existing_file(card, Path.cwd(), "card", YAML_SUFFIXES)
            if isinstance(path, Missing):
                self.report("--teacher", path.message, path.remedy)
            elif expert := self._expert(card, path, experts):
                experts[expert.name] = expert
        if written and not experts and not self.problems:
            self.report("--teacher", "no card has a model that can score", "name the card of a model folder")
        return list(experts.values())

    def _expert(self, card: str, path: Path, taken: Mapping[str, Expert]) -> Expert | None:
        loaded = load_card(path, os.environ, ())
        problems = list(loaded.problems)
        if loaded.root is not None and not problems:
            problems += problems_of(TeacherCard, plain(loaded.root), Origins(path, loaded.root, {}))
        if loaded.root is None or problems:
            self.problems += problems
            return None
        valid = TeacherCard.model_validate(plain(loaded.root))
        project = project_folder(path, "teachers")
        if valid.model is None:
            self.notes.append(f"{card}: a model behind an API writes text only; add it to the recipe by hand")
            return None
        folder = existing_model(valid.model, valid.revision, project)
        if isinstance(folder, Missing):
            place = Origins(path, loaded.root, {}).at("model")
            self.problems.append(Problem(place, "model", folder.message, folder.remedy))
            return None
        tokenizer = existing_model(valid.tokenizer or valid.model, None, project, "tokenizer")
        name = _unused_name(path.stem, taken)
        # Faults of a checkpoint or a tokenizer are reported by the check of the written recipe.
        dtype = "float32"
        with suppress(ModelError):
            dtype = native_dtype(Checkpoint.open(folder))
        return Expert(
            name=name,
            card=card,
            folder=folder,
            dtype=dtype,
            domains=valid.domains or (name,),
            listed=bool(valid.domains),
            tokenizer=tokenizer if valid.tokenizer and not isinstance(tokenizer, Missing) else folder,
        )

    def student(self, experts: Sequence[Expert]) -> Path | None:
        """Return the folder of the model to train, which has no default."""
        written = self.options.student
        if written is None:
            taken = {expert.folder for expert in experts}
            beside = {config.parent for f in taken for config in f.parent.glob("*/config.json")} - taken
            perhaps = " or ".join([shown(folder) for folder in sorted(beside)][:3])
            remedy = "name its folder: --student DIR" + (f", perhaps {perhaps}" if perhaps else "")
            self.report("--student", "missing option: the model to train", remedy)
            return None
        folder = existing_model(written, None, Path.cwd())
        if isinstance(folder, Missing):
            self.report("--student", folder.message, folder.remedy)
            return None
        try:
            if not is_text(written):
                raise ModelError("the path is not valid UTF-8; rename the folder")
            Checkpoint.open(folder)
        except ModelError as error:
            self.report("--student", str(error).replace(str(folder), shown(folder)))
            return None
        return folder

    def prompts(self, experts: Sequence[Expert]) -> tuple[list[PromptFile], list[PromptFile]]:
        """Return prompt files for training and for evaluation, each with its domain."""
        given = self.options.prompts
        domains = tuple(dict.fromkeys(domain for expert in experts for domain in expert.domains))
        written = given or find_prompts()
        if not written:
            message = f"no prompt file was given, and there is none below {PROMPT_FOLDER}/"
            self.report("--prompts", message, "name files (--prompts FILE or --prompts DOMAIN=FILE)")
        if not written or not domains:
            return [], []
        files, unknown, problems = sort_prompts(written, domains)
        self.problems += problems
        names = ", ".join(domains)
        for file in unknown:
            if given:
                message = f"the name '{file}' contains none of the domains {names}"
                self.report("--prompts", message, f"name the domain: --prompts {domains[0]}={file}")
            else:
                self.notes.append(f"{file}: its name contains none of the domains {names}")
        trained = [file for file in files if not file.held_out]
        measured = [file for file in files if file.held_out]
        known = {file.domain for file in trained}
        for held_out in measured:
            if not held_out.verifier:
                self.notes.append(f"{held_out.path}: no verifier fits all of its references")
            elif held_out.domain not in known:
                self.notes.append(f"{held_out.path}: its domain {held_out.domain} has no training prompts")
        return trained, [file for file in measured if file.domain in known]

    def used(self, experts: Sequence[Expert], trained: Sequence[PromptFile]) -> list[Expert]:
        """Return the teachers with prompts; report a teacher given by option that has none."""
        domains = {file.domain for file in trained}
        used = [expert for expert in experts if not domains.isdisjoint(expert.domains)]
        if self.problems:
            return used
        for expert in (expert for expert in experts if expert not in used):
            noun = "domain" if len(expert.domains) == 1 else "domains"
            what = f"no prompts for teacher '{expert.name}' ({noun} {', '.join(expert.domains)})"
            if self.options.teachers or not used:
                self.report("--prompts", what, f"name a file: --prompts {expert.domains[0]}=FILE")
            else:
                self.notes.append(f"{expert.card}: {what}")
        return used


def _with_bridge(expert: Expert, student: Path) -> Expert:
    """Return the expert, with the default bridge if its tokenizer differs from the student's."""
    with suppress(TokenizerError):  # damaged: the check of the written recipe reports it
        if Tokenizer.load(student).num_shared(Tokenizer.load(expert.tokenizer)) is None:
            return replace(expert, bridge=KINDS[0])
    return expert


def _unused_name(stem: str, taken: Mapping[str, Expert]) -> str:
    """Return a unique name for a teacher in the recipe: its card's, without characters that names lack."""
    base = "".join(c if c.isascii() and (c.isalnum() or c in "_.-") else "-" for c in stem).lstrip("_.-")
    name, number = base or "teacher", 1
    while name in taken:
        number += 1
        name = f"{base or 'teacher'}-{number}"
    return name


def _max_new_tokens(folders: Sequence[Path]) -> int:
    """Return at most half of the smallest context, which leaves room for prompts."""
    smallest = 2 * _MAX_NEW_TOKENS
    for folder in folders:
        with suppress(ModelError):  # the check of the written recipe reports it
            smallest = min(smallest, ModelFacts.read(folder, "any").max_positions)
    return max(smallest // 2, 1)


def _relative(path: str) -> str:
    """Make a path below the current folder relative to it, so that the project can move."""
    file = absolute(path, Path.cwd())
    return shown(file) if file.exists() else path
