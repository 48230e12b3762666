"""Write folders and files atomically: after a crash they are either complete or absent.

A folder is written to a temporary sibling, synced, given a manifest with sizes and SHA-256, and renamed.
Folders that do not match their manifest are not read. Permissions follow the umask.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import stat
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from mergeopd.errors import StorageError
from mergeopd.storage.failures import named_failures

MANIFEST = "manifest.json"
MODEL_CARD = "README.md"  # of an export; not in the manifest, since people edit it
FORMAT = "mergeopd-folder-1"
_PARTIAL = ".partial"
_BROKEN = ".broken"


@contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """Yield an empty temporary sibling of `target` that becomes `target` when the block succeeds.

    On any exception (Ctrl-C included) the temporary is removed and `target` does not exist. A killed process
    leaves the temporary behind; the next call for the same target removes it.

    Raises StorageError if `target` exists, the block wrote nothing, or writing fails.
    """
    _refuse_existing(target)
    temporary = partial_of(target)
    with named_failures("write", target):
        make_folder(target.parent)
        remove_tree(temporary)
        temporary.mkdir()
        try:
            yield temporary
            _seal(temporary, target)
            _refuse_existing(target)
            temporary.rename(target)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)  # report the first failure, not this one
            raise
        _sync_folder(target.parent)


def write_atomic(path: Path, content: str | bytes, setting: str = "output") -> None:
    """Replace a file by `content` (text as UTF-8): readers see the old or the new content, never a part.

    `setting` is the key of the recipe that names its folder. Raises StorageError if writing fails.
    """
    temporary = partial_of(path)
    with named_failures("write", path, setting):
        make_folder(path.parent)
        try:
            _write_synced(temporary, content)
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        _sync_folder(path.parent)


def verify(folder: Path) -> str | None:
    """Compare a folder with its manifest. Returns a description of the first fault, or None.

    Files that the manifest does not list are ignored.
    """
    try:
        return _first_fault(folder)
    except OSError as error:
        return f"cannot be read: {error.strerror or error}"


def newest_valid(parent: Path) -> tuple[Path | None, list[tuple[Path, str]]]:
    """Return the valid folder `step-<number>` with the highest number, and newer ones with their faults.

    Raises StorageError if `parent` exists but cannot be listed.
    """
    skipped: list[tuple[Path, str]] = []
    for folder in _numbered(parent):
        fault = verify(folder)
        if fault is None:
            return folder, skipped
        skipped.append((folder, fault))
    return None, skipped


def newest_number(parent: Path) -> int:
    """Return the highest number of a folder `step-<number>`, valid or not; 0 without one."""
    return max(map(_number, _numbered(parent)), default=0)


def set_aside(folder: Path) -> Path:
    """Rename a broken folder to `<name>.broken`, which frees its name and keeps it for inspection.

    Raises StorageError if renaming fails.
    """
    aside = folder.with_name(folder.name + _BROKEN)
    with named_failures("set aside", folder):
        remove_tree(aside)
        folder.rename(aside)
        _sync_folder(folder.parent)
    return aside


def keep_only(parent: Path, numbers: Collection[int]) -> int | None:
    """Remove the folders `step-<number>` with other numbers, and leftovers; return the newest intact number.

    Damaged ones that are newer are set aside. Raises StorageError if removing fails.
    """
    _remove(parent, [folder for folder in _numbered(parent) if _number(folder) not in numbers])
    newest, skipped = newest_valid(parent)
    for folder, _ in skipped:
        set_aside(folder)
    return None if newest is None else _number(newest)


def copy_folder(source: Path, target: Path) -> None:
    """Copy the files of a folder, except its manifest, into an existing one.

    Raises StorageError if the disk fails.
    """
    with named_failures("copy", source):
        shutil.copytree(source, target, dirs_exist_ok=True, ignore=shutil.ignore_patterns(MANIFEST))


def prune(parent: Path, keep: int) -> tuple[Path, ...]:
    """Remove all but the `keep` highest numbered folders, older broken folders, and leftovers.

    Folders are renamed before they are emptied, so that a kill leaves no partial folder under its final name.
    Returns the numbered folders that were removed, newest first.

    Raises:
        ValueError: `keep` is below 1.
        StorageError: removing fails.
    """
    if keep < 1:
        raise ValueError(f"keep must be at least 1, not {keep}")
    folders = _numbered(parent)
    removed = tuple(folders[keep:])
    oldest_kept = _number(folders[min(keep, len(folders)) - 1]) if folders else 0
    all_broken = _numbered(parent, _BROKEN)
    broken = [folder for folder in all_broken if _number(folder) < oldest_kept]
    _remove(parent, [*removed, *broken])
    return removed


def _remove(parent: Path, folders: Iterable[Path]) -> None:
    for folder in folders:
        with named_failures("remove", folder):
            temporary = partial_of(folder)
            remove_tree(temporary)
            folder.rename(temporary)
    with named_failures("clean", parent):
        for leftover in parent.glob(f".step-*{_PARTIAL}"):
            remove_tree(leftover)


def _seal(folder: Path, target: Path) -> None:
    files: dict[str, dict[str, int | str]] = {}
    folders = [folder]
    for path in sorted(folder.rglob("*")):
        if path.is_dir() and not path.is_symlink():
            folders.append(path)
        elif path.is_symlink() or not path.is_file():
            raise StorageError(f"cannot write {target}: {path.relative_to(folder)} is not a plain file")
        else:
            share_as(folder, path)
            files[path.relative_to(folder).as_posix()] = _measure(path, sync=True)
    files.pop(MODEL_CARD, None)
    if not files:
        raise StorageError(f"cannot write {target}: nothing was written into it")
    if MANIFEST in files:
        raise StorageError(f"cannot write {target}: the name {MANIFEST} is taken by the manifest")
    _write_synced(folder / MANIFEST, _manifest_text(files))
    for path in reversed(folders):
        _sync_folder(path)


def _write_synced(path: Path, content: str | bytes) -> None:
    with path.open("wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())


def share_as(folder: Path, file: Path) -> None:
    """Give a file the read and write permissions of a folder that was made under the umask.

    Some writers, safetensors among them, create files that only their owner can read.
    """
    mode = stat.S_IMODE(folder.stat().st_mode) & 0o666
    if stat.S_IMODE(file.stat().st_mode) != mode:
        with suppress(PermissionError):  # of file systems without permissions of their own
            file.chmod(mode)


def _measure(path: Path, *, sync: bool = False) -> dict[str, int | str]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        if sync:
            os.fsync(file.fileno())
        return {"bytes": file.tell(), "sha256": digest}


def _manifest_text(files: Mapping[str, Mapping[str, int | str]]) -> str:
    """Return the canonical text of a manifest. It contains its own hash, which detects lost entries."""
    own = hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()
    return json.dumps({"format": FORMAT, "files": files, "sha256": own}, indent=1, sort_keys=True) + "\n"


def _first_fault(folder: Path) -> str | None:
    if not folder.is_dir():
        return "is not a folder"
    manifest = folder / MANIFEST
    if not manifest.is_file():
        return f"{MANIFEST} is missing"
    content = manifest.read_bytes()
    if not content:
        return f"{MANIFEST} is empty"
    try:
        record = json.loads(content)
    except ValueError:
        return f"{MANIFEST} is damaged: it is not JSON"
    if not isinstance(record, dict) or not isinstance(record.get("files"), dict):
        return f"{MANIFEST} is damaged: it lists no files"
    if record.get("format") != FORMAT:
        return f"{MANIFEST} has format {record.get('format')!r}, not {FORMAT!r}"
    if content != _manifest_text(record["files"]).encode() or not record["files"]:
        return f"{MANIFEST} is damaged: it does not match its own hash"
    for name, expected in record["files"].items():
        fault = _file_fault(folder / name, expected)
        if fault:
            return f"{name} {fault}"
    return None


def _file_fault(path: Path, expected: Mapping[str, int | str]) -> str | None:
    if not path.is_file():
        return "is missing"
    if path.stat().st_size != expected["bytes"]:  # cheaper and more informative than a hash
        return f"has {path.stat().st_size} bytes instead of {expected['bytes']}"
    if _measure(path) != expected:
        return "is damaged: its SHA-256 differs from the manifest's"
    return None


def is_leftover(path: Path) -> bool:
    """Whether a path is the temporary of an interrupted write."""
    return path.name.startswith(".") and path.name.endswith(_PARTIAL)


def partial_of(target: Path) -> Path:
    """Return the hidden sibling in which `target` is prepared, on the same file system."""
    return target.with_name(f".{target.name}{_PARTIAL}")


def _refuse_existing(target: Path) -> None:
    if os.path.lexists(target):
        raise StorageError(
            f"cannot write {target}: it exists already; move it away or choose another `output`"
        )


def _numbered(parent: Path, suffix: str = "") -> list[Path]:
    """List folders `step-<number><suffix>`, highest number first; none if `parent` is missing."""
    if not os.path.lexists(parent):
        return []
    pattern = re.compile(r"step-\d+" + re.escape(suffix))
    with named_failures("list", parent):
        folders = [path for path in parent.iterdir() if pattern.fullmatch(path.name)]
    return sorted(folders, key=lambda path: (_number(path), path.name), reverse=True)


def _number(folder: Path) -> int:
    return int(folder.name.removeprefix("step-").removesuffix(_BROKEN))


def make_folder(path: Path) -> None:
    """Create a folder and those above it, and sync every new entry to the disk."""
    if path.is_dir():
        return
    make_folder(path.parent)
    path.mkdir(exist_ok=True)
    _sync_folder(path.parent)


def remove_tree(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network and FUSE file systems have no fsync for folders; their renames are ordered.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)
