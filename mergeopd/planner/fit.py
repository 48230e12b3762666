"""Search for grids and micro-batches that fit, by estimating each."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from mergeopd.planner.memory import stage_memory
from mergeopd.planner.residency import pass_tokens, residency_problems
from mergeopd.planner.setup import Setup
from mergeopd.recipe.models import Parallel
from mergeopd.reporting.estimate import Estimate, Fitted
from mergeopd.student.megatron.architecture import count_problem

_MOST_DEVICES, _SHOWN = 1024, 5
_MICRO_BATCHES = (1024, 2048, 4096, 8192, 16384, 32768, 65536)
Again = Callable[[Setup], Estimate]


def fitted(setup: Setup, again: Again) -> tuple[Fitted, ...]:
    """Return the fastest settings that fit on the setup's devices, the fastest first.

    Settings are grids of these devices, micro-batch sizes and recomputation; a student of `backend: torch`
    has only its micro-batch.
    """
    fitting = [_fitted(candidate, again(candidate)) for candidate in _candidates(setup)]
    # Of settings with about one time, the one with the most room.
    ranked = sorted(
        fitting, key=lambda one: (round(one.seconds, -1 if one.seconds > 1000 else 1), one.peak_bytes)
    )
    return tuple(ranked[:_SHOWN])


def nearest(setup: Setup, again: Again) -> str | None:
    """Return the smallest change that makes a run fit, in words with its numbers; None if none does."""
    of_here = fitted(setup, again)
    if of_here:
        best = min(of_here, key=lambda one: one.seconds)
        return f"what works on these devices: {describe(best)}"
    devices = setup.hardware.num_devices
    while setup.is_megatron and not setup.hardware.profile.is_cpu and devices < _MOST_DEVICES:
        devices *= 2
        more = fitted(setup.changed(num_devices=devices), again)
        if more:
            return f"what works: {devices} devices with {describe(more[0])}"
    return None


def describe(one: Fitted) -> str:
    """Return settings as keys of a recipe."""
    words = f"micro_batch_tokens {one.micro_batch_tokens:,}, rollout.batch_size {one.batch_size}"
    if one.backend == "megatron":
        words = f"{one.grid}, {words}" + (", recompute" if one.recompute else "")
    if one.streamed:
        words += f", {', '.join(one.streamed)} with `residency: stream` in the card"
    return f"{words} ({one.peak_bytes / 2**30:,.1f} GiB)"


def _fitted(setup: Setup, result: Estimate) -> Fitted:
    return Fitted(
        backend=setup.plan.student.backend,
        grid=setup.grid,
        micro_batch_tokens=setup.micro_batch_tokens,
        recompute=setup.plan.student.parallel.recompute,
        batch_size=setup.plan.rollout.batch_size,
        seconds=result.seconds,
        peak_bytes=result.peak_bytes,
        streamed=tuple(n for n in setup.read_teachers if pass_tokens(setup, n) is not None),
    )


def _candidates(setup: Setup) -> Iterator[Setup]:
    """Yield settings that fit, each with the largest batch of decoding up to the recipe's."""
    sizes = sorted({*_MICRO_BATCHES, setup.micro_batch_tokens})
    for parallel in _grids(setup):
        for size in sizes:
            batch = setup.plan.rollout.batch_size
            while batch >= 1:
                own = setup.changed(parallel=parallel, micro_batch_tokens=size).with_batch(batch)
                # As the cards say, or else with all teachers streamed.
                candidates = own, own.with_streamed(own.read_teachers)
                candidate = next(filter(_fits, candidates), None)
                if candidate is not None:
                    yield candidate
                    break
                batch //= 2


def _fits(setup: Setup) -> bool:
    if any(problem for name in setup.shapes for problem in residency_problems(setup, name)):
        return False
    stages, hardware = stage_memory(setup), setup.hardware.with_devices(setup.world)
    host = hardware.host_limit_bytes
    in_host = max(stage.total("host") for stage in stages)
    return max(stage.total() for stage in stages) <= hardware.limit_bytes and (
        host is None or in_host <= host
    )


def _grids(setup: Setup) -> Iterator[Parallel]:
    """Yield the grids of all devices: tensor within a machine, and what divides the model's sizes."""
    if not setup.is_megatron:
        yield setup.plan.student.parallel
        return
    world, arch, own = setup.hardware.num_devices, setup.architecture, setup.plan.student.parallel
    for tensor in (n for n in range(1, setup.hardware.per_machine + 1) if world % n == 0):
        for pipeline in (n for n in range(1, setup.student.layers + 1) if world // tensor % n == 0):
            is_mixture = arch is not None and arch.experts is not None
            for expert in range(1, (world // pipeline if is_mixture else 1) + 1):
                sequence = tensor > 1 and (own.sequence or is_mixture)
                sizes = {"tensor": tensor, "pipeline": pipeline, "expert": expert}
                if count_problem(world, **sizes, context=own.context):
                    continue
                if arch is not None and arch.split_problems(**sizes, sequence=sequence):
                    continue
                for recompute in (False, True):
                    yield own.model_copy(update=sizes | {"sequence": sequence, "recompute": recompute})
