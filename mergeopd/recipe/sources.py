"""Find the files of prompt sources, and route their prompts to teachers."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from mergeopd.config.folders import Lookup, Missing, absolute, existing_file, is_hub_id
from mergeopd.config.locate import Origins, dotted
from mergeopd.config.suggest import did_you_mean
from mergeopd.config.tree import Keys
from mergeopd.errors import Problem
from mergeopd.recipe import checks
from mergeopd.recipe.cards import CardFile, resolve_reward_model
from mergeopd.recipe.dataset_folders import hub_dataset
from mergeopd.recipe.environments import (
    Environment,
    FunctionsEnvironment,
    SearchEnvironment,
    UserEnvironment,
)
from mergeopd.recipe.models import TeacherRef
from mergeopd.recipe.plan import RewardModelPlan, SourcePlan
from mergeopd.recipe.schema import PromptSource, TrainSource
from mergeopd.recipe.verifiers import (
    CombinedVerifier,
    JsonVerifier,
    RewardModelVerifier,
    UserVerifier,
    Verifier,
)

PROMPT_SUFFIXES = (".jsonl", ".json", ".csv", ".parquet", ".gz")


def file_format(path: Path) -> str | None:
    """Return `.jsonl`, `.json`, `.csv` or `.parquet`, without the `.gz` of text files; None for others."""
    suffix = path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix
    if suffix == ".parquet" and path.suffix == ".gz":
        return None
    return suffix if suffix in PROMPT_SUFFIXES[:-1] else None


@dataclass
class SourceResolver:
    """Resolves sources one by one: gives unique names, rejects prompts that are used twice.

    `cards` are those of reward models and teachers, by their place in the recipe.
    """

    origins: Origins
    allow_code: Collection[str] | None  # None: invalid, so functions are not checked against it
    cards: Mapping[Keys, CardFile | Missing]
    lookup: Lookup
    names: set[str] = field(default_factory=set)
    seen: dict[tuple[str, str | None, str | None], Keys] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    def resolve(
        self, source: PromptSource, path: Keys, teachers: Mapping[str, float], name: str | None = None
    ) -> SourcePlan | None:
        """Make the paths of a source absolute; None if there is a problem. `name` defaults to the file's."""
        before = len(self.problems)
        place = self._find(source, path)
        verifier = self._verifier(source.verifier, (*path, "verifier"))
        reward_model = self._reward_model(verifier, (*path, "verifier", "card"))
        environment = self._environment(source.environment, (*path, "environment"))
        if place is None or len(self.problems) > before:
            return None
        file, dataset = place
        absent = {"response_field": None, "share": 1.0}  # of the other kind of source
        same = {name: value for name, value in source if name in SourcePlan.model_fields}
        own = (dataset or file.name).rpartition("/")[2].removesuffix(".gz")
        if file_format(Path(own)):
            own = Path(own).stem
        resolved = {
            "name": name or self._name(f"{own}-{source.split}" if source.split else own),
            "source": str(file),
            "dataset": dataset,
            "revision": file.name if dataset else None,
            "verifier": verifier,
            "reward_model": reward_model,
            "environment": environment,
            "teachers": teachers,
        }
        return SourcePlan.model_validate(absent | same | resolved)

    def report(self, path: Keys, message: str, remedy: str = "") -> None:
        problem = self.origins.problem(path, message, remedy)
        # A YAML anchor puts one mistake at several paths.
        if not any((p.location, p.message) == (problem.location, message) for p in self.problems):
            self.problems.append(problem)

    def _name(self, wanted: str) -> str:
        name, number = wanted, 1
        while name in self.names:
            number += 1
            name = f"{wanted}#{number}"
        self.names.add(name)
        return name

    def _find(self, source: PromptSource, path: Keys) -> tuple[Path, str | None] | None:
        """Return the file or folder, and the id of a dataset on the hub."""
        where: Keys = (*path, "source")
        base = self.origins.place(where).base
        written, dataset = absolute(source.source, base), None
        file: Path | Missing = written
        if not os.path.exists(written) and is_hub_id(source.source, base) and not file_format(written):
            dataset = source.source
            file = hub_dataset(
                dataset, source.subset, source.split, source.revision, download=source.download
            )
        elif not os.path.isdir(written):
            file = existing_file(source.source, base, "prompt file", PROMPT_SUFFIXES)
        if isinstance(file, Missing) and self.lookup.is_elsewhere:
            return written, dataset
        if isinstance(file, Missing):
            self.report(where, file.message, file.remedy)
            return None
        self._check_keys(source, path, file, dataset)
        if not file.is_dir() and file_format(file) is None:
            message = f"'{source.source}' is not a .jsonl, .json, .csv or .parquet file"
            self.report(where, message, "convert it, one prompt a row")
        if file.is_dir() and not checks.is_installed("datasets"):
            remedy = "pip install 'mergeopd[data]', or name a .jsonl or .parquet file"
            self.report(where, "the package datasets is not installed", remedy)
        self._check_once(source, path, file)
        return file, dataset

    def _check_keys(self, source: PromptSource, path: Keys, file: Path, dataset: str | None) -> None:
        """Report keys that the kind of source does not have."""
        kind = "folder" if file.is_dir() else "file"
        unused = [] if dataset else ["revision", "download"]
        unused += [] if file.is_dir() else ["subset", "split"]
        for key in unused:
            if getattr(source, key):
                self.report(
                    (*path, key), f"'{source.source}' is a {kind}, and {kind}s have no `{key}`", "remove it"
                )

    def _check_once(self, source: PromptSource, path: Keys, file: Path) -> None:
        first = self.seen.setdefault((os.path.realpath(file), source.subset, source.split), path)
        where: Keys = (*path, "source")
        if first != path and first[0] == path[0]:
            share = "; `share` sets how often its prompts are drawn" if path[0] == "prompts" else ""
            message = f"'{source.source}' is already listed at {dotted(first)}"
            self.report(where, message, f"remove one{share}")
        elif first != path:
            message = f"'{source.source}' is also trained on ({dotted(first)})"
            self.report(where, message, "evaluate on prompts that are not trained on")

    def _verifier(self, verifier: Verifier | None, path: Keys) -> Verifier | None:
        if isinstance(verifier, CombinedVerifier):
            for index, each in enumerate(verifier.of):
                part = self._verifier(each.verifier, (*path, "of", index, "verifier"))
                of = (*verifier.of[:index], each.model_copy(update={"verifier": part}))
                verifier = verifier.model_copy(update={"of": (*of, *verifier.of[index + 1 :])})
            return verifier
        if isinstance(verifier, UserVerifier):
            self._allowed(verifier.function, (*path, "function"))
        missing = None
        if verifier is not None and not self.lookup.is_elsewhere:
            missing = checks.missing_package(verifier)
        if missing is not None:
            self.report((*path, "kind"), *missing)
        if isinstance(verifier, JsonVerifier) and verifier.schema_file is not None:
            where: Keys = (*path, "schema_file")
            file = existing_file(verifier.schema_file, self.origins.place(where).base, "JSON Schema file")
            if isinstance(file, Missing) and not self.lookup.is_elsewhere:
                self.report(where, file.message, file.remedy)
            elif not isinstance(file, Missing):
                return verifier.model_copy(update={"schema_file": str(file)})
        return verifier

    def _reward_model(self, verifier: Verifier | None, where: Keys) -> RewardModelPlan | None:
        if not isinstance(verifier, RewardModelVerifier):
            return None
        return resolve_reward_model(where, self.cards[where], self.origins, self.problems, self.lookup)

    def _environment(self, environment: Environment | None, path: Keys) -> Environment | None:
        match environment:
            case FunctionsEnvironment(functions=functions):
                for i, function in enumerate(functions):
                    self._allowed(function, (*path, "functions", i))
            case UserEnvironment(environment=function):
                self._allowed(function, (*path, "environment"))
            case SearchEnvironment(corpus=corpus):
                where: Keys = (*path, "corpus")
                if not checks.is_installed("bm25s") and not self.lookup.is_elsewhere:
                    remedy = "install it: `pip install 'mergeopd[search]'`"
                    self.report((*path, "kind"), "'search' needs the package bm25s", remedy)
                file = existing_file(corpus, self.origins.place(where).base, "corpus", (".jsonl",))
                if isinstance(file, Missing):
                    if not self.lookup.is_elsewhere:
                        self.report(where, file.message, file.remedy)
                    return environment
                return environment.model_copy(update={"corpus": str(file)})
        return environment

    def _allowed(self, function: str, path: Keys) -> None:
        if self.allow_code is not None and function not in self.allow_code:
            remedy = did_you_mean(function, self.allow_code, f"add `allow_code: [{function}]`")
            self.report(path, f"'{function}' is not in `allow_code`", remedy)


@dataclass(frozen=True)
class Router:
    """Selects the teachers of a source.

    `named` are all teachers of the recipe, including invalid ones; `domains` are those of the cards.
    `all_cards` is False if some card could not be read; domains without a teacher are then not reported.
    """

    named: Collection[str]
    refs: Mapping[str, TeacherRef]
    domains: Mapping[str, tuple[str, ...]]
    all_cards: bool
    origins: Origins

    def weights(self, source: TrainSource) -> dict[str, float]:
        """Teachers with prompt weight times teacher weight, zeros included."""
        written = source.teachers
        if written is None:
            written = {name: 1.0 for name, domains in self.domains.items() if source.domain in domains}
        return {
            name: weight * self.refs[name].weight for name, weight in written.items() if name in self.refs
        }

    def problems(self, source: TrainSource, path: Keys, *, needed: bool) -> list[Problem]:
        """Report unknown teachers, and sources with zero weights only, or without a needed teacher."""
        weights, written = self.weights(source), source.teachers
        where: Keys = (*path, "domain" if written is None else "teachers")
        if written is None and not weights:
            if not needed or not self.all_cards:
                return []
            listed = {domain for domains in self.domains.values() for domain in domains}
            remedy = did_you_mean(source.domain, listed, "name `teachers` here, or add the domain to a card")
            message = f"no teacher is named, and no card lists the domain '{source.domain}'"
            return [self.origins.problem(where, message, remedy)]
        problems = []
        for name in written or ():
            if name not in self.named:
                remedy = did_you_mean(name, self.named, f"teachers are {', '.join(self.named)}")
                problems.append(
                    self.origins.problem((*where, name), f"unknown teacher '{name}'", remedy, key=True)
                )
        if weights and not any(weights.values()) and all(name in self.refs for name in written or ()):
            message = f"every teacher has weight 0 here ({', '.join(weights)})"
            problems.append(self.origins.problem(where, message, "give one a positive weight"))
        return problems
