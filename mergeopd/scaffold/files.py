"""Shared by both `mergeopd new` commands: names, YAML quoting, templates, and files that replace no other."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal

from jinja2 import Environment, PackageLoader, StrictUndefined
from ruamel.yaml import YAML
from ruamel.yaml.scalarstring import DoubleQuotedScalarString, SingleQuotedScalarString

from mergeopd.config.values import NAME_PATTERN
from mergeopd.errors import Problem, StorageError
from mergeopd.messages import option_problem, shown
from mergeopd.models.checkpoint import FLOATS, Checkpoint
from mergeopd.recipe.jsonschema import card_schema, recipe_schema
from mergeopd.storage.failures import named_failures
from mergeopd.storage.folders import write_atomic

# YAML parsers disagree about some unquoted texts in `{...}` (`?0`), so few are left unquoted.
_PLAIN = re.compile(r"[A-Za-z_./][A-Za-z0-9_./-]*")
_ENDLESS = 1 << 30  # columns; a scalar stays on its line

Document = Literal["recipe", "card"]
_SCHEMAS: Mapping[Document, Callable[[], dict[str, Any]]] = {"recipe": recipe_schema, "card": card_schema}


def name_problems(option: str, names: Iterable[str], what: str) -> list[Problem]:
    return [
        option_problem(option, f"'{name}' cannot be the name of a {what}", "use letters, digits, _ . -")
        for name in names
        if not re.fullmatch(NAME_PATTERN, name)
    ]


def by_option(problems: Iterable[Problem], options: Mapping[str, str], other: str) -> list[Problem]:
    """Move the problems of a file that is not kept to the options it was made from.

    `options` maps beginnings of recipe paths to options; problems that fit none are placed at `other`.
    """
    placed = []
    for problem in problems:
        matching = (option for start, option in options.items() if problem.path.startswith(start))
        placed.append(option_problem(next(matching, other), problem.message, problem.remedy, problem.path))
    return placed


def refuse_existing(path: Path) -> None:
    """Raise StorageError if something exists at `path`: people's edits are never overwritten."""
    if path.exists() or path.is_symlink():
        raise StorageError(f"{shown(path)} exists already; choose another name, or remove it first")


def write_new(path: Path, text: str) -> None:
    """Write a new file and the folders above it. Raises StorageError if it exists or the disk fails."""
    refuse_existing(path)
    data = text.encode("utf-8")
    with named_failures("write", path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("xb") as file:
            file.write(data)


def render(document: Document, **values: object) -> str:
    """Fill the template of a recipe or card. Its filters `quoted` and `flow` write YAML."""
    template = _environment().get_template(f"{document}.yaml.j2")
    return template.render(schema=Path("..", schema_file(document)).as_posix(), **values)


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("mergeopd.scaffold"),
        undefined=StrictUndefined,
        keep_trailing_newline=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"quoted": quoted, "flow": flow}
    return environment


def schema_file(document: Document) -> Path:
    """Return the schema for editors, below the current folder: the project's, or that of `write_schema`."""
    own = Path("docs/schema", f"{document}.schema.json")
    return own if own.is_file() else Path(".mergeopd", own.name)


def write_schema(document: Document) -> None:
    """Write the schema named in a new file's first line, unless docs/schema/ has it."""
    file = schema_file(document)
    if file.parts[0] == ".mergeopd":  # a cache: an older version may be replaced
        write_atomic(file, json.dumps(_SCHEMAS[document](), indent=2) + "\n")


def quoted(value: str) -> str:
    """Format `value` as a YAML scalar on one line, quoted where it would otherwise be read differently.

    Safe within `{...}` and `[...]`, and never read as a comment or variable.
    """
    text = value.replace("${", "$${")
    yaml = YAML(pure=True)
    yaml.default_flow_style = True
    yaml.width = _ENDLESS
    stream = io.StringIO()
    if not text.isprintable():
        text = DoubleQuotedScalarString(text)
    elif not _PLAIN.fullmatch(text):
        text = SingleQuotedScalarString(text)
    yaml.dump([text], stream)
    return stream.getvalue().strip()[1:-1]


def flow(values: Mapping[str, str | Sequence[str] | None]) -> str:
    """Format `{key: value, other: [a, b]}` in YAML, without keys whose values are None or empty."""
    parts = []
    for key, value in values.items():
        if value:
            text = quoted(value) if isinstance(value, str) else f"[{', '.join(map(quoted, value))}]"
            parts.append(f"{key}: {text}")
    return f"{{{', '.join(parts)}}}"


def is_text(value: str) -> bool:
    """Whether `value` can be encoded in UTF-8; file names with other bytes cannot."""
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def native_dtype(checkpoint: Checkpoint) -> str:
    """Return the dtype of most bytes of float weights: bfloat16 or, for all others, float32."""
    tensors = [tensor for tensor in checkpoint.tensors.values() if tensor.dtype in FLOATS]
    narrow = sum(t.num_bytes for t in tensors if t.dtype == "BF16")
    return "bfloat16" if 2 * narrow > sum(t.num_bytes for t in tensors) else "float32"
