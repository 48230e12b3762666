"""Tokens per second of mergeopd's client and of the engine's own benchmark tool, at one running server.

    python tools/bench_engines.py http://127.0.0.1:8200 --engine vllm --model MODEL_FOLDER \\
        --engine-python ENGINE_ENVIRONMENT/bin/python

Both send the same prompts in the same order, at most `--concurrency` at a time, and every response has
`--output` tokens; ours come with log-probabilities. They take turns, with an empty prefix cache, after a
round of warm-up. The server must run with the flags that rollouts need (docs/engines.md); it gets the weights
of the model folder. Without `--engine-python`, only our client is measured. CPU seconds are the client's.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mergeopd.models.tokenizer import Tokenizer
from mergeopd.rollout.protocol import EngineContext, GenerationRequest
from mergeopd.rollout.served import ServedEngine
from mergeopd.rollout.servers import RunningServers
from mergeopd.serving.protocol import InferenceApi
from mergeopd.serving.sglang import SglangApi
from mergeopd.serving.vllm import VllmApi
from mergeopd.types import Sampling, token_ids

# Reads the prompts without pandas, which servers do not need.
VLLM = """
import argparse, json
from vllm.benchmarks.datasets.datasets import CustomDataset
from vllm.benchmarks.serve import add_cli_args, main

def load_data(self):
    self.data = [json.loads(line) for line in open(self.dataset_path)]

CustomDataset.load_data = load_data
parser = argparse.ArgumentParser()
add_cli_args(parser)
main(parser.parse_args())
"""
EMPTY_CACHE = {"vllm": "/reset_prefix_cache", "sglang": "/flush_cache"}


@dataclass(frozen=True)
class Folder:
    """Publishes the folder of the server's own model."""

    folder: Path

    def publish(self, source: object, version: int) -> Path:
        return self.folder

    def discard(self) -> None:
        pass


class ToLength(SglangApi):
    """Ignores the end token of the server's model, as the benchmark tools do."""

    def generation(
        self, prompt_ids: Sequence[int], sampling: Sampling, eos_ids: Collection[int], banned: Collection[int]
    ) -> tuple[str, dict[str, Any]]:
        path, body = super().generation(prompt_ids, sampling, eos_ids, banned)
        return path, {**body, "sampling_params": {**body["sampling_params"], "ignore_eos": True}}


def main() -> None:
    """Measure and print."""
    arguments = parse()
    tokenizer = Tokenizer.load(arguments.model)
    texts = make_texts(tokenizer, arguments)
    ids = [tokenizer.encode(text) for text in texts]
    engine = connect(arguments, tokenizer)
    ours: list[tuple[float, float]] = []
    theirs: list[float] = []
    try:
        engine.sync_weights(None, 0)  # type: ignore[arg-type]
        measure_ours(engine, ids, arguments)
        for _ in range(arguments.repeats):
            ours.append(measure_ours(engine, ids, arguments))
            if arguments.engine_python is not None:
                theirs.append(measure_theirs(texts, arguments))
    finally:
        engine.close()
    result = {
        "prompt_tokens": sum(map(len, ids)),
        "output_tokens": arguments.prompts * arguments.output,
        "ours": [speed for speed, _ in ours],
        "ours_cpu_s": statistics.median(cpu for _, cpu in ours),
        "theirs": theirs,
        "ratio": statistics.median(s for s, _ in ours) / statistics.median(theirs) if theirs else None,
    }
    if arguments.json:
        print(json.dumps(result))
    else:
        show(result)


def parse() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("url")
    parser.add_argument("--engine", choices=("vllm", "sglang"), default="vllm")
    parser.add_argument(
        "--model", type=Path, required=True, help="the folder that the server was started with"
    )
    parser.add_argument("--served-name", default="student", help="the server's --served-model-name")
    parser.add_argument("--engine-python", type=Path, help="Python of the engine's environment")
    parser.add_argument("--prompts", type=int, default=256)
    parser.add_argument("--input", type=int, default=128, help="tokens of a prompt, about")
    parser.add_argument("--output", type=int, default=128, help="tokens of a response")
    parser.add_argument("--concurrency", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="one line of JSON")
    return parser.parse_args()


def make_texts(tokenizer: Tokenizer, arguments: argparse.Namespace) -> list[str]:
    """Texts of random tokens, all different."""
    rng = random.Random(0)
    plain = [i for i in range(tokenizer.vocab_size) if tokenizer.decode([i]).isprintable()]
    return [
        f"{i} {tokenizer.decode(rng.choices(plain, k=arguments.input))}" for i in range(arguments.prompts)
    ]


def connect(arguments: argparse.Namespace, tokenizer: Tokenizer) -> ServedEngine:
    """Return the engine of a run, without end tokens."""
    api: InferenceApi = VllmApi() if arguments.engine == "vllm" else ToLength()
    return ServedEngine(
        api,
        RunningServers([arguments.url]),
        EngineContext((), tokenizer, torch.device("cpu"), 0, lambda r, g: g(r), lambda work: work()),
        Folder(arguments.model.resolve()),
        padding=range(10**9, 10**9),  # ids are not looked at
        concurrency=arguments.concurrency,
        timeout_s=600.0,
    )


def empty_cache(arguments: argparse.Namespace) -> None:
    """Drop cached prompts."""
    url = arguments.url + EMPTY_CACHE[arguments.engine]
    urllib.request.urlopen(urllib.request.Request(url, data=b"", method="POST")).read()


def measure_ours(
    engine: ServedEngine, ids: Sequence[Sequence[int]], arguments: argparse.Namespace
) -> tuple[float, float]:
    """Return output tokens per second, and the client's CPU seconds."""
    empty_cache(arguments)
    requests = [GenerationRequest(f"p:{i}", 0, token_ids(one)) for i, one in enumerate(ids)]
    start, cpu = time.perf_counter(), time.process_time()
    completions = engine.submit(requests, Sampling(1.0, 1.0, arguments.output, ())).wait(lambda _: None)
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    num = sum(len(completion.response_ids) for completion in completions)
    if num != len(ids) * arguments.output:
        raise SystemExit(f"{num} tokens instead of {len(ids) * arguments.output}")
    return num / seconds, cpu


def measure_theirs(texts: Sequence[str], arguments: argparse.Namespace) -> float:
    """Return output tokens per second of the engine's own tool."""
    empty_cache(arguments)
    with tempfile.TemporaryDirectory() as folder:
        dataset, result = Path(folder) / "prompts.jsonl", Path(folder) / "result.json"
        command = (vllm_command if arguments.engine == "vllm" else sglang_command)(
            texts, dataset, result, arguments
        )
        process = subprocess.run(
            [str(arguments.engine_python), *command], capture_output=True, text=True, check=False
        )
        if process.returncode or not result.is_file():
            sys.exit(process.stdout[-2000:] + process.stderr[-2000:])
        told = json.loads(result.read_text().splitlines()[-1])
    if told["completed"] != len(texts):
        raise SystemExit(f"the tool completed {told['completed']} of {len(texts)} requests")
    return float(told["output_throughput"])


def vllm_command(
    texts: Sequence[str], dataset: Path, result: Path, arguments: argparse.Namespace
) -> list[str]:
    """`vllm bench serve`, whose command needs a distribution that builds for CPUs do not have."""
    dataset.write_text("\n".join(json.dumps({"prompt": text}) for text in texts))
    options: dict[str, object] = {
        "--backend": "vllm",
        "--base-url": arguments.url,
        "--model": arguments.served_name,
        "--tokenizer": arguments.model,
        "--dataset-name": "custom",
        "--dataset-path": dataset,
        "--custom-output-len": arguments.output,
        "--num-prompts": len(texts),
        "--max-concurrency": arguments.concurrency,
        "--temperature": 1.0,
        "--ready-check-timeout-sec": 0,
        "--result-dir": result.parent,
        "--result-filename": result.name,
    }
    flags = ["--skip-chat-template", "--disable-shuffle", "--ignore-eos", "--disable-tqdm", "--save-result"]
    return ["-c", VLLM, *(str(part) for pair in options.items() for part in pair), *flags]


def sglang_command(
    texts: Sequence[str], dataset: Path, result: Path, arguments: argparse.Namespace
) -> list[str]:
    """`sglang.bench_serving`, which reads conversations; the second turn is not used."""
    turns = [
        {"conversations": [{"from": "human", "value": text}, {"from": "gpt", "value": "0 0 0 0 0"}]}
        for text in texts
    ]
    dataset.write_text(json.dumps(turns))
    options: dict[str, object] = {
        "--backend": "sglang",
        "--base-url": arguments.url,
        "--model": arguments.model.resolve(),
        "--dataset-name": "sharegpt",
        "--dataset-path": dataset,
        "--sharegpt-output-len": arguments.output,
        "--num-prompts": len(texts),
        "--max-concurrency": arguments.concurrency,
        "--extra-request-body": json.dumps({"temperature": 1.0}),
        "--warmup-requests": 0,
        "--output-file": result,
    }
    return [
        *("-m", "sglang.bench_serving", "--disable-tqdm"),
        *(str(part) for pair in options.items() for part in pair),
    ]


def show(result: dict[str, Any]) -> None:
    """A table for people."""
    from rich.console import Console
    from rich.table import Table

    table = Table(
        title="{output_tokens:,} tokens to {prompt_tokens:,}".format(**result), title_justify="left"
    )
    for column in ("", "tokens/s, median", "all"):
        table.add_column(column)
    for name in ("ours", "theirs"):
        if speeds := result[name]:
            every = ", ".join(f"{speed:,.0f}" for speed in speeds)
            table.add_row(name, f"{statistics.median(speeds):,.0f}", every)
    Console().print(table)
    print(f"CPU of our client: {result['ours_cpu_s']:.2f} s")
    if result["ratio"] is not None:
        print(f"ours / theirs: {result['ratio']:.3f}")


if __name__ == "__main__":
    main()
