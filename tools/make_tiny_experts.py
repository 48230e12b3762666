"""Train a tiny base model and its domain experts, for the quick start and for tests.

    python tools/make_tiny_experts.py [--out experts] [--seed 0] [--foreign] [--agent]

All results are determined by the seed. A second run reuses the experts. --foreign also trains a Llama with
its own tokenizer. --agent makes another set in a folder of its own: math, code, search, tools and chat.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from tiny_experts.agent.settings import AGENT, AGENT_FOLDER, agent_key
from tiny_experts.cache import cache_key, read_manifest, why_stale, written_aside
from tiny_experts.llama.settings import DOMAIN, FOLDER, LlamaSettings, llama_key
from tiny_experts.settings import Settings


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description:>8}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
    )


def _num_cores() -> int:
    """Return the cores that this process may use; fewer than the machine's in a container or under Slurm."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _torch(threads: int) -> None:
    """Import torch and the model, which takes seconds, so neither is imported if the experts exist."""
    # Spinning threads wait for each other forever where another process keeps a core busy (20x slower).
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its threads do not survive a fork
    import torch

    from mergeopd.models.quiet import without_warnings

    with without_warnings():
        from transformers import Qwen3ForCausalLM  # noqa: F401
    torch.set_num_threads(threads)


def make(
    out: Path, settings: Settings, seed: int, num_processes: int, console: Console, *, agent: bool = False
) -> None:
    """Train the experts in `out`, `num_processes` models at a time, replacing existing ones.

    Args:
        agent: the domains are those of tiny_experts.agent.

    Raises:
        FileExistsError: `out` holds something that this tool did not write.
    """
    facts: dict[str, Any] = {"settings": settings.as_dict(), "seed": seed}
    start = time.perf_counter()
    key = (agent_key if agent else cache_key)(settings, seed)
    with written_aside(out, key, facts) as folder, _progress(console) as progress:
        _torch(threads=1)
        from tiny_experts.build import build, words

        material = words
        if agent:
            from tiny_experts.agent.build import material

        def watch(name: str) -> Any:
            task = progress.add_task(name, total=settings.base.max_updates)
            return lambda update, end: progress.update(task, completed=update, total=end)

        facts["accuracy"] = build(folder, settings, seed, watch, num_processes, material)
        facts["seconds"] = round(time.perf_counter() - start, 1)


def make_foreign(
    out: Path, settings: Settings, llama: LlamaSettings, seed: int, threads: int, console: Console
) -> None:
    """Train the foreign expert in `out`, its own folder among the experts, replacing an existing one.

    Raises:
        FileExistsError: `out` holds something that this tool did not write.
    """
    facts: dict[str, Any] = {"settings": llama.as_dict(), "seed": seed}
    start = time.perf_counter()
    with (
        written_aside(out, llama_key(settings, llama, seed), facts) as folder,
        _progress(console) as progress,
    ):
        _torch(threads)
        from tiny_experts.llama.build import build

        task = progress.add_task(FOLDER, total=llama.training.max_updates)

        def advance(update: int, end: int) -> None:
            progress.update(task, completed=update, total=end)

        facts["accuracy"] = {FOLDER: {DOMAIN: build(folder, settings, llama, seed, advance)}}
        facts["seconds"] = round(time.perf_counter() - start, 1)


def show(out: Path, console: Console, *, foreign: bool) -> None:
    """Print the accuracies recorded in the manifests in `out`."""
    accuracy: dict[str, dict[str, float]] = {}
    for folder in (out, out / FOLDER) if foreign else (out,):
        manifest = read_manifest(folder)
        assert manifest is not None
        accuracy |= manifest["accuracy"]
    table = Table(title="accuracy on the evaluation prompts, greedy", title_justify="left")
    table.add_column("model")
    for domain in accuracy["base"]:
        table.add_column(domain, justify="right")
    for model, by_domain in accuracy.items():
        row = (f"{by_domain[domain]:.1%}" if domain in by_domain else "" for domain in accuracy["base"])
        table.add_row(model, *row)
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "--out", type=Path, help=f"folder to write (default: experts; of --agent: {AGENT_FOLDER})"
    )
    parser.add_argument("--seed", type=int, default=0, help="random seed (default: 0)")
    sets = parser.add_mutually_exclusive_group()
    sets.add_argument(
        "--foreign", action="store_true", help=f"also {FOLDER}: another architecture, another tokenizer"
    )
    sets.add_argument(
        "--agent", action="store_true", help="instead, experts for math, code, search, tools and chat"
    )
    arguments = parser.parse_args()
    shown = arguments.out or Path(AGENT_FOLDER if arguments.agent else "experts")
    console, out, seed, llama, num_cores = (
        Console(),
        shown.resolve(),
        arguments.seed,
        LlamaSettings(),
        _num_cores(),
    )
    settings = AGENT if arguments.agent else Settings()
    try:
        reason = why_stale(out, (agent_key if arguments.agent else cache_key)(settings, seed))
        if reason is None:
            console.print(f"The tiny experts are in {shown} already.")
        else:
            console.print(f"Making the tiny experts in {shown}: {reason}.")
            # Forking a process that has loaded torch is safe on Linux only.
            num_processes = num_cores if sys.platform == "linux" else 1
            make(out, settings, seed, num_processes, console, agent=arguments.agent)
        if arguments.foreign:
            reason = why_stale(out / FOLDER, llama_key(settings, llama, seed))
            if reason is None:
                console.print(f"The foreign expert is in {shown / FOLDER} already.")
            else:
                console.print(f"Making the foreign expert in {shown / FOLDER}: {reason}.")
                make_foreign(out / FOLDER, settings, llama, seed, num_cores, console)
    except FileExistsError as error:
        parser.error(str(error))
    show(out, console, foreign=arguments.foreign)


if __name__ == "__main__":
    main()
