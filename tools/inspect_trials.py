"""Try the verdicts of `mergeopd inspect`: on pairs with planted defects, and against merges of tiny experts.

    python tools/inspect_trials.py verdicts [--sets A B] [--only NAME ...]
    python tools/inspect_trials.py cold_start [--domains sort ...] [--updates 16] [--seeds 0]
    python tools/inspect_trials.py order [--domains sort ...] [--updates 16] [--seeds 0]

`verdicts` inspects the pairs of tools/planted_pairs and compares each verdict with those that are right for
its defect. Thresholds are chosen on set A alone. `cold_start` merges pairs on-policy, with and without a cold
start, at equal updates: accuracy before and after, beside the verdict. `order` merges three teachers of each
domain one by one, and gives the rank correlation of the accuracies with what the inspection found.

Experts are those of tools/merge_bench.py, in experts/bench. Results are in runs/inspect_trials, where models
and finished merges are reused.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import merge_bench
from planted_pairs.experts import Experts
from planted_pairs.merges import accuracies, cold_start_pairs, phases, spearman, teachers_of
from planted_pairs.pairs import SETS, Maker, Pair
from rich.console import Console
from rich.table import Table
from tiny_experts.sets import SETS as SETTINGS

if TYPE_CHECKING:
    from mergeopd.reporting.inspection import TeacherInspection

DOMAINS = list(SETTINGS["quickstart"].expert)
OUT = Path(__file__).resolve().parents[1] / "runs" / "inspect_trials"


def experts(name: str, seed: int) -> Experts:
    """Return a set of tiny experts, trained if there is none."""
    merge_bench.make_experts(name, seed)
    return Experts(merge_bench.experts_folder(name, seed), SETTINGS[name], seed)


def inspect(pair: Pair, folder: Path) -> TeacherInspection:
    """Write the pair's recipe, and inspect it as a user does; inspect.json and the page are beside it."""
    import mergeopd
    from mergeopd.reporting.inspection import TeacherInspection

    (teacher,) = mergeopd.inspect(pair.write(folder), output=folder).teachers
    assert isinstance(teacher, TeacherInspection)
    return teacher


def slug(name: str) -> str:
    return "_".join(name.replace(",", "").replace("'", "").split())


def verdicts(names: list[str], only: list[str] | None, console: Console) -> None:
    """Inspect the pairs of these sets; print each verdict, and how many are right."""
    for name in names:
        table = Table(title=f"Set {name}", title_justify="left")
        for column in ("pair", "right", "verdict", "", "sentence"):
            table.add_column(column, overflow="fold")
        results = []
        for title, make in SETS[name](experts, OUT / name / "models").items():
            if only is None or title in only:
                pair = make()
                verdict = inspect(pair, OUT / name / slug(title)).verdict
                results.append(pair.accepts(verdict))
                mark = "yes" if results[-1] else "NO"
                table.add_row(title, " or ".join(pair.right), verdict.kind, mark, verdict.sentence)
        console.print(table)
        console.print(f"set {name}: right on {sum(results)} of {len(results)}")


def cold_start(domains: list[str], updates: int, seeds: list[int], console: Console) -> None:
    """Merge pairs with and without a cold start; print accuracies beside the verdict of each."""
    table = Table(title=f"Accuracy after {updates} updates", title_justify="left")
    for column in ("student, domain", "verdict", "before", "on-policy", "cold start first", "teacher"):
        table.add_column(column)
    for name, pair in cold_start_pairs(quickstart(), domains).items():
        verdict = inspect(pair, OUT / "merges" / slug(name)).verdict.kind
        without, first = (
            [merged(name, pair, updates, seed, cold_start=cold) for seed in seeds] for cold in (False, True)
        )
        means = [mean(runs, "merged") for runs in (without, first)]
        table.add_row(
            name, verdict, *(f"{x:.1%}" for x in (mean(first, "base"), *means, mean(first, "expert")))
        )
    console.print(table)


def order(domains: list[str], updates: int, seeds: list[int], console: Console) -> None:
    """Merge three teachers of each domain; print their predicted and their real order."""
    table = Table(title=f"Accuracy after {updates} updates", title_justify="left")
    for column in ("teacher, domain", "verdict", "gain in pass rate", "reverse KL", "merged"):
        table.add_column(column)
    make, by_domain = quickstart(), list[float]()
    for domain in domains:
        gains, reached = list[float](), list[float]()
        for name, pair in teachers_of(make, domain).items():
            found = inspect(pair, OUT / "merges" / slug(name))
            assert found.signal is not None
            gain, kl = found.signal.pass_gain.value, found.signal.reverse_kl.value
            assert gain is not None
            gains.append(gain)
            runs = [merged(name, pair, updates, seed, cold_start=False) for seed in seeds]
            reached.append(mean(runs, "merged"))
            table.add_row(name, found.verdict.kind, f"{gain:+.1%}", f"{kl:.2f}", f"{reached[-1]:.1%}")
        by_domain.append(spearman(gains, reached))
    console.print(table)
    correlations = ", ".join(f"{value:.2f}" for value in by_domain)
    console.print(f"rank correlation by domain: {correlations}; mean {statistics.fmean(by_domain):.2f}")


def quickstart() -> Maker:
    return Maker(experts("quickstart", 0), OUT / "merges" / "models")


def merged(name: str, pair: Pair, updates: int, seed: int, *, cold_start: bool) -> Mapping[str, float]:
    """Return the accuracies of a merge."""
    folder = OUT / "merges" / slug(name) / f"{'cold' if cold_start else 'merge'}-{updates}-{seed}"
    return accuracies(pair, folder, phases(updates, cold_start=cold_start), seed)


def mean(runs: list[Mapping[str, float]], model: str) -> float:
    return statistics.fmean(run[model] for run in runs)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    kinds = parser.add_subparsers(dest="trial", required=True)
    of_verdicts = kinds.add_parser("verdicts", help="pairs with planted defects")
    of_verdicts.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS))
    of_verdicts.add_argument("--only", nargs="+", metavar="NAME", help="these pairs only")
    merges: dict[str, Callable[[list[str], int, list[int], Console], None]] = {
        "cold_start": cold_start,
        "order": order,
    }
    for name in merges:
        of_merges = kinds.add_parser(name)
        of_merges.add_argument("--domains", nargs="+", choices=DOMAINS, default=DOMAINS)
        of_merges.add_argument("--updates", type=int, default=16)
        of_merges.add_argument("--seeds", type=int, nargs="+", default=[0])
    arguments = parser.parse_args()
    from torch import set_num_threads
    from transformers.utils.logging import disable_progress_bar

    set_num_threads(1)
    disable_progress_bar()
    console = Console(width=160)
    if arguments.trial == "verdicts":
        verdicts(arguments.sets, arguments.only, console)
    else:
        merges[arguments.trial](arguments.domains, arguments.updates, arguments.seeds, console)


if __name__ == "__main__":
    main()
