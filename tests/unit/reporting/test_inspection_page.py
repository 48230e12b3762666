"""inspect.html from made-up inspections: its content, escaped text, shared strings, places on charts."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from datetime import UTC, datetime
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import pytest
from inspections import CONTROL_CHARACTERS, inspected_teacher, inspection, response
from report_pages import EVIL, Page

from mergeopd.reporting.inspection import (
    Compatibility,
    DiffSpan,
    Finding,
    Inspection,
    PositionBucket,
    TeacherInspection,
    TemplateDiff,
    TokenCandidate,
    Verdict,
)
from mergeopd.reporting.page import inspection as page_module
from mergeopd.reporting.page.inspection import headline, render, sides, write_inspection_page
from mergeopd.reporting.page.inspection_charts import (
    alignment_chart,
    nice_ticks,
    position_charts,
    teacher_map,
)
from mergeopd.reporting.page.inspection_tokens import TokenPool
from mergeopd.reporting.page.responses import level
from mergeopd.reporting.page.text import visible
from mergeopd.reporting.result import Estimate

NOTHING: dict[str, Any] = {"domains": (), "alignments": (), "conflicts": (), "checkpoints": (), "cost": None}
NOW = datetime(2026, 1, 2, tzinfo=UTC)


def document_of(page: Page) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(page.scripts[0])
    return document


def test_the_page_has_every_part_of_the_inspection(tmp_path: Path) -> None:
    made = inspection()
    write_inspection_page(made, tmp_path / "inspect.html")
    page = Page((tmp_path / "inspect.html").read_text(encoding="utf-8"))
    ids = [attributes["id"] for attributes in page.all("section")]
    teachers = [f"teacher-{i}" for i in range(7)]
    assert ids == [
        "overview",
        *teachers,
        "alignments",
        "conflicts",
        "domains",
        "checkpoints",
        "cost",
        "settings",
    ]
    assert {link["href"] for link in page.all("a")} == {f"#{id}" for id in ids}
    assert "1 of 7 teachers is ready to teach: math" in page.text
    for teacher in made.teachers:
        assert teacher.verdict.sentence in page.text
        assert all(finding.text in page.text for finding in teacher.compatibility.findings)
    assert "noisy beyond token 1,024" in page.text
    assert "42.0 → 63.0 %" in page.text
    assert "the student's template 81.0 76.0 to 86.0" in page.text
    assert "rises most at token 1,024: 0.38 before (81,000 tokens), 1.4" in page.text
    assert "0.084 0.064 to 0.104" in page.text  # reverse KL with its interval
    assert "-0.21 -0.27 to -0.15" in page.text.replace("\u2212", "-")  # a conflict
    assert all(f"{100 * domain.token_share:.1f}" in page.text for domain in made.domains)
    assert all(rank.checkpoint in page.text for rank in made.checkpoints)
    assert "2.0 -2.0 to 6.0" in page.text  # points that a checkpoint is behind the best
    assert all(name in page.text for name in made.settings)


def test_parts_that_an_inspection_lacks_are_left_out() -> None:
    unknown = TeacherInspection(
        "only", "models/only", None, Verdict("unknown", "Not run."), Compatibility(())
    )
    made = replace(inspection(1, 8), teachers=(unknown,), **NOTHING, notes=())
    page = Page(render(made, NOW))
    assert [a["id"] for a in page.all("section")] == ["overview", "teacher-0", "settings"]
    assert "only: not known" in page.text
    assert not page.all("figure")
    assert document_of(page)["responses"] == []
    ready = tuple(replace(inspected_teacher("math", 0), name=name) for name in ("a", "b", "c"))
    assert headline(ready) == "All 3 teachers are ready to teach"
    assert headline((*ready[:2], unknown)) == "2 of 3 teachers are ready to teach: a and b"
    assert headline((unknown, unknown)) == "None of 2 teachers is ready"


# ------------------------------------------------------------------------------------------- untrusted text


def _with_evil_everywhere(text: str) -> Inspection:
    made = inspection(1, 12)
    teacher = made.teachers[0]
    sampled = response("math", 0, 12)
    token = replace(
        sampled.tokens[0],
        text=text,
        candidates_S=(TokenCandidate(text, 0.5),),
        candidates_T=(TokenCandidate(text, 0.25),),
    )
    assert teacher.signal is not None
    evil = replace(
        teacher,
        name=text,
        model=text,
        licence=text,
        verdict=replace(
            teacher.verdict,
            sentence=text,
            remedy=f"`{text}`",
            reasons=tuple(replace(r, text=text, threshold=text) for r in teacher.verdict.reasons),
        ),
        compatibility=Compatibility(
            (Finding(text, "problem", text, text),),
            (TemplateDiff(text, (DiffSpan(text, ""), DiffSpan(text, text)), (text,)),),
        ),
        by_domain={text: teacher.signal, "other": teacher.signal},
        domain_verdicts={text: Verdict("noisy", text, remedy=text)},
        responses=(replace(sampled, prompt=text, domain=text, tokens=(token,), teacher_response=text),),
    )
    return replace(
        made,
        recipe=text,
        student=text,
        created=text,
        plan_hash=text,
        settings={text: text},
        teachers=(evil, *made.teachers[1:]),
        domains=(replace(made.domains[0], domain=text),),
        conflicts=(replace(made.conflicts[0], first=text),),
        checkpoints=(replace(made.checkpoints[0], domain=text, checkpoint=text),),
        notes=(text,),
        seconds={text: 1.0},
    )


@pytest.mark.parametrize(
    "text", [EVIL, f"'\"><b onclick=x>{CONTROL_CHARACTERS}", "]]>--><!--", "{{ 7 * 7 }}"]
)
def test_untrusted_text_stays_text(text: str) -> None:
    plain, html = Page(render(inspection(1, 12), NOW)), render(_with_evil_everywhere(text), NOW)
    page = Page(html)
    assert page.text.count(" ".join(visible(text).split())) > 20
    assert not page.all("img")
    assert not any("onclick" in attributes for _, attributes in page.elements)
    assert len(page.scripts) == len(plain.scripts) == 2
    document = document_of(page)
    assert visible(text) in document["texts"]
    assert document["responses"][0]["texts"] == [document["texts"].index(visible(text))]
    hidden = [char for char in CONTROL_CHARACTERS if visible(char) != char]
    assert len(hidden) == 6
    assert not any(char in html or f"\\u{ord(char):04x}" in html for char in hidden)
    rows = [json.loads(a["data-rows"] or "") for a in page.all("div", role="img")]
    assert [visible(text), "0.108"] in rows[0]


def test_hidden_characters_are_shown_by_number() -> None:
    assert visible("a\u202eb\x00\x1b[0m\r\n\tc") == "a⟨202E⟩b⟨00⟩⟨1B⟩[0m⟨0D⟩\n\tc"
    assert visible("👩‍👩‍👧 é नमस्ते\ud800") == "👩‍👩‍👧 é नमस्ते⟨D800⟩"


def test_equal_lines_face_each_other() -> None:
    spans = (
        DiffSpan("", "<system>\nBe brief.\n"),
        DiffSpan("<user>\nHi\n", "<user>\nHi\n"),
        DiffSpan("<a>\n\n", "<b>"),
        DiffSpan("x" * 1000, "x" * 1000),
    )
    both = sides(spans)
    lines = {}
    for side, parts in both.items():
        ends = list(accumulate(text.count("\n") for _, text in parts))
        lines[side] = [end for (kind, _), end in zip(parts, ends, strict=True) if kind == "equal"]
    assert lines["student"] == lines["teacher"] == [4, 6, 6]
    assert [kind for kind, _ in both["student"][:2]] == ["absent", "pad"]
    assert ("left_out", "680 equal characters") in both["teacher"]


# -------------------------------------------------------------------------------------------------- tokens


def test_tokens_reach_the_script_with_texts_and_candidates_written_once() -> None:
    sampled = response("sql", 0, 40, num_candidates=7, is_foreign=True)
    same = replace(sampled, teacher_response="other")
    pool = TokenPool(1000)
    shown = [pool.add(sampled), pool.add(same)]
    document = json.loads(json.dumps(pool.document()))
    texts = document["texts"]
    assert len(set(texts)) == len(texts)
    assert len(document["rows"]) == 2  # student and teacher, though two responses have them
    row = document["responses"][1]
    assert [texts[i] for i in row["texts"]] == [token.text for token in sampled.tokens]
    for i, token in enumerate(sampled.tokens):
        if token.reverse_kl is None:
            assert (row["reverse_kl"][i], row["levels"][i]) == (None, "-")
        else:
            assert row["reverse_kl"][i] == pytest.approx(token.reverse_kl, rel=6e-3)
            assert int(row["levels"][i], 16) == level(token.reverse_kl, "reverse_kl")
        for side, candidates in (("student", token.candidates_S), ("teacher", token.candidates_T)):
            flat = document["rows"][row[side]][i]
            wanted = candidates[:5]  # the likeliest
            assert [texts[j] for j in flat[::2]] == [candidate.text for candidate in wanted]
            assert flat[1::2] == pytest.approx([candidate.probability for candidate in wanted], rel=6e-3)
    known = [token.reverse_kl for token in sampled.tokens if token.reverse_kl is not None]
    assert shown[0].mean == pytest.approx(sum(known) / len(known))
    assert shown[0].num_strong == sum(value >= 1 for value in known)
    assert max(shown[0].stripes) == max(level(value, "reverse_kl") for value in known)


def test_pages_of_many_tokens_stay_small() -> None:
    teachers = tuple(inspected_teacher(name, 8, 500) for name in ("math", "code", "chat", "agent", "summary"))
    html = render(replace(inspection(0), teachers=teachers), NOW)
    assert len(html.encode()) < 3_500_000
    assert html.count("<span") < 4_000  # tokens are made by the script


def test_long_responses_are_cut_equally(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page_module, "MAX_TOKENS", 90)
    page = Page(render(replace(inspection(0), teachers=(inspected_teacher("code", 3, 100),)), NOW))
    assert [len(row["levels"]) for row in document_of(page)["responses"]] == [30, 30, 30]
    assert page.text.count("70 more tokens are in inspect.json") == 3


# -------------------------------------------------------------------------------------------------- charts


def test_points_of_curves_are_where_their_values_are() -> None:
    signal = inspected_teacher("agent").signal
    assert signal is not None
    gap = replace(signal.positions[3], reverse_kl=None)
    signal = replace(signal, positions=(*signal.positions[:3], gap, *signal.positions[4:]))
    charts = {chart.title: chart for chart in position_charts(signal, {}, 1500)}
    assert list(charts) == ["Reverse KL", "Overlap", "Entropy", "Overlap advantage"]
    for title, key, factor in (("Reverse KL", "reverse_kl", 1), ("Overlap", "overlap", 100)):
        chart = charts[title]
        top, bottom = (float(chart.y_ticks[i].label) for i in (-1, 0))
        assert (chart.y_ticks[-1].place, chart.y_ticks[0].place) == (0, 100)
        (line,) = chart.lines
        points = re.findall(r"M([\d.]+) ([\d.]+)h0", line.points)
        known = [(i, bucket) for i, bucket in enumerate(signal.positions) if getattr(bucket, key) is not None]
        assert len(points) == len(known)
        for (x, y), (i, bucket) in zip(points, known, strict=True):
            assert float(x) == pytest.approx(100 * (i + 0.5) / 9, abs=0.01)
            value = top + (bottom - top) * float(y) / 100
            assert value == pytest.approx(factor * getattr(bucket, key), abs=1e-3 * top)
    assert charts["Reverse KL"].lines[0].path.count("M") == 2  # a gap is not drawn over
    # Token 1,500 is 476 of 1,024 into the eighth of nine buckets.
    assert charts["Entropy"].marker == pytest.approx(100 * (7 + 476 / 1024) / 9)
    assert [line.name for line in charts["Entropy"].lines] == ["student", "teacher", "teacher, own responses"]
    assert charts["Overlap advantage"].zero is None  # the upper edge


@pytest.mark.parametrize(("low", "high"), [(0, 0), (0, 0.0083), (-0.2, 0), (-13, 37), (0, 1e-9), (0, 95_000)])
def test_ticks_are_round_even_and_cover_the_values(low: float, high: float) -> None:
    ticks = nice_ticks(low, high)
    assert ticks[0] <= low
    assert ticks[-1] >= high
    assert 0 in ticks
    steps = {f"{b - a:.6g}" for a, b in pairwise(ticks)}
    assert len(steps) == 1
    assert f"{float(steps.pop()):.4e}".split("e")[0] in ("1.0000", "2.0000", "5.0000")
    assert 2 <= len(ticks) <= 7


def test_teachers_stand_on_the_map_by_overlap_and_gain() -> None:
    made = inspection(0)
    chart = teacher_map(made.teachers)
    assert chart is not None
    marks = {mark.name: mark for mark in chart.marks}
    assert chart.missing == ("legal",)
    assert marks["code"].x == pytest.approx(71)
    assert marks["sql"].y > chart.zero == marks["summary"].y  # below the student, and equal
    assert marks["chat"].size > marks["math"].size > marks["summary"].size  # by reverse KL
    assert marks["code"].gain == pytest.approx(51)
    assert teacher_map(made.teachers[-1:]) is None


def test_intervals_of_alignments_are_drawn_and_ranks_are_a_table() -> None:
    gradients = inspected_teacher("math").gradients
    assert gradients is not None
    chart = alignment_chart(gradients.positions)
    assert chart is not None
    top, bottom = (float(chart.y_ticks[i].label.replace("\u2212", "-")) for i in (-1, 0))
    assert bottom <= -0.16
    first = re.match(r"M12\.50 ([\d.]+)V([\d.]+)", chart.lines[0].whiskers)
    assert first is not None
    ends = [top + (bottom - top) * float(place) / 100 for place in first.groups()]
    assert ends == pytest.approx([0.31, 0.51], abs=1e-3)
    page = Page(render(inspection(0), NOW))
    cells = [a["class"] for a in page.all("td") if "--v" in (a.get("style") or "")]
    assert cells == ["num own", "num", "num harms pale", "num own"]


def test_labels_on_the_map_cover_nothing() -> None:
    teacher = inspected_teacher("math", 0)
    assert teacher.signal is not None
    at = [(0.51, 0.98), (0.53, 0.97), (0.53, 0.85), (0.59, 0.85), (0.99, 0.9), (0.02, 0.42), (0.98, 0.42)]
    signals = [replace(teacher.signal, overlap=Estimate(x), pass_rate_T=Estimate(y)) for x, y in at]
    chart = teacher_map(
        [replace(teacher, name=f"one-{i}", signal=signal) for i, signal in enumerate(signals)]
    )
    assert chart is not None
    for mark in chart.marks:
        assert mark.is_inside()
        assert all(mark.is_clear_of(other) for other in chart.marks if other is not mark)


def test_buckets_of_one_chart_show_their_numbers() -> None:
    bucket = PositionBucket(0, 16, 1234, 0.5, None, None, None)
    signal = inspected_teacher("math").signal
    assert signal is not None
    (chart,) = position_charts(replace(signal, positions=(bucket,)), {}, None)
    assert chart.bands[0].rows == (("positions", "0 to 15"), ("tokens", "1,234"), ("Reverse KL", "0.5"))
    assert [tick.label for tick in chart.x_ticks] == ["0", "16"]


def test_making_the_page_imports_neither_torch_nor_plotly() -> None:
    code = (
        "import sys; from mergeopd.reporting.page.inspection import write_inspection_page;"
        "print([m for m in ('torch', 'transformers', 'plotly') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_memory_is_shown_by_part_with_what_does_not_fit() -> None:
    page = render(inspection(), NOW)
    assert "Memory of a process at its peak, rollout: 101.80 GiB of 74.40 GiB" in page
    assert "the nearest that fits: batch_size 32" in page
    for name, size, share in (("KV cache", "71.00 GiB", "95.4"), ("weights", "6.10 GiB", "8.2")):
        row = page[page.index(f'<th scope="row">{name}</th>') :]
        row = row[: row.index("</tr>")]
        assert size in row
        assert share in row
    # 200 rounds of 437 s and the evaluation.
    assert "Time: 24.5 h in all" in page
    assert "rollout 5.37 min, by memory" in page
