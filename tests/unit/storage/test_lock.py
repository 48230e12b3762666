"""One process at a time uses a folder; its lock ends with it."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path

import pytest

from mergeopd.errors import StorageError
from mergeopd.storage.lock import LOCK_NAME, exclusive


def test_the_second_is_refused_and_the_lock_goes_with_the_first(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "one"
    with exclusive(folder):
        assert (folder / LOCK_NAME).read_text() == f"{os.getpid()}\n"
        with pytest.raises(
            StorageError, match=rf"another process \(id {os.getpid()}\) is using this run folder"
        ):
            exclusive(folder).__enter__()
    with exclusive(folder):
        pass


def test_an_error_inside_gives_the_lock_back(tmp_path: Path) -> None:
    with pytest.raises(KeyError), exclusive(tmp_path):
        raise KeyError
    with exclusive(tmp_path):
        pass


@pytest.mark.parametrize(
    ("number", "told"),
    [
        (errno.ENOLCK, "No locks available; this file system has no locks"),
        (errno.EIO, "the disk reports errors"),
    ],
)
def test_a_file_system_that_cannot_lock_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, told: str
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(StorageError, match=rf"cannot lock .*{told}"), exclusive(tmp_path):
        pass


def test_a_file_in_the_way_is_named(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    with pytest.raises(StorageError, match="cannot lock"), exclusive(tmp_path / "run"):
        pass
