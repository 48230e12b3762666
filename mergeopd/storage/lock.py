"""Advisory locks on folders and files."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mergeopd.errors import StorageError
from mergeopd.storage.failures import named_failures

LOCK_NAME = ".lock"


@contextmanager
def exclusive(folder: Path, setting: str = "output") -> Iterator[None]:
    """Lock a folder, creating it if missing, until the context ends or the process dies.

    `setting` is the key of the recipe that names it. Raises StorageError if another process holds the lock
    (with its id), or if writing fails.
    """
    path = folder / LOCK_NAME
    kind = "run folder" if setting == "output" else "folder"
    with _opened(path, setting) as descriptor:
        with named_failures("lock", path, setting):
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                owner = os.read(descriptor, 32).decode(errors="replace").strip() or "unknown"
                raise StorageError(
                    f"{folder}: another process (id {owner}) is using this {kind}; "
                    f"wait for it, stop it, or choose another folder with --set {setting}=..."
                ) from None
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        yield


@contextmanager
def waiting(file: Path, setting: str) -> Iterator[None]:
    """Lock `file` through a lock file beside it; blocks while another process holds the lock.

    `setting` is the key of the recipe that names its folder. Raises StorageError if writing fails.
    """
    path = file.with_name(f".{file.name}.lock")
    with _opened(path, setting) as descriptor:
        with named_failures("lock", path, setting):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield


@contextmanager
def _opened(path: Path, setting: str) -> Iterator[int]:
    with named_failures("lock", path, setting):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        yield descriptor
    finally:
        os.close(descriptor)
