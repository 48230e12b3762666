"""The terminal display, live and plain."""

from __future__ import annotations

import io
import math
import re
import subprocess
import sys
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import pytest
from results import result_of
from rich.console import Console

from mergeopd.reporting.events import (
    AccuracyMeasured,
    AlarmRaised,
    CheckpointSaved,
    CheckpointSkipped,
    DomainStats,
    EvaluationDone,
    Event,
    Note,
    RunFacts,
    RunFinished,
    RunStarted,
    StageProgress,
    StageStarted,
    StopRequested,
    TeacherStats,
    UpdateDone,
)
from mergeopd.reporting.jsonl import UpdateRecord
from mergeopd.reporting.result import AlarmSummary, Estimate, Model
from mergeopd.reporting.terminal.console import console_reporter
from mergeopd.reporting.terminal.glyphs import plain_text, sparkline
from mergeopd.reporting.terminal.header import header
from mergeopd.reporting.terminal.live import LiveReporter
from mergeopd.reporting.terminal.plain import PlainReporter
from mergeopd.reporting.terminal.result import ResultTable
from mergeopd.reporting.terminal.timing import clock_text, shares, split_line
from mergeopd.reporting.terminal.view import RunView

START = RunStarted(
    name="quick",
    recipe="recipes/quick.yaml",
    num_updates=30,
    phases=(("cold_start", 10), ("merge", 20)),
    teachers=("math", "sort"),
    domains=("math", "sort"),
    output=Path("runs/quick"),
)
ACCURACIES = {"base": 0.1, "expert/one": 0.9, "merge/weight_average": 0.3, "merged": 0.86}
BASE = EvaluationDone(Model("base", "base", "base"), "math", Estimate(0.125, 0.1, 0.15), is_own_expert=False)


class Clock:
    """A clock that a test sets."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def update(
    number: int, names: tuple[str, ...] = ("math", "sort"), *, reward: float | None = 0.5
) -> UpdateDone:
    cold = number <= 10
    return UpdateDone(
        update=number,
        phase="cold_start" if cold else "merge",
        round=number - 1,
        lr=3e-4,
        loss=1 / number,
        grad_norm=0.75,
        num_tokens=1000,
        on_policy_fraction=0.0 if cold else 1.0,
        teachers={} if cold else {n: TeacherStats(500, {"reverse_kl": 2 / number}, -0.5) for n in names},
        domains={n: DomainStats(8, 500, 62.5, 0.5, 1.0, 3 / number, 0.25, 0.125, reward) for n in names},
        seconds={"rollout": 0.0 if cold else 1.0, "teachers": 0.25, "update": 0.75},
    )


def live(
    width: int = 80, height: int = 24, encoding: str = "utf-8"
) -> tuple[LiveReporter, Clock, io.TextIOWrapper]:
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    console = Console(
        file=file, force_terminal=True, width=width, height=height, color_system=None,
        _environ={"TERM": "xterm"},
    )  # fmt: skip
    clock = Clock()
    reporter = console_reporter(console, clock)
    assert isinstance(reporter, LiveReporter)
    return reporter, clock, file


def drawn(reporter: LiveReporter, file: io.TextIOWrapper) -> list[str]:
    """The current frame, line by line."""
    console = Console(
        file=io.TextIOWrapper(io.BytesIO(), encoding=file.encoding),
        width=reporter._console.width, height=reporter._console.height, force_terminal=True, color_system=None,
        _environ={"TERM": "xterm"},
    )  # fmt: skip
    with console.capture() as capture:
        console.print(reporter._frame())
    return [line.rstrip() for line in capture.get().splitlines()]


def written(file: io.TextIOWrapper) -> str:
    file.flush()
    raw = file.buffer.getvalue().decode(file.encoding)  # type: ignore[attr-defined]
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", raw)


def test_frame_shows_where_the_run_is() -> None:
    reporter, clock, file = live()
    with reporter:
        reporter.emit(START)
        for number in range(1, 16):
            clock.now += 2
            reporter.emit(update(number))
        reporter.emit(CheckpointSaved(15, Path("x")))
        lines = drawn(reporter, file)
    assert re.fullmatch(r"quick · merge 5/20 [━╸╺ ]{20,} 15/30 updates  0:30, about 0:30 left", lines[0])
    assert lines[1] == ""  # the place of a stage
    table = "\n".join(lines)
    assert re.search(r"teacher +reverse KL ↓ +gap → 0 +tokens +from +trend\n", table)
    assert re.search(r"\nmath +0\.1333 +-0\.5000 +500 +0\.1818 +█▆▄▂▁\n", table)
    assert re.search(r"\ndomain +reward ↑ +NLL ↓ +entropy +length +cut ↓ +share\n", table)
    assert re.search(r"\nsort +0\.5000 +0\.2000 +0\.2500 +62\.5 +12 % +50 %\n", table)
    assert "loss 0.0667 █▆▄▂▁   grad 0.7500   lr 3.0e-04   tokens/s 500   saved at update 15" in table
    assert re.search(r"time    ━+  rollout 50%  teachers 13%  update 37%", table)
    assert max(map(len, lines)) <= 80
    assert "gap teacher minus student log p reward" in " ".join(table.split())
    assert table.endswith("the good direction")


def test_frame_of_text_without_teachers_shows_the_domains_trend() -> None:
    reporter, _, file = live()
    with reporter:
        reporter.emit(START)
        for number in (1, 2, 3):
            reporter.emit(update(number, reward=None))
        table = "\n".join(drawn(reporter, file))
    assert "teacher  " not in table
    assert "reward" not in table
    assert re.search(r"\nmath +1\.0000 .* █▃▁\n", table)
    assert "on-policy 0 %" in table


def test_stages_have_a_name_at_once_and_a_bar_once_they_last() -> None:
    reporter, clock, file = live()
    with reporter:
        reporter.emit(StageStarted("startup", "loading base"))
        clock.now += 3
        assert drawn(reporter, file)[0].split() == ["startup", "loading", "base", "0:03"]
        reporter.emit(START)
        reporter.emit(StageStarted("teachers", "math", 256, "responses"))
        lines = drawn(reporter, file)
        assert re.fullmatch(r"teachers  math +0/256 responses  0:00", lines[1])
        clock.now += 1.9
        reporter.emit(StageProgress(64))
        assert re.fullmatch(r"teachers  math +[━╸╺ ]{10,} 64/256 responses  0:02", drawn(reporter, file)[1])
        # The next teacher takes over the line and its clock, so that the bar stays.
        reporter.emit(StageStarted("teachers", "sort", 256, "responses"))
        clock.now += 1.1
        reporter.emit(StageProgress(128))
        assert re.fullmatch(r"teachers  sort +[━╸╺ ]{10,} 128/256 responses  0:03", drawn(reporter, file)[1])
        assert drawn(reporter, file)[1].index("128/256") == drawn(reporter, file)[0].index("0/30")
        reporter.emit(update(1))
        assert "teachers  sort" in drawn(reporter, file)[1]  # until the next stage begins
        reporter.emit(StageStarted("teachers", "math", 9, "responses"))
        assert drawn(reporter, file)[1].endswith("0:00")


@pytest.mark.parametrize(("width", "height"), [(80, 24), (120, 40), (60, 15), (40, 10), (20, 5)])
@pytest.mark.parametrize("num", [1, 3, 12, 40])
def test_frame_fits_any_terminal(width: int, height: int, num: int) -> None:
    reporter, clock, file = live(width, height)
    names = tuple(f"a_rather_long_teacher_name_{i}" for i in range(num))
    with reporter:
        reporter.emit(replace(START, name="a-name-that-is-longer-than-any-sensible-one"))
        for number in (*range(1, 12), 1000):
            reporter.emit(update(number, names))
        reporter.emit(StageStarted("teachers", names[0], 100, "tokens"))
        clock.now += 100_000
        lines = drawn(reporter, file)
    assert max(map(len, lines)) <= width
    if height >= 15:
        assert len(lines) < height
        assert any(f"and {num - k} more" in line for line in lines for k in range(num)) or num < 40


def test_notes_and_skipped_checkpoints_stay_above_the_frame() -> None:
    reporter, _, file = live()
    with reporter:
        reporter.emit(START)
        reporter.emit(Note("heads of [red]math[/red] have\x1b[2J 152064 rows"))
        reporter.emit(CheckpointSkipped(Path("step-9"), "weights.bin is missing"))
        reporter.emit(AccuracyMeasured(0, {"math": Estimate(0.125), "facts": Estimate(1.0)}, {}))
        reporter.emit(update(1))
    text = written(file)
    assert "note     heads of [red]math[/red] have [2J 152064 rows" in text
    assert "warning  skipped step-9: weights.bin is missing" in text
    assert "eval     accuracy after 0 updates: math 12.5 %, facts 100.0 %" in text


def test_the_terminal_is_restored_on_an_error() -> None:
    reporter, _, file = live()
    before = sys.stdout, sys.stderr
    with pytest.raises(ValueError, match="boom"), reporter:  # noqa: PT012
        reporter.emit(START)
        reporter.emit(StageStarted("rollout", "math", 9))
        assert reporter._live.is_started
        raise ValueError("boom")
    assert not reporter._live.is_started
    assert (sys.stdout, sys.stderr) == before
    file.flush()
    raw = file.buffer.getvalue().decode()  # type: ignore[attr-defined]
    assert raw.count("\x1b[?25l") == 1
    assert raw.rindex("\x1b[?25h") > raw.rindex("\x1b[?25l")  # the cursor is visible again
    assert raw.endswith("\n") or raw.rstrip("\x1b[?25h").endswith("\n")


def test_evaluation_fills_a_table_and_the_result_ends_the_display() -> None:
    reporter, _, file = live()
    with reporter:
        reporter.emit(START)
        reporter.emit(update(30))
        reporter.emit(BASE)
        lines = drawn(reporter, file)
        assert any(re.match(r" math +12\.5 +- +- +- *$", line) for line in lines)
        assert "left" not in lines[0]
        seconds = {"rollout": 30.0, "evaluation": 10.0, "total": 40.0}
        document = result_of({"math": ACCURACIES}, seconds)
        paths = [Path("runs/quick") / name for name in ("result.json", "export", "report.html")]
        reporter.emit(RunFinished(seconds, document, *paths))
        assert not reporter._live.is_started
    text = written(file)
    assert re.search(r"\n math +1000 +10\.0 +90\.0 +30\.0 +86\.0 \(84 to 88\) +95\.0 \(93 to 97\) *\n", text)
    assert re.search(r"\ntime    0:40  ━+  rollout 75%  evaluation 25%", text)
    assert re.search(
        r"\nresult  runs/quick/result.json *\nstudent runs/quick/export *\nreport  runs/quick/report.html *"
        r"\ncard    runs/quick/export/README.md *"
        r'\nload    AutoModelForCausalLM.from_pretrained\("runs/quick/export"\)',
        text,
    )


def test_a_stop_is_acknowledged_and_ends_the_estimate() -> None:
    reporter, _, file = live()
    with reporter:
        for event in (START, update(1), update(2), CheckpointSaved(2, Path("x")), update(3)):
            reporter.emit(event)
        reporter.emit(StageStarted("update", "", 3, "micro-batches"))
        assert drawn(reporter, file)[0].endswith("left")
        reporter.emit(StopRequested("SIGINT"))
        assert drawn(reporter, file)[0].endswith(", stopping")
    assert "left" not in drawn(reporter, file)[0]
    assert "stopping" not in drawn(reporter, file)[0]
    text = " ".join(written(file).split())
    assert "SIGINT stopping as soon as possible, with a checkpoint of the updates made. Ctrl-C again" in text
    assert "stops at once, and the run then resumes after update 2." in text


@pytest.mark.parametrize(
    ("events", "signal", "text"),
    [
        ([], "SIGINT", "no update is complete yet. Ctrl-C again stops at once."),
        ([], "SIGTERM", "no update is complete yet."),
        ([update(1)], "SIGINT", "Ctrl-C again stops at once, and the run then resumes from the beginning."),
        ([update(1), CheckpointSaved(1, Path("x"))], "SIGINT", "the 1 updates made are saved. Ctrl-C again"),
        (
            [update(30), StageStarted("evaluation")],
            "SIGINT",
            "training is saved. Ctrl-C again stops at once.",
        ),
    ],
)
def test_what_a_second_ctrl_c_would_do(events: list[Event], signal: str, text: str) -> None:
    view = RunView()
    for event in (START, *events, StopRequested(signal)):
        view.add(event, 0.0)
    assert text in view.stop_text()
    assert view.left_s(0.0) is None


def test_a_resumed_run_continues_its_curves_and_its_clock() -> None:
    whole, resumed = RunView(), RunView()
    whole.add(START, 0.0)
    for number in range(1, 16):
        whole.add(update(number), 0.0)
    history = [UpdateRecord.of(update(number)) for number in range(1, 16)]
    start = replace(START, resumed_at=15, seconds=65.0, history=history)
    resumed.add(start, 0.0)
    assert resumed.trends == whole.trends
    assert (resumed.done, resumed.saved_at, resumed.losses) == (15, 15, whole.losses)
    assert resumed.left_s(0.0) == whole.left_s(0.0) == 30.0
    reporter, clock, file = live()
    with reporter:
        reporter.emit(start)
        clock.now += 5
        assert "15/30 updates  1:10" in drawn(reporter, file)[0]
    assert "resumes  after update 15 of 30, 1:05 so far" in written(file)


def test_the_header_names_models_and_machine() -> None:
    facts = RunFacts(
        "models/base", "bfloat16", 7_615_616_512, 7_615_616_512, {"math": 1_720_574_976, "self": "the student"},
        "cuda (NVIDIA H200)", 4, 2,
    )  # fmt: skip
    lines = dict(header(replace(START, facts=facts)))
    assert lines["student"] == (
        "models/base, 7.62B parameters, bfloat16, on cuda (NVIDIA H200), 2 processes with 4 threads each"
    )
    assert lines["teachers"] == "math 1.72B, self (the student)"
    adapters = replace(facts, num_trainable=9_000_000, num_processes=1, num_threads=1)
    student = dict(header(replace(START, facts=adapters)))["student"]
    assert student == ("models/base, 7.62B parameters, 9M trained, bfloat16, on cuda (NVIDIA H200), 1 thread")


@pytest.mark.parametrize("is_live", [True, False])
def test_alarms_are_shown_at_once_with_their_cause_and_again_at_the_end(is_live: bool) -> None:
    text = io.StringIO()
    console = Console(
        file=text, force_terminal=is_live, width=80, color_system="standard", _environ={"TERM": "xterm"}
    )
    first = AlarmRaised(7, "repetition", "math", "90% of 4-grams", "it loops", "lower `lr`", stops=False)
    second = replace(first, update=9, subject="sort", stops=True)
    summaries = tuple(AlarmSummary(a.update, a.name, a.subject, a.finding) for a in (first, second))
    with console_reporter(console, Clock()) as reporter:
        reporter.emit(START)
        reporter.emit(first)
        shown = " ".join(text.getvalue().split())
        assert re.search(
            r"ALARM.*repetition \(math\) at update 7: 90% of 4-grams\. Likely cause: it loops\. ", shown
        )
        assert "Remedy: lower `lr`" in shown
        reporter.emit(second)
        result = replace(result_of({"math": ACCURACIES}), alarms=summaries)
        for event in (RunFinished({}, result), RunFinished({}, alarms=summaries)):
            before = len(text.getvalue())
            reporter.emit(event)
            end = text.getvalue()[before:]
            assert "alarm   repetition at update 7: math, sort" in end
    assert text.getvalue().count("it loops") == 1
    if is_live:
        assert "\x1b[1;33mALARM" in text.getvalue()
        assert "\x1b[1;31mALARM" in text.getvalue()  # stops the run


def test_evaluation_alone_is_shown_too() -> None:
    """`mergeopd eval` has no run."""
    reporter, clock, file = live()
    with reporter:
        reporter.emit(StageStarted("evaluation", "base on math", 256, "responses"))
        clock.now += 3
        assert "evaluation  base on math" in "\n".join(drawn(reporter, file))
        reporter.emit(BASE)
        reporter.emit(RunFinished({}, result_of({"math": ACCURACIES})))


def test_ascii_terminals_get_ascii() -> None:
    reporter, clock, file = live(encoding="ascii")
    with reporter:
        reporter.emit(replace(START, name="zwölf"))
        for number in range(1, 14):
            reporter.emit(update(number, ("größe",)))
        reporter.emit(Note("naïve"))
        reporter.emit(StageStarted("rollout", "größe", 256, "responses"))
        clock.now += 3
        "\n".join(drawn(reporter, file)).encode("ascii")
        reporter.emit(RunFinished({"rollout": 1.0}, result_of({"größe": ACCURACIES}, {"rollout": 1.0})))
    assert "gr??e" in written(file)


def untimed(line: str) -> str:
    return line.removeprefix("2026-01-02 03:04:05  ")


def plain(events: list[tuple[float, Event]]) -> list[str]:
    file = io.StringIO()
    clock = Clock()
    console = Console(file=file, width=80, _environ={}, get_datetime=lambda: datetime(2026, 1, 2, 3, 4, 5))
    reporter = console_reporter(console, clock)
    assert isinstance(reporter, PlainReporter)
    with reporter:
        for at, event in events:
            clock.now = 100.0 + at
            reporter.emit(event)
    return file.getvalue().splitlines()


def test_plain_lines_for_ends_of_phases_and_now_and_then() -> None:
    lines = plain([(0, START), *((i * 2.0, update(i)) for i in range(1, 31))])
    assert lines[:2] == [
        "2026-01-02 03:04:05  run quick, 30 updates (cold_start 10, merge 20), to runs/quick",
        "2026-01-02 03:04:05  teachers math, sort",
    ]
    numbers = [int(re.findall(r"update (\d+)/30", line)[0]) for line in lines[2:]]
    assert numbers == [1, 4, 7, 10, 11, 14, 17, 20, 23, 26, 29, 30]
    assert lines[9] == (
        "2026-01-02 03:04:05  update 20/30  merge  loss 0.0500  reverse KL: math 0.1000, sort 0.1000  "
        "reward 0.50  grad 0.75  500 tokens/s  "
        "rollout 50%, teachers 13%, update 37%  left 0:20"
    )


def test_plain_lines_report_long_stages_only() -> None:
    """A line is due at 40 s and at 60 s; at the first the stage has just begun, at the second it continues."""
    lines = plain(
        [
            (0, START),
            (30, update(1)),
            (38, StageStarted("teachers", "math", 48, "responses")),
            (40, StageProgress(1)),
            (60, StageProgress(2)),
        ]
    )
    assert [untimed(line) for line in lines if "teachers math 2" in line or "teachers math 1" in line] == [
        "teachers math 2/48 responses"
    ]


def test_plain_lines_grow_rare() -> None:
    long = replace(START, num_updates=100_000, phases=(("merge", 100_000),))
    lines = plain([(0, long), *((float(i), update(i)) for i in range(1, 7201))])
    assert 150 < len(lines) < 260  # two hours


def test_plain_lines_after_a_resume_and_of_everything_else() -> None:
    seconds = {"rollout": 2.0, "total": 2.0}
    lines = plain(
        [
            (0, StageStarted("startup", "reading quick.yaml")),
            (0, CheckpointSkipped(Path("step-9"), "weights.bin is missing")),
            (1, StageStarted("startup", "loading base")),
            (1, replace(START, resumed_at=6)),
            (1, StageStarted("rollout", "math", 256, "responses")),
            (2, StageProgress(8)),
            (20, StageProgress(64)),
            (21, update(7)),
            (22, update(8)),
            (22, StopRequested("SIGTERM")),
            (23, CheckpointSaved(8, Path("step-8"))),
            (24, Note("something [bold]odd\nhere")),
            (25, StageStarted("export", "the student")),
            (26, BASE),
            (27, RunFinished(seconds, result_of({"math": ACCURACIES}, seconds), Path("result.json"))),
        ]
    )
    lines = [untimed(line) for line in lines]
    assert lines[:6] == [
        "warning: skipped step-9: weights.bin is missing",
        "startup loading base",
        "run quick, 30 updates (cold_start 10, merge 20), to runs/quick",
        "teachers math, sort",
        "resumes after update 6 of 30",
        "rollout math 64/256 responses",
    ]
    assert lines[6].startswith("update 7/30  cold_start  loss 0.1429  reward 0.50")
    assert lines[7:12] == [
        "SIGTERM: stopping as soon as possible, with a checkpoint of the updates made.",
        "saved step-8",
        "note: something [bold]odd here",
        "export the student",
        "evaluation base on math: 12.5 %",
    ]
    assert lines[-2].startswith("time    0:02")
    assert lines[-1].rstrip() == "result  result.json"


def test_dumb_terminals_get_lines() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, _environ={"TERM": "dumb"})
    assert isinstance(console_reporter(console), PlainReporter)


def test_result_table_of_a_domain_without_headroom() -> None:
    console = Console(file=io.StringIO(), width=80, color_system=None)
    flat = {**ACCURACIES, "base": 0.9}
    rows = {"math": ACCURACIES, "flat": {key: flat[key] for key in flat if not key.startswith("merge/")}}
    with console.capture() as capture:
        console.print(ResultTable(result_of(rows)))
    text = capture.get()
    assert re.search(r"\n flat +1000 +90\.0 +90\.0 +- +86\.0 \(.*\) +- *\n", text)
    assert re.search(r"\n mean +50\.0 +90\.0 +- +86\.0 \(.*\) +95\.0 \(93 to 97\) *\n", text)
    assert "-  the expert is not better than the base" in text


def test_durations() -> None:
    texts = {0: "0:00", 7.4: "0:07", 754: "12:34", 3723: "1:02:03", 183840: "2d 03:04", float("inf"): "-"}
    assert {seconds: clock_text(seconds) for seconds in texts} == texts


def test_shares_add_up() -> None:
    assert shares({"a": 1.0, "b": 1.0, "c": 1.0}) == {"a": 34, "b": 33, "c": 33}
    assert shares({"a": 0.0}) == {}
    assert sum(shares({str(i): 0.7 * i for i in range(17)}).values()) == 100


def test_split_line_never_exceeds_its_width() -> None:
    for width in range(10, 120):
        line = split_line({"rollout": 5.0, "teachers": 3.0, "update": 2.0}, width, ascii_only=False)
        assert line is not None
        assert line.cell_len <= width
    assert line.plain.count("━") == 40


def test_sparkline_means_and_range() -> None:
    assert sparkline([0.0, 7.0], 8) == "▁█"
    assert sparkline([0.0, 2.0, 6.0, 8.0], 2) == "▁█"
    assert sparkline([3.0] * 5, 3) == "▁▁▁"
    assert sparkline([], 3) == sparkline([1.0], 0) == ""
    assert plain_text("a\nb\x1b[1m‖█", ascii_only=False) == "a b [1m‖█"
    assert plain_text("ä‖█", ascii_only=True) == "?||@"
    assert plain_text("a\nb", ascii_only=True) == "a b"


def test_trends_are_those_of_the_phase_without_values_that_are_not_finite() -> None:
    view = RunView()
    view.add(START, 0.0)
    for number in (9, 10, 11, 12):
        view.add(update(number), 0.0)
    view.add(replace(update(13), teachers={"math": TeacherStats(5, {"reverse_kl": math.inf}, 0.0)}), 0.0)
    assert list(view.trends["math", "reverse_kl"]) == [2 / 11, 2 / 12]
    assert list(view.trends["sort", "nll"]) == [3 / 11, 3 / 12, 3 / 13]


def test_speed_and_time_left_follow_the_phase() -> None:
    view = RunView()
    assert view.left_s(0.0) is None
    view.add(START, 0.0)
    assert view.tokens_per_s is None
    for number in range(1, 11):
        view.add(update(number), float(number))
    assert view.tokens_per_s == 1000.0
    assert view.left_s(10.0) == 20.0
    view.add(replace(update(11), seconds={"rollout": 3.0, "update": 1.0, "text": 50.0, "startup": 9.0}), 20.0)
    assert view.tokens_per_s == 250.0  # once a phase or process
    assert view.left_s(22.0) == 4.0 * 19 - 2.0
    assert view.phase_seconds == {"rollout": 3.0, "update": 1.0, "text": 50.0, "startup": 9.0}


def test_report_needs_no_torch() -> None:
    code = (
        "import sys; import mergeopd.reporting.terminal.console, mergeopd.reporting.jsonl, mergeopd.reporting.result; "
        "print({'torch', 'transformers', 'datasets'} & set(sys.modules))"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "set()\n"
