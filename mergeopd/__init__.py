"""mergeopd: merge many expert language models into one student by on-policy distillation.

    result = mergeopd.run("recipes/quickstart.yaml", set={"optimizer.lr": 2e-6})
    result.export, result.accuracies, result.to_pandas()

Names are imported on first use, and torch by the functions that need it, so `import mergeopd` is quick.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mergeopd.api import (
        CheckResult,
        RunResult,
        check,
        evaluate,
        inspect,
        load,
        load_run,
        plan,
        record_targets,
        report,
        run,
    )

__version__ = "0.1.0"
__all__ = [
    "CheckResult",
    "RunResult",
    "__version__",
    "check",
    "evaluate",
    "inspect",
    "load",
    "load_run",
    "plan",
    "record_targets",
    "report",
    "run",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'mergeopd' has no attribute {name!r}")
    from mergeopd import api

    return getattr(api, name)


def __dir__() -> list[str]:
    return __all__
