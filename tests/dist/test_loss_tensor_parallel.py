"""`fused_loss` and `bridge_loss` with the vocabulary on 2 and 4 gloo ranks equals one process, values and gradients."""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
from ranks import run_ranks

WORKER = Path(__file__).with_name("loss_worker.py")
DEADLINE_S = 400


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """Launch four ranks once for all cases; a rank that hangs or ends fails the tests with its output."""
    folder = tmp_path_factory.mktemp("tensor_parallel")
    outputs = run_ranks(WORKER, 4, folder, deadline_s=DEADLINE_S)
    return [json.loads(out.read_text()) for out in outputs]


@pytest.mark.parametrize(("dtype", "bound"), [("torch.float64", 1e-10), ("torch.float32", 1e-5)])
@pytest.mark.parametrize("divergence", ["forward", "reverse", "jsd", "all", "none"])
@pytest.mark.parametrize("layout", ["2 even", "2 uneven", "2 padding only", "4 uneven", "4 padding only"])
def test_ranks_equal_one_process(reports, layout, divergence, dtype, bound):
    world = int(layout[0])
    for rank in range(world):
        for num_teachers in (1, 2):
            errors = dict(reports[rank]["errors"][f"{layout}|{divergence}|{dtype}|{num_teachers}"])
            assert errors.pop("padding") == 0.0
            assert max(errors.values()) < bound, (rank, num_teachers, errors)


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize("layout", ["2 uneven", "2 padding only", "4 uneven"])
def test_triton_on_ranks_equals_torch_in_one_process(reports, layout):
    for report in reports[: int(layout[0])]:
        errors = report["triton"][layout]
        assert max(errors.values()) < 1e-10, errors


@pytest.mark.parametrize(("dtype", "bound"), [("torch.float64", 1e-10), ("torch.float32", 2e-5)])
@pytest.mark.parametrize(
    "support",
    [
        "student tail",
        "teacher tail",
        "union tail",
        "union generalised",
        "all tail",
        "known tail",
        "known generalised",
        "known student",
    ],
)
@pytest.mark.parametrize("layout", ["2 even", "2 uneven", "2 padding only", "4 uneven", "4 padding only"])
def test_ranks_choose_one_support(reports, layout, support, dtype, bound):
    for report in reports[: int(layout[0])]:
        errors = dict(report["supports"][f"{layout}|{support}|{dtype}"])
        assert errors.pop("padding") == 0.0
        assert max(errors.values()) < bound, errors


def test_two_ranks_report_only_their_cases(reports):
    assert [len(report["errors"]) for report in reports] == [120, 120, 48, 48]


@pytest.mark.parametrize(
    ("case", "text"),
    [
        ("label", "ValueError: labels_N[3] = 37 is not in exactly one shard"),
        (
            "nan",
            "ArithmeticError: the logits of target 1: not finite at 11 of the tokens 0 to 10, first at 0",
        ),
    ],
)
def test_all_ranks_raise_the_same_error(reports, case, text):
    messages = {report["refusals"][case] for report in reports}
    assert len(messages) == 1
    assert messages.pop().startswith(text)


def test_a_rank_with_misfitting_shards_stops_all(reports):
    result = [report["refusals"]["shards"] for report in reports]
    assert result[1].startswith("ValueError: target 0 scores token ids [3, 23), the student [3, 24); give")
    for text in (result[0], result[2], result[3]):
        assert text == "ValueError: on another rank of the group, student and target shards do not match"


@pytest.mark.parametrize(("dtype", "bound"), [("torch.float64", 1e-10), ("torch.float32", 1e-5)])
@pytest.mark.parametrize(
    "bridge",
    ["gold", "gold bayesian", "uld", "projection", "projection best", "pieces", "pieces jsd"],
)
@pytest.mark.parametrize("layout", ["2 even", "2 uneven", "2 padding only", "4 uneven"])
def test_bridges_on_ranks_equal_one_process(reports, layout, bridge, dtype, bound):
    for report in reports[: int(layout[0])]:
        errors = report["bridges"]["errors"][f"{layout}|{bridge}|{dtype}"]
        assert errors["padding dW"] == errors["padding dbias"] == 0.0
        assert max(errors.values()) < bound, errors


def test_all_ranks_raise_where_a_bridge_fits_not_on_one(reports):
    result = [report["bridges"]["refusals"] for report in reports]
    assert {r["nan"] for r in result} == {
        "ArithmeticError: the teacher's log-probability: not finite at 13 of the groups 0 to 12, first at 0"
    }
    assert {r["hole"] for r in result} == {
        "ValueError: the teacher's head scores token ids [0, 0), [0, 13), [14, 23), [22, 23); a bridge needs all "
        "ids from 0, each once: give every rank its shard, and the group of these ranks"
    }
    assert result[1]["width"].startswith("ValueError: the teacher: hidden states are")
    for other in (0, 2, 3):
        assert result[other]["width"] == (
            "ValueError: on another rank of the group, hidden states and head do not match"
        )
