"""The report of a real run in a real browser: no requests, no errors in the console, a layout that fits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

DRAWN = "document.querySelectorAll('.plot .main-svg .scatterlayer .trace').length"


@pytest.fixture(scope="module")
def run_folder(write_job_in: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of six updates with an evaluation, by the command line."""
    recipe = write_job_in(
        tmp_path_factory.mktemp("report"),
        {
            "phases": [
                {
                    "name": "warm",
                    "text": "teacher",
                    "updates": 3,
                    "prompts_per_round": 4,
                    "loss": "forward_kl",
                },
                {"name": "merge", "updates": 3, "prompts_per_round": 4, "loss": "reverse_kl"},
            ],
            "checkpoint": {"every": 3},
        },
    )
    left, right = recipe.parent / "left_eval.jsonl", recipe.parent / "right_eval.jsonl"
    for path in (left, right):
        path.write_text(json.dumps({"prompt": "a c", "answer": "c"}) + "\n")
    document = json.loads(recipe.read_text())
    document["evaluation"] = {
        "prompts": [
            {"source": left.name, "domain": "left", "verifier": "exact", "expert": "one"},
            {"source": right.name, "domain": "right", "verifier": "exact", "expert": "two"},
        ]
    }
    recipe.write_text(json.dumps(document))
    subprocess.run(
        [sys.executable, "-m", "mergeopd", "run", str(recipe)],
        check=True,
        capture_output=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    return recipe.parent / "run"


def document_of(page: str) -> dict[str, Any]:
    text = page.split('id="page-data">')[1].split("</script>")[0]
    document: dict[str, Any] = json.loads(text)
    return document


def test_a_run_leaves_a_report_of_its_own_numbers(run_folder: Path) -> None:
    page = (run_folder / "report.html").read_text(encoding="utf-8")
    lines = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    charts = document_of(page)["charts"]
    (loss,) = charts["run-loss"]["series"]
    assert loss["values"] == [line["loss"] for line in lines]
    first = next(s for s in charts["teachers-forward_kl"]["series"] if s["name"] == "one")
    assert first["values"] == [line["teachers"]["one"].get("forward_kl") for line in lines]
    samples = [json.loads(line) for line in (run_folder / "rollouts/samples.jsonl").read_text().splitlines()]
    # Both prompts of each of two domains at every one of six updates.
    assert [s["update"] for s in samples] == [n for n in range(1, 7) for _ in range(4)]
    assert page.count('class="response"') == sum(len(s["teachers"]) for s in samples)
    assert ">finished</span>" in page


@pytest.mark.parametrize("width", [390, 1440])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_the_page_works_alone(run_folder: Path, browser: Any, width: int, dark: bool) -> None:
    url = (run_folder / "report.html").as_uri()
    browser.show(url, width=width, height=20_000, dark=dark)  # all of it is in sight
    charts = document_of((run_folder / "report.html").read_text(encoding="utf-8"))["charts"]
    wanted = sum(len(chart["series"]) for chart in charts.values())
    browser.evaluate(
        f"new Promise(done => {{ const wait = () => {DRAWN} === {wanted} ? done() : setTimeout(wait, 20);"
        " wait(); })"
    )
    assert browser.evaluate("document.documentElement.scrollWidth") == width  # nothing sticks out
    browser.evaluate("document.querySelectorAll('details').forEach(e => { e.open = true; })")
    assert browser.evaluate("document.documentElement.scrollWidth") == width
    background = browser.evaluate("getComputedStyle(document.body).backgroundColor")
    assert background == ("rgb(19, 20, 22)" if dark else "rgb(247, 247, 245)")
    small = browser.evaluate(
        "[...document.querySelectorAll('body *')].filter(e => e.childNodes.length === 1 && e.innerText"
        " && e.checkVisibility() && parseFloat(getComputedStyle(e).fontSize) < 11).map(e => e.outerHTML)"
    )
    assert small == []

    # Colour grows with the divergence.
    heat = "[...document.querySelectorAll('.heat-key i')].map(e => getComputedStyle(e).backgroundColor)"
    alphas = [float(colour.rstrip(")").split("/")[1]) for colour in browser.evaluate(heat)]
    assert alphas == sorted(alphas)
    assert alphas[0] == 0.0
    assert alphas[-1] > 0.7

    # Another update, then a token, then the other theme.
    browser.evaluate(
        "const at = document.getElementById('at'); at.value = 4; at.dispatchEvent(new Event('input'))"
    )
    panels = "[...document.querySelectorAll('[data-update]')].filter(e => e.checkVisibility())"
    assert browser.evaluate(f"{panels}.map(e => e.dataset.update)") == [
        "5",
        "5",
    ]  # one slider for both domains
    token = "document.querySelector('[data-update=\"5\"] .response span')"
    browser.evaluate(f"{token}.dispatchEvent(new MouseEvent('mouseover', {{bubbles: true}}))")
    value = browser.evaluate(f"{token}.dataset.v").split()[0]
    tip = browser.evaluate("document.getElementById('tip').innerText")
    assert f"{value} nats" in tip
    # The three candidates of the teacher and the student's, and no line of the token is covered.
    assert browser.evaluate("document.querySelectorAll('#tip .best div').length") == 6
    box = "document.getElementById('tip').getBoundingClientRect()"
    rect = f"{token}.getBoundingClientRect()"
    assert browser.evaluate(f"{box}.bottom <= {rect}.top || {box}.top >= {rect}.bottom")
    browser.evaluate("document.getElementById('theme').click()")
    assert browser.evaluate("getComputedStyle(document.body).backgroundColor") != background
    browser.evaluate("document.querySelector('[data-series]').click()")
    browser.evaluate("new Promise(done => setTimeout(done, 50))")

    assert browser.complaints() == []
    assert browser.requests() == [url]


def test_a_script_that_slips_in_does_not_run_and_nothing_is_fetched(run_folder: Path, browser: Any) -> None:
    text = (run_folder / "report.html").read_text(encoding="utf-8")
    page = run_folder / "slipped.html"
    slipped = "<script>window.slipped = true</script><img src='http://127.0.0.1:9/a.png'>"
    page.write_text(text.replace("<main>", f"<main>{slipped}"), encoding="utf-8")
    browser.show(page.as_uri())
    assert browser.evaluate("window.slipped === undefined")
    assert any("Content Security Policy" in text for text in browser.complaints())


def test_all_charts_are_drawn_without_scrolling_and_fill_their_cards_on_paper(
    run_folder: Path, browser: Any
) -> None:
    browser.show((run_folder / "report.html").as_uri(), width=1440, height=600)
    missing = "document.querySelectorAll('.plot:not(:has(.main-svg))').length"
    browser.evaluate(
        f"new Promise(done => {{ const wait = () => {missing} ? setTimeout(wait, 20) : done(); wait(); }})"
    )
    browser.evaluate("dispatchEvent(new Event('beforeprint'))")
    browser.call("Emulation.setEmulatedMedia", media="print")
    browser.call(
        "Emulation.setDeviceMetricsOverride", width=718, height=1000, deviceScaleFactor=1, mobile=False
    )
    widths = "[...document.querySelectorAll('.plot')].map(e => [e.clientWidth, e.querySelector('.main-svg').clientWidth])"
    assert all(card == picture for card, picture in browser.evaluate(widths))
    browser.call("Emulation.setEmulatedMedia", media="")


def test_the_numbers_of_a_chart_can_be_downloaded(run_folder: Path, browser: Any, tmp_path: Path) -> None:
    browser.show((run_folder / "report.html").as_uri())
    browser.call("Page.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path))
    browser.evaluate(
        "document.querySelector('[data-chart=\"run-loss\"]').closest('figure').querySelector('.csv').click()"
    )
    file = tmp_path / "run-loss.csv"
    while not file.exists():  # renamed when it is complete
        browser.evaluate("new Promise(done => setTimeout(done, 20))")
    header, *rows = file.read_text().splitlines()
    lines = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    assert header == "update,loss"
    assert [float(row.split(",")[1]) for row in rows] == [line["loss"] for line in lines]
