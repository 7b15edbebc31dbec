"""Files and folders: a file that is written whole or not at all, text and JSON among them, and which files lead out of
a folder."""

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
    """Where to write a file so that it appears under its name complete and on the disk, or not at all.

    Whatever is raised within leaves the file that was there before. The name beside it is always the same one, so that
    what killed writers leave does not pile up; what lies there is removed first, as a link would lead the writer out.

    Args:
        path: of the file, in a folder that is there.
        writer: sets several processes apart that may write the same file at once; one of them is the last.

    Yields:
        A path beside it, of a file that is not there yet.
    """
    # Cut, as file systems allow 255 bytes for a name, which may be one letter in four bytes.
    name = os.fsdecode(os.fsencode(path.name)[:200])
    temporary = path.with_name(f".{name}{writer}.tmp")
    try:
        temporary.unlink(missing_ok=True)
        yield temporary
        # The contents must be on the disk before the name is. fsync is for the file, whichever handle wrote it.
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    # The rename itself lies in the folder.
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make the renames in it permanent, and in their order, where the system can."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a small file whole or not at all, numbers as `json_ready` has them."""
    write_text(path, json.dumps(json_ready(content), indent=2, ensure_ascii=False) + "\n")


def json_ready(value: Any) -> Any:
    """Plain data with null in the place of NaN and infinity, at any depth: JSON has neither."""
    if isinstance(value, Mapping):
        return {key: json_ready(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [json_ready(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_text(path: Path, text: str) -> None:
    """Write any text whole or not at all, as `write_json`. What a name that is no UTF-8 has in the place of a letter is
    escaped as in JSON. Raises UserError (73, or 74 for a full disk)."""
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
    """A small file that informs and that nothing depends on; empty where it is missing or damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def open_no_link(path: str | Path, flags: int) -> int:
    """Open a file that is written in place, such as one of a run's folder, which may be a stranger's; also an `opener`
    of `open`.

    Returns:
        The handle, as of `os.open`; a new file is everybody's to read and write, but for the umask.

    Raises:
        UserError: a link stands there, which may lead to any file (77).
    """
    try:
        return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0), 0o666)
    except OSError as error:
        # Systems have different numbers for it.
        if os.path.islink(path):
            raise UserError(
                path, "is a symbolic link, and files are not written through links", "Remove it", ExitCode.REFUSED
            ) from error
        raise


def check_inside(file: Path) -> None:
    """A file that lies beside another one is read, one that leads out of the folder is not.

    The cache of the hub's client links its files to a folder of contents beside them; that is inside.

    Raises:
        UserError: it is a link to somewhere else (77).
    """
    folder, target = Path(os.path.realpath(file.parent)), Path(os.path.realpath(file))
    # models--OWNER--NAME/snapshots/COMMIT/FILE is a link to models--OWNER--NAME/blobs/HASH.
    contents = folder.parents[1] / "blobs" if folder.parent.name == "snapshots" else folder
    if not (target.is_relative_to(folder) or target.is_relative_to(contents)):
        what = "is a link that leads out of its folder"
        raise UserError(file, what, "Put the file itself there, if you trust it", ExitCode.REFUSED)
