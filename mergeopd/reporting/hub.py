"""Upload an exported student to the Hugging Face hub."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from mergeopd.config.folders import is_hub_failure
from mergeopd.errors import HubError, StorageError
from mergeopd.messages import shown
from mergeopd.reporting.page.run_data import load_run
from mergeopd.storage import run_layout
from mergeopd.storage.folders import MANIFEST, MODEL_CARD, verify

_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True, slots=True)
class Upload:
    """An upload to the repository `to`: bytes by file, and remarks."""

    folder: Path
    to: str
    private: bool
    revision: str | None
    files: Mapping[str, int]
    notes: tuple[str, ...]


def prepare(folder: Path, to: str, *, private: bool, revision: str | None) -> Upload:
    """List what would be uploaded from a run folder or an export; nothing is sent.

    Raises:
        StorageError: the run is not finished, or the export is damaged or was not made by mergeopd.
        HubError: `to` is no name of a repository.
    """
    if not _REPOSITORY.fullmatch(to):
        raise HubError(f"'{to}' is no name of a repository; write USER/NAME or ORGANISATION/NAME")
    export = _export_of(folder)
    fault = verify(export)
    if fault is not None:
        raise StorageError(
            f"{shown(export)}: {fault}; name a run folder or its export. If it is damaged, run the recipe "
            "again to have it written again"
        )
    names = [*json.loads((export / MANIFEST).read_bytes())["files"]]
    names += [MODEL_CARD] if (export / MODEL_CARD).is_file() else []
    files = {name: (export / name).stat().st_size for name in sorted(names)}
    return Upload(export, to, private, revision, files, tuple(_notes(export)))


def push(upload: Upload) -> str:
    """Create the repository and upload in one commit; return the repository's address.

    A repository that exists already is changed only if the upload names a revision of it. The token is that
    of the environment (`HF_TOKEN`) or of `hf auth login`.

    Raises:
        HubError: the hub cannot be reached, or refuses.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    api, named = HfApi(library_name="mergeopd"), upload.revision
    operations = [
        CommitOperationAdd(name, _card(upload) if name == MODEL_CARD else upload.folder / name)
        for name in upload.files
    ]
    with _failures_in_words(upload):
        api.create_repo(upload.to, private=upload.private, exist_ok=named is not None)
        if named not in (None, "main"):
            api.create_branch(upload.to, branch=named, exist_ok=True)
        message = "Upload a student merged with mergeopd"
        commit = api.create_commit(upload.to, operations, commit_message=message, revision=named)
    return str(commit.repo_url)


def _export_of(folder: Path) -> Path:
    """Return the export of a run folder, or the export that is named itself, of a finished run."""
    run = next((path for path in (folder, folder.parent) if (path / run_layout.PLAN).is_file()), None)
    if run is None:
        return folder
    data = load_run(run)
    if not data.is_finished:
        missing = "evaluated" if data.exported else "exported a student"
        raise StorageError(f"{shown(run)}: the run has not {missing} yet; run its recipe again to finish it")
    return run / run_layout.EXPORT


def _notes(export: Path) -> Iterator[str]:
    from huggingface_hub import metadata_load

    card = export / MODEL_CARD
    if not card.is_file():
        yield f"there is no {MODEL_CARD}: the repository will have no model card"
        return
    try:
        metadata = metadata_load(card) or {}
    except ValueError:
        metadata = {}
    if "license" not in metadata:
        yield f"no licence is stated: without one, nobody may use the model; add `license:` to {shown(card)}"


def _card(upload: Upload) -> bytes:
    """Return the model card with the repository's name in its commands."""
    text = (upload.folder / MODEL_CARD).read_text(encoding="utf-8")
    text = re.sub(r"(?m)^MODEL=\S+.*$", f"MODEL={upload.to}", text)
    return re.sub(r'(?m)^folder = ".*"$', f'folder = "{upload.to}"', text).encode()


@contextmanager
def _failures_in_words(upload: Upload) -> Iterator[None]:
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalTokenNotFoundError,
        OfflineModeIsEnabled,
    )

    try:
        yield
    except OfflineModeIsEnabled:
        raise HubError("HF_HUB_OFFLINE forbids access to the hub; unset it for this command") from None
    except LocalTokenNotFoundError:
        raise HubError(_NO_TOKEN) from None
    except HfHubHTTPError as error:
        code = error.response.status_code
        raise HubError(_refusal(upload, code, error.server_message or "")) from None
    except HFValidationError as error:
        raise HubError(f"{error}; choose another name") from None
    except Exception as error:
        if not is_hub_failure(error):
            raise
        reason = str(error) or type(error).__name__
        raise HubError(
            f"cannot reach {constants.ENDPOINT}: {reason}; check the network and the proxy, then run the "
            "same command again"
        ) from None


_NO_TOKEN = "the hub knows no user; run `hf auth login`, or set HF_TOKEN to a token that may write"


def _refusal(upload: Upload, code: int, message: str) -> str:
    """Say why the hub refused, and what to do."""
    owner, said = upload.to.split("/")[0], f" ({message})" if message else ""
    return {
        400: f"the hub refuses the upload{said}; correct {MODEL_CARD} or the named revision",
        401: f"{_NO_TOKEN}{said}",
        403: f"the token may not write to {owner}{said}; create one with write access to {owner}, or choose "
        "another name",
        404: f"the hub finds no {upload.to}{said}; check its name, and that the token may see it",
        409: f"{upload.to} exists already; choose another name, or add a commit to it with --revision main",
    }.get(code, f"the hub answers with status {code}{said}; run the same command again later")
