"""Compare recipes for a merge on several sets of domains, at equal updates and at equal time.

    python tools/merge_bench.py [--sets agents ...] [--seeds 0 1 2] [--only sft mixture ...] [--student small]

A candidate is a list of phases. Every candidate starts from the same base, sees the same prompts and has the
same optimizer; `--lr` and `--prompts` change these for all. Figures are recovered headroom, (merged - base) /
(expert - base), in the mean over a set's domains; "kept" is the difference to the base, in points, on a skill
that no prompt trains.

At equal time, a candidate gets as many updates as fit in the time of the default: the seconds of text,
rollout, teachers and update. Every run pays for the teachers' responses that it trains on. Intervals are 95 %
t-intervals over sets and seeds of the difference to the default. The best static merge, of five, has no
updates. Runs are in runs/bench, experts in experts/bench; finished ones are reused.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from tiny_experts.cache import cache_key, why_stale
from tiny_experts.sets import SETS
from tiny_experts.settings import Settings
from tiny_experts.tasks import DOMAINS

if TYPE_CHECKING:
    from mergeopd.reporting.result import Result

ROOT = Path(__file__).resolve().parents[1]
STAGES = ("text", "rollout", "teachers", "update")  # the time of a run; start and evaluation do not count
DEFAULT = "half text, both KL, four updates a round"
STATIC = "best static merge"
STATIC_MERGES = ["weight_average", "task_arithmetic", "ties", "dare", "slerp"]
LARGEST_FACTOR = 6  # updates at equal time, at most so many times those at equal updates
# 97.5 % quantiles of Student's t by degrees of freedom; 1.96 from 30 on.
T_QUANTILES = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23, 2.20, 2.18, 2.16, 2.14, 2.13)

Phases = list[dict[str, Any]]
Map = Callable[..., Iterable[Any]]


def _cold(updates: int, loss: Any, *, share: float = 0.2, text: Any = "student") -> Phases:
    """Return a cold start on teacher text for a share of the updates, then `loss` on `text`."""
    num_cold = max(1, round(share * updates))
    cold = {"name": "cold_start", "text": "teacher", "updates": num_cold, "loss": "forward_kl"}
    return [cold, {"name": "merge", "text": text, "updates": updates - num_cold, "loss": loss}]


def _one(updates: int, loss: Any, text: Any) -> Phases:
    return [{"name": "merge", "text": text, "updates": updates, "loss": loss}]


def _four(phases: Phases) -> Phases:
    """Make four updates from each round of on-policy responses, which are generated in larger batches."""
    for phase in phases:
        if phase["text"] != "teacher" and phase["updates"] % 4 == 0:
            phase |= {"updates_per_round": 4}
    return phases


def _mixed(start: float, end: float, updates: int) -> dict[str, Any]:
    """Return text whose on-policy fraction goes from `start` to `end` during the phase."""
    fraction = start if start == end else {"start": start, "end": end, "updates": updates}
    return {"on_policy_fraction": fraction, "otherwise": "teacher"}


BOTH = {"reverse_kl": 0.5, "forward_kl": 0.5}
JSD = {"jsd": {"weight": 1.0, "beta": 0.5}}
CANDIDATES: Mapping[str, Callable[[int], Phases]] = {
    "sft": lambda n: _one(n, "nll", "teacher"),
    "forward KL on text": lambda n: _one(n, "forward_kl", "teacher"),
    "reverse KL": lambda n: _one(n, "reverse_kl", "student"),
    "cold start, reverse KL": lambda n: _cold(n, "reverse_kl"),
    "cold start, sampled reverse KL": lambda n: _cold(n, "sampled_reverse_kl"),
    "cold start, forward KL": lambda n: _cold(n, "forward_kl"),
    "cold start, JSD": lambda n: _cold(n, JSD),
    "cold start, both KL": lambda n: _cold(n, BOTH),
    "half text, forward KL": lambda n: _one(n, "forward_kl", _mixed(0.5, 0.5, n)),
    "half text, JSD": lambda n: _one(n, JSD, _mixed(0.5, 0.5, n)),
    "half text, both KL": lambda n: _one(n, BOTH, _mixed(0.5, 0.5, n)),
    "ramp, forward KL": lambda n: _one(n, "forward_kl", _mixed(0.0, 1.0, n)),
    "ramp, both KL": lambda n: _one(n, BOTH, _mixed(0.0, 1.0, n)),
    "half text, then reverse KL": lambda n: _cold(n, "reverse_kl", share=0.5),
    "cold start, reverse KL, four updates a round": lambda n: _four(_cold(n, "reverse_kl")),
    "cold start, both KL, four updates a round": lambda n: _four(_cold(n, BOTH)),
    "half text, forward KL, four updates a round": lambda n: _four(
        _one(n, "forward_kl", _mixed(0.5, 0.5, n))
    ),
    DEFAULT: lambda n: _four(_one(n, BOTH, _mixed(0.5, 0.5, n))),
    "ramp, both KL, four updates a round": lambda n: _four(_one(n, BOTH, _mixed(0.0, 1.0, n))),
    "ramp to half, both KL, four updates a round": lambda n: _four(_one(n, BOTH, _mixed(0.0, 0.5, n))),
    "quarter on-policy, both KL, four updates a round": lambda n: _four(_one(n, BOTH, _mixed(0.25, 0.25, n))),
}


@dataclass(frozen=True, slots=True)
class Job:
    """One run: a candidate with a number of updates on a set of experts."""

    experts: str
    seed: int
    candidate: str
    updates: int
    student: str = "base"
    prompts: int = 2000
    prompts_per_round: int = 64
    lr: float = 3e-3
    balance: str = "equal"
    clip: float = 1.0

    @property
    def folder(self) -> Path:
        """The run folder, named after every setting."""
        settings = "-".join(f"{value}" for value in list(asdict(self).values())[2:])
        return ROOT / "runs" / "bench" / f"{self.experts}-{self.seed}" / settings.replace(" ", "_")

    def file(self, suffix: str) -> Path:
        """Return the file beside the run folder with this suffix."""
        return self.folder.parent / f"{self.folder.name}.{suffix}"


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a run reached: recovered headroom by domain, and the change on the kept skill; what it cost."""

    recovered: Mapping[str, float | None]
    kept: float
    seconds: float = 0.0
    num_tokens: int = 0
    alarms: Sequence[str] = ()
    static: Mapping[str, Any] | None = None  # the fields of the best static merge's outcome

    @property
    def mean(self) -> float:
        """Mean recovered headroom over the domains with headroom; NaN without one."""
        values = [value for value in self.recovered.values() if value is not None]
        return statistics.fmean(values) if values else math.nan


def experts_folder(name: str, seed: int) -> Path:
    return ROOT / "experts" / "bench" / f"{name}-{seed}"


def make_experts(name: str, seed: int) -> None:
    """Train a set of experts unless it exists."""
    from make_tiny_experts import make

    settings, folder = SETS[name], experts_folder(name, seed)
    if why_stale(folder, cache_key(settings, seed)) is not None:
        make(folder, settings, seed, 1, Console(quiet=True))


def recipe(job: Job, settings: Settings) -> dict[str, Any]:
    """Return the recipe of a job, with absolute paths."""
    folder = experts_folder(job.experts, job.seed)
    domains = tuple(settings.expert)

    def rows(split: str, domain: str) -> dict[str, Any]:
        return {"source": str(folder / "data" / f"{split}_{domain}.jsonl"), "domain": domain}

    kept = [domain for domain in settings.domains if domain not in domains]
    verifiers = {domain: "json" if "{" in _answer(domain) else "exact" for domain in settings.domains}
    evaluation = [{**rows("eval", domain), "verifier": verifiers[domain]} for domain in domains]
    evaluation += [{**rows("eval", one), "verifier": verifiers[one], "expert": "none"} for one in kept]
    phases = CANDIDATES[job.candidate](job.updates)
    for phase in phases:
        num_prompts = job.prompts_per_round * phase.get("updates_per_round", 1)
        phase |= {"prompts_per_round": num_prompts, "balance": {"tokens": job.balance}}
    prompts = [{"source": str(_prompts(folder, d, job.prompts)), "domain": d} for d in domains]
    return {
        "recipe": 1,
        "name": "bench",
        "seed": job.seed,
        "threads": 1,
        "student": {"model": str(folder / job.student)},
        "teachers": {domain: {"card": str(_card(folder, domain))} for domain in domains},
        "prompts": prompts,
        "rollout": {"max_new_tokens": 64},
        "phases": phases,
        "optimizer": {
            "lr": job.lr,
            "betas": [0.9, 0.98],
            "warmup_updates": min(10, job.updates // 4),
            "schedule": "linear",
            "clip_grad": job.clip,
        },
        "evaluation": {
            "prompts": evaluation,
            "static_merges": STATIC_MERGES if _has_static(job) else [],
            "all_experts": False,
        },
        "checkpoint": {"every": 1_000_000},
        "text_cache": str(job.file("texts")),
        "output": str(job.folder),
    }


def _has_static(job: Job) -> bool:
    """Whether a job also measures static merges: they depend on nothing but the experts."""
    return job.candidate == DEFAULT and job.student == "base"


def _answer(domain: str) -> str:
    from random import Random

    return DOMAINS[domain](Random(0)).answer


def _prompts(folder: Path, domain: str, num: int) -> Path:
    """Return a file with the first `num` prompts of a domain."""
    few = folder / "data" / f"merge_{domain}-{num}.jsonl"
    if not few.is_file():
        lines = (folder / "data" / f"merge_{domain}.jsonl").read_text().splitlines(keepends=True)
        few.write_text("".join(lines[:num]))
    return few


def _card(folder: Path, domain: str) -> Path:
    card = folder / f"{domain}.yaml"
    if not card.is_file():
        fields = {"card": 1, "name": domain, "model": str(folder / domain), "domains": [domain]}
        card.write_text(json.dumps(fields))
    return card


def run(job: Job) -> Outcome:
    """Return the outcome of a job, from its folder if it is finished."""
    kept = job.file("json")
    if not kept.is_file():
        outcome = _run(job)
        kept.write_text(json.dumps(asdict(outcome), indent=1) + "\n")
    return Outcome(**json.loads(kept.read_text()))


def _run(job: Job) -> Outcome:
    import mergeopd

    settings = SETS[job.experts]
    path = job.file("yaml")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(recipe(job, settings)))
    done = mergeopd.run(path)
    shutil.rmtree(job.file("texts"), ignore_errors=True)
    assert done.result is not None
    best = done.result.best_static
    return Outcome(
        **_reached(done.result, "merged"),
        seconds=sum(row.get(f"cost.seconds.{stage}") or 0.0 for row in done.metrics for stage in STAGES),
        num_tokens=sum(int(row["num_tokens"]) for row in done.metrics),
        alarms=sorted({f"{alarm.name} {alarm.subject}".strip() for alarm in done.alarms}),
        static=None if best is None else _reached(done.result, best),
    )


def _reached(result: Result, model: str) -> dict[str, Any]:
    """Return recovered headroom by domain and the change on the kept skills, of one model of a result."""
    recovered: dict[str, float | None] = {}
    changes = []
    for name, suite in result.suites.items():
        accuracy = {key: one.value for key, one in suite.accuracy.items() if one.value is not None}
        gain = accuracy[model] - accuracy["base"]
        if suite.expert is None:
            changes.append(gain)
        else:
            headroom = accuracy[suite.expert] - accuracy["base"]
            recovered[name] = gain / headroom if headroom > 0 else None
    return {"recovered": recovered, "kept": statistics.fmean(changes)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    sets = [name for name in SETS if name != "quickstart"]
    parser.add_argument("--sets", nargs="+", choices=SETS, default=sets)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument(
        "--only", nargs="+", choices=CANDIDATES, default=list(CANDIDATES), metavar="CANDIDATE"
    )
    parser.add_argument("--updates", type=int, default=120)
    parser.add_argument("--student", choices=("base", "small_base"), default="base")
    parser.add_argument("--prompts", type=int, default=2000, help="prompts per domain")
    parser.add_argument("--prompts-per-round", type=int, default=64)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--balance", choices=("equal", "off"), default="equal")
    parser.add_argument("--clip", type=float, default=1.0)
    parser.add_argument("--equal-time", action="store_true", help="also run candidates at equal time")
    parser.add_argument("--jobs", type=int, default=2, help="processes, of one thread each")
    arguments = parser.parse_args()
    names = [DEFAULT, *(name for name in arguments.only if name != DEFAULT)]
    cases = [(name, seed) for name in arguments.sets for seed in arguments.seeds]
    job = partial(
        Job,
        student=arguments.student,
        prompts=arguments.prompts,
        prompts_per_round=arguments.prompts_per_round,
        lr=arguments.lr,
        balance=arguments.balance,
        clip=arguments.clip,
    )
    with ExitStack() as opened:
        over: Map = map  # in this process
        if arguments.jobs > 1:
            over = opened.enter_context(ProcessPoolExecutor(arguments.jobs, get_context("spawn"))).map
        list(over(make_experts, *zip(*cases, strict=True)))
        jobs = {name: [job(s, seed, name, arguments.updates) for s, seed in cases] for name in names}
        outcomes = _all(over, jobs)
        show(cases, outcomes, f"{arguments.updates} updates")
        if arguments.equal_time:
            target = statistics.fmean(o.seconds for o in outcomes[DEFAULT])
            updates = {
                name: _updates_in(target, statistics.fmean(o.seconds for o in own), arguments.updates)
                for name, own in outcomes.items()
            }
            jobs = {name: [job(s, seed, name, updates[name]) for s, seed in cases] for name in names}
            show(cases, _all(over, jobs), "the time of the default", updates)


def _updates_in(target: float, seconds: float, updates: int) -> int:
    """Return the updates that fit in `target` seconds, in tens, at most LARGEST_FACTOR times as many."""
    return max(10, 10 * round(min(LARGEST_FACTOR, target / seconds) * updates / 10))


def _all(over: Map, jobs: Mapping[str, Sequence[Job]]) -> dict[str, list[Outcome]]:
    """Run all jobs, candidate by candidate within each set."""
    flat = [job for column in zip(*jobs.values(), strict=True) for job in column]
    done: dict[Job, Outcome] = {}
    for job, outcome in zip(flat, over(run, flat), strict=True):
        done[job] = outcome
        line = f"{job.experts}-{job.seed}  {job.candidate}  {job.updates}: {100 * outcome.mean:.1f} %"
        print(f"{line}, kept {100 * outcome.kept:+.1f}, {outcome.seconds:.0f} s", file=sys.stderr, flush=True)
    return {name: [done[job] for job in own] for name, own in jobs.items()}


def show(
    cases: Sequence[tuple[str, int]],
    outcomes: Mapping[str, Sequence[Outcome]],
    budget: str,
    updates: Mapping[str, int] | None = None,
) -> None:
    """Print recovered headroom by set, and the difference to the reference with its interval."""
    sets = list(dict.fromkeys(name for name, _ in cases))
    table = Table(title=f"Recovered headroom in %, {budget}", title_justify="left")
    columns = ["candidate", *sets, "worst domain", "mean", "to the default", "kept", "seconds"]
    for column in columns if updates is None else [*columns, "updates"]:
        table.add_column(column, justify="left" if column == "candidate" else "right")
    reference = outcomes[DEFAULT]
    static = [Outcome(**one.static) for one in reference if one.static is not None]
    for name, own in (*outcomes.items(), *([(STATIC, static)] if static else [])):
        by_set = [[o.mean for (s, _), o in zip(cases, own, strict=True) if s == one] for one in sets]
        worst = min((v for o in own for v in o.recovered.values() if v is not None), default=math.nan)
        differences = [o.mean - r.mean for o, r in zip(own, reference, strict=True)]
        row = [
            name,
            *(f"{100 * statistics.fmean(values):.1f}" for values in by_set),
            f"{100 * worst:.0f}",
            f"{100 * statistics.fmean(o.mean for o in own):.1f}",
            "" if name == DEFAULT else interval(differences),
            interval([o.kept for o in own]),
            f"{statistics.fmean(o.seconds for o in own):.0f}",
        ]
        table.add_row(*row, *([] if updates is None else [str(updates.get(name, 0))]))
    Console(width=150).print(table)


def interval(values: Sequence[float]) -> str:
    """Format a mean with its 95 % t-interval, in points."""
    mean = f"{100 * statistics.fmean(values):+.1f}"
    if len(values) < 2:
        return mean
    freedom = len(values) - 1
    quantile = T_QUANTILES[freedom - 1] if freedom <= len(T_QUANTILES) else 2.0
    return f"{mean} ± {100 * quantile * statistics.stdev(values) / len(values) ** 0.5:.1f}"


if __name__ == "__main__":
    main()
