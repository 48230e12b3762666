"""Weights that follow the student: when they are copied, what is averaged, what a checkpoint brings back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from states import HeldTensors
from torch import Tensor
from transformers import AutoModelForCausalLM

from mergeopd.errors import StorageError
from mergeopd.recipe.models import SnapshotRule
from mergeopd.teacher.local import TeacherSource, TeacherStore
from mergeopd.teacher.protocol import TeacherSequence
from mergeopd.teacher.snapshots import StudentSnapshots

CPU = torch.device("cpu")
EVERY, EMA = SnapshotRule(every=20), SnapshotRule(ema=0.75)


def weights(value: float, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    return {
        "a.weight": torch.full((2, 3), value, dtype=dtype),
        "b.bias": torch.full((4,), -value, dtype=dtype),
    }


def named(value: float, dtype: torch.dtype = torch.float32) -> Callable[[], Iterator[tuple[str, Tensor]]]:
    """A student whose weights all have one value."""
    return lambda: iter(weights(value, dtype).items())


def held(past: StudentSnapshots, rule: SnapshotRule) -> float:
    tensors = past.snapshots[rule].tensors
    [value] = tensors["a.weight"].unique().tolist()
    assert tensors["b.bias"].tolist() == [-value] * 4
    return float(value)


def test_copies_are_made_at_the_first_round_at_or_after_a_multiple() -> None:
    past = StudentSnapshots([EVERY], named(0.0), named(0.0))
    seen = []
    for after in range(8, 73, 8):  # rounds of eight updates
        past.advance(named(after), named(after), after - 8, after)
        seen.append(held(past, EVERY))
    assert seen == [0, 0, 24, 24, 40, 40, 40, 64, 64]


def test_an_average_has_its_closed_form_and_moves_once_a_round() -> None:
    past = StudentSnapshots([EMA], named(2.0), named(2.0))
    for round_index, value in enumerate((3.0, 5.0, 4.0)):
        past.advance(named(value), named(value), 4 * round_index, 4 * round_index + 4)
    assert held(past, EMA) == pytest.approx(0.75**3 * 2 + 0.25 * (0.75**2 * 3 + 0.75 * 5 + 4), abs=1e-6)


def test_averages_keep_the_precision_of_the_masters_and_copies_that_of_the_student() -> None:
    """In bfloat16 steps of a thousandth at 1 would be lost."""
    slow = SnapshotRule(ema=0.5)
    past = StudentSnapshots([EVERY, slow], named(1.0, torch.bfloat16), named(1.0))
    past.advance(named(1.0, torch.bfloat16), named(1.001), 0, 20)
    assert held(past, slow) == pytest.approx(1.0005, abs=1e-7)
    assert past.snapshots[EVERY].tensors["a.weight"].dtype == torch.bfloat16


def test_teachers_with_one_rule_share_one_copy_and_it_is_a_copy() -> None:
    now = weights(1.0)
    past = StudentSnapshots(
        [EVERY, SnapshotRule(every=20), EMA], lambda: iter(now.items()), lambda: iter(now.items())
    )
    assert len(past.snapshots) == 2
    now["a.weight"].fill_(9.0)
    now["b.bias"].fill_(-9.0)
    assert held(past, EVERY) == held(past, EMA) == 1.0


def test_saved_state_is_restored() -> None:
    past = StudentSnapshots([EVERY, EMA], named(1.0), named(1.0))
    past.advance(named(3.0), named(3.0), 0, 20)
    state = {name: tensor.clone() for name, tensor in past.state().items()}
    fresh = StudentSnapshots([EMA, EVERY], named(1.0), named(1.0))
    before = {rule: f.version for rule, f in fresh.snapshots.items()}
    fresh.load_state(HeldTensors(state))
    assert held(fresh, EVERY) == 3.0
    assert held(fresh, EMA) == 1.5
    assert all(f.version != before[rule] for rule, f in fresh.snapshots.items())
    StudentSnapshots([], named(1.0), named(1.0)).load_state(HeldTensors({}))


@pytest.mark.parametrize("rules", [[], [EVERY], [EVERY, SnapshotRule(ema=0.5)]])
def test_the_state_of_other_rules_is_refused(rules: list[SnapshotRule]) -> None:
    state = StudentSnapshots([EVERY, EMA], named(1.0), named(1.0)).state()
    with pytest.raises(StorageError, match=r"ema-0\.75/a\.weight"):
        StudentSnapshots(rules, named(1.0), named(1.0)).load_state(HeldTensors(state))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "float64"])  # as it is held, and converted
def test_a_follower_teaches_with_its_own_weights_not_the_folders(
    make_model: Callable[..., Path], tied: bool, dtype: str
) -> None:
    """Hidden states times head are the logits of the model whose weights it holds, before and after a copy."""
    folder, later = make_model("start", seed=1, tied=tied), make_model("later", seed=2, tied=tied)
    models = [AutoModelForCausalLM.from_pretrained(f).eval() for f in (folder, later)]
    first, second = ({n: p.detach() for n, p in m.named_parameters()} for m in models)
    past = StudentSnapshots([SnapshotRule(every=1)], lambda: iter(first.items()), lambda: iter(first.items()))
    store = TeacherStore(
        {
            "moves": TeacherSource(folder, dtype, 37, past.snapshots[SnapshotRule(every=1)]),
            "stays": TeacherSource(folder, "float32", 37),
        },
        CPU,
    )
    ids, answer = [1, 2, 3], [4, 5, 6]

    def logits(name: str) -> Tensor:
        with store.open(name) as teacher:
            [(_, states)] = teacher.hidden([TeacherSequence(ids, answer)], 100)
        return (states @ store.head(name).weight.T).float()

    with torch.no_grad():
        expected = [m(torch.tensor([ids + answer])).logits[0, 2:-1] for m in models]
    assert torch.allclose(logits("moves"), expected[0], atol=2e-5)
    assert store.bytes_read("moves") == 0
    past.advance(lambda: iter(second.items()), lambda: iter(second.items()), 0, 1)
    assert torch.allclose(logits("moves"), expected[1], atol=2e-5)
    assert torch.allclose(logits("stays"), expected[0], atol=2e-5)
    assert store.fingerprint("moves") is None
    assert store.fingerprint("stays") is not None
