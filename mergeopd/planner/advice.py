"""Settings that would shorten a run: each candidate is estimated again, and kept if it saves enough."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from mergeopd.planner.residency import pass_tokens
from mergeopd.planner.setup import Setup
from mergeopd.reporting.estimate import Change, Estimate

_WORTH, _SHOWN = 0.05, 4
Again = Callable[[Setup], Estimate]


def changes(setup: Setup, now: Estimate, again: Again) -> tuple[Change, ...]:
    """Return the changes that save at least a twentieth of the run, the largest saving first.

    Each is alone, and changes neither the objective nor the number of tokens.
    """
    worthwhile = []
    for settings, effect, candidate in _candidates(setup):
        result = again(candidate)
        if result.seconds <= (1 - _WORTH) * now.seconds:
            worthwhile.append(Change(settings, effect, result.seconds, result.peak_bytes, result.fits))
    worthwhile.sort(key=lambda change: (not change.fits, change.seconds))
    return tuple(worthwhile[:_SHOWN])


def _candidates(setup: Setup) -> Iterator[tuple[dict[str, Any], str, Setup]]:
    plan = setup.plan
    size = setup.micro_batch_tokens
    for factor in (2, 4):
        more = size * factor
        effect = "fewer, larger passes"
        yield {"student.micro_batch_tokens": more}, effect, setup.changed(micro_batch_tokens=more)
    if plan.student.dtype == "float32":
        yield (
            {"student.dtype": "bfloat16"},
            "half the bytes; rounded weights",
            setup.changed(dtype="bfloat16"),
        )
    if plan.student.parallel.recompute:
        parallel = plan.student.parallel.model_copy(update={"recompute": False})
        change = {"student.parallel.recompute": False}
        yield change, "no second forward pass; more memory", setup.changed(parallel=parallel)
    if setup.is_megatron:
        yield from _grids(setup)
    yield from _teachers(setup)
    yield from _residencies(setup)
    yield from _rollouts(setup)


def _grids(setup: Setup) -> Iterator[tuple[dict[str, Any], str, Setup]]:
    """Yield the grids with half as many ways of one kind, and twice as many processes."""
    parallel = setup.plan.student.parallel
    for key in ("tensor", "pipeline"):
        ways = getattr(parallel, key)
        if ways > 1 and ways % 2 == 0:
            own = {key: ways // 2} | ({"sequence": False} if key == "tensor" and ways == 2 else {})
            less = parallel.model_copy(update=own)
            yield (
                {f"student.parallel.{name}": value for name, value in own.items()},
                "more data-parallel copies, fewer messages",
                setup.changed(parallel=less),
            )
    devices = 2 * setup.hardware.num_devices
    if not setup.hardware.profile.is_cpu:
        yield {"devices": devices}, "more data-parallel copies", setup.changed(num_devices=devices)


def _teachers(setup: Setup) -> Iterator[tuple[dict[str, Any], str, Setup]]:
    """Yield teachers in the dtype of their files, without conversion, all at once."""
    odd = [
        name
        for name in setup.loaded_teachers
        if setup.shapes[name].stored in ("float32", "bfloat16")
        and setup.teacher(name).dtype != setup.shapes[name].stored
        and setup.teacher(name).student is None
    ]
    if odd:
        dtypes = {name: setup.shapes[name].stored for name in odd}
        settings = {f"teachers.{name}.dtype": dtype for name, dtype in dtypes.items()}
        yield settings, "no conversion of weights", setup.with_teachers(dtypes)


def _residencies(setup: Setup) -> Iterator[tuple[dict[str, Any], str, Setup]]:
    """Yield all teachers streamed, and more memory for those that are read several times a round."""
    whole = [name for name in setup.read_teachers if pass_tokens(setup, name) is None]
    if whole:
        settings = {f"teachers.{name}.card.residency": "stream" for name in whole}
        yield settings, "in the cards: weights are read while layers are computed", setup.with_streamed(whole)
    limit = setup.plan.memory.teacher_gib
    if limit is not None and len(whole) < len(setup.read_teachers):
        yield {"memory.teacher_gib": 2 * limit}, "fewer passes", setup.with_teacher_gib(2 * limit)


def _rollouts(setup: Setup) -> Iterator[tuple[dict[str, Any], str, Setup]]:
    """Yield larger batches of decoding."""
    own = setup.plan.rollout.batch_size
    for factor in (2, 4):
        size = own * factor
        yield {"rollout.batch_size": size}, "more sequences per decoding step", setup.with_batch(size)
