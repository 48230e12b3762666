"""Read teacher cards and find the folders they name."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mergeopd.config.folders import (
    Missing,
    absolute,
    existing_file,
    existing_model,
    is_hub_id,
    project_folder,
)
from mergeopd.config.load import YAML_SUFFIXES, load_card
from mergeopd.config.locate import Origins
from mergeopd.config.suggest import closest
from mergeopd.config.tree import Keys, Node, find, plain
from mergeopd.config.validate import problems_of
from mergeopd.errors import Problem
from mergeopd.messages import shown
from mergeopd.recipe.models import TeacherCard, TeacherRef
from mergeopd.recipe.plan import TeacherPlan


@dataclass(frozen=True, slots=True)
class CardFile:
    """A card's file as read for one teacher. Problems of a shared file are reported for the `first` only."""

    path: Path
    root: Node | None
    problems: tuple[Problem, ...]
    first: bool


@dataclass(frozen=True, slots=True)
class ResolvedTeachers:
    """Teachers with valid cards, the domains of all cards, and the problems of the others."""

    plans: Mapping[str, TeacherPlan]
    domains: Mapping[str, tuple[str, ...]]
    problems: tuple[Problem, ...]


def read_cards(
    refs: Mapping[str, TeacherRef], recipe: Node, env: Mapping[str, str]
) -> dict[str, CardFile | Missing]:
    """Read the card of every teacher that has one, by teacher name."""
    cards: dict[str, CardFile | Missing] = {}
    by_path: dict[Path, CardFile] = {}
    for name, ref in refs.items():
        if ref.card is None:
            continue
        where: Keys = ("teachers", name, "card")
        base = find(recipe, where).base
        path = existing_file(ref.card, base, "card", YAML_SUFFIXES)
        if isinstance(path, Missing):
            cards[name] = (
                _model_instead(name, ref.card, base) or _named_without_folder(ref.card, base) or path
            )
        elif path in by_path:
            cards[name] = CardFile(path, by_path[path].root, (), first=False)
        else:
            loaded = load_card(path, env, where)
            cards[name] = by_path[path] = CardFile(path, loaded.root, loaded.problems, first=True)
    return cards


def _model_instead(name: str, written: str, base: Path) -> Missing | None:
    """A model that was named in place of its card: a folder, or a hub id."""
    path = absolute(written, base)
    is_folder = (path / "config.json").is_file()
    if not is_folder and (path.suffix in YAML_SUFFIXES or not is_hub_id(written, base)):
        return None
    model = shown(path) if is_folder else written
    command = shlex.join(["mergeopd", "new", "teacher", name, "--model", model])
    remedy = f"write its card with `{command}`, and name that: `{name}: teachers/{name}.yaml`"
    if is_folder:
        return Missing(f"'{written}' is a model folder, not a teacher card", remedy)
    return Missing(f"unknown card '{written}'", f"if this is a hub id, {remedy}")


def _named_without_folder(written: str, base: Path) -> Missing | None:
    wanted = absolute(written, base)
    if wanted.parent != base:
        return None
    names = sorted(card.name for card in (base / "teachers").glob("*") if card.suffix in YAML_SUFFIXES)
    near = closest(wanted.name, names)
    return Missing(f"unknown card '{written}'", f"did you mean 'teachers/{near}'?") if near else None


def resolve_teachers(
    refs: Mapping[str, TeacherRef], cards: Mapping[str, CardFile | Missing], origins: Origins
) -> ResolvedTeachers:
    """Check every card and find the folders it names, without reading them.

    Teachers without a card have no domains.
    """
    plans: dict[str, TeacherPlan] = {}
    domains: dict[str, tuple[str, ...]] = {}
    problems: list[Problem] = []
    for name, ref in refs.items():
        if ref.card is None:
            domains[name] = ()
            continue
        where: Keys = ("teachers", name, "card")
        card = cards[name]
        if isinstance(card, Missing):
            problems.append(origins.problem(where, card.message, card.remedy))
            continue
        of_card = list(card.problems)
        if card.root is not None:
            data = plain(card.root)
            invalid = problems_of(TeacherCard, data, origins, where)
            of_card += invalid
            if not invalid:
                valid = TeacherCard.model_validate(data)
                domains[name] = valid.domains
                plan = _plan(name, ref, valid, card.path, origins, of_card)
                if plan is not None and not of_card:
                    plans[name] = plan
        if card.first:
            problems += of_card
    return ResolvedTeachers(plans, domains, tuple(problems))


def _plan(
    name: str, ref: TeacherRef, card: TeacherCard, file: Path, origins: Origins, problems: list[Problem]
) -> TeacherPlan | None:
    """Make the paths of a teacher absolute; missing ones are added to `problems`."""
    where: Keys = ("teachers", name, "card")
    base = project_folder(file, "teachers")
    paths: dict[str, str] = {}
    targets: dict[str, Path | Missing] = {"model": existing_model(card.model, card.revision, base)}
    if card.tokenizer is not None:
        targets["tokenizer"] = existing_model(card.tokenizer, None, base, "tokenizer")
    if card.template is not None:
        targets["template"] = existing_file(card.template, base, "template")
    for key, path in targets.items():
        if isinstance(path, Missing):
            problems.append(origins.problem((*where, key), path.message, path.remedy))
        else:
            paths[key] = str(path)
    if "model" not in paths:
        return None
    return TeacherPlan(
        name=name,
        student=None,
        model=paths["model"],
        tokenizer=paths.get("tokenizer", paths["model"]),
        template=paths.get("template"),
        template_arguments=card.template_arguments,
        dtype=ref.dtype or "float32",
        system=ref.system,
        prompt=ref.prompt,
        fingerprint=card.fingerprint,
        canary=card.canary,
        bridge=ref.bridge,
        weight=ref.weight,
        licence=card.licence,
    )
