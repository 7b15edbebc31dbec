"""Atomic writing of files, including text and JSON, and checks for links that lead out of a folder."""

import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from maskvlm.utils.errors import ExitCode, UserError
from maskvlm.utils.write_errors import cannot_write


@contextmanager
def whole_file(path: Path, writer: str = "") -> Iterator[Path]:
    """Write a file atomically: it appears under its name complete and on disk, or not at all.

    If anything is raised inside, the previous file stays. The temporary name is always the same, so that leftovers of
    killed writers do not pile up; a file of that name is removed first, as it may be a link out of the folder.

    Args:
        path: path of the file, in an existing folder.
        writer: distinguishes processes that may write the same file at once; the last one wins.

    Yields:
        A path in the same folder, of a file that does not exist yet.
    """
    # Cut, as file systems allow 255 bytes for a name, and a character may take four.
    name = os.fsdecode(os.fsencode(path.name)[:200])
    temporary = path.with_name(f".{name}{writer}.tmp")
    try:
        temporary.unlink(missing_ok=True)
        yield temporary
        # The contents must be on disk before the name is. fsync applies to the file, whichever handle wrote it.
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    # The rename itself is recorded in the folder.
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make the renames in a folder permanent, in their order, if the system supports it."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a small JSON file atomically, with numbers as in `json_ready`."""
    write_text(path, json.dumps(json_ready(content), indent=2, ensure_ascii=False) + "\n")


def json_ready(value: Any) -> Any:
    """Plain data with NaN and infinity replaced by null at any depth, as JSON has neither."""
    if isinstance(value, Mapping):
        return {key: json_ready(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [json_ready(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_text(path: Path, text: str) -> None:
    """Write any text atomically, like `write_json`. Bytes of file names that are not UTF-8 are escaped as in JSON.
    Raises UserError (73, or 74 for a full disk)."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as temporary:
            temporary.write_text(text, encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        user_error = cannot_write(error, path)
        if user_error is None:
            raise
        raise user_error from error


def read_json(path: Path) -> dict[str, Any]:
    """A small JSON file that is only informative; empty if it is missing or damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def open_no_link(path: str | Path, flags: int) -> int:
    """Open a file that is written in place but not through a link, such as in a run's folder, which may be untrusted;
    also usable as the `opener` of `open`.

    Returns:
        The handle, as from `os.open`; a new file is readable and writable by everyone, subject to the umask.

    Raises:
        UserError: the path is a link, which may lead to any file (77).
    """
    try:
        return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0), 0o666)
    except OSError as error:
        # Systems use different error numbers for it.
        if os.path.islink(path):
            raise UserError(
                path, "is a symbolic link, and files are not written through links", "Remove it", ExitCode.REFUSED
            ) from error
        raise


def check_inside(file: Path) -> None:
    """Check that a file is not a link out of its folder.

    The cache of the hub's client links its files to a neighbouring folder of contents; that counts as inside.

    Raises:
        UserError: it is a link to somewhere else (77).
    """
    folder, target = Path(os.path.realpath(file.parent)), Path(os.path.realpath(file))
    # models--OWNER--NAME/snapshots/COMMIT/FILE is a link to models--OWNER--NAME/blobs/HASH.
    contents = folder.parents[1] / "blobs" if folder.parent.name == "snapshots" else folder
    if not (target.is_relative_to(folder) or target.is_relative_to(contents)):
        what = "is a link that leads out of its folder"
        raise UserError(file, what, "Put the file itself there, if you trust it", ExitCode.REFUSED)
