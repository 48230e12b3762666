"""A seccomp filter that allows the system calls of one Python process and nothing between processes.

An allow list: every other call fails with EPERM. There are no new processes, no `exec`, no sockets but pairs,
no signals to others, no tracing, and no change of owners, modes, mounts or namespaces. Standard library only.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass

_ARCHES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_ALLOW, _ERRNO, _KILL = 0x7FFF0000, 0x00050000, 0x80000000
_LOAD, _AND, _EQUAL, _RETURN = 0x20, 0x54, 0x15, 0x06
_NR, _ARCH, _ARGS = 0, 4, 16  # offsets in seccomp_data
_PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS, _MODE_FILTER = 22, 38, 2

# Numbers on x86_64 and aarch64; None: the architecture does not have the call.
_FREE: dict[str, tuple[int | None, int | None]] = {
    "read": (0, 63), "write": (1, 64), "open": (2, None), "close": (3, 57), "stat": (4, None),
    "fstat": (5, 80), "lstat": (6, None), "poll": (7, None), "lseek": (8, 62), "mmap": (9, 222),
    "mprotect": (10, 226), "munmap": (11, 215), "brk": (12, 214), "rt_sigaction": (13, 134),
    "rt_sigprocmask": (14, 135), "rt_sigreturn": (15, 139), "pread64": (17, 67), "pwrite64": (18, 68),
    "readv": (19, 65), "writev": (20, 66), "access": (21, None), "pipe": (22, None), "select": (23, None),
    "sched_yield": (24, 124), "mremap": (25, 216), "msync": (26, 227), "madvise": (28, 233), "dup": (32, 23),
    "dup2": (33, None), "pause": (34, None), "nanosleep": (35, 101), "getitimer": (36, 102),
    "alarm": (37, None), "setitimer": (38, 103), "getpid": (39, 172), "sendfile": (40, 71),
    "sendto": (44, 206), "recvfrom": (45, 207), "shutdown": (48, 210), "getsockname": (51, 204),
    "getpeername": (52, 205), "getsockopt": (55, 209), "exit": (60, 93), "wait4": (61, 260),
    "uname": (63, 160), "flock": (73, 32), "fsync": (74, 82), "fdatasync": (75, 83), "ftruncate": (77, 46),
    "getdents": (78, None), "getcwd": (79, 17), "chdir": (80, 49), "fchdir": (81, 50), "rename": (82, None),
    "mkdir": (83, None), "rmdir": (84, None), "creat": (85, None), "unlink": (87, None),
    "readlink": (89, None), "umask": (95, 166), "gettimeofday": (96, 169), "getrlimit": (97, 163),
    "getrusage": (98, 165), "sysinfo": (99, 179), "times": (100, 153), "getuid": (102, 174),
    "getgid": (104, 176), "geteuid": (107, 175), "getegid": (108, 177), "getppid": (110, 173),
    "getpgrp": (111, None), "rt_sigpending": (127, 136), "rt_sigtimedwait": (128, 137),
    "rt_sigsuspend": (130, 133), "sigaltstack": (131, 132), "statfs": (137, 43), "fstatfs": (138, 44),
    "gettid": (186, 178), "time": (201, None), "futex": (202, 98), "sched_getaffinity": (204, 123),
    "getdents64": (217, 61), "set_tid_address": (218, 96), "restart_syscall": (219, 128),
    "fadvise64": (221, 223), "clock_gettime": (228, 113), "clock_getres": (229, 114),
    "clock_nanosleep": (230, 115), "exit_group": (231, 94), "epoll_wait": (232, None),
    "epoll_ctl": (233, 21), "openat": (257, 56), "mkdirat": (258, 34), "newfstatat": (262, 79),
    "unlinkat": (263, 35), "renameat": (264, 38), "readlinkat": (267, 78), "faccessat": (269, 48),
    "pselect6": (270, 72), "ppoll": (271, 73), "set_robust_list": (273, 99), "epoll_pwait": (281, 22),
    "eventfd2": (290, 19), "epoll_create1": (291, 20), "dup3": (292, 24), "pipe2": (293, 59),
    "getcpu": (309, 168), "renameat2": (316, 276), "getrandom": (318, 278), "membarrier": (324, 283),
    "copy_file_range": (326, 285), "statx": (332, 291), "rseq": (334, 293), "close_range": (436, 436),
    "faccessat2": (439, 439),
}  # fmt: skip
_CLONE_THREAD, _AF_UNIX, _SOCK_STREAM = 0x10000, 1, 1


@dataclass(frozen=True)
class _Checked:
    """A call that is allowed where each (argument, mask) has one of the values; _OWN_PID: this process."""

    numbers: tuple[int, int]
    conditions: tuple[tuple[int, int, tuple[int, ...]], ...]
    otherwise: int = errno.EPERM


_OWN_PID, _WORD = -1, 0xFFFFFFFF
_CHECKED = (
    # Questions about terminals, close-on-exec, non-blocking. Never FIOSETOWN, which sends signals.
    _Checked((16, 29), ((1, _WORD, (0x5401, 0x5413, 0x5421, 0x5450, 0x5451)),), errno.ENOTTY),
    _Checked((72, 25), ((1, _WORD, (0, 1, 2, 3, 4, 5, 6, 7, 1030)),)),  # fcntl without F_SETOWN
    _Checked((53, 199), ((0, _WORD, (_AF_UNIX,)), (1, 0xF, (_SOCK_STREAM,)))),  # socketpair
    _Checked((56, 220), ((0, _CLONE_THREAD, (_CLONE_THREAD,)),)),  # clone: threads only
    _Checked((435, 435), ((0, 0, (1,)),), errno.ENOSYS),  # clone3: libc then calls clone
    _Checked((62, 129), ((0, _WORD, (_OWN_PID,)),)),  # kill
    _Checked((234, 131), ((0, _WORD, (_OWN_PID,)),)),  # tgkill
    _Checked((302, 261), ((0, _WORD, (0, _OWN_PID)),)),  # prlimit64
)


def architecture_problem() -> str | None:
    """Return why there is no filter for this machine, or None."""
    machine = os.uname().machine
    if machine not in _ARCHES:
        return f"there is no system call filter for {machine} (only for {' and '.join(_ARCHES)})"
    return None


def install(libc: ctypes.CDLL) -> None:
    """Restrict this process for good. Raises OSError."""
    program = b"".join(struct.pack("=HBBI", *instruction) for instruction in _instructions(os.getpid()))
    buffer = ctypes.create_string_buffer(program)
    header = struct.pack("=HxxxxxxQ", len(program) // 8, ctypes.addressof(buffer))
    prog = ctypes.create_string_buffer(header)
    for arguments in ((_PR_SET_NO_NEW_PRIVS, 1, 0), (_PR_SET_SECCOMP, _MODE_FILTER, prog)):
        option, *rest = arguments
        if libc.prctl(option, *(ctypes.c_ulong(v) if isinstance(v, int) else v for v in rest), 0, 0):
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))


def _instructions(pid: int) -> Iterator[tuple[int, int, int, int]]:
    machine = os.uname().machine
    column = list(_ARCHES).index(machine)
    yield _LOAD, 0, 0, _ARCH
    yield _EQUAL, 1, 0, _ARCHES[machine]
    yield _RETURN, 0, 0, _KILL
    yield _LOAD, 0, 0, _NR
    for numbers in _FREE.values():
        if (number := numbers[column]) is not None:
            yield _EQUAL, 0, 1, number
            yield _RETURN, 0, 0, _ALLOW
    for call in _CHECKED:
        body = list(_conditions(call, pid))
        yield _EQUAL, 0, len(body), call.numbers[column]
        yield from body
    yield _RETURN, 0, 0, _ERRNO | errno.EPERM


def _conditions(call: _Checked, pid: int) -> Iterator[tuple[int, int, int, int]]:
    for argument, mask, values in call.conditions:
        yield _LOAD, 0, 0, _ARGS + 8 * argument  # the lower half, on little-endian machines
        yield _AND, 0, 0, mask
        for left, value in zip(range(len(values), 0, -1), values, strict=True):
            yield _EQUAL, left, 0, pid if value == _OWN_PID else value
        yield _RETURN, 0, 0, _ERRNO | call.otherwise
    yield _RETURN, 0, 0, _ALLOW
