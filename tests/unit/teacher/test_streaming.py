"""Streamed teachers give the resident teacher's bits, read every byte once, and hold two layers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from mergeopd.models.facts import ARCHITECTURES
from mergeopd.models.residency import Held
from mergeopd.teacher.local import LocalTeacher, TeacherSource, TeacherStore
from mergeopd.teacher.protocol import LOCAL, TargetSpec, TeacherSequence

CPU = torch.device("cpu")
SEQUENCES = [
    TeacherSequence((1, 2, 3, 4), (10, 11), (True, False)),
    TeacherSequence((5, 6), (12, 13, 14, 15, 16, 30, 31, 32, 33)),
    TeacherSequence((7, 8, 9), (17,)),
    TeacherSequence((7, 8, 9, 20), (17, 18, 19)),
]
VOCAB = 48
HIDDEN = TargetSpec("hidden")
# Of models whose layers differ, both kinds occur; windows are shorter than the longest sequence.
SHORT_WINDOW = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"] * 2}
SLIDING = ("cohere2", "exaone4", "gemma2", "gemma3_text", "olmo3", "smollm3")


def save(folder: Path, model_type: str, dtype: torch.dtype = torch.float32) -> Path:
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        model_type,
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=80,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=64,
        pad_token_id=47,
        **(SHORT_WINDOW if model_type in SLIDING else {}),
    )
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    model.to(dtype).save_pretrained(folder)
    return folder


def teacher_of(store: TeacherStore, pass_tokens: int | None) -> LocalTeacher:
    def never(source: object) -> None:
        raise AssertionError("this teacher generates nothing")

    held = Held(pass_tokens, 0, "of the test")
    return LocalTeacher("t", store, LOCAL, None, lambda work: work(), never, held)  # type: ignore[arg-type]


def scored(
    teacher: LocalTeacher, spec: TargetSpec = HIDDEN, max_tokens: int = 16
) -> list[tuple[int, torch.Tensor]]:
    with teacher.open() as session:
        return list(session.score(SEQUENCES, spec, max_tokens))


def assert_equal(found: list[tuple[int, torch.Tensor]], expected: list[tuple[int, torch.Tensor]]) -> None:
    assert [index for index, _ in found] == [index for index, _ in expected]
    assert sorted(index for index, _ in found) == list(range(len(SEQUENCES)))
    for (_, own), (_, other) in zip(found, expected, strict=True):
        assert own.dtype == other.dtype
        assert torch.equal(own, other)


@pytest.mark.parametrize("model_type", sorted(ARCHITECTURES))
def test_every_architecture_scores_as_it_does_resident(tmp_path: Path, model_type: str) -> None:
    folder = save(tmp_path / "m", model_type)
    store = TeacherStore({"t": TeacherSource(folder, "float32", VOCAB)}, CPU)
    expected = scored(teacher_of(store, None))
    assert_equal(scored(teacher_of(store, 1000)), expected)
    assert_equal(scored(teacher_of(store, 20)), expected)
    # The skeleton is as before: resident passes work after streamed ones.
    assert_equal(scored(teacher_of(store, None)), expected)
