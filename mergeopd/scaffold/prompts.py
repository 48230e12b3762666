"""Prompt files for a new recipe: domain, held out or not, fields, verifier."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mergeopd.config.folders import Missing, absolute, existing_file
from mergeopd.config.suggest import did_you_mean
from mergeopd.config.values import NAME_PATTERN
from mergeopd.data.prompts import read_prompts
from mergeopd.errors import DataError, Problem
from mergeopd.messages import option_problem, shown
from mergeopd.recipe.plan import SourcePlan
from mergeopd.reward.numbers import reference_number
from mergeopd.scaffold.files import is_text

PROMPT_FOLDER = "data"
_SUFFIXES = (".jsonl", ".parquet")
_HELD_OUT = frozenset(
    {"eval", "evaluation", "test", "val", "valid", "validation", "dev", "heldout", "holdout"}
)
# Usual names of fields; the first that a file has is used.
_PROMPT_FIELDS = ("prompt", "messages", "question", "problem", "instruction")
_REFERENCE_FIELDS = ("answer", "reference", "solution", "target")
_SHORT = 100  # characters; responses rarely equal a longer reference to the letter

VerifierKind = Literal["number", "json", "exact"]


@dataclass(frozen=True, slots=True)
class PromptFile:
    """A file with its domain. `verifier` is None without references, and if none fits all of them."""

    path: str
    domain: str
    held_out: bool
    prompt_field: str
    reference_field: str
    verifier: VerifierKind | None


def find_prompts() -> list[str]:
    candidates = (file for file in Path(PROMPT_FOLDER).rglob("*") if file.suffix in _SUFFIXES)
    return sorted(shown(file) for file in candidates if file.is_file())


def sort_prompts(
    written: Sequence[str], domains: Sequence[str]
) -> tuple[list[PromptFile], list[str], list[Problem]]:
    """Return files with their domains, files of no known domain, and problems.

    `written` are paths or `DOMAIN=FILE`.
    """
    files: dict[str, PromptFile] = {}
    unknown: list[str] = []
    problems: list[Problem] = []
    for text in written:
        domain, file = _split(text)
        path = existing_file(file, Path.cwd(), "prompt file", _SUFFIXES)
        if isinstance(path, Missing):
            problems.append(option_problem("--prompts", path.message, path.remedy))
        elif path.suffix not in _SUFFIXES or not is_text(str(path)):
            message = (
                f"'{file}' is neither .jsonl nor .parquet" if is_text(file) else "a path is not valid UTF-8"
            )
            problems.append(option_problem("--prompts", message, "convert it, one prompt a row"))
        elif domain is not None and domain not in domains:
            remedy = did_you_mean(domain, domains, f"there are {', '.join(domains)}")
            problems.append(option_problem("--prompts", f"no teacher has the domain '{domain}'", remedy))
        elif (domain := domain or _domain_of(shown(path), domains)) is None:
            unknown.append(shown(path))
        else:
            files[shown(path)] = _prompt_file(path, domain)
    return list(files.values()), unknown, problems


def _split(text: str) -> tuple[str | None, str]:
    """Split `DOMAIN=FILE`, unless that is the name of a file."""
    domain, equals, file = text.partition("=")
    if not equals or absolute(text, Path.cwd()).exists() or not re.fullmatch(NAME_PATTERN, domain):
        return None, text
    return domain, file


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", text.lower())


def _domain_of(path: str, domains: Sequence[str]) -> str | None:
    """Return the domain whose words the path contains: the longest of several, None if not unique."""
    if len(domains) == 1:
        return domains[0]
    here = _words(str(Path(path).with_suffix("")))
    lengths = {
        domain: len(words)
        for domain in domains
        if (words := _words(domain)) and any(here[i : i + len(words)] == words for i in range(len(here)))
    }
    best = [domain for domain, length in lengths.items() if length == max(lengths.values())]
    return best[0] if len(best) == 1 else None


def _is_held_out(path: str) -> bool:
    words = _words(Path(path).stem) + _words(Path(path).parent.name)
    return not _HELD_OUT.isdisjoint(words) or "held out" in " ".join(words)


def _prompt_file(path: Path, domain: str) -> PromptFile:
    fields = _fields(path)
    prompt_field = next((name for name in _PROMPT_FIELDS if name in fields), _PROMPT_FIELDS[0])
    reference_field = next((name for name in _REFERENCE_FIELDS if name in fields), _REFERENCE_FIELDS[0])
    return PromptFile(
        path=shown(path),
        domain=domain,
        held_out=_is_held_out(shown(path)),
        prompt_field=prompt_field,
        reference_field=reference_field,
        verifier=_verifier(path, domain, prompt_field, reference_field),
    )


def _fields(path: Path) -> Sequence[str]:
    """Return the names of the first row's fields; none if unreadable, which the recipe's check reports."""
    try:
        if path.suffix == ".parquet":
            import pyarrow.parquet

            return list(pyarrow.parquet.read_schema(path).names)
        with path.open(encoding="utf-8-sig") as file:
            row: Any = json.loads(next((line for line in file if line.strip()), "{}"))
        return list(row) if isinstance(row, dict) else []
    except (OSError, ValueError):
        return []


def _verifier(path: Path, domain: str, prompt_field: str, reference_field: str) -> VerifierKind | None:
    source = SourcePlan(
        name="new",
        source=str(path),
        domain=domain,
        verifier=None,
        prompt_field=prompt_field,
        reference_field=reference_field,
        response_field=None,
        teachers={},
        share=1.0,
        limit=None,
    )
    try:
        references = [prompt.reference for prompt in read_prompts(source)]
    except DataError:
        return None  # the check of the recipe reports it
    texts = [text for text in references if text is not None]
    if not texts or len(texts) < len(references):
        return None
    if all(reference_number(text) is not None for text in texts):
        return "number"
    if all(_is_json(text) for text in texts):
        return "json"
    return "exact" if max(map(len, texts)) <= _SHORT else None


def _is_json(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict | list)
    except ValueError:
        return False
