"""One small job, its undisturbed run, and a server that runs it with faults in forked processes."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

TOOLS = Path(__file__).parents[3] / "tools"
JOB = {
    "phases": [
        {
            "name": "warm",
            "text": "teacher",
            "updates": 2,
            "loss": {"forward_kl": 1.0, "nll": 0.1},
            "prompts_per_round": 6,
        },
        {
            "name": "mix",
            "text": {"on_policy_fraction": 0.5, "otherwise": "dataset"},
            "updates": 2,
            "updates_per_round": 2,
            "prompts_per_round": 6,
            "loss": "reverse_kl",
            "balance": {"tokens": "equal"},
        },
        {"name": "merge", "updates": 2, "loss": "reverse_kl", "prompts_per_round": 5},
    ],
    "checkpoint": {"every": 2, "keep": 2},
    "rollout": {"max_new_tokens": 6, "samples_per_prompt": 2, "batch_size": 2},
    "optimizer": {"lr": 0.01, "warmup_updates": 2, "schedule": "cosine"},
    "evaluation": {
        "prompts": [{"source": "held_out.jsonl", "domain": "right", "verifier": "exact"}],
        "max_new_tokens": 2,
    },
}
LIMIT_S = 120.0


class Runs:
    """Run the job. Every call is a new process, forked from one that has already run it."""

    def __init__(self, recipe: Path, server: subprocess.Popen[str]) -> None:
        self.recipe = recipe
        self._server = server

    def command(self, output: str, *arguments: str) -> list[str]:
        """Arguments of `mergeopd` for a run folder; the teacher rollouts are cached beside it."""
        folder = self.recipe.parent / output
        own = ["--set", f"output={folder}", "--set", f"text_cache={folder}-texts"]
        return ["run", str(self.recipe), *own, *arguments]

    def __call__(self, output: str, *arguments: str, fault: str | None = None) -> tuple[int, str]:
        """Run; the exit code (negative: a signal) and the output."""
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        order = {"argv": self.command(output, *arguments), "fault": fault}
        self._server.stdin.write(json.dumps(order) + "\n")
        self._server.stdin.flush()
        alarm = threading.Timer(LIMIT_S, self._server.kill)
        alarm.start()
        try:
            line = self._server.stdout.readline()
        finally:
            alarm.cancel()
        answer = json.loads(line)
        assert "Traceback" not in answer["output"], answer["output"]
        return answer["code"], answer["output"]

    def folder(self, output: str) -> Path:
        """Folder of a run."""
        return self.recipe.parent / output


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory, write_job_in: Callable[..., Path]) -> Iterator[Runs]:
    """Runs of one job in one folder; each needs its own `output`."""
    folder = tmp_path_factory.mktemp("durable")
    rows = [{"prompt": text, "answer": "c"} for text in ("a", "d", "c d")]
    (folder / "held_out.jsonl").write_text("\n".join(map(json.dumps, rows)))
    recipe = write_job_in(folder, JOB)
    server = subprocess.Popen(
        [sys.executable, str(TOOLS / "fault.py"), "--serve", "run", str(recipe), "--set", "output=warm-up"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "300"},
    )
    yield Runs(recipe, server)
    assert server.stdin is not None
    server.stdin.close()
    server.wait(LIMIT_S)


@pytest.fixture(scope="session")
def outcome() -> Callable[[Path], dict[str, str]]:
    """Function that reads from a finished run all that must not depend on interruptions."""
    return runpy.run_path(str(TOOLS / "soak.py"))["outcome"]


@pytest.fixture(scope="session")
def undisturbed(runs: Runs, outcome: Callable[[Path], dict[str, str]]) -> dict[str, str]:
    """Outcome of a run without faults."""
    code, output = runs("undisturbed")
    assert code == 0, output
    return outcome(runs.folder("undisturbed"))


@pytest.fixture
def ends_well(
    runs: Runs, outcome: Callable[[Path], dict[str, str]], undisturbed: dict[str, str]
) -> Callable[..., str]:
    """Resume a run to its end, compare its outcome with that of the undisturbed run, return the output."""

    def resume(output: str, *arguments: str) -> str:
        code, printed = runs(output, *arguments)
        assert code == 0, printed
        result = outcome(runs.folder(output))
        assert result.keys() == undisturbed.keys()
        assert [key for key in result if result[key] != undisturbed[key]] == []
        assert len(list((runs.folder(output) / "checkpoints").glob("step-*[0-9]"))) == 2
        return printed

    return resume
