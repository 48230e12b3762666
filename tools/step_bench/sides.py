"""The sides of bench_step.py: mergeopd, TRL, and only the matrix products. Each runs in its own process."""

from __future__ import annotations

import argparse
import json
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from step_bench.job import model_sizes

if TYPE_CHECKING:
    from mergeopd.reporting.events import Event

NEVER = -1  # a stop token that cannot be sampled, so every response has its full length


class Steps:
    """Runs a step when the parent process requests it, and reports its times."""

    def __init__(self, answers: TextIO) -> None:
        self._answers = answers
        self._wall = self._cpu = 0.0

    def begin(self) -> None:
        """Wait for the request of a step, and begin it."""
        sys.stdin.readline()
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def elapsed(self) -> float:
        return time.perf_counter() - self._wall

    def end(self, stages: dict[str, float]) -> None:
        """End the step; `stages` are its parts."""
        row = {"s": self.elapsed(), "cpu_s": time.process_time() - self._cpu, **stages}
        row["rss"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        self._answers.write(json.dumps(row) + "\n")
        self._answers.flush()


def run_mergeopd(arguments: argparse.Namespace, steps: Steps) -> None:
    """Run the engine's own loop over the recipe."""
    import torch

    from mergeopd.distributed.communicator import SingleProcess
    from mergeopd.engine.build import build
    from mergeopd.engine.clock import Clock
    from mergeopd.engine.interrupt import Interrupt
    from mergeopd.engine.models import Machine, load_models
    from mergeopd.engine.progress import Progress
    from mergeopd.preflight.inputs import preflight
    from mergeopd.reporting.events import RunStarted, UpdateDone
    from mergeopd.storage.run_folder import RunFolder

    expected = arguments.batch * arguments.new_tokens

    class StepReporter:
        def emit(self, event: Event) -> None:
            if isinstance(event, UpdateDone):
                if event.num_tokens != expected:
                    raise ValueError(f"a step had {event.num_tokens} tokens, not {expected}")
                parts = {name: event.seconds[name] for name in ("rollout", "teachers", "update")}
                steps.end(
                    {
                        "generation_s": parts["rollout"],
                        "teacher_s": parts["teachers"],
                        "update_s": parts["update"],
                    }
                )
            if isinstance(event, UpdateDone | RunStarted):
                steps.begin()

    inputs = preflight(arguments.folder / "recipe.yaml")
    inputs = replace(inputs, student=replace(inputs.student, eos_ids=(NEVER,)))
    with tempfile.TemporaryDirectory() as output:
        parts = load_models(inputs, Machine(torch.device("cpu"), SingleProcess()))
        trainer = build(parts, reporter=StepReporter(), clock=Clock(), interrupt=Interrupt())
        replace(trainer, folder=RunFolder(Path(output))).run(Progress(), None)


def run_trl(arguments: argparse.Namespace, steps: Steps) -> None:
    """Run DistillationTrainer with gradient checkpointing off."""
    import torch
    from datasets import Dataset  # type: ignore[import-not-found, unused-ignore]
    from transformers import AutoTokenizer, TrainerCallback
    from trl import (  # type: ignore[import-not-found, unused-ignore]
        DistillationConfig,
        DistillationTrainer,
    )

    torch.set_num_threads(1)
    spent = {"generation_s": 0.0, "teacher_s": 0.0}

    class StepCallback(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, *_: object, **__: object) -> None:
            spent.update(generation_s=0.0, teacher_s=0.0)
            steps.begin()

        def on_step_end(self, *_: object, **__: object) -> None:
            steps.end({**spent, "update_s": steps.elapsed() - sum(spent.values())})

    rows = (arguments.folder / "prompts.jsonl").read_text().splitlines()
    with tempfile.TemporaryDirectory() as output:
        trainer = DistillationTrainer(
            model=str(arguments.folder / "student"),
            teacher_model=str(arguments.folder / "teacher"),
            args=DistillationConfig(
                output_dir=output,
                use_cpu=True,
                bf16=False,
                gradient_checkpointing=False,
                per_device_train_batch_size=arguments.batch,
                max_steps=arguments.steps + 1,
                max_completion_length=arguments.new_tokens,
                generation_kwargs={"eos_token_id": NEVER},
                beta=1.0,
                learning_rate=1e-5,
                lr_scheduler_type="constant",
                optim="adamw_torch_fused",
                logging_strategy="no",
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
            ),
            train_dataset=Dataset.from_list([json.loads(row) for row in rows]),
            processing_class=AutoTokenizer.from_pretrained(arguments.folder / "student"),
            callbacks=[StepCallback()],
        )
        trainer.eos_token_ids = [NEVER]
        trainer._generate_single_turn = _timed(
            trainer._generate_single_turn, spent, "generation_s", lambda: True
        )
        trainer._get_last_hidden_state = _timed(
            trainer._get_last_hidden_state, spent, "teacher_s", lambda: not torch.is_grad_enabled()
        )
        trainer.train()


def _timed(
    work: Callable[..., Any], spent: dict[str, float], name: str, counts: Callable[[], bool]
) -> Callable[..., Any]:
    """Wrap `work` to add the seconds of calls that count to `spent[name]`."""

    def wrapper(*values: Any, **named: Any) -> Any:
        start = time.perf_counter()
        result = work(*values, **named)
        if counts():
            spent[name] += time.perf_counter() - start
        return result

    return wrapper


def run_bound(arguments: argparse.Namespace, steps: Steps) -> None:
    """Run only the matrix products that any implementation needs, in preallocated buffers.

    Attention's own products, elementwise work, copies and the optimizer are left out.
    """
    import torch

    torch.set_num_threads(1)
    sizes = model_sizes(arguments)
    d, wide = sizes["hidden_size"], sizes["intermediate_size"]
    queries = sizes["num_attention_heads"] * sizes["head_dim"]
    keys = sizes["num_key_value_heads"] * sizes["head_dim"]
    layer = [(d, queries), (d, keys), (d, keys), (queries, d), (d, wide), (d, wide), (wide, d)]
    # Zeros are written, so that all pages exist and repeated products do not overflow.
    weights = [torch.full((n, k), 0.0) for _ in range(sizes["num_hidden_layers"]) for k, n in layer]
    head, d_head = torch.full((arguments.vocab, d), 0.0), torch.full((arguments.vocab, d), 0.0)
    prompt, answer = arguments.batch * arguments.prompt, arguments.batch * arguments.new_tokens
    inputs = {k: torch.full((prompt + answer, k), 0.0) for k in (d, queries, wide)}
    outputs = {n: torch.full((prompt + answer, n), 0.0) for n in (d, queries, keys, wide)}
    gradients = {tuple(w.shape): torch.full_like(w, 0.0) for w in weights}
    logits = torch.full((256, arguments.vocab), 0.0)

    def forward(rows: int) -> None:
        for w in weights:
            torch.mm(inputs[w.shape[1]][:rows], w.t(), out=outputs[w.shape[0]][:rows])

    def backward(rows: int) -> None:
        for w in weights:
            torch.mm(outputs[w.shape[0]][:rows], w, out=inputs[w.shape[1]][:rows])
            torch.mm(outputs[w.shape[0]][:rows].t(), inputs[w.shape[1]][:rows], out=gradients[tuple(w.shape)])

    def generation() -> None:
        forward(prompt)
        for step in range(arguments.new_tokens):
            if step:
                forward(arguments.batch)
            torch.mm(inputs[d][: arguments.batch], head.t(), out=logits[: arguments.batch])

    def update() -> None:
        forward(prompt + answer)
        for start in range(0, answer, 256):
            rows = slice(start, min(start + 256, answer))
            z = logits[: rows.stop - rows.start]
            torch.mm(inputs[d][rows], head.t(), out=z)
            torch.mm(inputs[d][rows], head.t(), out=z)
            torch.mm(z, head, out=outputs[d][rows])
            d_head.addmm_(z.t(), inputs[d][rows])
        backward(prompt + answer)

    stages = {"generation_s": generation, "teacher_s": lambda: forward(prompt + answer), "update_s": update}
    for _ in range(arguments.steps + 1):
        steps.begin()
        seconds = {}
        for name, work in stages.items():
            start = time.perf_counter()
            work()
            seconds[name] = time.perf_counter() - start
        steps.end(seconds)


RUNNERS = {"mergeopd": run_mergeopd, "trl": run_trl, "bound": run_bound}
