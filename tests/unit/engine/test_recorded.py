"""Runs with recorded targets against the same runs with the teachers, and what folders of targets are refused."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import struct
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from byte_jobs import write_byte_job
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM

from mergeopd import api
from mergeopd.engine import targets as targets_module
from mergeopd.errors import MergeopdError, RecipeError, StorageError, TeacherError
from mergeopd.preflight.inputs import preflight
from mergeopd.reporting.events import Event, UpdateDone
from mergeopd.teacher import local
from mergeopd.teacher.protocol import TeacherSequence
from mergeopd.teacher.target_folder import sequence_key

BOTH = ("teachers.one.targets=t/one", "teachers.two.targets=t/two")
PHASE = {"name": "merge", "updates": 4, "prompts_per_round": 4, "updates_per_round": 2}
VERIFIER = {"kind": "regex", "pattern": "^(b|c)"}
Write = Callable[..., Path]


def top_k(k: int) -> dict[str, Any]:
    return {"reverse_kl": 1.0, "support": {"top_k": k, "of": "teacher", "rest": "tail"}}


def updates(recipe: Path, *overrides: str) -> list[UpdateDone]:
    found: list[UpdateDone] = []

    def listen(event: Event) -> None:
        if isinstance(event, UpdateDone):
            found.append(event)

    api.run(recipe, set=overrides, on_event=listen)
    return found


@pytest.fixture
def no_bodies(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Function after whose call no teacher's body can be loaded."""

    def forbid(*_: object) -> None:
        raise AssertionError("a teacher's body was loaded")

    return lambda: monkeypatch.setattr(local, "fill", forbid)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("phase", "reads_heads"),
    [
        ({"text": "dataset", "loss": "reverse_kl"}, True),
        ({"text": "dataset", "loss": top_k(2)}, False),
        ({"text": "teacher", "loss": {"jsd": 1.0, "nll": 0.5}, "keep": "right"}, True),
    ],
    ids=["hidden", "top_k", "kept text"],
)
def test_a_run_with_recorded_targets_is_the_run_with_its_teachers(
    write_job: Write, here: Path, no_bodies: Callable[[], None], phase: dict[str, Any], reads_heads: bool
) -> None:
    sources = [
        {
            "source": "left.jsonl",
            "domain": "left",
            "teachers": {"one": 1.0, "two": 0.5},
            "verifier": VERIFIER,
        },
        {"source": "right.jsonl", "domain": "right", "teachers": {"two": 0.7}, "verifier": VERIFIER},
    ]
    rollout = {"max_new_tokens": 6, "samples_per_prompt": 4}
    recipe = write_job({"phases": [{**PHASE, **phase}], "prompts": sources, "rollout": rollout})
    for name in ("left", "right"):
        rows = [{"prompt": text, "response": "c d"} for text in ("a", "b", "c", "a b", "b c")]
        Path(f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    live = updates(recipe, "output=live")
    api.record_targets(recipe, set=BOTH)
    no_bodies()
    recorded = updates(recipe, *BOTH)
    assert [one.loss for one in recorded] == [one.loss for one in live]
    assert [one.grad_norm for one in recorded] == [one.grad_norm for one in live]
    # At most both heads in every update, 8 x 48 and 5 x 32 numbers in float32; a body has 18,000.
    assert recorded[-1].teacher_bytes_read <= len(recorded) * 4 * (8 * 48 + 5 * 32)
    assert (recorded[-1].teacher_bytes_read > 0) == reads_heads
    # The runs are one: what has begun with teachers may be resumed with their targets.
    assert api.load(recipe).hash == api.load(recipe, set=BOTH).hash


def test_teachers_with_another_tokenizer_are_recorded_in_their_own_tokens(
    here: Path, no_bodies: Callable[[], None]
) -> None:
    teacher = {"card": "other.yaml", "dtype": "float64", "bridge": "pieces"}
    phase = {"name": "merge", "updates": 2, "prompts_per_round": 3, "loss": "forward_kl", "text": "dataset"}
    merges = [("b", "c"), ("c", "a"), ("a", "b")]
    recipe = write_byte_job(
        here, {"teachers": {"other": teacher}, "phases": [phase]}, merges=merges, turned=True
    )
    rows = [{"prompt": p, "response": r} for p, r in (("ab", "cab"), ("cab", "abcab x"), ("x y", "bcb"))]
    Path("p.jsonl").write_text("\n".join(map(json.dumps, rows)))
    live = updates(recipe, "output=live")
    api.record_targets(recipe, set=["teachers.other.targets=t"])
    no_bodies()
    recorded = updates(recipe, "teachers.other.targets=t")
    assert [one.loss for one in recorded] == pytest.approx([one.loss for one in live], abs=1e-12)


def test_a_stopped_recording_resumes_and_its_rows_are_the_models(
    write_job: Write, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = write_job({"phases": [{**PHASE, "text": "dataset", "loss": "reverse_kl"}]})
    monkeypatch.setattr(targets_module, "SHARD_TOKENS", 3)  # the tokens of one response
    scored: list[TeacherSequence] = []
    most = 2
    score = local.LocalSession.score

    def stopped(self: Any, sequences: Sequence[TeacherSequence], *rest: Any) -> Iterator[Any]:
        if len(scored) == most:
            raise KeyboardInterrupt
        scored.extend(sequences)
        return score(self, sequences, *rest)

    monkeypatch.setattr(local.LocalSession, "score", stopped)
    with pytest.raises(KeyboardInterrupt):
        api.record_targets(recipe, set=BOTH, teachers=["two"])
    assert len(list(Path("t/two").glob("*.safetensors"))) == 2
    with pytest.raises(RecipeError, match=r"t/two is not complete \(no manifest.json\)"):
        api.check(recipe, set=BOTH[1:])
    scored, most = [], 4
    manifest = api.record_targets(recipe, set=BOTH, teachers=["two"])["two"]
    assert len(scored) == 2
    assert (manifest.num_sequences, manifest.num_tokens) == (4, 12)
    model = AutoModelForCausalLM.from_pretrained("two").eval()
    rows = recorded_rows(Path("t/two"))
    assert len(rows) == 4
    for sequence in scored:
        ids = torch.tensor([[*sequence.prompt_ids.tolist(), *sequence.response_ids.tolist()]])
        with torch.no_grad():
            hidden = model.base_model(ids).last_hidden_state[0]
        start = len(sequence.prompt_ids) - 1
        torch.testing.assert_close(rows[key_by_document(sequence)], hidden[start:-1], atol=1e-6, rtol=1e-5)
    api.check(recipe, set=BOTH[1:])


def key_by_document(sequence: TeacherSequence) -> bytes:
    """The key as docs/design/teachers.md describes it."""
    prompt, response = sequence.prompt_ids.tolist(), sequence.response_ids.tolist()
    content = struct.pack(
        f"<{2 + len(prompt) + len(response)}i", len(prompt), len(response), *prompt, *response
    )
    flags = [1] * len(response) if sequence.trained is None else sequence.trained.tolist()
    return hashlib.sha256(content + bytes(flags)).digest()


def recorded_rows(folder: Path) -> dict[bytes, Tensor]:
    """All rows of a folder by key, read as its document says."""
    rows = {}
    for shard in json.loads((folder / "manifest.json").read_text())["shards"]:
        with safe_open(folder / shard["file"], framework="pt") as file:
            keys, offsets, all_rows = (file.get_tensor(name) for name in ("keys", "offsets", "rows"))
        for key, start, stop in zip(keys, offsets[:-1], offsets[1:], strict=True):
            rows[bytes(key.tolist())] = all_rows[start:stop]
    return rows


@pytest.mark.parametrize("trained", [None, [True, False, True]])
def test_keys_are_as_documented(trained: list[bool] | None) -> None:
    sequence = TeacherSequence([1, 2], [3, 4, 5], None if trained is None else np.array(trained))
    assert sequence_key(sequence) == key_by_document(sequence)


@pytest.fixture
def recorded(write_job: Write, here: Path) -> Path:
    """A recipe on the dataset's text, with recorded top 2 of teacher `two`."""
    recipe = write_job({"phases": [{**PHASE, "text": "dataset", "loss": top_k(2)}]})
    api.record_targets(recipe, set=BOTH[1:])
    return recipe


def append_row(file: str) -> None:
    row = {"prompt": "b b b", "response": "d d"}
    Path(file).write_text(Path(file).read_text() + "\n" + json.dumps(row))


def other_weights() -> None:
    content = bytearray(Path("two/model.safetensors").read_bytes())
    content[-1] ^= 1
    Path("two/model.safetensors").write_bytes(content)


def other_template() -> None:
    file = Path("two/tokenizer_config.json")
    file.write_text(file.read_text().replace("{{ messages[0].content }}", "a {{ messages[0].content }}"))


def shorter() -> None:
    [shard] = Path("t/two").glob("*.safetensors")
    shard.write_bytes(shard.read_bytes()[:-1])


LOSS = "phases.0.loss.support={top_k: 3, of: teacher, rest: tail}"


@pytest.mark.parametrize(
    ("change", "overrides", "message"),
    [
        (lambda: shutil.rmtree("t"), (), r"t/two has no targets yet \(no manifest.json\)"),
        (shorter, (), r"targets-00000.safetensors has \d+ bytes instead of \d+; delete it"),
        (lambda: Path("t/two/manifest.json").write_text("{"), (), "not a manifest of targets"),
        (other_weights, (), "t/two has the targets of another teacher: other weights"),
        (other_template, (), "another chat template, `prompt`, `system`, or date"),
        (lambda: None, ("teachers.two.dtype=bfloat16",), "dtype bfloat16 instead of float32"),
        (lambda: None, (LOSS,), r"t/two has the top 2 tokens at temperature 1, and a phase needs the top 3"),
        (lambda: None, ("phases.0.loss=forward_kl",), "needs hidden states"),
        (lambda: None, ("phases.0.text=student",), "phase 'merge' has text of the student"),
        (lambda: None, ("phases.0.loss=nll",), "no phase learns from teacher 'two'"),
    ],
)
def test_a_folder_that_does_not_fit_is_refused_by_name(
    recorded: Path, change: Callable[[], None], overrides: Sequence[str], message: str
) -> None:
    change()
    with pytest.raises(RecipeError, match=message) as caught:
        api.check(recorded, set=[*BOTH[1:], *overrides])
    [problem] = caught.value.problems
    assert problem.path == "teachers.two.targets"
    assert problem.remedy or ";" in problem.message


def test_the_top_k_of_fewer_tokens_is_cut_from_more(recorded: Path, no_bodies: Callable[[], None]) -> None:
    fewer = "phases.0.loss.support={top_k: 1, of: teacher, rest: tail}"
    live = updates(recorded, fewer, "output=live")
    cut = updates(recorded, fewer, *BOTH[1:])
    assert cut[0].loss == pytest.approx(live[0].loss, abs=1e-6)
    assert cut[-1].loss == pytest.approx(live[-1].loss, abs=1e-4)  # rounding grows with the updates
    # A recipe that needs less is served: nothing is written.
    no_bodies()
    assert api.record_targets(recorded, set=[*BOTH[1:], fewer])["two"].origin.k == 2


def test_new_text_is_missing_until_it_is_recorded_too(recorded: Path) -> None:
    append_row("right.jsonl")
    with pytest.raises(
        TeacherError, match=r"t/two lacks the targets of teacher 'two' for 1 of 4 .*'right:2'"
    ):
        api.run(recorded, set=[*BOTH[1:], "phases.0.updates=10"])
    manifest = api.record_targets(recorded, set=[*BOTH[1:], "phases.0.updates=10"])["two"]
    assert [shard.sequences for shard in manifest.shards] == [4, 1]


def test_a_damaged_shard_is_refused_before_training(recorded: Path) -> None:
    [shard] = Path("t/two").glob("*.safetensors")
    content = bytearray(shard.read_bytes())
    content[-70] ^= 1
    shard.write_bytes(content)
    api.check(recorded, set=BOTH[1:])  # reads no rows
    with pytest.raises(StorageError, match=r"targets-00000.safetensors is damaged: its SHA-256 .* delete it"):
        api.run(recorded, set=BOTH[1:])
    shard.unlink()
    again = api.record_targets(recorded, set=BOTH[1:])["two"]
    content[-70] ^= 1
    assert (Path("t/two") / again.shards[0].file).read_bytes() == content


@pytest.mark.parametrize(
    ("overrides", "teachers", "message"),
    [
        (("teachers.two.dtype=bfloat16",), (), "does not have the targets that teacher 'two' has now: dtype"),
        (
            ("phases.0.loss=forward_kl",),
            (),
            "another kind of targets; delete the folder, or name another one",
        ),
        ((), ("three",), "--teacher three: teachers with `targets` are two; name one of them"),
    ],
)
def test_what_cannot_be_recorded(
    recorded: Path, overrides: Sequence[str], teachers: Sequence[str], message: str
) -> None:
    with pytest.raises(MergeopdError, match=re.escape(message)):
        api.record_targets(recorded, set=[*BOTH[1:], *overrides], teachers=teachers)


def test_a_full_disk_is_told_before_a_teacher_is_loaded(
    write_job: Write, here: Path, monkeypatch: pytest.MonkeyPatch, no_bodies: Callable[[], None]
) -> None:
    recipe = write_job({"phases": [{**PHASE, "text": "dataset", "loss": "reverse_kl"}]})
    monkeypatch.setattr(targets_module.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9, 9, 0))
    no_bodies()
    with pytest.raises(StorageError, match=r"t/one: 0.000 GiB of targets of teacher 'one' do not fit"):
        api.record_targets(recipe, set=BOTH)
    with pytest.raises(RecipeError, match="no teacher has a folder for its targets"):
        api.record_targets(recipe)


def test_text_that_is_kept_no_longer_is_not_generated_by_a_recorded_teacher(
    write_job: Write, here: Path
) -> None:
    recipe = write_job(
        {"phases": [{**PHASE, "text": "teacher", "loss": "reverse_kl"}], "text_cache": "texts"}
    )
    api.record_targets(recipe, set=BOTH)
    shutil.rmtree("texts")
    with pytest.raises(TeacherError, match=r"is not loaded, .* `text_cache` lacks some of its responses"):
        api.run(recipe, set=BOTH)


def test_targets_of_another_day_are_refused_where_the_template_shows_it(
    write_job: Write, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = write_job({"phases": [{**PHASE, "text": "dataset", "loss": top_k(2)}]})
    file = Path("two/tokenizer_config.json")
    shown = "{% if strftime_now('%Y') == '2031' %}a {% endif %}"
    file.write_text(file.read_text().replace("{{ messages", shown + "{{ messages"))
    api.record_targets(recipe, set=BOTH[1:])
    api.check(recipe, set=BOTH[1:])
    later = SimpleNamespace(now=lambda: datetime(2031, 1, 1))
    monkeypatch.setattr("mergeopd.preflight.inputs.datetime", later)
    with pytest.raises(RecipeError, match="or date that the template shows"):
        api.check(recipe, set=BOTH[1:])


def test_weights_that_follow_the_student_have_no_fixed_targets(write_job: Write, here: Path) -> None:
    recipe = write_job({"phases": [{**PHASE, "text": "dataset", "loss": "reverse_kl"}]})
    with pytest.raises(RecipeError, match="weights that follow the student have no fixed `targets`"):
        api.load(recipe, set=["teachers.two={student: {every: 2}, targets: t}"])


def test_a_control_has_its_teachers(recorded: Path) -> None:
    plan = preflight(recorded, BOTH[1:], control="sft").plan
    assert plan.teachers["two"].targets is None
