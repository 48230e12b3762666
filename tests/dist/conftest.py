"""Launches of the worker for whole runs. Each is made once, for the first test that uses it."""

import json
from pathlib import Path

import pytest

WORKER = Path(__file__).with_name("run_worker.py")
DEADLINE_S = {"short": 300, "one": 300, "four": 1200}
# Whose runs a launch continues.
AFTER = {"four": "one"}


@pytest.fixture(scope="session")
def grid_folder(tmp_path_factory):
    """Write models and recipes; the run folders lie in `runs`."""
    from grid_jobs import write_recipes
    from grid_runs import write_grid_job
    from scoring_server import scoring_server

    folder = write_grid_job(tmp_path_factory.mktemp("grid"))
    with scoring_server(folder / "two", "vllm") as server:
        write_recipes(folder, server.url)
        yield folder


@pytest.fixture(scope="session")
def single_process_run(grid_folder):
    """Run a recipe in one process, once; its run folder."""
    from grid_runs import run_alone

    def run(name):
        path = grid_folder / "runs" / f"{name}, torch"
        if not path.exists():
            run_alone(grid_folder / f"{name}.recipe.yaml", f"output={path}")
        return path

    return run


@pytest.fixture(scope="session")
def errors_of(grid_folder, tmp_path_factory):
    """Make a launch, once; by job, the error of every rank, or None."""
    from grid_jobs import jobs
    from ranks import run_ranks

    done = {}

    def launch(name):
        if name not in done:
            if name in AFTER:
                launch(AFTER[name])
            world, work = jobs(grid_folder, name)
            place = tmp_path_factory.mktemp(name)
            (place / "jobs.json").write_text(json.dumps(work))
            outputs = run_ranks(WORKER, world, place, str(place / "jobs.json"), deadline_s=DEADLINE_S[name])
            ranks = [json.loads(out.read_text()) for out in outputs]
            done[name] = {job: [rank[job]["error"] for rank in ranks] for job in ranks[0]}
        return done[name]

    return launch
