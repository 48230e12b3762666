"""Write folders and files atomically: after a crash they are either complete or absent.

A folder is written to a temporary sibling, synced, given a manifest with sizes and SHA-256, and renamed.
Folders that do not match their manifest are not read. Permissions follow the umask.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
import shutil
import stat
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import MappingProxyType

from mergeopd.errors import StorageError
from mergeopd.storage.failures import named_failures

MANIFEST = "manifest.json"
MODEL_CARD = "README.md"  # of an export; not in the manifest, since people edit it
FORMAT = "mergeopd-folder-1"
_PARTIAL = ".partial"
_BROKEN = ".broken"
# "bytes" and "sha256" by file.
Manifest = Mapping[str, Mapping[str, int | str]]


@contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """Yield an empty temporary sibling of `target` that becomes `target` when the block succeeds.

    On any exception (Ctrl-C included) the temporary is removed and `target` does not exist. A killed process
    leaves the temporary behind; the next call for the same target removes it.

    Raises StorageError if `target` exists, the block wrote nothing, or writing fails.
    """
    temporary = begin_folder(target)
    with named_failures("write", target):
        try:
            yield temporary
            complete_folder(temporary, target)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)  # report the first failure, not this one
            raise


def begin_folder(target: Path, suffix: str = "") -> Path:
    """Create and return an empty temporary sibling of `target`, for `complete_folder`.

    Temporaries of the same target are told apart by `suffix`. Raises StorageError if `target` exists.
    """
    _refuse_existing(target)
    temporary = partial_of(target.with_name(target.name + suffix))
    with named_failures("write", target):
        make_folder(target.parent)
        remove_tree(temporary)
        temporary.mkdir()
    return temporary


def complete_folder(temporary: Path, target: Path, measured: Manifest = MappingProxyType({})) -> None:
    """Sync a temporary folder, write its manifest, and rename it to `target`.

    `measured` has entries of the manifest for files that are synced already, and is not read again. Raises
    StorageError if `target` exists, the folder is empty, or writing fails.
    """
    with named_failures("write", target):
        _seal(temporary, target, measured)
        _refuse_existing(target)
        temporary.rename(target)
        _sync_folder(target.parent)


def write_atomic(path: Path, content: str | bytes, setting: str = "output") -> None:
    """Replace a file by `content` (text as UTF-8): readers see the old or the new content, never a part.

    `setting` is the key of the recipe that names its folder. Raises StorageError if writing fails.
    """
    temporary = partial_of(path)
    with named_failures("write", path, setting):
        make_folder(path.parent)
        try:
            write_synced(temporary, content)
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        _sync_folder(path.parent)


def verify(folder: Path) -> str | None:
    """Compare a folder with its manifest. Returns a description of the first fault, or None.

    Files that the manifest does not list are ignored.
    """
    files = read_manifest(folder)
    return files if isinstance(files, str) else content_fault(folder, files)


def read_manifest(folder: Path) -> Manifest | str:
    """Return a folder's manifest, or a description of the fault if it is damaged or files are missing.

    Compares the files' sizes; their contents are compared by `content_fault`.
    """
    try:
        return _manifest_or_fault(folder)
    except OSError as error:
        return f"cannot be read: {error.strerror or error}"


def content_fault(folder: Path, files: Manifest) -> str | None:
    """Compare files with their entries of the manifest. Returns a description of the first fault, or None."""
    try:
        for name, expected in files.items():
            if measure(folder / name) != expected:
                return f"{name} is damaged: its SHA-256 differs from the manifest's"
    except OSError as error:
        return f"cannot be read: {error.strerror or error}"
    return None


def newest_valid(parent: Path) -> tuple[Path | None, list[tuple[Path, str]]]:
    """Return the valid folder `step-<number>` with the highest number, and newer ones with their faults.

    Raises StorageError if `parent` exists but cannot be listed.
    """
    skipped: list[tuple[Path, str]] = []
    for folder in numbered(parent):
        fault = verify(folder)
        if fault is None:
            return folder, skipped
        skipped.append((folder, fault))
    return None, skipped


def newest_number(parent: Path) -> int:
    """Return the highest number of a folder `step-<number>`, valid or not; 0 without one."""
    return max(map(_number, numbered(parent)), default=0)


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
    _remove(parent, [folder for folder in numbered(parent) if _number(folder) not in numbers])
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


def prune(parent: Path, keep: int, up_to: float = math.inf) -> tuple[Path, ...]:
    """Remove all but the `keep` highest numbered folders, older broken folders, and leftovers.

    Folders with numbers above `up_to` are kept and not counted. Folders are renamed before they are emptied,
    so that a kill leaves no partial folder under its final name.
    Returns the numbered folders that were removed, newest first.

    Raises:
        ValueError: `keep` is below 1.
        StorageError: removing fails.
    """
    if keep < 1:
        raise ValueError(f"keep must be at least 1, not {keep}")
    folders = [folder for folder in numbered(parent) if _number(folder) <= up_to]
    removed = tuple(folders[keep:])
    oldest_kept = _number(folders[min(keep, len(folders)) - 1]) if folders else 0
    all_broken = numbered(parent, _BROKEN)
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


def _seal(folder: Path, target: Path, measured: Manifest) -> None:
    files: dict[str, Mapping[str, int | str]] = {}
    folders = [folder]
    for path in sorted(folder.rglob("*")):
        if path.is_dir() and not path.is_symlink():
            folders.append(path)
        elif path.is_symlink() or not path.is_file():
            raise StorageError(f"cannot write {target}: {path.relative_to(folder)} is not a plain file")
        else:
            name = path.relative_to(folder).as_posix()
            share_as(folder, path)
            files[name] = measured[name] if name in measured else measure(path, sync=True)
    files.pop(MODEL_CARD, None)
    if not files:
        raise StorageError(f"cannot write {target}: nothing was written into it")
    if MANIFEST in files:
        raise StorageError(f"cannot write {target}: the name {MANIFEST} is taken by the manifest")
    write_synced(folder / MANIFEST, _manifest_text(files))
    for path in reversed(folders):
        _sync_folder(path)


def write_synced(path: Path, content: str | bytes) -> None:
    """Write a file and sync it to the disk."""
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


def measure(path: Path, *, sync: bool = False) -> dict[str, int | str]:
    """Return a file's entry in a manifest, after syncing the file to the disk if asked."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        if sync:
            os.fsync(file.fileno())
        return {"bytes": file.tell(), "sha256": digest}


def _manifest_text(files: Manifest) -> str:
    """Return the canonical text of a manifest. It contains its own hash, which detects lost entries."""
    own = hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()
    return json.dumps({"format": FORMAT, "files": files, "sha256": own}, indent=1, sort_keys=True) + "\n"


def _manifest_or_fault(folder: Path) -> Manifest | str:
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
    files: dict[str, dict[str, int | str]] = record["files"]
    if content != _manifest_text(files).encode() or not files:
        return f"{MANIFEST} is damaged: it does not match its own hash"
    missing = [name for name in files if not (folder / name).is_file()]
    if missing:
        count = f", and {len(missing) - 1} more of {len(files)} files" if len(missing) > 1 else ""
        return f"{missing[0]} is missing{count}"
    for name, expected in files.items():
        size = (folder / name).stat().st_size
        if size != expected["bytes"]:  # cheaper and more informative than a hash
            return f"{name} has {size} bytes instead of {expected['bytes']}"
    return files


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


def numbered(parent: Path, suffix: str = "") -> list[Path]:
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
