"""Check that a user's verifier function exists, without running its code."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterable, Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path

from mergeopd.config.suggest import did_you_mean
from mergeopd.messages import shown


def function_problem(function: str) -> tuple[str, str] | None:
    """Return cause and remedy if `package.module:function` does not exist; None if it does, or may."""
    module, _, name = function.partition(":")
    try:
        spec = _find(module)
    except (ImportError, KeyError):  # a package whose modules are known only when it is imported
        return None
    if spec is None:
        return (
            f"there is no Python module '{module}'",
            "install it, or put its folder on the path, as in `PYTHONPATH=. mergeopd ...`",
        )
    if spec.origin is None or not spec.origin.endswith(".py"):
        return None
    file = Path(spec.origin)
    try:
        tree = ast.parse(file.read_bytes())
    except SyntaxError as error:
        return f"{shown(file)}:{error.lineno or 1}: not valid Python: {error.msg}", "correct it"
    except (OSError, ValueError) as error:
        return f"{shown(file)}: cannot be read: {error}", "correct it"
    names = set(_names(tree.body))
    if name in names or names & {"*", "__getattr__"}:
        return None
    return f"{shown(file)} defines no function '{name}'", did_you_mean(name, sorted(names), "add it")


def _find(module: str) -> ModuleSpec | None:
    """Like importlib.util.find_spec, but without importing the parent packages."""
    spec: ModuleSpec | None = None
    path: list[str] | None = None
    name = ""
    for part in module.split("."):
        name = f"{name}.{part}" if name else part
        specs = (finder.find_spec(name, path) for finder in sys.meta_path)
        spec = next((one for one in specs if one is not None), None)
        if spec is None:
            return None
        path = list(spec.submodule_search_locations or ())
    return spec


def _names(body: Iterable[ast.stmt]) -> Iterator[str]:
    """Names bound by a module's statements, including those under `if`, `try` and `with`."""
    for node in body:
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                yield node.name
            case ast.Import() | ast.ImportFrom():
                yield from ((alias.asname or alias.name).partition(".")[0] for alias in node.names)
            case _:
                bound = (part for part in ast.walk(node) if isinstance(part, ast.Name))
                yield from (part.id for part in bound if isinstance(part.ctx, ast.Store))
                inner = (part for part in ast.iter_child_nodes(node) if isinstance(part, ast.stmt))
                yield from _names(inner)
                for handler in (h for h in ast.iter_child_nodes(node) if isinstance(h, ast.ExceptHandler)):
                    yield from _names(handler.body)
