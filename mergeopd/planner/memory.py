"""Memory of a rank in each stage of a round, by part. Pure arithmetic on sizes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import ceil

from mergeopd.planner.residency import READ_AHEAD, pass_tokens, streamed_bytes
from mergeopd.planner.setup import Setup
from mergeopd.planner.shapes import ITEMSIZE, ModelShape
from mergeopd.planner.student_state import (
    CHECKPOINT,
    OFFLOADED,
    checkpoint_copy,
    replica_bytes,
    student_state,
)
from mergeopd.planner.workload import PhaseWork
from mergeopd.reporting.estimate import MemoryPart, StageMemory

# As in `loss/slicing.py`: rows of a product on a CPU, and bytes of a chunk's logits elsewhere.
_CPU_ROWS, _CHUNK_BYTES, _BLOCK_BYTES = 256, 1 << 30, 2 << 20
# There too, for the Triton kernels: bytes of all logits, of logit gradients, and the multiple of their rows.
_TRITON_LOGITS, _TRITON_GRADIENT, _TRITON_ROWS = 3 << 27, 9 << 26, 64
# As in `teacher/weight_reader.py`: bytes that are gathered at once.
_GATHERED_BYTES = 256 << 20
_FLOAT32 = 4


def stage_memory(setup: Setup) -> tuple[StageMemory, ...]:
    """Return the memory of the rank that needs most, by stage."""
    stages = range(setup.grid.pipeline if setup.is_megatron else 1)
    # All ranks of a pipeline stage need the same; with many stages, the ends and the middle differ.
    chosen = sorted({stages[0], stages[len(stages) // 2], stages[-1]})
    by_rank = [_of_rank(setup, stage) for stage in chosen]
    return max(by_rank, key=lambda own: max(stage.total() for stage in own))


def _of_rank(setup: Setup, stage: int) -> tuple[StageMemory, ...]:
    """Return the memory of a rank of this pipeline stage."""
    always = dict(_always(setup, stage))
    rollout: dict[str, float] = {}
    teachers: dict[str, float] = {}
    update: dict[str, float] = {}
    for work in setup.phases:
        _largest(rollout, dict(_rollout(setup, work)))
        _largest(teachers, dict(_teachers(setup, work)))
        _largest(update, dict(_update(setup, work, stage)))
    made = {"rollout": rollout, "teachers": teachers, "update": update}
    if setup.hardware.profile.is_cpu:
        _keep_freed(setup, made)
    return tuple(
        StageMemory(name, tuple(_parts(setup, always | own)))
        for name, own in made.items()
        if own or name == "update"
    )


def _largest(total: dict[str, float], own: Mapping[str, float]) -> None:
    """Keep the phase whose parts need most."""
    if sum(own.values()) > sum(total.values()):
        total.clear()
        total.update(own)


def _keep_freed(setup: Setup, stages: Mapping[str, dict[str, float]]) -> None:
    """Add to each stage what the C library's heap keeps of the largest stage's memory.

    Blocks below 32 MiB come from the heap, which is not given back; larger ones are.
    """
    work = max(setup.phases, key=lambda work: micro_batch_tokens(setup, work))
    block = micro_batch_tokens(setup, work) * setup.student.ffn * setup.itemsize
    if block >= _HEAP_BLOCK:
        return
    given_back = {"teacher (mapped file)", "hidden states", "collectives"}
    if setup.student.embedding * setup.itemsize >= _HEAP_BLOCK:
        given_back |= {"head gradient", "teachers' heads"}
    used = {
        name: sum(num for part, num in own.items() if part not in given_back) for name, own in stages.items()
    }
    # The gradients of the first micro-batch lie between what it frees; smaller ones later fit there.
    num = max(_equal_micro_batches(setup, work) for work in setup.phases)
    most = max(used.values()) * (1 + _FRAGMENTED * (1 - 1 / num))
    if setup.needs_replica:
        # Between them lie the buffers of collectives, so later stages reuse little of it.
        most += stages["rollout"].get("replica that generates", 0.0) + stages["rollout"].get("KV cache", 0.0)
    for name, own in stages.items():
        if own:
            own["kept by the allocator"] = max(most - used[name], 0.0)


def _equal_micro_batches(setup: Setup, work: PhaseWork) -> int:
    """Return how many micro-batches of an update of one copy are as large as the largest."""
    largest = micro_batch_tokens(setup, work) * work.updates_per_round * setup.grid.data
    sets = (
        sum(group.tokens for group in work.groups if group.teachers == teachers)
        for teachers in work.teacher_sets
    )
    return max(1, sum(int(tokens / largest + 1e-6) for tokens in sets))


# Largest share of the heap in use that lies in gaps; fitted to measured runs (docs/planning.md).
_FRAGMENTED = 0.6
_HEAP_BLOCK = 32 << 20
_IN_HOST = ("hidden states", OFFLOADED, READ_AHEAD, CHECKPOINT)


def _parts(setup: Setup, parts: Mapping[str, float]) -> Iterator[MemoryPart]:
    is_cpu = setup.hardware.profile.is_cpu
    for name, num_bytes in parts.items():
        if num_bytes:
            where = "host" if name in _IN_HOST and not is_cpu else "device"
            yield MemoryPart(name, num_bytes, where)  # type: ignore[arg-type]


def _always(setup: Setup, stage: int) -> Iterator[tuple[str, float]]:
    """Yield what a rank has all the time."""
    profile = setup.hardware.profile
    yield "process", profile.process_bytes + (profile.grid_process_bytes if setup.is_megatron else 0)
    yield from student_state(setup, stage)
    yield CHECKPOINT, checkpoint_copy(setup, stage)


def _rollout(setup: Setup, work: PhaseWork) -> Iterator[tuple[str, float]]:
    """Yield what local generation adds: the student's, or a teacher's text if that needs more."""
    settings = setup.plan.rollout
    writers = [name for name in work.text_responses if setup.is_loaded(name)]
    local = work.generated and settings.capabilities.needs_replica
    if not local and not writers:
        if setup.is_megatron and not settings.capabilities.needs_replica and work.generated:
            yield "weight sync", _largest_tensor(setup.student) * setup.itemsize
        return
    models = [(setup.student, setup.dtype, "")] if local else []
    models += [(setup.shapes[name], setup.teacher(name).dtype, name) for name in writers]
    parts = [dict(_generation(setup, work, *model)) for model in models]
    yield from max(parts, key=lambda own: sum(own.values())).items()


def _generation(
    setup: Setup, work: PhaseWork, shape: ModelShape, dtype: str, writer: str
) -> Iterator[tuple[str, float]]:
    groups = [g for g in work.groups if (g.writer == writer if writer else g.origin == "student")]
    responses = work.text_responses[writer] if writer else sum(g.responses for g in groups)
    rows = min(work.batch_size, ceil(responses / setup.world))
    longest = max(group.lengths.longest for group in groups)
    prompt = max(group.lengths.prompt.longest for group in groups)
    if writer:
        yield from _body(setup, shape, dtype, is_snapshot=False)
    else:
        yield "replica that generates", replica_bytes(setup)
    cache = rows * longest * shape.kv_bytes(dtype)
    # The cache of a layer grows by copies, so that one layer's is there twice.
    yield "KV cache", cache * (1 + 1 / shape.layers)
    yield "prefill", _working_set(shape, rows * prompt, dtype)
    # Logits, probabilities and their sums.
    yield "logits of a step", rows * shape.vocab * _FLOAT32 * 3
    if setup.hardware.profile.is_cpu and dtype == "float32":
        yield "reordered head", shape.embedding * _FLOAT32


def _teachers(setup: Setup, work: PhaseWork) -> Iterator[tuple[str, float]]:
    names = [name for name in work.teachers if setup.is_loaded(name)]
    if work.teachers:
        yield "hidden states", hidden_bytes(setup, work)
    largest: dict[str, float] = {}
    for name in names:
        shape, dtype = setup.shapes[name], setup.teacher(name).dtype
        limit = pass_tokens(setup, name)
        if limit is None:
            own = dict(_body(setup, shape, dtype, is_snapshot=setup.teacher(name).snapshot_rule is not None))
        else:
            own = dict(streamed_bytes(setup, work, name, limit))
        tokens = min(setup.micro_batch_tokens, sum(g.tokens for g in work.of_teacher(name)))
        tokens = max(tokens, max(g.lengths.longest for g in work.of_teacher(name)))
        own["teacher's pass"] = _working_set(shape, tokens, dtype)
        if work.kept_numbers.get(name) is not None:
            own["teachers' heads"] = shape.embedding * ITEMSIZE[dtype]
            own["loss chunk"] = _chunk_rows(setup, shape.vocab) * shape.vocab * _FLOAT32 * 2
        _largest(largest, own)
    yield from largest.items()


def _body(setup: Setup, shape: ModelShape, dtype: str, *, is_snapshot: bool) -> Iterator[tuple[str, float]]:
    """Yield a teacher's body that is whole on every rank: mapped, converted, or gathered."""
    computed, stored = shape.body_bytes(dtype), shape.stored_body_bytes
    if setup.hardware.profile.is_cpu and setup.shares_pages:
        # Pages of the file; shared between processes, but each counts them as its own.
        if not is_snapshot:
            yield "teacher (mapped file)", stored
        if shape.is_copied(dtype):
            yield "teacher (converted)", computed
        return
    yield "teacher", computed
    if setup.world > 1 and not is_snapshot:
        yield "teacher (gathered batch)", _GATHERED_BYTES * (2 if shape.is_copied(dtype) else 1)


def hidden_bytes(setup: Setup, work: PhaseWork) -> float:
    """Return the bytes of a round's targets that a machine's memory holds for one rank.

    Each rank holds what it has scored, up to `memory.hidden_states_gib`; the rest is on disk.
    """
    total = sum(cached_bytes(setup, work, name) for name in work.teachers)
    return min(total / setup.world, setup.plan.memory.hidden_states_gib * 2**30)


def cached_bytes(setup: Setup, work: PhaseWork, name: str) -> float:
    """Return the bytes of a teacher's targets of a round."""
    numbers = work.kept_numbers.get(name)
    tokens = sum(group.trained for group in work.of_teacher(name))
    if numbers is not None:
        return tokens * numbers * _FLOAT32
    return tokens * setup.shapes[name].hidden * ITEMSIZE[setup.teacher(name).dtype]


def _update(setup: Setup, work: PhaseWork, stage: int) -> Iterator[tuple[str, float]]:
    shape, grid, width = setup.student, setup.grid, setup.itemsize
    weights, is_last = setup.stage_weights(stage), stage == grid.pipeline - 1
    vocab = shape.vocab / (grid.tensor * grid.context)
    if not setup.is_megatron:
        # In bfloat16, the gradients of a micro-batch exist before they are added to the sum.
        yield "gradients", weights * (max(width, _FLOAT32) + (width if width < _FLOAT32 else 0))
    yield "activations", activation_bytes(setup, work, stage)
    tokens = micro_batch_tokens(setup, work)
    yield "working set of a layer", _backward_set(shape, tokens / grid.context, setup.dtype) / grid.tensor
    if is_last:
        exact = [name for name in work.teachers if work.kept_numbers.get(name) is None]
        most = max((len(set(own) & set(exact)) for own in work.teacher_sets), default=0)
        sides = 1 + most + (1 if work.has_support or len(exact) < len(work.teachers) else 0)
        yield "loss chunk", _loss_chunk(setup, work, vocab, sides)
        yield "head gradient", vocab * shape.hidden * (_FLOAT32 + width)
        yield "teachers' heads", _heads(setup, work)
    if setup.is_megatron and grid.holders > 1 and setup.hardware.profile.is_cpu:
        # Gloo sums copies of the gradients, and gathers the weights into others.
        yield "collectives", 2 * weights * _FLOAT32
    if work.teachers:
        yield "hidden states", hidden_bytes(setup, work)


def _loss_chunk(setup: Setup, work: PhaseWork, vocab: float, sides: int) -> float:
    """Return the bytes of a chunk's logits of all `sides`, and of what is made of them."""
    is_cpu, kernel = setup.hardware.profile.is_cpu, setup.plan.student.kernel
    if not is_cpu and kernel != "torch" and not work.has_support:
        of_row = vocab * _FLOAT32 * sides
        rows = max(_TRITON_LOGITS // of_row // _TRITON_ROWS, 1) * _TRITON_ROWS
        of_gradient = rows * vocab * setup.itemsize
        return rows * of_row + max(_TRITON_GRADIENT // of_gradient, 1) * of_gradient
    rows = _chunk_rows(setup, int(vocab))
    blocks = (4 + 2 * work.num_divergences) * min(_BLOCK_BYTES, rows * vocab * _FLOAT32)
    return rows * vocab * _FLOAT32 * sides + blocks


def _heads(setup: Setup, work: PhaseWork) -> float:
    """Return the bytes of the heads of one set of teachers, or of their rows that a rank needs."""

    def size(name: str) -> float:
        shape, dtype = setup.shapes[name], setup.teacher(name).dtype
        rows = shape.embedding / (setup.grid.tensor * setup.grid.context)
        mapped = rows * shape.stored_head_bytes if setup.hardware.profile.is_cpu else 0.0
        copied = shape.stored != dtype or not setup.hardware.profile.is_cpu
        return mapped + (rows * ITEMSIZE[dtype] if copied else 0.0)

    exact = {name for name in work.teachers if work.kept_numbers.get(name) is None}
    return max((sum(size(name) for name in set(own) & exact) for own in work.teacher_sets), default=0.0)


def micro_batch_tokens(setup: Setup, work: PhaseWork) -> float:
    """Return the tokens of the largest micro-batch: at most the limit, but at least one sequence."""
    longest = max((g.lengths.longest for g in work.groups), default=1)
    limit = setup.micro_batch_tokens // longest * longest
    sets = (
        sum(group.tokens for group in work.groups if group.teachers == teachers)
        for teachers in work.teacher_sets
    )
    return max(longest, min(limit, max(sets, default=0.0) / work.updates_per_round))


def activation_bytes(setup: Setup, work: PhaseWork, stage: int) -> float:
    """Return the bytes that a rank keeps for the backward passes that are in flight."""
    shape, grid, width = setup.student, setup.grid, setup.itemsize
    parallel = setup.plan.student.parallel
    tokens = micro_batch_tokens(setup, work) / grid.context
    of_layer, of_end = shape.saved_numbers(setup.dtype)
    if setup.is_megatron:
        of_layer = _megatron_numbers(setup, of_layer)
    layers = shape.layers / grid.pipeline
    in_flight = min(grid.pipeline - stage, ceil(num_micro_batches(setup, work) / grid.data))
    kept = of_layer * layers
    if parallel.recompute:
        inputs = shape.hidden / (grid.tensor if parallel.sequence else 1)
        kept = inputs * layers + of_layer / max(in_flight, 1)
    end = of_end if stage == grid.pipeline - 1 else 0
    return max(in_flight, 1) * tokens * width * kept + tokens * width * end


def _megatron_numbers(setup: Setup, of_layer: float) -> float:
    """Return the numbers that a layer of Megatron keeps for a token on a rank.

    Norms and the residual stream are whole on every rank without sequence parallelism; the rest is divided.
    """
    shape, grid = setup.student, setup.grid
    wide = 4 / setup.itemsize if setup.itemsize < _FLOAT32 else 1.0
    whole = 2 * (2 + wide) * shape.hidden
    divided = (of_layer - whole) / grid.tensor
    return divided + whole / (grid.tensor if setup.plan.student.parallel.sequence else 1)


def num_micro_batches(setup: Setup, work: PhaseWork) -> float:
    """Return the micro-batches of an update, over all copies of the student."""
    count = 0.0
    for teachers in work.teacher_sets:
        own = [group for group in work.groups if group.teachers == teachers]
        responses = sum(group.responses for group in own) / work.updates_per_round
        mean = sum(group.tokens for group in own) / max(sum(group.responses for group in own), 1e-9)
        count += max(1.0, ceil(responses / max(1, setup.micro_batch_tokens // max(mean, 1))))
    return max(count, 1.0)


def _working_set(shape: ModelShape, tokens: float, dtype: str) -> float:
    """Return the bytes of a layer's forward pass without gradients: its largest set of live numbers."""
    copies = 2 * shape.per_token * shape.hidden
    feed_forward = 2 * shape.hidden + (3 if shape.is_gated else 2) * shape.ffn + copies
    attention = 2 * shape.hidden + 2 * shape.query_size + 2 * shape.key_size
    return tokens * max(feed_forward, attention) * ITEMSIZE[dtype]


def _backward_set(shape: ModelShape, tokens: float, dtype: str) -> float:
    """Return the bytes of the gradients within a layer."""
    copies = 2 * shape.per_token * shape.hidden
    feed_forward = (3 if shape.is_gated else 2) * shape.ffn
    return tokens * (2 * shape.hidden + feed_forward + copies) * ITEMSIZE[dtype]


def _chunk_rows(setup: Setup, vocab: int) -> int:
    """Return the tokens of the loss's matrix products, as `loss/slicing.py` chooses them."""
    if setup.hardware.profile.is_cpu:
        return _CPU_ROWS
    return max(_CHUNK_BYTES // (max(vocab, 1) * _FLOAT32), _CPU_ROWS)


def _largest_tensor(shape: ModelShape) -> int:
    return max(shape.embedding, shape.hidden * shape.ffn)
