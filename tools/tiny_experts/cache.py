"""Whether a folder already holds these experts, and how a new one takes its place. Imports nothing heavy."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tiny_experts.settings import Settings

MANIFEST = "manifest.json"


def cache_key(settings: Settings, seed: int) -> str:
    """SHA-256 over the settings, the seed and this package's source, so that no change goes unseen.

    The source without sets.py: a set is its settings, and a change to one leaves the others valid.
    """
    digest = hashlib.sha256(json.dumps([settings.as_dict(), seed], sort_keys=True).encode())
    for module in sorted(Path(__file__).parent.glob("*.py")):
        if module.name == "sets.py":
            continue
        digest.update(module.name.encode() + b"\0" + module.read_bytes())
    return digest.hexdigest()


def _hashes(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files
    }


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest, or None where there is none that can be read."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    return manifest if isinstance(manifest, dict) else None


def why_stale(folder: Path, key: str) -> str | None:
    """None when `folder` holds exactly what `key` makes, else the reason why it must be made (again)."""
    if not folder.exists():
        return "there are none yet"
    manifest = read_manifest(folder)
    if manifest is None:
        return "the manifest is missing or damaged"
    if manifest["key"] != key:
        return "the seed, the settings or the tool changed"
    if manifest["files"] != {
        name: value for name, value in _hashes(folder).items() if name in manifest["files"]
    }:
        return "a file is missing or was changed"
    return None


@contextmanager
def written_aside(folder: Path, key: str, facts: Mapping[str, Any]) -> Iterator[Path]:
    """A folder to write into that takes the place of `folder` when the block ends well.

    The manifest, with `facts` as they are when the block ends, is written last. A broken-off block leaves
    `folder` as it was.

    Raises:
        FileExistsError: `folder` holds something that this tool did not write.
    """
    if folder.exists() and any(folder.iterdir()) and not (folder / MANIFEST).exists():
        raise FileExistsError(f"{folder} holds files of yours: remove it or choose another folder with --out")
    aside, old = (folder.with_name(f"{folder.name}.{suffix}") for suffix in ("partial", "old"))
    for leftover in (aside, old):
        shutil.rmtree(leftover, ignore_errors=True)
    aside.mkdir(parents=True)
    yield aside
    manifest = {"key": key, **facts, "files": _hashes(aside)}
    (aside / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
    if folder.exists():
        folder.rename(old)
    aside.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
