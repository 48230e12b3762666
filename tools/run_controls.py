"""Compare the quickstart with controls that must fail, and with simpler methods.

    python tools/run_controls.py [--only lr_zero ...]

Every control is `mergeopd run recipes/quickstart.yaml` with a few overrides, in its own folder under
runs/controls; finished ones are not run again. Prints one line each: recovered headroom per domain.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from mergeopd.reporting.result import recovered_headroom

ROOT = Path(__file__).resolve().parents[1]
RECIPE = ROOT / "recipes" / "quickstart.yaml"
FOLDER = ROOT / "runs" / "controls"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these controls only")
    only = parser.parse_args().only
    controls = {name: sets for name, sets in overrides().items() if only is None or name in only}
    results = {name: run(name, sets) for name, sets in controls.items()}
    show(results)


def overrides() -> dict[str, list[str]]:
    """Return `--set` arguments by control."""
    from mergeopd.recipe.resolve import read

    plan = read(RECIPE).plan
    if plan is None:
        sys.exit(f"{RECIPE} has problems; see mergeopd check")
    teachers = sorted(plan.teachers)
    cold, merge = (phase.model_dump(mode="json", exclude_defaults=True) for phase in plan.phases)
    base = FOLDER / "base_card.yaml"
    base.parent.mkdir(parents=True, exist_ok=True)
    base.write_text(json.dumps({"card": 1, "name": "the base itself", "model": plan.student.model}))
    # Every domain's prompts go to the next domain's expert.
    permuted = [
        f"prompts.{i}.teachers={teachers[(teachers.index(next(iter(s.teachers))) + 1) % len(teachers)]}"
        for i, s in enumerate(plan.sources)
    ]
    # The experts' cards list their domains; the base's does not.
    routed = [f"prompts.{i}.teachers={next(iter(s.teachers))}" for i, s in enumerate(plan.sources)]
    length = plan.num_updates
    return {
        "quickstart": [],
        "lr_zero": ["optimizer.lr=0.0"],
        "permuted_teachers": permuted,
        "base_as_teacher": [*routed, *(f"teachers.{t}={base}" for t in teachers)],
        "cold_start_alone": [f"phases={json.dumps([cold])}"],
        "cold_start_as_long": [f"phases={json.dumps([{**cold, 'updates': length}])}"],
        "plain_sft": [f"phases={json.dumps([{**cold, 'updates': length, 'loss': 'nll'}])}"],
        "on_policy_alone": [f"phases={json.dumps([{**merge, 'updates': length}])}"],
    }


def run(name: str, sets: list[str]) -> dict[str, Any]:
    """Return the result of one control, relative to the quickstart's own experts; reuse finished ones."""
    output = FOLDER / name
    result = FOLDER / f"{name}.json"
    if not result.is_file():
        arguments = [
            a for one in [*sets, "threads=1", "evaluation=null", f"output={output}"] for a in ("--set", one)
        ]
        print(f"== {name}", flush=True)
        mergeopd = [sys.executable, "-m", "mergeopd"]
        subprocess.run([*mergeopd, "run", str(RECIPE), *arguments], check=True)
        measured = ["--model", str(output / "export"), "--output", str(result)]
        subprocess.run([*mergeopd, "eval", str(RECIPE), *measured], check=True)
    document: dict[str, Any] = json.loads(result.read_text())
    return document


def show(results: dict[str, dict[str, Any]]) -> None:
    """Print recovered headroom in per cent, per domain and in the mean, and the weight average."""
    domains = sorted(next(iter(results.values()))["domains"])
    table = Table(title="Recovered headroom in %", title_justify="left")
    table.add_column("run")
    for column in (*domains, "mean"):
        table.add_column(column, justify="right")
    for name, document in results.items():
        values = [document["domains"][d]["recovered"] for d in domains]
        table.add_row(name, *_percentages([*values, document["mean_recovered"]]))
    rows = [next(iter(results.values()))["domains"][d] for d in domains]
    average = [recovered_headroom(row["base"], row["expert"], row["weight_average"]) for row in rows]
    with_headroom = [value for value in average if value is not None]
    mean = sum(with_headroom) / len(with_headroom) if with_headroom else None
    table.add_row("weight average", *_percentages([*average, mean]))
    Console().print(table)


def _percentages(values: list[float | None]) -> list[str]:
    """Format percentages; a dash where the expert is not better than the base."""
    return ["-" if value is None else f"{100 * value:.1f}" for value in values]


if __name__ == "__main__":
    main()
