"""The model card of an export: written with it, replaced after the evaluation, free of private paths."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from ruamel.yaml import YAML

import mergeopd
from mergeopd.recipe.schema import Recipe
from mergeopd.reporting.events import AlarmRaised
from mergeopd.reporting.model_card import RECIPE, CardModel, _decoding, common_licence, model_card
from mergeopd.reporting.page.run_data import load_run
from mergeopd.storage.folders import MODEL_CARD, verify

EVALUATION = {
    "prompts": [{"source": "held_out.jsonl", "domain": "right", "verifier": "exact"}],
    "max_new_tokens": 2,
}


@pytest.fixture
def recipe(write_job: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "held_out.jsonl").write_text('{"prompt": "a", "answer": "c"}\n')
    path = write_job({"evaluation": EVALUATION}, model=str(tmp_path / "base"))
    (tmp_path / "base" / MODEL_CARD).write_text("---\nlicense: apache-2.0\n---\n")
    for name in ("one", "two"):
        card = tmp_path / f"{name}.yaml"
        card.write_text(card.read_text().replace("}", ', "licence": "Apache 2.0", "domains": ["x"]}'))
    return path


def test_a_card_is_written_with_the_export_and_again_with_the_result(recipe: Path, tmp_path: Path) -> None:
    untested = mergeopd.run(recipe, set={"evaluation": None, "output": "untested"}).export
    assert untested is not None
    first = (untested / MODEL_CARD).read_text()
    assert "This model has not been evaluated." in first
    run = mergeopd.run(recipe)
    assert run.export is not None
    assert run.result is not None
    assert verify(run.export) is None
    card = ModelCard.load(run.export / MODEL_CARD)
    data = card.data.to_dict()
    assert data["license"] == "apache-2.0"
    assert (data["library_name"], "base_model" in data) == ("transformers", False)
    assert set(data["tags"]) == {"mergeopd", "distillation", "on-policy-distillation"}
    assert card.data.eval_results is not None
    (measured,) = card.data.eval_results
    accuracy = run.result.suites["right"].accuracy["merged"]
    assert measured.metric_value == accuracy.value
    assert measured.metric_name is not None
    assert re.fullmatch(r"accuracy \(n = 1, 95 % interval [\d.]+ to [\d.]+\)", measured.metric_name)
    text = card.text
    assert f"**The student {run.result.verdict}.**" in text
    assert "| teacher `two` | two | - |" in text
    assert "1. `merge`: 2 updates, 4 prompts a round, on responses of the student itself" in text
    assert "MODEL=run/export " in text
    assert "Greedy decoding, at most 2 tokens." in text
    # Neither file names a private folder, and the recipe is one.
    for file in (MODEL_CARD, RECIPE):
        assert str(tmp_path) not in (run.export / file).read_text()
    document = YAML(typ="safe").load(run.export / RECIPE)
    assert (document["student"]["model"], document["output"]) == ("base", "runs/job")
    assert Recipe.model_validate(document).name == "job"


def test_decoding_is_told_by_suite_where_suites_differ() -> None:
    greedy = {"name": "math", "max_new_tokens": 8, "samples": 1, "temperature": 0.0, "top_p": 1.0}
    sampled = {**greedy, "name": "aime", "samples": 16, "temperature": 0.6, "top_p": 0.95}
    assert _decoding([greedy, sampled, {**greedy, "name": "code"}]) == [
        "- math and code: greedy decoding, at most 8 tokens.",
        "- aime: mean of 16 responses to each prompt, sampled at temperature 0.6 and top_p 0.95, at most 8 tokens.",
    ]


def test_alarms_and_overlap_stand_in_the_card(recipe: Path) -> None:
    folder = mergeopd.run(recipe).folder
    data = load_run(folder)
    assert data.result is not None
    alarm = AlarmRaised(2, "collapse", "right", "reward is 0", "the learning rate", "lower it", False)
    suite = replace(data.result.suites["right"], overlap=1)
    changed = replace(data, alarms=(alarm,), result=replace(data.result, suites={"right": suite}))
    text = model_card(changed)
    assert "- update 2, collapse (right): reward is 0. Likely cause: the learning rate." in text
    assert "- right: 1 of 1 evaluation prompts were also trained on." in text


def test_models_of_the_hub_and_their_licences(tmp_path: Path) -> None:
    snapshot = tmp_path / "hub" / "models--Qwen--Qwen3-0.6B" / "snapshots" / "c1899de289a0"
    snapshot.mkdir(parents=True)
    (snapshot / MODEL_CARD).write_text("---\nlicense: other\nlicense_name: qwen-research\n---\n")
    model = CardModel.of(str(snapshot), "f" * 64, None)
    assert (model.hub_id, model.title, model.revision) == (
        "Qwen/Qwen3-0.6B",
        "Qwen/Qwen3-0.6B",
        "c1899de289a0",
    )
    assert model.licence == "qwen-research"
    assert CardModel.of(str(snapshot), None, "MIT").licence == "MIT"
    own = CardModel.of(str(tmp_path / "private" / "expert"), None, None)
    assert (own.hub_id, own.title, own.licence) == (None, "expert", None)
    assert common_licence(["Apache 2.0", "apache-2.0"]) == "apache-2.0"
    assert common_licence(["apache-2.0", None]) is None
    assert common_licence(["apache-2.0", "mit"]) is None
