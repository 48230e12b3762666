"""Teachers that a recipe quantises: converted once, compared with their own weights, verified when loaded."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from mergeopd.data.canary import sample_ids
from mergeopd.distributed.communicator import SingleProcess
from mergeopd.engine.build import build
from mergeopd.engine.clock import Clock
from mergeopd.engine.interrupt import Interrupt
from mergeopd.engine.models import Machine, Models, load_models
from mergeopd.engine.progress import Progress
from mergeopd.errors import MergeopdError, TeacherError
from mergeopd.models.checkpoint import Checkpoint
from mergeopd.models.quantize import write_quantized
from mergeopd.preflight.inputs import preflight
from mergeopd.reporting.events import Reporters, RunStarted, UpdateDone
from mergeopd.teacher.local import TeacherSource, TeacherStore
from mergeopd.teacher.protocol import TargetSpec, TeacherSequence
from mergeopd.teacher.quantized import quantizations
from mergeopd.teacher.weight_reader import ShardedReader

pytest.importorskip("compressed_tensors")
pytest.importorskip("torchao")
from mixtures import write_mixture
from quantised import logits_of, write_folder

CPU = torch.device("cpu")
PROMPT, RESPONSE = "a b c", "d d c a b b a d c"
BY_FORMAT = {"int8": "Int8Tensor", "float8": "Float8Tensor"}


@pytest.fixture
def recipe(write_job: Callable[..., Path]) -> Path:
    """Teacher `two` has a card with a canary, from transformers' own log-probabilities."""
    path = write_job()
    ids = sample_ids(preflight(path).teachers["two"], PROMPT, RESPONSE)
    known = reference(path.parent / "two", ids)
    values = known.gather(1, torch.tensor(ids[1])[:, None]).squeeze(1).tolist()
    canary = {"prompt": PROMPT, "response": RESPONSE, "logprobs": values}
    (path.parent / "two.yaml").write_text(
        json.dumps({"card": 1, "name": "two", "model": "two", "canary": canary})
    )
    return path


def reference(folder: Path, ids: tuple[tuple[int, ...], tuple[int, ...]]) -> torch.Tensor:
    """Log-probabilities `[tokens, V]` at the response's tokens, as transformers computes them."""
    from transformers import CompressedTensorsConfig

    is_quantised = json.loads((folder / "config.json").read_text()).get("quantization_config")
    settings = {"quantization_config": CompressedTensorsConfig(dequantize=True)} if is_quantised else {}
    logits = logits_of(folder, [*ids[0], *ids[1]], **settings)
    return logits[len(ids[0]) - 1 : -1].double().log_softmax(-1)


def load(recipe: Path, *overrides: str) -> Models:
    return load_models(preflight(recipe, overrides), Machine(CPU, SingleProcess()))


def copies(recipe: Path) -> list[Path]:
    return [path for path in (recipe.parent / ".mergeopd/texts/quantized").iterdir() if path.is_dir()]


@pytest.mark.parametrize("form", BY_FORMAT)
def test_a_quantised_teacher_is_the_model_that_transformers_loads_from_its_copy(
    recipe: Path, form: str
) -> None:
    models = load(recipe, f"teachers.two.quantize={form}")
    teacher, [copy] = models.teachers["two"], copies(recipe)
    ids = sample_ids(models.inputs.teachers["two"], PROMPT, RESPONSE)
    with teacher.open() as session:
        assert BY_FORMAT[form] in {type(p.data).__name__ for p in session.body.parameters()}
        [(_, hidden)] = session.score([TeacherSequence(*ids)], TargetSpec("hidden"), 100)
    own = (hidden @ teacher.head(None).weight.T).double().log_softmax(-1)
    plain, expected = reference(recipe.parent / "two", ids), reference(copy, ids)
    assert (own - expected).abs().max() < 1e-4
    measured = quantizations(models.teachers)["two"]
    labels = torch.tensor(ids[1])[:, None]
    gap = (plain.gather(1, labels) - expected.gather(1, labels)).abs().mean()
    assert measured.forward_kl == pytest.approx(
        (plain.exp() * (plain - expected)).sum(1).mean().item(), rel=1e-2
    )
    assert measured.logprob_gap == pytest.approx(gap.item(), rel=1e-2)
    assert 1e-6 < measured.forward_kl < 0.1
    # Embedding, norms, biases and head stay as they are; the rest has a byte per weight, and a scale per row.
    before, after = (load_file(folder / "model.safetensors") for folder in (recipe.parent / "two", copy))
    linear = {name for name in before if name.endswith("_proj.weight")}
    assert all(torch.equal(before[name], after[name]) for name in before.keys() - linear)
    assert {name: (after[name].dtype.itemsize, after[name].shape) for name in linear} == {
        name: (1, before[name].shape) for name in linear
    }
    assert after.keys() == before.keys() | {f"{name}_scale" for name in linear}


def test_the_copy_and_its_figures_are_kept(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    override = "teachers.two.quantize=int8"
    notes = preflight(recipe, [override]).notes
    assert any("'two' is converted to int8 when the run starts" in note for note in notes)
    first = quantizations(load(recipe, override).teachers)["two"]
    monkeypatch.setattr("mergeopd.teacher.quantized.write_quantized", None)
    monkeypatch.setattr("mergeopd.teacher.quantized.compare", None)
    assert quantizations(load(recipe, override).teachers)["two"] == first
    [note] = [note for note in preflight(recipe, [override]).notes if "int8" in note]
    assert note == f"teacher 'two' is read in int8, {first.text}"
    assert "tokens of its canary" in note
    with pytest.raises(TypeError):  # another precision has other figures
        load(recipe, override, "teachers.two.dtype=bfloat16")


def test_a_wrong_model_is_detected_before_and_after_it_is_quantised(recipe: Path) -> None:
    override = "teachers.two.quantize=float8"

    def damage(folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        for name in weights:
            if name.endswith("layers.1.mlp.down_proj.weight"):
                weights[name] = weights[name].roll(1, 0)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    models = load(recipe, override)
    damage(copies(recipe)[0])
    with (
        pytest.raises(TeacherError, match=r"its quantised copy in .* is damaged: the log-prob"),
        models.teachers["two"].open(),
    ):
        pass
    damage(recipe.parent / "two")
    with pytest.raises(TeacherError, match="'two' is not the model its card describes"):
        load(recipe, override)


def test_a_truncated_copy_is_named(recipe: Path) -> None:
    load(recipe, "teachers.two.quantize=int8")
    [copy] = copies(recipe)
    (copy / "model.safetensors").write_bytes((copy / "model.safetensors").read_bytes()[:-7])
    with pytest.raises(MergeopdError, match="the quantised copy is damaged; delete the folder"):
        load(recipe, "teachers.two.quantize=int8")


def test_another_model_is_refused(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mergeopd.teacher.quantized.LARGEST_KL", 1e-7)
    for _ in range(2):  # measured, then read
        with pytest.raises(TeacherError, match=r"'two' is another model in int8.*or try float8"):
            load(recipe, "teachers.two.quantize=int8")


class Heard:
    def __init__(self) -> None:
        self.events: list[object] = []

    def emit(self, event: object) -> None:
        self.events.append(event)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_a_run_trains_and_says_how_far_its_teachers_are_from_themselves(recipe: Path, dtype: str) -> None:
    overrides = [f"teachers.two.dtype={dtype}", "teachers.one.quantize=float8", "teachers.two.quantize=int8"]
    models, heard = load(recipe, *overrides), Heard()
    build(models, reporter=Reporters(heard), clock=Clock(), interrupt=Interrupt()).run(Progress(), None)
    [started] = [event for event in heard.events if isinstance(event, RunStarted)]
    assert started.facts is not None
    assert "sample text" in started.facts.quantized["one"]
    assert "int8" in started.facts.quantized["two"]
    updates = [event for event in heard.events if isinstance(event, UpdateDone)]
    assert len(updates) == 2
    assert all(np.isfinite(update.loss) for update in updates)


def test_a_self_teacher_can_be_quantised(recipe: Path) -> None:
    self_teacher = 'teachers.two={"student": "start", "quantize": "int8", "system": "b"}'
    models = load(recipe, self_teacher, 'prompts.1.teachers={"two": 1}')
    with models.teachers["two"].open() as session:
        assert "Int8Tensor" in {type(p.data).__name__ for p in session.body.parameters()}


@pytest.mark.parametrize(
    ("model_type", "form"),
    [
        *product(("cohere", "gemma2", "phi", "starcoder2"), BY_FORMAT),
        ("mixtral", "int8"),
        ("qwen3_moe", "float8"),
    ],
)
def test_architectures(
    make_model: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    model_type: str,
    form: str,
) -> None:
    """Each is the plain model with the products of the copy's numbers and scales as weights."""
    ids, copy, decoded = ((1, 2, 3), (4, 5, 6, 7, 8)), tmp_path / "copy", tmp_path / "decoded"
    if model_type in ("mixtral", "qwen3_moe"):
        source = write_mixture(tmp_path / "model", model_type)
    else:
        source = make_model(model_type, model_type=model_type)
    copy.mkdir()
    monkeypatch.setattr("mergeopd.models.quantize._MAX_FILE_BYTES", 1000)  # data and scales in several files
    write_quantized(source, copy, form, CPU, lambda done, total: None)  # type: ignore[arg-type]
    tensors = dict(Checkpoint.open(copy).read_all(Checkpoint.open(copy).tensors))
    scales = {
        name.removesuffix("_scale"): tensors.pop(name) for name in [*tensors] if name.endswith("_scale")
    }
    assert scales.keys() == {
        name
        for name, weight in load_file(source / "model.safetensors").items()
        if ".layers." in name and weight.ndim == 2 and not re.search(r"norm|\.gate\.", name)
    }
    products = {name: tensors[name].float() * scale for name, scale in scales.items()}
    write_folder(source, decoded, tensors | products, None)
    found = []
    for way in ("mapped", "sharded", "streamed"):
        reader = ShardedReader(SingleProcess()) if way == "sharded" else None
        store = TeacherStore({"t": TeacherSource(copy, "float32", 37)}, CPU, reader)
        streamed = partial(store.stream, "t", 100, lambda: None, AssertionError)
        with streamed() if way == "streamed" else store.open("t") as session:
            [(_, hidden)] = session.hidden([TeacherSequence(*ids)], 100)
        head = store.head("t")
        logits = head.scale * (hidden @ head.weight.T + (0 if head.bias is None else head.bias))
        logits = logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)
        found.append(logits.double().log_softmax(-1))
    assert all(torch.equal(other, found[0]) for other in found[1:])
    # In another precision than the files', layers that are read ahead reuse the memory of earlier ones.
    store, narrow = TeacherStore({"t": TeacherSource(copy, "bfloat16", 37)}, CPU), []
    for opened in (store.open("t"), store.stream("t", 100, lambda: None, AssertionError)):
        with opened as session:
            narrow += [rows for _, rows in session.hidden([TeacherSequence(*ids)], 100)]
    assert torch.equal(*narrow)
    assert (found[0] - reference(decoded, ids)).abs().max() < 1e-3
