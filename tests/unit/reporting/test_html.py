"""report.html from hand-made run folders: its content, refused folders, no external resources."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter
from report_pages import EVIL, PLAN, Page, sample, update_line
from results import result_of

from mergeopd.errors import StorageError
from mergeopd.reporting.events import (
    CheckpointSaved,
    Event,
    Note,
    RolloutSampled,
    RunFinished,
    TeacherTrace,
    UpdateDone,
)
from mergeopd.reporting.jsonl import UpdateRecord, sample_record
from mergeopd.reporting.page import html
from mergeopd.reporting.page.cost import cost_of
from mergeopd.reporting.page.curves import build_curves
from mergeopd.reporting.page.evaluated import build_failures
from mergeopd.reporting.page.html import HtmlReporter, write_report
from mergeopd.reporting.page.responses import LEVELS, build_responses, level
from mergeopd.reporting.page.run_data import load_run
from mergeopd.reporting.result import Estimate
from mergeopd.storage.responses import EvaluatedResponse, write_responses

UPDATES = TypeAdapter(UpdateRecord)


RESULT = result_of(
    {
        "math": {"base": 0.25, "expert/math": 0.75, "merge/ties": 0.2, "merged": 0.7},
        "code": {"base": 0.5, "expert/code": 0.5, "expert/math": 0.375, "merge/ties": 0.125, "merged": 0.4},
    },
    {"rollout": 30.0, "update": 60.0, "total": 100.0},
)


@pytest.fixture(autouse=True)
def _short_plotly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five megabytes less a page; the tests in a browser use the real one."""
    monkeypatch.setattr(html, "_plotly", lambda: "var Plotly = {};")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A finished run."""
    (tmp_path / "rollouts").mkdir()
    (tmp_path / "export").mkdir()
    (tmp_path / "plan.yaml").write_text(PLAN)
    lines = [json.dumps(update_line(n)) + "\n" for n in (1, 2, 3)]
    (tmp_path / "metrics.jsonl").write_text("".join(lines))
    (tmp_path / "rollouts/samples.jsonl").write_text(json.dumps(sample_record(sample())) + "\n")
    (tmp_path / "result.json").write_text(json.dumps(asdict(RESULT)))
    return tmp_path


def page_of(folder: Path) -> Page:
    path, _ = write_report(folder)
    return Page(path.read_text(encoding="utf-8"))


def document_of(page: Page) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(page.scripts[0])
    return document


# ----------------------------------------------------------------------------------------------- content


def test_the_curves_hold_the_numbers_of_the_metrics(folder: Path) -> None:
    document = document_of(page_of(folder))
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert document["updates"] == [1, 2, 3]
    checked = 0
    for key, chart in document["charts"].items():
        group, quantity = key.split("-", 1)
        for series in chart["series"]:
            if group == "run" and quantity == "seconds":
                expected = [line["cost"]["seconds"][series["name"]] for line in lines]
            elif quantity == "tokens_per_s":
                expected = [line["cost"][quantity] for line in lines]
            else:
                places = lines if group == "run" else [line[group][series["name"]] for line in lines]
                expected = [place[quantity] for place in places]
            factor = 100.0 if chart["unit"] == "%" else 1.0
            assert series["values"] == [None if v is None else factor * v for v in expected]  # to the bit
            checked += 1
    # reverse_kl, gap, entropy; two domains x nll, entropy, length, two shares; six of the run, seconds with two.
    assert checked == 3 + 2 * 5 + 5 + 2


def test_constant_quantities_have_no_chart(folder: Path) -> None:
    charts = document_of(page_of(folder))["charts"]
    # No verifier, factors of 1, nothing cut off, no such divergence.
    assert charts.keys().isdisjoint(
        {"domains-reward", "domains-weight", "domains-truncated_fraction", "teachers-jsd"}
    )
    lines = [update_line(1), update_line(2)]
    lines[1]["domains"]["code"]["truncated_fraction"] = 0.5
    lines[0]["domains"]["math"]["reward"] = 1.0
    ids = {c.id: c for c in build_curves([UPDATES.validate_python(line) for line in lines]).charts}
    assert ids["domains-truncated_fraction"].series[0].values == (0.0, 50.0)
    # Without measured accuracies it takes their place.
    assert [(s.name, s.values) for s in ids["accuracy-reward"].series] == [("math", (1.0, None))]


def test_long_runs_are_means_over_equal_stretches() -> None:
    updates = [UPDATES.validate_python(update_line(n)) for n in range(1, 8)]
    curves = build_curves(updates, max_points=3)
    assert curves.stretch == 3
    assert curves.updates == (3, 6, 7)
    (norm,) = [chart for chart in curves.charts if chart.id == "run-grad_norm"]
    # The second update's norm was not finite.
    assert norm.series[0].values == pytest.approx((0.2, 0.5, 0.7))


def test_the_result_table_and_the_time_are_those_of_the_result(folder: Path) -> None:
    text = page_of(folder).text
    assert re.search(
        r"math 1,000 25\.0 22\.\d to 27\.\d 75\.0 [^ ]+ to [^ ]+ 20\.0 [^ ]+ to [^ ]+ 70\.0 67\.\d to 72\.\d 90\.0 %",
        text,
    )
    assert "The student reaches its expert within noise in 0 of 2 domains" in text
    assert re.search(r"code 1,000 50\.0 .* 50\.0 .* 12\.5 .* 40\.0 [^ ]+ to [^ ]+ - ", text)
    assert re.search(r"model math code base 25\.0", text)
    assert "update 60.0 s · 60 %" in text
    assert "other 10.0 s · 10 %" in text  # between the stages
    assert "Wall time 1:40" in text
    assert "finished" in text


def test_the_recipe_is_shown_as_run(folder: Path) -> None:
    text = page_of(folder).text
    assert "merge 3 student reverse_kl, nll 0.5" in text
    assert "math /models/math bfloat16" in text


def test_a_response_has_a_colour_and_the_numbers_of_each_token(folder: Path) -> None:
    page = page_of(folder)
    tokens = [a for tag, a in page.elements if tag == "span" and a.get("data-v")]
    assert [t["data-v"] for t in tokens] == [
        "0 -0.5 -0.1", "0.25 -1 -0.2", "1 -1.5 -0.3", "9 -2 -0.4", "5 -0.1 -9",
    ]  # fmt: skip
    levels = [int(re.findall(r"h(\d+)", t["class"] or "")[0]) for t in tokens]
    assert levels == [0, 3, 8, 12, 12]
    assert "part" in (tokens[2]["class"] or "")
    assert [("out" in (t["class"] or "")) for t in tokens] == [False] * 4 + [True]
    # The last token is no part of this teacher's loss.
    assert f"mean {(0 + 0.25 + 1 + 9) / 4:.3g} nats" in page.text


def test_tokens_of_tools_are_shown_without_numbers(folder: Path) -> None:
    trace = TeacherTrace((0.5, None, None, 9.0, 1.5), (-0.1, None, None, -0.4, -0.2), masked=(3,))
    with_tool = sample(
        teachers={"math": trace},
        logprob_S=(-0.5, None, None, -2.0, -0.1),
        trained=(True, False, False, True, True),
    )
    (folder / "rollouts/samples.jsonl").write_text(json.dumps(sample_record(with_tool)) + "\n")
    page = page_of(folder)
    tokens = [a for tag, a in page.elements if tag == "span" and "data-v" in a]
    assert [t["data-v"] for t in tokens] == ["0.5 -0.5 -0.1", "", "", "9 -2 -0.4", "1.5 -0.1 -0.2"]
    assert [sorted({"out", "given", "h0"} & {*(t["class"] or "").split()}) for t in tokens] == [
        [], ["given", "h0"], ["given", "h0"], ["out"], [],
    ]  # fmt: skip
    assert "mean 1 nats" in page.text
    assert "5 tokens, 2 not by the assistant" in page.text


@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl", "jsd"])
def test_colours_grow_with_the_divergence_and_end(divergence: str) -> None:
    values = [i / 100 for i in range(500)]
    levels = [level(value, divergence) for value in values]
    assert levels == sorted(levels)
    assert (levels[0], levels[-1]) == (0, LEVELS)
    assert level(-1e-7, divergence) == 0  # rounding
    assert level(None, divergence) == LEVELS  # not finite


def test_without_teachers_the_students_own_log_probs_are_shown(folder: Path) -> None:
    record = sample_record(sample(teachers={}, divergence=""))
    (folder / "rollouts/samples.jsonl").write_text(json.dumps(record) + "\n")
    page = page_of(folder)
    assert next(a["data-v"] for a in page.all("span") if a.get("data-v")) == "0.5 -0.5 -"
    assert "-log p of the student, mean 1.02 nats" in page.text


# ------------------------------------------------------------------------------------ accuracy and cost


def test_accuracies_during_the_run_are_charted_between_base_and_expert(folder: Path) -> None:
    lines = [
        {
            "update": n,
            "accuracy": {"math": {"value": v, "low": v - 0.1, "high": v + 0.1}},
            "num_prompts": {"math": 64},
        }
        for n, v in ((0, 0.25), (2, 0.5))
    ]
    (folder / "accuracy.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = page_of(folder)
    student, final, base, expert = document_of(page)["charts"]["accuracy-math"]["series"]
    assert (student["x"], student["values"], student["low"]) == ([0, 2], [25.0, 50.0], [15.0, 40.0])
    own = RESULT.suites["math"].accuracy["merged"]
    assert final["x"] == [3]
    assert [final[key] for key in ("values", "low", "high")] == [
        [100 * v] for v in (own.value, own.low, own.high)
    ]  # type: ignore[operator]
    assert [(s["name"], s["kind"], s["values"]) for s in (base, expert)] == [
        ("base", "level", [25.0]), ("expert", "level", [75.0]),
    ]  # fmt: skip
    assert "student, 64 prompts" in page.text
    assert "at the end, 1,000 prompts" in page.text


def test_without_accuracies_the_page_says_how_to_get_them(folder: Path) -> None:
    assert "evaluation: {interim: {every: 20}}" in page_of(folder).text


def test_a_divergence_is_charted_over_its_phases_and_on_a_logarithmic_axis_over_a_decade() -> None:
    lines = [update_line(n, "cold" if n < 3 else "merge") for n in range(1, 6)]
    for line in lines[:2]:
        numbers = line["teachers"]["math"]
        numbers["forward_kl"] = numbers.pop("reverse_kl")
    lines[4]["teachers"]["math"]["reverse_kl"] = 0.002
    charts = build_curves([UPDATES.validate_python(line) for line in lines]).in_group("teachers")
    assert [(c.figure.key, c.span, c.phases, c.is_log) for c in charts[:2]] == [
        ("forward_kl", (1, 2), ("cold",), False),  # from 0.1 to 0.05
        ("reverse_kl", (3, 5), ("merge",), True),  # from 0.033 to 0.002
    ]


def test_the_cost_adds_up_over_updates_and_restarts(folder: Path) -> None:
    lines = [update_line(n) for n in (1, 2, 3, 4)]
    read = [2**30, 2**31, 2**30, 3 * 2**30]  # a restart after the second update
    for line, teacher_bytes in zip(lines, read, strict=True):
        line["cost"] |= {
            "teacher_bytes_read": teacher_bytes,
            "peak_memory_bytes": 2**30 * line["update"],
            "num_generated": {"student": 100, "teacher": 10},
            "flops": {"update": 3e12, "rollout": 1e12},
        }
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    cost = cost_of(load_run(folder))
    assert (cost.teacher_bytes, cost.peak_memory_bytes) == (5 * 2**30, 4 * 2**30)
    assert cost.num_generated == {"student": 400, "teacher": 40}
    assert cost.flops == {"update": 1.2e13, "rollout": 4e12}
    text = page_of(folder).text
    assert "operations 16 TFLOP operations by stage update 75 %, rollout 25 %" in text
    assert "operations per second 160 GFLOP/s" in text  # 1.6e13 in 100 s
    assert "generated by the student 400 tokens" in text


def test_a_run_below_its_base_is_not_green(folder: Path) -> None:
    good = {"math": {"base": 0.25, "expert/math": 0.75, "merged": 0.75}}
    for merged, expected in ((0.75, "good"), (0.5, "fair"), (0.1, "poor")):
        good["math"]["merged"] = merged
        (folder / "result.json").write_text(json.dumps(asdict(result_of(good))))
        page = page_of(folder)
        assert page.all("span", **{"class": f"status {expected}"})
        assert page.all("p", **{"class": f"verdict {expected}"})


def test_a_forgotten_skill_is_named_beside_the_status_and_not_green(folder: Path) -> None:
    accuracies = {"base": 0.25, "expert/math": 0.75, "merged": 0.75}
    result = result_of({"math": accuracies, "facts": {**accuracies, "base": 0.9, "merged": 0.1}})
    facts = replace(result.suites["facts"], expert=None)
    for suites, expected in (
        ({**result.suites, "facts": facts}, "finished, forgets facts"),
        (result.suites, "finished, below the base"),
    ):
        page = Page(
            html.render(replace(load_run(folder), result=replace(result, suites=suites)), datetime.now())
        )
        assert expected in page.text
        assert page.all("span", **{"class": f"status {'fair' if 'forgets' in expected else 'poor'}"})


def test_a_headroom_within_noise_is_marked_and_a_suite_may_lack_an_expert(folder: Path) -> None:
    result = result_of({"math": {"base": 0.5, "expert/math": 0.51, "merged": 0.505}}, num=100)
    (folder / "result.json").write_text(json.dumps(asdict(result)))
    assert "headroom in noise" in page_of(folder).text
    row = replace(result.suites["math"], expert=None, over_expert=None, recovered=Estimate(None))  # type: ignore[arg-type]
    without = replace(result, suites={"math": row}, mean_recovered=Estimate(None))
    text = Page(html.render(replace(load_run(folder), result=without), datetime.now())).text
    assert re.search(r"math 100 50\.0 [^ ]+ to [^ ]+ - - 50\.[05] ", text)


# ------------------------------------------------------------------------------------------- evaluation


def evaluated(key: str, reward: float, response: str = "r") -> EvaluatedResponse:
    return EvaluatedResponse("math", "math", key, 0, f"prompt {key}", "ref", response, reward, None, "eos", 1)


def test_failures_are_listed_beside_base_and_expert_regressions_first(folder: Path) -> None:
    rewards = {
        "merged": [1.0, 0.0, 0.0, *[0.0] * 30],
        "base": [0.0, 0.0, 0.0, *[0.0] * 30],
        "expert-math": [1.0, 0.0, 1.0, *[0.0] * 30],
    }
    for name, values in rewards.items():
        rows = [evaluated(f"math:{i}", v, f"{name} {i}") for i, v in enumerate(values)]
        if name == "merged":
            rows[2] = replace(rows[2], prompt=EVIL, response=EVIL)
        write_responses(folder / "evaluation" / f"{name}.parquet", rows)
    page = page_of(folder)
    failures = build_failures(load_run(folder))["math"]
    assert (failures.num_prompts, failures.num_failed, failures.num_regressions) == (33, 32, 1)
    assert len(failures.prompts) == 20
    first = failures.prompts[0]
    assert (first.prompt, [r.title for r in first.responses]) == (EVIL, ["merged", "base", "math"])
    assert [r.reward for r in first.responses] == [0.0, 0.0, 1.0]
    assert "math 32 of 33 prompts failed, 1 on which the base or the expert does better" in page.text
    assert "12 more are in evaluation/merged.parquet" in page.text
    assert EVIL in page.text
    assert not page.all("img")
    (folder / "evaluation/base.parquet").write_bytes(b"PAR1")
    assert "evaluation/base.parquet is damaged" in page_of(folder).text


# ------------------------------------------------------------------------------------- sampled responses


def test_the_page_opens_at_the_most_coloured_of_even_updates() -> None:
    def at(update: int) -> RolloutSampled:
        value = {1: 9.0, 66: 5.0}.get(update, 0.1)
        origin = (
            "teacher" if update == 1 else "student"
        )  # text of teachers does not count beside the student's
        return sample(
            update=update, origin=origin, teachers={"math": TeacherTrace((value,) * 5, (-0.1,) * 5)}
        )

    sampled = build_responses([at(update) for update in (1, *range(11, 221, 11))])
    assert sampled is not None
    assert sampled.updates == (1, *range(22, 221, 22))
    assert sampled.most_coloured == 66


def test_candidates_reach_the_script_as_probabilities(folder: Path) -> None:
    top = ((("It", math.log(0.5)), ("<b>", math.log(0.25))), None, None, None, None)
    trace = replace(sample().teachers["math"], candidates=top)
    record = sample_record(sample(teachers={"math": trace}, candidates=top, reference="2"))
    (folder / "rollouts/samples.jsonl").write_text(json.dumps(record) + "\n")
    page = page_of(folder)
    candidates = document_of(page)["candidates"]
    assert candidates["texts"] == ["It", "<b>"]
    assert candidates["rows"] == [[[0, 0.5, 1, 0.25], [], [], [], []]] * 2
    (response,) = page.all("pre", **{"class": "response"})
    assert (response["data-top-s"], response["data-top-t"]) == ("0", "1")
    assert "right merge" in page.text  # the reward is 1
    assert "reference 2" in page.text


def test_the_export_is_named_in_the_commands_that_load_it(folder: Path) -> None:
    (folder / "export" / "chat_template.jinja").write_text("")
    text = page_of(folder).text
    assert f"vllm serve {folder}/export --host 127.0.0.1" in text
    assert "apply_chat_template" in text


# ------------------------------------------------------------------------------------------------- safety


def test_the_page_loads_nothing_and_runs_only_its_own_scripts(folder: Path) -> None:
    page = page_of(folder)
    for _, attributes in page.elements:
        for name in ("src", "srcset", "href", "action", "data", "poster", "background"):
            address = attributes.get(name)
            assert address is None or address.startswith(("#", "data:"))
        assert not any(name.startswith("on") for name in attributes)
    (policy,) = page.all("meta", **{"http-equiv": "Content-Security-Policy"})
    assert (policy["content"] or "").startswith(
        "default-src 'none'; style-src 'unsafe-inline'; img-src data:; "
    )
    hashes = {f"'sha256-{html._digest(script)}'" for script in page.scripts[1:]}
    assert set((policy["content"] or "").split("script-src ")[1].split()) == hashes
    style = html._part("style.css")
    assert "url(" not in style
    assert "@import" not in style


@pytest.mark.parametrize("place", ["prompt", "tokens", "domain", "phase", "teacher", "name"])
def test_untrusted_text_is_escaped(folder: Path, place: str) -> None:
    plain = page_of(folder)
    line = update_line(1, EVIL if place == "phase" else "merge")
    if place == "domain":
        line["domains"][EVIL] = line["domains"].pop("math")
    if place == "teacher":
        line["teachers"][EVIL] = line["teachers"].pop("math")
    changes: dict[str, Any] = {
        "prompt": {"prompt": EVIL},
        "tokens": {"tokens": (EVIL, "a", "b", "c", "d")},
        "domain": {"domain": EVIL},
        "phase": {"phase": EVIL},
        "teacher": {"teachers": {EVIL: sample().teachers["math"]}},
    }.get(place, {})
    (folder / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    (folder / "rollouts/samples.jsonl").write_text(json.dumps(sample_record(sample(**changes))) + "\n")
    if place == "name":
        (folder / "plan.yaml").write_text(PLAN.replace("two-experts", json.dumps(EVIL)))
    page = page_of(folder)
    assert EVIL in page.text
    assert not page.all("img")
    assert len(page.scripts) == len(plain.scripts) == 3
    json.loads(page.scripts[0])  # still whole


def test_making_a_report_imports_no_torch(folder: Path) -> None:
    code = (
        "import sys, pathlib; from mergeopd.reporting.page.html import write_report;"
        "write_report(pathlib.Path(sys.argv[1]));"
        "print([m for m in ('torch', 'transformers', 'datasets', 'pandas') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


# ------------------------------------------------------------------------------------------- bad folders


def refused(folder: Path) -> str:
    with pytest.raises(StorageError) as caught:
        write_report(folder)
    return str(caught.value)


def test_a_folder_without_a_run_is_refused(tmp_path: Path, folder: Path) -> None:
    assert "no such folder; name a run folder" in refused(tmp_path / "nowhere")
    assert "is a file; name a run folder" in refused(folder / "plan.yaml")
    assert "not a run folder, it has none of plan.yaml, metrics.jsonl, result.json" in refused(
        folder / "export"
    )
    assert not (folder / "export/report.html").exists()


def test_another_format_is_refused(folder: Path) -> None:
    (folder / "plan.yaml").write_text(PLAN.replace("format: 1", "format: 2").replace("0.1.0", "9.9.1"))
    assert "plan.yaml has format 2, and this version of mergeopd reads 1; use mergeopd 9.9.1" in refused(
        folder
    )


def damage(folder: Path, name: str, text: str | None) -> tuple[str, ...]:
    if text is None:
        (folder / name).unlink()
    else:
        (folder / name).write_text(text)
    _, notes = write_report(folder)
    shown = page_of(folder).text
    assert all(note in shown for note in notes)
    return notes


def lines() -> Iterator[str]:
    return (json.dumps(update_line(n)) for n in (1, 2, 3))


def three(change: Callable[[list[str]], None]) -> str:
    texts = [line + "\n" for line in lines()]
    change(texts)
    return "".join(texts)


@pytest.mark.parametrize(
    ("name", "text", "note"),
    [
        ("plan.yaml", None, "plan.yaml is missing: recipe, phases and versions cannot be shown"),
        ("plan.yaml", "format: [", "plan.yaml is damaged: recipe, phases and versions cannot be shown"),
        ("metrics.jsonl", None, "metrics.jsonl has no updates, although training is finished"),
        ("metrics.jsonl", three(lambda t: t.__setitem__(2, t[2][:50])), "metrics.jsonl: the last line is incomplete and left out"),
        ("metrics.jsonl", three(lambda t: t.__setitem__(1, t[1][50:])), "metrics.jsonl: line 2 is damaged and left out"),
        ("metrics.jsonl", three(lambda t: t.reverse()), "metrics.jsonl: updates are out of order or repeated; the last line of each counts"),
        ("rollouts/samples.jsonl", None, "rollouts/samples.jsonl is missing or empty: no responses can be shown"),
        ("result.json", None, "result.json is missing: the evaluation is running, or `mergeopd run` resumes with it"),
        ("result.json", "{", "result.json is damaged: the result cannot be shown; `mergeopd eval` measures again"),
        ("result.json", '{"domains": {}}', "result.json is of another version of mergeopd: the result cannot be shown; `mergeopd eval` measures again"),
    ],
)  # fmt: skip
def test_a_damaged_folder_is_shown_in_part_with_notes(
    folder: Path, name: str, text: str | None, note: str
) -> None:
    assert note in damage(folder, name, text)


def test_a_sample_whose_numbers_do_not_fit_its_tokens_is_left_out(folder: Path) -> None:
    with pytest.raises(ValueError, match="the numbers of tokens and values differ"):
        sample(logprob_S=(-1.0,))
    record = {**sample_record(sample()), "logprob_S": [-1.0]}
    notes = damage(folder, "rollouts/samples.jsonl", json.dumps(record) + "\n")
    assert "rollouts/samples.jsonl: line 1 is damaged and left out" in notes


def test_a_run_without_updates_has_a_note(tmp_path: Path) -> None:
    (tmp_path / "plan.yaml").write_text(PLAN)
    page = page_of(tmp_path)
    assert load_run(tmp_path).notes == ("no update has been made yet: there are no curves",)
    assert "update 0 of 3" in page.text
    assert not page.all("section", id="teachers")
    assert page.all("section", id="recipe")


# ----------------------------------------------------------------------------------------- during the run


class KeptEvents:
    """Keeps the events that are emitted."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def emit(self, event: Event) -> None:
        self.events.append(event)


def update_event(update: int, phase: str) -> UpdateDone:
    return UpdateDone(update, phase, update, 0.0, 0.0, 0.0, 1, 1.0, {}, {}, {})


def test_it_is_written_at_checkpoints_phase_ends_and_the_end_if_time_allows(folder: Path) -> None:
    now = 1000.0
    reporter = HtmlReporter(folder, KeptEvents(), clock=lambda: now)
    path = folder / "report.html"

    def written(event: Event) -> bool:
        path.unlink(missing_ok=True)
        reporter.emit(event)
        return path.exists()

    checkpoint = CheckpointSaved(1, folder)
    assert not written(update_event(1, "cold"))
    assert written(checkpoint)
    now += 29
    assert not written(checkpoint)  # too soon
    now += 2
    assert not written(update_event(2, "cold"))
    assert written(update_event(3, "merge"))
    assert not written(checkpoint)
    assert written(RunFinished({}))  # always


def test_a_slow_report_is_written_seldom(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    writes: list[float] = []

    def slow(path: Path) -> None:
        nonlocal now
        writes.append(now)
        now += 10.0

    monkeypatch.setattr(html, "write_report", slow)
    reporter = HtmlReporter(folder, KeptEvents(), clock=lambda: now)
    for _ in range(100):
        reporter.emit(CheckpointSaved(1, folder))
        now += 60.0
    assert all(later - earlier >= 500.0 for earlier, later in pairwise(writes))
    assert len(writes) > 5


def test_a_failure_becomes_a_note_and_does_not_end_the_run(folder: Path) -> None:
    (folder / "report.html").mkdir()
    kept = KeptEvents()
    HtmlReporter(folder, kept).emit(RunFinished({}))
    (note,) = kept.events
    assert isinstance(note, Note)
    assert "report.html was not written: cannot write" in note.text
