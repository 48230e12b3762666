"""What teachers generate before a phase: once per prompt and sample, kept for every run that asks again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from mergeopd.data.renderer import Dialect
from mergeopd.distributed.ranks import Ranks
from mergeopd.engine.progress import Task
from mergeopd.engine.rollouts import sampling
from mergeopd.engine.stages import Stages
from mergeopd.recipe import sources
from mergeopd.recipe.plan import Plan
from mergeopd.rollout.protocol import Completion, GenerationRequest
from mergeopd.storage.folders import write_atomic
from mergeopd.teacher.protocol import Teacher
from mergeopd.teacher.token_view import TokenView
from mergeopd.types import Prompt, Rollout

FORMAT = 1
# Texts are saved once so many are new: a kill costs a twentieth, and the file is not rewritten too often.
_SAVED_SHARE = 0.05


class TeacherRolloutCache:
    """Teachers' responses, by teacher, prompt and sample.

    A file holds what one teacher generated under one set of circumstances: its weights (by fingerprint), its
    precision, stop tokens, sampling and seed name the file; the rendered prompt and the sample name a line.
    So a response is never taken for another's, and a changed template or prompt generates a new one.
    """

    def __init__(
        self,
        plan: Plan,
        *,
        student: Dialect,
        renderers: Mapping[str, Dialect],
        teachers: Mapping[str, Teacher],
        views: Mapping[str, TokenView],
        ranks: Ranks,
        stages: Stages,
    ) -> None:
        self._plan = plan
        self._student = student
        self._renderers = renderers
        self._teachers = teachers
        self._views = views
        self._ranks = ranks
        self._stages = stages
        self._completions: dict[tuple[str, str, int], Completion] = {}

    def prepare(self, tasks: Sequence[Task]) -> None:
        """Have every teacher generate what these tasks will ask for; a teacher is opened at most once."""
        wanted: dict[str, dict[tuple[str, int], Prompt]] = {}
        for task in tasks:
            if task.origin == "teacher":
                for sample in range(self._plan.rollout.samples_per_prompt):
                    wanted.setdefault(_author(task.prompt), {})[task.prompt.key, sample] = task.prompt
        for teacher, prompts in wanted.items():
            missing = {k: p for k, p in prompts.items() if (teacher, *k) not in self._completions}
            if missing:
                self._provide(teacher, missing)

    def of(self, task: Task) -> list[Rollout]:
        """The prepared responses to a task, in the student's ids."""
        name, prompt = _author(task.prompt), task.prompt
        found = []
        for sample in range(self._plan.rollout.samples_per_prompt):
            completion = self._completions[name, prompt.key, sample]
            ids, finish = self._views[name].student_ids(completion, prompt)
            rollout = Rollout(prompt, sample, self._student.render(prompt), ids, "teacher", finish)
            found.append(rollout)
        return found

    def _provide(self, name: str, prompts: Mapping[tuple[str, int], Prompt]) -> None:
        """Take from disk what is there, generate the rest, and keep it."""
        path = self._file(name)
        known = self._ranks.first(lambda: _load(path))
        renderer = self._renderers[name]
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
            finally:  # what was generated before a request to stop is not generated again
                known = self._keep(path, known, fresh)
        for request in requests:
            self._completions[name, request.key, request.sample] = known[_line_key(request)]

    def _generate(self, name: str, requests: Sequence[GenerationRequest]) -> Iterator[dict[str, Completion]]:
        """Yield responses batch by batch, one of every process at a time. Collective.

        A resumed run lacks whole batches, and the last ones: it makes the same batches of the rest.
        """
        size = self._plan.rollout.batch_size * self._ranks.size
        in_order = sorted(requests, key=lambda request: len(request.prompt_ids))
        on_progress = self._stages.begin("text", f"{name} generates", len(requests), "responses")
        with self._teachers[name].open() as session:
            engine = session.generator()
            for start in range(0, len(in_order), size):
                batch = in_order[start : start + size]
                texts = engine.submit(batch, sampling(self._plan.rollout)).wait(lambda _: None)
                yield {_line_key(r): t for r, t in zip(batch, texts, strict=True)}
                done = -(-(start + len(batch)) // self._ranks.size)
                self._ranks.share(lambda done=done: on_progress(done))  # type: ignore[misc]

    def _keep(
        self, path: Path, known: Mapping[str, Completion], texts: Mapping[str, Completion]
    ) -> dict[str, Completion]:
        """Add responses, which all processes have, to the file; not collective. Returns both.

        Not what another run has put there meanwhile: only one process would see it.
        """
        if self._ranks.is_first:
            _keep(path, texts)
        return {**known, **texts}

    def _file(self, name: str) -> Path:
        """Where a teacher's responses under the present circumstances are kept."""
        how = sampling(self._plan.rollout)
        circumstances = {
            "format": FORMAT,
            "weights": self._teachers[name].fingerprint,
            "dtype": self._plan.teachers[name].dtype,
            "eos_ids": sorted(self._renderers[name].eos_ids),
            "temperature": how.temperature,
            "top_p": how.top_p,
            "max_new_tokens": how.max_new_tokens,
            "stop": how.stop,
            "seed": self._plan.seed,
        }
        digest = hashlib.sha256(json.dumps(circumstances, sort_keys=True).encode()).hexdigest()
        return Path(self._plan.text_cache) / f"{name}-{digest[:20]}.jsonl"


def _author(prompt: Prompt) -> str:
    """The teacher that generates for a prompt."""
    return sources.author(prompt.teachers)


def _line_key(request: GenerationRequest) -> str:
    content = json.dumps([request.key, request.sample, request.prompt_ids])
    return hashlib.sha256(content.encode()).hexdigest()[:32]


def _keep(path: Path, texts: Mapping[str, Completion]) -> None:
    """Add texts to a file, also to what another run has added meanwhile."""
    if not texts:
        return
    lines = [
        json.dumps({"key": key, "ids": text.response_ids, "finish": text.finish}) + "\n"
        for key, text in {**_load(path), **texts}.items()
    ]
    write_atomic(path, "".join(lines))


def _load(path: Path) -> dict[str, Completion]:
    """The texts of a file; a line that is damaged is written again."""
    if not path.is_file():
        return {}
    texts = {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
            texts[row["key"]] = Completion(tuple(row["ids"]), (), row["finish"])
        except (ValueError, KeyError, TypeError):
            continue
    return texts
