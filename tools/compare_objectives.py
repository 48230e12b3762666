"""Compare objectives at equal budgets after one cold start, by recovered headroom per domain.

    python tools/compare_objectives.py [--seeds 0 1] [--only exact sampled ...] [--updates 60]

One cold start on teacher responses trains the student from which every run starts. A run has 60 updates of 80
on-policy responses, four to each of 20 prompts, with the same learning rate; only the loss and the balance of
domains differ. Runs are in runs/objectives; finished ones are not run again. Prints mean and spread over the
seeds, relative to the quickstart's base and experts.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
RECIPE = ROOT / "recipes" / "quickstart.yaml"
FOLDER = ROOT / "runs" / "objectives"

MASK = {"correction": {"kind": "mask", "low": 0.5, "high": 2.0}}
OBJECTIVES: dict[str, dict[str, Any]] = {
    "exact": {"loss": {"reverse_kl": 1.0}},
    "sampled": {"loss": {"sampled_reverse_kl": 1.0}},
    "top16": {"loss": {"reverse_kl": 1.0, "support": {"top_k": 16, "of": "student", "rest": "tail"}}},
    "forward": {"loss": {"forward_kl": 1.0}},
    "jsd": {"loss": {"jsd": {"weight": 1.0, "beta": 0.5}}},
    "exact+outcome": {"loss": {"reverse_kl": 1.0, "outcome": 0.3}, **MASK},
    "mopd+outcome": {"loss": {"sampled_reverse_kl": 1.0, "outcome": 0.3}, **MASK},
    "kdrl": {
        "loss": {"outcome": 1.0, "sampled_reverse_kl": {"weight": {"start": 0.5, "end": 0.1, "updates": 60}}}
    },
}
# KDRL's own weights, 5e-3 to 1e-3, are for hundreds of updates; in 60 updates the teacher would have no
# effect.


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--only", nargs="+", choices=OBJECTIVES, default=list(OBJECTIVES))
    parser.add_argument("--balance", nargs="+", choices=["on", "off"], default=["on", "off"])
    parser.add_argument("--updates", type=int, default=60)
    parser.add_argument("--lr", type=float, default=5e-4)
    arguments = parser.parse_args()
    start = cold_start()
    rows: dict[str, list[dict[str, Any]]] = {"cold start": [measure(start, "cold_start")]}
    for balance in arguments.balance:
        for name in arguments.only:
            label = f"{name}, balance {balance}"
            settings = phase(name, balance, arguments.updates)
            rows[label] = [
                run(
                    f"{name}-{balance}-{arguments.updates}-{arguments.lr:g}-{seed}",
                    start,
                    settings,
                    seed,
                    arguments,
                )
                for seed in arguments.seeds
            ]
    show(rows)


def phase(name: str, balance: str, updates: int) -> dict[str, Any]:
    return {
        "name": "merge",
        "text": "student",
        "updates": updates,
        "prompts_per_round": 20,
        "balance": {"tokens": "equal" if balance == "on" else "off"},
        **OBJECTIVES[name],
    }


def cold_start() -> Path:
    """Return the student after 15 updates on teacher text, which leave something to improve."""
    folder = FOLDER / "cold_start"
    phase = {"name": "cold_start", "text": "teacher", "updates": 15, "prompts_per_round": 120}
    phase |= {"loss": "forward_kl", "balance": {"tokens": "equal"}}
    mergeopd(folder, [f"phases={json.dumps([phase])}", "optimizer.warmup_updates=5"])
    return folder / "export"


def run(
    name: str, start: Path, settings: dict[str, Any], seed: int, arguments: argparse.Namespace
) -> dict[str, Any]:
    """Return the result of one run."""
    sets = [
        f"student.model={start}",
        f"phases={json.dumps([settings])}",
        f"seed={seed}",
        "rollout.samples_per_prompt=4",
        f"optimizer.lr={arguments.lr}",
        "optimizer.warmup_updates=5",
        *(f"prompts.{i}.verifier={kind}" for i, kind in enumerate(verifiers())),
    ]
    mergeopd(FOLDER / name, sets)
    return measure(FOLDER / name / "export", name)


def verifiers() -> list[str]:
    """Return the verifier of each prompt source: that of its domain in the evaluation."""
    from mergeopd.recipe.resolve import read

    plan = read(RECIPE).plan
    if plan is None or plan.evaluation is None:
        sys.exit(f"{RECIPE} has problems or no evaluation; see mergeopd check")
    of_domain = {one.domain: one.verifier.kind for one in plan.evaluation.sources if one.verifier is not None}
    return [of_domain[source.domain] for source in plan.sources]


def mergeopd(output: Path, sets: list[str]) -> None:
    """Run `mergeopd run` with these overrides, unless it is finished."""
    if (output / "export").is_dir():
        return
    print(f"== {output.name}", flush=True)
    sets = [*sets, "threads=1", "evaluation=null", f"output={output}"]
    options = [a for one in sets for a in ("--set", one)]
    subprocess.run([sys.executable, "-m", "mergeopd", "run", str(RECIPE), *options], check=True)


def measure(export: Path, name: str) -> dict[str, Any]:
    """Return accuracies of an export and of the quickstart's base and experts."""
    result = FOLDER / f"{name}.json"
    if not result.is_file():
        options = ["--model", str(export), "--output", str(result), "--set", "threads=1"]
        subprocess.run([sys.executable, "-m", "mergeopd", "eval", str(RECIPE), *options], check=True)
    document: dict[str, Any] = json.loads(result.read_text())
    return document


def show(rows: dict[str, list[dict[str, Any]]]) -> None:
    """Print recovered headroom in per cent, mean and half the range over the seeds."""
    domains = sorted(next(iter(rows.values()))[0]["suites"])
    table = Table(title="Recovered headroom in %, mean +- half the range over seeds", title_justify="left")
    table.add_column("objective")
    for column in (*domains, "mean"):
        table.add_column(column, justify="right")
    for name, documents in rows.items():
        columns = [[d["suites"][domain]["recovered"]["value"] for d in documents] for domain in domains]
        columns.append([d["mean_recovered"]["value"] for d in documents])
        table.add_row(name, *(_spread(values) for values in columns))
    Console(width=110).print(table)


def _spread(recovered: list[float | None]) -> str:
    """Format the mean and spread; a dash where the expert is not better than the base."""
    values = [value for value in recovered if value is not None]
    if not values:
        return "-"
    mean = f"{100 * statistics.fmean(values):.1f}"
    return mean if len(values) == 1 else f"{mean} +- {50 * (max(values) - min(values)):.1f}"


if __name__ == "__main__":
    main()
