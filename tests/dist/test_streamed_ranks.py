"""Two ranks stream one teacher: each reads half of every layer, and both have the resident teacher's bits."""

import json
from pathlib import Path

import pytest
from ranks import run_ranks

from mergeopd.models.checkpoint import Checkpoint

WORKER = Path(__file__).with_name("streamed_worker.py")


@pytest.fixture(scope="module")
def model(make_model):
    return make_model("streamed", tied=False, layers=3)


@pytest.fixture(scope="module")
def reports(tmp_path_factory, model):
    folder = tmp_path_factory.mktemp("streamed_ranks")
    (folder / "work").mkdir()
    outputs = run_ranks(WORKER, 2, folder, str(folder / "work"), str(model), deadline_s=300)
    return [json.loads(out.read_text()) for out in outputs]


@pytest.mark.long
def test_every_rank_has_the_resident_teachers_bits(reports):
    for report in reports:
        assert len(report["scored"]) == 24
        assert all(case["right"] for case in report["scored"].values())


@pytest.mark.long
def test_each_rank_reads_half_of_the_layers_in_each_pass(reports, model):
    """Layers of one shape, so that the parts are equal but for the packing; the rest is small."""
    tensors = Checkpoint.open(model).tensors
    layers = sum(info.num_bytes for name, info in tensors.items() if ".layers." in name)
    rest = tensors["model.embed_tokens.weight"].num_bytes + tensors["model.norm.weight"].num_bytes
    for pass_tokens, passes in ((1000, 1), (16, 4)):
        read = [
            r["scored"][f"{model.name}|float32|one has none|{pass_tokens}|hidden"]["read"] for r in reports
        ]
        assert read[0] == pytest.approx(passes * layers / 2, rel=0.02)
        # The rank without sequences reads no embedding.
        assert passes * layers <= sum(read) <= passes * (layers + rest)


@pytest.mark.long
@pytest.mark.parametrize(
    ("case", "errors"),
    [
        ("other files", ("ModelError: ", "ModelError: ")),
        ("truncated", ("PeerFailed: ", "ModelError: ")),
        ("consumer fails", ("PeerFailed: ", "OSError: disk full")),
        ("consumer stops", ("Stopped: ", "Stopped: ")),
    ],
)
def test_a_failure_of_one_rank_ends_the_pass_on_both(reports, case, errors):
    for report, expected in zip(reports, errors, strict=True):
        assert report["failures"][case]["error"].startswith(expected)
        assert report["failures"][case]["gathered"] == [0, 1]
