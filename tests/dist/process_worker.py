"""One process of `mergeopd run` with a scene of a few lines as its run: `process_worker.py SCENE`."""

from __future__ import annotations

import os
import signal
import sys
from types import SimpleNamespace

import numpy as np

import mergeopd.api
from mergeopd.cli import main
from mergeopd.distributed import communicator
from mergeopd.distributed.communicator import SingleProcess, scatter_gather
from mergeopd.distributed.rendezvous import RankInfo, open_communicator
from mergeopd.errors import Location, ModelError, Problem, RecipeError, Stopped
from mergeopd.rollout.protocol import Completion


def gather_forever(ranks):
    while True:
        ranks.gather(ranks.rank)


def fine(ranks):
    assert ranks.gather(ranks.rank) == list(range(ranks.size))
    if ranks.is_first:
        print("all here", flush=True)


def arrays(ranks):
    """Gather arrays of several parts, empty arrays and other objects."""
    communicator.PART_BYTES = 1000

    def completions(rank):
        random = np.random.default_rng(rank)
        lengths = [0, 1, 7, 400, 3][: 3 + rank]
        return [
            Completion(
                random.integers(9, size=n), random.random(n, (np.float32, np.float64)[i % 2]), "eos", rank
            )
            for i, n in enumerate(lengths)
        ]

    own = completions(ranks.rank)
    result = ranks.gather(own)
    assert result == [completions(rank) for rank in range(ranks.size)]
    for part in result:
        for one in part:
            assert one.response_ids.dtype == np.int32
            assert not one.response_ids.flags.writeable
            assert not one.logprobs.flags.writeable
    assert np.shares_memory(result[ranks.rank][1].response_ids, own[1].response_ids)
    several = scatter_gather(ranks, range(5), lambda share: [completions(i)[-1] for i in share])
    assert several == [completions(i)[-1] for i in range(5)]
    if ranks.is_first:
        print("all the same", flush=True)


def error_in_the_middle(ranks):
    ranks.gather(None)
    if ranks.rank == 1:
        raise ModelError("models/x: has no weights")
    gather_forever(ranks)


def error_of_all(ranks):
    raise ModelError("models/x: has no weights")


def error_in_a_share(ranks):
    def work():
        if ranks.rank == 1:
            raise ModelError("models/x: has no weights")

    ranks.run_and_gather(work)


def bug(ranks):
    if ranks.rank == 1:
        raise ValueError("not what was expected")
    gather_forever(ranks)


def stopped(ranks):
    ranks.gather(None)
    raise Stopped("stopped by --updates")


def vanished(ranks):
    """End one process without an exception."""
    if ranks.rank == 1:
        os._exit(9)
    gather_forever(ranks)


def killed(ranks):
    if ranks.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    gather_forever(ranks)


def recipe_error():
    raise RecipeError([Problem(Location("x.yaml"), "seed", "is wrong")])


def own_error():
    """Raise in one process before the rendezvous."""
    if os.environ["RANK"] == "1":
        raise ModelError("models/x: is not on this disk")


def bug_before():
    raise ValueError("not what was expected")


BEFORE = {"recipe_error": recipe_error, "own_error": own_error, "bug_before": bug_before}


def scene(*_, **__):
    play()
    return SimpleNamespace(is_finished=True)


def play():
    name = sys.argv[-1]
    BEFORE.get(name, lambda: None)()
    with open_communicator(RankInfo.of(), grouped=True) as ranks:
        if name == "group":
            import torch.distributed as dist

            assert isinstance(ranks, SingleProcess)
            objects = [None]
            dist.all_gather_object(objects, "alone")
            print(*objects, dist.get_world_size(), flush=True)
            return
        globals()[name](ranks)


if __name__ == "__main__":
    name = sys.argv[1]
    sys.argv = ["mergeopd", "run", name]
    mergeopd.api.run = scene
    main()
