"""What a run changed, from a made-up record: the file with its schema, data frames, the page, the terminal."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest
from contributions import contribution
from jsonschema import Draft202012Validator
from report_pages import EVIL, Page
from rich.console import Console

from mergeopd.errors import StorageError
from mergeopd.reporting.contribution import (
    Contribution,
    contribution_schema,
    read_contribution,
    write_contribution,
)
from mergeopd.reporting.page.contribution import render, write_contribution_page
from mergeopd.reporting.terminal.contribution import ContributionTable

NOW = datetime(2026, 1, 2, tzinfo=UTC)


def printed(made: Contribution, width: int = 80, encoding: str = "utf-8") -> str:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding=encoding, write_through=True)
    Console(file=stream, width=width).print(ContributionTable(made, {"page": Path("out/contribution.html")}))
    return raw.getvalue().decode(encoding)


def test_the_file_satisfies_its_schema_and_is_read_back(tmp_path: Path) -> None:
    file = tmp_path / "new" / "contribution.json"
    write_contribution(contribution(), file)
    document = json.loads(file.read_text())
    validator = Draft202012Validator(contribution_schema())
    validator.validate(document)
    assert read_contribution(file) == contribution()
    assert not validator.is_valid({**document, "version": 2})
    file.write_text(json.dumps({**document, "version": 2}))
    with pytest.raises(StorageError, match="has version 2"):
        read_contribution(file)
    file.write_text("{}")
    with pytest.raises(StorageError, match="no contribution of this version"):
        read_contribution(file)


def test_figures_become_rows() -> None:
    rows = contribution().to_arrow().to_pylist()
    assert [(row["teacher"], row["domain"]) for row in rows] == [("expert", "math"), ("expert", "code")]
    assert (rows[0]["reverse_kl_base"], rows[0]["reverse_kl_change"]) == (1.5, -1.3125)
    assert (rows[1]["closed"], rows[1]["rest_share"]) == (0.875, 0.25)
    domains = contribution().to_arrow("domain").to_pylist()
    assert domains[0]["length_merged"] == 250
    assert domains[2]["refusals_base"] == 0.01
    assert domains[0]["refusals_base"] is None
    assert replace(contribution(), teachers=()).to_arrow().num_rows == 0


def test_the_page_has_every_part(tmp_path: Path) -> None:
    made = contribution()
    write_contribution_page(made, tmp_path / "contribution.html")
    page = Page((tmp_path / "contribution.html").read_text(encoding="utf-8"))
    ids = [attributes["id"] for attributes in page.all("section")]
    assert ids == ["overview", "teachers", "domains", "responses", "settings"]
    assert "The reverse KL went from 1 to 0.125 nats per token." in page.text
    assert "Forgotten: chat (90% → 60%)." in page.text
    assert "1.5 → 0.188" in page.text
    assert "-1.31 (-1.36 to -1.26)" in page.text.replace("\u2212", "-")
    assert "87.5 80.0 to 95.0" in page.text  # gone, with its interval
    assert "lost cannot be read: no such folder" in page.text
    assert "chat not trained, evaluation" in page.text
    assert "-30.0 -35.0 to -25.0" in page.text.replace("\u2212", "-")
    assert "100 → 250 +150" in page.text
    assert "1.0 → 20.0 +19.0" in page.text
    for response in made.responses:
        assert response.base.text in page.text
        assert response.merged.text in page.text
    assert page.text.count("? lost") == page.text.count("? gained") == 2
    assert page.text.count("reward 0.50") == 2
    bare = replace(made, teachers=(), domains=(), responses=(), summary=(), notes=(), seconds={})
    assert [a["id"] for a in Page(render(bare, NOW)).all("section")] == ["overview", "settings"]


def test_texts_of_models_are_escaped() -> None:
    page = Page(render(contribution(EVIL), NOW))
    assert len(page.scripts) == 2  # data and code
    assert not page.all("img")
    assert page.text.count("alert('x')") >= 20
    hidden = replace(contribution("\u202e"), notes=())
    assert "\u27e8202E\u27e9" in Page(render(hidden, NOW)).text


def test_the_terminal_fits_eighty_columns_and_ascii() -> None:
    text = printed(contribution())
    assert max(map(len, text.splitlines())) <= 80
    assert "1.5 → 0.19" in text
    assert "-30.0 (-35.0 to -25.0)" in text
    assert "100 → 250" in text
    assert "refusals, %" in text
    assert "tool calls" not in text  # nowhere
    assert "no prompt trains chat" in text
    assert "sampled prompts of training: code" in text
    assert "expert: a note" in text
    assert "out/contribution.html" in text
    plain = printed(contribution("\x1b[31m\u202e"), encoding="ascii")
    assert "1.5 -> 0.19" in plain
    assert "\x1b" not in plain
