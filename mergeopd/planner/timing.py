"""Seconds, bytes and operations of a round, by stage, and what each teacher costs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from math import ceil

from mergeopd.models.flops import TRAINING
from mergeopd.planner.memory import cached_bytes, num_micro_batches
from mergeopd.planner.residency import num_passes, pass_tokens, streamed_bytes_read
from mergeopd.planner.roofline import (
    DISK,
    ELEMENTWISE,
    MEMORY,
    NETWORK,
    OVERHEAD,
    WAITING,
    Causes,
    Device,
)
from mergeopd.planner.setup import Setup
from mergeopd.planner.shapes import ModelShape
from mergeopd.planner.workload import Group, Lengths, PhaseWork, TextLengths
from mergeopd.recipe.rollout import AnyServerRollout
from mergeopd.reporting.estimate import PhaseEstimate, StageTime, TeacherCost

# Share of a machine's memory that its file cache may hold.
_CACHED_SHARE = 0.5
_FLOAT32 = 4


def phase_estimate(setup: Setup, work: PhaseWork) -> PhaseEstimate:
    """Estimate the rounds of a phase."""
    teachers = tuple(_teacher(setup, work, name) for name in work.teachers)
    scoring = Causes()
    for name in work.teachers:
        if setup.is_loaded(name):
            scoring.add(_scoring(setup, work, name))
    stages = [("rollout", _rollout(setup, work)), ("teachers", scoring), ("update", _update(setup, work))]
    if work.generated:
        stages.append(("sync", _sync(setup, work)))
    text = sum((sum(_text(setup, work, name).values()) for name in work.text_responses), 0.0)
    return PhaseEstimate(
        name=work.name,
        updates=work.updates,
        rounds=work.rounds,
        responses=sum(group.responses for group in work.groups),
        tokens=work.tokens,
        stages=tuple(StageTime(name, dict(causes)) for name, causes in stages if sum(causes.values())),
        teachers=teachers,
        bytes_read=sum(teacher.bytes_read for teacher in teachers),
        flops=_flops(setup, work),
        text_s=text,
    )


def _positions(groups: Iterable[Group]) -> float:
    """Return the pairs of tokens that causal attention reads."""
    return sum(g.responses * g.lengths.mean * (g.lengths.mean + 1) / 2 for g in groups)


def _tokens(groups: Iterable[Group]) -> float:
    return sum(group.tokens for group in groups)


def _rollout(setup: Setup, work: PhaseWork) -> Causes:
    """Return the seconds of the student's own responses; servers are not estimated."""
    if not work.generated or isinstance(setup.plan.rollout, AnyServerRollout):
        return Causes()
    return _generation(setup, setup.student, setup.dtype, work.generated, work.batch_size, setup.world)


def _generation(
    setup: Setup, shape: ModelShape, dtype: str, groups: Iterable[Group], batch_size: int, world: int
) -> Causes:
    """Return the seconds of generation, dealt to all processes, each with an unsharded model."""
    groups, device = tuple(groups), Device(setup.hardware)
    responses = sum(group.responses for group in groups)
    own = responses / min(world, max(responses, 1.0))
    batches = ceil(own / batch_size)
    rows = own / batches
    prompt = sum(g.responses * g.lengths.prompt.mean for g in groups) / responses
    new = sum(g.responses * g.lengths.response.mean for g in groups) / responses
    # A batch takes the steps of its longest response.
    steps = max(g.lengths.response.mean for g in groups)
    if rows > 1:
        steps = max(steps, min(2 * new, max(g.lengths.response.longest for g in groups)))
    seconds = device.forward(shape, rows * prompt, rows * prompt**2 / 2, dtype, 1)
    seconds.add(device.decode(shape, dtype, rows=rows, prompt=prompt, new=new, steps=steps))
    return Causes().add(seconds, batches)


def _text(setup: Setup, work: PhaseWork, name: str) -> Causes:
    """Return the seconds of the text that a teacher generates before a phase; none if it is not local."""
    if not setup.is_loaded(name):
        return Causes()
    groups = [replace(group, responses=group.text_responses) for group in work.groups if group.writer == name]
    return _generation(
        setup, setup.shapes[name], setup.teacher(name).dtype, groups, work.batch_size, setup.world
    )


def _scoring(setup: Setup, work: PhaseWork, name: str) -> Causes:
    """Return the seconds of a local teacher's pass: loading, scoring, and what it keeps."""
    shape, dtype = setup.shapes[name], setup.teacher(name).dtype
    groups, device = work.of_teacher(name), Device(setup.hardware)
    tokens = _tokens(groups) / setup.world
    passes = max(1.0, ceil(tokens / setup.micro_batch_tokens))
    seconds = device.forward(shape, tokens, _positions(groups) / setup.world, dtype, passes)
    if pass_tokens(setup, name) is not None:
        _add_streaming(seconds, _loading(setup, work, name), shape.layers)
    elif setup.teacher(name).snapshot_rule is None:
        seconds.add(_loading(setup, work, name))
    if work.kept_numbers.get(name) is not None:
        trained = sum(group.trained for group in groups) / setup.world
        seconds.add(device.loss(shape, {}, trained, dtype=dtype, gradient=False))
    elif not setup.hardware.profile.is_cpu:
        seconds[NETWORK] += (
            cached_bytes(setup, work, name) / setup.world / setup.hardware.profile.host_bandwidth
        )
    return seconds


def _add_streaming(computing: Causes, reading: Causes, layers: int) -> None:
    """Add what of the reading is not hidden behind computing: the first layer, and what takes longer."""
    behind = reading.total * (1 - 1 / layers)
    exposed = reading.total - min(behind, computing.total)
    computing.add(reading, exposed / reading.total if reading.total else 0.0)


def _loading(setup: Setup, work: PhaseWork, name: str) -> Causes:
    """Return the seconds of reading a teacher's body: from the file cache once it is there, or from disk."""
    shape, profile, dtype = setup.shapes[name], setup.hardware.profile, setup.teacher(name).dtype
    is_streamed = pass_tokens(setup, name) is not None
    is_copied, times = shape.is_copied(dtype), num_passes(setup, work, name)
    stored = times * shape.stored_body_bytes
    every = sum(setup.shapes[t].stored_body_bytes for t in work.teachers if setup.is_loaded(t))
    memory = (profile.memory_gib if profile.is_cpu else profile.host_memory_gib or 0.0) * 2**30
    # Each process that shares pages maps them; streamed layers are dealt over the processes, and copied.
    num_reading = setup.hardware.per_machine if is_streamed or not setup.shares_pages else 1
    seconds = Causes()
    if every > _CACHED_SHARE * memory:
        seconds[DISK] += stored / setup.hardware.num_machines / profile.disk_bandwidth
    elif is_streamed or is_copied or not setup.shares_pages:
        seconds[MEMORY] += stored / (profile.host_bandwidth * num_reading)
    if not profile.is_cpu:
        seconds[MEMORY] += stored / setup.hardware.num_devices / profile.host_bandwidth
    if setup.world > 1 and (is_streamed or not setup.shares_pages):
        bandwidth = profile.link_bandwidth if setup.hardware.num_machines == 1 else profile.network_bandwidth
        seconds[NETWORK] += stored / (bandwidth * profile.link_attainable)
    if is_copied:
        copied = times * (shape.stored_body_bytes + shape.body_bytes(dtype))
        seconds[MEMORY] += copied / (profile.memory_bandwidth * setup.hardware.threads)
    return seconds


def _update(setup: Setup, work: PhaseWork) -> Causes:
    """Return the seconds of a round's updates, with the prior policy's pass."""
    grid, profile = setup.grid, setup.hardware.profile
    shape, dtype = setup.student, setup.dtype
    device = Device(setup.hardware, grid.tensor)
    tokens, positions = work.tokens / grid.holders, _positions(work.groups) / grid.holders
    trained = work.trained / grid.holders
    passes = work.updates_per_round * max(1.0, num_micro_batches(setup, work) / grid.data)
    forward = device.forward(shape, tokens, positions, dtype, passes)
    backward = device.backward(shape, tokens, positions, dtype, passes)
    body = Causes().add(forward).add(backward)
    if setup.plan.student.parallel.recompute:
        body.add(forward)
    loss = _loss(setup, work, device, trained, gradient=True)
    if work.needs_prior_policy:
        body.add(forward)
        loss.add(_loss(setup, work, device, trained, gradient=False))
    seconds = Causes().add(body, 1 / grid.pipeline).add(loss)
    if grid.pipeline > 1:
        per_update = max(1.0, passes / work.updates_per_round)
        bubble = (grid.pipeline - 1) / per_update
        seconds[WAITING] += bubble * sum(seconds.values())
    own = setup.state_weights(grid.pipeline - 1)
    seconds.add(device.optimizer(own, dtype), work.updates_per_round)
    seconds[OVERHEAD] += work.updates_per_round * profile.overheads.update_s
    if setup.is_megatron:
        seconds.add(_messages(setup, work, tokens, passes))
    return Causes({cause: value for cause, value in seconds.items() if value})


def _loss(setup: Setup, work: PhaseWork, device: Device, trained: float, *, gradient: bool) -> Causes:
    """Return the seconds of the loss of a copy's tokens, by the teachers that score each group."""
    seconds, total = Causes(), work.trained
    for group in work.groups:
        exact = {
            name: setup.shapes[name]
            for name in group.teachers
            if gradient and work.kept_numbers.get(name) is None
        }
        share = trained * group.trained / total
        own = device.loss(setup.student, exact, share, dtype=setup.dtype, gradient=gradient)
        if work.has_support or len(exact) < len(group.teachers):
            own[ELEMENTWISE] *= 1 + 0.25 * len(group.teachers)
        seconds.add(own)
    return seconds


def _messages(setup: Setup, work: PhaseWork, tokens: float, passes: float) -> Causes:
    """Return the seconds of a grid's collectives in a round's updates."""
    grid, profile, shape = setup.grid, setup.hardware.profile, setup.student
    overheads = profile.overheads
    inside = grid.tensor * grid.context * grid.pipeline <= setup.hardware.per_machine
    link = (profile.link_bandwidth if inside else profile.network_bandwidth) * profile.link_attainable
    everywhere = profile.link_bandwidth if setup.hardware.num_machines == 1 else profile.network_bandwidth
    everywhere *= profile.link_attainable
    layers, width = shape.layers / grid.pipeline, setup.itemsize
    seconds = Causes()
    seconds[OVERHEAD] += passes * layers * overheads.grid_layer_s
    state = tokens * shape.hidden * width
    if grid.tensor > 1:
        # Two sums of the hidden states forward and two backward in each layer; a ring sends them twice.
        ring = 2 * (grid.tensor - 1) / grid.tensor
        seconds[NETWORK] += 4 * layers * (state * ring / link + passes * overheads.message_s)
    if grid.pipeline > 1:
        seconds[NETWORK] += 2 * (state / link + passes * overheads.message_s)
    if grid.context > 1:
        # Keys and values of the other ranks in each layer, once forward, and their gradients.
        share = shape.kv_numbers * width * tokens * (grid.context - 1) / grid.tensor
        seconds[NETWORK] += 2 * layers * (share / link + passes * overheads.message_s)
    if grid.expert > 1 and setup.architecture is not None and setup.architecture.experts is not None:
        # A token's state to each of its experts and back, forward and backward; as if all were elsewhere.
        sent = state / grid.tensor * setup.architecture.experts.per_token
        seconds[NETWORK] += 4 * layers * (sent / link + passes * overheads.message_s)
    if grid.holders > 1:
        ring = 2 * (grid.holders - 1) / grid.holders
        weights = setup.stage_weights(0)
        per_update = weights * (_FLOAT32 + width) / 2 * ring / everywhere
        seconds[NETWORK] += work.updates_per_round * (per_update + overheads.message_s)
    return seconds


def _sync(setup: Setup, work: PhaseWork) -> Causes:
    """Return the seconds in which the student's weights reach what generates, once a round."""
    rollout, profile = setup.plan.rollout, setup.hardware.profile
    num_bytes = setup.student.parameters * setup.itemsize
    if isinstance(rollout, AnyServerRollout):
        times = max(1.0, work.updates_per_round / rollout.sync.every)
        bandwidth = {
            "folder": profile.disk_bandwidth,
            "nccl": profile.link_bandwidth * profile.link_attainable,
            "ipc": profile.memory_bandwidth,
            "gloo": profile.network_bandwidth,
        }[rollout.sync.method]
        # A folder is written and read again.
        passes = 2 if rollout.sync.method == "folder" else 1
        return Causes({DISK if passes == 2 else NETWORK: times * passes * num_bytes / bandwidth})
    if not setup.needs_replica or setup.world == 1:
        return Causes()
    inside = setup.hardware.num_machines == 1
    bandwidth = profile.link_bandwidth if inside else profile.network_bandwidth
    return Causes({NETWORK: num_bytes / (bandwidth * profile.link_attainable)})


def _teacher(setup: Setup, work: PhaseWork, name: str) -> TeacherCost:
    shape, plan, groups = setup.shapes[name], setup.teacher(name), work.of_teacher(name)
    is_local = setup.is_loaded(name)
    tokens, trained = _tokens(groups), sum(group.trained for group in groups)
    flops = shape.flops
    operations = trained * flops.per_logits
    if is_local:
        operations += flops.per_token * tokens + flops.per_position * _positions(groups)
    return TeacherCost(
        name=name,
        parameters=shape.parameters,
        active=shape.active,
        how=_how(setup, work, name),
        responses=sum(group.responses for group in groups),
        seconds=sum(_scoring(setup, work, name).values()) if is_local else 0.0,
        bytes_read=_bytes_read(setup, work, name),
        flops=operations if plan.served is None else 0.0,
        cached_bytes=cached_bytes(setup, work, name),
        runs_not=shape.runs if is_local else None,
    )


def _how(setup: Setup, work: PhaseWork, name: str) -> str:
    plan = setup.teacher(name)
    if plan.served is not None:
        return f"served by {plan.served.engine}"
    if plan.targets is not None:
        return "recorded targets"
    if plan.snapshot_rule is not None:
        return "snapshot of the student"
    if pass_tokens(setup, name) is not None:
        times = num_passes(setup, work, name)
        return "streamed" if times == 1 else f"streamed, {times} times"
    if setup.shares_pages and setup.hardware.profile.is_cpu:
        return "mapped file, converted" if setup.shapes[name].is_copied(plan.dtype) else "mapped file"
    return "whole on every rank" if setup.world > 1 else "whole"


def _bytes_read(setup: Setup, work: PhaseWork, name: str) -> float:
    """Return the bytes of files that all ranks read in a round: body and head, shared pages once."""
    shape, plan = setup.shapes[name], setup.teacher(name)
    if plan.snapshot_rule is not None:
        return 0.0
    body = 0.0
    if setup.is_loaded(name):
        body = shape.stored_body_bytes
        body = body if pass_tokens(setup, name) is None else streamed_bytes_read(setup, work, name)
    head = shape.embedding * shape.stored_head_bytes if plan.needs_head else 0.0
    if work.kept_numbers.get(name) is None and setup.is_megatron:
        # Each rank of the loss reads its rows of the head; where pages are shared, those of one rank count.
        head *= 1 / (setup.grid.tensor * setup.grid.context) if setup.shares_pages else setup.grid.data
    return body + head


def _flops(setup: Setup, work: PhaseWork) -> Mapping[str, float]:
    """Return a round's operations by stage, counted as `models/flops.py` counts those of a run."""
    student, total = setup.student.flops, Causes()
    for group in work.groups:
        prompt, response = group.lengths.prompt.mean, group.lengths.response.mean
        tokens, trained = group.tokens, group.trained
        positions = _positions([group])
        own = student.per_token * tokens + student.per_position * positions + student.per_logits * trained
        total["update"] += (TRAINING + (1 if work.needs_prior_policy else 0)) * own
        if group.origin == "student" and prompt + response:
            total["rollout"] += own
    total["teachers"] = sum(_teacher(setup, work, name).flops for name in work.teachers)
    return dict(total)


def evaluation_seconds(setup: Setup, prompts: Mapping[str, tuple[int, Lengths]]) -> float:
    """Return the seconds of the evaluation at the end: every model answers every prompt."""
    plan = setup.plan.evaluation
    if plan is None:
        return 0.0
    models = [(setup.student, setup.dtype)] * (2 + len(plan.static_merges))
    models += [(setup.shapes[name], setup.dtype) for name in setup.plan.experts if setup.is_loaded(name)]
    seconds = 0.0
    for suite in plan.suites:
        for source in suite.sources:
            number, length = prompts[source.name]
            new = Lengths(suite.max_new_tokens, suite.max_new_tokens)
            group = _evaluated(source.name, number * suite.samples, length, new)
            for shape, dtype in models:
                causes = _generation(setup, shape, dtype, [group], plan.batch_size, setup.world)
                seconds += sum(causes.values())
    return seconds


def _evaluated(source: str, number: int, prompt: Lengths, response: Lengths) -> Group:
    return Group(source, "student", number, TextLengths(prompt, response), ())
