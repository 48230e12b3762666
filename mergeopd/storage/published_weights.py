"""Publish versions of a student's weights in a folder that inference servers read."""

from __future__ import annotations

import re
import shutil
from collections import deque
from dataclasses import dataclass
from pathlib import Path

from mergeopd.distributed.communicator import Communicator
from mergeopd.models.weight_files import write_model
from mergeopd.rollout.protocol import WeightStream
from mergeopd.storage.failures import named_failures
from mergeopd.storage.folders import make_folder, partial_of, remove_tree, share_as

# Bytes per file, and the memory of the first process for tensors that wait to be written.
_MAX_FILE_BYTES = 512 << 20
_VERSION = re.compile(r"version-(\d+)")
_LEFTOVERS = partial_of(Path("version-*")).name


@dataclass(frozen=True)
class PublishedWeights:
    """Hugging Face folders `version-N` in `folder`: complete or absent, but not synced to the disk.

    A version is of use only while its run lives, which publishes it again after a crash. `model` is the
    folder that the student was read from; configuration and tokenizer are copied from it.
    """

    folder: Path
    model: Path
    ranks: Communicator

    def publish(self, source: WeightStream, version: int) -> Path:
        """Write the current weights as `version-N`, in place of an earlier one. Collective.

        Returns the folder when it is complete. No process has the whole model in memory: the first one has
        the tensors of one file. Raises StorageError if writing fails.
        """
        target, tensors = self.folder / f"version-{version}", source.folder_weights()
        if self.ranks.is_first:
            temporary = partial_of(target)
            with named_failures("write", target):
                make_folder(self.folder)
                _remove(target)
                temporary.mkdir()
                try:
                    write_model(tensors, self.model, temporary, _MAX_FILE_BYTES)
                    for file in temporary.glob("*.safetensors"):
                        share_as(temporary, file)
                    temporary.rename(target)
                except BaseException:
                    shutil.rmtree(temporary, ignore_errors=True)  # report the first failure, not this one
                    raise
        deque(tensors, maxlen=0)  # the other processes only send
        self.ranks.gather(None)
        return target

    def prune(self, keep: int) -> None:
        """Remove all but the `keep` newest versions, and what an interrupted `publish` left. On rank 0 only.

        Raises StorageError if removing fails.
        """
        versions = [path for path in self.folder.glob("version-*") if _VERSION.fullmatch(path.name)]
        versions.sort(key=lambda path: int(path.name.removeprefix("version-")))
        with named_failures("clean", self.folder):
            for path in versions[: max(0, len(versions) - keep)]:
                _remove(path)
            for leftover in self.folder.glob(_LEFTOVERS):
                remove_tree(leftover)


def _remove(version: Path) -> None:
    """Remove a version, if there is one, and its temporary. A version that is deleted has no final name."""
    remove_tree(partial_of(version))
    if version.exists():
        version.rename(partial_of(version))
        remove_tree(partial_of(version))
