"""Folders: what makes a file survive a power failure, and which files lead out of one."""

import os
from pathlib import Path

from maskvlm.utils.errors import ExitCode, UserError


def sync_folder(folder: Path) -> None:
    """Make the renames in it permanent, and in their order, where the system can."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def check_inside(file: Path) -> None:
    """A file that lies beside another one is read, one that leads out of the folder is not.

    The cache of the hub's client links its files to a folder of contents beside them; that is inside.

    Raises:
        UserError: it is a link to somewhere else (77).
    """
    folder, target = Path(os.path.realpath(file.parent)), Path(os.path.realpath(file))
    contents = folder.parents[1] / "blobs" if folder.parent.name == "snapshots" else folder
    if not (target.is_relative_to(folder) or target.is_relative_to(contents)):
        what = "is a link that leads out of its folder"
        raise UserError(file, what, "Put the file itself there, if you trust it", ExitCode.REFUSED)
