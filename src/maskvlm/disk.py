"""What stands between a file that was written and one that survives a power failure."""

import os
from pathlib import Path


def sync_folder(folder: Path) -> None:
    """Make the renames in it permanent, and in their order, where the system can."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
