"""Convert operating-system errors to StorageError with path, cause and remedy."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mergeopd.errors import StorageError

_REMEDIES = {
    errno.ENOSPC: "free space on this disk, or choose another `output`",
    errno.EDQUOT: "free space in your quota, or choose another `output`",
    errno.EFBIG: "raise the file size limit (`ulimit -f`), or choose another `output`",
    errno.EROFS: "choose an `output` that can be written to",
    errno.EACCES: "check the owner and the permissions, or choose another `output`",
    errno.EPERM: "check the owner and the permissions, or choose another `output`",
    errno.ENOTDIR: "a file is where a folder should be: move it away",
    errno.EISDIR: "a folder is where a file should be: move it away",
    errno.ENAMETOOLONG: "choose a shorter `output`",
    errno.EIO: "the disk reports errors: check it, or choose another `output`",
    errno.ENOLCK: "this file system has no locks: choose an `output` on another one",
    errno.ENOTSUP: "this file system cannot do that: choose an `output` on another one",
}
_OTHER_REMEDY = "check the disk and the folder"
# Rust libraries (safetensors, tokenizers) report the error number only in the message.
_RUST_OS_ERROR = re.compile(r"\(os error (\d+)\)")


def _errno_of(error: Exception) -> int | None:
    if isinstance(error, OSError):
        return error.errno
    match = _RUST_OS_ERROR.search(str(error))
    return int(match.group(1)) if match else None


@contextmanager
def named_failures(action: str, path: Path, setting: str = "output") -> Iterator[None]:
    """Turn an operating-system error inside the block into a StorageError `cannot <action> <path>: ...`.

    `setting` is the key of the recipe that names the folder. Errors of Rust libraries (for a full disk, say)
    are recognised too. Other exceptions are not changed.
    """
    try:
        yield
    except StorageError:
        raise
    except Exception as error:
        number = _errno_of(error)
        if number is None:
            raise
        named = getattr(error, "filename", None)
        inside = f" ({named})" if named and str(named) != str(path) else ""
        remedy = _REMEDIES.get(number, _OTHER_REMEDY).replace("`output`", f"`{setting}`")
        raise StorageError(
            f"cannot {action} {path}: {os.strerror(number)}{inside}; {remedy}, "
            "then run the same command again"
        ) from error
