"""Uploads to a hub on loopback that speaks the few endpoints which an upload needs."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants
from typer.testing import CliRunner

from mergeopd.cli import app
from mergeopd.errors import HubError, StorageError
from mergeopd.reporting import hub
from mergeopd.storage.folders import atomic_folder

TOKEN = "hf_secret"
CARD = """---
library_name: transformers
license: mit
---

```sh
MODEL=runs/a/export   # this folder, or the id of its repository
vllm serve $MODEL
```
folder = "runs/a/export"
"""


class FakeHub(ThreadingHTTPServer):
    """Has the repositories `exists`; refuses creation with `refusal` (status, message) if that is given."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.exists: set[str] = set()
        self.refusal: tuple[int, str] | None = None
        self.created: list[dict[str, Any]] = []
        self.branches: list[str] = []
        self.committed: dict[str, bytes] = {}
        self.commit_path = ""
        self.tokens: set[str | None] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: FakeHub

    def log_message(self, *_: object) -> None:
        pass

    def _reply(self, status: int, document: object, **headers: str) -> None:
        content = json.dumps(document).encode()
        self.send_response(status)
        for key, value in {
            "Content-Type": "application/json",
            "Content-Length": str(len(content)),
            **headers,
        }.items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(content)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        server = self.server
        server.tokens.add(self.headers.get("Authorization"))
        repository = "/".join(self.path.split("/")[3:5])
        if self.path == "/api/repos/create":
            document = json.loads(body)
            name = "/".join(filter(None, (document.get("organization"), document["name"])))
            if server.refusal is not None:
                status, message = server.refusal
                return self._reply(status, {"error": message}, **{"X-Error-Message": message})
            server.created.append(document)
            url = {"url": f"{server.url}/{name}"}
            return self._reply(409 if name in server.exists else 200, url)
        if self.path == "/api/validate-yaml":
            return self._reply(200, {"errors": [], "warnings": []})
        if "/preupload/" in self.path:
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False}
                for f in json.loads(body)["files"]
            ]
            return self._reply(200, {"files": files})
        if "/branch/" in self.path:
            server.branches.append(self.path.rsplit("/", 1)[-1])
            return self._reply(200, {})
        if "/commit/" in self.path:
            server.commit_path = self.path
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    server.committed[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            commit = {"commitUrl": f"{server.url}/{repository}/commit/abc", "commitOid": "abc"}
            return self._reply(200, commit)
        return self._reply(404, {"error": "no such endpoint"})


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    server = FakeHub()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def export(tmp_path: Path) -> Path:
    with atomic_folder(tmp_path / "export") as folder:
        (folder / "config.json").write_text("{}")
        (folder / "model.safetensors").write_bytes(b"w" * 3000)
        (folder / "README.md").write_text(CARD)
    return tmp_path / "export"


def upload(export: Path, **changes: Any) -> str:
    return hub.push(hub.prepare(export, "me/student", **{"private": True, "revision": None, **changes}))


def is_private(request: dict[str, Any]) -> bool:
    """Whether a private repository is asked for, in the words of huggingface_hub 1 or 2."""
    return request.get("visibility") == "private" if "visibility" in request else request["private"]


def test_all_files_arrive_in_one_commit(fake: FakeHub, export: Path) -> None:
    assert upload(export) == f"{fake.url}/me/student"
    assert [(d["name"], d["organization"], is_private(d)) for d in fake.created] == [("student", "me", True)]
    assert fake.commit_path == "/api/models/me/student/commit/main"
    assert {name: len(content) for name, content in fake.committed.items()}.keys() == {
        "README.md",
        "config.json",
        "model.safetensors",
    }
    assert fake.committed["model.safetensors"] == b"w" * 3000
    card = fake.committed["README.md"].decode()
    assert "MODEL=me/student\nvllm" in card
    assert 'folder = "me/student"' in card
    assert fake.tokens == {f"Bearer {TOKEN}"}


def test_an_existing_repository_needs_a_named_revision(fake: FakeHub, export: Path) -> None:
    fake.exists.add("me/student")
    with pytest.raises(HubError, match=r"^me/student exists already; .* --revision main"):
        upload(export)
    assert not fake.committed
    upload(export, revision="second", private=False)
    assert fake.branches == ["second"]
    assert fake.commit_path == "/api/models/me/student/commit/second"
    assert not is_private(fake.created[-1])


@pytest.mark.parametrize(
    ("status", "message", "told"),
    [
        (401, "Invalid username or password.", r"knows no user; run `hf auth login`.*Invalid username"),
        (403, "You don't have the rights", r"the token may not write to me .*rights.*write access to me"),
        (418, "", r"status 418"),
    ],
)
def test_refusals_in_words(fake: FakeHub, export: Path, status: int, message: str, told: str) -> None:
    fake.refusal = status, message
    with pytest.raises(HubError, match=told) as caught:
        upload(export)
    assert TOKEN not in str(caught.value)


def test_no_network(fake: FakeHub, export: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(HubError, match=r"cannot reach http://127.0.0.1:1: .*; check the network"):
        upload(export)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match="HF_HUB_OFFLINE forbids"):
        upload(export)


def test_a_dry_run_lists_and_sends_nothing(fake: FakeHub, export: Path) -> None:
    (export / "README.md").write_text(CARD.replace("license: mit\n", ""))
    done = CliRunner().invoke(app, ["push", str(export), "--to", "me/student", "--dry-run"])
    assert done.exit_code == 0, done.output
    lines = done.output.splitlines()
    assert lines[2].split() == ["3.0", "kB", "model.safetensors"]
    assert lines[3].split()[2:] == ["in", "all,", "to", "me/student,", "private"]
    assert lines[4].startswith("note: no licence is stated")
    assert lines[5] == "Nothing was sent."
    assert not fake.tokens


def test_unfinished_and_damaged_exports_are_refused(export: Path, tmp_path: Path) -> None:
    (export / "model.safetensors").write_bytes(b"v" * 3000)
    with pytest.raises(StorageError, match=r"export: model.safetensors is damaged: .*run the recipe again"):
        hub.prepare(export, "me/student", private=True, revision=None)
    with pytest.raises(StorageError, match=r"manifest.json is missing; name a run folder"):
        hub.prepare(tmp_path, "me/student", private=True, revision=None)
    with pytest.raises(HubError, match=r"'student' is no name of a repository; write USER/NAME"):
        hub.prepare(export, "student", private=True, revision=None)
