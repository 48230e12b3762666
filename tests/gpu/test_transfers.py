"""What leaves and enters the device: hidden states, a copy for a checkpoint, streamed weights, and the host's waits."""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import torch
from enumeration import ANSWERS, engine_round, prompts_of
from host_reads import HostReads
from safetensors.torch import load_file

from mergeopd.distributed.communicator import SingleProcess
from mergeopd.engine.models import Machine, load_models
from mergeopd.preflight.inputs import preflight
from mergeopd.storage.state_parts import StatePart, staged
from mergeopd.teacher.hidden_cache import HiddenCache
from mergeopd.types import Rollout

Record = Callable[[str, object], None]
MIB = 1 << 20


def sizes(device: torch.device) -> tuple[int, int, int]:
    """Responses, tokens of each, and the width of hidden states: 2 GiB on a GPU."""
    return (256, 1024, 4096) if device.type == "cuda" else (8, 16, 64)


def finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def test_hidden_states_come_back_bit_for_bit(device: torch.device, tmp_path: Path, record: Record) -> None:
    num, length, width = sizes(device)
    states = torch.randn(length, width, device=device, dtype=torch.bfloat16)
    expected = [(states + i % 7).cpu() for i in range(num)]
    figures = {}
    for where, budget in (("memory", 1 << 40), ("disk", 0)):
        with HiddenCache(budget, tmp_path / where, device) as cache:
            finish(device)
            start = time.perf_counter()
            for i in range(num):
                buffer = states + i % 7
                cache.put("t", i, buffer)
                if device.type == "cuda":  # a CPU's cache keeps the tensor itself
                    buffer.zero_()
            begun = time.perf_counter() - start
            cache.publish()
            put = time.perf_counter() - start
            start = time.perf_counter()
            actual = cache.gather("t", list(range(num - 1, -1, -1)))
            finish(device)
            gathered = time.perf_counter() - start
            assert actual.device.type == device.type
            for rows, wanted in zip(actual.cpu().split(length), expected[::-1], strict=True):
                assert torch.equal(rows, wanted)
        num_bytes = num * states.nbytes
        figures[where] = {
            "bytes": num_bytes, "host_seconds_of_puts": begun,
            "put_bytes_per_second": num_bytes / put, "gather_bytes_per_second": num_bytes / gathered,
        }  # fmt: skip
    record("hidden_states", figures)


def test_a_staged_checkpoint_is_the_state(device: torch.device, record: Record) -> None:
    """The copy is complete when it is yielded; only it makes training wait."""
    numel = (64 if device.type == "cuda" else 1) * MIB
    parts = [StatePart.full(str(i), torch.randn(numel, device=device)) for i in range(8)]
    seconds = []
    for _ in range(3):  # the first one allocates and pins
        finish(device)
        start = time.perf_counter()
        files = list(staged(parts))
        seconds.append(time.perf_counter() - start)
        copies = {part.name: part.tensor for file in files for part in file.parts}
        assert all(torch.equal(copies[part.name], part.tensor.cpu()) for part in parts)
        assert all(copy.is_pinned() == (device.type == "cuda") for copy in copies.values())
        del files, copies
    num_bytes = 8 * parts[0].tensor.nbytes
    record(
        "checkpoint_copy",
        {"bytes": num_bytes, "first_seconds": seconds[0], "bytes_per_second": num_bytes / min(seconds[1:])},
    )


def test_streamed_teachers_train_the_same_student(
    device: torch.device,
    project: Path,
    command: Callable[..., float],
    shortened: Callable[..., list[str]],
    record: Record,
) -> None:
    """The quickstart's merge with experts streamed from pinned buffers, and with resident ones."""
    exports, figures = [], {}
    cards = [(path, path.read_text()) for path in sorted((project / "teachers").glob("*.yaml"))]
    for residency in ("resident", "stream"):
        for path, text in cards:
            path.write_text(f"{text.rstrip()}\nresidency: {residency}\n")
        output = f"runs/{residency}"
        options = shortened(output, 4, 32, "phases.0.text=student")
        command("-m", "mergeopd", "run", "recipes/quickstart.yaml", *options, cwd=project)
        result = json.loads((project / output / "result.json").read_text())
        figures[residency] = result["seconds"]
        exports.append(load_file(project / output / "export" / "model.safetensors"))
    for path, text in cards:
        path.write_text(text)
    record("streamed_teachers_seconds", figures)
    resident, streamed = exports
    for name, wanted in resident.items():
        torch.testing.assert_close(streamed[name], wanted, rtol=1e-4, atol=1e-4)


@contextmanager
def waits(device: torch.device) -> Iterator[list[str]]:
    """The places at which the host waited for the device; on a CPU, those where it would."""
    places: list[str] = []
    if device.type != "cuda":
        with HostReads() as reads:
            yield places
        places += reads.by_module.elements()
        return
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield places
        finally:
            torch.cuda.set_sync_debug_mode("default")
    places += [f"{w.filename}:{w.lineno}" for w in caught if "synchronizing" in str(w.message)]


def test_waits_of_the_host(device: torch.device, write_job: Callable[..., Path], record: Record) -> None:
    """A round, in 2 micro-batches and in many: at most two more waits per pass, of the kernel and of transformers."""
    phases = [
        {"name": "merge", "updates": 2, "prompts_per_round": 4, "loss": "reverse_kl", "text": "dataset"}
    ]
    counts, places = {}, {}
    for tokens in (100_000, 60, 30):
        recipe = write_job({"phases": phases})
        overrides = [f"student.micro_batch_tokens={tokens}", f"output=out{tokens}"]
        parts = load_models(preflight(recipe, overrides), Machine(device, SingleProcess()))
        render = parts.inputs.student.render
        rollouts = [
            Rollout(p, i, render(p), answer, "student", "length", (-1.0,) * len(answer))
            for p in prompts_of(parts)
            for i, answer in enumerate(ANSWERS)
        ]
        engine_round(parts, rollouts)  # what is compiled or allocated once
        with waits(device) as waited:
            engine_round(parts, rollouts)
        counts[tokens] = len(waited)
        places[tokens] = {place: waited.count(place) for place in sorted(set(waited))}
    record("host_waits_by_micro_batch_tokens", {"counts": counts, "places": places[30]})
    assert all(fewer <= more for fewer, more in pairwise(counts.values()))
    own = [place for place in places[30] if "update_stats" in place]
    assert sum(places[30][place] for place in own) <= 1
