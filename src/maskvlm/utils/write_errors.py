"""Errors in writing an output: one line and an exit status, whichever library tried to write it.

Lightning, TensorBoard, Pillow, matplotlib and torch all pass on the system's OSError. Its number tells the cause.
"""

import errno
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from maskvlm.utils.errors import ExitCode, UserError

# Full: the disk, a quota, or the largest file allowed (`ulimit -f`).
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
REFUSED = {errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST, errno.EISDIR, errno.ENAMETOOLONG}
BROKEN = {errno.EIO, errno.ENXIO, errno.ENODEV, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN}


def cannot_write(error: OSError, where: object = None, note: str = "") -> UserError | None:
    """The error to report for an output that could not be written.

    Args:
        error: the system's error.
        where: the file; by default the one named in the error.
        note: end of the line, on what is unharmed.

    Returns:
        The error for the user (73: refused, 74: full or broken); None if the number is none of these.
    """
    named = os.fsdecode(error.filename) if isinstance(error.filename, str | bytes) else "disk"
    place, end = str(where or named), f"; {note}" if note else ""
    if error.errno in FULL:
        return UserError(
            place, f"no space left: disk full ({error.strerror})", f"Free some space{end}", ExitCode.IO_ERROR
        )
    if error.errno in REFUSED:
        todo = f"Make it writable, or choose another folder{end}"
        return UserError(place, f"cannot be written ({error.strerror})", todo, ExitCode.CANNOT_CREATE)
    if error.errno in BROKEN:  # reading a checkpoint may fail this way too
        what = f"could not be read or written ({error.strerror})"
        return UserError(place, what, f"Check the disk{end}", ExitCode.IO_ERROR)
    return None


def write_output(path: Path, content: bytes) -> None:
    """Write a file named by the user; its folder is created if needed.

    Raises:
        UserError: it cannot be written (73), or the disk is full or broken (74).
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # In place: it may be a device, such as /dev/null.
        path.write_bytes(content)
    except OSError as error:
        what, todo = f"cannot be written ({error.strerror})", "Name another file"
        raise cannot_write(error, path) or UserError(path, what, todo, ExitCode.CANNOT_CREATE) from error


@contextmanager
def writing(folder: object = None) -> Iterator[None]:
    """Turn a failure to write inside this context into a one-line error, whichever library tried to write.

    Args:
        folder: the output folder; named if the error names no file.

    Raises:
        UserError: see `cannot_write`.
    """
    # An error in a writer thread would be printed by this hook, and reported again in the main thread.
    before = threading.excepthook
    threading.excepthook = lambda args: None if is_output_error(args.exc_value) else before(args)
    try:
        yield
    except OSError as error:
        # A failed `open` names its file, a failed `write` does not.
        user_error = cannot_write(error, None if error.filename else folder)
        if user_error is None:
            raise
        raise user_error from error
    finally:
        threading.excepthook = before


def is_output_error(error: BaseException | None) -> bool:
    """Whether an error of a writer thread is an output error. TensorBoard's thread dies of it, and the main thread
    reports it with the next value or at the end, so it must not be printed twice."""
    return isinstance(error, OSError) and cannot_write(error) is not None
