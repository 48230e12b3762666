"""The first lines of a run: models, machine, and where it resumes."""

from __future__ import annotations

from collections.abc import Iterator

from mergeopd.messages import shown
from mergeopd.reporting.events import RunFacts, RunStarted
from mergeopd.reporting.terminal.timing import clock_text


def header(run: RunStarted) -> Iterator[tuple[str, str]]:
    """Yield lines as label and text."""
    phases = ", ".join(f"{name} {updates}" for name, updates in run.phases)
    yield "run", f"{run.name}, {run.num_updates} updates ({phases}), to {shown(run.output)}"
    if run.facts is None:
        yield "teachers", ", ".join(run.teachers)
    else:
        yield from _models(run.facts)
    if run.resumed_at:
        spent = f", {clock_text(run.seconds)} so far" if run.seconds else ""
        yield "resumes", f"after update {run.resumed_at} of {run.num_updates}{spent}"


def _models(facts: RunFacts) -> Iterator[tuple[str, str]]:
    trained = "" if facts.num_trainable == facts.num_parameters else f", {count(facts.num_trainable)} trained"
    processes = f"{facts.num_processes} processes with " if facts.num_processes > 1 else ""
    threads = f"{facts.num_threads} thread" + ("s" if facts.num_threads > 1 else "")
    each = " each" if processes else ""
    yield (
        "student",
        (
            f"{facts.student}, {count(facts.num_parameters)} parameters{trained}, {facts.dtype}, "
            f"on {facts.device}, {processes}{threads}{each}"
        ),
    )
    teachers = (
        f"{name} ({size})" if isinstance(size, str) else f"{name} {count(size)}"
        for name, size in facts.teachers.items()
    )
    yield "teachers", ", ".join(teachers)
    for name, text in facts.quantized.items():
        yield "quantised", f"{name}: {text}"


def count(number: int) -> str:
    """Format a number of parameters: `912`, `1.2M`, `7.6B`."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return str(number)
