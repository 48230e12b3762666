"""Folders are complete or absent, and every kind of damage is detected."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from mergeopd.errors import StorageError
from mergeopd.storage.folders import (
    FORMAT,
    MANIFEST,
    MODEL_CARD,
    atomic_folder,
    copy_folder,
    keep_only,
    newest_valid,
    prune,
    set_aside,
    verify,
    write_atomic,
)

WEIGHTS = bytes(range(256)) * 40


def make(target: Path) -> Path:
    with atomic_folder(target) as folder:
        (folder / "weights.bin").write_bytes(WEIGHTS)
        (folder / "optimizer").mkdir()
        (folder / "optimizer" / "state.json").write_text('{"step": 3}')
        (folder / "empty.txt").touch()
    return target


def test_manifest_names_every_file_with_size_and_hash(tmp_path: Path) -> None:
    folder = make(tmp_path / "checkpoints" / "step-1")
    manifest = json.loads((folder / MANIFEST).read_text())
    assert manifest["format"] == FORMAT
    assert manifest["files"] == {
        "weights.bin": {"bytes": 10240, "sha256": hashlib.sha256(WEIGHTS).hexdigest()},
        "optimizer/state.json": {"bytes": 11, "sha256": hashlib.sha256(b'{"step": 3}').hexdigest()},
        "empty.txt": {"bytes": 0, "sha256": hashlib.sha256(b"").hexdigest()},
    }
    assert verify(folder) is None
    assert os.listdir(folder.parent) == ["step-1"]


def test_every_file_and_folder_is_synced_before_the_rename(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log: list[str] = []
    real_fsync, real_rename = os.fsync, Path.rename

    def fsync(descriptor: int) -> None:
        log.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        real_fsync(descriptor)

    def rename(path: Path, target: Path) -> Path:
        log.append("rename")
        return real_rename(path, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "rename", rename)
    make(tmp_path / "step-1")
    inside = str(tmp_path / ".step-1.partial")
    before, after = log[: log.index("rename")], log[log.index("rename") + 1 :]
    assert sorted(before) == sorted(
        [inside, f"{inside}/optimizer", f"{inside}/optimizer/state.json", f"{inside}/weights.bin",
         f"{inside}/empty.txt", f"{inside}/{MANIFEST}"]
    )  # fmt: skip
    assert before[-1] == inside
    assert after == [str(tmp_path)]


@pytest.mark.parametrize("error", [ValueError("bad"), KeyboardInterrupt()])
def test_a_failure_leaves_no_files(tmp_path: Path, error: BaseException) -> None:
    with pytest.raises(type(error)), atomic_folder(tmp_path / "step-1") as folder:  # noqa: PT012
        (folder / "weights.bin").write_bytes(b"half")
        raise error
    assert list(tmp_path.iterdir()) == []


def test_killed_process_leaves_only_a_temporary_that_the_next_call_clears(tmp_path: Path) -> None:
    target = tmp_path / "step-1"
    script = (
        "import os, signal, sys\nfrom pathlib import Path\nfrom mergeopd.storage.folders import atomic_folder\n"
        "with atomic_folder(Path(sys.argv[1])) as folder:\n"
        "    (folder / 'half.bin').write_bytes(b'half')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(target)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert [path.name for path in tmp_path.iterdir()] == [".step-1.partial"]
    assert newest_valid(tmp_path) == (None, [])
    make(target)
    assert [path.name for path in tmp_path.iterdir()] == ["step-1"]
    assert not (target / "half.bin").exists()


def test_existing_target_is_refused_and_kept(tmp_path: Path) -> None:
    folder = make(tmp_path / "step-1")
    with (
        pytest.raises(StorageError, match=r"cannot write .*step-1: it exists already"),
        atomic_folder(folder),
    ):
        pytest.fail("the block must not run")
    assert verify(folder) is None


@pytest.mark.parametrize(
    ("fill", "message"),
    [
        (lambda folder: None, "nothing was written into it"),
        (lambda folder: (folder / MANIFEST).write_text("mine"), "is taken by the manifest"),
        (lambda folder: (folder / "link").symlink_to("/etc/hostname"), "link is not a plain file"),
    ],
)
def test_contents_that_cannot_be_guarded_are_refused(
    tmp_path: Path, fill: Callable[[Path], object], message: str
) -> None:
    with pytest.raises(StorageError, match=message), atomic_folder(tmp_path / "step-1") as folder:
        fill(folder)
    assert list(tmp_path.iterdir()) == []


def _flip(path: Path, position: int, bit: int = 0) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1 << bit
    path.write_bytes(content)


def _drop_entry(manifest: Path) -> None:
    record = json.loads(manifest.read_text())
    del record["files"]["weights.bin"]
    manifest.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda f: (f / "weights.bin").unlink(), "weights.bin is missing"),
        (lambda f: os.truncate(f / "weights.bin", 10239), "weights.bin has 10239 bytes instead of 10240"),
        (lambda f: os.truncate(f / "weights.bin", 0), "weights.bin has 0 bytes instead of 10240"),
        (lambda f: (f / "empty.txt").write_text("x"), "empty.txt has 1 bytes instead of 0"),
        (lambda f: _flip(f / "weights.bin", 0), "weights.bin is damaged: its SHA-256"),
        (lambda f: _flip(f / "weights.bin", 10239, 7), "weights.bin is damaged: its SHA-256"),
        (lambda f: _flip(f / "optimizer/state.json", 5), "optimizer/state.json is damaged: its SHA-256"),
        (lambda f: (f / MANIFEST).unlink(), "manifest.json is missing"),
        (lambda f: os.truncate(f / MANIFEST, 0), "manifest.json is empty"),
        (lambda f: os.truncate(f / MANIFEST, 40), "manifest.json is damaged: it is not JSON"),
        (lambda f: (f / MANIFEST).write_bytes(b"\0" * 300), "manifest.json is damaged: it is not JSON"),
        (lambda f: (f / MANIFEST).write_text("{}"), "manifest.json is damaged: it lists no files"),
        (lambda f: (f / MANIFEST).write_text("[]"), "manifest.json is damaged: it lists no files"),
        (lambda f: (f / MANIFEST).write_text(json.dumps({"format": FORMAT, "files": {}})), "own hash"),
        (lambda f: (f / MANIFEST).write_text('{"format": "x-9", "files": {}}'), "has format 'x-9', not"),
        (lambda f: _drop_entry(f / MANIFEST), "does not match its own hash"),
    ],
)
def test_damage_is_noticed_and_named(tmp_path: Path, damage: Callable[[Path], object], reason: str) -> None:
    folder = make(tmp_path / "step-1")
    damage(folder)
    fault = verify(folder)
    assert fault is not None
    assert reason in fault


def test_every_single_flipped_manifest_byte_is_noticed(tmp_path: Path) -> None:
    folder = tmp_path / "step-1"
    with atomic_folder(folder) as inside:
        (inside / "w").write_bytes(b"weights")
    good = (folder / MANIFEST).read_bytes()
    for position in range(len(good)):
        _flip(folder / MANIFEST, position)
        assert verify(folder) is not None, position
        (folder / MANIFEST).write_bytes(good)
    for length in (*range(0, len(good), 13), len(good) - 1):
        os.truncate(folder / MANIFEST, length)
        assert verify(folder) is not None, length
        (folder / MANIFEST).write_bytes(good)
    assert verify(folder) is None


def test_a_foreign_file_does_no_harm(tmp_path: Path) -> None:
    folder = make(tmp_path / "step-1")
    (folder / "NOTES.md").write_text("the good one")
    assert verify(folder) is None


def test_newest_valid_compares_numbers_and_returns_skipped_folders(tmp_path: Path) -> None:
    for number in (2, 10, 100, 30):
        make(tmp_path / f"step-{number}")
    (tmp_path / "step-x").mkdir()
    (tmp_path / "step-200.txt").touch()
    _flip(tmp_path / "step-100" / "weights.bin", 77)
    (tmp_path / "step-30" / MANIFEST).unlink()
    (tmp_path / "step-300").touch()
    valid, skipped = newest_valid(tmp_path)
    assert valid == tmp_path / "step-10"
    assert skipped == [
        (tmp_path / "step-300", "is not a folder"),
        (tmp_path / "step-100", "weights.bin is damaged: its SHA-256 differs from the manifest's"),
        (tmp_path / "step-30", "manifest.json is missing"),
    ]


def test_newest_valid_without_any(tmp_path: Path) -> None:
    assert newest_valid(tmp_path / "missing") == (None, [])
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match=r"cannot list .*file: Not a directory; a file is where a folder"):
        newest_valid(tmp_path / "file")


def test_prune_keeps_the_newest_and_clears_leftovers(tmp_path: Path) -> None:
    for number in (5, 10, 15, 20):
        make(tmp_path / f"step-{number}")
    for name in (".step-7.partial", "step-8.broken", "step-17.broken"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x").touch()
    (tmp_path / "mine").mkdir()
    assert prune(tmp_path, keep=2) == (tmp_path / "step-10", tmp_path / "step-5")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "mine",
        "step-15",
        "step-17.broken",
        "step-20",
    ]
    assert prune(tmp_path, keep=2) == ()
    assert prune(tmp_path / "missing", keep=1) == ()
    with pytest.raises(ValueError, match="keep must be at least 1"):
        prune(tmp_path, keep=0)


def test_pruned_folder_never_lies_half_deleted_under_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in (5, 10):
        make(tmp_path / f"step-{number}")

    def dies(path: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("mergeopd.storage.folders.shutil.rmtree", dies)
    with pytest.raises(KeyboardInterrupt):
        prune(tmp_path, keep=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".step-5.partial", "step-10"]


def test_set_aside_frees_the_number(tmp_path: Path) -> None:
    folder = make(tmp_path / "step-3")
    assert set_aside(folder) == tmp_path / "step-3.broken"
    make(folder)
    set_aside(folder)  # replaces the older broken one
    assert newest_valid(tmp_path) == (None, [])
    assert [path.name for path in tmp_path.iterdir()] == ["step-3.broken"]


@pytest.mark.parametrize(
    ("number", "told"),
    [
        (errno.ENOSPC, "No space left on device; free space on this disk, or choose another `output`"),
        (errno.EROFS, "Read-only file system; choose an `output` that can be written to"),
        (errno.EACCES, "Permission denied; check the owner and the permissions"),
        (errno.EIO, "Input/output error; the disk reports errors"),
    ],
)
def test_a_failing_disk_is_reported_and_leaves_no_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, told: str
) -> None:
    def fsync(descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    write_atomic(tmp_path / "result.json", "old")
    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(StorageError) as caught:
        make(tmp_path / "step-1")
    assert str(caught.value).startswith(f"cannot write {tmp_path / 'step-1'}: {told}")
    assert str(caught.value).endswith("then run the same command again")
    with pytest.raises(StorageError, match=r"cannot write .*result.json"):
        write_atomic(tmp_path / "result.json", "new")
    with pytest.raises(StorageError) as caught:
        write_atomic(tmp_path / "kept.jsonl", "new", "text_cache")
    assert "`output`" not in str(caught.value)
    assert "`output`" not in told or told.replace("`output`", "`text_cache`") in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]
    assert (tmp_path / "result.json").read_text() == "old"


def test_file_system_without_folder_sync_is_accepted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.fsync

    def fsync(descriptor: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.EINVAL, "Invalid argument")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    assert verify(make(tmp_path / "step-1")) is None


def test_a_full_disk_met_by_safetensors_is_named(tmp_path: Path) -> None:
    """The Rust writer raises its own error type; a file size limit stands in for a full disk."""
    numpy = pytest.importorskip("safetensors.numpy")
    import numpy as np

    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, old[1]))
    try:
        with pytest.raises(StorageError, match=r"cannot write .*step-1: File too large; raise the file size"):  # noqa: SIM117
            with atomic_folder(tmp_path / "step-1") as folder:
                numpy.save_file({"w": np.zeros(99999)}, folder / "model.safetensors")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert list(tmp_path.iterdir()) == []


def test_a_file_in_the_way_of_a_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("a file")
    for call in (
        lambda: make(tmp_path / "runs" / "step-1"),
        lambda: write_atomic(tmp_path / "runs" / "x", ""),
    ):
        with pytest.raises(StorageError, match=r"a file is where a folder should be|File exists"):
            call()


def test_write_atomic_replaces_and_makes_folders(tmp_path: Path) -> None:
    path = tmp_path / "runs" / "a" / "result.json"
    write_atomic(path, "one\n")
    write_atomic(path, "zwölf\n")
    assert path.read_bytes() == "zwölf\n".encode()
    assert os.listdir(path.parent) == ["result.json"]


def test_only_wanted_numbers_are_kept(tmp_path: Path) -> None:
    assert keep_only(tmp_path / "best", [1]) is None
    for number in (2, 4, 7, 9):
        make(tmp_path / f"step-{number}")
    (tmp_path / "step-7" / "manifest.json").unlink()
    assert keep_only(tmp_path, {2, 4, 7}) == 4
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-2", "step-4", "step-7.broken"]
    (tmp_path / "copy").mkdir()
    copy_folder(tmp_path / "step-4", tmp_path / "copy")
    files = {path.name for path in (tmp_path / "step-4").iterdir()}
    assert {path.name for path in (tmp_path / "copy").iterdir()} == files - {"manifest.json"}


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_permissions_follow_the_umask(tmp_path: Path, umask: int) -> None:
    """safetensors creates files that only their owner can read."""
    numpy = pytest.importorskip("safetensors.numpy")
    import numpy as np

    before = os.umask(umask)
    try:
        with atomic_folder(tmp_path / "export") as folder:
            numpy.save_file({"w": np.zeros(3)}, folder / "model.safetensors")
            (folder / "parts").mkdir()
            numpy.save_file({"w": np.zeros(3)}, folder / "parts" / "model.safetensors")
        write_atomic(tmp_path / "result.json", "{}")
    finally:
        os.umask(before)
    for path in (tmp_path / "export", *tmp_path.rglob("*")):
        wanted = (0o777 if path.is_dir() else 0o666) & ~umask
        assert oct(path.stat().st_mode & 0o777) == oct(wanted), path


def test_a_model_card_may_be_edited(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "export") as folder:
        for name in (MODEL_CARD, "config.json"):
            (folder / name).write_text("{}")
    (tmp_path / "export" / MODEL_CARD).write_text("# My model")
    assert verify(tmp_path / "export") is None
    (tmp_path / "export" / "config.json").write_text("[]")
    assert verify(tmp_path / "export") == "config.json is damaged: its SHA-256 differs from the manifest's"
