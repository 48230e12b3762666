"""Run planted failures and good recipes on the tiny experts, and list the alarms of each with their updates.

    python tools/plant_failures.py [--only lr_100x gkd ...] [--seed 0] [--output runs/alarms]

A failure counts as found if one of its expected alarms is raised before a third of its updates; a good recipe
must raise none. Runs are short and without evaluation, unless it is what the case is about; finished ones are
not run again. Exits with 1 if a failure was missed or a good recipe raised an alarm.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from mergeopd.reporting.run_result import RunResult

ROOT = Path(__file__).resolve().parents[1]
RECIPE = ROOT / "recipes" / "quickstart.yaml"
METHODS = (
    "gkd", "exact_reverse_kl", "distillm", "anchor", "exact_outcome", "grpo", "dr_grpo",
    "glm5", "minillm", "trajectories",
)  # fmt: skip
PROMPTS = 48  # per round, instead of 120
UPDATES = 48
END_ID, LETTER_ID = 1, 70  # of the tiny tokenizer
SHORT = {"threads": 1, "evaluation": None, "optimizer.warmup_updates": 4, "checkpoint.every": 10_000}


@dataclass(frozen=True)
class Case:
    """A run: a recipe with changes, and the alarm that must be raised; "" for a good recipe."""

    recipe: Path
    changes: Mapping[str, Any]
    expected: str = ""


class Planter:
    """Makes the planted failures of a recipe with a teacher for each domain, and their files in `folder`."""

    def __init__(self, recipe: Path, folder: Path) -> None:
        from mergeopd.recipe.resolve import read

        plan = read(recipe).plan
        if plan is None:
            sys.exit(f"{recipe} has problems; see mergeopd check")
        folder.mkdir(parents=True, exist_ok=True)
        self.recipe, self.folder, self.plan = recipe, folder, plan
        self.names = [next(iter(source.teachers)) for source in plan.sources]

    def failures(self) -> dict[str, Callable[[], Case]]:
        """Return functions that make the planted failures, by name."""
        lr, (first, *others) = self.plan.optimizer.lr, self.names
        permuted = {f"prompts.{i}.teachers": name for i, name in enumerate((*others, first))}
        uneven = {**dict.fromkeys(self.domains, 1.0), self.domains[-1]: 0.01}
        return {
            "lr_100x": lambda: self.bad("divergence_rising", {"optimizer.lr": 100 * lr}),
            "lr_1000x": lambda: self.bad(
                "divergence_rising", {"optimizer.lr": 1000 * lr, "optimizer.clip_grad": None}
            ),
            "permuted_teachers": lambda: self.bad("mismatched_teacher", permuted),
            "permuted_mixture": lambda: self.bad("mismatched_teacher", self.mixture() | permuted),
            "permuted_on_policy": lambda: self.bad("no_cold_start", self.on_policy("reverse_kl") | permuted),
            "end_token_teachers": lambda: self.bad(
                "length_collapse", self.on_policy("reverse_kl") | self.one_token(END_ID, "ends")
            ),
            "one_token_teachers": lambda: self.bad("repetition", self.one_token(LETTER_ID, "repeats")),
            "short_limit": lambda: self.bad("truncation", {"rollout.max_new_tokens": 4}),
            "hot_rollouts": lambda: self.bad("truncation", {"rollout.temperature": 10.0}),
            "cut_rollouts": lambda: self.bad(
                "rollout_gap", {**self.on_policy("sampled_reverse_kl"), "rollout.top_p": 0.3}
            ),
            "dead_domain": lambda: self.bad(
                "dead_domain",
                {
                    **self.on_policy({"reverse_kl": 1.0, "outcome": 1.0}, samples=4),
                    **{
                        f"prompts.{i}.verifier": {"kind": "regex", "pattern": "."} for i in range(len(others))
                    },
                    f"prompts.{len(others)}.verifier": {"kind": "regex", "pattern": "no response matches"},
                },
            ),
            "dead_rewards": lambda: self.bad(
                "zero_gradient",
                {
                    **self.on_policy("outcome", samples=4),
                    "student.model": self.random_base(),
                    **{f"prompts.{i}.verifier": "exact" for i in range(len(self.names))},
                },
            ),
            "random_base": lambda: self.bad(
                "no_cold_start", {**self.on_policy("reverse_kl"), "student.model": self.random_base()}
            ),
            "starved_domain": lambda: self.bad("starved_domain", {"prompts.0.share": 0.005}),
            "starved_balance": lambda: self.bad("starved_domain", {"phases.0.balance.tokens": uneven}),
            "teacher_is_student": lambda: self.bad(
                "identical_teacher", {f"teachers.{first}": self.base_card()}
            ),
            "leak": lambda: self.bad("overlap", {"evaluation": self.leak()}),
        }

    @property
    def domains(self) -> list[str]:
        return [source.domain for source in self.plan.sources]

    def bad(self, expected: str, changes: Mapping[str, Any]) -> Case:
        """Return a failure in an on-policy phase after a short cold start, unless it has its own phases."""
        num_cold = max(1, UPDATES // 6)
        phase = {"prompts_per_round": PROMPTS, "balance": {"tokens": "equal"}}
        phases = [
            {**phase, "name": "cold_start", "text": "teacher", "updates": num_cold, "loss": "forward_kl"},
            {**phase, "name": "merge", "updates": UPDATES - num_cold, "loss": "reverse_kl"},
        ]
        return Case(self.recipe, {"phases": phases, **changes}, expected)

    def on_policy(self, loss: object, samples: int = 1) -> dict[str, Any]:
        """Return settings without a cold start; policy terms have a smaller learning rate."""
        phase = {"name": "merge", "updates": UPDATES, "loss": loss}
        scale = 1.0 if loss == "reverse_kl" else 0.1
        return {
            "phases": [{**phase, "prompts_per_round": 2 * PROMPTS // samples if samples > 1 else PROMPTS}],
            "optimizer.lr": scale * self.plan.optimizer.lr,
            "rollout.samples_per_prompt": samples,
        }

    def mixture(self) -> dict[str, Any]:
        """Return the recipe's own phase, in short."""
        (merge,) = (p.model_dump(mode="json", exclude_defaults=True) for p in self.plan.phases)
        short = {"updates": UPDATES, "prompts_per_round": PROMPTS, "updates_per_round": 1}
        return {"phases": [merge | short]}

    def leak(self) -> dict[str, Any]:
        """Return an evaluation on prompts that are also trained on."""
        source = self.plan.sources[0]
        copied = self.folder.resolve() / f"leaked_{Path(source.source).name}"
        shutil.copy(source.source, copied)
        prompts = {"source": str(copied), "domain": source.domain, "verifier": "exact", "limit": 8}
        return {"prompts": [{**prompts, "allow_overlap": True}], "static_merges": [], "all_experts": False}

    def base_card(self) -> str:
        """Return the card of a teacher that is the base."""
        return self.card("same", Path(self.plan.student.model), self.domains[:1])

    def card(self, name: str, model: Path, domains: Sequence[str] = ()) -> str:
        path = self.folder.resolve() / f"{name}.yaml"
        content = {"card": 1, "name": name, "model": str(model.resolve()), "domains": list(domains)}
        path.write_text(json.dumps({key: value for key, value in content.items() if value}))
        return str(path)

    def random_base(self) -> str:
        return str(self.model("random", Path(self.plan.student.model), randomize))

    def model(self, name: str, source: Path, change: Callable[[Any], None]) -> Path:
        """Return a copy of a model folder with changed weights."""
        import torch
        from transformers import AutoModelForCausalLM

        target = self.folder / name
        if not target.is_dir():
            shutil.copytree(source, target)
            model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
            torch.manual_seed(0)
            with torch.no_grad():
                change(model)
            model.save_pretrained(target)
        return target.resolve()

    def one_token(self, token: int, name: str) -> dict[str, str]:
        """Replace all experts by ones that generate one token, whatever the prompt."""
        changes = {f"prompts.{i}.teachers": teacher for i, teacher in enumerate(self.names)}
        for teacher in self.names:
            source = self.plan.teachers[teacher].folder
            made = self.model(f"{name}_{teacher}", source, partial(prefer, token))
            changes[f"teachers.{teacher}"] = self.card(f"{name}_{teacher}", made)
        return changes


def randomize(model: Any) -> None:
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.normal_(0.0, 0.02)


def prefer(token: int, model: Any) -> None:
    """Make a model give one token nearly all probability, whatever precedes."""
    import torch

    for parameter in model.parameters():
        parameter.fill_(0.0 if parameter.dim() > 1 else 1.0)
    model.get_input_embeddings().weight.fill_(1.0)
    head = torch.zeros_like(model.get_input_embeddings().weight)
    head[token] = 12.0 / head.shape[1]  # the final state is 1 in every dimension
    model.get_output_embeddings().weight = torch.nn.Parameter(head)  # unties the embedding
    model.config.tie_word_embeddings = False


def good(path: Path, num_updates: int, share: float) -> Case:
    """Return a recipe with fewer updates, in the proportions of its phases, and a share of its prompts."""
    from mergeopd.recipe.resolve import read

    plan = read(path).plan
    if plan is None:
        sys.exit(f"{path} has problems; see mergeopd check")
    changes: dict[str, Any] = {}
    for i, phase in enumerate(plan.phases):
        num_rounds = round(num_updates * phase.updates / plan.num_updates / phase.updates_per_round)
        changes[f"phases.{i}.updates"] = max(1, num_rounds) * phase.updates_per_round
        changes[f"phases.{i}.prompts_per_round"] = max(1, round(share * phase.prompts_per_round))
    return Case(path, changes)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these cases only")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "alarms", metavar="FOLDER")
    arguments = parser.parse_args()
    cases = Planter(RECIPE, arguments.output / "files").failures()
    cases["quickstart"] = partial(good, RECIPE, UPDATES, 1.0)  # its learning rate needs its batch
    methods = {name: RECIPE.parent / "methods" / f"{name}.yaml" for name in METHODS}
    cases |= {
        name: partial(good, path, UPDATES, PROMPTS / 120) for name, path in methods.items() if path.is_file()
    }
    table = Table(title="Alarms with their first updates", title_justify="left")
    for column in ("case", "updates", "as expected", "alarms"):
        table.add_column(column, overflow="fold")
    all_right = True
    for name, make_case in cases.items():
        if arguments.only is None or name in arguments.only:
            case = make_case()
            done = run(name, case, arguments.seed, arguments.output)
            is_right = as_expected(case, done)
            all_right = all_right and is_right
            table.add_row(name, str(done.num_updates), "yes" if is_right else "NO", ", ".join(shown(done)))
    Console(width=120).print(table)
    return 0 if all_right else 1


def run(name: str, case: Case, seed: int, folder: Path) -> RunResult:
    """Run a case, unless it is finished."""
    import mergeopd

    print(f"== {name}", flush=True)
    output = (folder / f"{name}-{seed}").resolve()
    return mergeopd.run(case.recipe, set={**SHORT, **case.changes, "seed": seed, "output": str(output)})


def as_expected(case: Case, done: RunResult) -> bool:
    """Whether a failure was found in time, or a good recipe raised nothing."""
    early = {alarm.name for alarm in done.alarms if 3 * alarm.update < done.planned_updates}
    return case.expected in early if case.expected else not done.alarms


def shown(done: RunResult) -> list[str]:
    """Return each alarm with its first update, and the number of its subjects if there are several."""
    first: dict[str, int] = {}
    subjects: dict[str, set[str]] = {}
    for alarm in done.alarms:
        first.setdefault(alarm.name, alarm.update)
        subjects.setdefault(alarm.name, set()).add(alarm.subject)
    return [f"{name} {update} ({len(subjects[name])})" for name, update in first.items()]


if __name__ == "__main__":
    sys.exit(main())
