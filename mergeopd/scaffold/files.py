"""What `mergeopd new` writes with: names, quoting, files that replace no other, mistakes told by option."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from ruamel.yaml import YAML
from ruamel.yaml.scalarstring import DoubleQuotedScalarString, SingleQuotedScalarString

from mergeopd.errors import Problem, StorageError
from mergeopd.messages import option_problem, shown
from mergeopd.models.checkpoint import Checkpoint
from mergeopd.recipe.values import NAME_PATTERN
from mergeopd.storage.failures import named_failures

# Without quotes, YAML's readers disagree about some texts in `{...}` (`?0`), so few go without.
_PLAIN = re.compile(r"[A-Za-z_./][A-Za-z0-9_./-]*")
_ENDLESS = 1 << 30  # columns; a scalar stays on its line


def name_problems(option: str, names: Iterable[str], what: str) -> list[Problem]:
    """Names that a recipe could not use."""
    return [
        option_problem(option, f"'{name}' cannot be the name of a {what}", "use letters, digits, _ . -")
        for name in names
        if not re.fullmatch(NAME_PATTERN, name)
    ]


def by_option(problems: Iterable[Problem], options: Mapping[str, str], other: str) -> list[Problem]:
    """Problems of a file that is not kept, at the options it was made from.

    `options` maps beginnings of recipe paths to options; what none fits stands at `other`.
    """
    placed = []
    for problem in problems:
        found = (option for start, option in options.items() if problem.path.startswith(start))
        placed.append(option_problem(next(found, other), problem.message, problem.remedy, problem.path))
    return placed


def refuse_existing(path: Path) -> None:
    """Raise StorageError when there is something at `path`: people's edits are never overwritten."""
    if path.exists() or path.is_symlink():
        raise StorageError(f"{shown(path)} exists already; choose another name, or remove it first")


def write_new(path: Path, text: str) -> None:
    """Write a file that was not there, with the folders above it.

    Raises StorageError when it exists or the disk refuses.
    """
    refuse_existing(path)
    data = text.encode("utf-8")
    with named_failures("write", path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("xb") as file:
            file.write(data)


def quoted(value: str) -> str:
    """`value` as a YAML scalar on one line, quoted where YAML or recipes would read something else.

    Safe within `{...}` and `[...]`, and no comment or variable to mergeopd.
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


def is_text(value: str) -> bool:
    """False for what cannot be written as UTF-8, as a file name of other bytes cannot."""
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def native_dtype(checkpoint: Checkpoint) -> str:
    """The precision of most of a checkpoint's bytes: bfloat16 or, for all others, float32."""
    tensors = checkpoint.tensors.values()
    narrow = sum(t.num_bytes for t in tensors if t.dtype == "BF16")
    return "bfloat16" if 2 * narrow > sum(t.num_bytes for t in tensors) else "float32"
