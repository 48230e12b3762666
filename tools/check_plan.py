"""Compare `mergeopd plan` with runs: peak memory and seconds of rounds, over small jobs of several kinds.

    python tools/check_plan.py --hardware FILE [--jobs NAME...] [--repeats 2] [--json]

Each job is a run of `mergeopd run` with random models: a few rounds of one phase. The memory is the largest
peak of its processes (resident, mapped files included), and the time of a round is the smallest of all rounds
but the first, over all repeats, because other work on the machine only adds to it. Take the profile with
`mergeopd plan --measure` in the same session, when the machine has nothing else to do. Where it always has,
compare the seconds of `--clock cpu`: those that the first process computes, without its waiting.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from step_bench.job import model_sizes, write_model

# Seconds that the first process computes, in place of those that pass.
CPU_CLOCK = """import time, types
import mergeopd.engine.clock
mergeopd.engine.clock.time = types.SimpleNamespace(perf_counter=time.process_time)
"""
STAGES = ("rollout", "teachers", "update")
MEMORY_WITHIN, TIME_WITHIN = 0.10, 0.25


@dataclass(frozen=True)
class Size:
    """A random model's sizes, and the dtype of its file; with experts, two of which each token uses."""

    hidden: int
    layers: int
    vocab: int
    dtype: str = "float32"
    experts: int = 0


@dataclass(frozen=True)
class Job:
    """A run: its models, its text, and settings of the recipe that differ from the smallest one's."""

    name: str
    student: Size
    teachers: tuple[Size, ...]
    num_prompts: int
    prompt: int
    new_tokens: int
    phase: Mapping[str, Any] = field(default_factory=lambda: {"loss": "reverse_kl"})
    settings: Mapping[str, Any] = field(default_factory=dict)
    teacher_dtype: str = "float32"
    card: Mapping[str, Any] = field(default_factory=dict)
    num_processes: int = 1
    rounds: int = 3


def megatron(**parallel: int) -> dict[str, Any]:
    return {"student": {"model": "student", "backend": "megatron", "parallel": parallel}}


SMALL, MIDDLE, LARGE = Size(256, 4, 8192), Size(512, 6, 8192), Size(1024, 4, 16384)
TOP, MIXED = {"top_k": 32, "of": "teacher"}, {"forward_kl": 1.0, "nll": 0.1}
JOBS = (
    Job("small", SMALL, (SMALL,), 96, 32, 64),
    Job("large", LARGE, (LARGE,), 12, 96, 48),
    Job("many-teachers", MIDDLE, (MIDDLE, SMALL, MIDDLE, SMALL), 32, 64, 48),
    Job("large-teacher", MIDDLE, (Size(1024, 8, 8192),), 16, 64, 48),
    Job(
        "bfloat16",
        MIDDLE,
        (Size(768, 6, 8192, "bfloat16"),),
        16,
        64,
        32,
        settings={"student": {"model": "student", "dtype": "bfloat16"}},
        teacher_dtype="bfloat16",
    ),
    Job("top-k", MIDDLE, (MIDDLE,), 32, 64, 48, {"loss": {"jsd": 1.0, "support": TOP}}),
    Job(
        "policy",
        MIDDLE,
        (MIDDLE,),
        32,
        64,
        48,
        {"loss": "sampled_reverse_kl", "updates_per_round": 2},
    ),
    Job("dataset", MIDDLE, (MIDDLE,), 64, 64, 128, {"loss": MIXED, "text": "dataset"}),
    Job("streamed", MIDDLE, (Size(1024, 8, 8192),), 16, 64, 48, card={"residency": "stream"}),
    Job(
        "streamed-twice",
        MIDDLE,
        (Size(1024, 8, 8192),),
        32,
        64,
        48,
        settings={
            "memory": {"teacher_gib": 0.215},
            "student": {"model": "student", "micro_batch_tokens": 1024},
        },
    ),
    Job("experts", Size(512, 4, 8192, experts=8), (MIDDLE,), 32, 64, 48),
    Job("expert-teacher", MIDDLE, (Size(512, 4, 8192, experts=8),), 32, 64, 48),
    Job("tensor-2", MIDDLE, (MIDDLE,), 32, 64, 48, settings=megatron(tensor=2), num_processes=2),
    Job("pipeline-2", MIDDLE, (MIDDLE,), 32, 64, 48, settings=megatron(pipeline=2), num_processes=2),
    Job("data-2", MIDDLE, (MIDDLE,), 32, 64, 48, settings=megatron(), num_processes=2),
    # Of other shapes than those with which the planner was made.
    Job("unseen-1", Size(384, 6, 12288), (Size(640, 6, 12288),), 48, 48, 64, {"loss": "forward_kl"}),
    Job(
        "unseen-2",
        Size(768, 5, 8192),
        (Size(512, 4, 8192), Size(896, 4, 8192)),
        24,
        64,
        64,
        {"loss": {"reverse_kl": 0.5, "forward_kl": 0.5}},
    ),
    Job("unseen-3", Size(640, 7, 10240), (Size(512, 8, 10240),), 40, 80, 56),
)  # fmt: skip


def main() -> None:
    """Run every job, plan it, print the comparison."""
    arguments = parse()
    chosen = [job for job in arguments.all_jobs if job.name in (arguments.jobs or [j.name for j in JOBS])]
    rows = []
    for job in chosen:
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            recipe = write_job(job, Path(folder))
            measured = [measure(job, recipe, arguments.clock) for _ in range(arguments.repeats)]
            rows.append(compare(job, recipe, measured, arguments))
        if not arguments.json:
            print(line(rows[-1]), flush=True)
    if arguments.json:
        print(
            json.dumps({"memory_within": MEMORY_WITHIN, "time_within": TIME_WITHIN, "jobs": rows}, indent=1)
        )
    else:
        print(summary(rows))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hardware", required=True, help="profile of this machine, or its name")
    parser.add_argument("--jobs", nargs="*", choices=[job.name for job in JOBS], help="default: all")
    parser.add_argument("--repeats", type=int, default=2, help="runs of each job")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="seconds of the runs")
    parser.add_argument("--folder", type=Path, help="where models and runs are written; default: /tmp")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.set_defaults(all_jobs=JOBS)
    return parser.parse_args()


def write_job(job: Job, folder: Path) -> Path:
    """Write models, cards, prompts and the recipe; every teacher has a source of its own."""
    rng = random.Random(0)
    write_sized(folder / "student", job.student, 0)
    sources = []
    for number, size in enumerate(job.teachers):
        name = f"t{number}"
        write_sized(folder / name, size, number + 1)
        (folder / f"{name}.yaml").write_text(
            json.dumps({"card": 1, "name": name, "model": name} | dict(job.card))
        )
        rows = [
            {"prompt": words(rng, job.prompt, job), "response": words(rng, job.new_tokens - 1, job)}
            for _ in range(job.num_prompts // len(job.teachers))
        ]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
        sources.append({"source": f"{name}.jsonl", "domain": name, "teachers": name})
    own_updates = int(job.phase.get("updates_per_round", 1))
    phase = {"name": "merge", "updates": job.rounds * own_updates, "prompts_per_round": job.num_prompts}
    names = [f"t{number}" for number in range(len(job.teachers))]
    recipe = {
        "recipe": 1,
        "name": job.name,
        "threads": job.num_processes,
        "student": {"model": "student"},
        "teachers": {name: {"card": f"{name}.yaml", "dtype": job.teacher_dtype} for name in names},
        "prompts": sources,
        "rollout": {"max_new_tokens": job.new_tokens},
        "phases": [phase | dict(job.phase)],
        "optimizer": {"lr": 1e-5},
        "checkpoint": {"every": 1000},
        "output": "run",
    } | dict(job.settings)
    recipe["student"].setdefault("micro_batch_tokens", 2048)  # type: ignore[attr-defined]
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    return folder / "recipe.yaml"


def words(rng: random.Random, number: int, job: Job) -> str:
    vocab = min(size.vocab for size in (job.student, *job.teachers))
    return " ".join(f"w{rng.randrange(1, vocab)}" for _ in range(number))


def write_sized(folder: Path, size: Size, seed: int) -> None:
    """Write a random model in the dtype of its size."""
    import torch
    from transformers import AutoModelForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

    sizes = argparse.Namespace(**vars(size))
    write_model(folder, sizes, seed)
    if size.experts:
        own = {"num_experts": size.experts, "num_experts_per_tok": 2, "moe_intermediate_size": size.hidden}
        config = Qwen3MoeConfig(**model_sizes(sizes), **own, tie_word_embeddings=True, eos_token_id=0)
        mixture = Qwen3MoeForCausalLM(config)
        with torch.no_grad():
            mixture.lm_head.weight.mul_(5.0)
        mixture.save_pretrained(folder)
    elif size.dtype != "float32":
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, size.dtype))
        model.save_pretrained(folder)


def measure(job: Job, recipe: Path, clock: str) -> dict[str, Any]:
    """Run a job from the start; return its rounds' seconds by stage, its peak memory, and bytes read."""
    command = [sys.executable, "-m", "mergeopd", "run", str(recipe), "--fresh"]
    command += ["--nproc", str(job.num_processes)] if job.num_processes > 1 else []
    environment = dict(os.environ)
    if clock == "cpu":
        (recipe.parent / "clock").mkdir(exist_ok=True)
        (recipe.parent / "clock" / "sitecustomize.py").write_text(CPU_CLOCK)
        folders = [str(recipe.parent / "clock"), environment.get("PYTHONPATH", "")]
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, folders))
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise SystemExit(f"{job.name} failed: {done.stderr[-2000:]}")
    lines = (recipe.parent / "run" / "metrics.jsonl").read_text().splitlines()
    updates = [json.loads(line)["cost"] for line in lines]
    size = int(job.phase.get("updates_per_round", 1))
    rounds = [
        {stage: sum(each["seconds"].get(stage, 0.0) for each in updates[i : i + size]) for stage in STAGES}
        for i in range(0, len(updates), size)
    ]
    peak = max(each["peak_memory_bytes"] for each in updates)
    flops = {name: sum(each["flops"].get(name, 0.0) for each in updates[:size]) for name in STAGES}
    read = updates[size - 1]["teacher_bytes_read"]
    return {"rounds": rounds, "peak_bytes": peak, "bytes_read": read, "flops": flops}


def compare(
    job: Job, recipe: Path, measured: Sequence[Mapping[str, Any]], arguments: argparse.Namespace
) -> dict[str, Any]:
    """Plan a job, and set the plan beside what was measured."""
    import mergeopd

    plan = mergeopd.plan(recipe, hardware=arguments.hardware, num_processes=job.num_processes)
    [phase] = plan.phases
    later = [each for one in measured for each in one["rounds"][1:]]
    best = {stage: min(each[stage] for each in later) for stage in STAGES}
    waits = ("waiting",) if arguments.clock == "cpu" else ()
    planned = {
        stage.name: sum(s for cause, s in stage.causes.items() if cause not in waits)
        for stage in phase.stages
    }
    # A run reads the weights that generate in the stage rollout.
    planned["rollout"] = planned.get("rollout", 0.0) + planned.pop("sync", 0.0)
    planned = {stage: planned.get(stage, 0.0) for stage in STAGES}
    peak = max(one["peak_bytes"] for one in measured)
    return {
        "job": job.name,
        "measured_bytes": peak,
        "planned_bytes": plan.peak_bytes,
        "memory_ratio": plan.peak_bytes / peak,
        "measured_s": best,
        "planned_s": planned,
        "time_ratio": sum(planned.values()) / sum(best.values()),
        "measured_bytes_read": measured[0]["bytes_read"],
        "planned_bytes_read": phase.bytes_read,
        "measured_flops": measured[0]["flops"],
        "planned_flops": {stage: phase.flops.get(stage, 0.0) for stage in STAGES},
    }


def line(row: Mapping[str, Any]) -> str:
    gib = 2**30
    stages = "  ".join(
        f"{stage} {row['planned_s'][stage]:.2f}/{row['measured_s'][stage]:.2f}" for stage in STAGES
    )
    return (
        f"{row['job']:<14} memory {row['planned_bytes'] / gib:.2f}/{row['measured_bytes'] / gib:.2f} GiB "
        f"x{row['memory_ratio']:.2f}   time x{row['time_ratio']:.2f}   {stages}"
    )


def summary(rows: Sequence[Mapping[str, Any]]) -> str:
    memory = sum(abs(row["memory_ratio"] - 1) <= MEMORY_WITHIN for row in rows)
    time = sum(abs(row["time_ratio"] - 1) <= TIME_WITHIN for row in rows)
    return (
        f"planned/measured: memory within {MEMORY_WITHIN:.0%} in {memory} of {len(rows)} jobs, "
        f"time within {TIME_WITHIN:.0%} in {time} (seconds of a round, the smallest)"
    )


if __name__ == "__main__":
    main()
