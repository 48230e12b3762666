"""Measure what several teachers cost: rounds with N teachers, relative to rounds with one, at equal prompts.

    python tools/bench_rounds.py [--teachers 8] [--repeats 7] [--json]

Random models of the size of the quick start's. Both runs have the same student, prompts per round, tokens per
response and tokens in all, and differ in how many teachers divide the prompts. They alternate in one process
with one thread; a round is measured in CPU seconds (generation, teachers and update; without checkpoints).
The ratio is the median over the pairs.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from step_bench.job import write_model

if TYPE_CHECKING:
    from mergeopd.reporting.events import Event

STAGES = ("rollout", "teachers", "update")


class RoundTimes:
    """A reporter that keeps the CPU seconds of every round, and its wall seconds by stage."""

    def __init__(self, num_tokens: int) -> None:
        self.rounds: list[dict[str, float]] = []
        self._num_tokens = num_tokens
        self._start = 0.0

    def emit(self, event: Event) -> None:
        from mergeopd.reporting.events import RunStarted, UpdateDone

        if isinstance(event, UpdateDone):
            if event.num_tokens != self._num_tokens:
                raise ValueError(f"a round had {event.num_tokens} tokens, not {self._num_tokens}")
            own = {"cpu": time.process_time() - self._start}
            self.rounds.append(own | {name: event.seconds[name] for name in STAGES})
        if isinstance(event, UpdateDone | RunStarted):
            self._start = time.process_time()


def main() -> None:
    """Write the models and both recipes, run them alternately, print."""
    arguments = parse()
    with tempfile.TemporaryDirectory() as folder:
        arguments.folder = Path(folder)
        jobs = write_jobs(arguments)
        for job in jobs:  # warm up
            run(job, arguments)
        pairs = [[run(job, arguments) for job in jobs] for _ in range(arguments.repeats)]
    result: dict[str, Any] = {"num_teachers": arguments.teachers, "num_prompts": arguments.prompts}
    for name in ("cpu", *STAGES):
        one, many = (median(pair[i][name] for pair in pairs) for i in range(2))
        result[name] = {"one_s": round(one, 4), "many_s": round(many, 4)}
        result[name]["ratio"] = round(median(pair[1][name] / pair[0][name] for pair in pairs), 3)
    print(json.dumps(result) if arguments.json else table(result))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--teachers", type=int, default=8)
    parser.add_argument("--prompts", type=int, default=120, help="of a round, over all teachers")
    parser.add_argument("--prompt", type=int, default=24, help="mean prompt length, give or take an eighth")
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocab", type=int, default=464)
    parser.add_argument("--rounds", type=int, default=6, help="of a run; the first is not counted")
    parser.add_argument("--repeats", type=int, default=7, help="runs of each kind")
    parser.add_argument("--json", action="store_true", help="print one JSON line")
    return parser.parse_args()


def write_jobs(arguments: argparse.Namespace) -> list[Path]:
    """Write the recipes with one teacher and with all of them; every teacher has a domain of its own."""
    import random

    folder, rng = arguments.folder, random.Random(0)
    names = [f"t{i}" for i in range(arguments.teachers)]
    for seed, name in enumerate(("student", *names)):
        write_model(folder / name, arguments, seed)
    for name in names:
        (folder / f"{name}.yaml").write_text(json.dumps({"card": 1, "name": name, "model": name}))
    spread = arguments.prompt // 8
    lengths = [
        rng.randint(arguments.prompt - spread, arguments.prompt + spread) for _ in range(arguments.prompts)
    ]
    rows = [
        json.dumps({"prompt": " ".join(f"w{rng.randrange(1, arguments.vocab)}" for _ in range(n))})
        for n in lengths
    ]
    return [_write_job(arguments, names[:count], rows) for count in (1, arguments.teachers)]


def _write_job(arguments: argparse.Namespace, names: list[str], rows: list[str]) -> Path:
    folder: Path = arguments.folder
    sources = []
    for i, name in enumerate(names):
        file = f"{name}-of-{len(names)}.jsonl"
        (folder / file).write_text("\n".join(rows[i :: len(names)]))
        sources.append({"source": file, "domain": name, "teachers": name})
    recipe = {
        "recipe": 1,
        "name": "rounds",
        "threads": 1,
        "student": {"model": "student"},
        "teachers": {name: f"{name}.yaml" for name in names},
        "prompts": sources,
        "rollout": {"max_new_tokens": arguments.new_tokens},
        "phases": [
            {
                "name": "merge",
                "updates": arguments.rounds,
                "loss": "reverse_kl",
                "prompts_per_round": arguments.prompts,
            }
        ],
        "optimizer": {"lr": 1e-5, "schedule": "constant"},
        "checkpoint": {"every": arguments.rounds},
        "output": "run",
    }
    path = folder / f"job-{len(names)}.yaml"
    path.write_text(json.dumps(recipe))
    return path


def run(recipe: Path, arguments: argparse.Namespace) -> dict[str, float]:
    """Run a recipe in this process and remove its folder; return the median round."""
    import torch
    from step_bench.sides import NEVER

    from mergeopd.distributed.communicator import SingleProcess
    from mergeopd.engine.build import build
    from mergeopd.engine.clock import Clock
    from mergeopd.engine.interrupt import Interrupt
    from mergeopd.engine.models import Machine, load_models
    from mergeopd.engine.progress import Progress
    from mergeopd.preflight.inputs import preflight

    inputs = preflight(recipe)
    inputs = replace(inputs, student=replace(inputs.student, eos_ids=(NEVER,)))
    models = load_models(inputs, Machine(torch.device("cpu"), SingleProcess()))
    times = RoundTimes(arguments.prompts * arguments.new_tokens)
    build(models, reporter=times, clock=Clock(), interrupt=Interrupt()).run(Progress(), None)
    shutil.rmtree(inputs.plan.output)
    rounds = times.rounds[1:]
    return {name: median(one[name] for one in rounds) for name in rounds[0]}


def table(result: dict[str, Any]) -> str:
    """Format a line per stage."""
    many = f"{result['num_teachers']} teachers"
    lines = [f"{'':>10} {'1 teacher':>12} {many:>12} {'ratio':>8}"]
    for name in ("cpu", *STAGES):
        row = result[name]
        lines.append(f"{name:>10} {row['one_s']:>11.4f}s {row['many_s']:>11.4f}s {row['ratio']:>8.3f}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
