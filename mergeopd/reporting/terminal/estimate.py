"""Tables of what a run costs before it starts."""

from __future__ import annotations

from rich.console import Console
from rich.text import Text

from mergeopd.reporting.estimate import Change, Estimate, Fitted, PhaseEstimate, duration, shown_parts
from mergeopd.reporting.terminal.glyphs import plain_text, table

_GIB = 2**30


def show_estimate(result: Estimate, console: Console) -> None:
    """Print memory, time, teachers, what bounds a round, and what to change."""
    ascii_only = console.options.ascii_only

    def line(text: str, style: str = "") -> None:
        console.print(Text(plain_text(text, ascii_only), style=style))

    machines = f" on {result.num_machines} machines" if result.num_machines > 1 else ""
    processes = "1 process" if result.num_processes == 1 else f"{result.num_processes:,} processes"
    grid = f", {result.grid}" if result.backend == "megatron" else ""
    line(f"{result.recipe} on {result.hardware} ({result.device}): {processes}{machines}{grid}", "bold")
    _memory(result, console, ascii_only)
    for phase in result.phases:
        _phase(phase, console, ascii_only)
    total = f"{duration(result.seconds)} in all"
    if result.evaluation_s:
        total += f", {duration(result.evaluation_s)} of it for the evaluation at the end"
    line(total)
    if result.changes:
        _changes(result, console, ascii_only)
    if result.fitted:
        _fitted(result.fitted, console, ascii_only)
    for note in result.notes:
        line(note, "dim")
    for obstacle in result.obstacles:
        line(f"! {obstacle}", "bold red")


def _memory(result: Estimate, console: Console, ascii_only: bool) -> None:
    peak, limit = result.peak, result.limit_bytes
    title = (
        f"Memory of a rank at its peak, {peak.stage}: {peak.total() / _GIB:,.2f} of {limit / _GIB:,.2f} GiB"
    )
    width = max(10, min(console.width - 48, 48))
    rows = []
    for name, size in shown_parts(peak):
        share = size / max(limit, 1)
        filled = min(round(share * width), width)
        rows.append((name, f"{size / _GIB:,.2f}", f"{share:.1%}", "━" * filled))
    others = [f"{s.stage} {s.total() / _GIB:,.2f}" for s in result.memory if s.stage != peak.stage]
    console.print(Text(plain_text(title, ascii_only), style="bold"))
    shown = table(("part", "GiB", "of limit", ""), rows, ascii_only=ascii_only)
    shown.columns[-1].justify = "left"
    shown.columns[-1].no_wrap = True
    console.print(shown)
    words = [f"other stages: {', '.join(others)} GiB"] if others else []
    if result.host_limit_bytes is not None:
        host = result.peak_host_bytes / _GIB
        words.append(f"main memory beside the GPU: {host:,.2f} of {result.host_limit_bytes / _GIB:,.2f} GiB")
    if words:
        console.print(Text(plain_text("; ".join(words), ascii_only)))


def _phase(phase: PhaseEstimate, console: Console, ascii_only: bool) -> None:
    title = (
        f"Phase {phase.name}: {phase.rounds:,} rounds of {duration(phase.round_s)} "
        f"({phase.responses:,.0f} responses, {phase.tokens:,.0f} tokens), {duration(phase.seconds)}"
    )
    flops = phase.flops
    rows = [
        (
            stage.name,
            duration(stage.seconds),
            f"{stage.seconds / max(phase.round_s, 1e-12):.0%}",
            f"{flops.get(stage.name, 0.0) / 1e12:,.1f}" if flops.get(stage.name) else "",
            stage.bound,
        )
        for stage in phase.stages
    ]
    console.print(Text(plain_text(title, ascii_only), style="bold"))
    console.print(table(("stage", "a round", "share", "TFLOP", "bound by"), rows, ascii_only=ascii_only))
    slowest = max(phase.stages, key=lambda stage: stage.seconds, default=None)
    words = [f"read {phase.bytes_read / 1e9:,.2f} GB of teachers a round"]
    if slowest is not None:
        words.insert(0, f"{slowest.name} ({slowest.bound}) bounds the round")
    if phase.text_s:
        words.append(f"teachers' text before the phase: {duration(phase.text_s)}")
    console.print(Text(plain_text("; ".join(words), ascii_only)))
    if phase.teachers:
        _teachers(phase, console, ascii_only)


def _teachers(phase: PhaseEstimate, console: Console, ascii_only: bool) -> None:
    rows = [
        (
            teacher.name,
            _count(teacher.parameters)
            + (f" ({_count(teacher.active)})" if teacher.active < 0.9 * teacher.parameters else ""),
            f"{teacher.responses:,.0f}",
            duration(teacher.seconds) if teacher.seconds else "-",
            f"{teacher.bytes_read / 1e9:,.2f}",
            f"{teacher.cached_bytes / 1e9:,.2f}",
            teacher.how + (" - does not run" if teacher.runs_not else ""),
        )
        for teacher in phase.teachers
    ]
    headings = ("teacher", "parameters", "responses", "a round", "GB read", "GB kept", "loaded")
    console.print(table(headings, rows, ascii_only=ascii_only))


def _changes(result: Estimate, console: Console, ascii_only: bool) -> None:
    rows = [
        (
            _settings(change),
            duration(change.seconds),
            f"-{1 - change.seconds / result.seconds:.0%}",
            f"{change.peak_bytes / _GIB:,.1f}" + ("" if change.fits else " (too much)"),
            change.effect,
        )
        for change in result.changes
    ]
    headings = ("change", "run", "time", "GiB", "because")
    console.print(Text("To save time, planned again with:", style="bold"))
    console.print(table(headings, rows, ascii_only=ascii_only))


def _settings(change: Change) -> str:
    return "\n".join(f"{key}={value}" for key, value in change.settings.items())


def _fitted(fitted: tuple[Fitted, ...], console: Console, ascii_only: bool) -> None:
    rows = [
        (
            str(one.grid) if one.backend == "megatron" else "1 process",
            f"{one.micro_batch_tokens:,}",
            "yes" if one.recompute else "no",
            str(one.batch_size),
            f"{one.peak_bytes / _GIB:,.1f}",
            duration(one.seconds),
        )
        for one in fitted
    ]
    headings = ("grid", "micro_batch_tokens", "recompute", "rollout.batch_size", "GiB", "run")
    console.print(Text("Settings that fit, the fastest first:", style="bold"))
    console.print(table(headings, rows, ascii_only=ascii_only))


def _count(parameters: int) -> str:
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if parameters >= size:
            return f"{parameters / size:.3g}{unit}"
    return f"{parameters:,}"
