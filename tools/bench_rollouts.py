"""What the rollouts of a round cost every process: memory, and their exchange.

    python tools/bench_rollouts.py [--responses 4096] [--tokens 8192] [--processes 4] [--json]

Every process makes its share of the responses (random ids and log-probabilities), they exchange them over
gloo as a round does, and each then holds all of them. Prints, of the process that needs most, the anonymous
memory (RssAnon, sampled every 2 ms) added by the round and at its peak, the bytes that it sends in arrays and
pickled, and the seconds from when the last process is ready until all have everything. Linux only.
"""

from __future__ import annotations

import argparse
import json
import pickle
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from bench_teachers import peak_anonymous

from mergeopd.distributed.communicator import Communicator, TorchCommunicator, scatter_gather
from mergeopd.rollout.protocol import Completion, GenerationRequest
from mergeopd.types import Prompt, Rollout, token_ids

VOCAB, PROMPT = 150_000, 512


def main() -> None:
    """Measure in processes of their own, and print."""
    arguments = parse()
    if arguments.rank is not None:
        print(json.dumps(measure_rank(arguments)))
        return
    result = summary(launch(arguments), arguments)
    if arguments.json:
        print(json.dumps(result))
    else:
        show(result)


def parse() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--responses", type=int, default=4096)
    parser.add_argument("--tokens", type=int, default=8192, help="tokens of a response")
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--json", action="store_true", help="one line of JSON")
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--store", help=argparse.SUPPRESS)
    return parser.parse_args()


def launch(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """What every process measured, by rank."""
    sizes = [f"--{name}={getattr(arguments, name)}" for name in ("responses", "tokens", "processes")]
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, *sizes, f"--store={folder}/store"]
        ranks = [
            subprocess.Popen([*command, f"--rank={rank}"], stdout=subprocess.PIPE)
            for rank in range(arguments.processes)
        ]
        outputs = [rank.communicate()[0] for rank in ranks]
    if any(rank.returncode for rank in ranks):
        raise SystemExit("a process failed; its error is above")
    return [json.loads(output) for output in outputs]


def measure_rank(arguments: argparse.Namespace) -> dict[str, Any]:
    """Join the other processes, and measure."""
    import torch.distributed as dist

    store = dist.FileStore(arguments.store, arguments.processes)  # type: ignore[attr-defined]
    dist.init_process_group("gloo", store=store, rank=arguments.rank, world_size=arguments.processes)
    result = measure(TorchCommunicator("here"), arguments.responses, arguments.tokens)
    dist.destroy_process_group()
    return result


def measure(ranks: Communicator, num_responses: int, num_tokens: int) -> dict[str, Any]:
    """Make this process's share, exchange, and keep the round."""
    requests = [
        GenerationRequest(f"p:{i}", 0, token_ids(np.zeros(PROMPT, np.int32))) for i in range(num_responses)
    ]
    ranks.gather(None)  # connects, so that this is in no figure
    made: list[tuple[int, int, float]] = []

    def generate(own: Sequence[GenerationRequest]) -> list[Completion]:
        random = np.random.default_rng(ranks.rank)
        completions = [
            Completion(
                random.integers(VOCAB, size=num_tokens, dtype=np.int32),
                -random.random(num_tokens, np.float32),
                "length",
            )
            for _ in own
        ]
        num_bytes = sum(c.response_ids.nbytes + c.logprobs.nbytes for c in completions)
        pickled = len(pickle.dumps(completions, protocol=5, buffer_callback=lambda _: None))
        made.append((num_bytes, pickled, time.perf_counter()))
        return completions

    with peak_anonymous() as before:
        time.sleep(0.01)
    with peak_anonymous() as peak:
        completions = scatter_gather(ranks, requests, generate)
        end = time.perf_counter()
        prompts = [Prompt(request.key, "source", "domain", ()) for request in requests]
        rollouts = [
            Rollout(p, 0, r.prompt_ids, c.response_ids, "student", c.finish, c.logprobs)
            for p, r, c in zip(prompts, requests, completions, strict=True)
        ]
    with peak_anonymous() as after:
        time.sleep(0.01)
    [(array_bytes, pickled_bytes, start)] = made
    return {
        "digest": sum(int(r.response_ids[::97].sum()) for r in rollouts),
        "tokens": sum(len(r.response_ids) for r in rollouts),
        "before_bytes": before[0],
        "peak_bytes": peak[0],
        "after_bytes": after[0],
        "array_bytes_sent": array_bytes,
        "pickled_bytes_sent": pickled_bytes,
        "exchange_s": end - start,
    }


def summary(ranks: Sequence[dict[str, Any]], arguments: argparse.Namespace) -> dict[str, Any]:
    """The largest figures of all processes; they must hold the same round."""
    if len({rank["digest"] for rank in ranks}) != 1:
        raise SystemExit("the processes hold different rounds")
    return {
        "responses": arguments.responses,
        "tokens": arguments.tokens,
        "processes": len(ranks),
        "round_tokens": ranks[0]["tokens"],
        "peak_bytes": max(rank["peak_bytes"] - rank["before_bytes"] for rank in ranks),
        "after_bytes": max(rank["after_bytes"] - rank["before_bytes"] for rank in ranks),
        "process_peak_bytes": max(rank["peak_bytes"] for rank in ranks),
        "array_bytes_sent": max(rank["array_bytes_sent"] for rank in ranks),
        "pickled_bytes_sent": max(rank["pickled_bytes_sent"] for rank in ranks),
        # The last process to be ready waits for nobody.
        "exchange_s": min(rank["exchange_s"] for rank in ranks),
    }


def show(result: dict[str, Any]) -> None:
    """A table for people."""
    from rich.console import Console
    from rich.table import Table

    title = "{responses:,} responses of {tokens:,} tokens, {processes} processes".format(**result)
    table = Table(title=title, title_justify="left")
    table.add_column("of the process that needs most")
    table.add_column("", justify="right")
    rows = {
        "memory of the round": "after_bytes",
        "peak while it is made and exchanged": "peak_bytes",
        "peak of the process, interpreter and torch included": "process_peak_bytes",
        "sent: arrays, as they lie in memory": "array_bytes_sent",
        "sent: pickled": "pickled_bytes_sent",
    }
    for name, key in rows.items():
        table.add_row(name, f"{result[key] / 1e6:,.1f} MB")
    table.add_row("exchange", f"{result['exchange_s']:.2f} s")
    Console().print(table)


if __name__ == "__main__":
    main()
