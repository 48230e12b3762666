"""Resolve paths written in recipes and cards: project folders, files, model folders."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from mergeopd.config.suggest import closest_path
from mergeopd.messages import shown

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True, slots=True)
class Missing:
    """A path that does not exist: cause and remedy."""

    message: str
    remedy: str


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
        return path
    if os.path.exists(path):
        return Missing(f"'{written}' is a file", f"name the {what}'s folder")
    near = closest_path(written, base, directory=True)
    if _HUB_ID.fullmatch(written):
        snapshot = _cached_snapshot(written, revision)
        if snapshot is not None:
            return snapshot
        version = f" at revision '{revision}'" if revision else ""
        download = f"hf download {written}" + (f" --revision {revision}" if revision else "")
        remedy = f"did you mean '{near}'?" if near else f"download it (`{download}`), or name a folder"
        return Missing(
            f"'{written}' is neither a folder nor{version} in the local cache of the Hugging Face hub", remedy
        )
    return Missing(f"unknown {what} folder '{written}'", _where_instead(near, written, path))


def _where_instead(near: str, written: str, path: Path) -> str:
    if near:
        return f"did you mean '{near}'?"
    return "nothing of that name exists" if shown(path) == written else f"looked for {shown(path)}"


def _cached_snapshot(repo: str, revision: str | None) -> Path | None:
    # Imported here, because it is slow and most recipes name folders.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repo, revision=revision, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        return None
