"""Teachers with other weights than their cards', or damaged ones, are refused before training."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mergeopd.data.canary import sample_ids
from mergeopd.distributed.communicator import SingleProcess
from mergeopd.engine.build import build
from mergeopd.engine.clock import Clock
from mergeopd.engine.interrupt import Interrupt
from mergeopd.engine.models import Machine, load_models
from mergeopd.engine.progress import Progress
from mergeopd.errors import MergeopdError, RecipeError, TeacherError
from mergeopd.models.checkpoint import Checkpoint
from mergeopd.preflight.inputs import preflight
from mergeopd.reporting.events import Reporters, UpdateDone
from mergeopd.teacher.canary import logprobs
from mergeopd.teacher.protocol import TargetSpec, TeacherSequence

CPU = torch.device("cpu")


class NoUpdates:
    def emit(self, event: object) -> None:
        assert not isinstance(event, UpdateDone), "a bad teacher has taught"


def run(recipe: Path, *overrides: str) -> None:
    inputs = preflight(recipe, overrides)
    models = load_models(inputs, Machine(CPU, SingleProcess()))
    build(models, reporter=Reporters(NoUpdates()), clock=Clock(), interrupt=Interrupt()).run(Progress(), None)


def damage(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def write_card(recipe: Path, *, fingerprint: bool) -> None:
    """The card of teacher `two` as it is now, with its canary."""
    inputs = preflight(recipe)
    parts = load_models(inputs, Machine(CPU, SingleProcess()))
    ids = sample_ids(inputs.teachers["two"], "a b c", "d d c a")
    with parts.teachers["two"].open() as session:
        [(_, hidden)] = session.score([TeacherSequence(*ids)], TargetSpec("hidden"), 100)
    found = logprobs(hidden, parts.teachers["two"].head(None), ids[1])
    card = {"card": 1, "name": "two", "model": "two"}
    card["canary"] = {"prompt": "a b c", "response": "d d c a", "logprobs": [round(p, 3) for p in found]}
    if fingerprint:
        card["fingerprint"] = Checkpoint.open(recipe.parent / "two").fingerprint
    (recipe.parent / "two.yaml").write_text(json.dumps(card))


@pytest.fixture
def recipe(write_job: Callable[..., Path]) -> Path:
    return write_job()


PHASES = {
    "student text": 'phases=[{"name": "p", "updates": 1, "loss": "reverse_kl"}]',
    "teacher text": 'phases=[{"name": "p", "updates": 1, "text": "teacher", "loss": "nll"}]',
}


@pytest.mark.parametrize("phase", PHASES)
def test_the_canary_detects_one_reinitialised_layer(recipe: Path, phase: str) -> None:
    write_card(recipe, fingerprint=False)

    def change(weights: dict[str, torch.Tensor]) -> None:
        torch.manual_seed(9)
        for name in weights:
            if ".layers.1." in name and weights[name].ndim == 2:
                weights[name] = torch.randn_like(weights[name]) * 0.3

    damage(recipe.parent / "two", change)
    with pytest.raises(TeacherError, match=r"'two' is not the model its card describes.*nats per token"):
        run(recipe, PHASES[phase])


def test_the_right_teacher_passes_its_canary_in_any_precision(recipe: Path) -> None:
    write_card(recipe, fingerprint=True)
    for dtype in ("float32", "bfloat16"):
        with pytest.raises(AssertionError, match="has taught"):
            run(recipe, f"teachers.two.dtype={dtype}")


def test_other_weights_under_a_cards_name_are_found_before_the_run(recipe: Path) -> None:
    write_card(recipe, fingerprint=True)
    base, two = (load_file(recipe.parent / n / "model.safetensors") for n in ("base", "two"))
    damage(recipe.parent / "two", lambda w: w.update({n: base[n] for n in two if "layers" in n}))
    with pytest.raises(RecipeError, match="are not those of the card"):
        preflight(recipe)


def test_uniform_output_is_stopped(recipe: Path) -> None:
    damage(recipe.parent / "two", lambda w: w["lm_head.weight"].zero_())
    with pytest.raises(TeacherError, match="'two' gives all 5 tokens the same probability"):
        run(recipe)


@pytest.mark.parametrize("temperature", [10.0, 100.0])
def test_a_high_temperature_makes_no_teacher_uniform(recipe: Path, temperature: float) -> None:
    """All entropies are near log V there; what a teacher lacks of it still tells."""
    phase = {"loss": {"reverse_kl": 1.0, "temperature": temperature}, "updates": 1, "prompts_per_round": 4}
    override = f"phases={json.dumps([{'name': 'hot', **phase}])}"
    with pytest.raises(AssertionError, match="has taught"):  # as these may
        run(recipe, override, "output=hot")
    damage(recipe.parent / "two", lambda w: w["lm_head.weight"].zero_())
    with pytest.raises(TeacherError, match="'two' gives all 5 tokens the same probability"):
        run(recipe, override, "output=damaged")


@pytest.mark.parametrize(
    "tensor", ["model.norm.weight", "lm_head.weight", "model.layers.0.mlp.up_proj.weight"]
)
def test_nan_is_stopped(recipe: Path, tensor: str) -> None:
    damage(recipe.parent / "two", lambda w: w[tensor].view(-1).__setitem__(3, float("nan")))
    with pytest.raises(MergeopdError, match="two"):
        run(recipe)
