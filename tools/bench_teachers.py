"""Measure memory and reads of N teachers in a real run with random teachers.

    python tools/bench_teachers.py --teachers 8 --rounds 2 --json

Prints the peak of the process's anonymous memory (RssAnon, sampled; it excludes weights mapped from files),
the bytes read by the teacher store, and the bytes of all teacher files. Linux only.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

VOCAB = 16_384
SIZES = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 8}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--teachers", type=int, default=8, help="how many (about 200 MB each)")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--prompts", type=int, default=160, help="of a round, over all teachers")
    parser.add_argument("--folder", type=Path, help="where to make them; default: a temporary folder")
    parser.add_argument("--json", action="store_true", help="print one JSON line")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments.measure, arguments.rounds)))
        return
    with contextlib.ExitStack() as stack:
        folder = arguments.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        recipe = write_job(folder, arguments.teachers, arguments.rounds, arguments.prompts)
        # In a new process, since this one's allocator still holds memory of the models' construction.
        command = [sys.executable, __file__, "--measure", str(recipe), "--rounds", str(arguments.rounds)]
        result = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    if arguments.json:
        print(json.dumps(result))
    else:
        for name, value in result.items():
            print(f"{name:>22}  {value:,}")


def write_job(folder: Path, num_teachers: int, num_rounds: int, num_prompts: int) -> Path:
    """Write student, teachers, prompts and recipe; every teacher has its own domain."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "student" / "model.safetensors").is_file():
        write_model(folder / "student", seed=0, hidden_size=64, intermediate_size=128, num_hidden_layers=2)
    names = [f"t{i}" for i in range(num_teachers)]
    for seed, name in enumerate(names, start=1):
        if not (folder / name / "model.safetensors").is_file():
            write_model(folder / name, seed=seed, **SIZES)
        (folder / f"{name}.yaml").write_text(json.dumps({"card": 1, "name": name, "model": name}))
        rows = [json.dumps({"prompt": f"w{17 * seed + i} w{i}"}) for i in range(80)]
        (folder / f"{name}.jsonl").write_text("\n".join(rows))
    recipe = {
        "recipe": 1,
        "name": "memory",
        "threads": 1,
        # Small micro-batches, filled by every teacher: activations must not depend on the number of teachers.
        "student": {"model": "student", "micro_batch_tokens": 256},
        "teachers": {name: f"{name}.yaml" for name in names},
        "prompts": [{"source": f"{name}.jsonl", "domain": name, "teachers": name} for name in names],
        "rollout": {"max_new_tokens": 16},
        "phases": [
            {"name": "merge", "updates": num_rounds, "loss": "reverse_kl", "prompts_per_round": num_prompts}
        ],
        "checkpoint": {"every": num_rounds},
        "output": f"run-{num_teachers}-{num_rounds}",
    }
    path = folder / f"job-{num_teachers}.yaml"
    path.write_text(json.dumps(recipe))
    return path


def write_model(folder: Path, *, seed: int, **sizes: int) -> None:
    """Write a random Qwen3 with an untied head and a tokenizer of whole words."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=VOCAB,
        num_attention_heads=sizes["hidden_size"] // 32,
        num_key_value_heads=2,
        head_dim=32,
        tie_word_embeddings=False,
        eos_token_id=0,
        **sizes,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)
    words = {"<eos>": 0} | {f"w{i}": i for i in range(1, VOCAB)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<eos>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    template = "{{ messages[0].content }}"
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": "<eos>", "chat_template": template})
    )


def measure(recipe: Path, num_rounds: int) -> dict[str, int]:
    """Run the recipe in this process while another thread watches its memory."""
    import torch

    from mergeopd.distributed.communicator import SingleProcess
    from mergeopd.engine.build import build
    from mergeopd.engine.clock import Clock
    from mergeopd.engine.interrupt import Interrupt
    from mergeopd.engine.models import Machine, load_models
    from mergeopd.engine.progress import Progress
    from mergeopd.preflight.inputs import preflight
    from mergeopd.reporting.events import Reporters

    inputs = preflight(recipe)
    parts = load_models(inputs, Machine(torch.device("cpu"), SingleProcess()))
    with peak_anonymous() as peak:
        trainer = build(parts, reporter=Reporters(), clock=Clock(), interrupt=Interrupt())
        trainer.run(Progress(), None)
    files = [t.folder / "model.safetensors" for t in inputs.plan.teachers.values()]
    return {
        "num_teachers": len(files),
        "num_rounds": num_rounds,
        "file_bytes": sum(file.stat().st_size for file in files),
        "bytes_read": sum(teacher.bytes_read for teacher in parts.teachers.values()),
        "peak_anonymous_bytes": peak[0],
    }


@contextlib.contextmanager
def peak_anonymous() -> Iterator[list[int]]:
    """Yield a list whose single entry becomes the largest RssAnon, in bytes."""
    peak, done = [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.002):
            status = Path("/proc/self/status").read_text()
            anonymous = next(line for line in status.splitlines() if line.startswith("RssAnon"))
            peak[0] = max(peak[0], int(anonymous.split()[1]) * 1024)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()


if __name__ == "__main__":
    main()
