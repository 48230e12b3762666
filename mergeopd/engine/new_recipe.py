"""`mergeopd new recipe`: a commented recipe of what is given, or of what lies about, that `check` accepts."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from mergeopd.engine.new_file import (
    by_option,
    is_text,
    name_problems,
    native_dtype,
    option_problem,
    refuse_existing,
    write_new,
)
from mergeopd.engine.new_prompts import PROMPT_FOLDER, PromptFile, find_prompts, sort_prompts
from mergeopd.engine.preflight import Inputs, preflight
from mergeopd.engine.recipe_text import Expert, Sketch, recipe_text
from mergeopd.errors import ModelError, Problem, RecipeError, TokenizerError
from mergeopd.models.checkpoint import Checkpoint
from mergeopd.models.facts import ModelFacts
from mergeopd.models.tokenizer import Tokenizer
from mergeopd.recipe.folders import Missing, absolute, existing_file, existing_model, project_folder
from mergeopd.recipe.load import YAML_SUFFIXES, load_card
from mergeopd.recipe.locate import Origins, shown
from mergeopd.recipe.models import TeacherCard
from mergeopd.recipe.tree import plain
from mergeopd.recipe.validate import problems_of

CARD_FOLDER = "teachers"
_LONGEST_ANSWER = 256


@dataclass(frozen=True, slots=True)
class RecipeWish:
    """What was asked for; what is None or empty is looked for in `teachers/` and `data/`.

    `prompts` are files, or `DOMAIN=FILE` where the name of a file does not tell.
    """

    name: str
    student: str | None
    teachers: Sequence[str]
    prompts: Sequence[str]

    @property
    def recipe_file(self) -> Path:
        """Where the recipe goes, below the current folder."""
        return Path("recipes", f"{self.name}.yaml")


@dataclass
class _Search:
    """What has been found so far, and what is wrong or left out."""

    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def new_recipe(wish: RecipeWish) -> tuple[Inputs, tuple[str, ...]]:
    """Write `recipes/NAME.yaml`; return what `check` makes of it, and what was left out, in words.

    A file is kept only when it passes. Raises:
        RecipeError: what is missing, or wrong with what was given, by option; or with a card, by its place.
        StorageError: the file exists, or the disk refuses.
    """
    search = _Search()
    search.problems += name_problems("NAME", [wish.name], "recipe")
    if not search.problems:
        refuse_existing(wish.recipe_file)
    experts = _experts(wish, search)
    student = _student(wish, experts, search)
    trained, measured = _prompts(wish, experts, search)
    used = _used(wish, experts, trained, search)
    if search.problems or student is None:
        raise RecipeError(search.problems)
    sketch = Sketch(
        name=wish.name,
        student=_as_written(wish.student or ""),
        student_dtype=native_dtype(Checkpoint.open(student)),
        experts=[replace(expert, crossed=_is_crossed(expert, student)) for expert in used],
        trained=trained,
        measured=[file for file in measured if file.verifier],
        max_new_tokens=_longest_answer([student, *(expert.folder for expert in used)]),
        left_out=search.notes,
        schema=Path("docs/schema/recipe.schema.json").is_file(),
    )
    return _written(wish, recipe_text(sketch)), tuple(search.notes)


def _written(wish: RecipeWish, text: str) -> Inputs:
    """Write the file and check it; take it back when it does not pass."""
    path = wish.recipe_file
    write_new(path, text)
    try:
        return preflight(path)
    except BaseException as error:
        path.unlink(missing_ok=True)
        with suppress(OSError):
            path.parent.rmdir()  # goes only if nothing else is in it
        if not isinstance(error, RecipeError):
            raise
        own = [p for p in error.problems if p.location.file == shown(path)]
        others = [p for p in error.problems if p.location.file != shown(path)]
        options = {"student": "--student", "teachers": "--teacher", "prompts": "--prompts"}
        options |= {"evaluation": "--prompts", "rollout": "--prompts"}
        raise RecipeError([*by_option(own, options, "NAME"), *others]) from None


# -------------------------------------------------------------------------------------------- teachers


def _experts(wish: RecipeWish, search: _Search) -> list[Expert]:
    """The teachers of all cards given or found; a card with mistakes is told like `check` does."""
    written = wish.teachers or sorted(
        shown(file) for file in Path(CARD_FOLDER).glob("*") if file.suffix in YAML_SUFFIXES
    )
    if not written:
        search.problems.append(
            option_problem(
                "--teacher",
                f"no card was given, and there is none in {CARD_FOLDER}/",
                "name cards (--teacher FILE), or make one (`mergeopd new teacher NAME --model DIR`)",
            )
        )
    experts: list[Expert] = []
    for card in dict.fromkeys(_as_written(text) for text in written):
        path = existing_file(card, Path.cwd(), "card", YAML_SUFFIXES)
        if isinstance(path, Missing):
            search.problems.append(option_problem("--teacher", path.message, path.remedy))
        else:
            expert = _expert(card, path, {e.name for e in experts}, search)
            if expert is not None:
                experts.append(expert)
    return experts


def _expert(card: str, path: Path, taken: set[str], search: _Search) -> Expert | None:
    loaded = load_card(path, os.environ, ())
    problems = list(loaded.problems)
    if loaded.root is not None and not problems:
        problems = list(problems_of(TeacherCard, plain(loaded.root), Origins(path, loaded.root, {})))
    if loaded.root is None or problems:
        search.problems += problems
        return None
    valid = TeacherCard.model_validate(plain(loaded.root))
    name = _name_of(path.stem, taken)
    folder = existing_model(valid.model, valid.revision, project_folder(path, "teachers"))
    if isinstance(folder, Missing):
        place = Origins(path, loaded.root, {}).at("model")
        search.problems.append(Problem(place, "model", folder.message, folder.remedy))
        return None
    # A card that lists no domain teaches one of its own name, which the recipe then has to say.
    return Expert(
        name=name,
        card=card,
        folder=folder,
        dtype=_dtype(folder),
        domains=valid.domains or (name,),
        listed=bool(valid.domains),
        tokenizer=_tokenizer(valid, path, folder),
    )


def _tokenizer(card: TeacherCard, path: Path, folder: Path) -> Path:
    """The folder of a card's tokenizer; the model's where the named one is missing, which `check` tells."""
    if card.tokenizer is None:
        return folder
    named = existing_model(card.tokenizer, None, project_folder(path, "teachers"), "tokenizer")
    return folder if isinstance(named, Missing) else named


def _is_crossed(expert: Expert, student: Path) -> bool:
    """Whether a teacher cuts texts otherwise than the student; a tokenizer that is damaged is told later."""
    try:
        return Tokenizer.load(student).num_shared(Tokenizer.load(expert.tokenizer)) is None
    except TokenizerError:
        return False


def _name_of(stem: str, taken: set[str]) -> str:
    """A teacher's name in the recipe: its card's, with letters that a name may have, once."""
    base = "".join(c if c.isascii() and (c.isalnum() or c in "_.-") else "-" for c in stem).lstrip("_.-")
    base = base or "teacher"
    name, number = base, 1
    while name in taken:
        number += 1
        name = f"{base}-{number}"
    return name


def _dtype(folder: Path) -> str:
    """What is wrong with a checkpoint is said by the check of the whole."""
    try:
        return native_dtype(Checkpoint.open(folder))
    except ModelError:
        return "float32"


def _used(
    wish: RecipeWish, experts: Sequence[Expert], trained: Sequence[PromptFile], search: _Search
) -> list[Expert]:
    """Teachers with prompts. One that was named must have some, one that was found need not."""
    domains = {file.domain for file in trained}
    used = [expert for expert in experts if domains & set(expert.domains)]
    for expert in experts:
        if expert in used or search.problems:
            continue
        what = f"no prompts for teacher '{expert.name}' ({_listed(expert.domains, 'domain')})"
        if wish.teachers or not used:
            remedy = f"name a file: --prompts {expert.domains[0]}=FILE"
            search.problems.append(option_problem("--prompts", what, remedy))
        else:
            search.notes.append(f"{expert.card}: {what}")
    return used


def _listed(names: Sequence[str], what: str) -> str:
    return f"{what}{'' if len(names) == 1 else 's'} {', '.join(names)}"


# --------------------------------------------------------------------------------------------- the rest


def _student(wish: RecipeWish, experts: Sequence[Expert], search: _Search) -> Path | None:
    """The student's folder. It is never guessed: it is what will be trained."""
    if wish.student is None:
        candidates = _candidates(experts)
        remedy = "name its folder: --student DIR"
        if candidates:
            remedy += f", perhaps {' or '.join(candidates)}"
        search.problems.append(option_problem("--student", "nothing says which model to train", remedy))
        return None
    folder = existing_model(wish.student, None, Path.cwd())
    if isinstance(folder, Missing):
        search.problems.append(option_problem("--student", folder.message, folder.remedy))
        return None
    try:
        if not is_text(wish.student):
            raise ModelError("the path is no text in UTF-8; rename the folder")
        Checkpoint.open(folder)
    except ModelError as error:
        search.problems.append(option_problem("--student", str(error).replace(str(folder), shown(folder))))
        return None
    return folder


def _candidates(experts: Sequence[Expert]) -> list[str]:
    """Model folders beside the teachers' that are no teacher's."""
    taken = {expert.folder for expert in experts}
    beside = sorted({config.parent for f in taken for config in f.parent.glob("*/config.json")} - taken)
    return [shown(folder) for folder in beside][:3]


def _prompts(
    wish: RecipeWish, experts: Sequence[Expert], search: _Search
) -> tuple[list[PromptFile], list[PromptFile]]:
    """Prompt files to train and to measure on, each with its domain."""
    given = bool(wish.prompts)
    domains = tuple(dict.fromkeys(domain for expert in experts for domain in expert.domains))
    written = list(wish.prompts) or find_prompts()
    if not written:
        remedy = "name files (--prompts FILE or --prompts DOMAIN=FILE)"
        message = f"no prompt file was given, and there is none below {PROMPT_FOLDER}/"
        search.problems.append(option_problem("--prompts", message, remedy))
    if not written or not domains:
        return [], []
    files, strangers, problems = sort_prompts(written, domains)
    search.problems += problems
    for stranger in strangers:
        message = f"'{stranger}' names none of the domains {', '.join(domains)}"
        if given:
            search.problems.append(
                option_problem("--prompts", message, f"say it: --prompts {domains[0]}={stranger}")
            )
        else:
            search.notes.append(f"{stranger}: its name has none of the domains {', '.join(domains)}")
    trained = [file for file in files if not file.held_out]
    measured = [file for file in files if file.held_out]
    for file in measured:
        if not file.verifier:
            search.notes.append(f"{file.path}: no verifier is sure to fit its references")
        elif file.domain not in {other.domain for other in trained}:
            search.notes.append(f"{file.path}: nothing is trained on for its domain {file.domain}")
    known = {file.domain for file in trained}
    return trained, [file for file in measured if file.domain in known]


def _longest_answer(folders: Sequence[Path]) -> int:
    """Tokens of the longest answer: at most half of the smallest context, so that prompts have room."""
    smallest = 2 * _LONGEST_ANSWER
    for folder in folders:
        with suppress(ModelError):  # the check of the whole tells
            smallest = min(smallest, ModelFacts.read(folder).max_positions)
    return max(smallest // 2, 1)


def _as_written(path: str) -> str:
    """A path below the current folder made relative to it, so that the project can move."""
    file = absolute(path, Path.cwd())
    return shown(file) if file.exists() else path
