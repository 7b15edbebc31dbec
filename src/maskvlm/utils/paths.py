"""Paths as a user gives them."""

import os
from pathlib import Path


def expand_user(path: str | os.PathLike[str]) -> Path:
    """The path with `~` and `~name` replaced by the home folder.

    The name of an unknown user stays as it is, so that the caller reports a path that does not exist:
    `Path.expanduser` raises a RuntimeError that does not name it.
    """
    return Path(os.path.expanduser(path))
