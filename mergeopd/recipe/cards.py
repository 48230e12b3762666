"""Read the cards of teachers and reward models, and find the folders they name."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from mergeopd.config.folders import (
    HERE,
    Lookup,
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
from mergeopd.recipe.plan import RewardModelPlan, TeacherPlan


@dataclass(frozen=True, slots=True)
class CardFile:
    """A card's file as read for one model. Problems of a shared file are reported for the `first` only."""

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
    named: Mapping[Keys, str], recipe: Node, env: Mapping[str, str]
) -> dict[Keys, CardFile | Missing]:
    """Read the cards that a recipe names, by the place where it does."""
    cards: dict[Keys, CardFile | Missing] = {}
    by_path: dict[Path, CardFile] = {}
    for where, written in named.items():
        base = find(recipe, where).base
        path = existing_file(written, base, "card", YAML_SUFFIXES)
        if isinstance(path, Missing):
            cards[where] = (
                _model_instead(where, written, base) or _named_without_folder(written, base) or path
            )
        elif path in by_path:
            cards[where] = CardFile(path, by_path[path].root, (), first=False)
        else:
            loaded = load_card(path, env, where)
            cards[where] = by_path[path] = CardFile(path, loaded.root, loaded.problems, first=True)
    return cards


def _model_instead(where: Keys, written: str, base: Path) -> Missing | None:
    """A model that was named in place of its card: a folder, or a hub id."""
    path = absolute(written, base)
    is_folder = (path / "config.json").is_file()
    if not is_folder and (path.suffix in YAML_SUFFIXES or not is_hub_id(written, base)):
        return None
    model = shown(path) if is_folder else written
    if where[0] == "teachers":
        what, name = "teacher", str(where[1])
        command = shlex.join(["mergeopd", "new", "teacher", name, "--model", model])
        remedy = f"write its card with `{command}`, and name that: `{name}: teachers/{name}.yaml`"
    else:
        what = "reward model"
        remedy = (
            "write its card, such as teachers/reward.yaml, with `card: 1`, `name: reward` and "
            f"`model: {model}`, and name that: `card: teachers/reward.yaml`"
        )
    if is_folder:
        return Missing(f"'{written}' is a model folder, not a {what} card", remedy)
    return Missing(f"unknown card '{written}'", f"if this is a hub id, {remedy}")


def _named_without_folder(written: str, base: Path) -> Missing | None:
    wanted = absolute(written, base)
    if wanted.parent != base:
        return None
    names = sorted(card.name for card in (base / "teachers").glob("*") if card.suffix in YAML_SUFFIXES)
    near = closest(wanted.name, names)
    return Missing(f"unknown card '{written}'", f"did you mean 'teachers/{near}'?") if near else None


def resolve_teachers(
    refs: Mapping[str, TeacherRef],
    cards: Mapping[Keys, CardFile | Missing],
    origins: Origins,
    lookup: Lookup = HERE,
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
        valid = _valid_card(where, cards[where], origins, problems, lookup)
        if valid is None:
            continue
        card, paths = valid
        domains[name] = card.domains
        if card.api is not None:
            problems += _unused_settings(name, ref, origins)
        if ref.quantize is not None and card.served is not None:
            message = f"the servers of teacher '{name}' have its weights, so `quantize` has no effect"
            remedy = "remove it, and start the servers with a quantised model"
            problems.append(origins.problem(("teachers", name, "quantize"), message, remedy, key=True))
        if paths is not None:
            plans[name] = _teacher(name, ref, card, paths)
    return ResolvedTeachers(plans, domains, tuple(problems))


def resolve_reward_model(
    where: Keys,
    card: CardFile | Missing,
    origins: Origins,
    problems: list[Problem],
    lookup: Lookup = HERE,
) -> RewardModelPlan | None:
    """Check a reward model's card and find the folders it names; None, and problems, if it has mistakes."""
    result = _valid_card(where, card, origins, problems, lookup)
    if result is None:
        return None
    valid, paths = result
    if valid.api is not None:
        message = "a reward model needs its weights, and this card names a model behind an API"
        problems.append(origins.problem((*where, "api"), message, "name the card of a folder", key=True))
    if valid.served is not None:
        message = "reward models are read from local folders"
        problems.append(origins.problem((*where, "served"), message, "remove it", key=True))
        return None
    if valid.residency != "auto":
        message = "reward models are in memory as a whole"
        problems.append(origins.problem((*where, "residency"), message, "remove it", key=True))
        return None
    if valid.canary is not None:
        message = (
            "a canary is a generated response with its log-probabilities, and reward models generate none"
        )
        problems.append(origins.problem((*where, "canary"), message, "remove it", key=True))
        return None
    if paths is None:
        return None
    return RewardModelPlan(
        name=valid.name,
        model=paths["model"],
        tokenizer=paths.get("tokenizer", paths["model"]),
        template=paths.get("template"),
        template_arguments=valid.template_arguments,
        fingerprint=valid.fingerprint,
    )


def _valid_card(
    where: Keys,
    card: CardFile | Missing,
    origins: Origins,
    problems: list[Problem],
    lookup: Lookup,
) -> tuple[TeacherCard, dict[str, str] | None] | None:
    """Return a valid card, and the absolute paths it names or None if one is missing; add to `problems`."""
    if isinstance(card, Missing):
        problems.append(origins.problem(where, card.message, card.remedy))
        return None
    of_card = list(card.problems)
    result: tuple[TeacherCard, dict[str, str] | None] | None = None
    if card.root is not None:
        data = plain(card.root)
        invalid = problems_of(TeacherCard, data, origins, where)
        of_card += invalid
        if not invalid:
            valid = TeacherCard.model_validate(data)
            paths = _paths(where, valid, card.path, origins, of_card, lookup)
            result = valid, None if of_card else paths
    if card.first:
        problems += of_card
    return result


def _paths(
    where: Keys, card: TeacherCard, file: Path, origins: Origins, problems: list[Problem], lookup: Lookup
) -> dict[str, str]:
    """Make the paths of a card absolute, by key; missing ones are added to `problems`."""
    base = project_folder(file, "teachers")
    name = str(where[1]) if where[0] == "teachers" else ""
    paths: dict[str, str] = {}
    targets: dict[str, Path | Missing] = {}
    if card.model is not None:
        targets["model"] = lookup.model(name, card.model, card.revision, base)
    if card.tokenizer is not None:
        targets["tokenizer"] = existing_model(card.tokenizer, None, base, "tokenizer")
    if card.template is not None:
        targets["template"] = existing_file(card.template, base, "template")
    for key, path in targets.items():
        if isinstance(path, Missing) and lookup.is_elsewhere and key != "model":
            paths[key] = str(absolute(str(getattr(card, key)), base))
        elif isinstance(path, Missing):
            problems.append(origins.problem((*where, key), path.message, path.remedy))
        else:
            paths[key] = str(path)
    return paths


def _teacher(name: str, ref: TeacherRef, card: TeacherCard, paths: Mapping[str, str]) -> TeacherPlan:
    return TeacherPlan(
        name=name,
        student=None,
        model=paths.get("model"),
        tokenizer=paths.get("tokenizer", paths.get("model")),
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
        api=card.api,
        served=card.served,
        residency=card.residency,
        quantize=ref.quantize,
    )


def _unused_settings(name: str, ref: TeacherRef, origins: Origins) -> Iterator[Problem]:
    """Report settings of a pass over tokens, for a teacher that only writes text."""
    for key in ("bridge", "dtype", "quantize"):
        if getattr(ref, key) is not None:
            yield origins.problem(
                ("teachers", name, key),
                f"teacher '{name}' is behind an API and writes text only, so `{key}` has no effect",
                "remove it",
                key=True,
            )
