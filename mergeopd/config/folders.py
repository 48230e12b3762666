"""Resolve paths written in recipes and cards: project folders, files, model folders."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from mergeopd.config.suggest import closest_path
from mergeopd.messages import shown

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True, slots=True)
class Missing:
    """A path that does not exist: cause and remedy."""

    message: str
    remedy: str


@dataclass(frozen=True, slots=True)
class Lookup:
    """How a recipe's files are found, when only its plan is needed.

    `configs` are folders with the config.json of models, by `student` or a teacher's name; they stand for the
    models that the recipe names. With `is_elsewhere`, the run is on another machine: other files, packages
    and GPUs need not be here.
    """

    configs: Mapping[str, Path] = field(default_factory=dict)
    is_elsewhere: bool = False

    def model(self, name: str, written: str, revision: str | None, base: Path) -> Path | Missing:
        """Find a model's folder; see `existing_model`."""
        if name in self.configs:
            return self.configs[name]
        folder = existing_model(written, revision, base)
        if isinstance(folder, Missing) and self.is_elsewhere:
            remedy = f"its config.json is enough for a plan: --model {name}=FOLDER"
            return Missing(folder.message, f"{remedy}; {folder.remedy}")
        return folder


HERE = Lookup()
"""Every file that a recipe names must exist."""


def project_folder(file: Path, marker: str) -> Path:
    """Return the absolute folder to which relative paths in `file` are relative.

    The parent of the nearest folder above that is named `marker` (`recipes`, or `teachers` for cards);
    without one, the file's own folder.
    """
    file = Path(os.path.abspath(file))
    for folder in file.parents:
        if folder.name == marker:
            return folder.parent
    return file.parent


def absolute(written: str, base: Path) -> Path:
    """Make a path absolute, relative to `base`. Symbolic links are kept."""
    return Path(os.path.abspath(base / os.path.expanduser(written)))


def is_hub_id(written: str, base: Path) -> bool:
    """Whether a text that names no existing path can be a hub id: NAME/NAME, with no local folder NAME."""
    return _HUB_ID.fullmatch(written) is not None and not os.path.isdir(absolute(written, base).parent)


def unwritable(path: Path) -> Path | None:
    """Return the file or folder that prevents the folder `path` from being created or filled, or None.

    A folder that has contents is not judged: a finished run may be evaluated where it can only be read.
    """
    nearest = next(folder for folder in (path, *path.parents) if os.path.lexists(folder))
    if not os.path.isdir(nearest):
        return nearest
    if nearest == path and os.access(path, os.R_OK) and os.listdir(path):
        return None
    return None if os.access(nearest, os.W_OK | os.X_OK) else nearest


def existing_file(written: str, base: Path, what: str, suffixes: tuple[str, ...] = ()) -> Path | Missing:
    """Find the file named by `written`. `what` is its name in messages (`prompt file`)."""
    path = absolute(written, base)
    if os.path.isfile(path):
        return path
    if os.path.isdir(path):
        return Missing(f"'{written}' is a folder", f"name a {what}")
    near = closest_path(written, base, suffixes=suffixes)
    return Missing(f"unknown {what} '{written}'", _where_instead(near, written, path))


def existing_model(written: str, revision: str | None, base: Path, what: str = "model") -> Path | Missing:
    """Find the folder of a model or tokenizer: a folder on disk, or a hub id in the local cache.

    Nothing is downloaded.
    """
    path = absolute(written, base)
    if os.path.isdir(path):
        if revision is not None:
            return Missing(f"'{written}' is a folder, and folders have no revision", "remove `revision`")
        is_adapter = (path / "adapter_config.json").is_file() and not (path / "config.json").is_file()
        if is_adapter and what == "model":
            message = f"'{written}' is an adapter (adapter_config.json), not a whole model"
            remedy = (
                "merge it into its base model (peft: merge_and_unload, save_pretrained), and name that folder"
            )
            return Missing(message, remedy)
        return path
    if os.path.exists(path):
        return Missing(f"'{written}' is a file", f"name the {what}'s folder")
    near = closest_path(written, base, directory=True)
    if _HUB_ID.fullmatch(written):
        snapshot = cached_snapshot(written, revision)
        if snapshot is not None:
            return snapshot
    if is_hub_id(written, base) and not near:
        cache = "in the local cache of the Hugging Face hub"
        if revision:
            message = f"'{written}' is neither a folder nor at revision '{revision}' {cache}"
            download = f"hf download {written} --revision {revision}"
            return Missing(message, f"download it (`{download}`), or name a folder")
        message = f"'{written}' is neither a folder ({_looked_for(written, path)}) nor {cache}"
        remedy = f"create the folder, or, if this is a hub id, download the model: `hf download {written}`"
        return Missing(message, remedy)
    return Missing(f"unknown {what} folder '{written}'", _where_instead(near, written, path))


def _where_instead(near: str, written: str, path: Path) -> str:
    if near:
        return f"did you mean '{near}'?"
    return f"create it, or correct the path ({_looked_for(written, path)})"


def _looked_for(written: str, path: Path) -> str:
    """Say where a path was looked for, as far as `written` leaves it open."""
    if shown(path) != written:
        return f"looked for {shown(path)}"
    return "nothing of that name exists" if os.path.isabs(written) else "looked for it in the current folder"


def cached_snapshot(repo: str, revision: str | None, repo_type: str = "model") -> Path | None:
    """Return the folder of a revision of a repository in the hub's cache, or None. Nothing is downloaded."""
    # Imported here, because it is slow and most recipes name folders.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repo, revision=revision, repo_type=repo_type, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        return None


def is_hub_failure(error: Exception) -> bool:
    """Whether an exception is of the system or of the HTTP client that huggingface_hub uses."""
    return isinstance(error, OSError) or type(error).__module__.split(".")[0] in ("httpx", "httpx2")
