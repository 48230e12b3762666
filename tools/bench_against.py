"""Compare the speed of two checkouts of mergeopd: a distillation step, and the loss alone.

    python tools/bench_against.py CHECKOUT [--steps 9] [--pairs 5] [--json]

CHECKOUT is the folder of the other one, for example of `git worktree add ../before COMMIT`; both run in this
Python's environment. Steps are those of bench_step.py, by turns in two processes; the loss is that of
bench_loss.py, in a new process each time, by turns. Ratios are this checkout's CPU seconds (a step), or its
time over the matrix products (the loss), divided by the other's: medians over neighbouring measurements.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

from bench_step import KEEPING, Side, add_sizes
from step_bench.job import write_job

HERE = Path(__file__).parents[1]


def main() -> None:
    """Measure both, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkout", type=Path, help="folder of the other checkout")
    add_sizes(parser)
    parser.add_argument("--steps", type=int, default=9, help="timed steps of each, after one warm-up")
    parser.add_argument("--pairs", type=int, default=5, help="timed processes of each for the loss")
    parser.add_argument("--loss", default="", help="options for bench_loss.py in one string, such as --peers")
    parser.add_argument("--json", action="store_true", help="one line of JSON")
    arguments = parser.parse_args()
    other = arguments.checkout.resolve()
    result = {**step_ratios(arguments, other), "loss": loss_ratio(arguments, other)}
    if arguments.json:
        print(json.dumps(result))
    else:
        for name, value in result.items():
            print(f"{name:>14}  {value:.4f}")


def step_ratios(arguments: argparse.Namespace, other: Path) -> dict[str, float]:
    """Return the ratio of a step's CPU seconds, and of the wall seconds of its stages."""
    with tempfile.TemporaryDirectory() as folder:
        arguments.folder = Path(folder)
        write_job(arguments)
        with (
            Side(arguments, "mergeopd", KEEPING, HERE) as own,
            Side(arguments, "mergeopd", KEEPING, other) as before,
        ):
            pairs = [(own.step(), before.step()) for _ in range(arguments.steps + 1)][1:]
    names = ("cpu_s", "generation_s", "teacher_s", "update_s")
    return {name: round(median(a[name] / b[name] for a, b in pairs), 4) for name in names}


def loss_ratio(arguments: argparse.Namespace, other: Path) -> float:
    """Return the ratio of the kernel's times, each over the matrix products in its own process."""

    def over_floor(checkout: Path) -> float:
        tool = [sys.executable, checkout / "tools" / "bench_loss.py", "--json", *arguments.loss.split()]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(checkout)}
        done = subprocess.run(tool, env=environment, check=True, capture_output=True, text=True)
        return float(json.loads(done.stdout)["ratio_to_floor"])

    return round(median(over_floor(HERE) / over_floor(other) for _ in range(arguments.pairs)), 4)


if __name__ == "__main__":
    main()
