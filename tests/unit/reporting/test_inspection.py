"""Inspections as data frames, as JSON and in the terminal."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
from jsonschema import Draft202012Validator
from rich.console import Console

from mergeopd.reporting.inspection import (
    VERDICT_TITLES,
    AlignmentRank,
    CheckpointRank,
    Compatibility,
    Conflict,
    DomainBudget,
    Finding,
    GradientAlignment,
    Inspection,
    PositionBucket,
    Signal,
    TeacherInspection,
    Verdict,
    VerdictKind,
    inspection_schema,
    read_inspection,
    write_inspection,
)
from mergeopd.reporting.result import Estimate
from mergeopd.reporting.terminal.inspection import InspectionTable

EVIL = "\x1b[2J[b]e"  # control characters, and markup of rich
NAMES = [name for name in Signal.__dataclass_fields__ if Signal.__dataclass_fields__[name].type == "Estimate"]
READY = Verdict("ready", "can teach: pass rate 8% -> 98%")
FINDING = Finding("licence", "note", "the teacher's licence is unknown", "add `licence` to the card")


def signal(**values: Any) -> Signal:
    estimates = {name: Estimate(0.5, 0.4, 0.6) for name in NAMES}
    counts = {"num_prompts": 8, "num_responses": 32, "num_tokens": 320, "k": 16, "num_frontier": 3}
    return Signal(**(counts | estimates | values))


def bucket(start: int, stop: int, reverse_kl: float | None, alignment: float | None = None) -> PositionBucket:
    return PositionBucket(start, stop, 100, reverse_kl, 0.7, 1.0, 0.9, alignment=alignment)


def teacher(name: str, verdict: Verdict = READY, *findings: Finding, **values: Any) -> TeacherInspection:
    signals = {"signal": signal(pass_rate_S=Estimate(0.083), pass_rate_T=Estimate(0.976)), **values}
    return TeacherInspection(name, "models/m", None, verdict, Compatibility(findings), **signals)


@pytest.fixture
def inspection() -> Inspection:
    positions = (bucket(0, 16, 1.25), bucket(16, 32, 0.5))
    aligned = (bucket(0, 16, None, alignment=0.3),)
    gradients = GradientAlignment(96, 31, 6144, *[Estimate(0.34, 0.27, 0.41)] * 3, positions=aligned)
    math = teacher(
        "math",
        READY,
        FINDING,
        Finding("template", "ok", "never shown"),
        signal=signal(positions=positions, reverse_kl=Estimate(1.514)),
        by_domain={"algebra": signal(positions=positions[:1]), "proofs": signal(reverse_kl=Estimate(None))},
        domain_verdicts={"proofs": Verdict("noisy", "x", beyond=1024)},
        gradients=gradients,
    )
    evil = teacher(
        f"e{EVIL}", Verdict("wrong_teacher", EVIL, remedy=EVIL), FINDING, Finding(EVIL, "problem", EVIL)
    )
    unseen = teacher("unseen", Verdict("unknown", "has no prompt"), FINDING, signal=None)
    budget = DomainBudget("algebra", 8, 0.29, 610.0, 0.61, 0.17, Estimate(0.42), 38, 0.18)
    rank = CheckpointRank("algebra", "steps/2000", Estimate(0.63), Estimate(0.08), READY, is_best=True)
    behind = Estimate(0.02, -0.02, 0.06)
    earlier = CheckpointRank("algebra", "steps/1000", Estimate(0.61), Estimate(0.05), READY, False, behind)
    return Inspection(
        version=1,
        recipe="r.yaml",
        plan_hash="0",
        student="models/base",
        created="2026-01-01T00:00:00",
        settings={"prompts": 64},
        teachers=(math, evil, unseen),
        domains=(budget,),
        conflicts=(Conflict("math", "unseen", 1240, Estimate(-0.21), Estimate(0.003)),),
        checkpoints=(rank, earlier),
        alignments=(
            AlignmentRank("algebra", "math", Estimate(0.34, 0.27, 0.41), Estimate(0.0), is_best=True),
            AlignmentRank(
                "algebra", "code", Estimate(0.3, -0.1, 0.55), Estimate(0.04, -0.02, 0.5), is_best=False
            ),
        ),
        seconds={"rollout": 20.0, "teachers": 10.0, "total": 40.0},
    )


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_every_part_fits_the_terminal(inspection: Inspection, width: int, encoding: str) -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    page = Path("runs/x/inspect/inspect.html")
    Console(file=stream, width=width).print(InspectionTable(inspection, {"page": page}))
    stream.seek(0)
    text = stream.read()
    assert max(map(len, text.splitlines())) <= width
    assert all(char.isprintable() or char == "\n" for char in text)
    words = " ".join(text.replace("|", " ").split())  # ASCII tables have lines
    arrow = "→" if encoding == "utf-8" else "->"
    assert f"8 {arrow} 98" in words  # of `evil`
    assert "[2J[b]e wrong teacher" in words
    assert "math ready 50" in words
    assert "math algebra ready" in words
    assert "noisy beyond" in words
    assert "unseen not known - - - -" in words
    assert "algebra 29 61 17 610 18 % 42 % 38" in words
    assert "math 0.34 (0.27 to 0.41) 0.34 0.34 96" in words
    assert "algebra code 0.30 (-0.10 to 0.55) 0.04 (-0.02 to 0.50)" in words
    assert ("steps/1000 ready 61 2 ± 4" if encoding == "utf-8" else "steps/1000 ready 61 2 +- 4") in words
    assert "math, unseen -0.21 3e-03 1,240" in words
    assert "algebra steps/2000 ready 63 0.08 best" in words
    # A finding of every teacher is shown once, after the problems.
    assert words.count("licence is unknown") == 1
    assert "note all the teacher's licence is unknown. Remedy: add `licence` to the card." in words
    assert "never shown" not in words
    assert "inspect.html" in words


def test_every_verdict_has_a_title() -> None:
    assert list(VERDICT_TITLES) == list(get_args(VerdictKind))


def test_rows_of_domains_and_of_positions(inspection: Inspection) -> None:
    rows = inspection.to_arrow().to_pylist()
    keys = [(row["teacher"], row["domain"], row["verdict"], row["reverse_kl"]) for row in rows]
    assert keys[:3] == [
        ("math", "", "ready", 1.514),
        ("math", "algebra", "ready", 0.5),
        ("math", "proofs", "noisy", None),
    ]
    assert rows[0]["alignment"] == 0.34
    assert keys[-1] == ("unseen", "", "unknown", None)
    positions = inspection.to_arrow("position").to_pylist()
    assert [(row["domain"], row["start"], row["reverse_kl"], row["alignment"]) for row in positions] == [
        ("", 0, 1.25, 0.3),
        ("", 16, 0.5, None),
        ("algebra", 0, 1.25, None),
    ]
    empty = replace(inspection, teachers=())
    assert empty.to_arrow("position").num_rows == 0


def test_the_file_satisfies_its_schema_and_is_read_back(inspection: Inspection, tmp_path: Path) -> None:
    file = tmp_path / "new" / "inspect.json"
    write_inspection(inspection, file)
    document = json.loads(file.read_text())
    validator = Draft202012Validator(inspection_schema())
    validator.validate(document)
    assert read_inspection(file) == inspection
    assert not validator.is_valid({**document, "version": 2})
    assert not validator.is_valid({**document, "teachers": [{"name": "x"}]})
