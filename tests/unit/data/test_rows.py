"""Rows of files in formats other than JSON lines, and of datasets in folders and in the cache of the hub."""

from __future__ import annotations

import fnmatch
import gzip
import json
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mergeopd.config.folders import Missing
from mergeopd.data.prompts import read_prompts
from mergeopd.data.rows import row_place, source_digest
from mergeopd.errors import DataError
from mergeopd.recipe.dataset_folders import hub_dataset
from mergeopd.recipe.plan import SourcePlan

ID = "some-org/sums"
COMMIT = "c" * 40
ROWS = [{"question": f"{i} + 1", "answer": str(i + 1), "picture": None} for i in range(5)]
CARD = """---
configs:
- config_name: easy
  data_files: [{split: train, path: easy/train-*}, {split: test, path: easy/test-*}]
- config_name: hard
  data_files: [{split: train, path: "hard/*.jsonl"}]
---
"""


def plan(path: Path, **fields: Any) -> SourcePlan:
    given: dict[str, Any] = {
        "name": "s",
        "source": str(path),
        "domain": "math",
        "verifier": {"kind": "number"},
        "prompt_field": "question",
        "reference_field": "answer",
        "response_field": None,
        "teachers": {},
        "share": 1.0,
        "limit": None,
    }
    return SourcePlan.model_validate(given | fields)


def read(source: SourcePlan) -> list[tuple[str, str, str | None]]:
    return [(prompt.key, prompt.messages[0].content, prompt.reference) for prompt in read_prompts(source)]


def message_of(source: SourcePlan) -> str:
    with pytest.raises(DataError) as caught:
        read_prompts(source)
    return str(caught.value)


def expected(*numbers: int) -> list[tuple[str, str, str]]:
    return [(f"s:{row}", f"{i} + 1", str(i + 1)) for row, i in enumerate(numbers)]


LINES = "".join(json.dumps(row) + "\n" for row in ROWS)
CSV = 'question,answer\n0 + 1,1\n"1 + 1",2\n'


@pytest.mark.parametrize(
    ("name", "text", "num_rows"),
    [
        ("p.json", "\ufeff " + json.dumps(ROWS), 5),
        ("p.json", LINES, 5),
        ("p.csv", "\ufeff" + CSV, 2),
        ("p.jsonl.gz", LINES, 5),
        ("p.json.gz", json.dumps(ROWS), 5),
        ("p.csv.gz", CSV, 2),
    ],
)
def test_formats_give_the_same_rows(tmp_path: Path, name: str, text: str, num_rows: int) -> None:
    raw = text.encode()
    (tmp_path / name).write_bytes(gzip.compress(raw) if name.endswith(".gz") else raw)
    assert read(plan(tmp_path / name)) == expected(*range(num_rows))


def test_places_count_as_the_format_does() -> None:
    places = [row_place(plan(Path("p" + suffix)), 2) for suffix in (".jsonl", ".jsonl.gz", ".csv")]
    assert places == ["p.jsonl:3", "p.jsonl.gz:3", "p.csv: row 2"]


@pytest.mark.parametrize(
    ("name", "raw", "message"),
    [
        ("p.csv", b"question,anwser\n1,2\n", "field 'answer' is missing; did you mean 'anwser'?"),
        ("p.csv", b"question,answer\n1,2,3\n", "row 0  has more values than the header has names"),
        ("p.csv", b"question,answer\n1,\n", "field 'answer' is null"),
        ("p.csv", b"question,answer\n\xff,1\n", "not a readable CSV file"),
        ("p.json", b"[1, 2", "not a JSON list"),
        ("p.jsonl.gz", b"{}", "cannot be read: Not a gzipped file"),
        ("p.jsonl.gz", gzip.compress(LINES.encode(), mtime=0)[:-12], "damaged gzip file"),
    ],
)
def test_damaged_files_are_told(tmp_path: Path, name: str, raw: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(raw)
    assert message in message_of(plan(tmp_path / name))


# ------------------------------------------------------------------------------------------------ datasets


def fill(folder: Path) -> None:
    """Write the dataset of `CARD`: `easy` as parquet, `hard` as JSON lines."""
    import pyarrow
    from pyarrow import parquet

    (folder / "easy").mkdir(parents=True)
    (folder / "hard").mkdir()
    (folder / "README.md").write_text(CARD)
    parquet.write_table(pyarrow.Table.from_pylist(ROWS[:3]), folder / "easy" / "train-0.parquet")
    parquet.write_table(pyarrow.Table.from_pylist(ROWS[3:]), folder / "easy" / "test-0.parquet")
    (folder / "hard" / "sums.jsonl").write_text(LINES)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The repository of `ID` in a cache of the hub, still without files; connections fail, but are allowed."""
    import datasets
    import huggingface_hub.constants

    def connect(*_: object) -> None:
        raise AssertionError("a request to the network")

    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    repo = tmp_path / "hub" / "datasets--some-org--sums"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(COMMIT)
    return repo / "snapshots" / COMMIT


def found(**keys: Any) -> SourcePlan:
    keys = {"subset": None, "split": None, **keys}
    folder = hub_dataset(ID, keys["subset"], keys["split"], None, download=False)
    assert isinstance(folder, Path)
    return plan(folder, dataset=ID, revision=folder.name, **keys)


def test_a_dataset_is_read_from_the_cache_without_a_request(cache: Path) -> None:
    fill(cache)
    assert found().revision == COMMIT
    assert read(found(subset="easy", split="train")) == expected(0, 1, 2)
    assert read(found(subset="easy", split="test", limit=1)) == expected(3)
    assert read(found(subset="hard")) == expected(0, 1, 2, 3, 4), "its only split"
    assert row_place(found(subset="easy", split="test"), 1) == "some-org/sums (easy, test): row 1"


def test_a_split_is_enough_in_the_cache(cache: Path) -> None:
    """`hf download --include 'easy/test*'` leaves out the files of the first subset's other split."""
    fill(cache)
    (cache / "easy" / "train-0.parquet").unlink()
    assert read(found(subset="easy", split="test")) == expected(3, 4)
    lacking = message_of(found(subset="easy", split="train"))
    assert f"`hf download {ID} --repo-type dataset --revision {COMMIT}`" in lacking


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({}, "has several subsets (there are 'easy', 'hard'); choose one with `subset`"),
        ({"subset": "eazy"}, "has no subset 'eazy' (there are 'easy', 'hard'); did you mean 'easy'?"),
        ({"subset": "easy"}, "has several splits (there are 'test', 'train'); choose one with `split`"),
        ({"subset": "hard", "split": "dev"}, "has no split 'dev' (there is 'train'); choose another `split`"),
        (
            {"subset": "easy", "split": "train[:2]"},
            "write `split: train`, and `limit: N` for its first N rows",
        ),
        ({"subset": "hard", "prompt_field": "qestion"}, "'qestion' is missing; did you mean 'question'?"),
    ],
)
def test_what_a_dataset_does_not_have_is_told(cache: Path, keys: dict[str, str], message: str) -> None:
    fill(cache)
    assert message_of(found(**keys)).endswith(message)


def test_scripts_and_files_elsewhere_are_refused(cache: Path) -> None:
    fill(cache)
    (cache.parent / "other.jsonl").write_text(LINES)
    (cache / "README.md").write_text(CARD.replace("hard/*.jsonl", "../other.jsonl"))
    assert "its card names a file outside of it" in message_of(found(subset="hard"))
    (cache / "README.md").write_text(CARD.replace("easy/train-*", "https://example.org/train.parquet"))
    assert "its card names a file on the network" in message_of(found(subset="easy", split="test"))
    (cache / "sums.py").write_text("raise SystemExit")
    assert "needs the script sums.py, and no code of datasets is run" in message_of(found(subset="hard"))


def test_what_the_cache_lacks_is_downloaded(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    local, requests = huggingface_hub.snapshot_download, []

    def download(repo: str, *, local_files_only: bool = False, **how: Any) -> str:
        if local_files_only:
            return local(repo, local_files_only=True, **how)
        requests.append(how["revision"])
        for file in (tmp_path / "remote").rglob("*"):
            name = str(file.relative_to(tmp_path / "remote"))
            if file.is_file() and any(fnmatch.fnmatch(name, pattern) for pattern in how["allow_patterns"]):
                (cache / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, cache / name)
        return str(cache)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    fill(tmp_path / "remote")
    assert isinstance(hub_dataset(ID, "easy", "test", None, download=False), Missing)
    assert requests == []
    assert hub_dataset(ID, "easy", "test", None, download=True) == cache
    assert requests == [None, COMMIT], "the card, and the files of its commit"
    files = sorted(str(file.relative_to(cache)) for file in cache.rglob("*") if file.is_file())
    assert files == ["README.md", "easy/test-0.parquet"]
    assert read(found(subset="easy", split="test")) == expected(3, 4)
    hub_dataset(ID, "easy", "test", None, download=True)
    assert len(requests) == 2, "the cache has all of it"
    hub_dataset(ID, "easy", "train", None, download=True)
    assert requests[2:] == [COMMIT, COMMIT], "of the commit that the cache has"


def test_saved_and_plain_folders(tmp_path: Path, cache: Path) -> None:
    import datasets

    data = datasets.Dataset.from_list(ROWS[:2])
    datasets.DatasetDict(train=data, test=datasets.Dataset.from_list(ROWS[2:])).save_to_disk(
        tmp_path / "saved"
    )
    assert read(plan(tmp_path / "saved", split="test")) == expected(2, 3, 4)
    assert "choose one with `split`" in message_of(plan(tmp_path / "saved"))
    data.save_to_disk(tmp_path / "one")
    assert read(plan(tmp_path / "one")) == expected(0, 1)
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "train.jsonl").write_text(LINES)
    (tmp_path / "plain" / "test.csv").write_text(CSV)
    assert "same data file format" in message_of(plan(tmp_path / "plain", split="train"))
    (tmp_path / "plain" / "test.csv").unlink()
    (tmp_path / "plain" / "test.jsonl.gz").write_bytes(gzip.compress(LINES.encode()))
    assert read(plan(tmp_path / "plain", split="test")) == expected(0, 1, 2, 3, 4)


def test_objects_of_a_table_have_no_foreign_keys(tmp_path: Path, cache: Path) -> None:
    """A column of objects has the keys of all of them."""
    import datasets

    rows = [{"question": "q", "answer": {"a": 1}}, {"question": "q", "answer": {"b": [{"c": 2}, {"d": 3}]}}]
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    source = plan(tmp_path / "saved", verifier={"kind": "json"})
    assert [json.loads(reference or "") for _, _, reference in read(source)] == [r["answer"] for r in rows]


def test_the_digest_is_of_the_split(cache: Path) -> None:
    fill(cache)
    before = [source_digest(found(subset="easy", split=split)) for split in ("train", "test")]
    shutil.copy(cache / "easy" / "test-0.parquet", cache / "easy" / "train-1.parquet")
    after = [source_digest(found(subset="easy", split=split)) for split in ("train", "test")]
    assert before[0] != after[0]
    assert before[1] == after[1]


def test_datasets_are_read_without_torch(tmp_path: Path, cache: Path) -> None:
    fill(cache)
    code = (
        "import sys\n"
        "from mergeopd.data.prompts import read_prompts\n"
        "from mergeopd.recipe.plan import SourcePlan\n"
        "heavy = {'torch', 'transformers', 'datasets'}\n"
        "assert not heavy & sys.modules.keys()\n"
        f"assert len(read_prompts(SourcePlan.model_validate_json({found(subset='hard').model_dump_json()!r}))) == 5\n"
        "print(heavy & sys.modules.keys())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "{'datasets'}\n"
