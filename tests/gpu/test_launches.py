"""The quickstart on a process group of all GPUs (NCCL; gloo on a CPU): Megatron, beside one process with torch."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from ranks import needs_megatron

SETTINGS = {
    "torch": (),
    "megatron": ("student.backend=megatron",),
    "megatron_bfloat16": ("student.backend=megatron", "student.dtype=bfloat16"),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=needs_megatron if "megatron" in name else ()) for name in SETTINGS]
)
def test_quickstart_on_a_group(
    device: torch.device,
    project: Path,
    command: Callable[..., float],
    shortened: Callable[..., list[str]],
    record: Callable[[str, object], None],
    name: str,
) -> None:
    """Losses of the first updates are those of one process, where the precision is the same."""
    num = torch.cuda.device_count() if device.type == "cuda" else 1
    output = f"runs/group_{name}"
    settings = (setting.format(num=num) for setting in SETTINGS[name])
    options = shortened(output, 4, 32, *settings)
    # `torch` is one process without a group, which the others are compared with.
    launch = () if name == "torch" else ("-m", "torch.distributed.run", "--nproc-per-node", str(num))
    taken = command(*launch, "-m", "mergeopd", "run", "recipes/quickstart.yaml", *options, cwd=project)
    losses = losses_of(project / output)
    assert len(losses) == 4
    layers = "transformer_engine" if find_spec("transformer_engine") else "local"
    figures = {"processes": num, "seconds": taken, "losses": losses}
    if "megatron" in name:
        figures["layers"] = layers
    record(f"group_{name}", figures)
    alone = project / "runs" / "group_torch"
    if name != "torch" and alone.is_dir():
        assert losses[0] == pytest.approx(losses_of(alone)[0], rel=0.05 if "bfloat16" in name else 1e-3)


def losses_of(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
