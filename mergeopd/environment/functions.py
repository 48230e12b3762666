"""Python functions as tools."""

from __future__ import annotations

import importlib
import inspect
import json
import re
from collections.abc import Callable, Collection, Sequence
from typing import Any, cast

from pydantic import TypeAdapter

from mergeopd.environment.protocol import Tools, schema
from mergeopd.errors import EnvironmentFailed

_ARGUMENTS = re.compile(r"\n\s*(?:Args|Arguments|Parameters):\s*\n", re.IGNORECASE)
_SECTION = re.compile(r"\n\s*(?:Returns?|Raises|Yields|Examples?|Notes?):\s*\n", re.IGNORECASE)
_ARGUMENT = re.compile(r"^\s*(\w+)\s*(?:\([^)]*\))?:\s*(.+?)\s*$", re.MULTILINE)


def functions(paths: Sequence[str], allow_code: Collection[str]) -> Tools:
    """Import functions and make their schemas.

    Raises EnvironmentFailed for a function that is not in `allow_code`, cannot be imported, or has parameters
    for which there is no schema.
    """
    called = {path.rpartition(":")[2]: imported(path, allow_code) for path in paths}
    schemas = {name: function_schema(name, function) for name, function in called.items()}
    return Tools(schemas, {name: _validated(function) for name, function in called.items()})


def imported(path: str, allow_code: Collection[str]) -> Callable[..., Any]:
    """Import `package.module:name`. Raises EnvironmentFailed."""
    if path not in allow_code:
        raise EnvironmentFailed(f"{path!r} is not allowed; add it to allow_code if you trust it")
    module, _, name = path.partition(":")
    try:
        named = getattr(importlib.import_module(module), name, None)
    except Exception as error:
        raise EnvironmentFailed(
            f"importing {module!r} raised {type(error).__name__}: {error}; the folder that holds it must be "
            "on PYTHONPATH"
        ) from error
    if not callable(named):
        raise EnvironmentFailed(f"{module!r} has no function or class {name!r}")
    return named  # type: ignore[no-any-return]


def function_schema(name: str, function: Callable[..., Any]) -> dict[str, Any]:
    """Make the JSON schema of a function from its type hints and docstring (Google style).

    Raises EnvironmentFailed for a parameter without a type hint, or one that JSON cannot hold.
    """
    for parameter in inspect.signature(function).parameters.values():
        if parameter.annotation is inspect.Parameter.empty or parameter.kind in (
            inspect.Parameter.VAR_POSITIONAL,
            inspect.Parameter.VAR_KEYWORD,
            inspect.Parameter.POSITIONAL_ONLY,
        ):
            raise EnvironmentFailed(
                f"parameter {parameter.name!r} of tool {name!r} needs a type hint and a name, from which its "
                "schema is made"
            )
    try:
        parameters = TypeAdapter(cast(Any, function)).json_schema()
    except Exception as error:
        raise EnvironmentFailed(f"there is no JSON schema of tool {name!r}: {error}") from error
    text, documented = _documented(inspect.getdoc(function) or "")
    properties = {
        key: {k: v for k, v in value.items() if k != "title"}
        | ({"description": documented[key]} if key in documented else {})
        for key, value in parameters.get("properties", {}).items()
    }
    kept = {key: value for key, value in parameters.items() if key in ("required", "$defs")}
    return schema(name, text, {"type": "object", "properties": properties, **kept})


def _documented(docstring: str) -> tuple[str, dict[str, str]]:
    """Return the text before the sections of a docstring, and the descriptions of arguments."""
    text, *rest = _ARGUMENTS.split(f"{docstring}\n", maxsplit=1)
    arguments = _SECTION.split(rest[0])[0] if rest else ""
    return " ".join(_SECTION.split(text)[0].split()), dict(_ARGUMENT.findall(arguments))


def _validated(function: Callable[..., Any]) -> Callable[..., str]:
    """Wrap a function: arguments are converted to its types, and its result to text."""
    adapter = TypeAdapter(cast(Any, function))

    def run(**arguments: Any) -> str:
        from pydantic_core import ArgsKwargs

        result = adapter.validate_python(ArgsKwargs((), arguments))
        return result if isinstance(result, str) else json.dumps(result, ensure_ascii=False, default=str)

    return run
