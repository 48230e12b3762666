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

from rich.console import Console
from rich.table import Table

from mergeopd.reporting.result import Kind, Result, read_result

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


def run(name: str, sets: list[str]) -> Result:
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
    measured_result = read_result(result)
    assert measured_result is not None
    return measured_result


def show(results: dict[str, Result]) -> None:
    """Print recovered headroom in per cent, per domain and in the mean, and the best static merge."""
    domains = sorted(next(iter(results.values())).suites)
    table = Table(title="Recovered headroom in %", title_justify="left")
    table.add_column("run")
    for column in (*domains, "mean"):
        table.add_column(column, justify="right")
    for name, result in results.items():
        values = [result.suites[d].recovered.value for d in domains]
        table.add_row(name, *_percentages([*values, result.mean_recovered.value]))
    static = [_static_recovered(next(iter(results.values())), d) for d in domains]
    with_headroom = [value for value in static if value is not None]
    mean = sum(with_headroom) / len(with_headroom) if with_headroom else None
    table.add_row("best static merge", *_percentages([*static, mean]))
    Console().print(table)


def _static_recovered(result: Result, domain: str) -> float | None:
    row = result.headline(domain)
    kinds: tuple[Kind, ...] = ("base", "expert", "static_merge")
    base, expert, static = (e.value if (e := row[kind]) else None for kind in kinds)
    if base is None or expert is None or static is None or expert <= base:
        return None
    return (static - base) / (expert - base)


def _percentages(values: list[float | None]) -> list[str]:
    """Format percentages; a dash where the expert is not better than the base."""
    return ["-" if value is None else f"{100 * value:.1f}" for value in values]


if __name__ == "__main__":
    main()
