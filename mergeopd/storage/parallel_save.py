"""A folder of a checkpoint that all ranks write at the same time, in a thread of each.

Ranks meet by files, since a collective outside the main thread could mix with another one: each rank leaves
an entry in the temporary folder when its files are on the disk, and rank 0 completes the folder when all
entries are there. So the folder must be on a file system that all ranks share.
"""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypedDict

from mergeopd.errors import StorageError
from mergeopd.storage.failures import named_failures
from mergeopd.storage.folders import complete_folder, measure, share_as, write_synced
from mergeopd.storage.state_parts import INDEX, Entries, StagedFile, check_complete, merge_entries

_POLL_S = 0.02
# How long files of other machines may take to appear, after the others have reported them as written.
_VISIBLE_S = 120.0


class _RankEntry(TypedDict):
    """What a rank has written: entries of the manifest by file, and of the index by group of tensors."""

    files: dict[str, dict[str, int | str]]
    tensors: dict[str, Entries]


@dataclass(frozen=True)
class SaveFolder:
    """Where a save goes, equal on all ranks: `temporary` becomes `target`; `save` is the id of the save."""

    target: Path
    temporary: Path
    save: str


@dataclass
class ParallelSave:
    """This rank's part of a save. `start` begins it; then only `is_done`, `wait` and `abandon` may be called.

    `documents` are further files of rank 0 by name; `after` is called on rank 0 when the folder is complete.
    """

    folder: SaveFolder
    rank: int
    size: int
    documents: Mapping[str, str]
    after: Callable[[], object]
    _error: BaseException | None = None
    _peers_done_s: float | None = None
    _done: threading.Event = field(default_factory=threading.Event)
    _abandoned: threading.Event = field(default_factory=threading.Event)

    def start(self, files: Iterable[tuple[str, StagedFile]]) -> None:
        """Begin to write files, each with the name of its group of tensors, in a thread."""
        threading.Thread(target=self._run, args=(iter(files),), name="checkpoint", daemon=True).start()

    def is_done(self) -> bool:
        """Whether this rank's files are on the disk; on rank 0, whether the folder is complete.

        Raises the exception that ended the thread, StorageError if writing failed.
        """
        if not self._done.is_set():
            return False
        if self._error is not None:
            raise self._error
        return True

    def peers_are_done(self) -> None:
        """Inform rank 0 that all others have written their files, which must therefore appear soon."""
        self._peers_done_s = self._peers_done_s or time.monotonic()

    def wait(self, timeout_s: float | None) -> None:
        """Wait until this rank has finished, at most for a time."""
        self._done.wait(timeout_s)

    def abandon(self) -> None:
        """Stop waiting for other ranks; the folder stays incomplete unless it is complete already."""
        self._abandoned.set()

    def _run(self, files: Iterator[tuple[str, StagedFile]]) -> None:
        written: list[Path] = []
        try:
            with named_failures("write", self.folder.target):
                entry = self._write(files, written)
                if self.rank:
                    self._leave(entry)
                else:
                    self._complete([entry, *self._entries_of_peers()])
        except BaseException as error:  # noqa: BLE001 (raised in the main thread, by `is_done`)
            self._error = error
            self._remove(written)
        self._done.set()

    def _remove(self, written: list[Path]) -> None:
        """Remove what this rank wrote, so that a full disk has room again; others may still be writing."""
        if self.size == 1:
            shutil.rmtree(self.folder.temporary, ignore_errors=True)
        for path in written:
            with suppress(OSError):
                path.unlink()

    def _write(self, files: Iterator[tuple[str, StagedFile]], written: list[Path]) -> _RankEntry:
        numbers: dict[str, int] = {}
        entry = _RankEntry(files={}, tensors={})
        for group, staged in files:
            numbers[group] = number = numbers.get(group, 0) + 1
            name = f"{group}-{self.rank + 1}-of-{self.size}{f'-{number}' if number > 1 else ''}.safetensors"
            path = self.folder.temporary / name
            written.append(path)
            staged.write(path, self.folder.save)
            share_as(self.folder.temporary, path)
            entry["files"][name] = measure(path, sync=True)
            merge_entries(entry["tensors"].setdefault(group, {}), staged.entries(name))
        return entry

    def _leave(self, entry: _RankEntry) -> None:
        path = self._entry_file(self.rank)
        temporary = path.with_suffix(".new")
        write_synced(temporary, json.dumps(entry))
        temporary.replace(path)

    def _entries_of_peers(self) -> Iterator[_RankEntry]:
        missing = {rank: self._entry_file(rank) for rank in range(1, self.size)}
        while missing:
            for rank, path in [item for item in missing.items() if item[1].exists()]:
                yield json.loads(path.read_bytes())
                path.unlink()
                del missing[rank]
            if missing and self._abandoned.wait(_POLL_S):
                raise StorageError(f"{self.folder.target} was not completed: other processes ended")
            since = self._peers_done_s
            if missing and since is not None and time.monotonic() - since > _VISIBLE_S:
                raise StorageError(
                    f"cannot complete {self.folder.target}: {len(missing)} of {self.size} processes, process "
                    f"{min(missing) + 1} among them, wrote files that the first process does not see; "
                    "`output` must be on a file system that all machines share, under the same path"
                )

    def _complete(self, entries: list[_RankEntry]) -> None:
        tensors: dict[str, Entries] = {}
        for entry in entries:
            for group, own in entry["tensors"].items():
                merge_entries(tensors.setdefault(group, {}), own)
        check_complete(tensors)
        index = {"save": self.folder.save, "tensors": tensors}
        for name, text in {INDEX: json.dumps(index), **self.documents}.items():
            (self.folder.temporary / name).write_text(text, encoding="utf-8")
        measured = {name: of for entry in entries for name, of in entry["files"].items()}
        complete_folder(self.folder.temporary, self.folder.target, measured)
        self.after()

    def _entry_file(self, rank: int) -> Path:
        return self.folder.temporary / f"part-{rank + 1}-of-{self.size}.json"
