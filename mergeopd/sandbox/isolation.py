"""Isolation of a process from files, networks and other processes, without privileges. Linux only.

Two mechanisms keep files away: namespaces (user, mount, network, IPC, UTS, PID) with a root of their own, and
Landlock where namespaces are not permitted, as in most containers. With either, a seccomp filter and resource
limits apply to every program. Standard library only.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import struct
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from mergeopd.sandbox import seccomp

Mechanism = Literal["namespaces", "landlock"]
MECHANISMS: tuple[Mechanism, ...] = ("namespaces", "landlock")  # the first that works is used
_SCRATCH_BYTES, _SCRATCH_FILES = 64 << 20, 4096
_NOBODY = 65534
_MAX_THREADS = 512
_SITE = ("site-packages", "dist-packages")

_NEWNS, _NEWUTS, _NEWIPC, _NEWUSER, _NEWPID, _NEWNET = (
    0x20000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000,
)  # fmt: skip
_RDONLY, _NOSUID, _NODEV, _REMOUNT, _BIND, _REC, _PRIVATE = 1, 2, 4, 32, 4096, 16384, 1 << 18
# Flags of a mount that a user namespace may not remove, as statvfs and mount write them.
_LOCKED = {2: 2, 4: 4, 8: 8, 1024: 1024, 2048: 2048, 4096: 1 << 21}
_DETACH = 2
_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
_CAPSET = {"x86_64": 126, "aarch64": 91}
_LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_RESTRICT = 444, 445, 446
_READ_FILE, _READ_DIR, _WRITE_FILE, _TRUNCATE = 4, 8, 2, 1 << 14
_ALL_V1, _EXECUTE, _MAKE_SPECIAL = (1 << 13) - 1, 1, 64 | 512 | 1024 | 2048 | 4096
_SET_PDEATHSIG, _SET_DUMPABLE = 1, 4
_SIGKILL = 9


class IsolationError(Exception):
    """A mechanism does not work here; the message says why."""


def load_libc() -> ctypes.CDLL:
    """Load the C library with `errno`. Raises IsolationError where there is none that fits."""
    if os.name != "posix" or os.uname().sysname != "Linux":
        raise IsolationError("it needs Linux")
    if (problem := seccomp.architecture_problem()) is not None:
        raise IsolationError(problem)
    return ctypes.CDLL(None, use_errno=True)


class Isolation:
    """What one server process has set up; `restrict` applies it to a forked child."""

    def __init__(self, libc: ctypes.CDLL, scratch: Path, base_bytes: int, ruleset: int | None) -> None:
        self._libc, self._base_bytes, self._ruleset = libc, base_bytes, ruleset
        self.scratch = scratch

    def is_full(self) -> bool:
        """Whether the scratch folder exceeds its limits, which with namespaces its file system enforces."""
        if self._ruleset is None:
            return False
        num_files = num_bytes = 0
        for folder, _, names in os.walk(self.scratch):
            num_files += 1 + len(names)
            for name in names:
                with contextlib.suppress(FileNotFoundError):
                    num_bytes += os.lstat(os.path.join(folder, name)).st_blocks * 512
        return num_bytes > _SCRATCH_BYTES or num_files > _SCRATCH_FILES

    def restrict(self, memory_mb: int, file_mb: int, cpu_s: int) -> None:
        """Limit this process for good; the last step before it runs a program."""
        limits = {
            resource.RLIMIT_AS: self._base_bytes + (memory_mb << 20),
            resource.RLIMIT_FSIZE: file_mb << 20,
            resource.RLIMIT_CPU: cpu_s,
            resource.RLIMIT_NOFILE: 64,
            resource.RLIMIT_NPROC: _MAX_THREADS,
            resource.RLIMIT_CORE: 0,
            resource.RLIMIT_MEMLOCK: 0,
        }
        for limit, value in limits.items():
            hard = resource.getrlimit(limit)[1]
            value = value if hard == resource.RLIM_INFINITY else min(value, hard)
            resource.setrlimit(limit, (value, value))
        os.chdir(self.scratch)
        _call(self._libc.prctl, _SET_PDEATHSIG, _SIGKILL, 0, 0, 0, what="prctl")
        _call(self._libc.prctl, _SET_DUMPABLE, 0, 0, 0, 0, what="prctl")
        if self._ruleset is not None:
            _call(self._libc.prctl, 38, 1, 0, 0, 0, what="prctl")
            _call(self._libc.syscall, _LANDLOCK_RESTRICT, self._ruleset, 0, what="landlock_restrict_self")
        seccomp.install(self._libc)


def isolate(mechanism: Mechanism, scratch: Path) -> Isolation:
    """Set up a mechanism in this single-threaded process. Raises IsolationError.

    With namespaces, the process forks, returns in the child, which is the first process of its PID
    namespace, and keeps the parent waiting. `scratch` is used by Landlock alone.
    """
    libc = load_libc()
    base_bytes = _virtual_bytes()  # of the interpreter; /proc disappears with the old root
    try:
        if mechanism == "landlock":
            return Isolation(libc, scratch, base_bytes, _landlock_ruleset(libc, scratch))
        return Isolation(libc, _enter_namespaces(libc), base_bytes, None)
    except OSError as error:
        raise IsolationError(f"{error.strerror or error} ({error.filename or 'system call'})") from None


def standard_library() -> list[Path]:
    """The folders of the standard library, without third-party packages."""
    folders = {Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "platstdlib")}
    return sorted(folder for folder in folders if folder.is_dir())


def _virtual_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[0]) * resource.getpagesize()


def _call(function: object, *arguments: object, what: str) -> int:
    """Call a function of libc. Raises OSError with `what` in place of a file name."""
    result: int = function(*(ctypes.c_ulong(a) if isinstance(a, int) else a for a in arguments))  # type: ignore[operator]
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), what)
    return result


# ------------------------------------------------------------------------------------------- namespaces


def _enter_namespaces(libc: ctypes.CDLL) -> Path:
    """Move to new namespaces and a new root; return the scratch folder in it."""
    user, group = os.geteuid(), os.getegid()
    flags = _NEWNS | _NEWUTS | _NEWIPC | _NEWPID | _NEWNET
    is_privileged = user == 0 and libc.unshare(flags) == 0
    if not is_privileged:
        _call(libc.unshare, flags | _NEWUSER, what="unshare")
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"{user} {user} 1")
        Path("/proc/self/gid_map").write_text(f"{group} {group} 1")
    _fork_first_process(libc)
    _build_root(libc)
    if is_privileged:
        os.setgroups([])
        os.setresgid(_NOBODY, _NOBODY, _NOBODY)
        os.setresuid(_NOBODY, _NOBODY, _NOBODY)
    _call(libc.prctl, _SET_PDEATHSIG, _SIGKILL, 0, 0, 0, what="prctl")
    _drop_capabilities(libc)
    return Path("/scratch")


def _fork_first_process(libc: ctypes.CDLL) -> None:
    """Continue in the first process of the PID namespace. The parent ends when it does."""
    child = os.fork()
    if child:
        os.closerange(0, 1024)
        _, status = os.waitpid(child, 0)
        os._exit(os.waitstatus_to_exitcode(status) & 0xFF)
    _call(libc.prctl, _SET_PDEATHSIG, _SIGKILL, 0, 0, 0, what="prctl")


def _build_root(libc: ctypes.CDLL) -> None:
    """Change to a root that has the standard library, read-only, `/dev/null` and `/scratch`."""
    visible = [*standard_library(), Path("/usr/share/zoneinfo"), Path("/dev/null")]
    handles = [(path, os.open(path, os.O_PATH)) for path in visible if path.exists()]
    _mount(libc, None, "/", None, _REC | _PRIVATE)
    root = "/tmp"
    _mount(libc, "tmpfs", root, "tmpfs", _NOSUID | _NODEV, "size=1m,mode=755")
    for path, handle in handles:
        target = Path(root, *path.parts[1:])
        target.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            target.mkdir(exist_ok=True)
        else:
            target.touch()
        _mount(libc, f"/proc/self/fd/{handle}", str(target), None, _BIND | _REC)
        if path != Path("/dev/null"):
            kept = sum(flag for bit, flag in _LOCKED.items() if os.statvfs(target).f_flag & bit)
            flags = _REMOUNT | _BIND | _RDONLY | _NOSUID | _NODEV | kept
            _mount(libc, None, str(target), None, flags)
        for name in _SITE:
            if (target / name).is_dir():
                _mount(libc, "tmpfs", str(target / name), "tmpfs", _RDONLY | _NOSUID | _NODEV, "size=4k")
        os.close(handle)
    scratch = Path(root, "scratch")
    scratch.mkdir()
    options = f"size={_SCRATCH_BYTES},nr_inodes={_SCRATCH_FILES},mode=777"
    _mount(libc, "tmpfs", str(scratch), "tmpfs", _NOSUID | _NODEV, options)
    _mount(libc, None, root, None, _REMOUNT | _BIND | _RDONLY | _NOSUID | _NODEV)
    os.chdir(root)
    _call(libc.syscall, _PIVOT_ROOT[os.uname().machine], b".", b".", what="pivot_root")
    _call(libc.umount2, b".", _DETACH, what="umount2")
    os.chdir("/")


def _mount(
    libc: ctypes.CDLL, source: str | None, target: str, kind: str | None, flags: int, data: str | None = None
) -> None:
    texts = [None if text is None else text.encode() for text in (source, target, kind, data)]
    _call(libc.mount, texts[0], texts[1], texts[2], flags, texts[3], what=f"mount {target}")


def _drop_capabilities(libc: ctypes.CDLL) -> None:
    header, data = struct.pack("=Ii", 0x20080522, 0), bytes(24)
    _call(libc.syscall, _CAPSET[os.uname().machine], header, data, what="capset")


# --------------------------------------------------------------------------------------------- Landlock


def _landlock_ruleset(libc: ctypes.CDLL, scratch: Path) -> int:
    """Return a ruleset: the standard library can be read, the scratch folder also written."""
    abi = libc.syscall(_LANDLOCK_CREATE, None, ctypes.c_ulong(0), ctypes.c_ulong(1))
    if abi < 1:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), "Landlock")
    handled = _ALL_V1 | (_TRUNCATE if abi >= 3 else 0)
    attributes = struct.pack("=Q", handled)
    ruleset = _call(libc.syscall, _LANDLOCK_CREATE, attributes, 8, 0, what="Landlock")
    writable = handled & ~(_EXECUTE | _MAKE_SPECIAL)
    for path, rights in (*_readable(), (scratch, writable), (Path("/dev/null"), _READ_FILE | _WRITE_FILE)):
        with contextlib.suppress(FileNotFoundError):
            handle = os.open(path, os.O_PATH)
            rule = struct.pack("=Qi", rights, handle)
            _call(libc.syscall, _LANDLOCK_ADD, ruleset, 1, rule, 0, what="Landlock")
            os.close(handle)
    if os.geteuid() == 0:
        # Rights of root that file permissions do not check.
        _drop_capabilities(libc)
    return ruleset


def _readable() -> Iterator[tuple[Path, int]]:
    """Paths that programs may read. A rule for a folder holds for all below it, so packages are left out."""
    yield Path("/usr/share/zoneinfo"), _READ_FILE | _READ_DIR
    for folder in standard_library():
        yield folder, _READ_DIR
        for entry in sorted(folder.iterdir()):
            if entry.name not in _SITE:
                yield entry, _READ_FILE | (_READ_DIR if entry.is_dir() else 0)
