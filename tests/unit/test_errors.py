"""Messages on a terminal: control characters from files are escaped, and long texts are cut."""

from __future__ import annotations

import re

import pytest

from mergeopd.errors import MAX_SHOWN, Location, Problem, RecipeError, StorageError, printable
from mergeopd.reporting.failure import show_error


@pytest.mark.parametrize(
    ("raw", "shown"),
    [
        ("\x1b[2Jx", r"\x1b[2Jx"),
        ("a\rb\tc\x00\x9b", r"a\rb\tc\x00\x9b"),
        ("\u202eevil\u2066", r"\u202eevil\u2066"),
        ("\ud800\u2028", r"\ud800\u2028"),
        ("two\nlines, größer \N{SLIGHTLY SMILING FACE}", "two\nlines, größer \N{SLIGHTLY SMILING FACE}"),
    ],
)
def test_control_characters_are_escaped(raw: str, shown: str) -> None:
    assert printable(raw) == shown
    problem = str(Problem(Location(f"f\n{raw}", 1, 2), f"a.{raw}", raw, raw))
    assert not {c for c in problem if not c.isprintable() and c != "\n"}
    assert problem.startswith("f\\n")


def test_a_long_text_is_cut_with_a_count() -> None:
    assert printable("x" * 5000) == "x" * 2000 + "... (3,000 more characters)"
    assert len(str(Problem(Location("f"), "p" * 10_000, "m" * 10_000, "r" * 10_000))) < 6000


@pytest.mark.parametrize("a_person_looks", [False, True])
def test_the_first_of_many_problems_are_shown(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, a_person_looks: bool
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: a_person_looks)
    problems = [Problem(Location("f", i, 1), f"key{i}", "\x1b]0;bad\x07") for i in range(1, 5001)]
    show_error(RecipeError(problems))
    shown = capsys.readouterr().err
    assert re.findall(r"key(\d+)", shown) == [str(i) for i in range(1, MAX_SHOWN + 1)]
    assert f"5,000 problems, the first {MAX_SHOWN} are shown." in shown
    assert len(shown) < 40_000
    assert "\x1b]" not in shown
    assert "\x07" not in shown


def test_other_errors_are_escaped_too(capsys: pytest.CaptureFixture[str]) -> None:
    show_error(StorageError("runs/\x1b[31mx: is full"))
    assert capsys.readouterr().err == "error: runs/\\x1b[31mx: is full\n"
