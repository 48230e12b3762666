"""Hidden states and weights shared by four ranks: equal bit for bit, and no byte is sent twice to a machine."""

import json
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from ranks import run_ranks

from mergeopd.models.checkpoint import Checkpoint

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="memory files are Linux's")

WORKER = Path(__file__).with_name("teacher_worker.py")
DEADLINE_S = 300
WORLD = 4
BUDGETS = (0, 300, 1 << 30)


def as_stored(folder, make_model, name, *, tied, dtype, max_shard_size):
    """Save a model in another precision, in one or several files."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(make_model(name, tied=tied), dtype=dtype)
    model.save_pretrained(folder / name, max_shard_size=max_shard_size)
    return folder / name


@pytest.fixture(scope="module")
def models(tmp_path_factory, make_model):
    folder = tmp_path_factory.mktemp("models")
    return [
        as_stored(
            folder, make_model, "tied", tied=True, dtype=torch.float32, max_shard_size="1GB"
        ),
        as_stored(
            folder, make_model, "files", tied=False, dtype=torch.bfloat16, max_shard_size="20KB"
        ),
    ]  # fmt: skip


@pytest.fixture(scope="module")
def reports(tmp_path_factory, models):
    """Launch four ranks once for all cases; a rank that hangs or ends fails the tests with its output."""
    folder = tmp_path_factory.mktemp("teacher_ranks")
    (folder / "work").mkdir()
    outputs = run_ranks(WORKER, WORLD, folder, str(folder / "work"), *map(str, models), deadline_s=DEADLINE_S)
    return [json.loads(out.read_text()) for out in outputs]


@pytest.fixture(scope="module")
def cases():
    """The worker's tables."""
    sys.path.insert(0, str(WORKER.parent))
    try:
        import teacher_worker
    finally:
        sys.path.pop(0)
    return teacher_worker


def sizes(cases, teacher):
    return [
        s.numel() * s.element_size() for s in (cases.states(teacher, i) for i in range(cases.NUM_ROLLOUTS))
    ]


LAYOUTS = ["one machine", "stages apart", "copies apart", "groups across", "all apart", "three machines"]


def test_every_layout_is_tested(cases):
    assert list(cases.LAYOUTS) == LAYOUTS


@pytest.mark.parametrize("budget_bytes", BUDGETS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_loss_ranks_read_the_published_bits_and_others_are_refused(reports, cases, layout, budget_bytes):
    loss_ranks = cases.LAYOUTS[layout][1]
    for rank, report in enumerate(reports):
        result = report["caches"]["rounds"][f"{layout}|{budget_bytes}"]
        own = [i for i in range(cases.NUM_ROLLOUTS) if rank in loss_ranks[i % 2]]
        assert result["right"] == [True] * (18 if own else 0)
        others = [i for i in range(cases.NUM_ROLLOUTS) if i not in own]
        for rollout, message in zip(others, result["refused"], strict=True):
            assert message.startswith("KeyError: \"no hidden states of teacher 'a' for rollout")
            assert f"rollout {rollout} were published for rank {rank}" in message


@pytest.mark.parametrize("budget_bytes", BUDGETS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_machine_with_loss_ranks_gets_one_copy_in_one_message_per_pair(
    reports, cases, layout, budget_bytes
):
    """Counted by hand: each other machine gets the bytes that it reads once, sent to its lowest loss rank."""
    machines, loss_ranks = cases.LAYOUTS[layout]
    expected = [[] for _ in range(WORLD)]
    held = [0] * WORLD
    for teacher in cases.TEACHERS:
        turn = [Counter() for _ in range(WORLD)]
        for rollout, size in enumerate(sizes(cases, teacher)):
            sender = cases.scorer(teacher, rollout)
            held[sender] += size
            for machine in set(machines) - {machines[sender]}:
                wanting = [r for r in loss_ranks[rollout % 2] if machines[r] == machine]
                if wanting:
                    turn[sender][min(wanting)] += size
                    held[min(wanting)] += size
        for sender, counted in enumerate(turn):
            expected[sender] += [[receiver, size] for receiver, size in counted.items() if size]
    for rank, report in enumerate(reports):
        actual = report["caches"]["rounds"][f"{layout}|{budget_bytes}"]
        assert sorted(actual["sent"]) == sorted(expected[rank])
        in_memory, on_disk = actual["held"]
        assert in_memory + on_disk == held[rank]
        assert in_memory <= budget_bytes // machines.count(machines[rank])
        assert on_disk == 0 or budget_bytes != 1 << 30
    if layout == "one machine":
        assert expected == [[], [], [], []]


def test_large_messages_are_cut_and_nothing_else_changes(reports, cases):
    whole = [r["caches"]["rounds"]["stages apart|300"] for r in reports]
    cut = [r["caches"]["rounds"]["small parcels"] for r in reports]
    largest = max(max(sizes(cases, teacher)) for teacher in cases.TEACHERS)
    for a, b in zip(whole, cut, strict=True):
        assert (a["right"], a["held"]) == (b["right"], b["held"])
        totals = [Counter(), Counter()]
        for counted, result in zip(totals, (a, b), strict=True):
            for receiver, size in result["sent"]:
                counted[receiver] += size
        assert totals[0] == totals[1]
        assert all(size <= max(cases.SMALL_BYTES, largest) for _, size in b["sent"])
    assert sum(len(b["sent"]) for b in cut) > 2 * sum(len(a["sent"]) for a in whole)


def test_an_owner_may_leave_first_and_no_file_remains(reports):
    for report in reports:
        assert report["caches"]["early"] is True
        assert report["caches"]["left"] == []
        assert report["caches"]["machines"] == WORLD


def test_ranks_that_score_the_same_all_stop(reports):
    expected = "KeyError: \"teacher 'a' has already scored rollout 5 on rank 1\""
    assert [report["caches"]["twice"] for report in reports] == [expected] * WORLD


def test_a_disk_error_on_one_rank_stops_all(reports):
    result = [report["caches"]["full"] for report in reports]
    assert result[2].startswith("StorageError: cannot spill hidden states to")
    assert [f.partition(":")[0] for i, f in enumerate(result) if i != 2] == ["PeerFailed"] * 3


@pytest.mark.parametrize("batch_bytes", [1, 20_000, 1 << 28])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("index", [0, 1])
def test_weights_read_in_parts_equal_those_of_the_files(reports, models, index, dtype, batch_bytes):
    folder = models[index]
    result = [report["reads"][f"{folder.name}|{dtype}|{batch_bytes}"] for report in reports]
    assert all(f["right"] for f in result)
    checkpoint = Checkpoint.open(folder)
    head = {"lm_head.weight"}
    body = {n: t.num_bytes for n, t in checkpoint.tensors.items() if n not in head}
    assert [f["mapped"] for f in result] == [sum(body.values())] * WORLD
    for count in ("reported", "read"):
        assert sum(f[count] for f in result) == 2 * sum(body.values())
    assert [f["reported"] for f in result] == [f["read"] for f in result]
    if batch_bytes > 1:
        for f in result:
            assert f["reported"] == pytest.approx(2 * sum(body.values()) / WORLD, rel=0.05)


def test_a_file_that_one_rank_cannot_read_stops_all(reports):
    result = [report["odd"]["cut"] for report in reports]
    assert result[1].startswith("ModelError: /cut1/model.safetensors: was truncated while 'model.")
    assert [f.partition(":")[0] for i, f in enumerate(result) if i != 1] == ["PeerFailed"] * 3


def test_files_of_different_models_are_refused(reports):
    for rank, report in enumerate(reports):
        assert report["odd"]["other"] == (
            f"ModelError: /other{rank}: the files on rank 2 are not those on rank 0; "
            "give every machine the same model folder"
        )
