"""One process at a time on a folder or a file."""

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
def exclusive(folder: Path) -> Iterator[None]:
    """Hold the folder, making it where it is missing, until the context ends or the process dies.

    The system gives the lock back with the process, however that ends. Raises StorageError naming the other
    process when the folder is held, or when the disk refuses.
    """
    path = folder / LOCK_NAME
    with named_failures("lock", path):
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        with named_failures("lock", path):
            _take(descriptor, folder)
        yield
    finally:
        os.close(descriptor)


@contextmanager
def waiting(file: Path) -> Iterator[None]:
    """Hold a lock beside `file`, after whoever holds it now, while it is read and written again.

    Raises StorageError when the disk refuses.
    """
    path = file.with_name(f".{file.name}.lock")
    with named_failures("lock", path):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        with named_failures("lock", path):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _take(descriptor: int, folder: Path) -> None:
    """Lock the open lock file and leave this process's id in it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        owner = os.read(descriptor, 32).decode(errors="replace").strip() or "unknown"
        raise StorageError(
            f"{folder}: another process (id {owner}) works on this run; "
            "wait for it, stop it, or choose another folder with --set output=..."
        ) from None
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
