"""Trainings in processes of their own, as many at a time as there are cores; one thread each.

Models of this size gain nothing from threads: two take longer than one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait

# Called after every update with the number of updates made and the most that there can be.
Advance = Callable[[int, int], object]
# Told what is trained next; answers what to call after each of its updates.
Watch = Callable[[str], Advance]
Job = Callable[[Advance], dict[str, float]]


def run(jobs: Mapping[str, Job], watch: Watch, num_processes: int) -> dict[str, dict[str, float]]:
    """Run each job and return its result, by name.

    Args:
        jobs: what to run, by name; with several processes each runs in a forked one, so what it changes in
            memory is lost.
        watch: told each name when its job begins, in this process.
        num_processes: jobs at a time; with 1, they run in this process.

    Raises:
        RuntimeError: a process ended without a result.
    """
    if num_processes == 1:
        return {name: job(watch(name)) for name, job in jobs.items()}
    context, results = get_context("fork"), dict[str, dict[str, float]]()
    waiting, running = list(jobs.items()), dict[Connection, tuple[str, Advance]]()
    while waiting or running:
        while waiting and len(running) < num_processes:
            name, job = waiting.pop(0)
            receiver, sender = context.Pipe(duplex=False)
            # Daemons end with this process, for example on Ctrl-C.
            context.Process(target=_report, args=(job, sender), daemon=True).start()
            sender.close()
            running[receiver] = name, watch(name)
        for receiver in [one for one in wait(list(running)) if isinstance(one, Connection)]:
            name, advance = running[receiver]
            try:
                message = receiver.recv()
            except EOFError:
                raise RuntimeError(f"the training of {name} ended without a result") from None
            if isinstance(message, dict):
                results[name] = message
                del running[receiver]
            else:
                advance(*message)
    return {name: results[name] for name in jobs}


def _report(job: Job, sender: Connection) -> None:
    sender.send(job(lambda update, end: sender.send((update, end))))
