"""Teachers whose targets were written to a folder: nothing of them is loaded but head rows, where needed."""

from __future__ import annotations

import json
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from mergeopd.errors import StorageError, TeacherError
from mergeopd.loss.heads import Head
from mergeopd.loss.targets import TopK
from mergeopd.messages import shown
from mergeopd.rollout.protocol import RolloutEngine
from mergeopd.storage.failures import named_failures
from mergeopd.teacher.protocol import TargetSpec, Teacher, TeacherCapabilities, TeacherSequence
from mergeopd.teacher.scoring import reduced
from mergeopd.teacher.target_folder import FORMAT, Manifest, TargetOrigin, covering, sequence_key
from mergeopd.transfers import to_device

_ORIGIN = TypeAdapter(TargetOrigin)
_KEY_BYTES = 32
_OPEN_SHARDS = 64


class UnrecordedSequences(TeacherError):  # noqa: N818 (as PeerFailed)
    """A folder lacks some of the sequences to score, whose positions are `indices`."""

    def __init__(self, folder: Path, indices: Sequence[int]) -> None:
        super().__init__(f"{shown(folder)} lacks the targets of {len(indices)} sequences")
        self.folder = folder
        self.indices = indices


@dataclass(frozen=True)
class ShardIndex:
    """The header of a shard: what its rows are, and the keys of its sequences with their first rows.

    `offsets` has the end of the last sequence as well.
    """

    origin: TargetOrigin
    keys: Sequence[bytes]
    offsets: Sequence[int]

    @classmethod
    def read(cls, path: Path) -> ShardIndex:
        """Read all of a shard but its rows. Raises StorageError for another or a damaged file."""
        try:
            with _opened(path) as file:
                metadata = file.metadata() or {}
                if FORMAT not in metadata:
                    raise StorageError(f"{path}: not a file of targets; move it to another folder")
                origin = _ORIGIN.validate_json(metadata[FORMAT])
                keys, offsets = file.get_tensor("keys"), file.get_tensor("offsets").tolist()
                num_rows, _ = file.get_slice("rows").get_shape()
        except (SafetensorError, ValidationError, ValueError) as error:
            raise StorageError(
                f"{path}: damaged: {error}; delete it and run `mergeopd targets` again"
            ) from error
        text = keys.numpy().tobytes()
        fits = keys.dtype == torch.uint8 and tuple(keys.shape) == (len(offsets) - 1, _KEY_BYTES)
        if not fits or [0, *sorted(offsets), num_rows] != [0, *offsets, offsets[-1]] or offsets[0]:
            raise StorageError(
                f"{path}: damaged: keys, offsets and rows do not fit each other; "
                "delete it and run `mergeopd targets` again"
            )
        starts = range(0, len(text), _KEY_BYTES)
        return cls(origin, [text[start : start + _KEY_BYTES] for start in starts], offsets)


def recorded_spec(folder: Path, needed: Sequence[TargetSpec]) -> TargetSpec:
    """Return the targets to add to a folder: those that it has, if they serve, else the smallest that do."""
    for path in sorted(folder.glob("*.safetensors"))[:1]:
        origin = ShardIndex.read(path).origin
        if all(origin.serves(spec) for spec in needed):
            return origin.spec
    return covering(needed)


def shard_content(origin: TargetOrigin, keys: Sequence[bytes], rows: Sequence[Tensor]) -> bytes:
    """Return the content of a shard with the rows `[trained tokens, width]` of these sequences."""
    lengths = [0, *(len(one) for one in rows)]
    tensors = {
        "rows": torch.cat(list(rows)),
        "offsets": torch.tensor(lengths).cumsum(0),
        "keys": torch.from_numpy(np.frombuffer(b"".join(keys), np.uint8).copy()).view(len(keys), -1),
    }
    return save(tensors, {FORMAT: json.dumps(asdict(origin))})


@dataclass(eq=False)
class RecordedTargets:
    """The targets in a folder. The index is read when it is first used, rows when they are asked for."""

    folder: Path
    manifest: Manifest

    def rows(self, sequences: Sequence[TeacherSequence]) -> Iterator[Tensor]:
        """Yield `[trained tokens, width]` for every sequence, in order.

        Raises UnrecordedSequences, before the first, if any is missing.
        """
        keys = [sequence_key(one) if one.num_trained else None for one in sequences]
        missing = [i for i, key in enumerate(keys) if key is not None and key not in self._places]
        if missing:
            raise UnrecordedSequences(self.folder, missing)
        for key in keys:
            shard, start, stop = (0, 0, 0) if key is None else self._places[key]
            with named_failures("read", self.folder):
                part: Tensor = self._open(self.manifest.shards[shard].file)[start:stop]
            yield part

    @cached_property
    def _places(self) -> dict[bytes, tuple[int, int, int]]:
        places: dict[bytes, tuple[int, int, int]] = {}
        for number, shard in enumerate(self.manifest.shards):
            index = ShardIndex.read(self.folder / shard.file)
            if index.origin.spec != self.manifest.origin.spec:
                raise StorageError(
                    f"{shown(self.folder / shard.file)} holds other targets than the manifest says; "
                    "delete it and run `mergeopd targets` again"
                )
            bounds = zip(index.offsets, index.offsets[1:], strict=False)
            places |= {key: (number, *own) for key, own in zip(index.keys, bounds, strict=True)}
        return places

    @cached_property
    def _open(self) -> Any:
        # A few files stay mapped: there may be more of them than a process may open.
        return lru_cache(_OPEN_SHARDS)(lambda name: _opened(self.folder / name).get_slice("rows"))


def _opened(path: Path) -> Any:
    with named_failures("read", path):
        return safe_open(path, framework="pt")


@dataclass(eq=False)
class RecordedSession:
    """A recorded teacher that is ready to score. Other kinds of targets are computed from those recorded."""

    teacher: RecordedTeacher

    def score(
        self, sequences: Sequence[TeacherSequence], spec: TargetSpec, max_tokens: int
    ) -> Iterator[tuple[int, Tensor]]:
        """Yield `(index, [trained tokens, width])` for every sequence; see `TeacherSession.score`.

        Raises UnrecordedSequences where the folder has not all of them.
        """
        targets, device = self.teacher.targets, self.teacher.device
        kept = targets.manifest.origin.kind
        states = enumerate(targets.rows(sequences))
        if kept == spec.kind == "hidden":
            return states
        if kept == "hidden":
            on_device = ((index, to_device(rows, device)) for index, rows in states)
            return reduced(self.teacher.name, on_device, sequences, lambda: self.teacher.head(None), spec)
        k = spec.k
        assert k is not None, "`check` refuses losses that need another kind"
        return ((index, TopK.unpack(rows).largest(k).packed()) for index, rows in states)

    def generator(self) -> RolloutEngine:
        raise TeacherError(
            f"teacher '{self.teacher.name}' is not loaded, since the recipe names its `targets`, and "
            "`text_cache` lacks some of its responses; run `mergeopd targets` again, which generates them"
        )


@dataclass(eq=False)
class RecordedTeacher:
    """A teacher that is replaced by its targets in a folder; of `live`, only head rows are read."""

    live: Teacher
    targets: RecordedTargets
    device: torch.device

    @property
    def name(self) -> str:
        return self.live.name

    @property
    def fingerprint(self) -> str | None:
        return self.live.fingerprint

    @property
    def bytes_read(self) -> int:
        return self.live.bytes_read

    @property
    def capabilities(self) -> TeacherCapabilities:
        return self.live.capabilities

    @property
    def head_key(self) -> Hashable:
        return self.live.head_key

    @contextmanager
    def open(self) -> Iterator[RecordedSession]:
        """Load nothing."""
        yield RecordedSession(self)

    def prefetch(self) -> None:
        """Do nothing: rows are read one after the other."""

    def head(self, vocab: range | None) -> Head:
        return self.live.head(vocab)
