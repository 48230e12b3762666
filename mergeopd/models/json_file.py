"""Reading of a model folder's JSON files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mergeopd.errors import MergeopdError


def read_object(path: Path, fault: type[MergeopdError]) -> dict[str, Any] | None:
    """Read the JSON object in `path`; None when there is no such file. Raises `fault` when it is damaged."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise fault(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise fault(f"{path}: not JSON: {error}; fetch the file again") from error
    if not isinstance(value, dict):
        raise fault(f"{path}: must hold a JSON object, not {type(value).__name__}")
    return value
