"""Whole runs whose phases choose prompts, teachers and sampling settings."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from recorded_runs import Recorder, run_recorded
from safetensors.torch import load_file

from mergeopd.rollout.local import LocalEngine
from mergeopd.rollout.protocol import GenerationRequest, PendingRollouts
from mergeopd.types import Sampling

CPU = torch.device("cpu")
PHASES = [
    {
        "name": "cold",
        "text": "teacher",
        "prompts": ["right"],
        "updates": 2,
        "prompts_per_round": 3,
        "loss": {"nll": 1.0, "reverse_kl": {"teachers": "past", "weight": 0.1}},
        "rollout": {"max_new_tokens": 2},
    },
    {
        "name": "left",
        "prompts": "left",
        "teachers": {"one": 2.0, "past": 0.5},
        "updates": 2,
        "prompts_per_round": 3,
        "loss": "reverse_kl",
        "rollout": {"samples_per_prompt": 3, "temperature": 0.5, "max_new_tokens": 3},
    },
    {
        "name": "all",
        "prompts": {"left": 1, "right": 2},
        "updates": 3,
        "prompts_per_round": 3,
        "loss": "reverse_kl",
    },
]


def write(write_job: Callable[..., Path]) -> Path:
    teachers = {"one": {"card": "one.yaml"}, "two": {"card": "two.yaml"}, "past": {"student": "start"}}
    return write_job({"phases": PHASES, "teachers": teachers})


def test_phases_choose_prompts_teachers_and_sampling(
    write_job: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[list[GenerationRequest], Sampling]] = []
    submit = LocalEngine.submit

    def recorded(
        self: LocalEngine, requests: Sequence[GenerationRequest], sampling: Sampling
    ) -> PendingRollouts:
        asked.append((list(requests), sampling))
        return submit(self, requests, sampling)

    monkeypatch.setattr(LocalEngine, "submit", recorded)
    recorder = Recorder()
    run_recorded(write(write_job), CPU, recorder=recorder)
    domains = {update.phase: set(update.domains) for update in recorder.updates}
    assert domains == {"cold": {"right"}, "left": {"left"}, "all": {"left", "right"}}
    scored = {update.phase: set(update.teachers) for update in recorder.updates}
    assert scored == {"cold": {"past"}, "left": {"one", "past"}, "all": {"one", "two"}}

    (_, by_teacher), *rounds = asked
    assert [s.max_new_tokens for s in (by_teacher, *(s for _, s in rounds))] == [2, 3, 3, 6, 6, 6]
    assert [s.temperature for _, s in rounds] == [0.5, 0.5, 1.0, 1.0, 1.0]
    assert [len(requests) for requests, _ in rounds] == [9, 9, 3, 3, 3]
    # A pair of key and sample seeds the random numbers of a response: none is used twice.
    streams = [(request.key, request.sample) for requests, _ in rounds for request in requests]
    assert len(streams) == len(set(streams))


def test_a_run_that_is_stopped_in_any_phase_resumes_exactly(
    write_job_in: Callable[..., Path], tmp_path: Path
) -> None:
    weights = []
    for name, stops in (("whole", ()), ("parts", (1, 3, 5))):
        (tmp_path / name).mkdir()
        teachers = {"one": {"card": "one.yaml"}, "two": {"card": "two.yaml"}, "past": {"student": "start"}}
        recipe = write_job_in(tmp_path / name, {"phases": PHASES, "teachers": teachers})
        for stop_after in (*stops, None):
            folder = run_recorded(recipe, CPU, "checkpoint.every=1", recorder=Recorder(stop_after))
        weights.append(load_file(folder.export / "model.safetensors"))
    whole, parts = weights
    assert all((whole[name] == parts[name]).all() for name in whole)


def test_documents_are_learned_without_teachers_and_scored_where_a_term_names_one(
    write_job: Callable[..., Path],
) -> None:
    phases = [
        {"name": "learn", "prompts": ["facts"], "text": "dataset", "loss": "nll"},
        {
            "name": "keep",
            "prompts": ["facts"],
            "text": "dataset",
            "loss": {"nll": 1.0, "forward_kl": {"teachers": "two", "weight": 0.5}},
        },
        {"name": "repair", "prompts": ["left", "right"], "loss": "reverse_kl"},
    ]
    facts = {"source": "facts.jsonl", "domain": "facts", "text_field": "text", "max_tokens": 4}
    recipe = write_job({"phases": [{"updates": 1, "prompts_per_round": 3, **phase} for phase in phases]})
    (recipe.parent / "facts.jsonl").write_text('{"text": "a b c d a"}\n{"text": "b"}')
    document = json.loads(recipe.read_text())
    recipe.write_text(json.dumps({**document, "prompts": [*document["prompts"], facts]}))
    recorder = Recorder()
    run_recorded(recipe, CPU, recorder=recorder)
    learn, keep, repair = recorder.updates
    assert (learn.num_tokens, set(learn.teachers), set(learn.domains)) == (6 + 2, set(), {"facts"})
    assert set(keep.teachers) == {"two"}
    assert set(repair.domains) == {"left", "right"}
