"""How a planned run holds its local teachers, and what streaming them takes."""

from __future__ import annotations

from collections.abc import Iterator
from math import exp

from mergeopd.errors import ModelError
from mergeopd.models.residency import ITEMSIZE, WINDOW, BodySizes, Held, held
from mergeopd.planner.setup import Setup
from mergeopd.planner.shapes import ModelShape
from mergeopd.planner.student_state import OFFLOADED, replica_bytes, student_state
from mergeopd.planner.workload import PhaseWork
from mergeopd.preflight.residency import FREE_SHARE, cache_bytes

READ_AHEAD = "teacher (layers being read)"
_FLOAT32 = 4


def body_sizes(shape: ModelShape, dtype: str) -> BodySizes:
    """Return what `BodySizes.of` reads from a checkpoint, from config.json alone."""
    width = ITEMSIZE[dtype]
    ffn = shape.config.get("intermediate_size") or 4 * shape.hidden
    return BodySizes(
        body=int(shape.body_bytes(dtype)),
        layer=int(shape.layer * shape.matrix_bytes(dtype)),
        stored_layer=int(shape.layer * shape.stored_bytes),
        embedding=shape.embedding * width,
        per_token=shape.hidden * width,
        working=(2 * shape.hidden + 3 * int(ffn)) * width,
        is_copied=shape.is_copied(dtype),
    )


def hold(setup: Setup, name: str) -> Held | None:
    """Decide as a run would on these devices; None for a teacher without a body to read.

    A run counts the memory that is free when it starts; here, nothing else uses the devices.

    Raises ModelError when what the card wants does not fit.
    """
    teacher, shape = setup.teacher(name), setup.shapes[name]
    if not setup.is_loaded(name) or teacher.snapshot_rule is not None:
        return None
    sizes = body_sizes(shape, teacher.dtype)
    is_mapped = setup.hardware.profile.is_cpu and setup.shares_pages and not sizes.is_copied
    is_strict = setup.plan.memory.teacher_gib is not None
    tokens = setup.micro_batch_tokens
    return held(teacher.residency, sizes, tokens, _room(setup), is_mapped=is_mapped, is_strict=is_strict)


def residency_problems(setup: Setup, name: str) -> Iterator[str]:
    """Yield why a teacher fits in no way that its card allows."""
    try:
        hold(setup, name)
    except ModelError as error:
        yield f"teacher '{name}': {error}"


def pass_tokens(setup: Setup, name: str) -> int | None:
    """Return the tokens of a teacher's largest streamed pass; None if it is whole, or fits in no way."""
    try:
        decision = hold(setup, name)
    except ModelError:
        return None
    return None if decision is None else decision.pass_tokens


def num_passes(setup: Setup, work: PhaseWork, name: str) -> int:
    """Return how often a round reads a teacher's body."""
    limit, tokens = pass_tokens(setup, name), _tokens_of_rank(setup, work, name)
    return 1 if limit is None else max(1, -int(-tokens // limit))


def streamed_bytes(setup: Setup, work: PhaseWork, name: str, limit: int) -> Iterator[tuple[str, float]]:
    """Yield the memory of a rank for a streamed pass of at most `limit` tokens."""
    shape, dtype, is_cpu = setup.shapes[name], setup.teacher(name).dtype, setup.hardware.profile.is_cpu
    sizes = body_sizes(shape, dtype)
    # Each rank reads its part of a layer, on a GPU into pinned memory, and gathers the others.
    part, whole = sizes.stored_layer / setup.world, sizes.stored_layer if setup.world > 1 else 0
    window = 1 if sizes.is_copied else min(WINDOW, shape.layers)
    yield "teacher (layers)", window * (part + whole) + (sizes.layer if sizes.is_copied else 0)
    if not is_cpu:
        yield READ_AHEAD, window * part
    tokens = min(float(limit), _tokens_of_rank(setup, work, name))
    yield "teacher (states of a pass)", tokens * sizes.per_token
    rows = used_rows(shape, tokens)
    yield "teacher (embeddings)", rows * shape.hidden * (ITEMSIZE[dtype] + shape.stored_head_bytes)


def streamed_bytes_read(setup: Setup, work: PhaseWork, name: str) -> float:
    """Return the bytes of files that all ranks read in a round for a streamed body."""
    shape, passes = setup.shapes[name], num_passes(setup, work, name)
    tokens = _tokens_of_rank(setup, work, name) / passes
    rows = used_rows(shape, tokens) * setup.world
    layers = shape.stored_body_bytes - shape.embedding * shape.stored_head_bytes
    return passes * (layers + rows * shape.hidden * shape.stored_head_bytes)


def used_rows(shape: ModelShape, tokens: float) -> float:
    """Return the rows of an embedding that so many tokens use if all token ids are equally frequent."""
    return shape.vocab * (1 - exp(-tokens / shape.vocab))


def _tokens_of_rank(setup: Setup, work: PhaseWork, name: str) -> float:
    return sum(group.tokens for group in work.of_teacher(name)) / setup.world


def _room(setup: Setup) -> int:
    """Return the memory that a rank may use for a teacher's pass, as `preflight/residency.py` counts it."""
    limit, profile = setup.plan.memory.teacher_gib, setup.hardware.profile
    if limit is not None:
        return int(limit * 2**30)
    free = profile.memory_gib * 2**30 / (setup.hardware.num_devices if profile.is_cpu else 1)
    state = student_state(setup, 0)
    used = sum(num for part, num in state if part != OFFLOADED or profile.is_cpu) + replica_bytes(setup)
    if not setup.is_megatron:
        used += setup.stage_weights(0) * _FLOAT32  # gradients
    if profile.is_cpu:
        widths = [
            shape.hidden * ITEMSIZE[setup.teacher(name).dtype]
            for name, shape in setup.shapes.items()
            if setup.teacher(name).needs_head
        ]
        used += cache_bytes(setup.plan, widths)
    return max(0, int(FREE_SHARE * free - used))
