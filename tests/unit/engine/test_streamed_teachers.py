"""A run with streamed teachers is the run with resident ones."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mergeopd.distributed.communicator import SingleProcess
from mergeopd.engine.build import build
from mergeopd.engine.clock import Clock
from mergeopd.engine.interrupt import Interrupt
from mergeopd.engine.models import Machine, Models, load_models
from mergeopd.engine.progress import Progress
from mergeopd.models.residency import Held
from mergeopd.preflight.inputs import preflight
from mergeopd.reporting.events import Reporters
from mergeopd.teacher.local import LocalTeacher
from mergeopd.teacher.streaming.session import StreamedSession

CPU = torch.device("cpu")


def trained(recipe: Path, output: str, **held: Held) -> tuple[Models, Mapping[str, Tensor]]:
    """Run a recipe; return its models, and the student's weights at the end."""
    models = load_models(preflight(recipe, [f"output={output}"]), Machine(CPU, SingleProcess()))
    for name, decision in held.items():
        teacher = models.teachers[name]
        assert isinstance(teacher, LocalTeacher)
        teacher.held = decision
    build(models, reporter=Reporters(), clock=Clock(), interrupt=Interrupt()).run(Progress(), None)
    return models, {name: tensor.clone() for name, tensor in models.student.weights()}


@pytest.mark.parametrize("loss", ["reverse_kl", "sampled_reverse_kl"])
def test_the_student_is_the_same(write_job: Callable[..., Path], tmp_path: Path, loss: str) -> None:
    phases = [{"name": "merge", "updates": 2, "loss": loss, "prompts_per_round": 4}]
    recipe = write_job({"phases": phases})
    _, expected = trained(recipe, "resident")
    for name in ("one", "two"):
        card = {"card": 1, "name": name, "model": name, "residency": "stream"}
        (tmp_path / f"{name}.yaml").write_text(json.dumps(card))
    models, found = trained(recipe, "streamed")
    assert [note.split(":")[0] for note in models.notes] == [
        f"teacher '{name}' is streamed layer by layer" for name in ("one", "two")
    ]
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_teacher_that_streams_by_itself_is_loaded_to_generate(write_job: Callable[..., Path]) -> None:
    """`residency: auto`: its text needs the whole body, its scores do not."""
    phases = [
        {"name": "merge", "updates": 1, "text": "teacher", "loss": "forward_kl", "prompts_per_round": 4}
    ]
    recipe = write_job({"phases": phases, "text_cache": "none"})
    _, expected = trained(recipe, "resident")
    recipe = write_job({"phases": phases, "text_cache": "other"})
    models, found = trained(recipe, "streamed", two=Held(64, 0, "of the test"))
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    with models.teachers["two"].open() as session:
        assert isinstance(session, StreamedSession)
        session.generator()
        assert not any(parameter.is_meta for parameter in session.body.parameters())
    assert all(parameter.is_meta for parameter in session.body.parameters())
