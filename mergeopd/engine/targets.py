"""The targets of a round, kept between the teachers' passes and the updates, and those kept in a folder."""

from __future__ import annotations

import hashlib
import re
import shutil
import time
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from torch import Tensor

from mergeopd.batch.packing import MicroBatchPlan
from mergeopd.batch.records import Alignments
from mergeopd.engine.stages import Stages
from mergeopd.errors import StorageError
from mergeopd.loss.heads import Hidden
from mergeopd.loss.targets import Sampled, Target, TopK
from mergeopd.messages import joined, shown
from mergeopd.storage.failures import named_failures
from mergeopd.storage.folders import is_leftover, write_atomic
from mergeopd.teacher.hidden_cache import HiddenCache
from mergeopd.teacher.local import ResidentHeads
from mergeopd.teacher.protocol import SupportIds, TargetSpec, Teacher, TeacherSequence, TeacherSession
from mergeopd.teacher.recorded import ShardIndex, shard_content
from mergeopd.teacher.target_folder import (
    FORMAT,
    Manifest,
    Shard,
    TargetOrigin,
    read_manifest,
    sequence_key,
    setting_of,
    verify_shards,
    write_manifest,
)
from mergeopd.teacher.token_view import TokenView
from mergeopd.types import Rollout

SHARD_BYTES = 512 << 20
SHARD_TOKENS = 1 << 16  # of small rows: a kill loses the passes over so many tokens
_SHARD_NAME = "targets-{:05d}.safetensors"


@dataclass(frozen=True, slots=True)
class TeacherTargets:
    """The targets of a round by teacher; `spec` is None where no teacher is needed.

    Hidden states are kept where the loss needs whole distributions. Otherwise a teacher's top k, or the
    sampled token's log-probability: a few numbers per token, and no head in memory during the updates.
    `alignments` are those of teachers with other tokenizers. `supports` are the student's likeliest ids at
    each trained token, by rollout, where a teacher is asked for them (`student_top_k`); of this copy's
    rollouts only.
    """

    cache: HiddenCache
    spec: TargetSpec | None
    views: Mapping[str, TokenView]
    heads: ResidentHeads
    alignments: Alignments = field(default_factory=dict)
    supports: Mapping[int, SupportIds] = field(default_factory=dict)

    def spec_of(self, teacher: str) -> TargetSpec:
        """Return the kind of target kept for a teacher. Raises ValueError where none is needed."""
        if self.spec is None:
            raise ValueError(f"the phase needs no teacher, so nothing is kept of {teacher!r}")
        spec = self.views[teacher].required(self.spec)
        return self.heads.teachers[teacher].capabilities.smallest(spec)

    def sequences(
        self, teacher: str, rollouts: Sequence[Rollout], indices: Sequence[int]
    ) -> dict[int, TeacherSequence]:
        """Return these rollouts in the teacher's tokens, by index; those without tokens are left out."""
        alignments = self.alignments.get(teacher, {})
        read = {i: self.views[teacher].read(rollouts[i], alignments.get(i)) for i in indices}
        has_support = self.spec_of(teacher).kind == "student_top_k"
        return {
            i: replace(sequence, support=self.supports[i]) if has_support else sequence
            for i, sequence in read.items()
            if sequence is not None
        }

    def of(self, pack: MicroBatchPlan) -> dict[str, Target]:
        """Return the pack's targets for the kernel, by teacher; heads of all other teachers are freed.

        A teacher with another tokenizer has a row per token of its own, and is absent without any.
        """
        if self.spec is None:
            return {}
        specs = {name: self.spec_of(name) for name in pack.teachers}
        heads = self.heads.of([name for name, spec in specs.items() if spec.kind == "hidden"])
        targets: dict[str, Target] = {}
        for name, spec in specs.items():
            rows = self._rows(name, pack)
            if rows is None:
                continue
            match spec.kind:
                case "hidden":
                    targets[name] = Hidden(rows, heads[name])
                case "top_k":
                    targets[name] = TopK.unpack(rows)
                case "student_top_k":
                    targets[name] = TopK.unpack(rows, of="student")
                case "sampled":
                    targets[name] = Sampled.unpack(rows)
        return targets

    def span_logprobs(self, pack: MicroBatchPlan) -> dict[str, Tensor]:
        """Return log-probabilities of their own tokens, for teachers whose bridge is a policy term."""
        logprobs = {}
        for name in pack.teachers:
            if self.spec is not None and name in self.alignments and self.spec_of(name).kind == "sampled":
                rows = self._rows(name, pack)
                if rows is not None:
                    logprobs[name] = Sampled.unpack(rows).logprob
        return logprobs

    def _rows(self, teacher: str, pack: MicroBatchPlan) -> Tensor | None:
        """Return the kept rows of a pack for a teacher; None if the teacher scored none of them."""
        own = self.alignments.get(teacher)
        read = pack.rollouts if own is None else [i for i in pack.rollouts if len(own[i].teacher_ids)]
        return self.cache.gather(teacher, read) if read else None


def read_by(view: TokenView, teacher: str, rollouts: Sequence[Rollout]) -> Iterator[TeacherSequence]:
    """Yield the responses that a teacher scores, in its tokens; those without trained tokens are left out."""
    own = {i: r for i, r in enumerate(rollouts) if teacher in r.prompt.scorers and r.num_trained}
    alignments = view.align(own)
    for i, rollout in own.items():
        sequence = view.read(rollout, alignments.get(i))
        if sequence is not None and sequence.num_trained:
            yield sequence


@dataclass(frozen=True)
class TargetRecorder:
    """Writes a teacher's targets of some sequences into a folder; those that it has are kept.

    `row_bytes` is the size of a token's target, `max_tokens` that of a forward pass.
    """

    teacher: Teacher
    origin: TargetOrigin
    folder: Path
    row_bytes: int
    max_tokens: int
    stages: Stages

    @property
    def _setting(self) -> str:
        return setting_of(self.teacher.name)

    def record(self, sequences: Iterable[TeacherSequence]) -> Manifest:
        """Write the missing ones of these sequences, then the manifest. Collective.

        Each process writes some of the shards. Raises StorageError if the folder has other targets, if a
        shard of its manifest is damaged, and if the disk has no room for what is missing.
        """
        ranks, stages = self.stages.ranks, self.stages
        kept, known = ranks.run_on_first(self._kept)
        missing = {key: s for s in sequences if (key := sequence_key(s)) not in known}
        num_tokens = sum(sequence.num_trained for sequence in missing.values())
        what = f"{len(missing):,} responses, {num_tokens:,} tokens x {self.row_bytes:,} bytes"
        what += f" = {_gib(num_tokens * self.row_bytes)}"
        stages.note(f"{self.teacher.name}: {shown(self.folder)} has {len(known):,} responses, lacks {what}")
        ranks.run_on_first(lambda: self._refuse_without_room(num_tokens * self.row_bytes))
        made: list[Shard] = []
        if missing:
            start = time.perf_counter()
            first = 1 + max((int(number) for s in kept for number in re.findall(r"\d+", s.file)), default=-1)
            shards = list(enumerate(self._split(missing), start=first))
            with self.teacher.open() as session:
                own = shards[ranks.rank :: ranks.size]
                num_calls = -(-len(shards) // ranks.size)
                written = ranks.run_and_gather(partial(self._write_all, session, own, missing, num_calls))
            made = sorted((shard for part in written for shard in part), key=lambda shard: shard.file)
            seconds = time.perf_counter() - start
            stages.note(
                f"{self.teacher.name}: wrote {what} in {seconds:,.1f} s, {num_tokens / seconds:,.0f} tokens/s"
            )
        manifest = Manifest(FORMAT, self.origin, (*kept, *made))
        ranks.run_on_first(lambda: write_manifest(self.folder, manifest))
        return manifest

    def _kept(self) -> tuple[list[Shard], set[bytes]]:
        """Return the shards in the folder, with the keys of their sequences."""
        manifest = read_manifest(self.folder)
        listed = {} if manifest is None else {shard.file: shard for shard in manifest.shards}
        with named_failures("list", self.folder, self._setting):
            paths = sorted(self.folder.glob("*.safetensors"))
            for leftover in filter(is_leftover, self.folder.iterdir()):
                leftover.unlink()
        verify_shards(self.folder, [listed[path.name] for path in paths if path.name in listed])
        shards, known = [], set[bytes]()
        for path in paths:
            index = ShardIndex.read(path)
            differences = [*index.origin.differences(self.origin)]
            if index.origin.spec != self.origin.spec:
                differences.append("another kind of targets")
            if differences:
                raise StorageError(
                    f"{shown(path)} does not have the targets that teacher '{self.teacher.name}' has now: "
                    f"{joined(differences, 'and')}; delete the folder, or name another one"
                )
            if path.name not in listed:  # an earlier start was stopped before it wrote the manifest
                with named_failures("read", path):
                    listed[path.name] = _shard(path.name, path.read_bytes(), index.keys, index.offsets[-1])
            shards.append(listed[path.name])
            known.update(index.keys)
        return shards, known

    def _refuse_without_room(self, num_bytes: int) -> None:
        with named_failures("use", self.folder, self._setting):
            free = shutil.disk_usage(self.folder).free
        if num_bytes > free:
            raise StorageError(
                f"{shown(self.folder)}: {_gib(num_bytes)} of targets of teacher '{self.teacher.name}' do not "
                f"fit on its disk, which has {_gib(free)} free; free space, or name a folder on another disk"
            )

    def _split(self, sequences: Mapping[bytes, TeacherSequence]) -> Iterator[list[bytes]]:
        """Yield the keys of each shard; every process gets one if there are enough sequences."""
        share = -(-sum(one.num_trained for one in sequences.values()) // self.stages.ranks.size)
        most = max(1, min(SHARD_TOKENS, SHARD_BYTES // self.row_bytes, share))
        keys: list[bytes] = []
        num_tokens = 0
        for key, sequence in sequences.items():
            if keys and num_tokens + sequence.num_trained > most:
                yield keys
                keys, num_tokens = [], 0
            keys.append(key)
            num_tokens += sequence.num_trained
        yield keys

    def _write_all(
        self,
        session: TeacherSession,
        shards: Sequence[tuple[int, Sequence[bytes]]],
        sequences: Mapping[bytes, TeacherSequence],
        num_calls: int,
    ) -> list[Shard]:
        """Score and write shards of these numbers and keys; score `num_calls` times, as all ranks must."""
        written = []
        rate = ""
        for done, (number, keys) in enumerate(shards):
            own = [sequences[key] for key in keys]
            num_tokens, start = sum(sequence.num_trained for sequence in own), time.perf_counter()
            detail = f"{self.teacher.name}, shard {done + 1} of {len(shards)}{rate}"
            on_progress = self.stages.begin("teachers", detail, len(own), "responses")
            rows: list[Tensor | None] = [None] * len(own)
            with closing(self._scored(session, own)) as scored:
                for count, (position, hidden) in enumerate(scored, start=1):
                    rows[position] = hidden.cpu()
                    on_progress(count)
            name = _SHARD_NAME.format(number)
            content = shard_content(self.origin, keys, [one for one in rows if one is not None])
            write_atomic(self.folder / name, content, self._setting)
            written.append(_shard(name, content, keys, num_tokens))
            rate = f", {num_tokens / (time.perf_counter() - start):,.0f} tokens/s"
        for _ in range(num_calls - len(shards)):
            list(self._scored(session, ()))
        return written

    def _scored(
        self, session: TeacherSession, sequences: Sequence[TeacherSequence]
    ) -> Generator[tuple[int, Tensor], None, None]:
        yield from session.score(sequences, self.origin.spec, self.max_tokens)


def _shard(name: str, content: bytes, keys: Sequence[bytes], num_tokens: int) -> Shard:
    return Shard(name, len(keys), num_tokens, len(content), hashlib.sha256(content).hexdigest())


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:,.3f} GiB"
