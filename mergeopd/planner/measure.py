"""Measure this machine's profile: products by size, bandwidths, passes of small models, overheads.

The only module of this package that imports torch. On a CPU one thread is measured, in seconds that it
computes, so that other work on the machine counts little.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mergeopd.errors import ProcessError
from mergeopd.loss.divergence import ReverseKL
from mergeopd.loss.fused import fused_loss
from mergeopd.loss.heads import Head, Hidden
from mergeopd.models.causal import DTYPES, pick_device
from mergeopd.planner.profile import Elementwise, Hardware, Overheads, Profile, Rate, this_cpu
from mergeopd.planner.roofline import ELEMENTWISE, Device
from mergeopd.planner.shapes import ITEMSIZE, ModelShape
from mergeopd.rollout.sampling import sample

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_GIB = 2**30
_SIDES_CPU = (1, 4, 8, 16, 32, 64, 256, 1024)
_SIDES_GPU = (1, 16, 64, 256, 1024, 4096, 8192)
_START = "from mergeopd.planner.measure import report_process; report_process"
_HEAD_ROWS = 8192
_WEIGHTS_BYTES, _FEW_ROWS = 128 << 20, 64
_DISK_BYTES, _COPIED, _TRAINED = 128 << 20, 32 << 20, 1 << 20
_HIDDEN, _REPEATS = (256, 512), 5


@dataclass(frozen=True)
class Bench:
    """Times work on a device: the fastest of some repeats."""

    device: torch.device

    def seconds(self, work: Callable[[], object]) -> float:
        """Return the seconds of `work`: those that it computes on a CPU, those that pass on a GPU."""
        is_cpu = self.device.type == "cpu"
        clock = time.process_time if is_cpu else time.perf_counter
        work()
        fastest = float("inf")
        for _ in range(_REPEATS):
            self._wait()
            start = clock()
            work()
            self._wait()
            fastest = min(fastest, clock() - start)
        return max(fastest, 1e-9)

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def measure(announce: Callable[[str], None], folder: Path | None = None) -> Profile:
    """Measure the first GPU, or one thread of the CPU; `folder` is on the disk whose reads are timed."""
    device = pick_device()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _measure(Bench(device), announce, folder)
    finally:
        torch.set_num_threads(threads)


def _measure(bench: Bench, announce: Callable[[str], None], folder: Path | None) -> Profile:
    is_cpu = bench.device.type == "cpu"
    announce("matrix products")
    rates = {name: _rate(bench, dtype) for name, dtype in _dtypes(bench.device).items()}
    announce("memory")
    bandwidth = _memory_bandwidth(bench)
    announce("disk")
    disk = _disk_bandwidth(folder)
    profile = this_cpu()
    cores = profile.cores or 1
    name = "cpu" if is_cpu else torch.cuda.get_device_name(bench.device)
    total = profile.memory_gib if is_cpu else torch.cuda.mem_get_info(bench.device)[1] / _GIB
    first = profile.model_copy(
        update={
            "name": "this machine",
            "title": f"{cores} cores" if is_cpu else name,
            "kind": "cpu" if is_cpu else "gpu",
            "sources": (f"measured by mergeopd plan --measure with torch {torch.__version__} on {name}",),
            "per_machine": 1 if is_cpu else torch.cuda.device_count(),
            "memory_gib": round(total, 2),
            "usable": 0.9 if is_cpu else 0.92,
            "host_memory_gib": None if is_cpu else round(profile.memory_gib, 1),
            **(
                _processes(profile, announce) if is_cpu else {"process_bytes": 0.0, "grid_process_bytes": 0.0}
            ),
            "rates": rates,
            "memory_bandwidth": bandwidth,
            "host_bandwidth": bandwidth if is_cpu else _host_bandwidth(bench),
            "disk_bandwidth": disk,
        }
    )
    announce("passes of small models")
    return _with_passes(bench, first)


def _with_passes(bench: Bench, profile: Profile) -> Profile:
    """Add overheads from a tiny model, and what is left of larger ones' time as elementwise work."""
    tiny = _Model(bench, hidden=32, layers=6)
    forward, backward = tiny.passes(1, 4)
    decode = tiny.decode(1, 8)
    shallow = _Model(bench, hidden=32, layers=2).decode(1, 8)
    per_layer = max((decode - shallow) / 4, 1e-7)
    overheads = Overheads(
        forward_layer_s=forward / 6,
        backward_layer_s=backward / 6,
        decode_layer_s=per_layer,
        decode_step_s=max(decode - 6 * per_layer, 0.0) + _sampling_overhead(bench),
        grid_layer_s=profile.overheads.grid_layer_s,
        message_s=profile.overheads.message_s,
        update_s=profile.overheads.update_s,
    )
    known = profile.model_copy(update={"overheads": overheads, "attention": _attention(bench, profile)})
    shared = {"sampling": _sampling_rate(bench), "optimizer": _optimizer_rate(bench)}
    rates = {name: _elementwise(bench, known, name, shared) for name in ("float32", "bfloat16")}
    return known.model_copy(update={"elementwise": rates})


def _elementwise(bench: Bench, profile: Profile, dtype: str, shared: Mapping[str, float]) -> Elementwise:
    """Measure passes of two sizes in a dtype, and the loss."""
    rates: dict[str, list[float]] = {"forward": [], "backward": []}
    for hidden in _HIDDEN:
        model = _Model(bench, hidden=hidden, layers=4, dtype=dtype)
        for kind, seconds in zip(rates, model.passes(16, 96), strict=True):
            rates[kind].append(_elementwise_rate(profile, model.shape, kind, seconds, dtype))
    means = {kind: sum(own) / len(own) for kind, own in rates.items()}
    return Elementwise(**means, loss=_loss_rate(bench, profile, dtype), **shared)


def _elementwise_rate(profile: Profile, shape: ModelShape, kind: str, seconds: float, dtype: str) -> float:
    """Return bytes per second, from what products, attention and overheads leave of a pass's seconds."""
    tokens, positions = 16 * 96.0, 16 * 96 * 97 / 2
    parts = getattr(Device(_single(profile)), kind)(shape, tokens, positions, dtype, 1)
    num_bytes = parts.pop(ELEMENTWISE)
    left = max(seconds - parts.total, 0.1 * seconds)
    return float(num_bytes / left)


def _unit() -> Elementwise:
    """Return rates of one byte per second, so that seconds are bytes."""
    return Elementwise(forward=1.0, backward=1.0, loss=1.0, sampling=1.0, optimizer=1.0)


def _single(profile: Profile) -> Hardware:
    """Return one thread, or one GPU, whose elementwise seconds are bytes."""
    own = profile.model_copy(update={"elementwise": {"float32": _unit()}})
    return Hardware("this machine", own, 1, num_threads=1)


def _dtypes(device: torch.device) -> dict[Any, torch.dtype]:
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    return dtypes | ({"float64": torch.float64} if device.type == "cpu" else {})


def _rate(bench: Bench, dtype: torch.dtype) -> Rate:
    """Measure `[s, n] x [n, n]` for growing s; a side of 1 is bound by memory."""
    table = []
    for side in _SIDES_CPU if bench.device.type == "cpu" else _SIDES_GPU:
        wide = max(side, 1024)
        states = torch.randn(side, wide, device=bench.device).to(dtype)
        # As many weights as a model has, so that they do not stay in a cache.
        number = max(1, (_WEIGHTS_BYTES if side <= _FEW_ROWS else 1) // (wide * wide * states.itemsize))
        weights = [torch.randn(wide, wide, device=bench.device).to(dtype) for _ in range(number)]

        def products(states: Tensor = states, weights: list[Tensor] = weights) -> None:
            for weight in weights:
                torch.nn.functional.linear(states, weight)

        table.append((side, 2.0 * side * wide * wide * number / bench.seconds(products)))
    return Rate(peak=max(rate for _, rate in table), attainable=1.0, table=tuple(table))


def _memory_bandwidth(bench: Bench) -> float:
    source = torch.zeros(_COPIED, device=bench.device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / bench.seconds(lambda: target.copy_(source))


def _host_bandwidth(bench: Bench) -> float:
    source = torch.zeros(64 << 20, dtype=torch.uint8).pin_memory()
    target = torch.empty_like(source, device=bench.device)
    return source.nbytes / bench.seconds(lambda: target.copy_(source))


def _disk_bandwidth(folder: Path | None) -> float:
    """Read a file that was written and dropped from the file cache; wall time, since disks are waited for."""
    size = _DISK_BYTES
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        file.write(os.urandom(size))
        file.flush()
        os.fsync(file.fileno())
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        start = time.perf_counter()
        with open(file.name, "rb", buffering=0) as again:
            while again.read(1 << 24):
                pass
        return size / (time.perf_counter() - start)


def _processes(profile: Profile, announce: Callable[[str], None]) -> dict[str, Any]:
    """Measure a process with all that a run imports, and two of a grid if Megatron is installed."""
    announce("processes")
    alone = _started(1)[0]
    measured: dict[str, Any] = {"process_bytes": float(alone["bytes"])}
    if importlib.util.find_spec("megatron") is None:
        return measured
    of_grid = _started(2)[0]
    overheads = profile.overheads.model_copy(update={"message_s": of_grid["message_s"]})
    return measured | {
        "grid_process_bytes": float(max(of_grid["bytes"] - alone["bytes"], 0)),
        "link_bandwidth": of_grid["bandwidth"],
        "link_attainable": 1.0,
        "overheads": overheads,
    }


def _started(number: int) -> list[dict[str, float]]:
    """Start processes that measure themselves, and return what each has found."""
    with tempfile.TemporaryDirectory() as folder:
        calls = [f"{_START}({rank}, {number}, {str(Path(folder) / 'store')!r})" for rank in range(number)]
        processes = [
            subprocess.Popen(
                [sys.executable, "-c", call], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )
            for call in calls
        ]
        outputs = [process.communicate() for process in processes]
    for process, (_, errors) in zip(processes, outputs, strict=True):
        if process.returncode:
            raise ProcessError(f"a process that measures itself failed: {errors.strip().splitlines()[-1]}")
    return [json.loads(output.splitlines()[-1]) for output, _ in outputs]


def report_process(rank: int, number: int, store: str) -> None:
    """Print this process's memory after a run's imports and a pass, and the cost of sums over a group."""
    import psutil

    import mergeopd.engine.run

    torch.set_num_threads(1)
    measured: dict[str, float] = {}
    if number > 1:
        import torch.distributed as dist

        import mergeopd.student.megatron.step  # noqa: F401

        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=number)
    model = _Model(Bench(torch.device("cpu")), hidden=32, layers=1)
    model.passes(1, 4)
    model.decode(1, 2)
    # Not the most that it had: Linux counts what the parent had when it started this process.
    measured["bytes"] = psutil.Process().memory_info().rss
    if number > 1:
        bench, small, large = Bench(torch.device("cpu")), torch.zeros(16), torch.zeros(4 << 20)
        measured["message_s"] = bench.seconds(lambda: dist.all_reduce(small))
        # Two processes send a tensor once each way.
        measured["bandwidth"] = large.nbytes / bench.seconds(lambda: dist.all_reduce(large))
        dist.destroy_process_group()
    print(json.dumps(measured))


class _Model:
    """A random Qwen3 on the device."""

    def __init__(self, bench: Bench, *, hidden: int, layers: int, dtype: str = "float32") -> None:
        from transformers import Qwen3Config, Qwen3Model

        config = Qwen3Config(
            vocab_size=64,
            hidden_size=hidden,
            intermediate_size=3 * hidden,
            num_hidden_layers=layers,
            num_attention_heads=max(hidden // 64, 1),
            num_key_value_heads=max(hidden // 128, 1),
            head_dim=64,
        )
        self._bench = bench
        self._model: PreTrainedModel = Qwen3Model(config).to(bench.device, DTYPES[dtype])
        with tempfile.TemporaryDirectory() as folder:
            config.architectures = ["Qwen3ForCausalLM"]
            config.save_pretrained(folder)
            self.shape = ModelShape.read(Path(folder))

    def passes(self, rows: int, tokens: int) -> tuple[float, float]:
        """Return seconds forward, and backward, over `rows` sequences."""
        ids = torch.zeros(rows, tokens, dtype=torch.long, device=self._bench.device)

        def forward() -> Tensor:
            hidden: Tensor = self._model(input_ids=ids, use_cache=False).last_hidden_state
            return hidden

        def both() -> None:
            states = forward()
            states.backward(torch.ones_like(states))  # type: ignore[no-untyped-call]
            self._model.zero_grad()

        alone = self._bench.seconds(forward)
        return alone, max(self._bench.seconds(both) - alone, 1e-9)

    @torch.no_grad()
    def decode(self, rows: int, steps: int) -> float:
        """Return seconds of a decoding step."""
        from transformers import DynamicCache

        ids = torch.zeros(rows, 1, dtype=torch.long, device=self._bench.device)

        def run() -> None:
            cache = DynamicCache(config=self._model.config)
            for position in range(steps):
                place = torch.full((rows, 1), position, device=self._bench.device)
                self._model(input_ids=ids, position_ids=place, past_key_values=cache, use_cache=True)

        return self._bench.seconds(run) / steps


def _attention(bench: Bench, profile: Profile) -> float:
    """Return the share of the rate of products with the same head size that causal attention reaches."""
    shape = (8, 4, 256, 64)
    query, key, value = (torch.randn(shape, device=bench.device) for _ in range(3))

    def attend() -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)

    flops = 4 * 8 * 4 * 64 * 256 * 257 / 2
    return min(1.0, flops / bench.seconds(attend) / profile.rate("float32", 64))


def _loss_rate(bench: Bench, profile: Profile, dtype: str) -> float:
    """Return bytes of logits per second in the loss kernel, beyond its products."""
    rows, hidden = 1024, 256
    options: dict[str, Any] = {"device": bench.device, "dtype": DTYPES[dtype]}
    states = torch.randn(rows, hidden, **options, requires_grad=True)
    head = Head(torch.randn(_HEAD_ROWS, hidden, **options).mul_(0.05).requires_grad_())
    other = Hidden(torch.randn(rows, hidden, **options), Head(head.weight.detach().clone()))
    labels = torch.zeros(rows, dtype=torch.long, device=bench.device)

    def loss() -> None:
        value, _ = fused_loss(
            states, head, [other], labels, lambda stats, _: stats.divergence[0, 0], divergences=(ReverseKL(),)
        )
        value.backward()  # type: ignore[no-untyped-call]
        states.grad = head.weight.grad = None

    seconds = bench.seconds(loss)
    shape = replace(_Model(bench, hidden=hidden, layers=1).shape, vocab=_HEAD_ROWS)
    parts = Device(_single(profile)).loss(shape, {"teacher": shape}, rows, dtype=dtype, gradient=True)
    num_bytes = parts.pop(ELEMENTWISE)
    return float(num_bytes / max(seconds - parts.total, 0.1 * seconds))


def _sampling(bench: Bench, rows: int, vocab: int) -> float:
    logits = torch.randn(rows, vocab, device=bench.device)
    uniform = torch.rand(rows, device=bench.device)
    return bench.seconds(lambda: sample(logits.clone(), uniform, 1.0, 1.0))


def _sampling_overhead(bench: Bench) -> float:
    return _sampling(bench, 1, 16)


def _sampling_rate(bench: Bench) -> float:
    rows = 64
    seconds = max(_sampling(bench, rows, _HEAD_ROWS) - _sampling_overhead(bench), 1e-9)
    return 4 * rows * _HEAD_ROWS * ITEMSIZE["float32"] / seconds


def _optimizer_rate(bench: Bench) -> float:
    """Return bytes per second of an AdamW step with clipping, counted as the roofline does."""
    weights = [torch.zeros(_TRAINED, device=bench.device, requires_grad=True) for _ in range(8)]
    optimizer = torch.optim.AdamW(weights, 1e-5, fused=True)
    for weight in weights:
        weight.grad = torch.zeros_like(weight)

    def step() -> None:
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()

    return 10 * 4 * sum(weight.numel() for weight in weights) / bench.seconds(step)
