"""Teacher responses are generated once, and never used for another configuration."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from enumeration import teacher_rollouts_of

from mergeopd.distributed.communicator import SingleProcess
from mergeopd.engine.models import Machine, load_models
from mergeopd.engine.progress import Task
from mergeopd.preflight.inputs import preflight
from mergeopd.reporting.events import Event, Note, StageStarted
from mergeopd.rollout import local
from mergeopd.rollout.protocol import Completion
from mergeopd.storage import completion_cache as texts_module
from mergeopd.types import Rollout

CPU = torch.device("cpu")


class Recorder:
    def __init__(self) -> None:
        self.written: list[tuple[str, int | None]] = []
        self.notes: list[str] = []

    def emit(self, event: Event) -> None:
        if isinstance(event, StageStarted) and event.stage == "text":
            self.written.append((event.detail, event.total))
        if isinstance(event, Note):
            self.notes.append(event.text)


def texts(recipe: Path, *overrides: str) -> tuple[list[tuple[str, int | None]], list[Sequence[Rollout]]]:
    recorder, answers = recorded(recipe, *overrides)
    return recorder.written, answers


def recorded(recipe: Path, *overrides: str) -> tuple[Recorder, list[Sequence[Rollout]]]:
    parts = load_models(preflight(recipe, overrides), Machine(CPU, SingleProcess()))
    tasks = [Task(p, 0, "teacher") for ps in parts.inputs.prompts.values() for p in ps]
    recorder = Recorder()
    cache = teacher_rollouts_of(parts, recorder)
    cache.prepare(tasks, parts.plan.rollout)
    return recorder, [cache.of(task, parts.plan.rollout) for task in tasks]


@pytest.fixture
def recipe(write_job: Callable[..., Path]) -> Path:
    return write_job({"rollout": {"max_new_tokens": 6, "samples_per_prompt": 2}})


def test_responses_are_not_generated_twice(recipe: Path) -> None:
    first, answers = texts(recipe)
    # `left` is written by its heavier teacher, `right` by its only one; two prompts, two samples each.
    assert first == [("one generates", 4), ("two generates", 4)]
    again, same = texts(recipe)
    assert again == []
    assert same == answers
    assert all(len(samples) == 2 for samples in answers)


@pytest.mark.parametrize(
    ("override", "written"),
    [
        ("seed=4", ["one generates", "two generates"]),
        ("rollout.temperature=0.5", ["one generates", "two generates"]),
        ("rollout.max_new_tokens=5", ["one generates", "two generates"]),
        ("teachers.two.dtype=bfloat16", ["two generates"]),
        ("optimizer.lr=0.5", []),
    ],
)
def test_settings_that_change_responses_are_in_the_key(
    recipe: Path, override: str, written: list[str]
) -> None:
    texts(recipe)
    assert [detail for detail, _ in texts(recipe, override)[0]] == written


def test_changed_weights_templates_and_prompts_get_new_responses(recipe: Path) -> None:
    from safetensors.torch import load_file, save_file

    texts(recipe)
    file = recipe.parent / "two" / "model.safetensors"
    weights = load_file(file)
    weights["model.norm.weight"] *= 2
    save_file(weights, file, metadata={"format": "pt"})
    assert texts(recipe)[0] == [("two generates", 4)]
    settings = recipe.parent / "one" / "tokenizer_config.json"
    config = json.loads(settings.read_text())
    settings.write_text(json.dumps({**config, "chat_template": "d {{ messages[0].content }}"}))
    assert texts(recipe)[0] == [("one generates", 4)]
    prompts = recipe.parent / "right.jsonl"
    prompts.write_text(prompts.read_text().replace('"b"', '"c c"'))
    assert texts(recipe)[0] == [("two generates", 2)]


def test_a_damaged_line_is_written_again(recipe: Path) -> None:
    _, answers = texts(recipe)
    [file] = (recipe.parent / ".mergeopd" / "texts").glob("one-*.jsonl")
    file.write_text(file.read_text()[:-30])
    written, same = texts(recipe)
    assert written == [("one generates", 1)]
    assert same == answers


def test_responses_added_by_another_run_are_kept_but_not_used(
    recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of several processes one alone sees the file: what all began with must stay."""
    _, answers = texts(recipe)
    [file] = (recipe.parent / ".mergeopd" / "texts").glob("one-*.jsonl")
    *others, last = file.read_text().splitlines(keepends=True)
    file.write_text("".join(others))
    foreign = texts_module._line("of another prompt", Completion((1,), (), "eos")) + "\n"

    def generate(*arguments: Any, **options: Any) -> list[Completion]:
        keys = [json.loads(line)["key"] for line in others]
        changed = [texts_module._line(key, Completion((0, 0), (), "length")) + "\n" for key in keys]
        file.write_text("".join([*changed, foreign]))
        return written(*arguments, **options)

    written = local.generate
    monkeypatch.setattr(local, "generate", generate)
    wrote, same = texts(recipe)
    assert wrote == [("one generates", 1)]
    assert same == answers
    lines = file.read_text().splitlines(keepends=True)
    assert foreign in lines
    assert last in lines


def test_the_teachers_stop_token_becomes_the_students(recipe: Path) -> None:
    """Teacher `two` ends with token 3; what it wrote ends, for the student, with token 4."""
    (recipe.parent / "two" / "generation_config.json").write_text('{"eos_token_id": 3}')
    _, answers = texts(recipe)
    ended = [r for samples in answers for r in samples if r.prompt.domain == "right" and r.finish == "eos"]
    assert ended
    for rollout in ended:
        assert rollout.response_ids[-1] == 4
        assert 3 not in rollout.response_ids


def damaged(key: str, ids: list[int], finish: str) -> dict[str, Any]:
    """Lines that some program, or a disk, has left: each with its name and what it is made of."""
    content: dict[str, Any] = {"key": key, "ids": ids, "finish": finish}

    def hashed(**changes: Any) -> str:
        row = {**content, **changes}
        return json.dumps({**row, "sha256": hashlib.sha256(json.dumps(row).encode()).hexdigest()})

    return {
        "no hash": json.dumps(content),
        "other ids": json.dumps({**json.loads(hashed()), "ids": [1, *ids[1:]]}),
        "other key": json.dumps({**json.loads(hashed()), "key": "0" * 32}),
        "outside the vocabulary": hashed(ids=[10**6, *ids[1:]]),
        "negative": hashed(ids=[-1, *ids[1:]]),
        "nested": hashed(ids=[ids]),
        "a boolean": hashed(ids=[True, *ids[1:]]),
        "null": hashed(ids=None),
        "text": hashed(ids="abc"),
        "too long": hashed(ids=ids * 50, finish="length"),
        "empty": hashed(ids=[]),
        "unknown finish": hashed(finish="done"),
        "no end token": hashed(ids=[0], finish="eos"),
        "cut short": hashed(ids=[0], finish="length"),
        "no stop text asked for": hashed(ids=[0], finish="stop"),
        "another value": "[1, 2]",
        "nested without end": "[" * 100_000,
    }


@pytest.mark.parametrize("name", list(damaged("", [0], "eos")))
def test_a_kept_text_that_cannot_be_is_replaced_and_counted(recipe: Path, name: str) -> None:
    _, answers = texts(recipe)
    [file] = (recipe.parent / ".mergeopd" / "texts").glob("one-*.jsonl")
    first, *others = file.read_text().splitlines()
    row = json.loads(first)
    file.write_text("\n".join([damaged(row["key"], row["ids"], row["finish"])[name], *others]))
    recorder, same = recorded(recipe)
    assert recorder.written == [("one generates", 1)]
    assert same == answers
    [note] = recorder.notes
    assert note.startswith("discarded 1 damaged kept response of one in ")
    assert recorded(recipe)[0].notes == []


def test_two_runs_that_keep_texts_lose_none(tmp_path: Path) -> None:
    """Both read the file before either writes, unless one waits for the other."""
    file = tmp_path / "texts.jsonl"
    cache = texts_module.CompletionCache(tmp_path, SingleProcess(), lambda _: None)

    def write(number: int) -> None:
        for i in range(40):
            cache._keep(file, {}, {f"{number}-{i}": Completion((1,), (), "length")})

    threads = [threading.Thread(target=write, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(texts_module._lines(file)) == 120
