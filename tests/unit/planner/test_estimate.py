"""Estimates of runs without weights and data, and their errors."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import mergeopd
from mergeopd.config.folders import Lookup
from mergeopd.errors import RecipeError
from mergeopd.planner.estimate import read_setup
from mergeopd.planner.profile import DEVICES, read_hardware
from mergeopd.planner.shapes import ModelShape
from mergeopd.recipe.resolve import read
from mergeopd.reporting.estimate import Estimate
from mergeopd.reporting.terminal.estimate import show_estimate

GIB = 2**30
SERVED = {"engine": "vllm", "url": "http://127.0.0.1:1", "hidden_states": False}


def parts(result: Estimate, stage: str) -> dict[str, float]:
    [own] = [memory for memory in result.memory if memory.stage == stage]
    return {part.name: part.num_bytes for part in own.parts}


def test_memory_in_closed_form(write_recipe: Callable[..., Path]) -> None:
    """Weights, gradients and AdamW of an 8.19 billion parameter model over 4 x 2 processes, 2 copies."""
    result = mergeopd.plan(write_recipe(), hardware="h100x16")
    layer = 4096 * (2 * 4096 + 2 * 1024) + 3 * 4096 * 12288
    norms = 2 * 4096 + 2 * 128
    embedding = 151936 * 4096
    # The first stage has the embedding, the last the head and the last norm.
    rank = (18 * layer + embedding) / 4 + 18 * norms
    own = parts(result, "update")
    assert own["weights"] == pytest.approx(2 * rank, rel=1e-4)
    assert own["gradients"] == pytest.approx(4 * rank, rel=1e-4)
    assert own["optimizer: moments"] == pytest.approx(8 * rank / 2, rel=1e-4)
    assert own["optimizer: main weights"] == pytest.approx(4 * rank / 2, rel=1e-4)
    assert parts(result, "rollout")["replica that generates"] == pytest.approx(2 * 8.19e9, rel=1e-3)
    assert own["copy of a checkpoint"] == pytest.approx(12 * rank / 2, rel=1e-4)
    cache = 16 * (512 + 1024) * 36 * 2 * 8 * 128 * 2
    assert parts(result, "rollout")["KV cache"] == pytest.approx(cache * (1 + 1 / 36), rel=1e-6)


def test_context_ranks_share_tokens_and_moments(write_recipe: Callable[..., Path]) -> None:
    """With 16 devices as 2 copies, or as 1 copy of 2 context ranks: the same weights, half of the tokens."""
    path = write_recipe()
    copies = mergeopd.plan(path, hardware="h100x16")
    context = {"student.parallel.context": 2}
    split = mergeopd.plan(path, set=context, hardware="h100x16")
    host = mergeopd.plan(path, set=context | {"optimizer.offload": True}, hardware="h100x16")
    assert split.grid.size == 16
    before, after, offloaded = (parts(one, "update") for one in (copies, split, host))
    for name in ("weights", "gradients", "optimizer: moments", "optimizer: main weights"):
        assert after[name] == pytest.approx(before[name], rel=1e-4)
    worked = "working set of a layer"
    assert after[worked] == pytest.approx(before[worked] / 2)
    assert offloaded["optimizer: moments on the host"] == pytest.approx(after["optimizer: moments"], rel=1e-4)
    assert split.peak_bytes - host.peak_bytes == pytest.approx(after["optimizer: moments"], rel=0.01)


def test_all_ranks_hold_the_model(write_recipe: Callable[..., Path]) -> None:
    """The shards of a grid add up to the model, with one copy of replicated norms for each rank."""
    path = write_recipe()
    resolution = read(path, lookup=Lookup(is_elsewhere=True))
    setup, _ = read_setup(resolution, read_hardware("h100x8"), None, None)
    norms = 36 * (2 * 4096 + 2 * 128) + 4096
    total = sum(4 * setup.stage_weights(stage) for stage in range(2))
    assert total == ModelShape.read(path.parent / "student").parameters + 3 * norms


def test_trillions_are_served(write_recipe: Callable[..., Path], tmp_path: Path) -> None:
    """A mixture that is not known does not run here; served, it is planned with its active parameters."""
    prompts = [{"source": "absent.jsonl", "domain": "mixture"}]
    teachers = {"mixture": {"card": "mixture.yaml", "dtype": "bfloat16"}}
    path = write_recipe(teachers=teachers, prompts=prompts)
    result = mergeopd.plan(path, hardware="h200x1024")
    assert result.num_machines == 128
    assert any("teacher 'mixture' does not run" in text for text in result.obstacles)
    [cost] = result.phases[0].teachers
    assert cost.parameters / 1e9 == pytest.approx(235, rel=0.01)
    assert cost.active / 1e9 == pytest.approx(22, rel=0.05)
    card = json.loads((tmp_path / "mixture.yaml").read_text())
    (tmp_path / "mixture.yaml").write_text(json.dumps(card | {"served": SERVED}))
    served = mergeopd.plan(write_top_k(path), hardware="h200x8", response_tokens=500)
    assert not [text for text in served.obstacles if "mixture" in text]
    assert served.phases[0].teachers[0].how == "served by vllm"


def write_top_k(path: Path) -> Path:
    recipe = json.loads(path.read_text())
    recipe["phases"][0]["loss"] = {"forward_kl": 1.0, "support": {"top_k": 16, "of": "teacher"}}
    path.write_text(json.dumps(recipe))
    return path


def test_fit_divides_and_fits(write_recipe: Callable[..., Path]) -> None:
    path = write_recipe(rollout={"max_new_tokens": 8192, "batch_size": 512})
    result = mergeopd.plan(path, hardware="h100x8", fit=True)
    assert not result.fits
    assert "what works on these devices" in result.obstacles[-1]
    assert result.fitted
    for one in result.fitted:
        assert one.grid.size == 8
        assert 36 % one.grid.pipeline == 0
        assert 8 % one.grid.tensor == 0
        again = mergeopd.plan(
            path,
            set={
                "student.parallel.tensor": one.grid.tensor,
                "student.parallel.pipeline": one.grid.pipeline,
                "student.parallel.recompute": one.recompute,
                "student.micro_batch_tokens": one.micro_batch_tokens,
                "rollout.batch_size": one.batch_size,
            },
            hardware="h100x8",
        )
        assert again.fits
        assert again.peak_bytes == pytest.approx(one.peak_bytes)
        assert again.seconds == pytest.approx(one.seconds)
    times = [one.seconds for one in result.fitted]
    assert times[0] <= 1.05 * min(times)


def test_changes_are_planned_again(write_recipe: Callable[..., Path]) -> None:
    path = write_recipe()
    result = mergeopd.plan(path, hardware="h100x8")
    assert result.changes
    for change in result.changes:
        devices = change.settings.get("devices", 8)
        changed = {key: value for key, value in change.settings.items() if key != "devices"}
        again = mergeopd.plan(path, set=changed, hardware=f"h100x{devices}")
        assert again.seconds == pytest.approx(change.seconds)
        assert change.seconds < 0.96 * result.seconds


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"hardware": "h1000x8"}, ["--hardware", "'h1000x8': unknown hardware", "a100, b200, cpu, h100, h200"]),
        ({"hardware": "h100x12"}, ["tensor 4 x pipeline 2 = 8 does not divide the number of processes, 12", "use 8 or 16 processes"]),
        ({"hardware": "h100x3"}, ["use 8 processes", "--fit"]),
        ({"hardware": "cpu:16"}, ["cpu:16,64GiB"]),
        ({"hardware": "cpux4"}, ["a CPU has cores"]),
        ({"hardware": "h100x0"}, ["at least one device"]),
        ({"hardware": "absent.yaml"}, ["absent.yaml", "cannot be read"]),
        ({"hardware": "h100x8", "models": {"maths": "dense"}}, ["there is no config.json"]),
    ],
)  # fmt: skip
def test_errors(write_recipe: Callable[..., Path], options: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(RecipeError) as caught:
        mergeopd.plan(write_recipe(), **options)
    for word in words:
        assert word in str(caught.value)


def test_grid_that_does_not_divide_the_model(write_recipe: Callable[..., Path]) -> None:
    with pytest.raises(RecipeError, match="16 does not divide the model's 8 key-value heads"):
        mergeopd.plan(write_recipe(), set={"student.parallel.tensor": 16}, hardware="h100x32")


def test_missing_model_names_the_option(write_recipe: Callable[..., Path], tmp_path: Path) -> None:
    path = write_recipe()
    card = json.loads((tmp_path / "dense.yaml").read_text())
    (tmp_path / "dense.yaml").write_text(json.dumps(card | {"model": "Org/Expert"}))
    with pytest.raises(RecipeError, match=r"--model dense=FOLDER"):
        mergeopd.plan(path, hardware="h100x8")
    result = mergeopd.plan(path, hardware="h100x8", models={"dense": tmp_path / "dense" / "config.json"})
    assert result.phases[0].teachers[0].parameters == pytest.approx(8.19e9, rel=1e-3)


def test_torch_uses_one_device(write_recipe: Callable[..., Path]) -> None:
    path = write_recipe(student={"model": "student", "dtype": "bfloat16", "micro_batch_tokens": 4096})
    one, eight = (mergeopd.plan(path, hardware=f"h200x{n}") for n in (1, 8))
    assert eight.seconds == one.seconds
    assert eight.peak_bytes == one.peak_bytes
    assert any("over the other 7, too" in note for note in eight.notes)


def test_chunk_of_the_triton_kernels(write_recipe: Callable[..., Path]) -> None:
    """Logits of student and teacher in 384 MiB, by 64 rows, and gradients of such chunks in 576 MiB."""
    student = {"model": "student", "dtype": "bfloat16", "micro_batch_tokens": 4096}
    logits, gradients = 384 * 2**20, 576 * 2**20
    rows = logits // (2 * 4 * 151936) // 64 * 64
    chunks = gradients // (2 * 151936 * rows)
    own = parts(mergeopd.plan(write_recipe(student=student), hardware="h200x1"), "update")
    assert own["loss chunk"] == rows * 151936 * (8 + 2 * chunks)
    of_torch = parts(
        mergeopd.plan(write_recipe(student=student | {"kernel": "torch"}), hardware="h200x1"), "update"
    )
    assert of_torch["loss chunk"] > 2 * 2**30


def test_nothing_fits(write_recipe: Callable[..., Path]) -> None:
    result = mergeopd.plan(
        write_recipe(student={"model": "student"}), hardware="cpu:8,16GiB", response_tokens=100
    )
    assert "no grid of up to 1,024" in result.obstacles[-1]
    assert "may fill 14.4 GiB" in result.obstacles[-1]


def test_profiles_are_valid() -> None:
    assert set(DEVICES) == {"a100", "b200", "cpu", "h100", "h200"}
    for name in DEVICES:
        profile = read_hardware(name if name != "cpu" else "cpu:4,8GB").profile
        assert profile.name == name
        assert profile.sources
        assert profile.rate("bfloat16", 4096) > profile.rate("float64", 4096)
    assert read_hardware("h200x8").limit_bytes == pytest.approx(0.92 * 139.8 * GIB)
    assert read_hardware("cpu:4,8GB", 2).limit_bytes == pytest.approx(0.9 * 8e9 / 2)


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_terminal(write_recipe: Callable[..., Path], width: int, encoding: str, tmp_path: Path) -> None:
    result = mergeopd.plan(write_recipe(), hardware="h100x8", fit=True)
    with (tmp_path / "out.txt").open("w", encoding=encoding) as file:
        show_estimate(result, Console(file=file, width=width))
    text = (tmp_path / "out.txt").read_text(encoding=encoding)
    assert max(map(len, text.splitlines())) <= width
    for words in ("Memory of a rank", "Phase merge", "rollout", "dense", "8.19B", "Settings that fit"):
        assert words in text


def test_json(write_recipe: Callable[..., Path]) -> None:
    """The command prints a versioned document in a process that never imports torch or transformers."""
    code = (
        "import sys; from mergeopd.cli import main\n"
        "try: main()\n"
        "finally: print([m for m in ('torch', 'transformers') if m in sys.modules], file=sys.stderr)"
    )
    command = [sys.executable, "-c", code, "plan", str(write_recipe()), "--hardware", "h100x8", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    document = json.loads(done.stdout)
    assert done.stderr.splitlines()[-1] == "[]"
    assert document["estimate"] == 1
    assert document["fits"] is True
    assert document["peak_bytes"] == max(stage["total_bytes"] for stage in document["memory"])
    [phase] = document["phases"]
    assert phase["round_s"] == pytest.approx(sum(stage["seconds"] for stage in phase["stages"]))
    assert document["seconds"] == pytest.approx(phase["seconds"] + document["evaluation_s"])
