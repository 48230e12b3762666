"""The line with the time by stage."""

from __future__ import annotations

from mergeopd.reporting.terminal.timing import split_line


def test_small_stages_are_combined_where_the_line_is_short() -> None:
    seconds = {"startup": 4, "text": 8, "rollout": 40, "teachers": 30, "update": 80, "checkpoint": 0.5}
    lines = {}
    for width in (120, 80, 60, 40):
        line = split_line(seconds, width, ascii_only=True, total=True)
        assert line is not None
        assert len(line) <= width
        lines[width] = line.plain
        numbers = [int(word.rstrip("%")) for word in line.plain.split() if word.endswith("%")]
        assert sum(numbers) == 100
    assert "other" not in lines[120]
    assert "checkpoint" not in lines[120]
    assert lines[60].split()[-2] == "other"
