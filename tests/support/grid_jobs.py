"""Jobs of each launch of the worker, and their grids. A launch has many jobs, since starting one takes seconds."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from byte_jobs import write_byte_tokenizer
from grid_runs import DOMAINS, ROUTES, run_alone, write_recipe
from megatron_cases import write_dense

from mergeopd.errors import MergeopdError

# Tensor, pipeline, processes, context; the torch student's grids have their shards in place of `tensor`.
GRIDS = {
    "alone": (1, 1, 1, 1),
    "TP2xPP2": (2, 2, 4, 1),
    "TP2xDP2": (2, 1, 4, 1),
    "PP2xDP2": (1, 2, 4, 1),
    "DP4": (1, 1, 4, 1),
    "TP2xPP2 sequence": (2, 2, 4, 1),
    "TP2xCP2": (2, 1, 4, 2),
    "CP2xDP2": (1, 1, 4, 2),
    "FSDP4": (4, 1, 4, 1),
    "FSDP2x2": (2, 1, 4, 1),
    "FSDP4 layers packed": (4, 1, 4, 1),
}
# Recipes on grids: in `make test`, and in `make test-dist`.
SHORT = (
    ("cold start", "TP2xPP2"),
    ("mixed", "TP2xDP2"),
    ("reduced", "PP2xDP2"),
    ("served", "TP2xCP2"),
    ("mixed", "FSDP2x2"),
)
LONG = (
    ("cold start", "FSDP4"),
    ("reduced", "FSDP4"),
    ("cold start", "FSDP4 layers packed"),
    ("selves", "FSDP2x2"),
    ("served", "FSDP4"),
    ("served", "TP2xPP2"),
    ("mixed", "CP2xDP2"),
    ("cold start", "TP2xCP2"),
    ("cold start", "DP4"),
    ("mixed", "TP2xPP2"),
    ("mixed", "PP2xDP2"),
    ("reduced", "TP2xPP2 sequence"),
    ("selves", "TP2xDP2"),
    ("recorded", "TP2xPP2"),
    ("served", "TP2xDP2"),
    ("bridged", "TP2xDP2"),
)
# Machines of the four ranks: both stages of TP2xPP2 apart, or both copies of TP2xDP2.
APART = ("m0", "m0", "m1", "m1")
# A round meets every domain, and every prompt has one teacher: what is read can be counted.
COUNTED: dict[str, Any] = {
    "phases": [{"name": "merge", "updates": 2, "prompts_per_round": 12, "loss": "reverse_kl"}],
    "prompts": [
        {"source": f"{domain}.jsonl", "domain": domain, "teachers": {next(iter(ROUTES[domain])): 1.0}}
        for domain in DOMAINS
    ],
}
_CARDS = {name: f"{name}.yaml" for name in ("one", "two", "three")}
# The student's ranks of the last stage know its top k, which the server of teacher two is asked for.
SERVED: dict[str, Any] = {
    "phases": [
        {
            "name": "merge",
            "updates": 4,
            "updates_per_round": 2,
            "prompts_per_round": 9,
            "loss": {"reverse_kl": 1.0, "support": {"top_k": 3, "of": "student"}},
            "balance": {"tokens": "equal", "follow_gap": 0.5},
        }
    ],
    "teachers": {**_CARDS, "two": "served.yaml"},
    "optimizer": {"lr": 1e-3, "eps": 1e-4},
}
# One teacher with longer tokens under four names: all bridges that compare whole vocabularies.
BRIDGED: dict[str, Any] = {
    "student": {"model": "bytes", "micro_batch_tokens": 60},
    "phases": [{"name": "merge", "updates": 3, "prompts_per_round": 9, "loss": "reverse_kl"}],
    "teachers": {
        kind: {"card": "longer.yaml", "bridge": kind} for kind in ("pieces", "gold", "uld", "projection")
    },
    "prompts": [
        {"source": "left.jsonl", "domain": "left", "teachers": {"pieces": 1.0, "uld": 0.5}},
        {"source": "mid.jsonl", "domain": "mid", "teachers": {"gold": 0.7}},
        {"source": "right.jsonl", "domain": "right", "teachers": {"projection": 0.6, "pieces": 0.2}},
    ],
}
_MERGE = {"name": "p", "updates": 3, "prompts_per_round": 13, "loss": "reverse_kl"}
# Recipes that end with an error: the teacher, and the model that replaces it.
_STAND_INS = {
    "NaN in a body": ("one", "nan_body"),
    "NaN in a head": ("two", "nan_head"),
    "uniform": ("two", "uniform"),
    "canary": ("three", "stranger"),
}
BROKEN: dict[str, dict[str, Any]] = {
    **{
        name: {"phases": [_MERGE], "teachers": {**_CARDS, teacher: f"{card}.yaml"}}
        for name, (teacher, card) in _STAND_INS.items()
    },
    "canary of a writer": {
        "phases": [{**_MERGE, "text": "teacher"}],
        "teachers": {**_CARDS, "three": "stranger.yaml"},
    },
}
SHORT_BROKEN = (("NaN in a body", "TP2xDP2"),)
LONG_BROKEN = (
    *((name, "TP2xPP2") for name in BROKEN),
    ("canary of a writer", "DP4"),
    ("NaN in a body", "FSDP2x2"),
    ("NaN in a head", "FSDP4"),
)
# Rank that gets SIGTERM, and the call of a stage: while the student generates its third round, the fifth of
# the run; while the second teacher generates; while the second expert is evaluated, after three measurements of
# three suites during training.
STOPS = {
    "rollout": {"rank": 1, "call": 2, "stage": "rollout"},
    "text": {"rank": 3, "call": 1, "stage": "text"},
    "evaluation": {"rank": 1, "call": 13, "stage": "evaluation"},
}


def write_recipes(folder: Path, url: str) -> None:
    """Write all recipes of this module beside the job's models; teacher two is served at `url`."""
    write_recipe(folder, "counted", COUNTED)
    card = {"card": 1, "name": "two", "model": "two", "served": {"url": url, "engine": "vllm"}}
    (folder / "served.yaml").write_text(json.dumps(card))
    write_recipe(folder, "served", SERVED)
    _write_byte_models(folder)
    write_recipe(folder, "bridged", BRIDGED)
    for name, recipe in BROKEN.items():
        write_recipe(folder, name, recipe)
    _write_bad_teachers(folder)


def _write_byte_models(folder: Path) -> None:
    """Write a student of bytes, whose vocabulary two ranks cannot halve, and a teacher with longer tokens."""
    for seed, (name, merges) in enumerate(
        {"bytes": [], "longer": [("a", "b"), ("c", "d"), ("ab", "c")]}.items()
    ):
        size = write_byte_tokenizer(folder / name, merges)
        write_dense(
            folder / name, "qwen3", tied=True, vocab=size, eos=size - 1, seed=seed, layers=2, spread=0.25
        )
        write_byte_tokenizer(folder / name, merges)  # over the empty one of the model
    (folder / "longer.yaml").write_text(json.dumps({"card": 1, "name": "longer", "model": "longer"}))


def _write_bad_teachers(folder: Path) -> None:
    """Write `one` with NaN in a layer, `two` with NaN or zeros in its head, and a wrong card for `three`."""
    import shutil

    import torch
    from safetensors.torch import load_file, save_file

    for name, source, tensor, value in (
        ("nan_body", "one", "model.layers.1.mlp.down_proj.weight", torch.nan),
        ("nan_head", "two", "lm_head.weight", torch.nan),
        ("uniform", "two", "lm_head.weight", 0.0),
    ):
        shutil.copytree(folder / source, folder / name)
        weights = load_file(folder / name / "model.safetensors")
        weights[tensor][:3] = value
        if name == "uniform":
            weights[tensor][:] = value
        save_file(weights, folder / name / "model.safetensors", metadata={"format": "pt"})
        (folder / f"{name}.yaml").write_text(json.dumps({"card": 1, "name": name, "model": name}))
    canary = {"prompt": "a b", "response": "c d", "logprobs": [-0.01, -9.0]}
    card = {"card": 1, "name": "stranger", "model": "three", "canary": canary}
    (folder / "stranger.yaml").write_text(json.dumps(card))


def jobs(folder: Path, launch: str) -> tuple[int, list[dict[str, Any]]]:
    """Number of processes of a launch, and their jobs in order (see `run_worker.py`)."""
    result = {
        "short": lambda: [
            *(_run(folder, *case) for case in SHORT),
            _run(folder, "counted", "TP2xPP2", name="stages apart", machines=APART),
            *(_run(folder, *case) for case in SHORT_BROKEN),
            *_stopped(folder, "rollout", "TP2xPP2", and_on="TP2xDP2"),
        ],
        "one": lambda: [*_in_parts(folder, "chain", ("alone", 2))],
        "four": lambda: [
            *(_run(folder, *case, is_sharded=case[0] == "recorded") for case in LONG),
            *_in_parts(folder, "chain", ("DP4", 1), ("TP2xCP2", 1), ("PP2xDP2", 1), ("TP2xPP2", None)),
            _run(folder, "mixed", "TP2xDP2", name="copies apart", machines=APART),
            _run(folder, "selves", "TP2xPP2", name="selves, all apart", machines=("a", "b", "c", "d")),
            *(_run(folder, *case) for case in LONG_BROKEN),
            *_stopped(folder, "text", "TP2xPP2"),
            *_stopped(folder, "evaluation", "TP2xPP2"),
            *_in_parts(folder, "shards", ("FSDP4", 2), ("FSDP2x2", 4), ("FSDP4 layers packed", None)),
        ],
    }
    return {"short": 4, "one": 1, "four": 4}[launch], result[launch]()


def _run(folder: Path, recipe: str, grid: str, name: str = "", **options: Any) -> dict[str, Any]:
    """Job for `recipe` on `grid`; its run folder is `runs/NAME`, or that of another job with `into`."""
    name = name or f"{recipe}, {grid}"
    tensor, pipeline, _, context = GRIDS[grid]
    backend = "torch" if "FSDP" in grid else "megatron"
    if backend == "torch":
        parallel = {"shard": tensor, "recompute": "packed" in grid}
    else:
        sizes = {"tensor": tensor, "pipeline": pipeline, "context": context}
        parallel = {**sizes, "sequence": "sequence" in grid}
    overrides = [
        f"student.backend={backend}",
        f"student.parallel={json.dumps(parallel)}",
        *(["student.packing=true", "rollout.gather=layer"] if "packed" in grid else []),
        f"output={folder / 'runs' / options.pop('into', name)}",
    ]
    return {"name": name, "recipe": str(folder / f"{recipe}.recipe.yaml"), "overrides": overrides, **options}


def _in_parts(folder: Path, into: str, *steps: tuple[str, int | None]) -> Iterator[dict[str, Any]]:
    """Jobs of one run of `cold start` that continues on another grid after each number of updates."""
    for grid, updates in steps:
        yield _run(folder, "cold start", grid, name=f"{into}, {grid}", into=into, max_updates=updates)


def _stopped(folder: Path, stage: str, grid: str, and_on: str | None = None) -> Iterator[dict[str, Any]]:
    """Jobs of a run that a signal to one rank stops within a stage, and of the same command again.

    With `and_on`, a copy of the stopped run also continues on that grid.
    """
    name = f"stopped in {stage}"
    steps: list[tuple[str, str, str, dict[str, Any]]] = [(name, grid, name, {"stop": STOPS[stage]})]
    if and_on is not None:
        into = f"{name}, on {and_on}"
        copied = {"copied": [str(folder / "runs" / run) for run in (name, into)]}
        steps.append((into, and_on, into, copied))
    steps.append((f"{name}, again", grid, name, {}))
    for job, on, into, options in steps:
        result = _run(folder, "cold start", on, name=job, into=into, **options)
        yield {**result, "overrides": [*result["overrides"], f"text_cache={folder / name}"]}


def single_process_error(recipe: Path) -> str:
    """Error of a broken recipe in one process."""
    try:
        run_alone(recipe, f"output={recipe.parent / 'runs' / recipe.stem}")
    except MergeopdError as error:
        return f"{type(error).__name__}: {error}"
    raise AssertionError("nothing raised")
