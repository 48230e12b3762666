"""What teachers write before a phase: once per prompt and sample, kept for every run that asks again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import get_args

from mergeopd.engine.build import Parts
from mergeopd.engine.dialect import Dialect
from mergeopd.engine.scoring import score_canary
from mergeopd.engine.tasks import Task, author
from mergeopd.ranks import spread
from mergeopd.report.events import Note, Reporter, StageProgress, StageStarted
from mergeopd.rollout.local import Completion, Request, Writer, generate
from mergeopd.storage.folders import write_atomic
from mergeopd.storage.lock import waiting
from mergeopd.teacher.store import LoadedTeacher
from mergeopd.types import Finish, Prompt, Rollout, Sampling

FORMAT = 2
# Texts are saved once so many are new: a kill costs a twentieth, and the file is not rewritten too often.
_SAVED_SHARE = 0.05


class TeacherTexts:
    """Teachers' answers, by teacher, prompt and sample.

    A file holds what one teacher wrote under one set of circumstances: its weights (by fingerprint), its
    precision, stop tokens, sampling and seed name the file; the rendered prompt and the sample name a line.
    So a text is never taken for another's, and a changed template or prompt is written anew.
    """

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._texts: dict[tuple[str, str, int], Completion] = {}

    def prepare(self, tasks: Sequence[Task], reporter: Reporter) -> None:
        """Have every teacher write what these tasks will ask for; a teacher is loaded at most once."""
        wanted: dict[str, dict[tuple[str, int], Prompt]] = {}
        for task in tasks:
            if task.origin == "teacher":
                for sample in range(self._parts.plan.rollout.samples_per_prompt):
                    wanted.setdefault(author(task.prompt), {})[task.prompt.key, sample] = task.prompt
        for teacher, prompts in wanted.items():
            missing = {k: p for k, p in prompts.items() if (teacher, *k) not in self._texts}
            if missing:
                self._provide(teacher, missing, reporter)

    def rollouts(self, task: Task) -> list[Rollout]:
        """The prepared answers to a task; the teacher's stop token becomes the student's."""
        student = self._parts.inputs.student
        return [
            Rollout(
                prompt=task.prompt,
                sample=sample,
                prompt_ids=student.render(task.prompt),
                response_ids=ids,
                origin="teacher",
                finish=finish,
            )
            for sample in range(self._parts.plan.rollout.samples_per_prompt)
            for ids, finish in [self._in_student_ids(author(task.prompt), task.prompt, sample)]
        ]

    def _in_student_ids(self, name: str, prompt: Prompt, sample: int) -> tuple[tuple[int, ...], Finish]:
        """What a teacher wrote in the student's ids, and how that ends.

        Of a teacher with other tokens the text is encoded anew, which may take more tokens; where it is not
        given back whole, or would outgrow the student's context, it is cut.
        """
        student = self._parts.inputs.student
        text, crossing = self._texts[name, prompt.key, sample], self._parts.inputs.crossings.get(name)
        if crossing is None:
            return _closed(text, student), text.finish
        room = student.max_positions - len(student.render(prompt))
        ids, whole = crossing.in_student_ids(text.response_ids, ended=text.finish == "eos")
        return ids[:room], text.finish if whole and len(ids) <= room else "length"

    def _provide(self, name: str, prompts: Mapping[tuple[str, int], Prompt], reporter: Reporter) -> None:
        """Take from disk what is there, have the rest written, and keep it."""
        path = self._file(name)
        dialect = self._parts.inputs.teachers[name]
        known, num_discarded = self._parts.ranks.first(lambda: self._load(path, dialect))
        if num_discarded:
            kept = "kept text" if num_discarded == 1 else "kept texts"
            reporter.emit(Note(f"discarded {num_discarded} damaged {kept} of teacher {name} in {path}"))
        requests = [Request(key, sample, dialect.render(p)) for (key, sample), p in prompts.items()]
        new = [request for request in requests if _line_key(request) not in known]
        if new:
            fresh: dict[str, Completion] = {}
            try:
                for texts in self._write(name, new, reporter):
                    fresh |= texts
                    if len(fresh) >= _SAVED_SHARE * len(known):
                        known, fresh = self._keep(path, known, fresh), {}
            finally:  # what was written before a request to stop is not written again
                known = self._keep(path, known, fresh)
        for request in requests:
            self._texts[name, request.key, request.sample] = known[_line_key(request)]

    def _write(
        self, name: str, requests: Sequence[Request], reporter: Reporter
    ) -> Iterator[dict[str, Completion]]:
        """Have the teacher write; yield batch by batch, one of every process at a time. Collective.

        A run that goes on misses whole batches, and the last ones: it makes the same batches of the rest.
        """
        parts, ranks, size = self._parts, self._parts.ranks, self._parts.plan.rollout.batch_size
        in_order = sorted(requests, key=lambda request: len(request.prompt_ids))
        reporter.emit(StageStarted("text", f"{name} writes", len(requests), "answers"))
        with parts.store.open(name) as teacher:
            writer = parts.teacher_writer(teacher)
            ranks.share(lambda: self._recognise(teacher, writer))
            for start in range(0, len(in_order), size * ranks.size):
                batch = in_order[start : start + size * ranks.size]
                texts = spread(ranks, batch, lambda own: self._texts_of(writer, own))
                yield {_line_key(r): t for r, t in zip(batch, texts, strict=True)}
                done = StageProgress(start + len(batch))
                ranks.share(lambda done=done: reporter.emit(done))  # type: ignore[misc]

    def _recognise(self, teacher: LoadedTeacher, writer: Writer) -> None:
        """Raise TeacherError for a teacher that is not what its card says."""
        score_canary(self._parts, teacher)
        self._parts.canaries.verify(teacher.name, writer.head)

    def _texts_of(self, writer: Writer, requests: Sequence[Request]) -> list[Completion]:
        plan = self._parts.plan
        return generate(
            writer,
            requests,
            self._sampling(),
            seed=plan.seed,
            batch_size=plan.rollout.batch_size,
            progress=lambda _: None,
        )

    def _keep(
        self, path: Path, known: Mapping[str, Completion], texts: Mapping[str, Completion]
    ) -> dict[str, Completion]:
        """Add texts, which all processes have, to the file; not collective. Returns both.

        Not what another run has put there meanwhile: only one process would see it.
        """
        if self._parts.ranks.is_first:
            _keep(path, texts)
        return {**known, **texts}

    def _load(self, path: Path, dialect: Dialect) -> tuple[dict[str, Completion], int]:
        """The texts of a file, and how many lines were removed that this teacher cannot have written."""
        if not path.is_file():
            return {}, 0
        with waiting(path):
            lines = _lines(path)
            read = {line: text for line in lines if (text := _text(line)) is not None}
            texts = {key: text for key, text in read.values() if self._is_possible(text, dialect)}
            if len(texts) < len(lines):
                _write(path, texts)
        return texts, len(lines) - len(texts)

    def _is_possible(self, text: Completion, dialect: Dialect) -> bool:
        """Whether ids, length and end of a text agree with the vocabulary and with the sampling."""
        ids, sampling = text.response_ids, self._sampling()
        if not 0 < len(ids) <= sampling.max_new_tokens or max(ids) >= dialect.tokenizer.vocab_size:
            return False
        ended = [i in dialect.eos_ids for i in ids]
        if text.finish == "eos":
            return ended[-1] and not any(ended[:-1])
        reached = bool(sampling.stop) if text.finish == "stop" else len(ids) == sampling.max_new_tokens
        return reached and not any(ended)

    def _sampling(self) -> Sampling:
        rollout = self._parts.plan.rollout
        return Sampling(rollout.temperature, rollout.top_p, rollout.max_new_tokens, rollout.stop)

    def _file(self, name: str) -> Path:
        """Where a teacher's texts under the present circumstances are kept."""
        parts, sampling = self._parts, self._sampling()
        circumstances = {
            "format": FORMAT,
            "weights": parts.store.fingerprint(name),
            "dtype": parts.plan.teachers[name].dtype,
            "eos_ids": sorted(parts.inputs.teachers[name].eos_ids),
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "max_new_tokens": sampling.max_new_tokens,
            "stop": sampling.stop,
            "seed": parts.plan.seed,
        }
        digest = hashlib.sha256(json.dumps(circumstances, sort_keys=True).encode()).hexdigest()
        return Path(parts.plan.text_cache) / f"{name}-{digest[:20]}.jsonl"


def _line_key(request: Request) -> str:
    content = json.dumps([request.key, request.sample, request.prompt_ids])
    return hashlib.sha256(content.encode()).hexdigest()[:32]


def _keep(path: Path, texts: Mapping[str, Completion]) -> None:
    """Add texts to a file, also to what another run has added meanwhile."""
    if not texts:
        return
    with waiting(path):
        _write(path, {**dict(filter(None, map(_text, _lines(path)))), **texts})


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []


def _write(path: Path, texts: Mapping[str, Completion]) -> None:
    write_atomic(path, "".join(f"{_line(key, text)}\n" for key, text in texts.items()))


def _line(key: str, text: Completion) -> str:
    content = {"key": key, "ids": text.response_ids, "finish": text.finish}
    return json.dumps({**content, "sha256": _digest(content)})


def _digest(content: Mapping[str, object]) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _text(line: str) -> tuple[str, Completion] | None:
    """Key and text of a line; None where it is damaged or holds something else."""
    try:
        row = json.loads(line)
        key, ids, finish = row["key"], row["ids"], row["finish"]
        whole = row == {"key": key, "ids": ids, "finish": finish, "sha256": row["sha256"]}
        whole = whole and row["sha256"] == _digest({"key": key, "ids": ids, "finish": finish})
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    if not whole or finish not in get_args(Finish) or not isinstance(ids, list):
        return None
    if not all(type(i) is int and i >= 0 for i in ids):
        return None
    return str(key), Completion(tuple(ids), (), finish)


def _closed(text: Completion, student: Dialect) -> tuple[int, ...]:
    """The teacher's ids; its stop token becomes the student's."""
    if text.finish != "eos" or text.response_ids[-1] in student.eos_ids:
        return text.response_ids
    return (*text.response_ids[:-1], student.end_id)
