"""Teacher responses, generated before a phase once per prompt and sample, and cached for later runs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import get_args

import numpy as np

from mergeopd.data.renderer import Renderer
from mergeopd.engine.progress import Task
from mergeopd.engine.rollouts import sampling
from mergeopd.engine.stages import Stages
from mergeopd.recipe.plan import Plan
from mergeopd.recipe.sources import author
from mergeopd.reporting.events import Note
from mergeopd.rollout.protocol import Completion, GenerationRequest
from mergeopd.storage.folders import write_atomic
from mergeopd.storage.lock import waiting
from mergeopd.teacher.protocol import Teacher
from mergeopd.teacher.token_view import TokenView
from mergeopd.types import Finish, Prompt, Rollout, token_ids

FORMAT = 2
# Fraction of new responses after which the file is saved: limits both the loss at a kill and the rewrites.
_SAVED_SHARE = 0.05
_MAX_ID = np.iinfo(np.int32).max
_NO_LOGPROBS = np.zeros(0, np.float32)


@dataclass(frozen=True)
class TeacherRolloutCache:
    """Teachers' responses, by teacher, prompt and sample.

    A file holds the responses of one teacher under one configuration: weights (by fingerprint), precision,
    stop tokens, sampling and seed name the file; the rendered prompt and the sample name a line. So a changed
    template or prompt generates new responses.
    """

    plan: Plan
    student: Renderer
    renderers: Mapping[str, Renderer]
    teachers: Mapping[str, Teacher]
    views: Mapping[str, TokenView]
    stages: Stages
    _completions: dict[tuple[str, str, int], Completion] = field(default_factory=dict, init=False)

    def prepare(self, tasks: Sequence[Task]) -> None:
        """Generate the missing responses to these tasks; each teacher is opened at most once."""
        needed: dict[str, dict[tuple[str, int], Prompt]] = {}
        for task in tasks:
            if task.origin == "teacher":
                for sample in range(self.plan.rollout.samples_per_prompt):
                    needed.setdefault(author(task.prompt.teachers), {})[task.prompt.key, sample] = task.prompt
        for teacher, prompts in needed.items():
            missing = {k: p for k, p in prompts.items() if (teacher, *k) not in self._completions}
            if missing:
                self._provide(teacher, missing)

    def of(self, task: Task) -> list[Rollout]:
        """Return the prepared responses to a task, in the student's ids."""
        name, prompt = author(task.prompt.teachers), task.prompt
        rollouts = []
        for sample in range(self.plan.rollout.samples_per_prompt):
            completion = self._completions[name, prompt.key, sample]
            ids, finish = self.views[name].student_ids(completion, prompt)
            rollout = Rollout(prompt, sample, self.student.render(prompt), ids, "teacher", finish)
            rollouts.append(rollout)
        return rollouts

    def _provide(self, name: str, prompts: Mapping[tuple[str, int], Prompt]) -> None:
        """Load responses from disk, generate the missing ones, and save them."""
        path = self._file(name)
        renderer = self.renderers[name]
        known, num_discarded = self.stages.ranks.run_on_first(lambda: self._load(path, renderer))
        if num_discarded:
            kept = "response" if num_discarded == 1 else "responses"
            note = f"discarded {num_discarded} damaged kept {kept} of teacher {name} in {path}"
            self.stages.reporter.emit(Note(note))
        requests = [
            GenerationRequest(key, sample, renderer.render(p)) for (key, sample), p in prompts.items()
        ]
        new = [request for request in requests if _line_key(request) not in known]
        if new:
            fresh: dict[str, Completion] = {}
            try:
                for texts in self._generate(name, new):
                    fresh |= texts
                    if len(fresh) >= _SAVED_SHARE * len(known):
                        known, fresh = self._keep(path, known, fresh), {}
            finally:  # responses generated before a request to stop are kept
                known = self._keep(path, known, fresh)
        for request in requests:
            self._completions[name, request.key, request.sample] = known[_line_key(request)]

    def _generate(self, name: str, requests: Sequence[GenerationRequest]) -> Iterator[dict[str, Completion]]:
        """Yield responses in batches, one of every process at a time. Collective.

        In a resumed run, whole batches at the end are missing, so the rest forms the same batches.
        """
        size = self.plan.rollout.batch_size * self.stages.ranks.size
        in_order = sorted(requests, key=lambda request: len(request.prompt_ids))
        on_progress = self.stages.begin("text", f"{name} generates", len(requests), "responses")
        with self.teachers[name].open() as session:
            engine = session.generator()
            for start in range(0, len(in_order), size):
                batch = in_order[start : start + size]
                texts = engine.submit(batch, sampling(self.plan.rollout)).wait(lambda _: None)
                yield {_line_key(r): t for r, t in zip(batch, texts, strict=True)}
                done = -(-(start + len(batch)) // self.stages.ranks.size)
                self.stages.ranks.run_and_gather(lambda done=done: on_progress(done))  # type: ignore[misc]

    def _keep(
        self, path: Path, known: Mapping[str, Completion], texts: Mapping[str, Completion]
    ) -> dict[str, Completion]:
        """Add responses, which all processes have, to the file; not collective. Returns all of this run's.

        Responses that another run has added meanwhile are ignored, since only one process would read them.
        """
        if self.stages.ranks.is_first:
            _keep(path, texts)
        return {**known, **texts}

    def _load(self, path: Path, renderer: Renderer) -> tuple[dict[str, Completion], int]:
        """Load the responses of a file; also return how many invalid lines were removed."""
        if not path.is_file():
            return {}, 0
        with waiting(path):
            lines = _lines(path)
            read = {line: text for line in lines if (text := _text(line)) is not None}
            texts = {key: text for key, text in read.values() if self._is_possible(text, renderer)}
            if len(texts) < len(lines):
                _write(path, texts)
        return texts, len(lines) - len(texts)

    def _is_possible(self, text: Completion, renderer: Renderer) -> bool:
        """Whether ids, length and end of a response agree with the vocabulary and with the sampling."""
        ids, how = text.response_ids, sampling(self.plan.rollout)
        if not 0 < len(ids) <= how.max_new_tokens or ids.max() >= renderer.tokenizer.vocab_size:
            return False
        ended = np.isin(ids, renderer.eos_ids)
        if text.finish == "eos":
            return bool(ended[-1]) and not ended[:-1].any()
        reached = bool(how.stop) if text.finish == "stop" else len(ids) == how.max_new_tokens
        return reached and not ended.any()

    def _file(self, name: str) -> Path:
        """Return the file of a teacher's responses under the present configuration."""
        how = sampling(self.plan.rollout)
        circumstances = {
            "format": FORMAT,
            "weights": self.teachers[name].fingerprint,
            "dtype": self.plan.teachers[name].dtype,
            "eos_ids": sorted(self.renderers[name].eos_ids),
            "temperature": how.temperature,
            "top_p": how.top_p,
            "max_new_tokens": how.max_new_tokens,
            "stop": how.stop,
            "seed": self.plan.seed,
        }
        digest = hashlib.sha256(json.dumps(circumstances, sort_keys=True).encode()).hexdigest()
        return Path(self.plan.text_cache) / f"{name}-{digest[:20]}.jsonl"


def _line_key(request: GenerationRequest) -> str:
    content = json.dumps([request.key, request.sample, request.prompt_ids.tolist()])
    return hashlib.sha256(content.encode()).hexdigest()[:32]


def _keep(path: Path, texts: Mapping[str, Completion]) -> None:
    """Add texts to a file, keeping those that another run has added meanwhile."""
    if not texts:
        return
    with waiting(path):
        _write(path, {**dict(filter(None, map(_text, _lines(path)))), **texts})


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []


def _write(path: Path, texts: Mapping[str, Completion]) -> None:
    write_atomic(path, "".join(f"{_line(key, text)}\n" for key, text in texts.items()))


def _line(key: str, text: Completion) -> str:
    content = {"key": key, "ids": text.response_ids.tolist(), "finish": text.finish}
    digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    return json.dumps({**content, "sha256": digest})


def _text(line: str) -> tuple[str, Completion] | None:
    """Parse key and text of a line; None if it is damaged or holds something else."""
    try:
        row = json.loads(line)
        key, ids, finish = row["key"], row["ids"], row["finish"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    if not isinstance(key, str) or finish not in get_args(Finish) or not isinstance(ids, list):
        return None
    if not all(type(i) is int and 0 <= i <= _MAX_ID for i in ids):
        return None
    text = Completion(token_ids(ids), _NO_LOGPROBS, finish)
    return (key, text) if line == _line(key, text) else None
