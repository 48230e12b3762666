"""The launch examples: sound shell, and the command lines they come to."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

LAUNCH = Path(__file__).parents[3] / "tools" / "launch"
RECIPE = ["recipes/two words.yaml", "--set", "seed=1"]


@pytest.mark.parametrize("name", ["torchrun.sh", "slurm.sbatch"])
def test_the_shell_reads_it(name: str) -> None:
    done = subprocess.run(["bash", "-n", LAUNCH / name], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def commanded(
    folder: Path, script: str, program: str, env: dict[str, str]
) -> tuple[list[str], dict[str, str]]:
    """What a script runs `program` with: its arguments and environment."""
    fakes = {
        program: "printf '%s\\0' \"$@\" > arguments; env -0 > environment",
        "scontrol": "printf 'node7\\nnode8\\n'",
        "nvidia-smi": "exit 1",
        "nproc": "echo 12",
    }
    for name, text in fakes.items():
        file = folder / name
        file.write_text(f"#!/bin/sh\n{text}\n")
        file.chmod(0o755)
    bare = {"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}
    subprocess.run(["bash", LAUNCH / script, *RECIPE], cwd=folder, env={**bare, **env}, check=True)
    arguments = (folder / "arguments").read_text().split("\0")[:-1]
    pairs = (folder / "environment").read_text().split("\0")[:-1]
    return arguments, dict(pair.split("=", 1) for pair in pairs)


def test_torchrun(tmp_path: Path) -> None:
    arguments, env = commanded(
        tmp_path, "torchrun.sh", "torchrun", {"NODES": "2", "HEAD": "node0", "NPROC": "4"}
    )
    options = arguments[: -len(RECIPE) - 3]
    assert dict(zip(options[::2], options[1::2], strict=True)) == {
        "--nnodes": "2",
        "--nproc-per-node": "4",
        "--rdzv-backend": "c10d",
        "--rdzv-endpoint": "node0:29500",
        "--rdzv-id": "mergeopd",
    }
    assert arguments[-len(RECIPE) - 3 :] == ["-m", "mergeopd", "run", *RECIPE]
    assert env["OMP_NUM_THREADS"] == "3"


def test_slurm(tmp_path: Path) -> None:
    job = {"SLURM_JOB_NODELIST": "node[7-8]", "SLURM_JOB_ID": "1234567", "SLURM_CPUS_PER_TASK": "8"}
    arguments, env = commanded(tmp_path, "slurm.sbatch", "srun", job)
    assert arguments[2:] == ["python", "-m", "mergeopd", "run", *RECIPE]
    assert (env["MASTER_ADDR"], env["MASTER_PORT"], env["OMP_NUM_THREADS"]) == ("node7", "24567", "8")


def test_torchrun_knows_the_options(tmp_path: Path) -> None:
    from torch.distributed.run import get_args_parser

    arguments, _ = commanded(tmp_path, "torchrun.sh", "torchrun", {"NODES": "2", "HEAD": "node0"})
    parsed = get_args_parser().parse_args(arguments)
    assert (parsed.module, parsed.training_script, parsed.nproc_per_node) == (True, "mergeopd", "1")
    assert parsed.training_script_args == ["run", *RECIPE]
